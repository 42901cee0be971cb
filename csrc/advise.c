/* SPDX-License-Identifier: Apache-2.0
 *
 * Requests on a range: advice, prefetch, discard, and the acquire/release bracket of device accesses.
 */
#include <errno.h>
#include <sched.h>
#include <time.h>

#include <gmem/internal.h>
#include <gmem/migrate.h>
#include <gmem/pmap.h>

#define AGAIN_TRIES 2000

struct request {
	struct gmem_core *core;
	struct gmem_session *session;
	struct gmem_view *view; /* where the pages are to be mapped, or NULL */
	int hnid;
	enum gmem_advice advice;
	bool write;
};

typedef int (*page_fn)(struct request *request, struct gmem_page *page, struct gmem_range range);

/* Every byte of the range must be in a region. */
static int check_range(struct gmem_session *session, uint64_t va, uint64_t bytes)
{
	uint64_t end = va + bytes;

	if (end < va)
		return -EINVAL;
	while (va < end) {
		struct gmem_place place;

		if (gmem_as_lookup(&session->as, va, &place))
			return -EINVAL;
		va = place.region_va + place.region_bytes;
		gmem_object_unref(place.object);
	}
	return 0;
}

static void pause_for(int tries)
{
	const struct timespec pause = { 0, 100000 };

	if (tries < 16)
		sched_yield();
	else
		nanosleep(&pause, NULL);
}

static int one_page(struct request *request, struct gmem_object *object, uint64_t index, struct gmem_range range,
		    page_fn fn)
{
	int err = -EAGAIN;

	for (int tries = 0; err == -EAGAIN && tries < AGAIN_TRIES; tries++) {
		struct gmem_page page;

		if (tries)
			pause_for(tries);
		gmem_page_lock(object, index, &page);
		err = gmem_page_poisoned(&page) ? -EIO : fn(request, &page, range);
		page.park = false; /* this thread does not wait for a wake-up */
		gmem_page_unlock(&page);
	}
	return err;
}

/* Calls fn for each page that overlaps the range (outward), or lies in it whole (inward). touched: skips pages that were
 * never used. Stops at the first error. */
static int for_pages(struct request *request, uint64_t va, uint64_t bytes, bool inward, bool touched, page_fn fn)
{
	uint64_t end = va + bytes;
	int err = 0;

	while (!err && va < end) {
		struct gmem_place place;
		uint64_t page_bytes, next;
		bool whole;

		if (gmem_as_lookup(&request->session->as, va, &place))
			return -EINVAL;
		page_bytes = 1ull << place.object->shift;
		next = place.range.va + place.range.bytes;
		whole = place.range.va >= va && next <= end && place.range.bytes == page_bytes;
		if (touched) {
			uint64_t pn = place.object->pn + place.index, stop, skip;

			if (gmem_lpt_next_touched(&request->core->lpt, &pn, place.object->pn + place.object->pages,
						  &stop))
				next = place.region_va + place.region_bytes;
			else if ((skip = pn - (place.object->pn + place.index)) > 0)
				next = place.range.va + skip * page_bytes;
			if (next > place.region_va + place.region_bytes)
				next = place.region_va + place.region_bytes;
			whole = whole && next == place.range.va + place.range.bytes;
		}
		if (inward ? whole : (!touched || next == place.range.va + place.range.bytes))
			err = one_page(request, place.object, place.index, place.range, fn);
		gmem_object_unref(place.object);
		va = next;
	}
	return err;
}

static int request_init(struct gmem_core *core, uint64_t session, int hnid, uint64_t va, uint64_t bytes,
			struct request *ret)
{
	int err;

	*ret = (struct request){ .core = core, .hnid = hnid };
	if (hnid != -1 && !gmem_core_hnode(core, hnid))
		return -ENODEV;
	ret->session = gmem_session_get(core, session);
	if (!ret->session)
		return -ENOENT;
	err = check_range(ret->session, va, bytes);
	if (err) {
		gmem_session_unref(ret->session);
		return err;
	}
	if (hnid >= 0)
		ret->view = gmem_as_view(&ret->session->as, hnid);
	return 0;
}

static void request_deinit(struct request *request)
{
	gmem_view_unref(request->view);
	gmem_session_unref(request->session);
}

/* Afterwards the hnode does not fault on it: present, owned (unless duplicates are wanted) and mapped. */
static int prefetch_page(struct request *request, struct gmem_page *page, struct gmem_range range)
{
	struct gmem_hnode *hnode = gmem_core_hnode(request->core, request->hnid);
	bool read_mostly = gmem_word_flags(page->word) & GMEM_PAGE_READ_MOSTLY, mapped;
	int err;

	if (!hnode)
		return -ENODEV;
	err = gmem_page_fetch(page, request->hnid, request->view, range, GMEM_WHY_PREFETCH, &mapped);
	if (!err && !gmem_hnode_is_peer(hnode) && !read_mostly)
		err = gmem_page_own(page, request->hnid);
	else if (!err && gmem_hnode_is_peer(hnode)) /* moving a page to a tier frees the memory it had */
		err = gmem_page_own(page, request->hnid);
	if (!err && request->view)
		err = gmem_page_map(page, request->view, range, mapped);
	if (err == -ESRCH)
		err = 0; /* the process is going: the page is where it was asked for */
	if (!err) {
		gmem_hnode_touch(hnode, page->object, page->index);
		gmem_count(&request->core->stats.prefetched_pages, 1);
	}
	return err;
}

int gmem_prefetch(struct gmem_core *core, uint64_t session, int hnid, uint64_t va, uint64_t bytes)
{
	struct request request;
	int err;

	if (hnid < 0)
		return -EINVAL;
	err = request_init(core, session, hnid, va, bytes, &request);
	if (err)
		return err;
	err = for_pages(&request, va, bytes, false, false, prefetch_page);
	request_deinit(&request);
	return err;
}

static int discard_page(struct request *request, struct gmem_page *page, struct gmem_range range)
{
	int err = gmem_page_discard(page);

	(void)range;
	if (!err)
		gmem_count(&request->core->stats.discarded_pages, 1);
	return err;
}

int gmem_discard(struct gmem_core *core, uint64_t session, uint64_t va, uint64_t bytes)
{
	struct request request;
	int err = request_init(core, session, -1, va, bytes, &request);

	if (err)
		return err;
	err = for_pages(&request, va, bytes, true, true, discard_page);
	request_deinit(&request);
	return err;
}

static void set_pinned(struct gmem_page *page, bool pinned)
{
	uint32_t valid = gmem_word_valid(page->word);

	if (pinned == !!(gmem_word_flags(page->word) & GMEM_PAGE_PINNED))
		return;
	page->word ^= GMEM_WORD_FLAG(GMEM_PAGE_PINNED);
	for (int h = 0; valid >> h; h++)
		if (valid >> h & 1)
			gmem_hnode_pinned(gmem_core_hnode(page->core, h),
					  pinned ? (int64_t)page->bytes : -(int64_t)page->bytes);
}

static int advise_page(struct request *request, struct gmem_page *page, struct gmem_range range)
{
	struct gmem_hnode *hnode;
	int err;

	switch (request->advice) {
	case GMEM_ADVISE_PINNED:
		err = prefetch_page(request, page, range);
		if (err)
			return err;
		set_pinned(page, true);
		return 0;
	case GMEM_ADVISE_UNPINNED:
		set_pinned(page, false);
		return 0;
	case GMEM_ADVISE_READ_MOSTLY:
		page->word |= GMEM_WORD_FLAG(GMEM_PAGE_READ_MOSTLY);
		return 0;
	case GMEM_ADVISE_NO_READ_MOSTLY:
		page->word &= ~GMEM_WORD_FLAG(GMEM_PAGE_READ_MOSTLY);
		return 0;
	case GMEM_ADVISE_COLD:
		hnode = gmem_core_hnode(request->core, request->hnid);
		if (hnode && (gmem_word_valid(page->word) >> request->hnid & 1))
			gmem_hnode_cool(hnode, page->object, page->index);
		return 0;
	default:
		return -EINVAL;
	}
}

int gmem_advise(struct gmem_core *core, uint64_t session, int hnid, uint64_t va, uint64_t bytes,
		enum gmem_advice advice)
{
	bool untouched_too = advice == GMEM_ADVISE_PINNED || advice == GMEM_ADVISE_READ_MOSTLY;
	struct request request;
	int err;

	if (advice == GMEM_ADVISE_PREFETCH)
		return gmem_prefetch(core, session, hnid, va, bytes);
	if (advice == GMEM_ADVISE_DISCARD)
		return gmem_discard(core, session, va, bytes);
	if (advice == GMEM_ADVISE_PREFERRED)
		return -EOPNOTSUPP;
	if (hnid < 0 && (advice == GMEM_ADVISE_PINNED || advice == GMEM_ADVISE_COLD))
		return -EINVAL;
	err = request_init(core, session, hnid, va, bytes, &request);
	if (err)
		return err;
	request.advice = advice;
	err = for_pages(&request, va, bytes, false, !untouched_too, advise_page);
	request_deinit(&request);
	return err;
}

/* ---- acquire and release ---- */

static int acquire_page(struct request *request, struct gmem_page *page, struct gmem_range range)
{
	struct gmem_hnode *hnode = gmem_core_hnode(request->core, request->hnid);
	struct gmem_frame *frame;
	bool mapped;
	int err = gmem_page_fetch(page, request->hnid, request->view, range, GMEM_WHY_ACQUIRE, &mapped);

	if (!err && (request->write || !request->core->features.continue_wp))
		err = gmem_page_own(page, request->hnid);
	if (!err)
		err = gmem_page_map(page, request->view, range, mapped);
	if (err == -EBUSY)
		err = -EAGAIN; /* another context holds it: it will let go */
	if (err)
		return err;
	frame = gmem_hnode_frame(hnode, page->object, page->index);
	if (!frame || frame->holds == UINT16_MAX)
		return -EOVERFLOW;
	frame->holds++;
	atomic_store_explicit(&frame->visited, 1, memory_order_relaxed);
	return 0;
}

static int release_page(struct request *request, struct gmem_page *page, struct gmem_range range)
{
	struct gmem_hnode *hnode = gmem_core_hnode(request->core, request->hnid);
	struct gmem_frame *frame = hnode ? gmem_hnode_frame(hnode, page->object, page->index) : NULL;

	(void)range;
	if (frame && frame->holds)
		frame->holds--;
	return 0;
}

static struct gmem_view *find_context(struct gmem_session *session, uint64_t context)
{
	struct gmem_view *view;

	gmem_mutex_lock(&session->as.views_lock);
	for (view = session->as.views; view && (!view->id || view->id != context); view = view->next)
		;
	if (view)
		gmem_view_ref(view);
	gmem_mutex_unlock(&session->as.views_lock);
	return view;
}

struct gmem_view *gmem_context_find(struct gmem_core *core, uint64_t context)
{
	struct gmem_view *view = NULL;

	gmem_rwlock_read(&core->sessions_lock);
	for (size_t b = 0; b < GMEM_SESSION_BUCKETS && !view; b++)
		for (struct gmem_session *s = core->sessions[b]; s && !view; s = s->next)
			view = find_context(s, context);
	gmem_rwlock_unlock(&core->sessions_lock);
	return view;
}

static void undo_acquire(struct request *request, const struct gmem_range *ranges, size_t count, uint64_t upto_va)
{
	for (size_t i = 0; i <= count; i++) {
		uint64_t bytes = i < count ? ranges[i].bytes : upto_va - ranges[i].va;

		if (bytes)
			for_pages(request, ranges[i].va, bytes, false, false, release_page);
	}
}

/* How far an acquire got: pages are held in order, so release can stop where it failed. */
static int acquire_range(struct request *request, struct gmem_range range, uint64_t *ret_upto)
{
	uint64_t va = range.va, end = range.va + range.bytes;

	while (va < end) {
		struct gmem_place place;
		uint64_t next;
		int err;

		*ret_upto = va;
		if (gmem_as_lookup(&request->session->as, va, &place))
			return -EINVAL;
		next = place.range.va + place.range.bytes;
		err = one_page(request, place.object, place.index, place.range, acquire_page);
		gmem_object_unref(place.object);
		if (err)
			return err;
		va = next;
	}
	return 0;
}

static int context_request(struct gmem_core *core, uint64_t context, const struct gmem_range *ranges, size_t count,
			   struct request *ret)
{
	struct gmem_view *view = gmem_context_find(core, context);
	int err = 0;

	if (!view)
		return -ENOENT;
	*ret = (struct request){ .core = core, .session = gmem_session_ref(view->session), .view = view,
				 .hnid = view->hnid };
	for (size_t i = 0; !err && i < count; i++)
		err = ranges[i].bytes ? check_range(ret->session, ranges[i].va, ranges[i].bytes) : -EINVAL;
	if (err)
		request_deinit(ret);
	return err;
}

int gmem_acquire(struct gmem_core *core, uint64_t context, const struct gmem_range *ranges, size_t count, bool write)
{
	struct request request;
	uint64_t upto = 0;
	int err = context_request(core, context, ranges, count, &request);

	if (err)
		return err;
	request.write = write;
	for (size_t i = 0; !err && i < count; i++) {
		err = acquire_range(&request, ranges[i], &upto);
		if (err)
			undo_acquire(&request, ranges, i, upto);
	}
	request_deinit(&request);
	return err;
}

int gmem_release(struct gmem_core *core, uint64_t context, const struct gmem_range *ranges, size_t count)
{
	struct request request;
	int err = context_request(core, context, ranges, count, &request);

	if (err)
		return err;
	for (size_t i = 0; !err && i < count; i++)
		err = for_pages(&request, ranges[i].va, ranges[i].bytes, false, false, release_page);
	request_deinit(&request);
	return err;
}
