/* SPDX-License-Identifier: Apache-2.0
 *
 * openEuler's functions (libgmem.h), by those of gmem.h. Ranges are rounded here; what is left is checked by gmemd.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/mman.h>

#include <libgmem.h>

#include "error.h"
#include "peer.h"
#include "session.h"

/* As older trees number it. */
#define PREFETCH_26 26
#define PREFETCH_32 32
#define NO_HNID (-1)

struct span {
	uintptr_t start, end;
};

/* errno as well: the interface has callers of both kinds. */
static int result(int err)
{
	if (err)
		errno = -err;
	return err;
}

static int by_errno(int err)
{
	return result(err) ? -1 : 0;
}

/* Inward, or outward; an empty span where nothing is left. */
static int round_range(uintptr_t addr, size_t bytes, bool inward, struct span *ret)
{
	const uintptr_t mask = GMEM_PEER_PAGE - 1;
	uintptr_t end;

	if (__builtin_add_overflow(addr, bytes, &end))
		return gmem_fail(-EINVAL, "addr: %#lx + %zu ends beyond the address space", (long)addr, bytes);
	if ((inward ? addr : end) > UINTPTR_MAX - mask)
		return gmem_fail(-EINVAL, "addr: %#lx + %zu, in whole pages, ends beyond the address space",
				 (long)addr, bytes);
	if (!bytes)
		*ret = (struct span){ 0, 0 };
	else if (inward)
		*ret = (struct span){ (addr + mask) & ~mask, end & ~mask };
	else
		*ret = (struct span){ addr & ~mask, (end + mask) & ~mask };
	if (ret->start > ret->end)
		ret->end = ret->start;
	return 0;
}

static int advice_of(int behaviour)
{
	switch (behaviour) {
	case MADV_PREFETCH:
	case PREFETCH_26:
	case PREFETCH_32:
		return GMEM_ADVISE_PREFETCH;
	case MADV_PINNED:
		return GMEM_ADVISE_PINNED;
	case MADV_UNPINNED:
		return GMEM_ADVISE_UNPINNED;
	case MADV_DONTNEED:
		return GMEM_ADVISE_DISCARD;
	default:
		return -EINVAL;
	}
}

static int request(struct gmem *session, int hnid, const struct gmem_range *range, int advice, void *stream)
{
	struct gmem_ring_sqe sqe = { .op = GMEM_RING_ADVISE, .hnid = gmem_ring_hnid(hnid),
				     .va = (uintptr_t)range->va, .bytes = range->bytes, .arg = (uint64_t)advice };
	int err;

	if (stream)
		return gmem_stream_add(session, stream, &sqe);
	err = gmem_hmadvise(session, hnid, range->va, range->bytes, advice);
	return err == -ENODEV ? -EINVAL : err;
}

/* What is peer-shared in the range, piece by piece: the rest is not ours to say anything about. */
static int discard(int hnid, const struct span *span, void *stream)
{
	struct gmem *session = gmem_peer_session_if_open();
	struct gmem_range piece;
	uintptr_t at = span->start;
	bool asked = hnid == NO_HNID;
	int err = 0;

	while (!err && session && gmem_peer_next(at, span->end, PROT_NONE, &piece)) {
		err = request(session, hnid, &piece, GMEM_ADVISE_DISCARD, stream);
		at = (uintptr_t)piece.va + piece.bytes;
		asked = true;
	}
	return asked ? err : gmem_peer_check_hnid(hnid);
}

static int place(int hnid, const struct span *span, int advice, void *stream)
{
	struct gmem_range range = { (void *)span->start, span->end - span->start };
	struct gmem *session = gmem_peer_session_if_open();

	if (!range.bytes)
		return gmem_peer_check_hnid(hnid);
	if (!session || !gmem_peer_covers(span->start, span->end, PROT_NONE))
		return gmem_fail(-EINVAL, "addr: not all of %#lx + %zu is peer-shared memory", (long)span->start,
				 range.bytes);
	return request(session, hnid, &range, advice, stream);
}

static int advise(int hnid, uintptr_t addr, size_t bytes, int behaviour, void *stream)
{
	int advice = advice_of(behaviour), err;
	struct span span = { 0, 0 };

	if (advice < 0)
		return gmem_fail(-EINVAL, "behaviour: %d is not known", behaviour);
	if (hnid < NO_HNID || (hnid == NO_HNID && advice != GMEM_ADVISE_DISCARD))
		return gmem_fail(-EINVAL, "hnid: there is no hnode %d", hnid);
	err = round_range(addr, bytes, advice == GMEM_ADVISE_DISCARD, &span);
	if (err)
		return err;
	return advice == GMEM_ADVISE_DISCARD ? discard(hnid, &span, stream) : place(hnid, &span, advice, stream);
}

int gmemFreeEager(unsigned long addr, size_t size, void *stream)
{
	return result(advise(NO_HNID, addr, size, MADV_DONTNEED, stream));
}

int gmemPrefetch(unsigned long addr, size_t len, int hnid, void *stream)
{
	return result(advise(hnid, addr, len, MADV_PREFETCH, stream));
}

int gmemGetNumaId(void)
{
	int hnid = gmem_peer_device();

	return hnid < 0 ? result(hnid) : hnid;
}

int hmadvise(int hnid, unsigned long start, size_t len, int behaviour)
{
	return by_errno(advise(hnid, start, len, behaviour, NULL));
}

static int copy(int hnid, uintptr_t dst, uintptr_t src, size_t bytes)
{
	struct gmem *session = gmem_peer_session_if_open();
	uintptr_t dst_end, src_end;
	int err;

	if (hnid < NO_HNID)
		return gmem_fail(-EINVAL, "hnid: there is no hnode %d", hnid);
	if (__builtin_add_overflow(dst, bytes, &dst_end) || __builtin_add_overflow(src, bytes, &src_end))
		return gmem_fail(-EINVAL, "size: %zu ends beyond the address space", bytes);
	/* of no bytes, the address itself has to be there */
	if (!session || !gmem_peer_covers(src, bytes ? src_end : src + 1, PROT_NONE))
		return gmem_fail(-EINVAL, "src: %#lx + %zu is not peer-shared memory", (long)src, bytes);
	if (!gmem_peer_covers(dst, bytes ? dst_end : dst + 1, PROT_WRITE))
		return gmem_fail(-EINVAL, "dst: %#lx + %zu is not peer-shared memory, or not writable", (long)dst, bytes);
	if (!bytes)
		return hnid == NO_HNID ? 0 : gmem_peer_check_hnid(hnid);
	err = gmem_hmemcpy(session, hnid, (void *)dst, (const void *)src, bytes);
	return err == -ENODEV || err == -EOPNOTSUPP ? -EINVAL : err;
}

int hmemcpy(int hnid, unsigned long dst, unsigned long src, size_t size)
{
	return by_errno(copy(hnid, dst, src, size));
}
