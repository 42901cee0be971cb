/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <gmem/internal.h>
#include <gmem/sparse.h>

#define FRAMES_MAX (1ull << 28) /* 1 TiB of 4 KiB pages */

int gmem_hnode_create(struct gmem_core *core, int hnid, const char *name, uint64_t capacity_bytes,
		      struct gmem_hnode **ret)
{
	struct gmem_hnode *hnode = calloc(1, sizeof(*hnode));
	uint64_t frames = capacity_bytes / 4096 + 2;

	if (!hnode)
		return -ENOMEM;
	hnode->core = core;
	hnode->hnid = hnid;
	snprintf(hnode->name, sizeof(hnode->name), "%s", name);
	hnode->info.capacity_bytes = capacity_bytes;
	hnode->low_bytes = capacity_bytes / 64;
	hnode->high_bytes = capacity_bytes / 32;
	hnode->frame_count = (uint32_t)(frames < FRAMES_MAX ? frames : FRAMES_MAX);
	hnode->frames_bumped = 1;
	hnode->frames = gmem_sparse_map((uint64_t)hnode->frame_count * sizeof(*hnode->frames));
	hnode->frame_of = gmem_sparse_map(core->lpt.pages * sizeof(*hnode->frame_of));
	gmem_mutex_init(&hnode->lock, GMEM_RANK_HNODE);
	pthread_cond_init(&hnode->wake, NULL);
	if (!hnode->frames || !hnode->frame_of ||
	    gmem_policy_init(&hnode->policy, core->policy, hnode->frame_count)) {
		gmem_hnode_destroy(hnode);
		return -ENOMEM;
	}
	*ret = hnode;
	return 0;
}

void gmem_hnode_destroy(struct gmem_hnode *hnode)
{
	gmem_policy_deinit(&hnode->policy);
	gmem_sparse_unmap(hnode->frames, (uint64_t)hnode->frame_count * sizeof(*hnode->frames));
	gmem_sparse_unmap((void *)hnode->frame_of, hnode->core->lpt.pages * sizeof(*hnode->frame_of));
	gmem_mutex_deinit(&hnode->lock);
	pthread_cond_destroy(&hnode->wake);
	free(hnode);
}

static uint32_t take_descriptor(struct gmem_hnode *hnode)
{
	uint32_t frame = hnode->free_head;

	if (frame)
		hnode->free_head = hnode->frames[frame].next;
	else if (hnode->frames_bumped < hnode->frame_count)
		frame = hnode->frames_bumped++;
	return frame;
}

int gmem_hnode_frame_alloc(struct gmem_hnode *hnode, struct gmem_object *object, uint64_t index)
{
	uint64_t bytes = 1ull << object->shift;
	uint32_t frame = GMEM_FRAME_NONE;
	int err = 0;

	gmem_mutex_lock(&hnode->lock);
	if (hnode->draining) {
		err = -ENODEV;
	} else if (hnode->used_bytes + bytes > hnode->info.capacity_bytes ||
		   !(frame = take_descriptor(hnode))) {
		err = -ENOMEM;
	} else {
		hnode->frames[frame] = (struct gmem_frame){ .object = object, .index = index, .fresh = true };
		gmem_policy_insert(&hnode->policy, frame, object->pn + index);
		hnode->used_bytes += bytes;
		if (hnode->used_bytes > hnode->peak_bytes)
			hnode->peak_bytes = hnode->used_bytes;
	}
	/* Room is made ahead only once the hnode has run full: a working set that fits is left in peace. */
	if (err == -ENOMEM)
		hnode->pressure_ns = gmem_now_ns();
	if (hnode->reclaimer_runs && hnode->pressure_ns &&
	    hnode->info.capacity_bytes - hnode->used_bytes < hnode->low_bytes)
		pthread_cond_signal(&hnode->wake);
	gmem_mutex_unlock(&hnode->lock);
	if (err)
		return err;
	atomic_store_explicit(&hnode->frame_of[object->pn + index], frame, memory_order_relaxed);
	gmem_count(&object->account->resident_bytes[hnode->hnid], bytes);
	return 0;
}

void gmem_hnode_frame_free(struct gmem_hnode *hnode, struct gmem_object *object, uint64_t index)
{
	uint64_t bytes = 1ull << object->shift;
	uint32_t frame = atomic_load_explicit(&hnode->frame_of[object->pn + index], memory_order_relaxed);

	if (!frame)
		return;
	atomic_store_explicit(&hnode->frame_of[object->pn + index], GMEM_FRAME_NONE, memory_order_relaxed);
	gmem_mutex_lock(&hnode->lock);
	gmem_policy_remove(&hnode->policy, frame, object->pn + index,
			   hnode->frames[frame].evicted ? GMEM_LEAVE_EVICTED : GMEM_LEAVE_FREED);
	hnode->frames[frame].object = NULL;
	hnode->frames[frame].next = hnode->free_head;
	hnode->free_head = frame;
	hnode->used_bytes -= bytes;
	gmem_mutex_unlock(&hnode->lock);
	atomic_fetch_sub_explicit(&object->account->resident_bytes[hnode->hnid], bytes, memory_order_relaxed);
}

struct gmem_frame *gmem_hnode_frame(struct gmem_hnode *hnode, struct gmem_object *object, uint64_t index)
{
	uint32_t frame = atomic_load_explicit(&hnode->frame_of[object->pn + index], memory_order_relaxed);

	return frame ? &hnode->frames[frame] : NULL;
}

void gmem_hnode_touch(struct gmem_hnode *hnode, struct gmem_object *object, uint64_t index)
{
	uint32_t frame = atomic_load_explicit(&hnode->frame_of[object->pn + index], memory_order_relaxed);
	bool locks = hnode->policy.ops->touch_locks;

	if (!frame)
		return;
	if (hnode->frames[frame].fresh) {
		hnode->frames[frame].fresh = false;
		return;
	}
	if (locks)
		gmem_mutex_lock(&hnode->lock);
	gmem_policy_touch(&hnode->policy, frame);
	if (locks)
		gmem_mutex_unlock(&hnode->lock);
}

void gmem_hnode_cool(struct gmem_hnode *hnode, struct gmem_object *object, uint64_t index)
{
	uint32_t frame = atomic_load_explicit(&hnode->frame_of[object->pn + index], memory_order_relaxed);

	if (!frame)
		return;
	gmem_mutex_lock(&hnode->lock);
	gmem_policy_cool(&hnode->policy, frame);
	gmem_mutex_unlock(&hnode->lock);
}

void gmem_hnode_pinned(struct gmem_hnode *hnode, int64_t bytes)
{
	gmem_mutex_lock(&hnode->lock);
	hnode->pinned_bytes += (uint64_t)bytes;
	gmem_mutex_unlock(&hnode->lock);
}
