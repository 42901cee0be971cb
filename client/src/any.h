/* SPDX-License-Identifier: Apache-2.0
 *
 * libgmem-any.so, which `gmemctl run` preloads: a program's malloc family and its private anonymous mappings are served
 * from managed memory. It speaks to gmemd over the ring alone, so libc is all that it needs.
 *
 *   any.c        start: the session, and what happens if there is none
 *   any_heap.c   the malloc family
 *   any_notes.c  what gmem allocates for itself meanwhile
 *   any_map.c    what mmap(2) and its kin do to managed memory (pieces.h)
 *   any_calls.c  libc's functions for these
 *   any_syscall.c the same by number
 *   any_fork.c   a child's copies
 *   any_fds.c    gmem's descriptors among the program's
 *   any_direct.c devices that write past the page tables
 *
 * Locks, outermost first: arenas, jemalloc's, the table's, the session's, the link's, those of the notes. What is held
 * over a request to gmemd is jemalloc's alone: so nothing that gmem itself allocates may come from there.
 */
#ifndef GMEM_CLIENT_ANY_H
#define GMEM_CLIENT_ANY_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <gmem.h>

#include "pieces.h"

struct gmem_any {
	struct gmem *session;
	uintptr_t base;      /* of the window, in which all managed memory is */
	size_t window_bytes;
	size_t page_bytes;   /* what moves at once */
	size_t mmap_bytes;   /* mappings of at least this size are managed */
};

enum gmem_any_state { GMEM_ANY_STARTING, GMEM_ANY_MANAGED, GMEM_ANY_PLAIN };

extern struct gmem_any gmem_any; /* constant once it is MANAGED */
extern _Atomic int gmem_any_state;

static inline bool gmem_any_is_managed(void)
{
	return atomic_load_explicit(&gmem_any_state, memory_order_acquire) == GMEM_ANY_MANAGED;
}

static inline bool gmem_any_in_window(const void *at, size_t bytes)
{
	uintptr_t start = (uintptr_t)at;

	return start < gmem_any.base + gmem_any.window_bytes && start + bytes > gmem_any.base;
}

/* One line on stderr, past stdio. */
void gmem_any_say(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* The same, and the end: what follows could only be wrong. */
_Noreturn void gmem_any_die(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* ---- any_heap.c ---- */

/* Once the session is there. -errno with gmem_last_error(). */
int gmem_any_heap_init(void);
/* Around a fork; before: first of all, after: last. */
void gmem_any_heap_lock(void);
void gmem_any_heap_unlock(void);

/* ---- any_notes.c ---- */

/* Aligned to the next power of two. NULL: there is none left. */
void *gmem_notes_malloc(size_t bytes);
void *gmem_notes_realloc(void *at, size_t bytes);
void gmem_notes_free(void *at);
size_t gmem_notes_size(const void *at);
void gmem_notes_lock(void);
void gmem_notes_unlock(void);

#define GMEM_NOTES_BYTES (1ul << 30) /* of addresses */
extern uintptr_t gmem_notes_base;

static inline bool gmem_notes_own(const void *at)
{
	return (uintptr_t)at - gmem_notes_base < GMEM_NOTES_BYTES;
}

/* ---- any_map.c: 0, -errno, or GMEM_NOT_MANAGED if nothing in the range is ---- */

#define GMEM_NOT_MANAGED GMEM_NO_PIECE

/* Mappings have pages of 4 KiB, as a program may do anything with any page of the kernel's; the heap's are larger. */
extern struct gmem_pieces gmem_any_pieces;

int gmem_any_map_init(void);
/* A region of the heap, which is never unmapped. */
int gmem_any_add_heap(uintptr_t va, size_t bytes);

int gmem_any_mmap(size_t bytes, int prot, bool populate, void **ret);
/* mmap(2) of private anonymous memory over managed memory. GMEM_NOT_MANAGED unless all of it is; what is has been unmapped
 * then. */
int gmem_any_mmap_over(uintptr_t va, size_t bytes, int prot);
int gmem_any_munmap(uintptr_t va, size_t bytes);
int gmem_any_mremap(uintptr_t va, size_t bytes, size_t new_bytes, int flags, void *to, void **ret);
int gmem_any_mprotect(uintptr_t va, size_t bytes, int prot);
int gmem_any_madvise(uintptr_t va, size_t bytes, int advice);
bool gmem_any_owns(const void *at);

/* ---- any_fork.c ---- */

/* What has to be registered before the session, and what after; 0 or an errno. */
int gmem_any_fork_first(void);
int gmem_any_fork_last(void);
/* Where its descriptor number i is; NULL behind the last. */
int *gmem_any_fork_fd(int i);

/* ---- any_direct.c ---- */

struct io_uring;
struct iovec;

/* What of these is managed stays where it is. ring: who unpins them; NULL: nobody. 0 or -ENOMEM. */
int gmem_any_pin(const struct io_uring *ring, const struct iovec *vectors, unsigned count);
/* In a forked child, which has registered no buffers. */
void gmem_any_forget_pins(void);

/* ---- any_fds.c ---- */

/* Moves gmem's descriptors out of the program's way: once they are there, and in a forked child. */
void gmem_any_hide_fds(void);
/* close_range(2), of what is the program's. */
int gmem_any_close_range(unsigned first, unsigned last, int flags);
void gmem_any_lock_fds(void);
void gmem_any_unlock_fds(void);

#endif
