/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>

#include <gmem/freeze.h>
#include <gmem/internal.h>

/* The mark first: who owns a page from now on sees it, and who owned one before is found by freeze_page(). */
static int mark_objects(struct gmem_session *session, uint64_t va, uint64_t end, bool frozen)
{
	int err = 0;

	while (!err && va < end) {
		struct gmem_place place;
		uint64_t free = 0;

		if (gmem_as_lookup(&session->as, va, &place))
			return -EINVAL;
		if (!frozen)
			gmem_object_thaw(place.object, session->id);
		else if (!atomic_compare_exchange_strong(&place.object->frozen_by, &free, session->id) && free != session->id)
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

int gmem_freeze(struct gmem_core *core, uint64_t session, uint64_t va, uint64_t bytes, bool frozen)
{
	struct gmem_request request;
	int err = gmem_request_init(core, session, -1, va, bytes, &request);

	if (err)
		return err;
	err = check_own(request.session, va, va + bytes);
	if (!err)
		err = mark_objects(request.session, va, va + bytes, frozen);
	request.poisoned = true;
	if (!err)
		err = gmem_for_pages(&request, va, bytes, false, true, frozen ? freeze_page : thaw_page);
	gmem_request_deinit(&request);
	return err;
}

void gmem_object_thaw(struct gmem_object *object, uint64_t session)
{
	atomic_compare_exchange_strong(&object->frozen_by, &session, 0);
}
