/* SPDX-License-Identifier: Apache-2.0
 *
 * Regions of gmem as an allocator's extents: the hooks by which arenas of jemalloc get their memory from a session.
 * jemalloc calls them with its locks held.
 */
#ifndef GMEM_CLIENT_EXTENTS_H
#define GMEM_CLIENT_EXTENTS_H

#include <jemalloc/jemalloc.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include <gmem.h>

struct gmem_extents {
	extent_hooks_t hooks; /* first: hooks get its address */
	struct gmem *session;
	size_t page_bytes;
	uint32_t mmap_flags;  /* GMEM_MMAP_* */
	int (*added)(uintptr_t va, size_t bytes); /* a region; not 0: it is not to be used. NULL: nobody wants to know */
	uintptr_t base;       /* of the window */
	size_t window_bytes;
	uint8_t *tags; /* for each span of the window: 0, or which of our regions. Neighbours differ. */
	atomic_bool closing;
	pthread_mutex_t lock; /* guards what follows, and changes of tags */
	uint8_t last_tag;
};

/* jemalloc's functions, by the names that allocator.syms gives them. */
void *gmem_je_malloc(size_t bytes);
void *gmem_je_calloc(size_t count, size_t bytes);
void *gmem_je_realloc(void *at, size_t bytes);
void gmem_je_free(void *at);
int gmem_je_posix_memalign(void **ret, size_t alignment, size_t bytes);
size_t gmem_je_malloc_usable_size(void *at);
void *gmem_je_mallocx(size_t bytes, int flags);
void *gmem_je_rallocx(void *at, size_t bytes, int flags);
void gmem_je_dallocx(void *at, int flags);
size_t gmem_je_sallocx(const void *at, int flags);
int gmem_je_mallctl(const char *name, void *old, size_t *old_bytes, void *new, size_t new_bytes);

/* jemalloc's handlers of a fork, which it registers when it is loaded: called by whoever knows the order of all locks. */
struct gmem_allocator_fork {
	void (*before)(void), (*parent)(void), (*child)(void);
};
extern struct gmem_allocator_fork gmem_allocator_fork;

/* page_bytes: what moves at once. The rest of *ret is set to defaults. */
int gmem_extents_init(struct gmem_extents *ret, struct gmem *session, uintptr_t base, size_t window_bytes,
		      size_t page_bytes);
void gmem_extents_deinit(struct gmem_extents *extents);

/* A new arena of it. extents NULL: of plain memory. */
int gmem_extents_arena(struct gmem_extents *extents, unsigned *ret);

/* 0, or the -errno of this thread's last extent that could not be had, once; gmem_last_error() has its words. */
int gmem_extents_refused(void);

static inline bool gmem_extents_owns(const struct gmem_extents *extents, const void *at)
{
	uintptr_t offset = (uintptr_t)at - extents->base;

	return offset < extents->window_bytes && extents->tags[offset >> 21];
}

#endif
