/* SPDX-License-Identifier: Apache-2.0
 *
 * A session's heap is an arena of jemalloc whose extents are regions of gmem. Locks, outermost first, which is also the
 * order around a fork: `lock`, jemalloc's own, heap->lock, libgmem's. jemalloc calls the hooks with its locks held.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <jemalloc/jemalloc.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "atfork.h"
#include "error.h"
#include "heap.h"

/* jemalloc's page, so that all it frees can be given back; nodes of a list lie anywhere, and a sequence is fetched
 * ahead. */
#define HEAP_PAGE_BYTES 4096ull
/* Regions begin as small as a span and grow up to this; only a larger request makes a larger one. */
#define HEAP_GROWTH_BYTES (64ul << 20)
/* Regions are whole spans, so a span's tag says whose an address is. */
#define SPAN_SHIFT 21
#define SPAN_BYTES (1ul << SPAN_SHIFT)
/* Free memory is given back after a while, as jemalloc does it, so that it is not faulted in again at once. */
#define DIRTY_DECAY_MS 1000

/* jemalloc's functions, by the names that allocator.syms gives them. */
void *gmem_je_mallocx(size_t bytes, int flags);
void *gmem_je_rallocx(void *at, size_t bytes, int flags);
void gmem_je_dallocx(void *at, int flags);
size_t gmem_je_sallocx(const void *at, int flags);
int gmem_je_mallctl(const char *name, void *old, size_t *old_bytes, void *new, size_t new_bytes);
int gmem_je_atfork(void (*before)(void), void (*parent)(void), void (*child)(void));

/* As jemalloc 5.3's experimental.arenas_create_ext takes it; its headers do not show it. */
struct arena_config {
	extent_hooks_t *hooks;
	bool metadata_use_hooks;
};

/* A thread's cache of small objects; jemalloc's may hold what is of one arena only. */
struct cache {
	struct gmem_heap *heap; /* lock; NULL: it has gone */
	unsigned number;
	struct cache *prev, *next; /* lock: of the same heap */
	struct cache *other;       /* of the same thread */
};

struct gmem_heap {
	extent_hooks_t hooks; /* first: hooks get its address */
	struct gmem *session;
	struct gmem_heap_slot *slot;
	uintptr_t base; /* of the window */
	size_t window_bytes;
	uint8_t *tags; /* for each span of the window: 0, or which of our regions. Neighbours differ. */
	unsigned arena;
	atomic_bool closing;
	struct cache *caches;   /* lock */
	struct gmem_heap *next; /* lock */
	pthread_mutex_t lock; /* guards what follows, and changes of tags */
	uint8_t last_tag;
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
LOCAL int refused; /* -errno of this thread's last extent that could not be had; gmem_last_error() has its words */

/* ---- extents ---- */

static struct gmem_heap *of(extent_hooks_t *hooks)
{
	return (struct gmem_heap *)hooks;
}

static uint8_t *tag_of(const struct gmem_heap *heap, uintptr_t at)
{
	return &heap->tags[(at - heap->base) >> SPAN_SHIFT];
}

static bool owns(const struct gmem_heap *heap, const void *at)
{
	return (uintptr_t)at - heap->base < heap->window_bytes && *tag_of(heap, (uintptr_t)at);
}

static void tag_region(struct gmem_heap *heap, uintptr_t start, size_t count)
{
	uint8_t *tags = tag_of(heap, start), before, after;

	pthread_mutex_lock(&heap->lock);
	before = tags == heap->tags ? 0 : tags[-1];
	after = tags[count]; /* there is one more than the window has spans */
	do {
		heap->last_tag++;
	} while (!heap->last_tag || heap->last_tag == before || heap->last_tag == after);
	memset(tags, heap->last_tag, count);
	pthread_mutex_unlock(&heap->lock);
}

static void *extent_alloc(extent_hooks_t *hooks, void *wanted, size_t bytes, size_t alignment, bool *zero,
			  bool *commit, unsigned arena)
{
	const struct gmem_mmap_options options = { .size = sizeof(options), .page_bytes = HEAP_PAGE_BYTES,
						   .flags = GMEM_MMAP_NO_INHERIT };
	size_t count = (bytes + SPAN_BYTES - 1) >> SPAN_SHIFT;
	struct gmem_heap *heap = of(hooks);
	void *at;

	(void)arena;
	if (wanted || !count)
		return NULL;
	refused = gmem_mmap(heap->session, count << SPAN_SHIFT, &options, &at);
	if (refused)
		return NULL;
	if ((uintptr_t)at & (alignment - 1)) { /* jemalloc aligns by itself, except when larger regions were refused */
		gmem_munmap(heap->session, at, count << SPAN_SHIFT);
		refused = gmem_fail(-ENOMEM, "alignment: no room for %zu bytes at a multiple of %zu", bytes, alignment);
		return NULL;
	}
	tag_region(heap, (uintptr_t)at, count);
	*zero = true;
	*commit = true;
	return at;
}

/* Regions stay: jemalloc keeps what it may not give back, purged, and cuts what it needs next from it. */
static bool extent_dalloc(extent_hooks_t *hooks, void *at, size_t bytes, bool committed, unsigned arena)
{
	(void)at, (void)bytes, (void)committed, (void)arena;
	return !of(hooks)->closing;
}

static void extent_destroy(extent_hooks_t *hooks, void *at, size_t bytes, bool committed, unsigned arena)
{
	(void)hooks, (void)at, (void)bytes, (void)committed, (void)arena; /* the session unmaps it */
}

/* Has to read zero afterwards, and whole pages do. */
static bool extent_purge(extent_hooks_t *hooks, void *at, size_t all, size_t offset, size_t bytes, unsigned arena)
{
	struct gmem_heap *heap = of(hooks);
	uint8_t *start = (uint8_t *)at + offset;

	(void)all, (void)arena;
	if (((uintptr_t)start | bytes) & (HEAP_PAGE_BYTES - 1))
		return true; /* a jemalloc whose page is smaller */
	return heap->closing || gmem_discard(heap->session, start, bytes);
}

static bool extent_split(extent_hooks_t *hooks, void *at, size_t bytes, size_t first, size_t second, bool committed,
			 unsigned arena)
{
	(void)hooks, (void)at, (void)bytes, (void)first, (void)second, (void)committed, (void)arena;
	return false;
}

/* Within one region: our requests must not span two. */
static bool extent_merge(extent_hooks_t *hooks, void *a, size_t a_bytes, void *b, size_t b_bytes, bool committed,
			 unsigned arena)
{
	(void)a_bytes, (void)b_bytes, (void)committed, (void)arena;
	return *tag_of(of(hooks), (uintptr_t)a) != *tag_of(of(hooks), (uintptr_t)b);
}

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

/* jemalloc's handlers, which it registers when it is loaded. They have to run before libgmem's, whose locks its hooks
 * take, so they are kept until libgmem's are there. */
static struct {
	void (*before)(void), (*parent)(void), (*child)(void);
} allocator;

int gmem_je_atfork(void (*before)(void), void (*parent)(void), void (*child)(void))
{
	allocator.before = before;
	allocator.parent = parent;
	allocator.child = child;
	return 0;
}

static void before_fork(void)
{
	pthread_mutex_lock(&lock);
	allocator.before();
	for (struct gmem_heap *heap = heaps; heap; heap = heap->next)
		pthread_mutex_lock(&heap->lock);
}

static void after_fork(void)
{
	for (struct gmem_heap *heap = heaps; heap; heap = heap->next)
		pthread_mutex_unlock(&heap->lock);
	allocator.parent();
	pthread_mutex_unlock(&lock);
}

/* The memory is not here. The child's session makes a heap of its own when it needs one. */
static void after_fork_child(void)
{
	allocator.child();
	while (heaps) {
		struct gmem_heap *heap = heaps;

		heaps = heap->next;
		heap->next = inherited;
		inherited = heap;
		atomic_store(&heap->slot->heap, NULL);
		heap->closing = true;
		for (struct cache *cache = heap->caches; cache; cache = cache->next)
			cache->heap = NULL;
		pthread_mutex_unlock(&heap->lock);
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

static void set_option(const struct gmem_heap *heap, const char *option, void *value, size_t bytes)
{
	char name[64];

	snprintf(name, sizeof(name), "arena.%u.%s", heap->arena, option);
	gmem_je_mallctl(name, NULL, NULL, value, bytes);
}

static int create_arena(struct gmem_heap *heap)
{
	/* The allocator's own notes are nothing for kernels to write over, and a forked child needs them: they stay in
	 * plain memory. */
	struct arena_config config = { .hooks = &heap->hooks, .metadata_use_hooks = false };
	ssize_t decay_ms = DIRTY_DECAY_MS, muzzy_ms = 0;
	size_t growth = HEAP_GROWTH_BYTES, bytes = sizeof(heap->arena);
	int err;

	err = gmem_je_mallctl("experimental.arenas_create_ext", &heap->arena, &bytes, &config, sizeof(config));
	if (err)
		return gmem_fail(-ENOMEM, "no arena for the heap: %s", strerror(err));
	set_option(heap, "dirty_decay_ms", &decay_ms, sizeof(decay_ms));
	set_option(heap, "muzzy_decay_ms", &muzzy_ms, sizeof(muzzy_ms));
	set_option(heap, "retain_grow_limit", &growth, sizeof(growth));
	return 0;
}

static int create(struct gmem *session, struct gmem_heap **ret)
{
	struct gmem_heap *heap = calloc(1, sizeof(*heap));
	uint64_t base, bytes;
	void *tags;

	if (!heap)
		return gmem_fail(-ENOMEM, "out of memory");
	heap->session = session;
	heap->slot = gmem_session_heap(session, &base, &bytes);
	heap->base = base;
	heap->window_bytes = bytes;
	tags = mmap(NULL, (bytes >> SPAN_SHIFT) + 1, PROT_READ | PROT_WRITE,
		    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (tags == MAP_FAILED) {
		free(heap);
		return gmem_fail(-ENOMEM, "out of memory");
	}
	heap->tags = tags;
	heap->hooks = (extent_hooks_t){ .alloc = extent_alloc, .dalloc = extent_dalloc, .destroy = extent_destroy,
					.purge_forced = extent_purge, .split = extent_split, .merge = extent_merge };
	pthread_mutex_init(&heap->lock, NULL);
	if (create_arena(heap)) {
		munmap(heap->tags, (bytes >> SPAN_SHIFT) + 1);
		free(heap);
		return -ENOMEM;
	}
	*ret = heap;
	return 0;
}

static void destroy(struct gmem_heap *heap)
{
	struct gmem_heap **at;

	pthread_mutex_lock(&lock);
	heap->closing = true;
	for (at = &heaps; *at != heap; at = &(*at)->next)
		;
	*at = heap->next;
	epoch++;
	while (heap->caches)
		drop_locked(heap->caches);
	set_option(heap, "destroy", NULL, 0);
	pthread_mutex_unlock(&lock);
	munmap(heap->tags, (heap->window_bytes >> SPAN_SHIFT) + 1);
	pthread_mutex_destroy(&heap->lock);
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

	return heap && owns(heap, at);
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
		if (owns(heap, at))
			return true;
	return false;
}

__attribute__((noinline)) static void *no_room(size_t bytes)
{
	int err = refused;

	refused = 0;
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
	if (is_recent(session) && __builtin_expect(owns(recent.heap, at), 1))
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
