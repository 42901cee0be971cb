/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "error.h"
#include "extents.h"
#include "syscalls.h"

/* Regions begin as small as a span and grow up to this; only a larger request makes a larger one. */
#define GROWTH_BYTES (64ul << 20)
/* Regions are whole spans, so a span's tag says whose an address is. */
#define SPAN_SHIFT 21
#define SPAN_BYTES (1ul << SPAN_SHIFT)
/* Free memory is given back after a while, as jemalloc does it, so that it is not faulted in again at once. */
#define DIRTY_DECAY_MS 1000

/* As jemalloc 5.3's experimental.arenas_create_ext takes it; its headers do not show it. */
struct arena_config {
	extent_hooks_t *hooks;
	bool metadata_use_hooks;
};

struct gmem_allocator_fork gmem_allocator_fork;
static _Thread_local __attribute__((tls_model("initial-exec"))) int refused;

int gmem_je_atfork(void (*before)(void), void (*parent)(void), void (*child)(void));

/* Behind jemalloc's pthread_atfork(). */
int gmem_je_atfork(void (*before)(void), void (*parent)(void), void (*child)(void))
{
	gmem_allocator_fork = (struct gmem_allocator_fork){ before, parent, child };
	return 0;
}

static struct gmem_extents *of(extent_hooks_t *hooks)
{
	return (struct gmem_extents *)hooks;
}

static uint8_t *tag_of(const struct gmem_extents *extents, uintptr_t at)
{
	return &extents->tags[(at - extents->base) >> SPAN_SHIFT];
}

static void tag_region(struct gmem_extents *extents, uintptr_t start, size_t count)
{
	uint8_t *tags = tag_of(extents, start), before, after;

	pthread_mutex_lock(&extents->lock);
	before = tags == extents->tags ? 0 : tags[-1];
	after = tags[count]; /* there is one more than the window has spans */
	do {
		extents->last_tag++;
	} while (!extents->last_tag || extents->last_tag == before || extents->last_tag == after);
	memset(tags, extents->last_tag, count);
	pthread_mutex_unlock(&extents->lock);
}

static int map(struct gmem_extents *extents, size_t bytes, size_t alignment, void **ret)
{
	const struct gmem_mmap_options options = { .size = sizeof(options), .page_bytes = extents->page_bytes,
						   .flags = extents->mmap_flags };
	void *at;
	int err = gmem_mmap(extents->session, bytes, &options, &at);

	if (err)
		return err;
	if ((uintptr_t)at & (alignment - 1)) /* jemalloc aligns by itself, except when larger regions were refused */
		err = gmem_fail(-ENOMEM, "alignment: no room for %zu bytes at a multiple of %zu", bytes, alignment);
	else if (extents->added)
		err = extents->added((uintptr_t)at, bytes);
	if (err)
		gmem_munmap(extents->session, at, bytes);
	else
		*ret = at;
	return err;
}

static void *extent_alloc(extent_hooks_t *hooks, void *wanted, size_t bytes, size_t alignment, bool *zero,
			  bool *commit, unsigned arena)
{
	size_t count = (bytes + SPAN_BYTES - 1) >> SPAN_SHIFT;
	struct gmem_extents *extents = of(hooks);
	void *at;

	(void)arena;
	if (wanted || !count)
		return NULL;
	refused = map(extents, count << SPAN_SHIFT, alignment, &at);
	if (refused)
		return NULL;
	tag_region(extents, (uintptr_t)at, count);
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
	struct gmem_extents *extents = of(hooks);
	uint8_t *start = (uint8_t *)at + offset;

	(void)all, (void)arena;
	if (((uintptr_t)start | bytes) & (extents->page_bytes - 1))
		return true; /* the allocator's page is smaller than ours */
	return extents->closing || gmem_discard(extents->session, start, bytes);
}

/* May keep what it was: the whole pages inside go. */
static bool extent_purge_lazy(extent_hooks_t *hooks, void *at, size_t all, size_t offset, size_t bytes, unsigned arena)
{
	struct gmem_extents *extents = of(hooks);
	uintptr_t start = (uintptr_t)at + offset, end = start + bytes;

	(void)all, (void)arena;
	start = (start + extents->page_bytes - 1) & ~(extents->page_bytes - 1);
	end &= ~(extents->page_bytes - 1);
	if (extents->closing || start >= end)
		return true;
	return gmem_discard(extents->session, (void *)start, end - start);
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

int gmem_extents_init(struct gmem_extents *ret, struct gmem *session, uintptr_t base, size_t window_bytes,
		      size_t page_bytes)
{
	void *tags = gmem_sys_mmap(NULL, (window_bytes >> SPAN_SHIFT) + 1, PROT_READ | PROT_WRITE,
				   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (tags == MAP_FAILED)
		return gmem_fail(-ENOMEM, "out of memory");
	*ret = (struct gmem_extents){
		.hooks = { .alloc = extent_alloc, .dalloc = extent_dalloc, .destroy = extent_destroy,
			   .purge_forced = extent_purge, .split = extent_split, .merge = extent_merge },
		.session = session, .page_bytes = page_bytes, .base = base, .window_bytes = window_bytes, .tags = tags,
	};
	if (page_bytes > 4096)
		ret->hooks.purge_lazy = extent_purge_lazy;
	pthread_mutex_init(&ret->lock, NULL);
	return 0;
}

void gmem_extents_deinit(struct gmem_extents *extents)
{
	gmem_sys_munmap(extents->tags, (extents->window_bytes >> SPAN_SHIFT) + 1);
	pthread_mutex_destroy(&extents->lock);
}

static void set_option(unsigned arena, const char *option, void *value, size_t bytes)
{
	char name[64];

	snprintf(name, sizeof(name), "arena.%u.%s", arena, option);
	gmem_je_mallctl(name, NULL, NULL, value, bytes);
}

int gmem_extents_arena(struct gmem_extents *extents, unsigned *ret)
{
	/* The allocator's own notes are nothing for kernels to write over, and a forked child needs them: they stay in
	 * plain memory. */
	struct arena_config config = { .hooks = extents ? &extents->hooks : NULL, .metadata_use_hooks = false };
	ssize_t decay_ms = DIRTY_DECAY_MS, muzzy_ms = 0;
	size_t growth = GROWTH_BYTES, bytes = sizeof(*ret);
	unsigned arena;
	int err;

	if (!extents)
		err = gmem_je_mallctl("arenas.create", &arena, &bytes, NULL, 0);
	else
		err = gmem_je_mallctl("experimental.arenas_create_ext", &arena, &bytes, &config, sizeof(config));
	if (err)
		return gmem_fail(-ENOMEM, "no arena for the heap: %s", strerror(err));
	if (extents) {
		set_option(arena, "dirty_decay_ms", &decay_ms, sizeof(decay_ms));
		set_option(arena, "muzzy_decay_ms", &muzzy_ms, sizeof(muzzy_ms));
		set_option(arena, "retain_grow_limit", &growth, sizeof(growth));
	}
	*ret = arena;
	return 0;
}

int gmem_extents_refused(void)
{
	int err = refused;

	refused = 0;
	return err;
}
