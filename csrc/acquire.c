/* SPDX-License-Identifier: Apache-2.0
 *
 * acquire and release: the bracket around what a device does to memory that it can't replay faults on. A page that is
 * held is neither evicted nor taken by a fault from elsewhere; that fault waits for the release. A context's holds are
 * recorded with its view, so that they end with it.
 */
#include <errno.h>
#include <stdlib.h>

#include <gmem/crash.h>
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

/* Fetches what is not there in runs, where moving and mapping many at a time is cheaper. Each page is then held by itself. */
static void fetch_run(struct gmem_request *request, const struct gmem_place *place, uint64_t va, uint64_t end)
{
	gmem_word_t word = atomic_load(&request->core->lpt.words[place->object->pn + place->index]);

	if (request->view->pmap && !(gmem_word_valid(word) >> request->hnid & 1))
		gmem_request_run(request, place, va, end, request->write, GMEM_WHY_ACQUIRE);
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
		fetch_run(request, &place, va, end);
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

/* name.record: 0: it is to be recorded. */
static int add_hold(struct gmem_view *view, struct gmem_range range, struct gmem_hold_name name)
{
	struct gmem_record record = { .kind = GMEM_RECORD_HOLD, .id = view->id };
	struct gmem_hold *hold = malloc(sizeof(*hold));
	int err = hold ? 0 : -ENOMEM;

	record.hold.va = range.va;
	record.hold.bytes = range.bytes;
	record.hold.asked = name.asked;
	record.hold.index = name.index;
	if (!err) {
		*hold = (struct gmem_hold){ .range = range, .record = name.record, .asked = name.asked,
					     .index = name.index };
		err = name.record ? 0 : gmem_record_put(&view->session->core->keep, &record, &hold->record);
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

/* The hold of that range and name; each may be NULL: any. */
static struct gmem_hold **find_hold_locked(struct gmem_view *view, const struct gmem_range *range,
					   const struct gmem_hold_name *name)
{
	struct gmem_hold **at;

	for (at = &view->holds; *at; at = &(*at)->next)
		if ((!range || ((*at)->range.va == range->va && (*at)->range.bytes == range->bytes)) &&
		    (!name || ((*at)->asked == name->asked &&
			       (name->record ? (*at)->record == name->record : (*at)->index == name->index))))
			break;
	return at;
}

static void end_hold(struct gmem_view *view, struct gmem_hold *hold)
{
	gmem_record_drop(&view->session->core->keep, &hold->record);
	free(hold);
	gmem_crash(GMEM_CRASH_HOLD_ENDED);
}

/* Takes it off the view. */
static bool take_hold(struct gmem_view *view, const struct gmem_range *range, const struct gmem_hold_name *name,
		      struct gmem_range *ret)
{
	struct gmem_hold **at, *hold;

	gmem_mutex_lock(&view->as->views_lock);
	at = find_hold_locked(view, range, name);
	hold = *at;
	if (hold) {
		*at = hold->next;
		*ret = hold->range;
	}
	gmem_mutex_unlock(&view->as->views_lock);
	if (hold)
		end_hold(view, hold);
	return hold != NULL;
}

/* Those of a request that a predecessor had begun, or done and not told. They stay recorded until they are let go of. */
static struct gmem_hold *take_asked(struct gmem_view *view, uint64_t asked)
{
	struct gmem_hold *taken = NULL, **at = &view->holds;

	gmem_mutex_lock(&view->as->views_lock);
	while (*at) {
		struct gmem_hold *hold = *at;

		if (hold->asked != asked) {
			at = &hold->next;
			continue;
		}
		*at = hold->next;
		hold->next = taken;
		taken = hold;
	}
	gmem_mutex_unlock(&view->as->views_lock);
	return taken;
}

/* What is held can't be written by others: only who may write himself may hold what is not sealed. */
static int check_access(struct gmem_session *session, struct gmem_range range, bool write)
{
	int err = gmem_range_check_write(session, range.va, range.bytes);

	return err == -EPERM && !write ? 0 : err;
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

static int acquire_all(struct gmem_request *request, const struct gmem_range *ranges, size_t count, uint64_t asked)
{
	struct gmem_range dropped;
	uint64_t upto = 0;
	int err = 0;

	for (size_t i = 0; !err && i < count; i++)
		err = check_access(request->session, ranges[i], request->write);
	if (err)
		return err;
	for (size_t i = 0; !err && i < count; i++) {
		err = acquire_range(request, ranges[i], &upto);
		if (!err) {
			upto = ranges[i].va + ranges[i].bytes;
			err = i + 1 == count ? gmem_view_flush(request->view) : 0;
		}
		if (!err)
			err = add_hold(request->view, ranges[i], (struct gmem_hold_name){ 0, (uint32_t)i, asked });
		if (err) {
			undo_acquire(request, ranges, i, upto);
			while (i--)
				take_hold(request->view, &ranges[i], NULL, &dropped);
			break;
		}
	}
	return err;
}

/* Done again, it must not hold twice what will be released once. The old holds go last, so that what a device is using stays
 * where it is. */
static int acquire(struct gmem_core *core, uint64_t context, const struct gmem_range *ranges, size_t count, bool write,
		   uint64_t asked, bool again, int tries)
{
	struct gmem_request request;
	struct gmem_hold *before, *next;
	int err = context_request(core, context, ranges, count, &request);

	if (err)
		return err;
	request.write = write;
	request.tries = tries;
	before = again ? take_asked(request.view, asked) : NULL;
	err = acquire_all(&request, ranges, count, asked);
	for (; before; before = next) {
		next = before->next;
		release_range(&request, before->range);
		end_hold(request.view, before);
	}
	gmem_request_deinit(&request);
	return err;
}

int gmem_acquire(struct gmem_core *core, uint64_t context, const struct gmem_range *ranges, size_t count, bool write,
		 uint64_t asked)
{
	return acquire(core, context, ranges, count, write, asked, asked != 0, 0);
}

static int release(struct gmem_view *view, const struct gmem_range *ranges, size_t count, const struct gmem_hold_name *name)
{
	struct gmem_request request = { .core = view->session->core, .session = view->session, .view = view,
					.hnid = view->hnid };
	struct gmem_range range;
	int err = 0;

	for (size_t i = 0; i < count; i++) {
		if (take_hold(view, &ranges[i], name, &range))
			release_range(&request, range);
		else
			err = -EINVAL; /* never acquired, or released before: the others are released all the same */
	}
	return err;
}

int gmem_release(struct gmem_core *core, uint64_t context, const struct gmem_range *ranges, size_t count)
{
	struct gmem_view *view = gmem_context_find(core, context);
	int err = view ? release(view, ranges, count, NULL) : -ENOENT;

	gmem_view_unref(view);
	return err;
}

/* Of a name there is one, once: what is not there was released before. */
static void release_named(struct gmem_view *view, const struct gmem_hold_name *names, size_t count)
{
	struct gmem_request request = { .core = view->session->core, .session = view->session, .view = view,
					.hnid = view->hnid };
	struct gmem_range range;

	for (size_t i = 0; i < count; i++)
		if (take_hold(view, NULL, &names[i], &range))
			release_range(&request, range);
}

int gmem_release_named(struct gmem_core *core, uint64_t context, const struct gmem_hold_name *names, size_t count)
{
	struct gmem_view *view = gmem_context_find(core, context);

	if (!view)
		return -ENOENT;
	release_named(view, names, count);
	gmem_view_unref(view);
	return 0;
}

static int hold_page(struct gmem_request *request, struct gmem_page *page, struct gmem_range range)
{
	struct gmem_frame *frame = gmem_hnode_frame(gmem_core_hnode(request->core, request->hnid), page->object, page->index);

	(void)range;
	if (frame && frame->holds < UINT16_MAX)
		frame->holds++;
	return 0;
}

int gmem_hold_adopt(struct gmem_view *view, struct gmem_range range, struct gmem_hold_name name)
{
	struct gmem_request request = { .core = view->session->core, .session = view->session, .view = view,
					.hnid = view->hnid, .hint = GMEM_NO_HINT };
	int err = add_hold(view, range, name);

	if (!err)
		gmem_for_pages(&request, range.va, range.bytes, false, true, hold_page);
	return err;
}

int gmem_session_acquire(struct gmem_session *session, uint64_t context, struct gmem_range range, bool write, uint64_t asked,
			 bool again)
{
	struct gmem_view *view = find_context(session, context);
	int err = view ? acquire(session->core, context, &range, 1, write, asked, again, SHORT_TRIES) : -ENOENT;

	gmem_view_unref(view);
	return err;
}

int gmem_session_find_hold(struct gmem_session *session, uint64_t context, struct gmem_range range,
			   struct gmem_hold_name *ret)
{
	struct gmem_view *view = find_context(session, context);
	struct gmem_hold *hold;

	if (!view)
		return -ENOENT;
	gmem_mutex_lock(&view->as->views_lock);
	hold = *find_hold_locked(view, &range, NULL);
	if (hold)
		*ret = (struct gmem_hold_name){ hold->record, hold->index, hold->asked };
	gmem_mutex_unlock(&view->as->views_lock);
	gmem_view_unref(view);
	return hold ? 0 : -EINVAL;
}

int gmem_session_release(struct gmem_session *session, uint64_t context, struct gmem_range range,
			 const struct gmem_hold_name *name)
{
	struct gmem_view *view = find_context(session, context);
	int err = view ? release(view, &range, 1, name) : -ENOENT;

	gmem_view_unref(view);
	return err;
}

int gmem_session_release_named(struct gmem_session *session, uint64_t context, const struct gmem_hold_name *name)
{
	struct gmem_view *view = find_context(session, context);

	if (!view)
		return -ENOENT;
	release_named(view, name, 1);
	gmem_view_unref(view);
	return 0;
}

void gmem_release_all(struct gmem_view *view)
{
	struct gmem_request request = { .core = view->session->core, .session = view->session, .view = view,
					.hnid = view->hnid };
	struct gmem_range range;

	while (take_hold(view, NULL, NULL, &range))
		release_range(&request, range);
}
