/* SPDX-License-Identifier: Apache-2.0
 *
 * Copying between managed ranges, wherever their pages are, at any alignment; and writing zeros.
 */
#include <errno.h>
#include <sched.h>

#include <gmem/crash.h>
#include <gmem/internal.h>
#include <gmem/pages.h>
#include <gmem/prefetch.h>

#define AGAIN_TRIES 2000
#define ZERO_BYTES 65536

struct end {
	struct gmem_place place;
	uint64_t at; /* offset of this piece in its page */
	struct gmem_page page;
};

static const uint8_t zeros[ZERO_BYTES];

/* Both pages at once: the first may be waited for, the second only tried, so two copies can't wait for each other. */
static void lock_both(struct end *dst, struct end *src, bool *ret_same)
{
	*ret_same = dst->place.object->pn + dst->place.index == src->place.object->pn + src->place.index;
	for (;;) {
		gmem_page_lock(dst->place.object, dst->place.index, &dst->page);
		if (*ret_same || !gmem_page_trylock(src->place.object, src->place.index, false, &src->page))
			return;
		gmem_page_unlock(&dst->page);
		sched_yield();
	}
}

static int copy_zeros(uint8_t *dst, uint64_t bytes)
{
	int err = 0;

	for (uint64_t done = 0; !err && done < bytes; done += ZERO_BYTES)
		err = gmem_copy(dst + done, zeros, bytes - done < ZERO_BYTES ? bytes - done : ZERO_BYTES);
	return err;
}

/* An hnode whose copy the CPU can read; brings the page to the host if there is none. -1: it reads as zero. */
static int readable(struct gmem_page *page, int *ret_hnid)
{
	const struct gmem_range nowhere = { 0, 0 };
	uint32_t valid = gmem_word_valid(page->word);
	bool mapped;

	*ret_hnid = valid || atomic_load(&page->object->source) ? GMEM_HOST : -1;
	for (int h = 0; valid >> h; h++) {
		struct gmem_hnode *hnode = valid >> h & 1 ? gmem_core_hnode(page->core, h) : NULL;

		if (hnode && !gmem_hnode_is_peer(hnode) && !gmem_hnode_own_frames(hnode)) {
			*ret_hnid = h;
			return 0;
		}
	}
	return *ret_hnid < 0 ? 0 : gmem_page_fetch(page, GMEM_HOST, NULL, nowhere, GMEM_WHY_HMEMCPY, &mapped);
}

static int copy_locked(struct end *dst, struct end *src, bool same, int hnid, uint64_t bytes)
{
	const struct gmem_range nowhere = { 0, 0 };
	struct gmem_page *from = same ? &dst->page : &src->page;
	uint8_t *to_alias, *from_alias;
	bool mapped;
	int source, err;

	if (gmem_page_poisoned(&dst->page) || gmem_page_poisoned(from))
		return -EIO;
	err = gmem_page_fetch(&dst->page, hnid, NULL, nowhere, GMEM_WHY_HMEMCPY, &mapped);
	if (!err)
		err = gmem_page_own(&dst->page, hnid);
	gmem_crash(GMEM_CRASH_HMEMCPY);
	if (!err)
		err = readable(from, &source);
	if (!err)
		err = gmem_object_alias(dst->place.object, hnid, &to_alias);
	if (err)
		return err;
	to_alias += dst->page.offset + dst->at;
	if (source < 0)
		return copy_zeros(to_alias, bytes);
	err = gmem_object_alias(from->object, source, &from_alias);
	if (!err)
		err = gmem_copy(to_alias, from_alias + from->offset + src->at, bytes);
	return err;
}

static int copy_piece(struct end *dst, struct end *src, int hnid, uint64_t bytes)
{
	int err = -EAGAIN;

	for (int tries = 0; err == -EAGAIN && tries < AGAIN_TRIES; tries++) {
		bool same;

		lock_both(dst, src, &same);
		err = copy_locked(dst, src, same, hnid, bytes);
		dst->page.park = src->page.park = false;
		if (!same)
			gmem_page_unlock(&src->page);
		gmem_page_unlock(&dst->page);
	}
	return err;
}

static int locate(struct gmem_session *session, uint64_t va, struct end *ret)
{
	uint64_t offset;

	if (gmem_as_lookup(&session->as, va, &ret->place))
		return -EINVAL;
	offset = ret->place.region_offset + (va - ret->place.region_va);
	ret->at = offset & ((1ull << ret->place.object->shift) - 1);
	return 0;
}

static uint64_t room(const struct end *end, uint64_t va)
{
	return end->place.range.va + end->place.range.bytes - va;
}

static int copy_all(struct gmem_session *session, int hnid, uint64_t dst, uint64_t src, uint64_t bytes)
{
	int err = 0;

	while (!err && bytes) {
		struct end to, from;
		uint64_t piece = bytes;

		if (locate(session, dst, &to))
			return -EINVAL;
		if (locate(session, src, &from)) {
			gmem_object_unref(to.place.object);
			return -EINVAL;
		}
		piece = room(&to, dst) < piece ? room(&to, dst) : piece;
		piece = room(&from, src) < piece ? room(&from, src) : piece;
		err = copy_piece(&to, &from, hnid, piece);
		gmem_object_unref(to.place.object);
		gmem_object_unref(from.place.object);
		dst += piece;
		src += piece;
		bytes -= piece;
	}
	return err;
}

/* How far what can be skipped from src on reaches: pages that nobody has touched. 0: it is to be copied, *ret_bytes of it. */
static int skip_untouched(struct gmem_session *session, uint64_t src, uint64_t end, uint64_t *ret_skip, uint64_t *ret_bytes)
{
	struct gmem_lpt *lpt = &session->core->lpt;
	uint64_t page_bytes, next, pn, last, stop;
	struct gmem_place place;

	if (gmem_as_lookup(&session->as, src, &place))
		return -EINVAL;
	page_bytes = 1ull << place.object->shift;
	next = place.range.va + place.range.bytes;
	pn = place.object->pn + place.index;
	last = place.object->pn + place.object->pages;
	*ret_skip = *ret_bytes = 0;
	if (gmem_lpt_next_touched(lpt, &pn, last, &stop))
		*ret_skip = place.region_va + place.region_bytes - src;
	else if (pn > place.object->pn + place.index)
		*ret_skip = next - src + (pn - (place.object->pn + place.index) - 1) * page_bytes;
	else if (gmem_word_state(atomic_load(&lpt->words[pn])) == GMEM_NOMAP)
		*ret_skip = next - src;
	else
		*ret_bytes = (next < end ? next : end) - src;
	gmem_object_unref(place.object);
	return 0;
}

static int copy_touched(struct gmem_session *session, int hnid, uint64_t dst, uint64_t src, uint64_t bytes)
{
	uint64_t end = src + bytes, skip, piece;
	int err = 0;

	while (!err && src < end) {
		err = skip_untouched(session, src, end, &skip, &piece);
		if (!err && piece)
			err = copy_all(session, hnid, dst, src, piece);
		src += skip + piece;
		dst += skip + piece;
	}
	return err;
}

/* ---- zeros ---- */

static int zero_locked(struct end *end, uint64_t bytes)
{
	const struct gmem_range nowhere = { 0, 0 };
	struct gmem_page *page = &end->page;
	uint8_t *alias;
	bool mapped;
	int err;

	if (gmem_page_poisoned(page))
		return -EIO;
	if (!gmem_word_valid(page->word) && !atomic_load(&page->object->source))
		return 0; /* it reads as zero */
	err = gmem_page_fetch(page, GMEM_HOST, NULL, nowhere, GMEM_WHY_HMEMCPY, &mapped);
	if (!err)
		err = gmem_page_own(page, GMEM_HOST);
	if (!err)
		err = gmem_object_alias(page->object, GMEM_HOST, &alias);
	return err ? err : copy_zeros(alias + page->offset + end->at, bytes);
}

/* Within one page. */
static int zero_part(struct gmem_session *session, uint64_t va, uint64_t bytes)
{
	struct end end;
	int err = bytes ? -EAGAIN : 0;

	if (bytes && locate(session, va, &end))
		return -EINVAL;
	for (int tries = 0; err == -EAGAIN && tries < AGAIN_TRIES; tries++) {
		gmem_page_lock(end.place.object, end.place.index, &end.page);
		err = zero_locked(&end, bytes);
		end.page.park = false; /* this thread does not wait for a wake-up */
		gmem_page_unlock(&end.page);
	}
	if (bytes)
		gmem_object_unref(end.place.object);
	return err;
}

/* Of one region. */
static int zero_range(struct gmem_session *session, const struct gmem_place *place, uint64_t va, uint64_t end)
{
	uint64_t mask = (1ull << place->object->shift) - 1, offset = place->region_offset + (va - place->region_va);
	uint64_t first = va + (-offset & mask), last = end - ((offset + (end - va)) & mask);
	int err;

	if (first >= last) {
		uint64_t middle = first < end ? first : end; /* its last byte may lie in a page of its own */

		err = zero_part(session, va, middle - va);
		return err ? err : zero_part(session, middle, end - middle);
	}
	err = zero_part(session, va, first - va);
	if (!err)
		err = gmem_discard(session->core, session->id, first, last - first);
	return err ? err : zero_part(session, last, end - last);
}

int gmem_zero(struct gmem_core *core, uint64_t id, uint64_t va, uint64_t bytes)
{
	struct gmem_session *session = gmem_session_get(core, id);
	uint64_t end = va + bytes;
	int err;

	if (!session)
		return -ENOENT;
	err = gmem_range_check(session, va, bytes);
	if (!err)
		err = gmem_range_check_write(session, va, bytes);
	if (!err)
		gmem_stream_cancel(core, &session->as, -1, va, bytes);
	while (!err && va < end) {
		struct gmem_place place;
		uint64_t stop;

		if (gmem_as_lookup(&session->as, va, &place)) {
			err = -EINVAL;
			break;
		}
		stop = place.region_va + place.region_bytes < end ? place.region_va + place.region_bytes : end;
		err = zero_range(session, &place, va, stop);
		gmem_object_unref(place.object);
		va = stop;
	}
	gmem_session_unref(session);
	return err;
}

/* ---- copies ---- */

int gmem_hmemcpy(struct gmem_core *core, uint64_t id, int hnid, uint64_t dst, uint64_t src, uint64_t bytes, bool touched)
{
	struct gmem_hnode *hnode = gmem_core_hnode(core, hnid < 0 ? GMEM_HOST : hnid);
	struct gmem_session *session;
	int err, at;

	if (hnid < -1 || !hnode)
		return -ENODEV;
	if (gmem_hnode_is_peer(hnode))
		return -EOPNOTSUPP;
	if (dst + bytes < dst || src + bytes < src)
		return -EINVAL;
	if (bytes && dst < src + bytes && src < dst + bytes)
		return -EINVAL; /* overlapping */
	session = gmem_session_get(core, id);
	if (!session)
		return -ENOENT;
	err = gmem_range_check(session, dst, bytes);
	if (!err)
		err = gmem_range_check(session, src, bytes);
	if (!err)
		err = gmem_range_check_write(session, dst, bytes);
	if (!err)
		gmem_stream_cancel(core, &session->as, hnode->hnid, dst, bytes);
	at = gmem_hnode_own_frames(hnode) ? GMEM_HOST : hnode->hnid; /* where the CPU can write; then it goes on */
	if (!err)
		err = (touched ? copy_touched : copy_all)(session, at, dst, src, bytes);
	gmem_session_unref(session);
	return err || at == hnode->hnid || !bytes ? err : gmem_prefetch(core, id, hnid, dst, bytes);
}
