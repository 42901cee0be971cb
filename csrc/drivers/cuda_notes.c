/* SPDX-License-Identifier: Apache-2.0
 *
 * What a successor has to know of each frame: whose it is, and where. The descriptors of frames are in boxes, and the kernel
 * keeps their memory for as long as these are held; the notes are in a file that is held, too. Each step is one store, in an
 * order in which whoever comes at any instant finds a frame whole, or finds that it is nobody's and ends it:
 *
 *   made     its descriptor is in a box with the note's generation; only then MADE is set. It is all zeros until it has an owner
 *   placed   owner, then place: before anything is written to it, and before the logical page table says that it is there
 *   left     place is cleared, and owner stays: what the owner's processes could reach is nobody else's
 *   ended    MADE is cleared first: what is in the box still is dropped
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <gmem/crash.h>

#include "cuda.h"

#define MAGIC 0x53454d4152466475ull /* "udFRAMES" */
#define VERSION 1
#define HEAD_BYTES 4096

struct gmem_cuda_head {
	uint64_t magic;
	uint32_t version, note_bytes, frame_max;
	_Atomic uint32_t boxes;
	uint8_t uuid[16];
};

static uint64_t file_bytes(const struct gmem_device *gpu)
{
	return HEAD_BYTES + (uint64_t)gpu->frame_max * sizeof(struct gmem_cuda_note);
}

static int map_notes(struct gmem_device *gpu, int fd)
{
	uint8_t *at = mmap(NULL, file_bytes(gpu), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);

	if (at == MAP_FAILED)
		return -errno;
	madvise(at, file_bytes(gpu), MADV_DONTFORK);
	gpu->head = (struct gmem_cuda_head *)(void *)at;
	gpu->notes = (struct gmem_cuda_note *)(void *)(at + HEAD_BYTES);
	return 0;
}

static void unmap_notes(struct gmem_device *gpu)
{
	if (gpu->head)
		munmap(gpu->head, file_bytes(gpu));
	gpu->head = NULL;
}

static int make_notes(struct gmem_device *gpu)
{
	int fd = memfd_create("gmem-cuda-frames", MFD_CLOEXEC), err;

	if (fd < 0)
		return -errno;
	err = ftruncate(fd, (off_t)file_bytes(gpu)) ? -errno : map_notes(gpu, fd);
	if (!err) {
		*gpu->head = (struct gmem_cuda_head){ .magic = MAGIC, .version = VERSION, .frame_max = gpu->frame_max,
						      .note_bytes = sizeof(struct gmem_cuda_note) };
		memcpy(gpu->head->uuid, gpu->uuid, sizeof(gpu->uuid));
		err = gmem_driver_keep_fd(&gpu->held, "frames", fd);
	}
	close(fd);
	return err;
}

/* Whether it says what a gmemd of this version writes: 0; -EPROTONOSUPPORT; -EBADMSG: it is none, or damaged. */
static int look_at(const struct gmem_device *gpu, int fd, struct gmem_cuda_head *ret)
{
	struct stat st;

	if (fstat(fd, &st) || pread(fd, ret, sizeof(*ret), 0) != sizeof(*ret) || ret->magic != MAGIC)
		return -EBADMSG;
	if (ret->version != VERSION || ret->note_bytes != sizeof(struct gmem_cuda_note))
		return -EPROTONOSUPPORT;
	if (ret->frame_max != gpu->frame_max || (uint64_t)st.st_size != file_bytes(gpu) ||
	    memcmp(ret->uuid, gpu->uuid, sizeof(gpu->uuid)))
		return -EBADMSG; /* another GPU */
	return 0;
}

int gmem_cuda_notes_open(struct gmem_device *gpu)
{
	struct gmem_cuda_head head;
	int fd = gmem_driver_kept_fd(&gpu->held, "frames"), err;

	if (fd < 0)
		return make_notes(gpu);
	err = look_at(gpu, fd, &head);
	if (err == -EPROTONOSUPPORT)
		snprintf(gpu->error, sizeof(gpu->error), "what was left on it is of version %u, and this is %u", head.version,
			 VERSION);
	if (!err)
		err = map_notes(gpu, fd);
	close(fd);
	if (err != -EBADMSG)
		return err;
	/* what is in the boxes means nothing without it: nobody asks for them, and so they go */
	gmem_driver_drop_fd(&gpu->held, "frames");
	return make_notes(gpu);
}

void gmem_cuda_notes_close(struct gmem_device *gpu)
{
	unmap_notes(gpu);
}

_Atomic uint32_t *gmem_cuda_notes_boxes(struct gmem_device *gpu)
{
	return &gpu->head->boxes;
}

/* ---- one frame ---- */

int gmem_cuda_note_made(struct gmem_device *gpu, uint32_t frame, int fd)
{
	struct gmem_cuda_note *note = &gpu->notes[frame];
	uint32_t generation = atomic_load(&note->generation) + 1;
	int err;

	atomic_store(&note->generation, generation);
	atomic_store(&note->place, 0);
	atomic_store(&note->owner, 0);
	err = gmem_boxes_put(gpu->boxes, frame, generation, fd);
	if (err)
		return err;
	atomic_store(&note->state, GMEM_CUDA_MADE);
	gmem_crash(GMEM_CRASH_FRAME_NOTED);
	return 0;
}

void gmem_cuda_note_placed(struct gmem_device *gpu, uint32_t frame, const struct gmem_mem *mem, uint64_t page)
{
	struct gmem_cuda_note *note = &gpu->notes[frame];

	atomic_store(&note->owner, mem->owner);
	atomic_store(&note->place, (page + 1) << 8 | (uint64_t)mem->class_);
	gmem_crash(GMEM_CRASH_FRAME_PLACED);
}

void gmem_cuda_note_left(struct gmem_device *gpu, uint32_t frame)
{
	atomic_store(&gpu->notes[frame].place, 0);
	gmem_crash(GMEM_CRASH_FRAME_LEFT);
}

void gmem_cuda_note_foreign(struct gmem_device *gpu, uint32_t frame)
{
	atomic_fetch_or(&gpu->notes[frame].state, GMEM_CUDA_FOREIGN);
}

void gmem_cuda_note_ended(struct gmem_device *gpu, uint32_t frame)
{
	atomic_store(&gpu->notes[frame].state, 0);
	gmem_crash(GMEM_CRASH_FRAME_ENDED);
}
