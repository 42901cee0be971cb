/* SPDX-License-Identifier: Apache-2.0
 *
 * LRU or LFU, whichever does better just now: adaptive caching with experts (Ari et al., "ACME: Adaptive Caching Using
 * Multiple Experts", WDAS 2002; Gramacy et al., "Adaptive Caching by Refetching", NIPS 2002). Each expert has a shadow,
 * which counts what it would have missed; the frames follow the one that missed less. Both keep their order of all frames
 * up to date, so a change costs only the misses that bring in what the other one would have kept: it is made once that
 * many have been lost.
 */
#include <errno.h>
#include <stdlib.h>

#include <gmem/policies.h>
#include <gmem/shadow.h>
#include <gmem/sparse.h>

enum { LRU, LFU, EXPERTS };
/* How far the leader may fall behind before it is changed: one in so many frames. */
#define PATIENCE 8

struct acme {
	struct gmem_policy experts[EXPERTS];
	struct gmem_shadow shadows[EXPERTS];
	uint64_t *keys;   /* sparse, by frame */
	uint32_t shift;   /* one of 2^shift pages is in the sample */
	int64_t score;    /* misses of LRU's shadow beyond those of LFU's, within bounds */
	int leads;
};

static void deinit(struct gmem_policy *policy)
{
	struct acme *acme = policy->state;

	if (!acme)
		return;
	for (int e = 0; e < EXPERTS; e++) {
		gmem_policy_deinit(&acme->experts[e]);
		gmem_shadow_deinit(&acme->shadows[e]);
	}
	gmem_sparse_unmap(acme->keys, policy->frames * sizeof(*acme->keys));
	free(acme);
	policy->state = NULL;
}

static int init(struct gmem_policy *policy)
{
	static const struct gmem_policy_ops *const ops[EXPERTS] = { &gmem_policy_lru, &gmem_policy_lfu };
	struct acme *acme = policy->state = calloc(1, sizeof(*acme));
	int err = 0;

	if (!acme)
		return -ENOMEM;
	acme->leads = LRU;
	acme->keys = gmem_sparse_map(policy->frames * sizeof(*acme->keys));
	for (int e = 0; !err && e < EXPERTS; e++) {
		err = gmem_policy_init(&acme->experts[e], ops[e], policy->frames);
		if (!err)
			err = gmem_shadow_init(&acme->shadows[e], ops[e]);
	}
	return acme->keys ? err : -ENOMEM;
}

static bool sampled(const struct acme *acme, uint64_t key)
{
	return !(gmem_hash(key) & ((1ull << acme->shift) - 1));
}

static void compare(struct gmem_policy *policy, uint64_t key)
{
	struct acme *acme = policy->state;
	uint32_t capacity;
	int64_t most;

	while (policy->count >> acme->shift > GMEM_SHADOW_FRAMES)
		acme->shift++;
	if (!sampled(acme, key))
		return;
	capacity = policy->count >> acme->shift;
	most = capacity / PATIENCE + 1;
	acme->score += !gmem_shadow_access(&acme->shadows[LRU], key, capacity);
	acme->score -= !gmem_shadow_access(&acme->shadows[LFU], key, capacity);
	if (acme->score >= most) {
		acme->score = most;
		acme->leads = LFU;
	} else if (acme->score <= -most) {
		acme->score = -most;
		acme->leads = LRU;
	}
}

static void insert(struct gmem_policy *policy, uint32_t frame, uint64_t key)
{
	struct acme *acme = policy->state;

	acme->keys[frame] = key;
	for (int e = 0; e < EXPERTS; e++)
		gmem_policy_insert(&acme->experts[e], frame, key);
	compare(policy, key);
}

static void remove_frame(struct gmem_policy *policy, uint32_t frame, uint64_t key, enum gmem_leave leave)
{
	struct acme *acme = policy->state;

	for (int e = 0; e < EXPERTS; e++) {
		gmem_policy_remove(&acme->experts[e], frame, key, leave);
		if (leave == GMEM_LEAVE_FREED && sampled(acme, key))
			gmem_shadow_forget(&acme->shadows[e], key);
	}
}

static void touch(struct gmem_policy *policy, uint32_t frame)
{
	struct acme *acme = policy->state;

	for (int e = 0; e < EXPERTS; e++)
		gmem_policy_touch(&acme->experts[e], frame);
	compare(policy, acme->keys[frame]);
}

static uint32_t next(struct gmem_policy *policy)
{
	struct acme *acme = policy->state;

	return gmem_policy_next(&acme->experts[acme->leads]);
}

static void cool(struct gmem_policy *policy, uint32_t frame)
{
	struct acme *acme = policy->state;

	for (int e = 0; e < EXPERTS; e++)
		gmem_policy_cool(&acme->experts[e], frame);
}

const struct gmem_policy_ops gmem_policy_acme = {
	.name = "acme", .touch_locks = true, .init = init, .deinit = deinit, .insert = insert, .remove = remove_frame,
	.touch = touch, .next = next, .cool = cool,
};
