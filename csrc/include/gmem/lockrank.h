/* SPDX-License-Identifier: Apache-2.0
 *
 * Locks with a rank: a thread takes locks in rising rank only. Debug builds (-DGMEM_DEBUG) check each acquisition
 * and abort with both names; release builds are plain pthread locks. The BUSY state of a page ranks between OBJECT
 * locks and HNODE but is no lock of this kind: whoever holds one only ever tries for a second.
 */
#ifndef GMEM_LOCKRANK_H
#define GMEM_LOCKRANK_H

#include <pthread.h>
#include <stdint.h>

enum gmem_rank {
	GMEM_RANK_DEVICES = 1, /* attach and detach, one at a time */
	GMEM_RANK_POOLS,       /* table of pools */
	GMEM_RANK_SESSIONS,    /* table of sessions */
	GMEM_RANK_AS,          /* regions of one address space */
	GMEM_RANK_OBJECT,      /* mappings of one object */
	GMEM_RANK_VIEWS,       /* views of one address space */
	GMEM_RANK_RELAY,       /* the buffer through which peers pass pages on */
	GMEM_RANK_HNODE,       /* frames and reclaim lists of one hnode */
	GMEM_RANK_ACCOUNT,     /* files of one account */
	GMEM_RANK_TENANTS,     /* table of tenants */
	GMEM_RANK_KEPT,        /* ranges that the client of one account keeps */
	GMEM_RANK_RANGE,       /* range allocators */
	GMEM_RANK_SLOTS,       /* watched views */
	GMEM_RANK_WORK,        /* work queue */
	GMEM_RANK_RING,        /* rings and their run queue */
	GMEM_RANK_AGENT,       /* the ring of an agent */
	GMEM_RANK_WATCH,       /* what each thread is doing */
	GMEM_RANK_TRACE,       /* beginning, reading and ending a trace */
	GMEM_RANK_EVENT,       /* event ring */
	GMEM_RANK_DRIVER_KEEP, /* names of what a driver has held */
	GMEM_RANK_KEEP,        /* what outlives the process */
	GMEM_RANK_TIER,        /* of zstd: slabs of one size class, or a stripe of its entries */
	GMEM_RANK_TIER_SPANS,  /* of zstd: file offsets that are free */
	GMEM_RANK_CHANNEL,     /* of cuda: what is said to one client's process */
	GMEM_RANK_BOXES,       /* of cuda: descriptors of frames that are held elsewhere */
	GMEM_RANK_DRIVER,      /* a built-in driver's own: its ops are called with any of the above held */
};

struct gmem_mutex {
	pthread_mutex_t m;
	enum gmem_rank rank;
};
struct gmem_rwlock {
	pthread_rwlock_t l;
	enum gmem_rank rank;
};

void gmem_mutex_init(struct gmem_mutex *mutex, enum gmem_rank rank);
void gmem_mutex_deinit(struct gmem_mutex *mutex);
void gmem_mutex_lock(struct gmem_mutex *mutex);
void gmem_mutex_unlock(struct gmem_mutex *mutex);
/* Waits on cond with the mutex held; timeout_ns 0 waits for ever. */
void gmem_mutex_wait(struct gmem_mutex *mutex, pthread_cond_t *cond, uint64_t timeout_ns);

void gmem_rwlock_init(struct gmem_rwlock *lock, enum gmem_rank rank);
void gmem_rwlock_deinit(struct gmem_rwlock *lock);
void gmem_rwlock_read(struct gmem_rwlock *lock);
void gmem_rwlock_write(struct gmem_rwlock *lock);
void gmem_rwlock_unlock(struct gmem_rwlock *lock);

/* How many ranked locks this thread holds; 0 in release builds. */
int gmem_lockrank_held(void);

#endif
