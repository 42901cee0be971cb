/* SPDX-License-Identifier: Apache-2.0
 *
 * CLOCK, or second chance (Corbato, "A paging experiment with the Multics system", MIT Project MAC report 384, 1968): a
 * queue in order of arrival; a page that was used since it last came to the end goes round once more.
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
	gmem_queue_unlink(policy, frame);
}

static void touch(struct gmem_policy *policy, uint32_t frame)
{
	gmem_node_touch(policy, frame, 1);
}

static uint32_t next(struct gmem_policy *policy)
{
	uint32_t frame = gmem_queue_offer(policy, 0);

	/* Each step takes a mark. They may be set again behind us, but no more than two rounds are walked. */
	for (uint32_t steps = 2 * policy->count; steps && gmem_node_used(policy, frame); steps--) {
		gmem_node_set_used(policy, frame, 0);
		frame = gmem_queue_offer(policy, 0);
	}
	return frame;
}

static void cool(struct gmem_policy *policy, uint32_t frame)
{
	gmem_node_set_used(policy, frame, 0);
	gmem_queue_unlink(policy, frame);
	gmem_queue_push_tail(policy, 0, frame);
}

const struct gmem_policy_ops gmem_policy_clock = {
	.name = "clock", .insert = insert, .remove = remove_frame, .touch = touch, .next = next, .cool = cool,
};
