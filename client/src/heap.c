/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <jemalloc/jemalloc.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "heap.h"

/* jemalloc's page, so that all it frees can be given back; nodes of a list lie anywhere, and a sequence is fetched ahead. */
#define HEAP_PAGE_BYTES 4096ull
/* Free memory is given back after a while, as jemalloc does it, so that it is not faulted in again at once. */
#define DIRTY_DECAY_MS 1000

void *gmem_je_mallocx(size_t bytes, int flags);
void *gmem_je_rallocx(void *at, size_t bytes, int flags);
void gmem_je_dallocx(void *at, int flags);
size_t gmem_je_sallocx(const void *at, int flags);
int gmem_je_mallctl(const char *name, void *old, size_t *old_bytes, void *new, size_t new_bytes);

/* As jemalloc 5.3's experimental.arenas_create_ext takes it; its headers do not show it. */
struct arena_config {
	extent_hooks_t *hooks;
	bool metadata_use_hooks;
};

struct part {
	uintptr_t start, end;
	struct part *next;
};

/* A thread's cache of small objects. jemalloc's explicit caches may hold what is of one arena only. */
struct cache {
	struct gmem_heap *heap;
	unsigned number;
	struct cache *prev, *next; /* heap->lock */
};

struct gmem_heap {
	extent_hooks_t hooks; /* first: hooks get its address */
	struct gmem *session;
	unsigned arena;
	pthread_key_t key; /* this thread's struct cache */
	pthread_mutex_t lock;
	struct cache *caches;           /* lock */
	struct part *parts;             /* lock */
	_Atomic uintptr_t low, high;    /* all parts lie in between */
	atomic_bool closing;
};

/* What this thread used last. It holds while no heap has ended: a session may come to lie where another one was. */
static _Atomic uint64_t generation = 1;
static __attribute__((tls_model("initial-exec"))) _Thread_local struct {
	struct gmem *session;
	struct gmem_heap *heap;
	uint64_t generation;
	int flags;
} recent;

static struct gmem_heap *of(extent_hooks_t *hooks)
{
	return (struct gmem_heap *)hooks;
}

/* ---- extents ---- */

static bool add_part(struct gmem_heap *heap, void *at, size_t bytes)
{
	struct part *part = malloc(sizeof(*part));

	if (!part)
		return false;
	*part = (struct part){ (uintptr_t)at, (uintptr_t)at + bytes, NULL };
	pthread_mutex_lock(&heap->lock);
	part->next = heap->parts;
	heap->parts = part;
	if (part->start < heap->low)
		heap->low = part->start;
	if (part->end > heap->high)
		heap->high = part->end;
	pthread_mutex_unlock(&heap->lock);
	return true;
}

static void *extent_alloc(extent_hooks_t *hooks, void *new_addr, size_t bytes, size_t alignment, bool *zero,
			  bool *commit, unsigned arena)
{
	struct gmem_mmap_options options = { .size = sizeof(options), .page_bytes = HEAP_PAGE_BYTES,
					     .flags = GMEM_MMAP_NO_INHERIT };
	size_t span = alignment <= HEAP_PAGE_BYTES ? bytes : bytes + alignment;
	struct gmem_heap *heap = of(hooks);
	void *at, *aligned;

	(void)arena;
	if (new_addr || span < bytes || gmem_mmap(heap->session, span, &options, &at))
		return NULL;
	if (!add_part(heap, at, span)) {
		gmem_munmap(heap->session, at, span);
		return NULL;
	}
	aligned = (void *)(((uintptr_t)at + alignment - 1) & ~(alignment - 1));
	*zero = true;
	*commit = true;
	return aligned;
}

/* Regions stay: jemalloc keeps what it may not give back, and purges it. */
static bool extent_dalloc(extent_hooks_t *hooks, void *at, size_t bytes, bool committed, unsigned arena)
{
	(void)at, (void)bytes, (void)committed, (void)arena;
	return !atomic_load(&of(hooks)->closing);
}

static void extent_destroy(extent_hooks_t *hooks, void *at, size_t bytes, bool committed, unsigned arena)
{
	(void)hooks, (void)at, (void)bytes, (void)committed, (void)arena;
}

static bool purge(struct gmem_heap *heap, void *at, size_t offset, size_t bytes)
{
	return atomic_load(&heap->closing) || gmem_discard(heap->session, (uint8_t *)at + offset, bytes);
}

static bool extent_purge_lazy(extent_hooks_t *hooks, void *at, size_t total, size_t offset, size_t bytes, unsigned arena)
{
	(void)total, (void)arena;
	return purge(of(hooks), at, offset, bytes);
}

/* Must read zero afterwards: a discard does, of whole pages. */
static bool extent_purge_forced(extent_hooks_t *hooks, void *at, size_t total, size_t offset, size_t bytes,
				unsigned arena)
{
	(void)total, (void)arena;
	if ((((uintptr_t)at + offset) | bytes) & (HEAP_PAGE_BYTES - 1))
		return true;
	return purge(of(hooks), at, offset, bytes);
}

static bool extent_split(extent_hooks_t *hooks, void *at, size_t bytes, size_t first, size_t second, bool committed,
			 unsigned arena)
{
	(void)hooks, (void)at, (void)bytes, (void)first, (void)second, (void)committed, (void)arena;
	return false;
}

/* Only within one region: requests of ours must not span two. */
static bool extent_merge(extent_hooks_t *hooks, void *a, size_t a_bytes, void *b, size_t b_bytes, bool committed,
			 unsigned arena)
{
	struct gmem_heap *heap = of(hooks);
	bool refused = true;

	(void)a_bytes, (void)committed, (void)arena;
	pthread_mutex_lock(&heap->lock);
	for (struct part *part = heap->parts; part && refused; part = part->next)
		refused = (uintptr_t)a < part->start || (uintptr_t)b + b_bytes > part->end;
	pthread_mutex_unlock(&heap->lock);
	return refused;
}

/* ---- caches ---- */

static void drop_cache(struct cache *cache)
{
	gmem_je_mallctl("tcache.destroy", NULL, NULL, &cache->number, sizeof(cache->number));
	free(cache);
}

static void thread_ends(void *arg)
{
	struct cache *cache = arg;
	struct gmem_heap *heap = cache->heap;

	pthread_mutex_lock(&heap->lock);
	if (cache->next)
		cache->next->prev = cache->prev;
	if (cache->prev)
		cache->prev->next = cache->next;
	else
		heap->caches = cache->next;
	pthread_mutex_unlock(&heap->lock);
	drop_cache(cache); /* without the lock: what it held may be merged, which takes it */
}

static struct cache *new_cache(struct gmem_heap *heap)
{
	struct cache *cache = calloc(1, sizeof(*cache));
	size_t bytes = sizeof(cache->number);

	if (!cache || gmem_je_mallctl("tcache.create", &cache->number, &bytes, NULL, 0)) {
		free(cache);
		return NULL;
	}
	cache->heap = heap;
	pthread_mutex_lock(&heap->lock);
	cache->next = heap->caches;
	if (cache->next)
		cache->next->prev = cache;
	heap->caches = cache;
	pthread_mutex_unlock(&heap->lock);
	pthread_setspecific(heap->key, cache);
	return cache;
}

static int flags_of_thread(struct gmem_heap *heap)
{
	struct cache *cache = pthread_getspecific(heap->key);

	if (!cache)
		cache = new_cache(heap);
	return MALLOCX_ARENA(heap->arena) | (cache ? MALLOCX_TCACHE(cache->number) : MALLOCX_TCACHE_NONE);
}

/* ---- the heap ---- */

static int create_arena(struct gmem_heap *heap)
{
	struct arena_config config = { .hooks = &heap->hooks, .metadata_use_hooks = false };
	ssize_t decay_ms = DIRTY_DECAY_MS;
	size_t bytes = sizeof(heap->arena);
	char name[64];

	/* The allocator's own notes are nothing for kernels to write over: they stay in plain memory. */
	if (gmem_je_mallctl("experimental.arenas_create_ext", &heap->arena, &bytes, &config, sizeof(config)))
		return -ENOMEM;
	snprintf(name, sizeof(name), "arena.%u.dirty_decay_ms", heap->arena);
	gmem_je_mallctl(name, NULL, NULL, &decay_ms, sizeof(decay_ms));
	return 0;
}

static int heap_create(struct gmem *session, struct gmem_heap **ret)
{
	struct gmem_heap *heap = calloc(1, sizeof(*heap));

	if (!heap)
		return -ENOMEM;
	heap->hooks = (extent_hooks_t){
		.alloc = extent_alloc, .dalloc = extent_dalloc, .destroy = extent_destroy,
		.purge_lazy = extent_purge_lazy, .purge_forced = extent_purge_forced,
		.split = extent_split, .merge = extent_merge,
	};
	heap->session = session;
	heap->low = UINTPTR_MAX;
	pthread_mutex_init(&heap->lock, NULL);
	if (pthread_key_create(&heap->key, thread_ends)) {
		free(heap);
		return -EAGAIN;
	}
	if (create_arena(heap)) {
		pthread_key_delete(heap->key);
		free(heap);
		return -ENOMEM;
	}
	*ret = heap;
	return 0;
}

static void heap_destroy(struct gmem_heap *heap)
{
	char name[64];

	atomic_fetch_add(&generation, 1);
	atomic_store(&heap->closing, true);
	pthread_key_delete(heap->key);
	while (heap->caches) {
		struct cache *cache = heap->caches;

		heap->caches = cache->next;
		drop_cache(cache);
	}
	snprintf(name, sizeof(name), "arena.%u.destroy", heap->arena);
	gmem_je_mallctl(name, NULL, NULL, NULL, 0);
	while (heap->parts) {
		struct part *part = heap->parts;

		heap->parts = part->next;
		free(part);
	}
	pthread_mutex_destroy(&heap->lock);
	free(heap);
}

static void forget_heaps(void)
{
	atomic_fetch_add(&generation, 1);
}

static void install_handler(void)
{
	pthread_atfork(NULL, NULL, forget_heaps);
}

static int find_or_create(struct gmem *session, struct gmem_heap **ret)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;
	struct gmem_heap_slot *slot = gmem_session_heap(session);
	int err = 0;

	pthread_once(&once, install_handler);
	pthread_mutex_lock(&slot->lock);
	*ret = atomic_load(&slot->heap);
	if (!*ret)
		err = heap_create(session, ret);
	if (!err) {
		slot->destroy = heap_destroy;
		atomic_store(&slot->heap, *ret);
	}
	pthread_mutex_unlock(&slot->lock);
	return err;
}

__attribute__((noinline)) static struct gmem_heap *use_another(struct gmem *session)
{
	uint64_t now = atomic_load(&generation);
	struct gmem_heap *heap;
	int err;

	if (!session) {
		errno = -gmem_fail(-EINVAL, "session: is NULL");
		return NULL;
	}
	err = find_or_create(session, &heap);
	if (err) {
		errno = -gmem_fail(err, "no heap: %s", strerror(-err));
		return NULL;
	}
	recent.session = session;
	recent.heap = heap;
	recent.flags = flags_of_thread(heap);
	recent.generation = now;
	return heap;
}

/* The session's heap, and recent.flags for it. NULL: errno says why. */
static inline struct gmem_heap *use(struct gmem *session)
{
	if (__builtin_expect(recent.session == session &&
				     recent.generation == atomic_load_explicit(&generation, memory_order_relaxed), 1))
		return recent.heap;
	return use_another(session);
}

static inline void *checked(void *at, size_t bytes)
{
	if (__builtin_expect(!at, 0))
		errno = -gmem_fail(-ENOMEM, "bytes: no room for %zu bytes", bytes);
	return at;
}

void *gmem_malloc(struct gmem *session, size_t bytes)
{
	return use(session) ? checked(gmem_je_mallocx(bytes ? bytes : 1, recent.flags), bytes) : NULL;
}

void *gmem_calloc(struct gmem *session, size_t count, size_t bytes)
{
	size_t total;

	if (!use(session))
		return NULL;
	if (__builtin_mul_overflow(count, bytes, &total))
		return checked(NULL, SIZE_MAX);
	return checked(gmem_je_mallocx(total ? total : 1, recent.flags | MALLOCX_ZERO), total);
}

void *gmem_aligned_alloc(struct gmem *session, size_t alignment, size_t bytes)
{
	if (!use(session))
		return NULL;
	if (!alignment || (alignment & (alignment - 1))) {
		errno = -gmem_fail(-EINVAL, "alignment: %zu is not a power of two", alignment);
		return NULL;
	}
	return checked(gmem_je_mallocx(bytes ? bytes : 1, recent.flags | MALLOCX_ALIGN(alignment)), bytes);
}

/* A pointer of another heap would corrupt both. */
static inline void check_pointer(struct gmem_heap *heap, const void *at, const char *what)
{
	if (heap && (uintptr_t)at >= atomic_load_explicit(&heap->low, memory_order_relaxed) &&
	    (uintptr_t)at < atomic_load_explicit(&heap->high, memory_order_relaxed))
		return;
	fprintf(stderr, "libgmem: %s(%p): not from this session's heap\n", what, at);
	abort();
}

void *gmem_realloc(struct gmem *session, void *at, size_t bytes)
{
	struct gmem_heap *heap = use(session);

	if (!at)
		return gmem_malloc(session, bytes);
	if (!heap)
		return NULL;
	check_pointer(heap, at, "gmem_realloc");
	return checked(gmem_je_rallocx(at, bytes ? bytes : 1, recent.flags), bytes);
}

void gmem_free(struct gmem *session, void *at)
{
	if (!at)
		return;
	check_pointer(use(session), at, "gmem_free");
	gmem_je_dallocx(at, recent.flags);
}

size_t gmem_malloc_usable_size(struct gmem *session, const void *at)
{
	if (!at)
		return 0;
	check_pointer(use(session), at, "gmem_malloc_usable_size");
	return gmem_je_sallocx(at, 0);
}
