/* SPDX-License-Identifier: Apache-2.0
 *
 * Choosing victims: which frame of a full hnode leaves next. A policy knows frame numbers, not memory; its links lie in a
 * sparse array of their own, and nothing is allocated after init. csrc/policies/ has one file for each algorithm.
 *
 * All calls are under the lock of whoever owns the policy (the hnode's), except gmem_policy_touch() of a policy without
 * touch_locks: that is one relaxed store, at any time while the frame is inserted.
 *
 * gmem_policy_next() offers a candidate and passes on: the caller evicts it (then removes it), or leaves it where it is,
 * because it is pinned, held or busy, and asks again. Unless something else happens in between, no frame is offered twice
 * before each one that was not touched has been offered once, and each one is within a bounded number of calls.
 */
#ifndef GMEM_POLICY_H
#define GMEM_POLICY_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <gmem/ghost.h>

#define GMEM_FRAME_NONE 0u
#define GMEM_POLICY_QUEUES 3
#define GMEM_POLICY_SPARE 128 /* nodes that are no frames: heads of lists */

/* Why a frame is removed. An evicted page may come back, and some policies remember it. */
enum gmem_leave { GMEM_LEAVE_FREED = 0, GMEM_LEAVE_EVICTED };

struct gmem_node {
	uint32_t prev, next;   /* towards the head (newer), towards the tail (older) */
	uint8_t queue;         /* index into gmem_policy.queues */
	uint8_t spare;         /* the policy's */
	_Atomic uint8_t used;  /* (A, relaxed) how often touched, up to what the policy counts */
};

struct gmem_queue {
	uint32_t head, tail, count;
	uint32_t offered;      /* candidates taken from here since something last left */
};

struct gmem_policy;

struct gmem_policy_ops {
	const char *name;
	bool touch_locks;      /* touch() moves links: the caller holds the lock */
	bool ghosts;           /* remembers keys of evicted pages */
	int (*init)(struct gmem_policy *policy);    /* may be NULL: nothing beyond the nodes */
	void (*deinit)(struct gmem_policy *policy); /* may be NULL; also after a failed init */
	void (*insert)(struct gmem_policy *policy, uint32_t frame, uint64_t key);
	void (*remove)(struct gmem_policy *policy, uint32_t frame, uint64_t key, enum gmem_leave leave);
	void (*touch)(struct gmem_policy *policy, uint32_t frame);
	uint32_t (*next)(struct gmem_policy *policy);
	void (*cool)(struct gmem_policy *policy, uint32_t frame);
};

struct gmem_policy {
	const struct gmem_policy_ops *ops;
	uint32_t frames;               /* numbers are 1 .. frames - 1 */
	uint32_t count;                /* inserted */
	struct gmem_node *nodes;       /* sparse, by frame; behind them GMEM_POLICY_SPARE more for the policy */
	struct gmem_queue queues[GMEM_POLICY_QUEUES];
	uint32_t hand;                 /* of policies that have one */
	void *state;                   /* of policies with an init */
	struct gmem_ghosts ghosts;
};

/* By name; the default for NULL; NULL if there is none of that name. */
const struct gmem_policy_ops *gmem_policy_find(const char *name);
const char *gmem_policy_name(size_t index); /* core.h */

int gmem_policy_init(struct gmem_policy *policy, const struct gmem_policy_ops *ops, uint32_t frames);
void gmem_policy_deinit(struct gmem_policy *policy);

static inline void gmem_policy_insert(struct gmem_policy *policy, uint32_t frame, uint64_t key)
{
	policy->count++;
	policy->ops->insert(policy, frame, key);
}

/* key: as at insert. */
static inline void gmem_policy_remove(struct gmem_policy *policy, uint32_t frame, uint64_t key, enum gmem_leave leave)
{
	policy->ops->remove(policy, frame, key, leave);
	policy->count--;
}

static inline void gmem_policy_touch(struct gmem_policy *policy, uint32_t frame)
{
	policy->ops->touch(policy, frame);
}

/* GMEM_FRAME_NONE: there is no frame. */
static inline uint32_t gmem_policy_next(struct gmem_policy *policy)
{
	return policy->count ? policy->ops->next(policy) : GMEM_FRAME_NONE;
}

/* Makes it the next candidate. */
static inline void gmem_policy_cool(struct gmem_policy *policy, uint32_t frame)
{
	policy->ops->cool(policy, frame);
}

/* ---- for policies: queues of nodes, and marks ---- */

void gmem_queue_push_head(struct gmem_policy *policy, int queue, uint32_t frame);
void gmem_queue_push_tail(struct gmem_policy *policy, int queue, uint32_t frame);
void gmem_queue_unlink(struct gmem_policy *policy, uint32_t frame);
/* Takes the tail as candidate: it goes to the head, in case it stays. */
uint32_t gmem_queue_offer(struct gmem_policy *policy, int queue);
/* The queue that the next candidate shall come from: wanted, unless all of it was offered already. */
int gmem_queue_pick(struct gmem_policy *policy, int wanted, int other);

static inline void gmem_node_touch(struct gmem_policy *policy, uint32_t frame, uint8_t most)
{
	_Atomic uint8_t *used = &policy->nodes[frame].used;
	uint8_t now = atomic_load_explicit(used, memory_order_relaxed);

	if (now < most)
		atomic_store_explicit(used, (uint8_t)(now + 1), memory_order_relaxed);
}

static inline uint8_t gmem_node_used(const struct gmem_policy *policy, uint32_t frame)
{
	return atomic_load_explicit(&policy->nodes[frame].used, memory_order_relaxed);
}

static inline void gmem_node_set_used(struct gmem_policy *policy, uint32_t frame, uint8_t used)
{
	atomic_store_explicit(&policy->nodes[frame].used, used, memory_order_relaxed);
}

#endif
