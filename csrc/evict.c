/* SPDX-License-Identifier: Apache-2.0
 *
 * Moving pages off an hnode: to the next tier, or nowhere if another copy stays. Pages that go to a tier go in batches,
 * so that its driver can have many requests in flight.
 */
#include <errno.h>

#include <gmem/copy.h>
#include <gmem/crash.h>
#include <gmem/evict.h>
#include <gmem/freeze.h>
#include <gmem/internal.h>
#include <gmem/migrate.h>
#include <gmem/tier.h>

struct batch {
	struct gmem_hnode *from, *to;
	bool forced;
	size_t count;
	struct gmem_page *pages[GMEM_EVICT_BATCH];
	struct gmem_peer_io io[GMEM_EVICT_BATCH];
};

static void count_eviction(struct gmem_hnode *hnode, bool clean)
{
	gmem_count(&hnode->evictions, 1);
	gmem_count(&hnode->core->stats.evictions, 1);
	if (!clean)
		return;
	gmem_count(&hnode->evicted_clean, 1);
	gmem_count(&hnode->core->stats.evicted_clean, 1);
}

/* Somebody has asked for it here, since it was chosen perhaps: it stays, this time. */
static bool is_wanted(struct gmem_hnode *hnode, struct gmem_frame *frame, bool forced)
{
	if (forced || !atomic_exchange_explicit(&frame->wanted, 0, memory_order_relaxed))
		return false;
	gmem_count(&hnode->core->stats.evictions_stopped, 1);
	return true;
}

static int drop(struct gmem_hnode *hnode, struct gmem_page *page, bool clean, bool forced)
{
	struct gmem_frame *frame = gmem_hnode_frame(hnode, page->object, page->index);
	int err;

	if (is_wanted(hnode, frame, forced))
		return -EBUSY;
	frame->evicted = true; /* the policy may remember it */
	err = gmem_page_drop(page, hnode->hnid);
	gmem_crash(GMEM_CRASH_DROP);
	if (err)
		frame->evicted = false;
	else
		count_eviction(hnode, clean);
	return err;
}

/* 1: it may go; 0: it has gone by itself. */
static int may_go(struct gmem_hnode *hnode, struct gmem_page *page, bool forced)
{
	struct gmem_frame *frame = gmem_hnode_frame(hnode, page->object, page->index);

	if (!frame || !(gmem_word_valid(page->word) >> hnode->hnid & 1))
		return 0;
	if (frame->holds || is_wanted(hnode, frame, forced))
		return -EBUSY;
	if (!forced && (gmem_word_flags(page->word) & GMEM_PAGE_PINNED))
		return -EPERM;
	if (!forced && !frame->spared && gmem_word_preferred(page->word) == hnode->hnid) {
		frame->spared = true; /* once more round before it has to leave where it is best kept */
		return -EBUSY;
	}
	return 1;
}

static bool is_clean(const struct gmem_hnode *hnode, const struct gmem_page *page)
{
	return gmem_word_valid(page->word) != 1u << hnode->hnid;
}

/* Where it would rather be, if there is room; -1: nowhere in particular. */
static int preferred_target(struct gmem_hnode *hnode, const struct gmem_page *page)
{
	int preferred = gmem_word_preferred(page->word);
	struct gmem_hnode *to = preferred == hnode->hnid ? NULL : gmem_core_hnode(page->core, preferred);

	return to && !atomic_load(&to->draining) && gmem_hnode_free_bytes(to) >= page->bytes ? preferred : -1;
}

static int write_back(struct gmem_hnode *hnode, struct gmem_page *page)
{
	struct gmem_source *source = atomic_load(&page->object->source);
	uint8_t *alias;
	int err = source->ops->push && !gmem_hnode_is_peer(hnode) ? gmem_page_downgrade(page) : -EOPNOTSUPP;

	if (!err)
		err = gmem_object_alias(page->object, hnode->hnid, &alias);
	if (!err)
		err = source->ops->push(source, page->index, alias + page->offset, page->bytes);
	if (!err)
		page->word &= ~GMEM_WORD_FLAG(GMEM_PAGE_CHANGED);
	return err;
}

/* A copy of what its source has, or takes back now. */
static bool is_copy(struct gmem_hnode *hnode, struct gmem_page *page)
{
	if (gmem_object_is_copy(page->object))
		return true;
	if (!gmem_object_tracks(page->object) || gmem_word_flags(page->word) & GMEM_PAGE_PINNED ||
	    gmem_object_frozen(page->object))
		return false;
	return !(gmem_word_flags(page->word) & GMEM_PAGE_CHANGED) || !write_back(hnode, page);
}

static int give_back(struct gmem_hnode *hnode, struct gmem_page *page, bool forced)
{
	struct gmem_frame *frame = gmem_hnode_frame(hnode, page->object, page->index);
	int err;

	if (is_wanted(hnode, frame, forced))
		return -EBUSY;
	frame->evicted = true;
	err = gmem_page_give_back(page);
	if (err)
		frame->evicted = false;
	else
		count_eviction(hnode, true);
	return err;
}

/* To where it would rather be, or to the nearest place that takes it. */
static int evict_one(struct gmem_hnode *hnode, struct gmem_page *page, bool forced)
{
	int preferred = preferred_target(hnode, page);
	bool clean = is_clean(hnode, page), mapped;
	uint32_t refused = 0;
	int err = 0;

	if (!clean && is_copy(hnode, page))
		return give_back(hnode, page, forced);

	while (!clean) {
		int target = preferred >= 0 ? preferred : gmem_tier_next(hnode, page->bytes, refused);

		if (target < 0)
			return err ? err : target;
		err = gmem_page_fetch(page, target, NULL, (struct gmem_range){ 0, 0 }, GMEM_WHY_EVICTED, &mapped);
		if (!err)
			break;
		if (err != -ENOMEM && err != -EDQUOT && err != -EAGAIN && err != -ENODEV)
			return err;
		refused |= 1u << target;
		preferred = -1;
	}
	return drop(hnode, page, clean, forced);
}

static int queue_release(struct gmem_view *view, struct gmem_range range, void *arg)
{
	(void)arg;
	gmem_view_release(view, range);
	return 0;
}

/* Where translations are taken away by message, one message is for all that leave. */
static void announce(struct gmem_hnode *hnode, struct gmem_page *page)
{
	if (gmem_hnode_own_frames(hnode))
		gmem_object_for_views(page->object, hnode->hnid, page->offset, page->bytes, queue_release, NULL);
}

/* Readers only, and a place in the tier. */
static bool prepare(struct batch *batch, struct gmem_page *page)
{
	uint8_t *alias;

	if (gmem_page_downgrade(page) || gmem_object_alias(page->object, batch->from->hnid, &alias) ||
	    gmem_hnode_frame_alloc(batch->to, page->object, page->index))
		return false;
	gmem_page_mark(page, GMEM_DIR_FILL, batch->to->hnid);
	batch->io[batch->count] = (struct gmem_peer_io){ .key = page->pn, .memory = alias + page->offset,
							 .bytes = page->bytes };
	batch->pages[batch->count++] = page;
	return true;
}

static int push(struct batch *batch)
{
	int err = 0;

	gmem_crash(GMEM_CRASH_PUSH);
	gmem_tier_push(batch->to, batch->io, batch->count);
	gmem_crash(GMEM_CRASH_PUSHED);
	for (size_t i = 0; i < batch->count; i++) {
		struct gmem_page *page = batch->pages[i];
		int result = batch->io[i].result;

		if (result) {
			gmem_page_forget(page, batch->to);
		} else {
			gmem_page_arrived(page, batch->from, batch->to, GMEM_WHY_EVICTED);
			result = drop(batch->from, page, false, batch->forced);
		}
		if (result)
			err = result;
	}
	return err;
}

/* Nobody can write there any more, and there is a frame for it where it goes. */
static bool prepare_copy(struct batch *batch, struct gmem_page *page)
{
	if (gmem_page_downgrade(page) || gmem_hnode_frame_alloc(batch->to, page->object, page->index))
		return false;
	gmem_page_mark(page, GMEM_DIR_FILL, batch->to->hnid);
	batch->pages[batch->count++] = page;
	return true;
}

/* Between the host and a device. From one that only its copy engine reaches it is one message to each process that maps
 * pages, and one copy. */
static int evict_by_copy(struct gmem_hnode *hnode, struct gmem_hnode *to, struct gmem_page **pages, size_t count, bool forced)
{
	struct batch batch = { .from = hnode, .to = to, .forced = forced };
	int err = 0, result, one;

	for (size_t i = 0; i < count; i++)
		if (!prepare_copy(&batch, pages[i]) && !batch.count)
			return to->hnid == GMEM_HOST ? evict_one(hnode, pages[i], forced) : -EAGAIN;
	gmem_crash(GMEM_CRASH_PUSH);
	result = gmem_copy_pages(hnode, batch.to, batch.pages, batch.count);
	gmem_crash(GMEM_CRASH_PUSHED);
	for (size_t i = 0; i < batch.count; i++) {
		if (result) { /* of which page, it will say alone */
			gmem_page_forget(batch.pages[i], batch.to);
			one = to->hnid == GMEM_HOST ? evict_one(hnode, batch.pages[i], forced) : result;
		} else {
			gmem_page_arrived(batch.pages[i], hnode, batch.to, GMEM_WHY_EVICTED);
			one = drop(hnode, batch.pages[i], false, forced);
		}
		err = one ? one : err;
	}
	return err;
}

/* What can be had in one go; the others wait for another round. */
static int evict_to_tier(struct gmem_hnode *hnode, struct gmem_page **pages, size_t count, bool forced)
{
	struct batch batch = { .from = hnode, .forced = forced };
	int target = gmem_tier_next(hnode, pages[0]->bytes, 0);

	if (target < 0) {
		batch.to = gmem_tier_overflow(hnode, pages[0]->bytes);
		return batch.to ? evict_by_copy(hnode, batch.to, pages, count, forced) : target;
	}
	batch.to = gmem_core_hnode(hnode->core, target);
	if (target == GMEM_HOST && batch.to && count > 1 && gmem_hnode_own_frames(hnode))
		return evict_by_copy(hnode, batch.to, pages, count, forced);
	if (count == 1 || !batch.to || !gmem_hnode_is_tier(batch.to) || !gmem_copy_reaches(hnode, batch.to)) {
		int err = 0;

		for (size_t i = 0; !err && i < count; i++)
			err = evict_one(hnode, pages[i], forced);
		return err;
	}
	for (size_t i = 0; i < count; i++)
		if (!prepare(&batch, pages[i]) && !batch.count)
			return evict_one(hnode, pages[i], forced);
	return push(&batch);
}

int gmem_evict(struct gmem_hnode *hnode, struct gmem_page *pages, size_t count, bool forced)
{
	struct gmem_page *leaving[GMEM_EVICT_BATCH];
	size_t leaving_count = 0;
	int err = 0, result;

	for (size_t i = 0; i < count; i++) {
		result = may_go(hnode, &pages[i], forced);
		if (result > 0)
			announce(hnode, &pages[i]);
		if (result > 0 && (is_clean(hnode, &pages[i]) || is_copy(hnode, &pages[i]) || preferred_target(hnode, &pages[i]) >= 0))
			result = evict_one(hnode, &pages[i], forced);
		else if (result > 0)
			leaving[leaving_count++] = &pages[i];
		if (result < 0)
			err = result;
	}
	if (leaving_count) {
		result = evict_to_tier(hnode, leaving, leaving_count, forced);
		err = result ? result : err;
	}
	for (size_t i = 0; i < count; i++) {
		pages[i].park = false; /* whoever waits for a release has set WAITERS himself */
		gmem_page_unlock(&pages[i]);
	}
	return err;
}

int gmem_evict_page(struct gmem_hnode *hnode, struct gmem_object *object, uint64_t index, bool forced)
{
	struct gmem_page page;
	int err = gmem_page_trylock(object, index, false, &page);

	return err ? err : gmem_evict(hnode, &page, 1, forced);
}
