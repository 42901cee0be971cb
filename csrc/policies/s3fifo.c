/* SPDX-License-Identifier: Apache-2.0
 *
 * S3-FIFO (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023): new pages pass through a small
 * queue of a tenth of the frames; those used in it, and those that come back while still remembered, enter the main
 * queue, where each use (up to three) is worth one more round.
 */
#include <gmem/policies.h>

enum { SMALL, MAIN, COLD };
#define USED_MAX 3
#define USED_ENOUGH 2 /* to leave the small queue for the main one */

static void insert(struct gmem_policy *policy, uint32_t frame, uint64_t key)
{
	/* As many ghosts as the main queue is to have pages. */
	uint32_t newest = policy->count - policy->count / 10;
	uint16_t note;

	gmem_node_set_used(policy, frame, 0);
	gmem_queue_push_head(policy, gmem_ghosts_take(&policy->ghosts, key, newest, &note) ? MAIN : SMALL,
			     frame);
}

static void remove_frame(struct gmem_policy *policy, uint32_t frame, uint64_t key, enum gmem_leave leave)
{
	if (leave == GMEM_LEAVE_EVICTED && policy->nodes[frame].queue == SMALL)
		gmem_ghosts_add(&policy->ghosts, key, 0, policy->count);
	gmem_queue_unlink(policy, frame);
}

static void touch(struct gmem_policy *policy, uint32_t frame)
{
	gmem_node_touch(policy, frame, USED_MAX);
}

static uint32_t next(struct gmem_policy *policy)
{
	struct gmem_queue *q = policy->queues;
	int wanted = q[SMALL].count > policy->count / 10 ? SMALL : MAIN;

	if (q[COLD].offered < q[COLD].count)
		return gmem_queue_offer(policy, COLD);
	/* Each step moves a page to the main queue or takes one of its marks. */
	for (uint64_t steps = (USED_MAX + 2) * (uint64_t)policy->count;; steps--) {
		int queue = gmem_queue_pick(policy, wanted, wanted == SMALL ? MAIN : SMALL);
		uint32_t frame = q[queue].tail, offered = q[queue].offered;
		uint8_t used = frame ? gmem_node_used(policy, frame) : 0;

		if (!frame) /* all are cold */
			return gmem_queue_offer(policy, COLD);
		if (!steps || used < (queue == SMALL ? USED_ENOUGH : 1))
			return gmem_queue_offer(policy, queue);
		gmem_queue_unlink(policy, frame);
		gmem_queue_push_head(policy, MAIN, frame);
		gmem_node_set_used(policy, frame, queue == SMALL ? 0 : used - 1);
		q[queue].offered = offered;
	}
}

static void cool(struct gmem_policy *policy, uint32_t frame)
{
	gmem_node_set_used(policy, frame, 0);
	gmem_queue_unlink(policy, frame);
	gmem_queue_push_tail(policy, COLD, frame);
}

const struct gmem_policy_ops gmem_policy_s3fifo = {
	.name = "s3fifo", .ghosts = true, .insert = insert, .remove = remove_frame, .touch = touch, .next = next,
	.cool = cool,
};
