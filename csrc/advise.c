/* SPDX-License-Identifier: Apache-2.0
 *
 * Advice on ranges: prefetch, discard, and what reclaim shall know of pages.
 */
#include <errno.h>

#include <gmem/freeze.h>
#include <gmem/internal.h>
#include <gmem/pages.h>
#include <gmem/reclaim.h>
#include <gmem/run.h>

#define RUN_BYTES (4ull << 20)
#define DEVICE_RUN_BYTES (64ull << 20) /* whose copies and mappings are made by many at a time */

/* Afterwards the hnode does not fault on it: present, owned (unless duplicates are wanted) and mapped. */
static int prefetch_page(struct gmem_request *request, struct gmem_page *page, struct gmem_range range)
{
	struct gmem_hnode *hnode = gmem_core_hnode(request->core, request->hnid);
	struct gmem_view *view = gmem_request_view(request);
	bool read_mostly = gmem_word_flags(page->word) & GMEM_PAGE_READ_MOSTLY || gmem_object_tracks(page->object), mapped;
	const struct gmem_use use = { GMEM_ACCESS_PREFETCH, request->hnid, request->session->id, range.va, page->word, false };
	int err;

	if (!hnode)
		return -ENODEV;
	if (gmem_hnode_is_peer(hnode) && !gmem_word_valid(page->word))
		return 0; /* nothing to store */
	err = gmem_page_fetch(page, request->hnid, view, range, GMEM_WHY_PREFETCH, &mapped);
	/* moving a page to a tier is meant to free the memory it had, read mostly or not */
	if (!err && !request->read_only && !gmem_object_sealed(page->object) && (gmem_hnode_is_peer(hnode) || !read_mostly))
		err = gmem_page_own(page, request->hnid);
	if (!err && view)
		err = gmem_page_map(page, view, range, mapped);
	if (err == -ESRCH || err == -EOWNERDEAD)
		err = 0; /* the process is going: the page is where it was asked for */
	if (!err) {
		gmem_hnode_touch(hnode, page->object, page->index);
		gmem_count(&request->core->stats.prefetched_pages, 1);
		if (gmem_core_traces(page->core))
			gmem_page_trace(page, &use);
	}
	return err;
}

/* The pages of a run are alike. */
static bool is_there(const struct gmem_place *place, int hnid)
{
	return gmem_word_valid(atomic_load(&place->object->core->lpt.words[place->object->pn + place->index])) >> hnid & 1;
}

/* As many pages from va on as are moved in one go; What is asked for may push out what is not. */
int gmem_request_run(struct gmem_request *request, const struct gmem_place *place, uint64_t va, uint64_t end, bool own,
		     enum gmem_why why)
{
	struct gmem_run_args args = { .object = place->object, .index = place->index, .hnid = request->hnid,
				      .view = gmem_request_view(request), .va = va, .own = own && !place->read_only &&
				      !gmem_object_tracks(place->object),
				      .private_view = place->read_only, .hint = place->hint, .why = why, .wanted = true };
	struct gmem_hnode *hnode = gmem_core_hnode(request->core, request->hnid);
	uint64_t page_bytes = 1ull << place->object->shift, region_end = place->region_va + place->region_bytes, most;

	end = end < region_end ? end : region_end;
	args.count = (end - va) / page_bytes;
	if (!hnode || gmem_hnode_is_peer(hnode) || place->range.va != va || args.count < 2)
		return 0;
	if (args.count > GMEM_RUN_PAGES)
		args.count = GMEM_RUN_PAGES;
	most = gmem_hnode_own_frames(hnode) ? DEVICE_RUN_BYTES : RUN_BYTES;
	if (args.count * page_bytes > most)
		args.count = most / page_bytes;
	if (!is_there(place, request->hnid) && gmem_hnode_free_bytes(hnode) < args.count * page_bytes)
		gmem_reclaim(hnode, args.count * page_bytes); /* as far as it goes */
	return gmem_run_move(&args);
}

static int prefetch_range(struct gmem_request *request, uint64_t va, uint64_t end)
{
	int err = 0;

	while (!err && va < end) {
		struct gmem_place place;
		int count;

		if (gmem_as_lookup(&request->session->as, va, &place))
			return -EINVAL;
		gmem_request_at(request, &place);
		count = gmem_request_run(request, &place, va, end, !place.hint.read_mostly, GMEM_WHY_PREFETCH);
		gmem_count(&request->core->stats.prefetched_pages, count > 0 ? (uint64_t)count : 0);
		if (count <= 0)
			err = gmem_one_page(request, place.object, place.index, place.range, prefetch_page);
		va = count > 0 ? va + ((uint64_t)count << place.object->shift) : place.range.va + place.range.bytes;
		gmem_object_unref(place.object);
	}
	return err;
}

/* A page that is asked for must not leave while the others come: that stops an eviction, even one that is under way. So it
 * is said before any page is waited for. */
static void want(struct gmem_request *request, uint64_t va, uint64_t end)
{
	struct gmem_hnode *hnode = gmem_core_hnode(request->core, request->hnid);
	struct gmem_lpt *lpt = &request->core->lpt;
	struct gmem_place place;

	for (; va < end && !gmem_as_lookup(&request->session->as, va, &place); va = place.region_va + place.region_bytes) {
		uint64_t pn = place.object->pn + place.index, stop, region_end = place.region_va + place.region_bytes;
		uint64_t last = pn + (((region_end < end ? region_end : end) - 1 - place.range.va) >> place.object->shift);

		for (; !gmem_lpt_next_touched(lpt, &pn, last + 1, &stop); pn = stop)
			for (uint64_t at = pn; at < stop; at++)
				if (gmem_word_valid(atomic_load_explicit(&lpt->words[at], memory_order_relaxed)) >>
				    request->hnid & 1)
					gmem_hnode_want(hnode, at);
		gmem_object_unref(place.object);
	}
}

int gmem_prefetch(struct gmem_core *core, uint64_t session, int hnid, uint64_t va, uint64_t bytes)
{
	struct gmem_request request;
	int err;

	if (hnid < 0)
		return -EINVAL;
	err = gmem_request_init(core, session, hnid, va, bytes, &request);
	if (err)
		return err;
	want(&request, va, va + bytes);
	err = prefetch_range(&request, va, va + bytes);
	if (request.view)
		gmem_view_flush(request.view); /* if its process is gone, the pages are where they were asked for */
	gmem_request_deinit(&request);
	return err;
}

static int discard_page(struct gmem_request *request, struct gmem_page *page, struct gmem_range range)
{
	int err = gmem_page_discard(page);

	(void)range;
	if (!err)
		gmem_count(&request->core->stats.discarded_pages, 1);
	return err;
}

int gmem_discard(struct gmem_core *core, uint64_t session, uint64_t va, uint64_t bytes)
{
	struct gmem_request request;
	int err = gmem_request_init(core, session, -1, va, bytes, &request);

	if (err)
		return err;
	err = gmem_range_check_write(request.session, va, bytes);
	if (!err)
		err = gmem_for_pages(&request, va, bytes, true, true, discard_page);
	gmem_request_deinit(&request);
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

static int advise_page(struct gmem_request *request, struct gmem_page *page, struct gmem_range range)
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
	case GMEM_ADVISE_NO_READ_MOSTLY:
		page->word &= ~GMEM_WORD_FLAG(GMEM_PAGE_READ_MOSTLY);
		return 0;
	case GMEM_ADVISE_COLD:
		hnode = gmem_core_hnode(request->core, request->hnid);
		if (hnode && (gmem_word_valid(page->word) >> request->hnid & 1))
			gmem_hnode_cold(hnode, page->object, page->index);
		return 0;
	case GMEM_ADVISE_READ_MOSTLY:
	case GMEM_ADVISE_PREFERRED:
	case GMEM_ADVISE_ACCESSED_BY:
	case GMEM_ADVISE_NOT_ACCESSED_BY:
		return 0; /* gmem_one_page() has told the page */
	default:
		return -EINVAL;
	}
}

bool gmem_advice_is_local(uint64_t advice)
{
	return advice == GMEM_ADVISE_PREFETCH || advice == GMEM_ADVISE_PINNED || advice == GMEM_ADVISE_COLD ||
	       advice == GMEM_ADVISE_ACCESSED_BY || advice == GMEM_ADVISE_NOT_ACCESSED_BY;
}

/* What is about everybody's use of the pages, and not about one's own. */
static bool is_for_writers(enum gmem_advice advice)
{
	return advice == GMEM_ADVISE_PINNED || advice == GMEM_ADVISE_UNPINNED || advice == GMEM_ADVISE_COLD;
}

static bool is_placement(enum gmem_advice advice)
{
	return advice == GMEM_ADVISE_READ_MOSTLY || advice == GMEM_ADVISE_NO_READ_MOSTLY ||
	       advice == GMEM_ADVISE_PREFERRED || advice == GMEM_ADVISE_ACCESSED_BY ||
	       advice == GMEM_ADVISE_NOT_ACCESSED_BY;
}

/* Who may write may pin, also what is sealed by now. */
static int check_pins(struct gmem_session *session, uint64_t va, uint64_t bytes)
{
	int err = gmem_range_check_write(session, va, bytes);

	return err == -EPERM ? 0 : err;
}

int gmem_advise(struct gmem_core *core, uint64_t session, int hnid, uint64_t va, uint64_t bytes,
		enum gmem_advice advice)
{
	struct gmem_request request;
	int err;

	if (advice == GMEM_ADVISE_PREFETCH)
		return gmem_prefetch(core, session, hnid, va, bytes);
	if (advice == GMEM_ADVISE_DISCARD)
		return gmem_discard(core, session, va, bytes);
	if (advice == GMEM_ADVISE_FREEZE || advice == GMEM_ADVISE_THAW)
		return gmem_freeze(core, session, va, bytes, advice == GMEM_ADVISE_FREEZE);
	if (advice == GMEM_ADVISE_ZERO)
		return gmem_zero(core, session, va, bytes);
	if (hnid < 0 && gmem_advice_is_local(advice))
		return -EINVAL;
	err = gmem_request_init(core, session, hnid, va, bytes, &request);
	if (err)
		return err;
	request.advice = advice;
	if (is_for_writers(advice))
		err = check_pins(request.session, va, bytes);
	if (!err && is_placement(advice))
		err = gmem_as_advise(&request.session->as, va, bytes, advice, hnid);
	/* pages that are in use already hear of it now, the others when they are first touched */
	if (!err)
		err = gmem_for_pages(&request, va, bytes, false, advice != GMEM_ADVISE_PINNED, advise_page);
	gmem_request_deinit(&request);
	return err;
}
