/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>

#include <gmem/internal.h>
#include <gmem/kept.h>

void gmem_kept_init(struct gmem_kept *kept)
{
	gmem_mutex_init(&kept->lock, GMEM_RANK_KEPT);
}

void gmem_kept_deinit(struct gmem_kept *kept)
{
	gmem_mutex_deinit(&kept->lock);
}

static struct gmem_kept_range *at_locked(struct gmem_kept *kept, uint64_t va)
{
	for (int i = 0; i < GMEM_KEPT_MAX; i++) {
		struct gmem_kept_range *range = &kept->ranges[i];

		if (range->state && va - range->va < range->bytes)
			return range;
	}
	return NULL;
}

static struct gmem_kept_range *free_locked(struct gmem_kept *kept)
{
	for (int i = 0; i < GMEM_KEPT_MAX; i++)
		if (!kept->ranges[i].state)
			return &kept->ranges[i];
	return NULL;
}

static bool charge(struct gmem_core *core, uint64_t bytes)
{
	if (atomic_fetch_add(&core->kept_bytes, bytes) + bytes <= core->window.bytes / GMEM_KEPT_SHARE)
		return true;
	atomic_fetch_sub(&core->kept_bytes, bytes);
	return false;
}

/* Its addresses stay whose they are. */
static void clear_locked(struct gmem_core *core, struct gmem_kept_range *range)
{
	atomic_fetch_sub(&core->kept_bytes, range->bytes);
	*range = (struct gmem_kept_range){ 0 };
}

int gmem_kept_leave(struct gmem_object *object, uint64_t va, enum gmem_fork fork)
{
	struct gmem_kept *kept = &object->account->kept;
	struct gmem_kept_range *range;
	int err = -EAGAIN;

	gmem_mutex_lock(&kept->lock);
	range = kept->ended ? NULL : free_locked(kept);
	if (range && charge(object->core, object->bytes)) {
		*range = (struct gmem_kept_range){ va, object->bytes, object->class_, fork, GMEM_KEPT_LEAVING,
						   false, false };
		atomic_store(&object->kept, true);
		err = 0;
	}
	gmem_mutex_unlock(&kept->lock);
	return err;
}

bool gmem_kept_ready(struct gmem_account *account, uint64_t va)
{
	struct gmem_kept *kept = &account->kept;
	struct gmem_kept_range *range;
	bool stays;

	gmem_mutex_lock(&kept->lock);
	range = at_locked(kept, va);
	stays = range && !range->gone;
	if (stays)
		range->state = GMEM_KEPT_READY;
	else if (range && !stays)
		clear_locked(account->core, range);
	gmem_mutex_unlock(&kept->lock);
	return stays;
}

int gmem_kept_take(struct gmem_account *account, enum gmem_class class_, uint64_t bytes, uint64_t align,
		   enum gmem_fork fork, uint64_t *ret_va)
{
	struct gmem_kept *kept = &account->kept;
	int err = -ENOENT;

	gmem_mutex_lock(&kept->lock);
	for (int i = 0; err && i < GMEM_KEPT_MAX; i++) {
		struct gmem_kept_range *range = &kept->ranges[i];

		if (range->state != GMEM_KEPT_READY || range->spoilt || range->bytes != bytes || range->class_ != class_ ||
		    range->fork != fork || range->va % align)
			continue;
		*ret_va = range->va;
		clear_locked(account->core, range);
		err = 0;
	}
	gmem_mutex_unlock(&kept->lock);
	return err;
}

void gmem_kept_spoil(struct gmem_account *account, uint64_t va)
{
	struct gmem_kept *kept = &account->kept;
	struct gmem_kept_range *range;

	gmem_mutex_lock(&kept->lock);
	range = at_locked(kept, va);
	if (range)
		range->spoilt = true;
	gmem_mutex_unlock(&kept->lock);
}

/* One whose object is still there is let go of by gmem_kept_ready(). Frees with the lock held: its rank is below. */
static void let_go_locked(struct gmem_account *account, struct gmem_kept_range *range)
{
	struct gmem_core *core = account->core;

	if (range->state == GMEM_KEPT_LEAVING) {
		range->gone = true;
		return;
	}
	gmem_range_free(&core->va[range->class_], range->va, range->bytes);
	clear_locked(core, range);
}

void gmem_kept_forget(struct gmem_account *account, uint64_t va, uint64_t bytes)
{
	struct gmem_kept *kept = &account->kept;

	gmem_mutex_lock(&kept->lock);
	for (int i = 0; i < GMEM_KEPT_MAX; i++) {
		struct gmem_kept_range *range = &kept->ranges[i];

		if (range->state && range->va < va + bytes && va < range->va + range->bytes)
			let_go_locked(account, range);
	}
	gmem_mutex_unlock(&kept->lock);
}

void gmem_kept_end(struct gmem_account *account)
{
	struct gmem_kept *kept = &account->kept;

	gmem_mutex_lock(&kept->lock);
	kept->ended = true;
	for (int i = 0; i < GMEM_KEPT_MAX; i++)
		if (kept->ranges[i].state)
			let_go_locked(account, &kept->ranges[i]);
	gmem_mutex_unlock(&kept->lock);
}
