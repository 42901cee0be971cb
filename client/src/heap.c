/* SPDX-License-Identifier: Apache-2.0
 *
 * A session's heap is an arena of jemalloc whose extents are regions of gmem. Locks, outermost first, which is also the
 * order around a fork: `lock`, jemalloc's own, heap->extents.lock, libgmem's. jemalloc calls the hooks with its locks held.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "atfork.h"
#include "error.h"
#include "extents.h"
#include "heap.h"

/* jemalloc's page, so that all it frees can be given back; nodes of a list lie anywhere, and a sequence is fetched
 * ahead. */
#define HEAP_PAGE_BYTES 4096ull
/* A thread's cache of small objects; jemalloc's may hold what is of one arena only. */
struct cache {
	struct gmem_heap *heap; /* lock; NULL: it has gone */
	unsigned number;
	struct cache *prev, *next; /* lock: of the same heap */
	struct cache *other;       /* of the same thread */
};

struct gmem_heap {
	struct gmem_extents extents;
	struct gmem_heap_slot *slot;
	unsigned arena;
	struct cache *caches;   /* lock */
	struct gmem_heap *next; /* lock */
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct gmem_heap *heaps;     /* lock */
static struct gmem_heap *inherited; /* the parent's, in a forked child: without memory, and kept to know its pointers */
static _Atomic uint64_t epoch = 1;  /* another one after each heap that has gone */
static pthread_key_t thread_key;    /* this thread's caches */
static int setup_err;

#define LOCAL static _Thread_local __attribute__((tls_model("initial-exec")))

/* What this thread used last. Sessions and heaps may be at the addresses of earlier ones; epochs do not come again. */
LOCAL struct {
	struct gmem *session;
	struct gmem_heap *heap;
	uint64_t epoch;
	int flags;
} recent;

/* ---- caches ---- */

static void link_locked(struct gmem_heap *heap, struct cache *cache)
{
	cache->heap = heap;
	cache->prev = NULL;
	cache->next = heap->caches;
	if (cache->next)
		cache->next->prev = cache;
	heap->caches = cache;
}

static void drop_locked(struct cache *cache)
{
	struct gmem_heap *heap = cache->heap;

	if (!heap)
		return;
	if (cache->next)
		cache->next->prev = cache->prev;
	if (cache->prev)
		cache->prev->next = cache->next;
	else
		heap->caches = cache->next;
	cache->heap = NULL;
	gmem_je_mallctl("tcache.destroy", NULL, NULL, &cache->number, sizeof(cache->number));
}

static void thread_ends(void *arg)
{
	struct cache *cache = arg;

	recent.epoch = 0; /* another destructor may come to us again */
	pthread_mutex_lock(&lock);
	while (cache) {
		struct cache *other = cache->other;

		drop_locked(cache);
		free(cache);
		cache = other;
	}
	pthread_mutex_unlock(&lock);
}

/* This thread's cache for the heap; NULL if none can be had. What was for heaps that have gone is used again. */
static struct cache *cache_for(struct gmem_heap *heap)
{
	struct cache *mine = pthread_getspecific(thread_key), *cache, *empty = NULL;
	size_t bytes = sizeof(cache->number);

	pthread_mutex_lock(&lock);
	for (cache = mine; cache && cache->heap != heap; cache = cache->other)
		empty = cache->heap ? empty : cache;
	if (cache)
		goto out;
	cache = empty;
	if (!cache) {
		cache = calloc(1, sizeof(*cache));
		if (!cache)
			goto out;
		cache->other = mine;
		if (pthread_setspecific(thread_key, cache)) {
			free(cache);
			cache = NULL;
			goto out;
		}
	}
	if (gmem_je_mallctl("tcache.create", &cache->number, &bytes, NULL, 0))
		cache = NULL;
	else
		link_locked(heap, cache);
out:
	pthread_mutex_unlock(&lock);
	return cache;
}

/* ---- fork ---- */

static void before_fork(void)
{
	pthread_mutex_lock(&lock);
	gmem_allocator_fork.before();
	for (struct gmem_heap *heap = heaps; heap; heap = heap->next)
		pthread_mutex_lock(&heap->extents.lock);
}

static void after_fork(void)
{
	for (struct gmem_heap *heap = heaps; heap; heap = heap->next)
		pthread_mutex_unlock(&heap->extents.lock);
	gmem_allocator_fork.parent();
	pthread_mutex_unlock(&lock);
}

/* The memory is not here. The child's session makes a heap of its own when it needs one. */
static void after_fork_child(void)
{
	gmem_allocator_fork.child();
	while (heaps) {
		struct gmem_heap *heap = heaps;

		heaps = heap->next;
		heap->next = inherited;
		inherited = heap;
		atomic_store(&heap->slot->heap, NULL);
		heap->extents.closing = true;
		for (struct cache *cache = heap->caches; cache; cache = cache->next)
			cache->heap = NULL;
		pthread_mutex_unlock(&heap->extents.lock);
	}
	epoch++;
	pthread_mutex_unlock(&lock);
}

static void set_up(void)
{
	setup_err = -pthread_key_create(&thread_key, thread_ends);
	if (!setup_err)
		setup_err = -gmem_atfork(before_fork, after_fork, after_fork_child);
}

/* ---- the heap ---- */

static int create(struct gmem *session, struct gmem_heap **ret)
{
	struct gmem_heap *heap = calloc(1, sizeof(*heap));
	uint64_t base, bytes;
	int err;

	if (!heap)
		return gmem_fail(-ENOMEM, "out of memory");
	heap->slot = gmem_session_heap(session, &base, &bytes);
	err = gmem_extents_init(&heap->extents, session, base, bytes, HEAP_PAGE_BYTES);
	if (err) {
		free(heap);
		return err;
	}
	heap->extents.mmap_flags = GMEM_MMAP_NO_INHERIT;
	err = gmem_extents_arena(&heap->extents, &heap->arena);
	if (err) {
		gmem_extents_deinit(&heap->extents);
		free(heap);
		return err;
	}
	*ret = heap;
	return 0;
}

static void destroy_arena(const struct gmem_heap *heap)
{
	char name[32];

	snprintf(name, sizeof(name), "arena.%u.destroy", heap->arena);
	gmem_je_mallctl(name, NULL, NULL, NULL, 0);
}

static void destroy(struct gmem_heap *heap)
{
	struct gmem_heap **at;

	pthread_mutex_lock(&lock);
	heap->extents.closing = true;
	for (at = &heaps; *at != heap; at = &(*at)->next)
		;
	*at = heap->next;
	epoch++;
	while (heap->caches)
		drop_locked(heap->caches);
	destroy_arena(heap);
	pthread_mutex_unlock(&lock);
	gmem_extents_deinit(&heap->extents);
	free(heap);
}

static int get_or_create(struct gmem *session, struct gmem_heap_slot *slot, struct gmem_heap **ret)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;
	struct gmem_heap *heap;
	int err = 0;

	pthread_once(&once, set_up);
	if (setup_err)
		return gmem_fail(setup_err, "no heap: %s", strerror(-setup_err));
	pthread_mutex_lock(&lock);
	heap = atomic_load(&slot->heap);
	if (!heap) {
		err = create(session, &heap);
		if (!err) {
			heap->next = heaps;
			heaps = heap;
			slot->destroy = destroy;
			atomic_store(&slot->heap, heap);
		}
	}
	pthread_mutex_unlock(&lock);
	*ret = heap;
	return err;
}

/* Makes the session's heap this thread's recent one, for one call only if no cache can be had. */
__attribute__((noinline)) static struct gmem_heap *find_heap(struct gmem *session, bool make)
{
	uint64_t now = atomic_load(&epoch), base, bytes;
	struct gmem_heap_slot *slot;
	struct cache *cache;

	if (!session) {
		gmem_fail(-EINVAL, "session: is NULL");
		return NULL;
	}
	slot = gmem_session_heap(session, &base, &bytes);
	recent.epoch = 0;
	recent.heap = atomic_load(&slot->heap);
	if (!recent.heap && (!make || get_or_create(session, slot, &recent.heap)))
		return NULL;
	cache = cache_for(recent.heap);
	recent.flags = MALLOCX_ARENA(recent.heap->arena) | (cache ? MALLOCX_TCACHE(cache->number) : MALLOCX_TCACHE_NONE);
	recent.session = session;
	recent.epoch = cache ? now : 0;
	return recent.heap;
}

/* Whether recent.heap and recent.flags are the session's. */
static inline bool is_recent(const struct gmem *session)
{
	uint64_t now = atomic_load_explicit(&epoch, memory_order_relaxed);

	return __builtin_expect(recent.session == session && recent.epoch == now, 1);
}

static bool find_owner(struct gmem *session, const void *at)
{
	const struct gmem_heap *heap = is_recent(session) ? recent.heap : find_heap(session, false);

	return heap && gmem_extents_owns(&heap->extents, at);
}

/* ---- the interface ---- */

static void *fail(int err)
{
	errno = -err;
	return NULL;
}

/* The program's mistake; going on would corrupt the heap. */
_Noreturn static void die(const void *at, const char *function)
{
	fprintf(stderr, "libgmem: %s(%p): not from this session's heap\n", function, at);
	abort();
}

static bool is_inherited(const void *at)
{
	for (struct gmem_heap *heap = inherited; heap; heap = heap->next)
		if (gmem_extents_owns(&heap->extents, at))
			return true;
	return false;
}

__attribute__((noinline)) static void *no_room(size_t bytes)
{
	int err = gmem_extents_refused();

	return fail(err ? err : gmem_fail(-ENOMEM, "bytes: %zu are more than there can be", bytes));
}

__attribute__((noinline)) static void *allocate_elsewhere(struct gmem *session, size_t bytes, int more_flags)
{
	void *at;

	if (!find_heap(session, true))
		return fail(session ? -ENOMEM : -EINVAL);
	at = gmem_je_mallocx(bytes + !bytes, recent.flags | more_flags);
	return at ? at : no_room(bytes);
}

static inline void *allocate(struct gmem *session, size_t bytes, int more_flags)
{
	void *at;

	if (!is_recent(session))
		return allocate_elsewhere(session, bytes, more_flags);
	at = gmem_je_mallocx(bytes + !bytes, recent.flags | more_flags);
	return __builtin_expect(!at, 0) ? no_room(bytes) : at;
}

void *gmem_malloc(struct gmem *session, size_t bytes)
{
	return allocate(session, bytes, 0);
}

void *gmem_calloc(struct gmem *session, size_t count, size_t bytes)
{
	size_t total;

	if (__builtin_mul_overflow(count, bytes, &total))
		return fail(gmem_fail(-ENOMEM, "count: %zu times %zu bytes overflows", count, bytes));
	return allocate(session, total, MALLOCX_ZERO);
}

void *gmem_aligned_alloc(struct gmem *session, size_t alignment, size_t bytes)
{
	if (!alignment || (alignment & (alignment - 1)))
		return fail(gmem_fail(-EINVAL, "alignment: %zu is not a power of two", alignment));
	return allocate(session, bytes, MALLOCX_ALIGN(alignment));
}

void *gmem_realloc(struct gmem *session, void *at, size_t bytes)
{
	void *to;

	if (!at)
		return gmem_malloc(session, bytes);
	if (!find_owner(session, at))
		die(at, "gmem_realloc");
	to = gmem_je_rallocx(at, bytes + !bytes, recent.flags);
	return to ? to : no_room(bytes);
}

__attribute__((noinline)) static void free_elsewhere(struct gmem *session, void *at)
{
	if (!at)
		return;
	if (find_owner(session, at))
		gmem_je_dallocx(at, recent.flags);
	else if (!is_inherited(at))
		die(at, "gmem_free");
}

void gmem_free(struct gmem *session, void *at)
{
	if (is_recent(session) && __builtin_expect(gmem_extents_owns(&recent.heap->extents, at), 1))
		gmem_je_dallocx(at, recent.flags);
	else
		free_elsewhere(session, at);
}

size_t gmem_malloc_usable_size(struct gmem *session, const void *at)
{
	if (!at)
		return 0;
	if (!find_owner(session, at))
		die(at, "gmem_malloc_usable_size");
	return gmem_je_sallocx(at, 0);
}
