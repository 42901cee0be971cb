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
#include <gmem/stats.h>
#include <gmem/policy.h>
#include <gmem/vm_object.h>

#define GMEM_COLD_FRAMES 256

struct gmem_frame {
	struct gmem_object *object; /* (P) NULL: free */
	uint64_t index;             /* (P) logical page in the object */
	uint32_t next;              /* (H) chains free descriptors */
	uint32_t mate_prev, mate_next; /* (H) ring of its account's frames */
	uint16_t holds;             /* (P) acquires that have not been released */
	bool fresh;                 /* (P) not used yet: its first use is the one it was brought for */
	bool evicted;               /* (P) leaves to make room */
	bool cold;                  /* (P) advised so, and not used since */
	bool spared;                /* (P) reclaim has passed it over once, because it is best kept here */
	_Atomic uint8_t wanted;     /* (A, relaxed) asked for by a request, which stops the next eviction of it */
	_Atomic uint8_t used;       /* (A, relaxed) used since its account, or ageing, last came by */
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
	struct gmem_driver_keep *keep;           /* (C) what its driver has held; NULL for the host */
	atomic_bool draining;                    /* (A) being detached: takes no new pages */
	_Atomic uint32_t rank;                   /* (A) tiers: place in the chain below the host */
	struct gmem_mutex lock;
	uint64_t used_bytes, peak_bytes, pinned_bytes; /* (H) */
	uint64_t full_at_bytes;                  /* (H) its driver had no room for more than so much; 0: unknown */
	uint64_t full_at_ns;                     /* (H) when it said so */
	uint64_t pressure_ns;                    /* (H) when an allocation last found it full; 0: never, or long ago */
	struct gmem_frame *frames;               /* (C) array, mapped sparse; [0] is unused */
	uint32_t frame_count, frames_bumped, free_head; /* (C), (H), (H) */
	_Atomic uint32_t *frame_of;              /* (C) by pn, mapped sparse */
	struct gmem_policy policy;               /* (H) who leaves next; (C) its ops */
	_Atomic uint64_t limit_bytes;            /* (A) what it may hold: its capacity, or the operator's limit */
	_Atomic uint64_t low_bytes, high_bytes;  /* (A) watermarks: free bytes */
	pthread_t reclaimer;                     /* (C) */
	bool reclaimer_runs, stop;               /* (C), (H) */
	pthread_cond_t wake;                     /* (H) */
	uint32_t age_hand;                       /* (H) frame that was looked at last */
	uint32_t cold[GMEM_COLD_FRAMES], cold_head, cold_count; /* (H) frames that were cold when they came here: a queue */
	struct gmem_account *pressed;            /* (H) referenced: who is near his quota, for the reclaimer; NULL: nobody */
	_Atomic uint64_t contexts;               /* (A) */
	_Atomic uint64_t faults, in_bytes, out_bytes, evictions, evicted_clean, errors; /* (A) */
	_Atomic uint64_t sequence;               /* (A) of invalidations */
	struct gmem_mutex relay_lock;
	uint8_t *relay;                          /* relay_lock; room for one page, on its way between two that can't reach each other */
	atomic_bool lost;                        /* (A) its driver has said so */
	_Atomic uint32_t visitors;               /* (A) threads in its driver that hold no page of its: it is not removed under them */
	struct gmem_hnode *next_retired;         /* devices_lock */
};

int gmem_hnode_create(struct gmem_core *core, int hnid, const char *name, uint64_t capacity_bytes,
		      struct gmem_hnode **ret);
int gmem_hnode_relay_create(struct gmem_hnode *hnode);
void gmem_hnode_destroy(struct gmem_hnode *hnode);

/* Whether bytes more would fit just now; if not, it is under pressure. */
bool gmem_hnode_room(struct gmem_hnode *hnode, uint64_t bytes);
/* The driver had no room for bytes that are charged already, whatever the capacity it gave: one that compresses can't
 * know before. */
void gmem_hnode_full(struct gmem_hnode *hnode, uint64_t bytes);
/* capacity_bytes of gmem_hnode_create() at most. */
void gmem_hnode_set_limit(struct gmem_hnode *hnode, uint64_t bytes);
uint64_t gmem_hnode_free_locked(const struct gmem_hnode *hnode);
uint64_t gmem_hnode_free_bytes(struct gmem_hnode *hnode);
/* Charges one page and makes its descriptor. The caller owns the page's BUSY. -ENOMEM: full; -EDQUOT: its owner's quota is
 * reached; -ENODEV: draining. */
int gmem_hnode_frame_alloc(struct gmem_hnode *hnode, struct gmem_object *object, uint64_t index);
/* The descriptor of a copy that a predecessor had there, whatever the limit and the quotas. -ENOMEM. */
int gmem_hnode_frame_adopt(struct gmem_hnode *hnode, struct gmem_object *object, uint64_t index);
void gmem_hnode_frame_free(struct gmem_hnode *hnode, struct gmem_object *object, uint64_t index);
/* The page's descriptor, NULL if it has no copy here. The caller owns the page's BUSY. */
struct gmem_frame *gmem_hnode_frame(struct gmem_hnode *hnode, struct gmem_object *object, uint64_t index);
/* It was used. The caller owns the page's BUSY. */
void gmem_hnode_touch(struct gmem_hnode *hnode, struct gmem_object *object, uint64_t index);
/* It is about to be used: an eviction of it stops, once. For anybody; of a page that has just left it costs another one a
 * round. */
void gmem_hnode_want(struct gmem_hnode *hnode, uint64_t pn);
/* The account's next candidate for leaving, GMEM_FRAME_NONE if it has no page here: CLOCK, as the list is its own. */
uint32_t gmem_hnode_mate_locked(struct gmem_hnode *hnode, struct gmem_account *account);
/* Makes it the next candidate of reclaim. */
void gmem_hnode_cool(struct gmem_hnode *hnode, struct gmem_object *object, uint64_t index);
/* The same of what nobody will use for a while: under pressure it leaves ahead of need. */
void gmem_hnode_cold(struct gmem_hnode *hnode, struct gmem_object *object, uint64_t index);
/* Takes a frame of these off the queue; it may have become another page's. GMEM_FRAME_NONE: there is none. */
uint32_t gmem_hnode_next_cold_locked(struct gmem_hnode *hnode);
/* Whether a fault thread should leave the waiting for a page of so many bytes to a filler. */
bool gmem_hnode_slow(const struct gmem_hnode *hnode, uint64_t bytes);
void gmem_hnode_pinned(struct gmem_hnode *hnode, int64_t bytes);

/* The device at hnid, whose driver may be called until gmem_hnode_leave(); NULL: there is none, or it is being detached. */
struct gmem_hnode *gmem_hnode_visit(struct gmem_core *core, int hnid);
void gmem_hnode_leave(struct gmem_hnode *hnode);
/* Until there is no visitor. New ones no longer find it. */
void gmem_hnode_await_visitors(struct gmem_hnode *hnode);

/* Its memory is reached by its copy engine alone. */
static inline bool gmem_hnode_own_frames(const struct gmem_hnode *hnode) { return hnode->info.caps & GMEM_CAP_OWN_FRAMES; }

/* Whether pages of the object can be there: not of any size, and not of pools and files, where only the copy engine reaches them. */
bool gmem_hnode_takes(const struct gmem_hnode *hnode, const struct gmem_object *object);
/* Its driver has failed: if it says that the device is lost, that is told, once. */
void gmem_hnode_failed(struct gmem_hnode *hnode);

static inline bool gmem_hnode_is_peer(const struct gmem_hnode *hnode) { return hnode->info.caps & GMEM_CAP_PEER; }

#endif
