/* SPDX-License-Identifier: Apache-2.0
 *
 * What mmap(2) and its kin do to this process's peer-shared memory (pieces.h).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include <libgmem.h>

#include "error.h"
#include "peer.h"
#include "session.h"
#include "syscalls.h"

#define PAGE_MASK (GMEM_PEER_PAGE - 1)
#define SMALL_MASK 4095ul
#define COPY_PAGES 512

struct gmem_pieces gmem_peers = GMEM_PIECES;

/* ---- table ---- */

static bool peer_at(uintptr_t va, struct gmem_piece *ret)
{
	return gmem_pieces_next(&gmem_peers, va, va + 1, PROT_NONE, ret);
}

bool gmem_peer_next(uintptr_t at, uintptr_t end, int prot, struct gmem_range *ret)
{
	struct gmem_piece piece;

	if (!gmem_pieces_next(&gmem_peers, at, end, prot, &piece))
		return false;
	*ret = (struct gmem_range){ (void *)piece.va, piece.end - piece.va };
	return true;
}

bool gmem_peer_covers(uintptr_t at, uintptr_t end, int prot)
{
	return gmem_pieces_cover(&gmem_peers, at, end, prot);
}

static bool is_peer(uintptr_t at, uintptr_t end)
{
	struct gmem_range piece;

	return gmem_peer_next(at, end, PROT_NONE, &piece);
}

/* ---- copies ---- */

/* dst reads zero before. What nobody has touched is not copied. */
int gmem_peer_copy(struct gmem *session, uintptr_t dst, uintptr_t src, size_t bytes)
{
	struct gmem_page pages[COPY_PAGES];
	int err = 0;

	for (size_t done = 0, piece, count; !err && done < bytes; done += piece) {
		piece = bytes - done < COPY_PAGES * GMEM_PEER_PAGE ? bytes - done : COPY_PAGES * GMEM_PEER_PAGE;
		err = gmem_query(session, (void *)(src + done), piece, pages, COPY_PAGES, &count);
		for (size_t i = 0; !err && i < count; i++) {
			size_t at = done + i * GMEM_PEER_PAGE;

			if (pages[i].state != GMEM_PAGE_NOMAP)
				err = gmem_hmemcpy(session, GMEM_NO_HNID, (void *)(dst + at), (void *)(src + at),
						   GMEM_PEER_PAGE);
		}
	}
	return err;
}

/* The same for memory of several regions. */
static int copy_peers(struct gmem *session, uintptr_t dst, uintptr_t src, size_t bytes)
{
	uintptr_t at = src, end = src + bytes;
	struct gmem_range piece;
	int err = 0;

	while (!err && gmem_peer_next(at, end, PROT_NONE, &piece)) {
		at = (uintptr_t)piece.va;
		err = gmem_peer_copy(session, dst + (at - src), at, piece.bytes);
		at += piece.bytes;
	}
	return err;
}

int gmem_peer_map_fresh(struct gmem *session, size_t bytes, uintptr_t *ret)
{
	const struct gmem_mmap_options options = { .size = sizeof(options), .page_bytes = GMEM_PEER_PAGE };
	void *at;
	int err = gmem_mmap(session, bytes, &options, &at);

	if (!err)
		*ret = (uintptr_t)at;
	return err;
}

/* ---- mmap and its kin ---- */

static int map(size_t bytes, int prot, struct gmem_piece *ret)
{
	struct gmem *session;
	int err = gmem_peer_session(&session);

	if (!err && gmem_peer_device() < 0) {
		err = -ENODEV;
		gmem_peer_warn_once("mmap(MAP_PEER_SHARED)");
	}
	if (bytes > SIZE_MAX / 2)
		err = -ENOMEM;
	*ret = (struct gmem_piece){ .prot = prot };
	if (!err)
		err = gmem_peer_map_fresh(session, (bytes + PAGE_MASK) & ~PAGE_MASK, &ret->va);
	if (err)
		return -ENOMEM;
	ret->end = ret->va + ((bytes + PAGE_MASK) & ~PAGE_MASK);
	ret->asked_end = ret->va + bytes;
	if (prot != (PROT_READ | PROT_WRITE) && gmem_sys_mprotect((void *)ret->va, ret->end - ret->va, prot))
		err = -errno;
	if (!err)
		err = gmem_pieces_put_in(&gmem_peers, ret);
	if (err)
		gmem_session_munmap(session, (void *)ret->va, ret->end - ret->va, false);
	return err;
}

static int peer_mmap(size_t bytes, int prot, bool populate, void **ret)
{
	struct gmem_piece peer;
	int err = bytes ? map(bytes, prot, &peer) : -EINVAL;

	if (err)
		return err;
	if (populate) /* as in the kernel, no matter how far it gets */
		gmem_prefetch(gmem_peer_session_if_open(), GMEM_HOST, (void *)peer.va, peer.end - peer.va);
	*ret = (void *)peer.va;
	return 0;
}

/* Of the pieces that lie in the range; what is between them is left. */
static int unmap_peers(uintptr_t at, uintptr_t end)
{
	struct gmem_piece peer;
	int err;

	while (!(err = gmem_pieces_take_out(&gmem_peers, at, end, &peer))) {
		err = gmem_session_munmap(gmem_peer_session_if_open(), (void *)peer.va, peer.end - peer.va, false);
		if (err) {
			gmem_pieces_put_in(&gmem_peers, &peer);
			return err;
		}
	}
	return err == GMEM_NOT_PEER ? 0 : err;
}

static int unmap_rest(uintptr_t at, uintptr_t end)
{
	struct gmem_range piece;
	int err = 0;

	while (!err && at < end) {
		uintptr_t stop = end, next = end;

		if (gmem_peer_next(at, end, PROT_NONE, &piece)) {
			stop = (uintptr_t)piece.va;
			next = stop + piece.bytes;
		}
		if (stop > at && gmem_sys_munmap((void *)at, stop - at))
			err = -errno;
		at = next;
	}
	return err;
}

static int peer_munmap(uintptr_t va, size_t bytes)
{
	uintptr_t end, last;
	struct gmem_piece peer;
	int err;

	if (__builtin_add_overflow(va, bytes, &end) || end > UINTPTR_MAX - PAGE_MASK || !bytes || !is_peer(va, end))
		return GMEM_NOT_PEER; /* the kernel knows what to say */
	last = end - 1;
	if (va & (peer_at(va, &peer) ? PAGE_MASK : SMALL_MASK))
		return -EINVAL;
	end = peer_at(last, &peer) ? (end + PAGE_MASK) & ~PAGE_MASK : (end + SMALL_MASK) & ~SMALL_MASK;
	err = unmap_rest(va, end);
	return err ? err : unmap_peers(va, end);
}

static int shrink(uintptr_t end, uintptr_t new_end, uintptr_t asked_end)
{
	int err = end > new_end ? unmap_peers(new_end, end) : 0;

	if (!err)
		gmem_pieces_asked(&gmem_peers, new_end, asked_end);
	return err;
}

static int grow(uintptr_t va, size_t bytes, size_t new_bytes, void **ret)
{
	struct gmem_piece larger;
	int err = map(new_bytes, PROT_READ | PROT_WRITE, &larger);

	if (err)
		return err;
	err = copy_peers(gmem_peer_session_if_open(), larger.va, va, bytes);
	if (!err)
		err = gmem_pieces_protect_like(&gmem_peers, larger.va, larger.end, va, va + bytes);
	if (!err)
		err = unmap_peers(va, va + bytes);
	if (err) {
		unmap_peers(larger.va, larger.end);
		return -ENOMEM;
	}
	*ret = (void *)larger.va;
	return 0;
}

static int peer_mremap(uintptr_t va, size_t bytes, size_t new_bytes, int flags, void **ret)
{
	size_t whole, new_whole;
	struct gmem_piece peer;

	if (!peer_at(va, &peer))
		return GMEM_NOT_PEER;
	if (va & PAGE_MASK || !bytes || !new_bytes || flags & ~MREMAP_MAYMOVE)
		return -EINVAL;
	if (bytes > SIZE_MAX / 2 || new_bytes > SIZE_MAX / 2)
		return -ENOMEM;
	whole = (bytes + PAGE_MASK) & ~PAGE_MASK;
	new_whole = (new_bytes + PAGE_MASK) & ~PAGE_MASK;
	if (!gmem_peer_covers(va, va + whole, PROT_NONE))
		return -EFAULT;
	if (new_whole > whole)
		return flags & MREMAP_MAYMOVE ? grow(va, whole, new_bytes, ret) : -ENOMEM;
	*ret = (void *)va;
	return shrink(va + whole, va + new_whole, va + new_bytes);
}

/* Whole pages: what a program asked for ends before its last page does, and stands for all of it. */
static int peer_mprotect(uintptr_t va, size_t bytes, int prot)
{
	uintptr_t end, whole;
	struct gmem_piece last;

	if (__builtin_add_overflow(va, bytes, &end) || end > UINTPTR_MAX - PAGE_MASK || !is_peer(va, end))
		return GMEM_NOT_PEER;
	end = (end + SMALL_MASK) & ~SMALL_MASK;
	whole = (end + PAGE_MASK) & ~PAGE_MASK;
	if (va & PAGE_MASK || (end != whole && peer_at(end, &last) && end < last.asked_end))
		return -EINVAL;
	if (!gmem_peer_covers(va, whole, PROT_NONE))
		return -ENOMEM;
	return gmem_pieces_protect(&gmem_peers, va, whole, prot);
}

/* ---- madvise ---- */

/* MADV_DONTNEED of private memory: every byte reads zero. MADV_FREE allows the old content, so parts of pages keep it. */
static int drop(uintptr_t at, uintptr_t end, bool zeroed)
{
	struct gmem *session = gmem_peer_session_if_open();
	struct gmem_range piece;
	int err = 0;

	while (!err && gmem_peer_next(at, end, PROT_NONE, &piece)) {
		err = zeroed ? gmem_hmadvise(session, GMEM_NO_HNID, piece.va, piece.bytes, GMEM_PEER_ZERO) :
			       gmem_discard(session, piece.va, piece.bytes);
		at = (uintptr_t)piece.va + piece.bytes;
	}
	return err;
}

static int hint(uintptr_t at, uintptr_t end, int advice)
{
	int err = gmem_hmadvise(gmem_peer_session_if_open(), GMEM_HOST, (void *)at, end - at, advice);

	return err == -ENOMEM || err == -ENOSPC ? 0 : err; /* it was a hint */
}

static int peer_madvise(uintptr_t va, size_t bytes, int advice)
{
	uintptr_t end;

	if (__builtin_add_overflow(va, bytes, &end) || end > UINTPTR_MAX - SMALL_MASK || !is_peer(va, end) ||
	    va & SMALL_MASK)
		return GMEM_NOT_PEER;
	end = (end + SMALL_MASK) & ~SMALL_MASK;
	if (!gmem_peer_covers(va, end, PROT_NONE))
		return -ENOMEM;
	switch (advice) {
	case MADV_DONTNEED:
	case MADV_FREE:
		return drop(va, end, advice == MADV_DONTNEED);
	case MADV_WILLNEED:
		return hint(va, end, GMEM_ADVISE_PREFETCH);
	case MADV_COLD:
	case MADV_PAGEOUT:
		return hint(va, end, GMEM_ADVISE_COLD);
	case MADV_DONTFORK:
	case MADV_DOFORK:
		end = (end + PAGE_MASK) & ~PAGE_MASK;
		return va & PAGE_MASK ? -EINVAL : gmem_pieces_mark(&gmem_peers, va, end, advice);
	case MADV_NORMAL:
	case MADV_RANDOM:
	case MADV_SEQUENTIAL:
	case MADV_HUGEPAGE:
	case MADV_NOHUGEPAGE:
	case MADV_DODUMP:
		return 0;
	case MADV_REMOVE: /* of files */
	case MADV_MERGEABLE:
		return -EINVAL;
	default:
		return GMEM_NOT_PEER;
	}
}

/* ---- for libgmem-preload.so ---- */

static int peer_window(uintptr_t *ret_base, size_t *ret_bytes)
{
	struct gmem *session = gmem_peer_session_if_open();

	if (!session)
		return -ENOTCONN;
	*ret_base = gmem_link_window_base(session->link);
	*ret_bytes = gmem_link_window_bytes(session->link);
	return 0;
}

const struct gmem_peer_calls *gmem_peer_calls(void)
{
	static const struct gmem_peer_calls calls = {
		.size = sizeof(calls), .mmap = peer_mmap, .munmap = peer_munmap, .mremap = peer_mremap,
		.mprotect = peer_mprotect, .madvise = peer_madvise, .window = peer_window, .hmadvise = hmadvise,
		.device = gmem_peer_device, .moved = gmem_peer_moved,
	};

	return &calls;
}
