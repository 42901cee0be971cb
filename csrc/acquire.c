/* SPDX-License-Identifier: Apache-2.0
 *
 * acquire and release: the bracket around what a device does to memory that it can't replay faults on. A page that is
 * held is neither evicted nor taken by a fault from elsewhere; that fault waits for the release. A context's holds are
 * recorded with its view, so that they end with it.
 */
#include <errno.h>
#include <stdlib.h>

#include <gmem/internal.h>
#include <gmem/pages.h>

#define SHORT_TRIES 8 /* that yield, and do not sleep */

static int acquire_page(struct gmem_request *request, struct gmem_page *page, struct gmem_range range)
{
	const struct gmem_use use = { GMEM_ACCESS_ACQUIRE, request->hnid, request->view->session_id, range.va, page->word,
				      request->write };
	struct gmem_hnode *hnode = gmem_core_hnode(request->core, request->hnid);
	struct gmem_frame *frame;
	bool mapped;
	int err = gmem_page_fetch(page, request->hnid, request->view, range, GMEM_WHY_ACQUIRE, &mapped);

	if (!err && (request->write || (!request->core->features.continue_wp && !gmem_object_sealed(page->object))))
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
	gmem_hnode_touch(hnode, page->object, page->index);
	if (gmem_core_traces(page->core))
		gmem_page_trace(page, &use);
	return 0;
}

static int release_page(struct gmem_request *request, struct gmem_page *page, struct gmem_range range)
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

static void undo_acquire(struct gmem_request *request, const struct gmem_range *ranges, size_t count, uint64_t upto_va)
{
	for (size_t i = 0; i <= count; i++) {
		uint64_t bytes = i < count ? ranges[i].bytes : upto_va - ranges[i].va;

		if (bytes)
			gmem_for_pages(request, ranges[i].va, bytes, false, false, release_page);
	}
}

/* How far an acquire got: pages are held in order, so release can stop where it failed. */
static int acquire_range(struct gmem_request *request, struct gmem_range range, uint64_t *ret_upto)
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
		gmem_request_at(request, &place);
		err = !request->maps ? -EBUSY : /* its process is about to */
		      gmem_one_page(request, place.object, place.index, place.range, acquire_page);
		gmem_object_unref(place.object);
		if (err)
			return err;
		va = next;
	}
	return 0;
}

static int context_request(struct gmem_core *core, uint64_t context, const struct gmem_range *ranges, size_t count,
			   struct gmem_request *ret)
{
	struct gmem_view *view = gmem_context_find(core, context);
	struct gmem_hnode *hnode = view ? gmem_core_hnode(core, view->hnid) : NULL;
	uint64_t bytes = 0;
	int err = 0;

	if (!hnode) {
		gmem_view_unref(view);
		return view ? -ENODEV : -ENOENT;
	}
	*ret = (struct gmem_request){ .core = core, .session = gmem_session_ref(view->session), .view = view,
				 .hnid = view->hnid };
	for (size_t i = 0; !err && i < count; i++) {
		err = ranges[i].bytes ? gmem_range_check(ret->session, ranges[i].va, ranges[i].bytes) : -EINVAL;
		bytes += ranges[i].bytes;
	}
	if (!err && bytes > gmem_counter(&hnode->limit_bytes))
		err = -ENOMEM; /* all of it is to be held at once */
	if (err)
		gmem_request_deinit(ret);
	return err;
}

static int add_hold(struct gmem_view *view, struct gmem_range range, uint32_t known)
{
	struct gmem_record record = { .kind = GMEM_RECORD_HOLD, .id = view->id };
	struct gmem_hold *hold = malloc(sizeof(*hold));
	int err = hold ? 0 : -ENOMEM;

	record.hold.va = range.va;
	record.hold.bytes = range.bytes;
	if (!err) {
		*hold = (struct gmem_hold){ .range = range, .record = known };
		err = known ? 0 : gmem_record_put(&view->session->core->keep, &record, &hold->record);
	}
	if (err) {
		free(hold);
		return err;
	}
	gmem_mutex_lock(&view->as->views_lock);
	hold->next = view->holds;
	view->holds = hold;
	gmem_mutex_unlock(&view->as->views_lock);
	return 0;
}

/* Takes a hold off the view: the one of that range, or any (range NULL). */
static bool take_hold(struct gmem_view *view, const struct gmem_range *range, struct gmem_range *ret)
{
	struct gmem_hold **at, *hold;

	gmem_mutex_lock(&view->as->views_lock);
	for (at = &view->holds; *at; at = &(*at)->next)
		if (!range || ((*at)->range.va == range->va && (*at)->range.bytes == range->bytes))
			break;
	hold = *at;
	if (hold) {
		*at = hold->next;
		*ret = hold->range;
	}
	gmem_mutex_unlock(&view->as->views_lock);
	if (hold)
		gmem_record_drop(&view->session->core->keep, &hold->record);
	free(hold);
	return hold != NULL;
}

/* What is held can't be written by others: only who may write himself may hold what is not sealed. */
static int check_access(struct gmem_session *session, struct gmem_range range, bool write)
{
	int err = gmem_range_check_write(session, range.va, range.bytes);

	return err == -EPERM && !write ? 0 : err;
}

static int acquire(struct gmem_core *core, uint64_t context, const struct gmem_range *ranges, size_t count, bool write,
		   int tries)
{
	struct gmem_request request;
	struct gmem_range dropped;
	uint64_t upto = 0;
	int err = context_request(core, context, ranges, count, &request);

	if (err)
		return err;
	request.write = write;
	request.tries = tries;
	for (size_t i = 0; !err && i < count; i++)
		err = check_access(request.session, ranges[i], write);
	if (err) {
		gmem_request_deinit(&request);
		return err;
	}
	for (size_t i = 0; !err && i < count; i++) {
		err = acquire_range(&request, ranges[i], &upto);
		if (!err && (err = add_hold(request.view, ranges[i], 0)))
			upto = ranges[i].va + ranges[i].bytes;
		if (err) {
			undo_acquire(&request, ranges, i, upto);
			while (i--)
				take_hold(request.view, &ranges[i], &dropped);
			break;
		}
	}
	gmem_request_deinit(&request);
	return err;
}

int gmem_acquire(struct gmem_core *core, uint64_t context, const struct gmem_range *ranges, size_t count, bool write)
{
	return acquire(core, context, ranges, count, write, 0);
}

/* What was unmapped meanwhile has taken its holds along. */
static void release_range(struct gmem_request *request, struct gmem_range range)
{
	for (uint64_t va = range.va, end = range.va + range.bytes; va < end;) {
		struct gmem_place place;

		if (gmem_as_lookup(&request->session->as, va, &place)) {
			va = (va & ~4095ull) + 4096;
			continue;
		}
		gmem_request_at(request, &place);
		gmem_one_page(request, place.object, place.index, place.range, release_page);
		gmem_object_unref(place.object);
		va = place.range.va + place.range.bytes;
	}
}

int gmem_release(struct gmem_core *core, uint64_t context, const struct gmem_range *ranges, size_t count)
{
	struct gmem_view *view = gmem_context_find(core, context);
	struct gmem_request request;
	struct gmem_range range;
	int err = 0;

	if (!view)
		return -ENOENT;
	request = (struct gmem_request){ .core = core, .session = view->session, .view = view, .hnid = view->hnid };
	for (size_t i = 0; i < count; i++) {
		if (take_hold(view, &ranges[i], &range))
			release_range(&request, range);
		else
			err = -EINVAL; /* never acquired, or released before: the others are released all the same */
	}
	gmem_view_unref(view);
	return err;
}

static int hold_page(struct gmem_request *request, struct gmem_page *page, struct gmem_range range)
{
	struct gmem_frame *frame = gmem_hnode_frame(gmem_core_hnode(request->core, request->hnid), page->object, page->index);

	(void)range;
	if (frame && frame->holds < UINT16_MAX)
		frame->holds++;
	return 0;
}

int gmem_hold_adopt(struct gmem_view *view, struct gmem_range range, uint32_t record)
{
	struct gmem_request request = { .core = view->session->core, .session = view->session, .view = view,
					.hnid = view->hnid, .hint = GMEM_NO_HINT };
	int err = add_hold(view, range, record);

	if (!err)
		gmem_for_pages(&request, range.va, range.bytes, false, true, hold_page);
	return err;
}

static bool has_context(struct gmem_session *session, uint64_t context)
{
	struct gmem_view *view = find_context(session, context);
	bool found = view != NULL;

	gmem_view_unref(view);
	return found;
}

int gmem_session_acquire(struct gmem_session *session, uint64_t context, struct gmem_range range, bool write)
{
	if (!has_context(session, context))
		return -ENOENT;
	return acquire(session->core, context, &range, 1, write, SHORT_TRIES);
}

int gmem_session_release(struct gmem_session *session, uint64_t context, struct gmem_range range)
{
	return has_context(session, context) ? gmem_release(session->core, context, &range, 1) : -ENOENT;
}

void gmem_release_all(struct gmem_view *view)
{
	struct gmem_request request = { .core = view->session->core, .session = view->session, .view = view,
					.hnid = view->hnid };
	struct gmem_range range;

	while (take_hold(view, NULL, &range))
		release_range(&request, range);
}
