/* SPDX-License-Identifier: Apache-2.0
 *
 * A predecessor's frames: they are imported from their descriptors, and wait for the session whose they are to be asked for.
 * What nobody asks for is ended. A frame that is not there any more, or can't be imported, is nowhere: for the core, its page
 * is lost, and so is POISONED if nobody else has it.
 */
#define _GNU_SOURCE
#include <errno.h>

#include <gmem/crash.h>

#include "cuda.h"

#define CHUNK 64

static bool is_wanted(const struct gmem_cuda_note *note, uint32_t generation)
{
	if (!(atomic_load(&note->state) & GMEM_CUDA_MADE) || atomic_load(&note->generation) != generation)
		return false;
	return atomic_load(&note->place) || !atomic_load(&note->owner); /* in use, or nobody's yet */
}

static bool adopt_frame(uint32_t number, uint32_t generation, int fd, void *arg)
{
	struct gmem_device *gpu = arg;
	struct gmem_cuda_frame *frame = &gpu->frames[number];
	struct gmem_cuda_note *note = &gpu->notes[number];
	CUresult r;

	if (!is_wanted(note, generation))
		return false;
	r = gpu->cu.import_fd(&frame->handle, (void *)(intptr_t)fd, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
	if (r) {
		gmem_cuda_failed(gpu, "cuMemImportFromShareableHandle", r);
		frame->handle = 0;
		return false;
	}
	r = gpu->cu.map(gmem_cuda_alias(gpu, number), GMEM_CUDA_BYTES, 0, frame->handle, 0);
	if (r) {
		gmem_cuda_failed(gpu, "cuMemMap", r);
		gpu->cu.release(frame->handle);
		frame->handle = 0;
		return false;
	}
	frame->fd = -1;
	frame->clean = !atomic_load(&note->owner);
	frame->foreign = atomic_load(&note->state) & GMEM_CUDA_FOREIGN;
	frame->unclaimed = true;
	frame->imports = NULL;
	if (number >= gpu->bumped)
		gpu->bumped = number + 1;
	gpu->made++;
	gmem_crash(GMEM_CRASH_RECOVER_FRAME);
	return true;
}

/* For those that follow each other in one call. */
static int give_access(struct gmem_device *gpu)
{
	const CUmemAccessDesc both = { .location = { CU_MEM_LOCATION_TYPE_DEVICE, gpu->id },
				       .flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE };
	CUresult r = CUDA_SUCCESS;

	for (uint32_t first = 0, end; !r && first < gpu->bumped; first = end + 1) {
		for (end = first; end < gpu->bumped && gpu->frames[end].handle; end++)
			;
		if (end > first)
			r = gpu->cu.set_access(gmem_cuda_alias(gpu, first), (uint64_t)(end - first) << GMEM_CUDA_SHIFT, &both, 1);
	}
	return r ? gmem_cuda_failed(gpu, "cuMemSetAccess", r) : 0;
}

/* Numbers without a frame, and frames that nobody has had. */
static void sort_frames(struct gmem_device *gpu)
{
	for (uint32_t number = 0; number < gpu->frame_max; number++) {
		struct gmem_cuda_note *note = &gpu->notes[number];

		if (!gpu->frames[number].handle) {
			if (atomic_load(&note->state))
				gmem_cuda_note_ended(gpu, number);
			if (number < gpu->bumped)
				gmem_cuda_push(gpu, &gpu->unused, number);
		} else if (!atomic_load(&note->owner)) {
			gpu->frames[number].unclaimed = false;
			gmem_cuda_push(gpu, &gpu->fresh, number);
		} else {
			gpu->unclaimed++;
		}
	}
}

int gmem_cuda_adopt(struct gmem_device *gpu)
{
	int err;

	gpu->settled = !gpu->held.keep || !gpu->held.keep->takes_over;
	gmem_cuda_enter(gpu);
	gmem_boxes_open(gpu->boxes, adopt_frame, gpu);
	gmem_crash(GMEM_CRASH_RECOVER_BOXES);
	err = give_access(gpu);
	sort_frames(gpu);
	return err;
}

static bool belongs(const struct gmem_mem *mem, const struct gmem_cuda_note *note)
{
	uint64_t place = atomic_load(&note->place), page = (place >> 8) - 1;

	return atomic_load(&note->owner) == mem->owner && (place & 255) == (uint64_t)mem->class_ && page < mem->pages &&
	       !mem->frame_of[page];
}

void gmem_cuda_claim_locked(struct gmem_mem *mem)
{
	struct gmem_device *gpu = mem->gpu;

	for (uint32_t number = 0; gpu->unclaimed && number < gpu->bumped; number++) {
		struct gmem_cuda_frame *frame = &gpu->frames[number];

		if (!frame->unclaimed || !belongs(mem, &gpu->notes[number]))
			continue;
		mem->frame_of[(atomic_load(&gpu->notes[number].place) >> 8) - 1] = number + 1;
		mem->used++;
		frame->unclaimed = false;
		gpu->unclaimed--;
	}
}

static size_t take_unclaimed(struct gmem_device *gpu, uint32_t *frames)
{
	size_t count = 0;

	gmem_mutex_lock(&gpu->lock);
	for (uint32_t number = 0; gpu->unclaimed && count < CHUNK && number < gpu->bumped; number++)
		if (gpu->frames[number].unclaimed) {
			gpu->frames[number].unclaimed = false;
			gpu->unclaimed--;
			frames[count++] = number;
		}
	gmem_mutex_unlock(&gpu->lock);
	return count;
}

void gmem_cuda_end_unclaimed(struct gmem_device *gpu)
{
	uint32_t frames[CHUNK];
	size_t count;

	while ((count = take_unclaimed(gpu, frames)))
		gmem_cuda_end_frames(gpu, frames, count);
}
