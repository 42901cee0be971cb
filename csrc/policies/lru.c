/* SPDX-License-Identifier: Apache-2.0
 *
 * LRU: the page that was not used for the longest time leaves (Mattson et al., "Evaluation techniques for storage
 * hierarchies", IBM Systems Journal 9(2), 1970). The yardstick for the others; each touch moves links, under the lock.
 */
#include <gmem/policies.h>

static void insert(struct gmem_policy *policy, uint32_t frame, uint64_t key)
{
	(void)key;
	gmem_queue_push_head(policy, 0, frame);
}

static void remove_frame(struct gmem_policy *policy, uint32_t frame, uint64_t key, enum gmem_leave leave)
{
	(void)key, (void)leave;
	gmem_queue_unlink(policy, frame);
}

static void touch(struct gmem_policy *policy, uint32_t frame)
{
	gmem_queue_unlink(policy, frame);
	gmem_queue_push_head(policy, 0, frame);
}

/* What was offered and stays is the youngest: it was found to be in use. */
static uint32_t next(struct gmem_policy *policy)
{
	return gmem_queue_offer(policy, 0);
}

static void cool(struct gmem_policy *policy, uint32_t frame)
{
	gmem_queue_unlink(policy, frame);
	gmem_queue_push_tail(policy, 0, frame);
}

const struct gmem_policy_ops gmem_policy_lru = {
	.name = "lru", .touch_locks = true, .insert = insert, .remove = remove_frame, .touch = touch, .next = next,
	.cool = cool,
};
