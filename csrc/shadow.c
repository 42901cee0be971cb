/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <stdlib.h>

#include <gmem/shadow.h>

#define BUCKETS (2 * GMEM_SHADOW_FRAMES)

int gmem_shadow_init(struct gmem_shadow *shadow, const struct gmem_policy_ops *ops)
{
	int err;

	*shadow = (struct gmem_shadow){ 0 };
	err = gmem_policy_init(&shadow->policy, ops, GMEM_SHADOW_FRAMES + 1);
	if (err)
		return err;
	shadow->keys = calloc(GMEM_SHADOW_FRAMES + 1, sizeof(*shadow->keys));
	shadow->chain = calloc(GMEM_SHADOW_FRAMES + 1, sizeof(*shadow->chain));
	shadow->buckets = calloc(BUCKETS, sizeof(*shadow->buckets));
	if (shadow->keys && shadow->chain && shadow->buckets)
		return 0;
	gmem_shadow_deinit(shadow);
	return -ENOMEM;
}

void gmem_shadow_deinit(struct gmem_shadow *shadow)
{
	free(shadow->keys);
	free(shadow->chain);
	free(shadow->buckets);
	gmem_policy_deinit(&shadow->policy);
	*shadow = (struct gmem_shadow){ 0 };
}

/* The link that points, or would point, to the key's frame. */
static uint32_t *link_of(struct gmem_shadow *shadow, uint64_t key)
{
	uint32_t *link = &shadow->buckets[gmem_hash(key) >> 32 & (BUCKETS - 1)];

	while (*link && shadow->keys[*link] != key)
		link = &shadow->chain[*link];
	return link;
}

static void drop(struct gmem_shadow *shadow, uint32_t frame, enum gmem_leave leave)
{
	uint32_t *link = link_of(shadow, shadow->keys[frame]);

	*link = shadow->chain[frame];
	gmem_policy_remove(&shadow->policy, frame, shadow->keys[frame], leave);
	shadow->chain[frame] = shadow->free;
	shadow->free = frame;
	shadow->used--;
}

static uint32_t take(struct gmem_shadow *shadow)
{
	uint32_t frame = shadow->free;

	if (frame)
		shadow->free = shadow->chain[frame];
	else
		frame = ++shadow->bumped;
	shadow->used++;
	return frame;
}

bool gmem_shadow_access(struct gmem_shadow *shadow, uint64_t key, uint32_t capacity)
{
	uint32_t *link = link_of(shadow, key), frame = *link;

	if (frame) {
		gmem_policy_touch(&shadow->policy, frame);
		return true;
	}
	while (shadow->used && shadow->used >= capacity)
		drop(shadow, gmem_policy_next(&shadow->policy), GMEM_LEAVE_EVICTED);
	frame = take(shadow);
	link = link_of(shadow, key);
	shadow->keys[frame] = key;
	shadow->chain[frame] = *link;
	*link = frame;
	gmem_policy_insert(&shadow->policy, frame, key);
	return false;
}

void gmem_shadow_forget(struct gmem_shadow *shadow, uint64_t key)
{
	uint32_t frame = *link_of(shadow, key);

	if (frame)
		drop(shadow, frame, GMEM_LEAVE_FREED);
}
