/* SPDX-License-Identifier: Apache-2.0
 *
 * hnode: the host's memory or one device's. Memory is counted in bytes against the capacity; each resident copy has a
 * frame descriptor, found from the page through frame_of[pn] and by reclaim through the hnode's policy.
 */
#ifndef GMEM_HNODE_H
#define GMEM_HNODE_H

#include <pthread.h>

#include <gmem/driver.h>
#include <gmem/lockrank.h>
#include <gmem/policy.h>
#include <gmem/vm_object.h>

struct gmem_frame {
	struct gmem_object *object; /* (P) NULL: free */
	uint64_t index;             /* (P) logical page in the object */
	uint32_t next;              /* (H) chains free descriptors */
	uint16_t holds;             /* (P) acquires that have not been released */
	bool fresh;                 /* (P) not used yet: its first use is the one it was brought for */
	bool evicted;               /* (P) leaves to make room */
};

struct gmem_core;

struct gmem_hnode {
	struct gmem_core *core;                  /* (C) */
	int hnid;                                /* (C) */
	char name[GMEM_NAME_MAX];                /* (C) */
	const struct gmem_driver_ops *ops;       /* (C) NULL for the host */
	struct gmem_driver_ops ops_copy;         /* (C) with the tail the driver did not know set to NULL */
	struct gmem_device *device;              /* (C) */
	struct gmem_device_info info;            /* (C) */
	bool draining;                           /* (H) being detached: takes no new pages */
	struct gmem_mutex lock;
	uint64_t used_bytes, peak_bytes, pinned_bytes; /* (H) */
	uint64_t pressure_ns;                    /* (H) when an allocation last found it full; 0: never, or long ago */
	struct gmem_frame *frames;               /* (C) array, mapped sparse; [0] is unused */
	uint32_t frame_count, frames_bumped, free_head; /* (C), (H), (H) */
	_Atomic uint32_t *frame_of;              /* (C) by pn, mapped sparse */
	struct gmem_policy policy;               /* (H) who leaves next; (C) its ops */
	uint64_t low_bytes, high_bytes;          /* (C) watermarks: free bytes */
	pthread_t reclaimer;                     /* (C) */
	bool reclaimer_runs, stop;               /* (C), (H) */
	pthread_cond_t wake;                     /* (H) */
	_Atomic uint64_t contexts;               /* (A) */
	_Atomic uint64_t faults, in_bytes, out_bytes, evictions, evicted_clean, errors; /* (A) */
	_Atomic uint64_t sequence;               /* (A) of invalidations */
	struct gmem_hnode *next_retired;         /* devices_lock */
};

int gmem_hnode_create(struct gmem_core *core, int hnid, const char *name, uint64_t capacity_bytes,
		      struct gmem_hnode **ret);
void gmem_hnode_destroy(struct gmem_hnode *hnode);

/* Charges one page and makes its descriptor. The caller owns the page's BUSY. -ENOMEM: full; -ENODEV: draining. */
int gmem_hnode_frame_alloc(struct gmem_hnode *hnode, struct gmem_object *object, uint64_t index);
void gmem_hnode_frame_free(struct gmem_hnode *hnode, struct gmem_object *object, uint64_t index);
/* The page's descriptor, NULL if it has no copy here. The caller owns the page's BUSY. */
struct gmem_frame *gmem_hnode_frame(struct gmem_hnode *hnode, struct gmem_object *object, uint64_t index);
/* It was used. The caller owns the page's BUSY. */
void gmem_hnode_touch(struct gmem_hnode *hnode, struct gmem_object *object, uint64_t index);
/* Makes it the next candidate of reclaim. */
void gmem_hnode_cool(struct gmem_hnode *hnode, struct gmem_object *object, uint64_t index);
void gmem_hnode_pinned(struct gmem_hnode *hnode, int64_t bytes);

static inline bool gmem_hnode_is_peer(const struct gmem_hnode *hnode) { return hnode->info.caps & GMEM_CAP_PEER; }

#endif
