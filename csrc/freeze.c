/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>

#include <gmem/freeze.h>
#include <gmem/internal.h>
#include <gmem/prefetch.h>

/* The mark first: who owns a page from now on sees it, and who owned one before is found by freeze_page(). */
static int mark_objects(struct gmem_session *session, uint64_t va, uint64_t end)
{
	int err = 0;

	while (!err && va < end) {
		struct gmem_place place;
		uint64_t free = 0;

		if (gmem_as_lookup(&session->as, va, &place))
			return -EINVAL;
		if (!atomic_compare_exchange_strong(&place.object->frozen_by, &free, session->id) && free != session->id)
			err = -EBUSY;
		va = place.region_va + place.region_bytes;
		gmem_object_unref(place.object);
	}
	return err;
}

static int freeze_page(struct gmem_request *request, struct gmem_page *page, struct gmem_range range)
{
	int err = gmem_page_downgrade(page);

	(void)request;
	(void)range;
	return err == -EBUSY ? 0 : err; /* a device holds it for a kernel, which goes on */
}

/* Unlocking it wakes who waits. */
static int thaw_page(struct gmem_request *request, struct gmem_page *page, struct gmem_range range)
{
	(void)request;
	(void)page;
	(void)range;
	return 0;
}

/* Who waits would wait for ever: so what is not mapped any more is passed over, and nothing else stops it. */
static void thaw(struct gmem_request *request, uint64_t va, uint64_t end)
{
	struct gmem_session *session = request->session;

	for (;;) {
		uint64_t next = gmem_as_next(&session->as, va), stop;
		struct gmem_place place;

		va = next > va ? next : va;
		if (va >= end)
			return;
		if (gmem_as_lookup(&session->as, va, &place))
			continue; /* it has gone just now */
		stop = place.region_va + place.region_bytes;
		gmem_object_thaw(place.object, session->id);
		gmem_for_pages(request, va, (stop < end ? stop : end) - va, false, true, thaw_page);
		gmem_object_unref(place.object);
		va = stop;
	}
}

/* A pool is shared with its other users' children as well: nobody is to stop its writers. */
static int check_own(struct gmem_session *session, uint64_t va, uint64_t end)
{
	struct gmem_place place;

	for (; va < end && !gmem_as_lookup(&session->as, va, &place); va = place.region_va + place.region_bytes) {
		bool pooled = place.object->pooled;

		gmem_object_unref(place.object);
		if (pooled)
			return -EOPNOTSUPP;
	}
	return 0;
}

static int freeze(struct gmem_request *request, uint64_t va, uint64_t end)
{
	int err = check_own(request->session, va, end);

	if (!err)
		err = gmem_range_check(request->session, va, end - va);
	if (err)
		return err;
	gmem_stream_cancel(request->core, &request->session->as, -1, va, end - va);
	err = mark_objects(request->session, va, end);
	if (!err)
		err = gmem_for_pages(request, va, end - va, false, true, freeze_page);
	if (err)
		thaw(request, va, end);
	return err;
}

int gmem_freeze(struct gmem_core *core, uint64_t id, uint64_t va, uint64_t bytes, bool frozen)
{
	struct gmem_request request = { .core = core, .hnid = -1, .hint = GMEM_NO_HINT, .poisoned = true };
	int err = 0;

	if (va + bytes < va)
		return -EINVAL;
	request.session = gmem_session_get(core, id);
	if (!request.session)
		return -ENOENT;
	if (frozen)
		err = freeze(&request, va, va + bytes);
	else
		thaw(&request, va, va + bytes);
	gmem_session_unref(request.session);
	return err;
}

void gmem_object_thaw(struct gmem_object *object, uint64_t session)
{
	atomic_compare_exchange_strong(&object->frozen_by, &session, 0);
}
