/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <gmem/internal.h>
#include <gmem/sparse.h>

#define VISITOR_PAUSE_NS 1000000

#define SLOW_NS 150000 /* what a fault thread may wait for a driver: some wake-ups' time */
#define OTHERS_FULL_NS 1000000000ull /* how long what others use as well counts as full */
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
	gmem_hnode_set_limit(hnode, capacity_bytes);
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
	gmem_mutex_init(&hnode->relay_lock, GMEM_RANK_RELAY);
	*ret = hnode;
	return 0;
}

void gmem_hnode_set_limit(struct gmem_hnode *hnode, uint64_t bytes)
{
	atomic_store_explicit(&hnode->limit_bytes, bytes, memory_order_relaxed);
	atomic_store_explicit(&hnode->low_bytes, bytes / 64, memory_order_relaxed);
	atomic_store_explicit(&hnode->high_bytes, bytes / 32, memory_order_relaxed);
}

void gmem_hnode_destroy(struct gmem_hnode *hnode)
{
	gmem_policy_deinit(&hnode->policy);
	gmem_sparse_unmap(hnode->frames, (uint64_t)hnode->frame_count * sizeof(*hnode->frames));
	gmem_sparse_unmap((void *)hnode->frame_of, hnode->core->lpt.pages * sizeof(*hnode->frame_of));
	gmem_sparse_unmap(hnode->relay, GMEM_HUGE_BYTES);
	gmem_account_unref(hnode->pressed);
	gmem_driver_keep_deinit(hnode->keep);
	free(hnode->keep);
	gmem_mutex_deinit(&hnode->lock);
	gmem_mutex_deinit(&hnode->relay_lock);
	pthread_cond_destroy(&hnode->wake);
	free(hnode);
}

int gmem_hnode_relay_create(struct gmem_hnode *hnode)
{
	hnode->relay = gmem_sparse_map(GMEM_HUGE_BYTES);
	return hnode->relay ? 0 : -ENOMEM;
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

/* How many bytes it may hold; a tier that compresses learns that as it fills. One that is elsewhere is shared with others:
 * that it was full some time ago says little. */
static uint64_t limit_locked(const struct gmem_hnode *hnode)
{
	uint64_t limit = gmem_counter(&hnode->limit_bytes);

	if (!hnode->full_at_bytes || hnode->full_at_bytes >= limit)
		return limit;
	/* others come and go there */
	if (hnode->info.caps & (GMEM_CAP_REMOTE | GMEM_CAP_OWN_FRAMES) && gmem_now_ns() - hnode->full_at_ns > OTHERS_FULL_NS)
		return limit;
	return hnode->full_at_bytes;
}

uint64_t gmem_hnode_free_locked(const struct gmem_hnode *hnode)
{
	uint64_t limit = limit_locked(hnode);

	return limit > hnode->used_bytes ? limit - hnode->used_bytes : 0;
}

/* Room is made ahead only once the hnode has run full: a working set that fits is left in peace. */
static void press_locked(struct gmem_hnode *hnode)
{
	hnode->pressure_ns = gmem_now_ns();
	if (hnode->reclaimer_runs)
		pthread_cond_signal(&hnode->wake);
}

bool gmem_hnode_room(struct gmem_hnode *hnode, uint64_t bytes)
{
	bool room;

	if (atomic_load(&hnode->draining))
		return false;
	gmem_mutex_lock(&hnode->lock);
	room = gmem_hnode_free_locked(hnode) >= bytes;
	if (!room)
		press_locked(hnode);
	gmem_mutex_unlock(&hnode->lock);
	return room;
}

void gmem_hnode_full(struct gmem_hnode *hnode, uint64_t bytes)
{
	gmem_mutex_lock(&hnode->lock);
	/* never 0, which means unknown: a tier that takes not one page has room for one byte */
	hnode->full_at_bytes = hnode->used_bytes > bytes ? hnode->used_bytes - bytes : 1;
	hnode->full_at_ns = gmem_now_ns();
	press_locked(hnode);
	gmem_mutex_unlock(&hnode->lock);
}

uint64_t gmem_hnode_free_bytes(struct gmem_hnode *hnode)
{
	uint64_t bytes;

	gmem_mutex_lock(&hnode->lock);
	bytes = gmem_hnode_free_locked(hnode);
	gmem_mutex_unlock(&hnode->lock);
	return bytes;
}

/* The ring of an account's frames; a new one comes last. */
static void mate_insert_locked(struct gmem_hnode *hnode, struct gmem_account *account, uint32_t frame)
{
	struct gmem_frame *frames = hnode->frames;
	uint32_t *hand = &account->mates[hnode->hnid];

	if (!*hand) {
		frames[frame].mate_prev = frames[frame].mate_next = *hand = frame;
		return;
	}
	frames[frame].mate_next = *hand;
	frames[frame].mate_prev = frames[*hand].mate_prev;
	frames[frames[*hand].mate_prev].mate_next = frame;
	frames[*hand].mate_prev = frame;
}

static void mate_remove_locked(struct gmem_hnode *hnode, struct gmem_account *account, uint32_t frame)
{
	struct gmem_frame *frames = hnode->frames;
	uint32_t *hand = &account->mates[hnode->hnid], next = frames[frame].mate_next;

	frames[frames[frame].mate_prev].mate_next = next;
	frames[next].mate_prev = frames[frame].mate_prev;
	if (*hand == frame)
		*hand = next == frame ? GMEM_FRAME_NONE : next;
}

uint32_t gmem_hnode_mate_locked(struct gmem_hnode *hnode, struct gmem_account *account)
{
	uint32_t frame = account->mates[hnode->hnid];

	/* each step clears a mark */
	while (frame && atomic_exchange_explicit(&hnode->frames[frame].used, 0, memory_order_relaxed))
		frame = hnode->frames[frame].mate_next;
	if (frame)
		account->mates[hnode->hnid] = hnode->frames[frame].mate_next;
	return frame;
}

static void charge_locked(struct gmem_hnode *hnode, const struct gmem_object *object, int64_t bytes)
{
	struct gmem_account *account = object->account;

	if (object->class_ == GMEM_CLASS_HUGE && hnode->info.caps & GMEM_CAP_CPU_VISIBLE)
		gmem_count(&hnode->core->hugepages_used_bytes, (uint64_t)bytes);
	hnode->used_bytes += (uint64_t)bytes;
	if (hnode->used_bytes > hnode->peak_bytes)
		hnode->peak_bytes = hnode->used_bytes;
	gmem_count(&account->shares[hnode->hnid].resident_bytes, (uint64_t)bytes);
	gmem_count(&account->tenant->shares[hnode->hnid].resident_bytes, (uint64_t)bytes);
}

/* Room is made ahead for whoever has reached his quota lately, too. */
static void press_account_locked(struct gmem_hnode *hnode, struct gmem_account *account, bool reached)
{
	if (reached)
		account->pressure_ns[hnode->hnid] = gmem_now_ns();
	else if (!account->pressure_ns[hnode->hnid] ||
		 gmem_account_room(account, hnode->hnid) >= gmem_counter(&account->shares[hnode->hnid].quota_bytes) / 64)
		return;
	if (!hnode->pressed)
		hnode->pressed = gmem_account_ref(account);
	pthread_cond_signal(&hnode->wake);
}

static int make_frame_locked(struct gmem_hnode *hnode, struct gmem_object *object, uint64_t index, uint32_t *ret)
{
	uint64_t bytes = 1ull << object->shift;

	if (!(*ret = take_descriptor(hnode)))
		return -ENOMEM;
	hnode->frames[*ret] = (struct gmem_frame){ .object = object, .index = index, .fresh = true, .used = 1 };
	gmem_policy_insert(&hnode->policy, *ret, object->pn + index);
	mate_insert_locked(hnode, object->account, *ret);
	charge_locked(hnode, object, (int64_t)bytes);
	return 0;
}

static int take_frame_locked(struct gmem_hnode *hnode, struct gmem_object *object, uint64_t index, uint32_t *ret)
{
	uint64_t bytes = 1ull << object->shift;

	if (atomic_load(&hnode->draining))
		return -ENODEV;
	if (gmem_account_room(object->account, hnode->hnid) < bytes)
		return -EDQUOT;
	if (gmem_hnode_free_locked(hnode) < bytes)
		return -ENOMEM;
	return make_frame_locked(hnode, object, index, ret);
}

int gmem_hnode_frame_adopt(struct gmem_hnode *hnode, struct gmem_object *object, uint64_t index)
{
	uint32_t frame = GMEM_FRAME_NONE;
	int err;

	gmem_mutex_lock(&hnode->lock);
	err = make_frame_locked(hnode, object, index, &frame);
	gmem_mutex_unlock(&hnode->lock);
	if (!err)
		atomic_store_explicit(&hnode->frame_of[object->pn + index], frame, memory_order_relaxed);
	return err;
}

int gmem_hnode_frame_alloc(struct gmem_hnode *hnode, struct gmem_object *object, uint64_t index)
{
	uint32_t frame = GMEM_FRAME_NONE;
	int err;

	gmem_mutex_lock(&hnode->lock);
	err = take_frame_locked(hnode, object, index, &frame);
	if (err == -ENOMEM)
		press_locked(hnode);
	else if (hnode->reclaimer_runs && hnode->pressure_ns && gmem_hnode_free_locked(hnode) < gmem_counter(&hnode->low_bytes))
		pthread_cond_signal(&hnode->wake);
	if (err == -EDQUOT || object->account->pressure_ns[hnode->hnid])
		press_account_locked(hnode, object->account, err == -EDQUOT);
	gmem_mutex_unlock(&hnode->lock);
	if (!err)
		atomic_store_explicit(&hnode->frame_of[object->pn + index], frame, memory_order_relaxed);
	return err;
}

void gmem_hnode_frame_free(struct gmem_hnode *hnode, struct gmem_object *object, uint64_t index)
{
	uint32_t frame = atomic_load_explicit(&hnode->frame_of[object->pn + index], memory_order_relaxed);

	if (!frame)
		return;
	atomic_store_explicit(&hnode->frame_of[object->pn + index], GMEM_FRAME_NONE, memory_order_relaxed);
	gmem_mutex_lock(&hnode->lock);
	gmem_policy_remove(&hnode->policy, frame, object->pn + index,
			   hnode->frames[frame].evicted ? GMEM_LEAVE_EVICTED : GMEM_LEAVE_FREED);
	mate_remove_locked(hnode, object->account, frame);
	hnode->frames[frame].object = NULL;
	hnode->frames[frame].next = hnode->free_head;
	hnode->free_head = frame;
	charge_locked(hnode, object, -(int64_t)(1ull << object->shift));
	/* some way below where it was full, it is worth another try: what comes may be smaller */
	if (hnode->full_at_bytes && hnode->used_bytes + gmem_counter(&hnode->high_bytes) < hnode->full_at_bytes)
		hnode->full_at_bytes = 0;
	gmem_mutex_unlock(&hnode->lock);
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
	atomic_store_explicit(&hnode->frames[frame].used, 1, memory_order_relaxed);
	hnode->frames[frame].cold = false;
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

void gmem_hnode_want(struct gmem_hnode *hnode, uint64_t pn)
{
	uint32_t frame = atomic_load_explicit(&hnode->frame_of[pn], memory_order_relaxed);

	if (frame)
		atomic_store_explicit(&hnode->frames[frame].wanted, 1, memory_order_relaxed);
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

void gmem_hnode_cold(struct gmem_hnode *hnode, struct gmem_object *object, uint64_t index)
{
	uint32_t frame = atomic_load_explicit(&hnode->frame_of[object->pn + index], memory_order_relaxed);

	if (!frame)
		return;
	gmem_mutex_lock(&hnode->lock);
	gmem_policy_cool(&hnode->policy, frame);
	if (!hnode->frames[frame].cold && hnode->cold_count < GMEM_COLD_FRAMES) {
		hnode->frames[frame].cold = true;
		hnode->cold[(hnode->cold_head + hnode->cold_count++) % GMEM_COLD_FRAMES] = frame;
		if (hnode->reclaimer_runs && hnode->pressure_ns)
			pthread_cond_signal(&hnode->wake);
	}
	gmem_mutex_unlock(&hnode->lock);
}

uint32_t gmem_hnode_next_cold_locked(struct gmem_hnode *hnode)
{
	uint32_t frame = GMEM_FRAME_NONE;

	if (hnode->cold_count) {
		frame = hnode->cold[hnode->cold_head];
		hnode->cold_head = (hnode->cold_head + 1) % GMEM_COLD_FRAMES;
		hnode->cold_count--;
	}
	return frame;
}

bool gmem_hnode_takes(const struct gmem_hnode *hnode, const struct gmem_object *object)
{
	if (!gmem_hnode_own_frames(hnode))
		return true;
	return hnode->info.page_bytes_mask >> object->shift & 1 && !object->pooled && !atomic_load(&object->source);
}

void gmem_hnode_failed(struct gmem_hnode *hnode)
{
	if (hnode->ops->health && hnode->ops->health(hnode->device) == -EIO && !atomic_exchange(&hnode->lost, true))
		gmem_core_post(hnode->core, GMEM_EVENT_DEVICE_LOST, 0, 0, 0, hnode->hnid, -EIO);
}

bool gmem_hnode_slow(const struct gmem_hnode *hnode, uint64_t bytes)
{
	const struct gmem_device_info *info = &hnode->info;

	if (info->caps & GMEM_CAP_SLOW)
		return true;
	if (!gmem_hnode_is_peer(hnode))
		return false;
	return info->latency_ns + (info->bandwidth_bytes_per_s ? bytes * 1000000000ull / info->bandwidth_bytes_per_s : 0) >
	       SLOW_NS;
}

void gmem_hnode_pinned(struct gmem_hnode *hnode, int64_t bytes)
{
	gmem_mutex_lock(&hnode->lock);
	hnode->pinned_bytes += (uint64_t)bytes;
	gmem_mutex_unlock(&hnode->lock);
}

/* ---- visitors ---- */

struct gmem_hnode *gmem_hnode_visit(struct gmem_core *core, int hnid)
{
	struct gmem_hnode *hnode = gmem_core_hnode(core, hnid);

	if (!hnode)
		return NULL;
	atomic_fetch_add(&hnode->visitors, 1);
	/* looked at once more: whoever removes it has first taken it out of the table, and then waits for visitors */
	if (gmem_core_hnode(core, hnid) == hnode && !atomic_load(&hnode->draining))
		return hnode;
	gmem_hnode_leave(hnode);
	return NULL;
}

void gmem_hnode_leave(struct gmem_hnode *hnode)
{
	atomic_fetch_sub(&hnode->visitors, 1);
}

void gmem_hnode_await_visitors(struct gmem_hnode *hnode)
{
	const struct timespec pause = { 0, VISITOR_PAUSE_NS };

	while (atomic_load(&hnode->visitors))
		nanosleep(&pause, NULL);
}
