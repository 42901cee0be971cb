/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>

#include "error.h"
#include "pieces.h"
#include "syscalls.h"

#define PIECES_MAX 262144 /* the kernel has no more than 65530 mappings for a process, if nobody has told it */
#define USUAL (PROT_READ | PROT_WRITE)

int gmem_pieces_init(struct gmem_pieces *pieces)
{
	void *at = gmem_sys_mmap(NULL, PIECES_MAX * sizeof(*pieces->list), PROT_READ | PROT_WRITE,
				 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (at == MAP_FAILED)
		return gmem_fail(-ENOMEM, "out of memory");
	pieces->list = at;
	return 0;
}

/* Index of the first piece that ends behind va. */
static size_t find_locked(const struct gmem_pieces *pieces, uintptr_t va)
{
	size_t low = 0, high = pieces->count;

	while (low < high) {
		size_t mid = (low + high) / 2;

		if (pieces->list[mid].end <= va)
			low = mid + 1;
		else
			high = mid;
	}
	return low;
}

static int insert_locked(struct gmem_pieces *pieces, const struct gmem_piece *piece)
{
	size_t at = find_locked(pieces, piece->va);

	if (pieces->count == PIECES_MAX)
		return gmem_fail(-ENOMEM, "more than %d mappings", PIECES_MAX);
	memmove(&pieces->list[at + 1], &pieces->list[at], (pieces->count - at) * sizeof(*piece));
	pieces->list[at] = *piece;
	pieces->count++;
	return 0;
}

static int split_locked(struct gmem_pieces *pieces, uintptr_t va)
{
	size_t at = find_locked(pieces, va);
	struct gmem_piece upper;
	int err;

	if (at == pieces->count || pieces->list[at].va >= va)
		return 0;
	upper = pieces->list[at];
	upper.va = va;
	pieces->list[at].end = va;
	err = insert_locked(pieces, &upper);
	if (err)
		pieces->list[at].end = upper.end;
	return err;
}

/* No piece lies on both sides of either end afterwards. */
static int cut_locked(struct gmem_pieces *pieces, uintptr_t va, uintptr_t end)
{
	int err = split_locked(pieces, va);

	return err ? err : split_locked(pieces, end);
}

static void drop_locked(struct gmem_pieces *pieces, size_t from, size_t to)
{
	memmove(&pieces->list[from], &pieces->list[to], (pieces->count - to) * sizeof(pieces->list[0]));
	pieces->count -= to - from;
}

bool gmem_pieces_next_locked(const struct gmem_pieces *pieces, uintptr_t va, struct gmem_piece *ret)
{
	size_t at = find_locked(pieces, va);

	if (at == pieces->count)
		return false;
	*ret = pieces->list[at];
	if (ret->va < va)
		ret->va = va;
	return true;
}

void gmem_pieces_remove_locked(struct gmem_pieces *pieces, uintptr_t va, uintptr_t end)
{
	size_t from, to;

	if (cut_locked(pieces, va, end))
		return;
	for (from = to = find_locked(pieces, va); to < pieces->count && pieces->list[to].va < end; to++)
		;
	drop_locked(pieces, from, to);
}

int gmem_pieces_put_in(struct gmem_pieces *pieces, const struct gmem_piece *piece)
{
	int err;

	pthread_mutex_lock(&pieces->lock);
	err = insert_locked(pieces, piece);
	pthread_mutex_unlock(&pieces->lock);
	return err;
}

int gmem_pieces_take_out(struct gmem_pieces *pieces, uintptr_t va, uintptr_t end, struct gmem_piece *ret)
{
	size_t at;
	int err;

	pthread_mutex_lock(&pieces->lock);
	err = cut_locked(pieces, va, end);
	at = find_locked(pieces, va);
	if (!err && (at == pieces->count || pieces->list[at].va >= end))
		err = GMEM_NO_PIECE;
	if (!err && pieces->list[at].heap)
		err = -EINVAL; /* the program's mistake: it would take the allocator's memory away */
	if (!err) {
		*ret = pieces->list[at];
		drop_locked(pieces, at, at + 1);
	}
	pthread_mutex_unlock(&pieces->lock);
	return err;
}

bool gmem_pieces_next(struct gmem_pieces *pieces, uintptr_t va, uintptr_t end, int prot, struct gmem_piece *ret)
{
	bool found;

	pthread_mutex_lock(&pieces->lock);
	found = va < end && gmem_pieces_next_locked(pieces, va, ret);
	while (found && (ret->prot & prot) != prot)
		found = gmem_pieces_next_locked(pieces, ret->end, ret);
	pthread_mutex_unlock(&pieces->lock);
	if (!found || ret->va >= end)
		return false;
	if (ret->end > end)
		ret->end = end;
	return true;
}

bool gmem_pieces_cover(struct gmem_pieces *pieces, uintptr_t va, uintptr_t end, int prot)
{
	struct gmem_piece piece;

	while (va < end && gmem_pieces_next(pieces, va, end, prot, &piece) && piece.va == va)
		va = piece.end;
	return va >= end;
}

int gmem_pieces_protect(struct gmem_pieces *pieces, uintptr_t va, uintptr_t end, int prot)
{
	int err;

	if (gmem_sys_mprotect((void *)va, end - va, prot))
		return -errno;
	pthread_mutex_lock(&pieces->lock);
	err = cut_locked(pieces, va, end);
	for (size_t i = find_locked(pieces, va); !err && i < pieces->count && pieces->list[i].va < end; i++)
		pieces->list[i].prot = prot;
	pthread_mutex_unlock(&pieces->lock);
	return err;
}

int gmem_pieces_protect_like(struct gmem_pieces *pieces, uintptr_t to, uintptr_t to_end, uintptr_t from, uintptr_t end)
{
	struct gmem_piece piece;
	int err = 0;

	for (uintptr_t at = from; !err && gmem_pieces_next(pieces, at, end, PROT_NONE, &piece); at = piece.end) {
		uintptr_t stop = piece.end == end ? to_end : to + (piece.end - from);

		if (piece.prot != USUAL)
			err = gmem_pieces_protect(pieces, to + (piece.va - from), stop, piece.prot);
	}
	return err;
}

int gmem_pieces_mark(struct gmem_pieces *pieces, uintptr_t va, uintptr_t end, int advice)
{
	int err;

	pthread_mutex_lock(&pieces->lock);
	err = cut_locked(pieces, va, end);
	for (size_t i = find_locked(pieces, va); !err && i < pieces->count && pieces->list[i].va < end; i++) {
		if (advice == MADV_DONTFORK || advice == MADV_DOFORK)
			pieces->list[i].withheld = advice == MADV_DONTFORK;
		else
			pieces->list[i].wiped = advice == MADV_WIPEONFORK;
	}
	pthread_mutex_unlock(&pieces->lock);
	return err;
}

void gmem_pieces_asked(struct gmem_pieces *pieces, uintptr_t end, uintptr_t asked_end)
{
	size_t at;

	pthread_mutex_lock(&pieces->lock);
	at = find_locked(pieces, end - 1);
	if (at < pieces->count && pieces->list[at].va < end && pieces->list[at].end == end)
		pieces->list[at].asked_end = asked_end;
	pthread_mutex_unlock(&pieces->lock);
}
