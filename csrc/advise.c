/* SPDX-License-Identifier: Apache-2.0
 *
 * Advice on ranges: prefetch, discard, and what reclaim shall know of pages.
 */
#include <errno.h>

#include <gmem/internal.h>
#include <gmem/pages.h>

/* Afterwards the hnode does not fault on it: present, owned (unless duplicates are wanted) and mapped. */
static int prefetch_page(struct gmem_request *request, struct gmem_page *page, struct gmem_range range)
{
	struct gmem_hnode *hnode = gmem_core_hnode(request->core, request->hnid);
	bool read_mostly = gmem_word_flags(page->word) & GMEM_PAGE_READ_MOSTLY, mapped;
	int err;

	if (!hnode)
		return -ENODEV;
	if (gmem_hnode_is_peer(hnode) && !gmem_word_valid(page->word))
		return 0; /* nothing to store */
	err = gmem_page_fetch(page, request->hnid, request->view, range, GMEM_WHY_PREFETCH, &mapped);
	/* moving a page to a tier is meant to free the memory it had, read mostly or not */
	if (!err && (gmem_hnode_is_peer(hnode) || !read_mostly))
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
	struct gmem_request request;
	int err;

	if (hnid < 0)
		return -EINVAL;
	err = gmem_request_init(core, session, hnid, va, bytes, &request);
	if (err)
		return err;
	err = gmem_for_pages(&request, va, bytes, false, false, prefetch_page);
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
	struct gmem_request request;
	int err;

	if (advice == GMEM_ADVISE_PREFETCH)
		return gmem_prefetch(core, session, hnid, va, bytes);
	if (advice == GMEM_ADVISE_DISCARD)
		return gmem_discard(core, session, va, bytes);
	if (advice == GMEM_ADVISE_PREFERRED)
		return -EOPNOTSUPP;
	if (hnid < 0 && (advice == GMEM_ADVISE_PINNED || advice == GMEM_ADVISE_COLD))
		return -EINVAL;
	err = gmem_request_init(core, session, hnid, va, bytes, &request);
	if (err)
		return err;
	request.advice = advice;
	err = gmem_for_pages(&request, va, bytes, false, !untouched_too, advise_page);
	gmem_request_deinit(&request);
	return err;
}
