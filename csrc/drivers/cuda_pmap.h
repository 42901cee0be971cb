/* SPDX-License-Identifier: Apache-2.0
 *
 * One context's page table, for cuda_pmap.c and cuda_resume.c.
 */
#ifndef GMEM_DRIVER_CUDA_PMAP_H
#define GMEM_DRIVER_CUDA_PMAP_H

#include "cuda.h"

#define GMEM_CUDA_VA_END (1ull << 47)

struct gmem_pmap {
	atomic_uint refs;                 /* (A) its owner's, and one for each import */
	struct gmem_device *gpu;          /* (C) referenced */
	uint64_t as_id;                   /* (C) */
	int fd;                           /* (C) */
	struct gmem_mutex lock;
	bool dead;                        /* lock */
	uint64_t sent, answered;          /* lock */
	struct gmem_channel_batch batch;  /* lock; steps not sent */
	int fds[GMEM_CHANNEL_STEPS];      /* lock; of the batch's imports */
	size_t fd_count;                  /* lock */
	uint32_t *frame_at;               /* lock; by address, mapped sparse; number + 1 */
	struct gmem_cuda_import *imports; /* device lock */
	uint64_t list;                    /* (C) a predecessor's: the number of the batch that asks what it has */
	struct gmem_pmap *next_resumed;   /* device lock */
};

/* The channel stays the caller's on failure. */
int gmem_cuda_pmap_make(struct gmem_device *gpu, uint64_t as_id, int channel, struct gmem_pmap **ret);
/* One that nobody has seen; the channel is the caller's again. */
void gmem_cuda_pmap_unmake(struct gmem_pmap *pmap);
void gmem_cuda_pmap_unref(struct gmem_pmap *pmap);

/* By address; the channel's lock. */
static inline uint32_t *gmem_cuda_pmap_at(struct gmem_pmap *pmap, uint64_t va)
{
	return &pmap->frame_at[va >> GMEM_CUDA_SHIFT];
}
struct gmem_cuda_import *gmem_cuda_find_import(struct gmem_pmap *pmap, uint32_t frame);
struct gmem_cuda_import *gmem_cuda_add_import(struct gmem_pmap *pmap, uint32_t frame, uint64_t owner);
/* Until its socket can be read, or written to; false: not in that time. */
bool gmem_cuda_pmap_wait(struct gmem_pmap *pmap, short events, uint64_t until);
/* The context is over: -EOWNERDEAD. */
int gmem_cuda_pmap_fail_locked(struct gmem_pmap *pmap);
int gmem_cuda_pmap_queue_locked(struct gmem_pmap *pmap, enum gmem_channel_op op, uint32_t frame, uint64_t va, bool writable);

#endif
