/* SPDX-License-Identifier: Apache-2.0
 *
 * A predecessor's contexts. Their processes have imported and mapped what it had asked for, and kernels may be running on
 * that; so they are asked what it is (gmem_wire.h), and go on with it. Who does not say in time loses the context.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <sys/socket.h>

#include <gmem/crash.h>
#include <gmem/stats.h>

#include "cuda_pmap.h"

/* What is there no more, or never was this session's, has to go from there, too. */
static int listed_locked(struct gmem_pmap *pmap, const struct gmem_channel_frame *told)
{
	struct gmem_device *gpu = pmap->gpu;
	struct gmem_cuda_import *import;
	struct gmem_cuda_note *note;
	int err = 0;

	if (told->frame >= gpu->frame_max || told->va & (GMEM_CUDA_BYTES - 1) || told->va >= GMEM_CUDA_VA_END ||
	    gmem_cuda_find_import(pmap, told->frame) || (told->va && *gmem_cuda_pmap_at(pmap, told->va)))
		return gmem_cuda_pmap_fail_locked(pmap);
	note = &gpu->notes[told->frame];
	if (!gpu->frames[told->frame].handle || (atomic_load(&note->owner) != pmap->as_id && !gpu->frames[told->frame].foreign)) {
		if (told->va)
			err = gmem_cuda_pmap_queue_locked(pmap, GMEM_CHANNEL_UNMAP, told->frame, told->va, false);
		return err ? err : gmem_cuda_pmap_queue_locked(pmap, GMEM_CHANNEL_FORGET, told->frame, 0, false);
	}
	import = gmem_cuda_add_import(pmap, told->frame, atomic_load(&note->owner));
	if (!import)
		return gmem_cuda_pmap_fail_locked(pmap);
	import->va = told->va;
	import->writable = told->writable;
	if (told->va)
		*gmem_cuda_pmap_at(pmap, told->va) = told->frame + 1;
	return 0;
}

/* One message: 1: it has said all; 0: there is more to come; else it is over. Answers to the predecessor are in front. */
static int hear_locked(struct gmem_pmap *pmap, uint64_t until)
{
	union {
		struct gmem_channel_list list;
		struct gmem_channel_done done;
	} told;
	const size_t head = offsetof(struct gmem_channel_list, frames);
	ssize_t n;
	int err = 0;

	if (!gmem_cuda_pmap_wait(pmap, POLLIN, until)) {
		gmem_cuda_say(pmap->gpu, "a context's process did not say what it has", 0);
		return gmem_cuda_pmap_fail_locked(pmap);
	}
	n = recv(pmap->fd, &told, sizeof(told), MSG_DONTWAIT);
	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return 0;
	if (n == sizeof(told.done))
		return told.done.sequence != pmap->list ? 0 : told.done.status ? gmem_cuda_pmap_fail_locked(pmap) : 1;
	if (n < (ssize_t)head || told.list.count > GMEM_CHANNEL_STEPS ||
	    (size_t)n != head + told.list.count * sizeof(told.list.frames[0]))
		return gmem_cuda_pmap_fail_locked(pmap);
	for (uint32_t i = 0; !err && told.list.sequence == pmap->list && i < told.list.count; i++)
		err = listed_locked(pmap, &told.list.frames[i]);
	return err;
}

/* Asks at once, so that all have their answers ready when the first one is waited for. */
int gmem_cuda_pmap_adopt(struct gmem_device *gpu, uint64_t as_id, int channel, struct gmem_pmap **ret)
{
	struct gmem_channel_batch ask = { .count = 1, .steps = { { .op = GMEM_CHANNEL_LIST } } };
	const size_t bytes = offsetof(struct gmem_channel_batch, steps) + sizeof(ask.steps[0]);
	struct gmem_pmap *pmap;
	int err = gmem_cuda_pmap_make(gpu, as_id, channel, &pmap);

	if (err)
		return err;
	pmap->list = ask.sequence = 1ull << 63 | gmem_now_ns();
	if (send(channel, &ask, bytes, MSG_NOSIGNAL | MSG_DONTWAIT) != (ssize_t)bytes) {
		gmem_cuda_pmap_unmake(pmap);
		return -EOWNERDEAD;
	}
	gmem_crash(GMEM_CRASH_RECOVER_CHANNEL);
	atomic_fetch_add(&pmap->refs, 1);
	gmem_mutex_lock(&gpu->lock);
	pmap->next_resumed = gpu->resumed;
	gpu->resumed = pmap;
	gmem_mutex_unlock(&gpu->lock);
	*ret = pmap;
	return 0;
}

static struct gmem_pmap *take_resumed(struct gmem_device *gpu)
{
	struct gmem_pmap *pmap;

	gmem_mutex_lock(&gpu->lock);
	pmap = gpu->resumed;
	if (pmap)
		gpu->resumed = pmap->next_resumed;
	gmem_mutex_unlock(&gpu->lock);
	return pmap;
}

void gmem_cuda_settle(struct gmem_device *gpu)
{
	uint64_t until = gmem_now_ns() + gpu->patience_ms * 1000000;
	struct gmem_pmap *pmap;

	while ((pmap = take_resumed(gpu))) {
		int heard = 0;

		gmem_mutex_lock(&pmap->lock);
		while (!heard && !pmap->dead)
			heard = hear_locked(pmap, until);
		gmem_mutex_unlock(&pmap->lock);
		gmem_crash(GMEM_CRASH_RECOVER_LISTED);
		gmem_cuda_pmap_unref(pmap);
	}
	gmem_cuda_end_unclaimed(gpu);
	gmem_mutex_lock(&gpu->lock);
	gpu->settled = true;
	pthread_cond_broadcast(&gpu->wanted);
	gmem_mutex_unlock(&gpu->lock);
}
