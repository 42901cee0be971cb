/* SPDX-License-Identifier: Apache-2.0
 *
 * SIEVE (Zhang et al., "SIEVE is Simpler than LRU", NSDI 2024): new pages at the head of one list; a hand walks from tail
 * to head, clears the mark of pages used since it last came by, and takes the first page without one. Pages stay where
 * they are, so new ones are sifted quickly while the used ones grow old behind the hand.
 */
#include <gmem/policies.h>

static void insert(struct gmem_policy *policy, uint32_t frame, uint64_t key)
{
	(void)key;
	gmem_node_set_used(policy, frame, 0);
	gmem_queue_push_head(policy, 0, frame);
}

static void remove_frame(struct gmem_policy *policy, uint32_t frame, uint64_t key, enum gmem_leave leave)
{
	(void)key, (void)leave;
	if (policy->hand == frame)
		policy->hand = policy->nodes[frame].prev;
	gmem_queue_unlink(policy, frame);
}

static void touch(struct gmem_policy *policy, uint32_t frame)
{
	gmem_node_touch(policy, frame, 1);
}

static uint32_t towards_head(const struct gmem_policy *policy, uint32_t frame)
{
	return policy->nodes[frame].prev ? policy->nodes[frame].prev : policy->queues[0].tail;
}

static uint32_t next(struct gmem_policy *policy)
{
	uint32_t frame = policy->hand ? policy->hand : policy->queues[0].tail;

	/* Each step takes a mark. They may be set again behind us, but no more than two rounds are walked. */
	for (uint32_t steps = 2 * policy->count; steps && gmem_node_used(policy, frame); steps--) {
		gmem_node_set_used(policy, frame, 0);
		frame = towards_head(policy, frame);
	}
	policy->hand = policy->nodes[frame].prev;
	return frame;
}

/* To the tail, where the hand begins: it finds what was cooled before behind it. */
static void cool(struct gmem_policy *policy, uint32_t frame)
{
	gmem_node_set_used(policy, frame, 0);
	gmem_queue_unlink(policy, frame);
	gmem_queue_push_tail(policy, 0, frame);
	policy->hand = frame;
}

const struct gmem_policy_ops gmem_policy_sieve = {
	.name = "sieve", .insert = insert, .remove = remove_frame, .touch = touch, .next = next, .cool = cool,
};
