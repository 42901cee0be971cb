/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>

#include "any.h"
#include "error.h"
#include "link.h"
#include "peer.h"
#include "session.h"
#include "syscalls.h"

#define PAGE_BYTES 4096ul
#define PAGE_MASK (PAGE_BYTES - 1)
#define USUAL (PROT_READ | PROT_WRITE)

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif
#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif

struct gmem_pieces gmem_any_pieces = GMEM_PIECES;

int gmem_any_map_init(void)
{
	return gmem_pieces_init(&gmem_any_pieces);
}

static bool next_in(uintptr_t va, uintptr_t end, struct gmem_piece *ret)
{
	return gmem_pieces_next(&gmem_any_pieces, va, end, PROT_NONE, ret);
}

static bool covers(uintptr_t va, uintptr_t end)
{
	return gmem_pieces_cover(&gmem_any_pieces, va, end, PROT_NONE);
}

bool gmem_any_owns(const void *at)
{
	struct gmem_piece piece;

	return next_in((uintptr_t)at, (uintptr_t)at + 1, &piece);
}

/* The end of a range as the kernel sees it. False: it has nothing of ours, or is no range. */
static bool has_ours(uintptr_t va, size_t bytes, uintptr_t *ret_end)
{
	struct gmem_piece piece;
	uintptr_t end;

	if (va & PAGE_MASK || __builtin_add_overflow(va, bytes, &end) || end > UINTPTR_MAX - PAGE_MASK)
		return false;
	*ret_end = (end + PAGE_MASK) & ~PAGE_MASK;
	return next_in(va, *ret_end, &piece);
}

/* ---- mmap, munmap ---- */

int gmem_any_add_heap(uintptr_t va, size_t bytes)
{
	struct gmem_piece piece = { .va = va, .end = va + bytes, .prot = USUAL, .heap = true };

	return gmem_pieces_put_in(&gmem_any_pieces, &piece);
}

static int map(size_t bytes, int prot, struct gmem_piece *ret)
{
	const struct gmem_mmap_options options = { .size = sizeof(options), .page_bytes = PAGE_BYTES,
						   .flags = GMEM_MMAP_SMALL };
	void *at;
	int err = gmem_mmap(gmem_any.session, bytes, &options, &at);

	if (err)
		return err;
	*ret = (struct gmem_piece){ .va = (uintptr_t)at, .end = (uintptr_t)at + bytes, .prot = prot };
	if (prot != USUAL && gmem_sys_mprotect(at, bytes, prot))
		err = -errno;
	if (!err)
		err = gmem_pieces_put_in(&gmem_any_pieces, ret);
	if (err)
		gmem_session_munmap(gmem_any.session, at, bytes, false);
	return err;
}

int gmem_any_mmap(size_t bytes, int prot, bool populate, void **ret)
{
	struct gmem_piece piece;
	int err;

	if (bytes > SIZE_MAX / 2)
		return -ENOMEM;
	bytes = (bytes + PAGE_MASK) & ~PAGE_MASK;
	err = map(bytes, prot, &piece);
	if (err)
		return err;
	if (populate) /* as in the kernel, no matter how far it gets */
		gmem_sys_madvise((void *)piece.va, bytes, MADV_POPULATE_READ);
	*ret = (void *)piece.va;
	return 0;
}

static int unmap_ours(uintptr_t va, uintptr_t end)
{
	struct gmem_piece piece;
	int err;

	while (!(err = gmem_pieces_take_out(&gmem_any_pieces, va, end, &piece))) {
		err = gmem_session_munmap(gmem_any.session, (void *)piece.va, piece.end - piece.va, false);
		if (err) {
			gmem_pieces_put_in(&gmem_any_pieces, &piece);
			return err;
		}
		va = piece.end;
	}
	return err == GMEM_NOT_MANAGED ? 0 : err;
}

int gmem_any_munmap(uintptr_t va, size_t bytes)
{
	struct gmem_piece piece;
	uintptr_t end, at;

	if (!has_ours(va, bytes, &end))
		return GMEM_NOT_MANAGED;
	for (at = va; at < end; at = piece.end) { /* what lies between is the kernel's */
		if (!next_in(at, end, &piece))
			piece = (struct gmem_piece){ .va = end, .end = end };
		if (piece.va > at && gmem_sys_munmap((void *)at, piece.va - at))
			return -errno;
	}
	return unmap_ours(va, end);
}

static int set_prot(uintptr_t va, uintptr_t end, int prot)
{
	return gmem_pieces_protect(&gmem_any_pieces, va, end, prot);
}

/* Reads zero afterwards. */
static int drop_content(uintptr_t va, uintptr_t end)
{
	struct gmem_piece piece;
	int err = 0;

	while (!err && next_in(va, end, &piece)) {
		err = gmem_discard(gmem_any.session, (void *)piece.va, piece.end - piece.va);
		va = piece.end;
	}
	return err;
}

static bool has_heap(uintptr_t va, uintptr_t end)
{
	struct gmem_piece piece;

	while (next_in(va, end, &piece)) {
		if (piece.heap)
			return true;
		va = piece.end;
	}
	return false;
}

int gmem_any_mmap_over(uintptr_t va, size_t bytes, int prot)
{
	uintptr_t end;
	int err;

	if (!has_ours(va, bytes, &end))
		return GMEM_NOT_MANAGED;
	if (has_heap(va, end))
		return -EINVAL;
	if (!covers(va, end)) {
		err = unmap_ours(va, end);
		return err ? err : GMEM_NOT_MANAGED;
	}
	err = drop_content(va, end);
	return err ? err : set_prot(va, end, prot);
}

/* ---- mremap ---- */

static int copy(uintptr_t to, uintptr_t from, size_t bytes)
{
	struct gmem_ring_sqe sqe = { .op = GMEM_RING_HMEMCPY, .flags = GMEM_RING_TOUCHED, .hnid = -1, .va = to,
				     .bytes = bytes, .arg = from };

	return gmem_session_call(gmem_any.session, &sqe, NULL);
}

static int move_larger(uintptr_t va, size_t bytes, size_t new_bytes, void **ret)
{
	struct gmem_piece larger;
	int err = map(new_bytes, USUAL, &larger);

	if (!err) {
		err = copy(larger.va, va, bytes);
		if (!err)
			err = gmem_pieces_protect_like(&gmem_any_pieces, larger.va, larger.end, va, va + bytes);
		if (!err)
			err = unmap_ours(va, va + bytes);
		if (err)
			unmap_ours(larger.va, larger.end);
	}
	if (!err)
		*ret = (void *)larger.va;
	return err ? -ENOMEM : 0;
}

/* To where the program wants it: plain memory from then on. */
static int move_out(uintptr_t va, size_t bytes, size_t new_bytes, void *to, void **ret)
{
	size_t common = bytes < new_bytes ? bytes : new_bytes;
	void *at = gmem_sys_mmap(to, new_bytes, USUAL, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);

	if (at == MAP_FAILED)
		return -errno;
	memcpy(at, (void *)va, common);
	*ret = at;
	return unmap_ours(va, va + bytes);
}

int gmem_any_mremap(uintptr_t va, size_t bytes, size_t new_bytes, int flags, void *to, void **ret)
{
	uintptr_t end;
	int err;

	if (!has_ours(va, bytes, &end))
		return GMEM_NOT_MANAGED;
	if (flags & ~(MREMAP_MAYMOVE | MREMAP_FIXED) || !new_bytes || new_bytes > SIZE_MAX / 2 || has_heap(va, end))
		return -EINVAL;
	if (!covers(va, end))
		return -EFAULT;
	new_bytes = (new_bytes + PAGE_MASK) & ~PAGE_MASK;
	if (flags & MREMAP_FIXED) {
		err = (uintptr_t)to & PAGE_MASK || !(flags & MREMAP_MAYMOVE) ? -EINVAL : 0;
		if (!err && gmem_any_in_window(to, new_bytes))
			err = -EINVAL;
		return err ? err : move_out(va, end - va, new_bytes, to, ret);
	}
	if (new_bytes > end - va)
		return flags & MREMAP_MAYMOVE ? move_larger(va, end - va, new_bytes, ret) : -ENOMEM;
	*ret = (void *)va;
	return new_bytes < end - va ? unmap_ours(va + new_bytes, end) : 0;
}

/* ---- mprotect, madvise ---- */

/* Pages of the heap are larger than those that the kernel protects, and have to be mapped as a whole: what is granted is
 * granted to all of a page, and what is withdrawn only from whole pages. */
static void whole_pages(const struct gmem_piece *piece, int prot, uintptr_t *va, uintptr_t *end)
{
	size_t mask = gmem_any.page_bytes - 1;

	if (!piece->heap)
		return;
	if ((prot & USUAL) == USUAL) {
		*va &= ~mask;
		*end = (*end + mask) & ~mask;
	} else {
		*va = (*va + mask) & ~mask;
		*end &= ~mask;
	}
}

int gmem_any_mprotect(uintptr_t va, size_t bytes, int prot)
{
	struct gmem_piece piece;
	uintptr_t end, at, stop;
	int err = 0;

	if (!has_ours(va, bytes, &end))
		return GMEM_NOT_MANAGED;
	if (!covers(va, end))
		return -ENOMEM;
	for (; !err && next_in(va, end, &piece); va = piece.end) {
		at = piece.va;
		stop = piece.end;
		whole_pages(&piece, prot, &at, &stop);
		err = at < stop ? set_prot(at, stop, prot) : 0;
	}
	return err;
}

/* MADV_DONTNEED: reads zero; MADV_FREE may keep what it was, where it is not a page of ours. */
static int discard(const struct gmem_piece *piece, bool zeroed)
{
	void *at = (void *)piece->va;
	size_t bytes = piece->end - piece->va;

	return zeroed ? gmem_hmadvise(gmem_any.session, GMEM_NO_HNID, at, bytes, GMEM_PEER_ZERO) :
			gmem_discard(gmem_any.session, at, bytes);
}

static int advise_piece(const struct gmem_piece *piece, int advice)
{
	switch (advice) {
	case MADV_DONTNEED:
	case MADV_FREE:
		return discard(piece, advice == MADV_DONTNEED);
	case MADV_COLD:
	case MADV_PAGEOUT:
		gmem_hmadvise(gmem_any.session, GMEM_HOST, (void *)piece->va, piece->end - piece->va, GMEM_ADVISE_COLD);
		return 0; /* it was a hint */
	case MADV_DONTFORK:
	case MADV_DOFORK:
	case MADV_WIPEONFORK:
	case MADV_KEEPONFORK:
		return piece->heap ? -EINVAL : gmem_pieces_mark(&gmem_any_pieces, piece->va, piece->end, advice);
	default:
		return 0;
	}
}

int gmem_any_madvise(uintptr_t va, size_t bytes, int advice)
{
	struct gmem_piece piece;
	uintptr_t end;
	int err = 0;

	if (!has_ours(va, bytes, &end))
		return GMEM_NOT_MANAGED;
	if (!covers(va, end))
		return -ENOMEM;
	switch (advice) {
	case MADV_DONTNEED:
	case MADV_FREE:
	case MADV_COLD:
	case MADV_PAGEOUT:
	case MADV_DONTFORK:
	case MADV_DOFORK:
	case MADV_WIPEONFORK:
	case MADV_KEEPONFORK:
	case MADV_NORMAL:
	case MADV_RANDOM:
	case MADV_SEQUENTIAL:
	case MADV_WILLNEED:
	case MADV_HUGEPAGE:
	case MADV_NOHUGEPAGE:
	case MADV_DONTDUMP:
	case MADV_DODUMP:
	case MADV_MERGEABLE:
	case MADV_UNMERGEABLE:
		break;
	case MADV_REMOVE: /* of files */
		return -EINVAL;
	default:
		return GMEM_NOT_MANAGED;
	}
	for (; !err && next_in(va, end, &piece); va = piece.end)
		err = advise_piece(&piece, advice);
	return err;
}
