/* SPDX-License-Identifier: Apache-2.0
 *
 * Frames of a GPU, and which of them are whose. Making one takes half a millisecond, nearly all of it for the descriptor
 * that another process, or a successor of this one, imports it by; so a thread makes some ahead, and those that a session
 * gives back wait for that session: what its processes have imported once must not come to another one. They count as the
 * session's until the device runs short, or they have not been needed for a while.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <gmem/sparse.h>
#include <gmem/stats.h>

#include "cuda.h"

#define LOOK_NS 500000000ull  /* how often the maker looks for frames that idle */
#define IDLE_NS 2000000000ull
#define IDLE_KEPT 32          /* that a session may keep */
#define CHUNK 64              /* frames freed at a time */

/* ---- lists ---- */

void gmem_cuda_push(struct gmem_device *gpu, struct gmem_cuda_list *list, uint32_t frame)
{
	gpu->frames[frame].next = list->count ? list->first : GMEM_CUDA_NONE;
	list->first = frame;
	list->count++;
}

static uint32_t pop_locked(struct gmem_device *gpu, struct gmem_cuda_list *list)
{
	uint32_t frame = list->first;

	if (!list->count)
		return GMEM_CUDA_NONE;
	list->first = gpu->frames[frame].next;
	list->count--;
	return frame;
}

static uint32_t take_number_locked(struct gmem_device *gpu)
{
	uint32_t frame = GMEM_CUDA_NONE;

	if (gpu->made >= gpu->frame_limit)
		return frame;
	frame = pop_locked(gpu, &gpu->unused);
	if (frame == GMEM_CUDA_NONE && gpu->bumped < gpu->frame_max)
		frame = gpu->bumped++;
	gpu->made += frame != GMEM_CUDA_NONE;
	return frame;
}

static void give_number_locked(struct gmem_device *gpu, uint32_t frame)
{
	gpu->made--;
	gmem_cuda_push(gpu, &gpu->unused, frame);
}

/* ---- making and ending frames ---- */

static CUmemAllocationProp properties(const struct gmem_device *gpu)
{
	return (CUmemAllocationProp){ .type = CU_MEM_ALLOCATION_TYPE_PINNED,
				      .requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
				      .location = { CU_MEM_LOCATION_TYPE_DEVICE, gpu->id } };
}

static int scrub(struct gmem_device *gpu, uint32_t frame)
{
	CUresult r = gpu->cu.fill8(gmem_cuda_alias(gpu, frame), 0, GMEM_CUDA_BYTES, gpu->scrub);

	return r ? gmem_cuda_failed(gpu, "cuMemsetD8Async", r) : 0;
}

/* Also after an error nothing may be under way: the frame's memory may be about to go. */
static int scrubbed(struct gmem_device *gpu)
{
	CUresult r = gpu->cu.stream_synchronize(gpu->scrub);

	if (r)
		gpu->cu.stream_synchronize(gpu->scrub);
	return r ? gmem_cuda_failed(gpu, "cuMemsetD8Async", r) : 0;
}

static int map_alias(struct gmem_device *gpu, uint32_t frame)
{
	const CUmemAccessDesc both = { .location = { CU_MEM_LOCATION_TYPE_DEVICE, gpu->id },
				       .flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE };
	CUdeviceptr at = gmem_cuda_alias(gpu, frame);
	CUresult r = gpu->cu.map(at, GMEM_CUDA_BYTES, 0, gpu->frames[frame].handle, 0);

	if (r)
		return gmem_cuda_failed(gpu, "cuMemMap", r);
	r = gpu->cu.set_access(at, GMEM_CUDA_BYTES, &both, 1);
	if (r)
		gpu->cu.unmap(at, GMEM_CUDA_BYTES);
	return r ? gmem_cuda_failed(gpu, "cuMemSetAccess", r) : 0;
}

/* Else it is with us alone: a successor would not find it. */
static void put_away(struct gmem_device *gpu, uint32_t number, int fd)
{
	int err = gmem_cuda_note_made(gpu, number, fd);

	if (!err) {
		close(fd);
		return;
	}
	gmem_mutex_lock(&gpu->lock);
	gpu->frames[number].fd = fd;
	snprintf(gpu->error, sizeof(gpu->error), "a frame would not outlive gmemd: its descriptor can't be put away: %s",
		 strerror(-err));
	gmem_mutex_unlock(&gpu->lock);
}

/* Of zeros: what is in a handle that was just made, nobody says. */
static int make_frame(struct gmem_device *gpu, uint32_t number)
{
	const CUmemAllocationProp prop = properties(gpu);
	struct gmem_cuda_frame *frame = &gpu->frames[number];
	int fd = -1, err;
	CUresult r;

	gmem_cuda_enter(gpu);
	r = gpu->cu.create(&frame->handle, GMEM_CUDA_BYTES, &prop, 0);
	if (r) {
		frame->handle = 0;
		return gmem_cuda_failed(gpu, "cuMemCreate", r);
	}
	r = gpu->cu.export_fd(&fd, frame->handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
	err = r ? gmem_cuda_failed(gpu, "cuMemExportToShareableHandle", r) : map_alias(gpu, number);
	if (!err) {
		err = scrub(gpu, number);
		if (!err)
			err = scrubbed(gpu);
		if (err)
			gpu->cu.unmap(gmem_cuda_alias(gpu, number), GMEM_CUDA_BYTES);
	}
	if (err) {
		if (fd >= 0)
			close(fd);
		gpu->cu.release(frame->handle);
		frame->handle = 0;
		return err;
	}
	frame->fd = -1;
	frame->clean = true;
	frame->foreign = false;
	frame->imports = NULL;
	put_away(gpu, number, fd);
	return 0;
}

/* No context has it any more. */
static void end_frame(struct gmem_device *gpu, uint32_t number)
{
	struct gmem_cuda_frame *frame = &gpu->frames[number];

	gmem_cuda_note_ended(gpu, number);
	gpu->cu.unmap(gmem_cuda_alias(gpu, number), GMEM_CUDA_BYTES);
	gpu->cu.release(frame->handle);
	frame->handle = 0;
	if (frame->fd >= 0)
		close(frame->fd);
	frame->fd = -1;
}

void gmem_cuda_end_frames(struct gmem_device *gpu, const uint32_t *frames, size_t count)
{
	gmem_cuda_revoke(gpu, frames, count, true);
	gmem_cuda_enter(gpu);
	for (size_t i = 0; i < count; i++)
		end_frame(gpu, frames[i]);
	gmem_boxes_drop(gpu->boxes, frames, count); /* as long as it is there, so is the memory */
	gmem_mutex_lock(&gpu->lock);
	for (size_t i = 0; i < count; i++)
		give_number_locked(gpu, frames[i]);
	gmem_mutex_unlock(&gpu->lock);
}

int gmem_cuda_frame_fd(struct gmem_device *gpu, uint32_t number, int *ret_fd)
{
	struct gmem_cuda_frame *frame = &gpu->frames[number];
	int fd = -1;
	CUresult r;

	if (!gmem_boxes_get(gpu->boxes, number, &fd)) {
		*ret_fd = fd;
		return 0;
	}
	gmem_mutex_lock(&gpu->lock);
	fd = frame->fd;
	frame->fd = -1;
	gmem_mutex_unlock(&gpu->lock);
	if (fd < 0) {
		gmem_cuda_enter(gpu);
		r = gpu->cu.export_fd(&fd, frame->handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
		if (r)
			return gmem_cuda_failed(gpu, "cuMemExportToShareableHandle", r);
	}
	*ret_fd = fd;
	return 0;
}

/* ---- the maker ---- */

static uint32_t reserve_frames(const struct gmem_device *gpu)
{
	return (uint32_t)(gpu->reserve >> GMEM_CUDA_SHIFT);
}

static bool wants_frame_locked(const struct gmem_device *gpu)
{
	return gpu->fresh.count < reserve_frames(gpu) && gpu->made < gpu->frame_limit && gpu->settled &&
	       !atomic_load(&gpu->lost);
}

/* Called and returns with the lock held. False: there is no memory just now. */
static bool make_one_locked(struct gmem_device *gpu)
{
	uint32_t number = take_number_locked(gpu);
	int err;

	gpu->making = true;
	gmem_mutex_unlock(&gpu->lock);
	err = make_frame(gpu, number);
	gmem_mutex_lock(&gpu->lock);
	gpu->making = false;
	pthread_cond_broadcast(&gpu->arrived);
	if (err)
		give_number_locked(gpu, number);
	else
		gmem_cuda_push(gpu, &gpu->fresh, number);
	return !err;
}

static size_t take_idle_locked(struct gmem_device *gpu, uint32_t *frames, size_t most)
{
	uint64_t now = gmem_now_ns();
	size_t count = 0;

	for (struct gmem_mem *mem = gpu->mems; mem; mem = mem->next)
		while (count < most && mem->cached.count > IDLE_KEPT && now - mem->used_ns > IDLE_NS)
			frames[count++] = pop_locked(gpu, &mem->cached);
	return count;
}

static void *maker_thread(void *arg)
{
	struct gmem_device *gpu = arg;
	uint32_t idle[CHUNK];

	pthread_setname_np(pthread_self(), "gmem-frames");
	gmem_mutex_lock(&gpu->lock);
	while (!gpu->stop) {
		size_t count;

		if (wants_frame_locked(gpu) && make_one_locked(gpu))
			continue;
		count = take_idle_locked(gpu, idle, CHUNK);
		if (count) {
			gmem_mutex_unlock(&gpu->lock);
			gmem_cuda_end_frames(gpu, idle, count);
			gmem_mutex_lock(&gpu->lock);
		} else if (!gpu->stop) {
			gmem_mutex_wait(&gpu->lock, &gpu->wanted, LOOK_NS);
		}
	}
	gmem_mutex_unlock(&gpu->lock);
	return NULL;
}

int gmem_cuda_frames_start(struct gmem_device *gpu)
{
	CUresult r;
	int err;

	gmem_cuda_enter(gpu);
	gpu->frames = gmem_sparse_map(gpu->frame_max * sizeof(*gpu->frames));
	if (!gpu->frames)
		return -ENOMEM;
	r = gpu->cu.stream_create(&gpu->scrub, CU_STREAM_NON_BLOCKING);
	if (r)
		return gmem_cuda_failed(gpu, "cuStreamCreate", r);
	r = gpu->cu.reserve(&gpu->alias, gmem_cuda_alias_bytes(gpu), GMEM_CUDA_BYTES, 0, 0);
	if (r) {
		gpu->alias = 0;
		return gmem_cuda_failed(gpu, "cuMemAddressReserve", r);
	}
	err = gmem_cuda_notes_open(gpu);
	if (!err)
		err = gmem_boxes_create(gpu->held.keep, gpu->frame_max, gmem_cuda_notes_boxes(gpu), &gpu->boxes);
	if (!err)
		err = gmem_cuda_adopt(gpu);
	if (!err)
		err = -pthread_create(&gpu->maker, NULL, maker_thread, gpu);
	return err;
}

void gmem_cuda_frames_stop(struct gmem_device *gpu)
{
	gmem_mutex_lock(&gpu->lock);
	gpu->stop = true;
	pthread_cond_broadcast(&gpu->wanted);
	gmem_mutex_unlock(&gpu->lock);
	pthread_join(gpu->maker, NULL);
}

static size_t take_from(struct gmem_device *gpu, struct gmem_cuda_list *list, uint32_t *frames)
{
	size_t count = 0;

	gmem_mutex_lock(&gpu->lock);
	while (count < CHUNK && list->count)
		frames[count++] = pop_locked(gpu, list);
	gmem_mutex_unlock(&gpu->lock);
	return count;
}

void gmem_cuda_frames_end(struct gmem_device *gpu)
{
	uint32_t frames[CHUNK];
	size_t count;

	while ((count = take_from(gpu, &gpu->fresh, frames)))
		gmem_cuda_end_frames(gpu, frames, count);
	gmem_cuda_end_unclaimed(gpu);
	gmem_boxes_destroy(gpu->boxes);
	gmem_cuda_notes_close(gpu);
	if (gpu->alias)
		gpu->cu.unreserve(gpu->alias, gmem_cuda_alias_bytes(gpu));
	if (gpu->scrub)
		gpu->cu.stream_destroy(gpu->scrub);
	gmem_sparse_unmap(gpu->frames, gpu->frame_max * sizeof(*gpu->frames));
}

/* ---- mems ---- */

int gmem_cuda_mem_create(struct gmem_device *gpu, uint64_t owner, enum gmem_class class_, uint64_t bytes, struct gmem_mem **ret)
{
	struct gmem_mem *mem = calloc(1, sizeof(*mem));

	if (!mem)
		return -ENOMEM;
	*mem = (struct gmem_mem){ .gpu = gpu, .owner = owner, .class_ = class_, .pages = bytes >> GMEM_CUDA_SHIFT };
	mem->frame_of = gmem_sparse_map(mem->pages * sizeof(*mem->frame_of));
	if (!mem->frame_of) {
		free(mem);
		return -ENOMEM;
	}
	gmem_cuda_ref(gpu);
	gmem_mutex_lock(&gpu->lock);
	mem->next = gpu->mems;
	gpu->mems = mem;
	gmem_cuda_claim_locked(mem);
	gmem_mutex_unlock(&gpu->lock);
	*ret = mem;
	return 0;
}

void gmem_cuda_mem_destroy(struct gmem_mem *mem)
{
	struct gmem_device *gpu = mem->gpu;
	struct gmem_mem **at = &gpu->mems;
	uint32_t frames[CHUNK];
	size_t count;

	gmem_mutex_lock(&gpu->lock);
	while (*at != mem)
		at = &(*at)->next;
	*at = mem->next;
	gmem_mutex_unlock(&gpu->lock);
	gmem_cuda_mem_free(mem, 0, mem->pages << GMEM_CUDA_SHIFT);
	while ((count = take_from(gpu, &mem->cached, frames)))
		gmem_cuda_end_frames(gpu, frames, count);
	gmem_sparse_unmap(mem->frame_of, mem->pages * sizeof(*mem->frame_of));
	free(mem);
	gmem_cuda_unref(gpu);
}

/* One that its session had before, or that nobody had. */
static uint32_t take_ready_locked(struct gmem_mem *mem)
{
	uint32_t frame = pop_locked(mem->gpu, &mem->cached);

	return frame == GMEM_CUDA_NONE ? pop_locked(mem->gpu, &mem->gpu->fresh) : frame;
}

/* The longest unused session's gives one up. False: nobody has any. */
static bool shrink_others(struct gmem_device *gpu)
{
	struct gmem_mem *oldest = NULL;
	uint32_t frame = GMEM_CUDA_NONE;

	gmem_mutex_lock(&gpu->lock);
	for (struct gmem_mem *mem = gpu->mems; mem; mem = mem->next)
		if (mem->cached.count && (!oldest || mem->used_ns < oldest->used_ns))
			oldest = mem;
	if (oldest)
		frame = pop_locked(gpu, &oldest->cached);
	gmem_mutex_unlock(&gpu->lock);
	if (frame != GMEM_CUDA_NONE)
		gmem_cuda_end_frames(gpu, &frame, 1);
	return frame != GMEM_CUDA_NONE;
}

/* What the maker is at may be the last one there can be. False: it makes none. */
static bool await_maker(struct gmem_device *gpu)
{
	bool made;

	gmem_mutex_lock(&gpu->lock);
	made = gpu->making;
	while (gpu->making)
		gmem_mutex_wait(&gpu->lock, &gpu->arrived, 0);
	gmem_mutex_unlock(&gpu->lock);
	return made;
}

static int take_frame(struct gmem_mem *mem, uint32_t *ret)
{
	struct gmem_device *gpu = mem->gpu;
	int err = -ENOSPC;

	do {
		uint32_t frame;

		gmem_mutex_lock(&gpu->lock);
		mem->used_ns = gmem_now_ns();
		frame = take_ready_locked(mem);
		if (gpu->fresh.count < reserve_frames(gpu) / 2)
			pthread_cond_signal(&gpu->wanted);
		if (frame != GMEM_CUDA_NONE) {
			gmem_mutex_unlock(&gpu->lock);
			*ret = frame;
			return 0;
		}
		frame = take_number_locked(gpu);
		gmem_mutex_unlock(&gpu->lock);
		if (frame == GMEM_CUDA_NONE)
			continue;
		err = make_frame(gpu, frame);
		if (!err) {
			*ret = frame;
			return 0;
		}
		gmem_mutex_lock(&gpu->lock);
		give_number_locked(gpu, frame);
		gmem_mutex_unlock(&gpu->lock);
	} while (err == -ENOSPC && (shrink_others(gpu) || await_maker(gpu)));
	return err;
}

static int put_frame(struct gmem_mem *mem, uint64_t page, bool zeroed, bool *scrubs)
{
	struct gmem_device *gpu = mem->gpu;
	uint32_t frame = GMEM_CUDA_NONE;
	int err = take_frame(mem, &frame);

	if (err)
		return err;
	if (zeroed && !gpu->frames[frame].clean) {
		err = scrub(gpu, frame);
		*scrubs = true;
	}
	if (!err)
		gmem_cuda_note_placed(gpu, frame, mem, page);
	gmem_mutex_lock(&gpu->lock);
	gpu->frames[frame].clean = false;
	if (err) {
		gmem_cuda_push(gpu, &mem->cached, frame);
	} else {
		mem->frame_of[page] = frame + 1;
		mem->used++;
	}
	gmem_mutex_unlock(&gpu->lock);
	return err;
}

int gmem_cuda_mem_alloc(struct gmem_mem *mem, uint64_t offset, uint64_t bytes, bool zeroed)
{
	uint64_t first = offset >> GMEM_CUDA_SHIFT, end = (offset + bytes) >> GMEM_CUDA_SHIFT, made = 0;
	bool scrubs = false;
	int err = 0;

	if ((offset | bytes) & (GMEM_CUDA_BYTES - 1))
		return -EOPNOTSUPP;
	if (atomic_load(&mem->gpu->lost))
		return -EIO;
	gmem_cuda_enter(mem->gpu);
	for (uint64_t page = first; !err && page < end; page++) {
		if (gmem_cuda_mem_frame(mem, page << GMEM_CUDA_SHIFT) != GMEM_CUDA_NONE)
			continue;
		err = put_frame(mem, page, zeroed, &scrubs);
		made += !err;
	}
	if (scrubs && scrubbed(mem->gpu))
		err = -EIO;
	/* pages are asked for that are not there: what was made now is in front */
	if (err && made)
		gmem_cuda_mem_free(mem, offset, made << GMEM_CUDA_SHIFT);
	return err;
}

/* Frames of [*page, end), at most CHUNK. */
static size_t gather(struct gmem_mem *mem, uint64_t *page, uint64_t end, uint32_t *frames, uint64_t *pages)
{
	size_t count = 0;

	gmem_mutex_lock(&mem->gpu->lock);
	for (; mem->used && *page < end && count < CHUNK; (*page)++)
		if (mem->frame_of[*page]) {
			frames[count] = mem->frame_of[*page] - 1;
			pages[count++] = *page;
		}
	gmem_mutex_unlock(&mem->gpu->lock);
	return count;
}

int gmem_cuda_mem_free(struct gmem_mem *mem, uint64_t offset, uint64_t bytes)
{
	uint64_t page = offset >> GMEM_CUDA_SHIFT, end = (offset + bytes) >> GMEM_CUDA_SHIFT, pages[CHUNK];
	struct gmem_device *gpu = mem->gpu;
	uint32_t frames[CHUNK];
	size_t count;

	while ((count = gather(mem, &page, end, frames, pages))) {
		gmem_cuda_revoke(gpu, frames, count, false);
		for (size_t i = 0; i < count; i++) {
			bool foreign;

			gmem_cuda_note_left(gpu, frames[i]);
			gmem_mutex_lock(&gpu->lock);
			mem->frame_of[pages[i]] = 0;
			mem->used--;
			foreign = gpu->frames[frames[i]].foreign;
			if (!foreign)
				gmem_cuda_push(gpu, &mem->cached, frames[i]);
			gmem_mutex_unlock(&gpu->lock);
			if (foreign) /* another session's processes could reach it as long as it is there */
				gmem_cuda_end_frames(gpu, &frames[i], 1);
		}
	}
	return 0;
}

uint32_t gmem_cuda_mem_frame(struct gmem_mem *mem, uint64_t offset)
{
	uint32_t frame;

	gmem_mutex_lock(&mem->gpu->lock);
	frame = mem->frame_of[offset >> GMEM_CUDA_SHIFT];
	gmem_mutex_unlock(&mem->gpu->lock);
	return frame ? frame - 1 : GMEM_CUDA_NONE;
}

void *gmem_cuda_mem_at(struct gmem_mem *mem, uint64_t offset)
{
	uint32_t frame = gmem_cuda_mem_frame(mem, offset);

	return frame == GMEM_CUDA_NONE ? NULL : (void *)(uintptr_t)(gmem_cuda_alias(mem->gpu, frame) + (offset & (GMEM_CUDA_BYTES - 1)));
}
