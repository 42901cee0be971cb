/* SPDX-License-Identifier: Apache-2.0
 *
 * The copy engine: host memory is not pinned (registering a page costs more than copying it, and a page that is punched
 * would stay pinned), so threads carry it through small buffers that are, each two of them: one is filled or emptied while
 * the other is with the DMA. A copy is cut into pieces for all threads; several copies may be under way.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <gmem/memfd.h>

#include "cuda.h"

#define BUFFERS 2
#define TRIES 3
#define PIECE_MAX (2ull << 20)
#define PIECE_MIN (256ull << 10)

struct job {
	const struct gmem_sg *sg;
	size_t count, at;        /* lock; entries, the one to be cut next */
	uint64_t offset, piece;  /* lock; where in it; how large */
	unsigned busy;           /* lock; threads that are at it */
	int err;                 /* lock */
	pthread_cond_t done;
	struct job *next;        /* lock */
};

struct slot {
	uint8_t *buffer;
	CUevent event;
	struct gmem_sg piece; /* what has to be done with it when the DMA is through; 0 bytes: nothing */
};

struct lane {
	struct gmem_device *gpu;
	pthread_t thread;
	CUstream stream;
	struct slot slots[BUFFERS];
};

struct gmem_cuda_copier {
	struct gmem_mutex lock;
	pthread_cond_t work;
	bool stop;         /* lock */
	struct job *jobs;  /* lock; with pieces left */
	size_t lane_count, started; /* (C) */
	struct lane lanes[];
};

static bool on_device(const struct gmem_device *gpu, const void *at)
{
	return (uintptr_t)at - gpu->alias < gmem_cuda_alias_bytes(gpu);
}

static CUdeviceptr device_ptr(const void *at)
{
	return (CUdeviceptr)(uintptr_t)at;
}

/* ---- one piece ---- */

/* A slot whose DMA may still be under way must not be used for another piece. */
static int piece_failed(struct lane *lane, const char *call, CUresult result)
{
	lane->gpu->cu.stream_synchronize(lane->stream);
	return gmem_cuda_failed(lane->gpu, call, result);
}

/* The DMA of a slot is through: its buffer can be used again, or first emptied. */
static int settle(struct lane *lane, struct slot *slot)
{
	struct gmem_device *gpu = lane->gpu;
	struct gmem_sg piece = slot->piece;
	CUresult r;

	if (!piece.bytes)
		return 0;
	slot->piece.bytes = 0;
	r = gpu->cu.event_synchronize(slot->event);
	if (r)
		return piece_failed(lane, "cuEventSynchronize", r);
	return piece.dst && !on_device(gpu, piece.dst) ? gmem_alias_fill(piece.dst, slot->buffer, piece.bytes) : 0;
}

static int start_piece(struct lane *lane, struct slot *slot, struct gmem_sg piece)
{
	bool from = on_device(lane->gpu, piece.src), to = on_device(lane->gpu, piece.dst);
	struct gmem_device *gpu = lane->gpu;
	CUresult r;
	int err = 0;

	if (!from && !to)
		return gmem_copy(piece.dst, piece.src, piece.bytes);
	if (!from)
		err = gmem_copy(slot->buffer, piece.src, piece.bytes);
	if (err)
		return err;
	if (from && to)
		r = gpu->cu.copy_d2d(device_ptr(piece.dst), device_ptr(piece.src), piece.bytes, lane->stream);
	else if (from)
		r = gpu->cu.copy_d2h(slot->buffer, device_ptr(piece.src), piece.bytes, lane->stream);
	else
		r = gpu->cu.copy_h2d(device_ptr(piece.dst), slot->buffer, piece.bytes, lane->stream);
	if (r)
		return piece_failed(lane, "cuMemcpyAsync", r);
	r = gpu->cu.event_record(slot->event, lane->stream);
	if (r)
		return piece_failed(lane, "cuEventRecord", r);
	slot->piece = piece;
	return 0;
}

/* ---- jobs ---- */

/* False: nothing is left of it. Who takes the last piece takes the job out of the list. */
static bool cut_locked(struct gmem_cuda_copier *copier, struct job *job, struct gmem_sg *ret)
{
	const struct gmem_sg *sg = &job->sg[job->at];
	struct job **at = &copier->jobs;
	uint64_t left;

	if (job->at == job->count)
		return false;
	left = sg->bytes - job->offset;
	*ret = (struct gmem_sg){ (uint8_t *)sg->dst + job->offset, (const uint8_t *)sg->src + job->offset,
				 left < job->piece ? left : job->piece };
	job->offset += ret->bytes;
	if (job->offset == sg->bytes) {
		job->at++;
		job->offset = 0;
	}
	if (job->at == job->count || job->err) {
		job->at = job->count;
		while (*at != job)
			at = &(*at)->next;
		*at = job->next;
	}
	return true;
}

static void do_job_locked(struct gmem_cuda_copier *copier, struct lane *lane, struct job *job)
{
	struct gmem_sg piece;
	size_t turn = 0;
	int err = 0;

	job->busy++;
	while (cut_locked(copier, job, &piece)) {
		struct slot *slot = &lane->slots[turn++ % BUFFERS];

		gmem_mutex_unlock(&copier->lock);
		err = settle(lane, slot);
		if (!err)
			err = start_piece(lane, slot, piece);
		gmem_mutex_lock(&copier->lock);
		job->err = job->err ? job->err : err;
	}
	gmem_mutex_unlock(&copier->lock);
	for (size_t i = 0; i < BUFFERS; i++) {
		int last = settle(lane, &lane->slots[i]);

		err = err ? err : last;
	}
	gmem_mutex_lock(&copier->lock);
	job->err = job->err ? job->err : err;
	if (--job->busy == 0 && job->at == job->count)
		pthread_cond_signal(&job->done);
}

static void *lane_thread(void *arg)
{
	struct lane *lane = arg;
	struct gmem_cuda_copier *copier = lane->gpu->copier;

	pthread_setname_np(pthread_self(), "gmem-copy");
	gmem_cuda_enter(lane->gpu);
	gmem_mutex_lock(&copier->lock);
	for (;;) {
		if (copier->jobs)
			do_job_locked(copier, lane, copier->jobs);
		else if (copier->stop)
			break;
		else
			gmem_mutex_wait(&copier->lock, &copier->work, 0);
	}
	gmem_mutex_unlock(&copier->lock);
	return NULL;
}

/* A piece for each thread, and several for a long copy. Several pages for the host go as such: whole ones are made as they are
 * filled. */
static uint64_t piece_of(const struct gmem_cuda_copier *copier, const struct gmem_sg *sg, size_t count, bool to_host)
{
	uint64_t bytes = 0, piece;

	for (size_t i = 0; i < count; i++)
		bytes += sg[i].bytes;
	if (to_host && bytes >= 2 * PIECE_MAX)
		return PIECE_MAX;
	piece = (bytes / copier->lane_count + 0xffff) & ~0xffffull;
	return piece < PIECE_MIN ? PIECE_MIN : piece > PIECE_MAX ? PIECE_MAX : piece;
}

static int do_copy(struct gmem_device *gpu, const struct gmem_sg *sg, size_t count)
{
	struct gmem_cuda_copier *copier = gpu->copier;
	uint64_t piece = piece_of(copier, sg, count, !on_device(gpu, sg[0].dst));
	struct job job = { .sg = sg, .count = count, .piece = piece }, **last = &copier->jobs;

	pthread_cond_init(&job.done, NULL);
	gmem_mutex_lock(&copier->lock);
	while (*last)
		last = &(*last)->next;
	*last = &job;
	pthread_cond_broadcast(&copier->work);
	while (job.at < job.count || job.busy)
		gmem_mutex_wait(&copier->lock, &job.done, 0);
	gmem_mutex_unlock(&copier->lock);
	pthread_cond_destroy(&job.done);
	return job.err;
}

/* What has failed without the device being lost may work: a page that can't be read is SIGBUS to somebody. */
int gmem_cuda_copy(struct gmem_device *gpu, const struct gmem_sg *sg, size_t count, gmem_fence_t after, gmem_fence_t *ret)
{
	int err = -EIO;

	(void)after; /* a copy is complete when this returns */
	*ret = 0;
	if (!count)
		return 0;
	for (int tries = 0; err == -EIO && tries < TRIES && !atomic_load(&gpu->lost); tries++)
		err = do_copy(gpu, sg, count);
	/* What was there is gone; what was to go there is where it was. */
	if (atomic_load(&gpu->lost))
		err = on_device(gpu, sg[0].src) ? -EBADMSG : -EIO;
	return err;
}

/* ---- life ---- */

static int start_slot(struct gmem_device *gpu, struct slot *slot)
{
	void *buffer = mmap(NULL, PIECE_MAX, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	CUresult r;

	if (buffer == MAP_FAILED)
		return -ENOMEM;
	r = gpu->cu.host_register(buffer, PIECE_MAX, CU_MEMHOSTREGISTER_PORTABLE);
	if (r) {
		munmap(buffer, PIECE_MAX);
		return gmem_cuda_failed(gpu, "cuMemHostRegister", r);
	}
	slot->buffer = buffer;
	r = gpu->cu.event_create(&slot->event, CU_EVENT_DISABLE_TIMING);
	return r ? gmem_cuda_failed(gpu, "cuEventCreate", r) : 0;
}

static int start_lane(struct gmem_device *gpu, struct lane *lane)
{
	CUresult r = gpu->cu.stream_create(&lane->stream, CU_STREAM_NON_BLOCKING);
	int err = r ? gmem_cuda_failed(gpu, "cuStreamCreate", r) : 0;

	lane->gpu = gpu;
	for (size_t i = 0; !err && i < BUFFERS; i++)
		err = start_slot(gpu, &lane->slots[i]);
	return err ? err : -pthread_create(&lane->thread, NULL, lane_thread, lane);
}

static void end_lane(struct gmem_device *gpu, struct lane *lane)
{
	for (size_t i = 0; i < BUFFERS; i++) {
		struct slot *slot = &lane->slots[i];

		if (slot->event)
			gpu->cu.event_destroy(slot->event);
		if (slot->buffer) {
			gpu->cu.host_unregister(slot->buffer);
			munmap(slot->buffer, PIECE_MAX);
		}
	}
	if (lane->stream)
		gpu->cu.stream_destroy(lane->stream);
}

int gmem_cuda_copier_start(struct gmem_device *gpu)
{
	struct gmem_cuda_copier *copier = calloc(1, sizeof(*copier) + gpu->threads * sizeof(copier->lanes[0]));
	int err = 0;

	if (!copier)
		return -ENOMEM;
	gpu->copier = copier;
	copier->lane_count = gpu->threads;
	gmem_mutex_init(&copier->lock, GMEM_RANK_DRIVER);
	pthread_cond_init(&copier->work, NULL);
	while (!err && copier->started < copier->lane_count) {
		err = start_lane(gpu, &copier->lanes[copier->started]);
		copier->started += !err;
	}
	if (err)
		gmem_cuda_copier_stop(gpu);
	return err;
}

void gmem_cuda_copier_stop(struct gmem_device *gpu)
{
	struct gmem_cuda_copier *copier = gpu->copier;

	gmem_mutex_lock(&copier->lock);
	copier->stop = true;
	pthread_cond_broadcast(&copier->work);
	gmem_mutex_unlock(&copier->lock);
	for (size_t i = 0; i < copier->started; i++)
		pthread_join(copier->lanes[i].thread, NULL);
	gmem_cuda_enter(gpu);
	for (size_t i = 0; i < copier->lane_count; i++)
		end_lane(gpu, &copier->lanes[i]);
	gmem_mutex_deinit(&copier->lock);
	pthread_cond_destroy(&copier->work);
	gpu->copier = NULL;
	free(copier);
}
