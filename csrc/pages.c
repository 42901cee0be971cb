/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <sched.h>
#include <time.h>

#include <gmem/internal.h>
#include <gmem/overlay.h>
#include <gmem/pages.h>
#include <gmem/prefetch.h>

#define AGAIN_TRIES 2000

int gmem_range_check(struct gmem_session *session, uint64_t va, uint64_t bytes)
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

int gmem_range_check_write(struct gmem_session *session, uint64_t va, uint64_t bytes)
{
	struct gmem_place place;

	for (uint64_t end = va + bytes; va < end && !gmem_as_lookup(&session->as, va, &place);
	     va = place.region_va + place.region_bytes) {
		bool sealed = gmem_object_sealed(place.object);

		gmem_object_unref(place.object);
		if (sealed || place.read_only)
			return sealed ? -EPERM : -EACCES;
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

int gmem_one_page(struct gmem_request *request, struct gmem_object *object, uint64_t index, struct gmem_range range,
		    gmem_page_fn fn)
{
	int most = request->tries ? request->tries : AGAIN_TRIES, err = -EAGAIN;

	for (int tries = 0; err == -EAGAIN && tries < most; tries++) {
		struct gmem_page page;

		if (tries)
			pause_for(tries);
		gmem_page_lock(object, index, &page);
		gmem_page_hint(&page, request->hint);
		page.private_view = request->read_only;
		err = gmem_page_poisoned(&page) && !request->poisoned ? -EIO : fn(request, &page, range);
		page.park = false; /* this thread does not wait for a wake-up */
		gmem_page_unlock(&page);
	}
	return err;
}

int gmem_for_pages(struct gmem_request *request, uint64_t va, uint64_t bytes, bool inward, bool touched, gmem_page_fn fn)
{
	uint64_t end = va + bytes;
	int err = 0;

	while (!err && va < end) {
		struct gmem_place place;
		uint64_t page_bytes, next;
		bool whole;

		if (gmem_as_lookup(&request->session->as, va, &place))
			return -EINVAL;
		gmem_request_at(request, &place);
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
			err = gmem_one_page(request, place.object, place.index, place.range, fn);
		gmem_object_unref(place.object);
		va = next;
	}
	return err;
}

int gmem_request_init(struct gmem_core *core, uint64_t session, int hnid, uint64_t va, uint64_t bytes,
			struct gmem_request *ret)
{
	int err;

	*ret = (struct gmem_request){ .core = core, .hnid = hnid, .hint = GMEM_NO_HINT };
	if (hnid != -1 && !gmem_core_hnode(core, hnid))
		return -ENODEV;
	ret->session = gmem_session_get(core, session);
	if (!ret->session)
		return -ENOENT;
	err = gmem_range_check(ret->session, va, bytes);
	if (err) {
		gmem_session_unref(ret->session);
		return err;
	}
	gmem_stream_cancel(core, &ret->session->as, hnid, va, bytes);
	if (hnid >= 0)
		ret->view = gmem_as_view(&ret->session->as, hnid);
	return 0;
}

void gmem_request_at(struct gmem_request *request, const struct gmem_place *place)
{
	request->hint = place->hint;
	request->read_only = place->read_only;
	request->maps = request->view && gmem_overlay_maps(request->view, place);
}

void gmem_request_deinit(struct gmem_request *request)
{
	gmem_view_unref(request->view);
	gmem_session_unref(request->session);
}
