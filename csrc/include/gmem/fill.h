/* SPDX-License-Identifier: Apache-2.0
 *
 * The fillers: threads for what a fault thread must not wait for. Work comes over a bounded queue, now or at a time.
 */
#ifndef GMEM_FILL_H
#define GMEM_FILL_H

#include <pthread.h>

#include <gmem/fault.h>
#include <gmem/lockrank.h>

#define GMEM_WORK_RING 4096
#define GMEM_WORK_DELAYED 64

struct gmem_object;

/* A fault (view set), a view's streams (ahead too), or pages to discard (object set). References are held. */
struct gmem_work {
	struct gmem_fault fault;
	bool ahead;
	struct gmem_object *object;
	uint64_t offset, bytes;
	uint64_t not_before_ns; /* 0: now */
};

struct gmem_fillers {
	pthread_t threads[GMEM_THREADS_MAX];
	_Atomic uint32_t count; /* (A) it only grows while the core runs */
	struct gmem_mutex lock;
	pthread_cond_t ready;
	struct gmem_work ring[GMEM_WORK_RING];    /* lock */
	size_t ring_head, ring_count;             /* lock */
	struct gmem_work delayed[GMEM_WORK_DELAYED]; /* lock; in no order */
	size_t delayed_count;                     /* lock */
	uint64_t helped;                          /* lock; streams that it was asked to help */
	bool stop;                                /* lock */
};

/* gmem_fillers_stop() also after an error. */
int gmem_fillers_start(struct gmem_core *core);
/* What is queued is done before. */
void gmem_fillers_stop(struct gmem_core *core);
/* One more, if there may be one. */
void gmem_fillers_grow(struct gmem_core *core);
/* -ENOBUFS: no room. Takes over the references on success. */
int gmem_work_post(struct gmem_core *core, const struct gmem_work *work);

#endif
