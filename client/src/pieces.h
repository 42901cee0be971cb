/* SPDX-License-Identifier: Apache-2.0
 *
 * The table of a program's managed mappings, of the two libraries for LD_PRELOAD: pieces by address, which the program cuts as
 * it likes. Its lock is held over a fork and never over a request: a piece is in the table only while it is mapped, taken out
 * before it goes and put in once it is there. The table is mapped by itself and does not grow: nothing is allocated under its
 * lock.
 */
#ifndef GMEM_CLIENT_PIECES_H
#define GMEM_CLIENT_PIECES_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define GMEM_NO_PIECE 1 /* there is none in the range */

struct gmem_piece {
	uintptr_t va, end;
	uintptr_t asked_end; /* what lies behind it is there only because pages are that large */
	int prot;
	bool heap;     /* of the allocator: not the program's to unmap */
	bool withheld; /* MADV_DONTFORK */
	bool wiped;    /* MADV_WIPEONFORK */
};

struct gmem_pieces {
	pthread_mutex_t lock; /* guards what follows; held over a fork */
	struct gmem_piece *list; /* by address */
	size_t count;
};

#define GMEM_PIECES { .lock = PTHREAD_MUTEX_INITIALIZER }

/* Once, before anything else. 0 or -ENOMEM with gmem_last_error(). */
int gmem_pieces_init(struct gmem_pieces *pieces);

int gmem_pieces_put_in(struct gmem_pieces *pieces, const struct gmem_piece *piece);
/* Takes the first piece in [va, end) out, or the part of it that lies there. GMEM_NO_PIECE; -EINVAL: it is the heap's. */
int gmem_pieces_take_out(struct gmem_pieces *pieces, uintptr_t va, uintptr_t end, struct gmem_piece *ret);
/* The part of the first piece in [va, end) with all of these protections that lies there. */
bool gmem_pieces_next(struct gmem_pieces *pieces, uintptr_t va, uintptr_t end, int prot, struct gmem_piece *ret);
/* Whether the whole range is such memory. */
bool gmem_pieces_cover(struct gmem_pieces *pieces, uintptr_t va, uintptr_t end, int prot);
/* mprotect(2), there and in the table. */
int gmem_pieces_protect(struct gmem_pieces *pieces, uintptr_t va, uintptr_t end, int prot);
/* Other protections than the usual go along to where a copy of [from, end) is, which may be longer: what is new gets that of the
 * last piece. */
int gmem_pieces_protect_like(struct gmem_pieces *pieces, uintptr_t to, uintptr_t to_end, uintptr_t from, uintptr_t end);
/* MADV_DONTFORK, MADV_DOFORK, MADV_WIPEONFORK, MADV_KEEPONFORK: for the child's handler. The kernel is not told, as it would
 * undo what gmem decides for forks. */
int gmem_pieces_mark(struct gmem_pieces *pieces, uintptr_t va, uintptr_t end, int advice);

/* The piece that ends there was asked for up to asked_end. */
void gmem_pieces_asked(struct gmem_pieces *pieces, uintptr_t end, uintptr_t asked_end);

/* ---- over a fork ---- */

/* The first piece that ends behind va, from va on. */
bool gmem_pieces_next_locked(const struct gmem_pieces *pieces, uintptr_t va, struct gmem_piece *ret);
void gmem_pieces_remove_locked(struct gmem_pieces *pieces, uintptr_t va, uintptr_t end);

#endif
