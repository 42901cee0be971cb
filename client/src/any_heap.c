/* SPDX-License-Identifier: Apache-2.0
 *
 * The malloc family over jemalloc. A thread of the program allocates from one of several arenas whose extents are managed
 * memory; its automatic arena, of plain memory, serves what comes before the session is there and what the C library
 * allocates for itself: that is written to in a forked child before the child has memory of its own (stdio's locks, keys
 * of other threads). All of it is jemalloc's, so a pointer may be freed no matter when and by whom it was allocated.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <link.h>
#include <pthread.h>
#include <string.h>
#include <unistd.h>

#include "any.h"
#include "extents.h"
#include "heap.h"
#include "interpose.h"

#define ARENAS_MAX 64
#define ARENAS_PER_CPU 4 /* as jemalloc does it */
#define CODE_RANGES 2 /* libc and the loader */
#define PLAIN (MALLOCX_ARENA(0) | MALLOCX_TCACHE_NONE)
#define CALLER __builtin_return_address(0)

/* Automatic arenas: one, of plain memory. A large allocation is no reason to leave the thread's own. */
__attribute__((visibility("hidden"))) const char *gmem_je_malloc_conf = "narenas:1,oversize_threshold:0";

#define LOCAL static _Thread_local __attribute__((tls_model("initial-exec")))

LOCAL bool bound; /* to an arena, for good */
LOCAL int plain_to_ours = PLAIN; /* flags by which memory that is not in the window gets there */

static uintptr_t programs_start, programs_bytes; /* where the program's memory is: the window */
static struct gmem_extents extents;
static extent_hooks_t inner; /* what extents.c made of them */
static pthread_mutex_t arenas_lock = PTHREAD_MUTEX_INITIALIZER;
static unsigned arenas[ARENAS_MAX], arena_count = 1; /* arenas_lock; 0: not made yet */
static atomic_uint next_thread;

/* ---- who calls ---- */

static struct {
	uintptr_t start, bytes;
} libc_code[CODE_RANGES];
static int code_count;

static inline bool is_libc(const void *caller)
{
	for (int i = 0; i < CODE_RANGES; i++)
		if (LIKELY_NOT((uintptr_t)caller - libc_code[i].start < libc_code[i].bytes))
			return true;
	return false;
}

static int note_code(struct dl_phdr_info *info, size_t size, void *arg)
{
	const char *slash = strrchr(info->dlpi_name, '/'), *name = slash ? slash + 1 : info->dlpi_name;

	(void)size, (void)arg;
	if (strncmp(name, "libc.so", 7) && strncmp(name, "ld-", 3))
		return 0;
	for (int i = 0; i < info->dlpi_phnum && code_count < CODE_RANGES; i++) {
		const ElfW(Phdr) *header = &info->dlpi_phdr[i];

		if (header->p_type == PT_LOAD && header->p_flags & PF_X) {
			libc_code[code_count].start = info->dlpi_addr + header->p_vaddr;
			libc_code[code_count++].bytes = header->p_memsz;
		}
	}
	return 0;
}

/* ---- arenas ---- */

static void *alloc_inside(extent_hooks_t *hooks, void *wanted, size_t bytes, size_t alignment, bool *zero,
			  bool *commit, unsigned arena)
{
	struct gmem_visit visit;
	bool entered = gmem_enter(&visit);
	void *at = inner.alloc(hooks, wanted, bytes, alignment, zero, commit, arena);

	if (entered)
		gmem_leave(&visit);
	return at;
}

static bool purge_inside(extent_hooks_t *hooks, void *at, size_t all, size_t offset, size_t bytes, unsigned arena)
{
	struct gmem_visit visit;
	bool entered = gmem_enter(&visit), refused = inner.purge_forced(hooks, at, all, offset, bytes, arena);

	if (entered)
		gmem_leave(&visit);
	return refused;
}

static bool purge_lazy_inside(extent_hooks_t *hooks, void *at, size_t all, size_t offset, size_t bytes, unsigned arena)
{
	struct gmem_visit visit;
	bool entered = gmem_enter(&visit), refused = inner.purge_lazy(hooks, at, all, offset, bytes, arena);

	if (entered)
		gmem_leave(&visit);
	return refused;
}

int gmem_any_heap_init(void)
{
	long cpus = sysconf(_SC_NPROCESSORS_ONLN);
	int err = 0;

	dl_iterate_phdr(note_code, NULL);
	if (gmem_any.session) {
		err = gmem_extents_init(&extents, gmem_any.session, gmem_any.base, gmem_any.window_bytes,
					gmem_any.page_bytes);
		programs_start = gmem_any.base;
		programs_bytes = gmem_any.window_bytes;
		extents.added = gmem_any_add_heap;
		inner = extents.hooks;
		extents.hooks.alloc = alloc_inside;
		extents.hooks.purge_forced = purge_inside;
		extents.hooks.purge_lazy = inner.purge_lazy ? purge_lazy_inside : NULL;
	}
	arena_count = cpus > 0 ? (unsigned)cpus * ARENAS_PER_CPU : 1;
	arena_count = arena_count > ARENAS_MAX ? ARENAS_MAX : arena_count;
	return err;
}

void gmem_any_heap_lock(void)
{
	pthread_mutex_lock(&arenas_lock);
	gmem_allocator_fork.before();
}

void gmem_any_heap_unlock(void)
{
	pthread_mutex_unlock(&arenas_lock);
}

/* Gives this thread an arena. If none can be had it stays with the automatic one. */
__attribute__((noinline)) static void bind_thread(void)
{
	unsigned index = atomic_fetch_add(&next_thread, 1) % arena_count;
	struct gmem_visit visit;

	if (!gmem_enter(&visit))
		return;
	bound = true;
	pthread_mutex_lock(&arenas_lock);
	if (arenas[index] || !gmem_extents_arena(gmem_any.session ? &extents : NULL, &arenas[index]))
		gmem_je_mallctl("thread.arena", NULL, NULL, &arenas[index], sizeof(arenas[index]));
	if (arenas[index])
		plain_to_ours = (int)MALLOCX_ARENA(arenas[index]) | MALLOCX_TCACHE_NONE;
	pthread_mutex_unlock(&arenas_lock);
	gmem_leave(&visit);
}

/* ---- whose memory it is, or is to be ---- */

static inline bool is_programs(const void *at)
{
	return !LIKELY_NOT((uintptr_t)at - programs_start >= programs_bytes);
}

enum whose { PROGRAMS, LIBCS, OURS };

__attribute__((noinline)) static enum whose whose_slow(const void *caller)
{
	if (gmem_inside)
		return OURS;
	if (is_libc(caller) || atomic_load(&gmem_any_state) == GMEM_ANY_STARTING)
		return LIBCS;
	bind_thread();
	return PROGRAMS;
}

static inline enum whose whose(const void *caller)
{
	if (LIKELY_NOT(!bound || gmem_inside || is_libc(caller)))
		return whose_slow(caller);
	return PROGRAMS;
}

__attribute__((noinline)) static void *allocate_slow(enum whose whose, size_t bytes, size_t alignment)
{
	void *at;

	if (whose == OURS)
		at = gmem_notes_malloc(bytes > alignment ? bytes : alignment);
	else
		at = gmem_je_mallocx(bytes + !bytes, PLAIN | (alignment ? MALLOCX_ALIGN(alignment) : 0));
	if (!at)
		errno = ENOMEM;
	return at;
}

static void *aligned(const void *caller, size_t alignment, size_t bytes)
{
	enum whose owner = whose(caller);
	void *at = NULL;
	int err;

	if (owner != PROGRAMS)
		return allocate_slow(owner, bytes, alignment);
	err = gmem_je_posix_memalign(&at, alignment < sizeof(void *) ? sizeof(void *) : alignment, bytes);
	if (err)
		errno = err;
	return err ? NULL : at;
}

__attribute__((noinline)) static void *resize_slow(enum whose whose, void *at, size_t bytes)
{
	void *to;

	if (!at)
		return allocate_slow(whose, bytes, 0);
	if (gmem_notes_own(at)) { /* the C library's, on our behalf: it may be the program's call now */
		to = gmem_notes_realloc(at, bytes);
	} else if (!bytes) {
		gmem_je_dallocx(at, MALLOCX_TCACHE_NONE);
		return NULL;
	} else {
		to = gmem_je_rallocx(at, bytes, whose == PROGRAMS ? plain_to_ours : PLAIN);
	}
	if (!to)
		errno = ENOMEM;
	return to;
}

static void *resize(const void *caller, void *at, size_t bytes)
{
	enum whose owner = whose(caller);

	if (!LIKELY_NOT(owner != PROGRAMS) && (!at || is_programs(at)))
		return gmem_je_realloc(at, bytes);
	return resize_slow(owner, at, bytes);
}

/* Past the thread's cache, from which the program is served. */
__attribute__((noinline)) static void free_slow(void *at)
{
	if (gmem_notes_own(at))
		gmem_notes_free(at);
	else if (atomic_load(&gmem_any_state) == GMEM_ANY_PLAIN && !gmem_inside)
		gmem_je_free(at);
	else if (at)
		gmem_je_dallocx(at, MALLOCX_TCACHE_NONE);
}

/* ---- the family ---- */

void *in_malloc(size_t bytes) IN_PLACE_OF("malloc");
void *in_malloc(size_t bytes)
{
	enum whose owner = whose(CALLER);

	return LIKELY_NOT(owner != PROGRAMS) ? allocate_slow(owner, bytes, 0) : gmem_je_malloc(bytes);
}

void *in_calloc(size_t count, size_t bytes) IN_PLACE_OF("calloc");
void *in_calloc(size_t count, size_t bytes)
{
	enum whose owner = whose(CALLER);
	size_t total;
	void *at;

	if (!LIKELY_NOT(owner != PROGRAMS))
		return gmem_je_calloc(count, bytes);
	if (__builtin_mul_overflow(count, bytes, &total)) {
		errno = ENOMEM;
		return NULL;
	}
	at = allocate_slow(owner, total, 0);
	return at ? memset(at, 0, total) : NULL;
}

void *in_realloc(void *at, size_t bytes) IN_PLACE_OF("realloc");
void *in_realloc(void *at, size_t bytes)
{
	return resize(CALLER, at, bytes);
}

void *in_reallocarray(void *at, size_t count, size_t bytes) IN_PLACE_OF("reallocarray");
void *in_reallocarray(void *at, size_t count, size_t bytes)
{
	size_t total;

	if (__builtin_mul_overflow(count, bytes, &total)) {
		errno = ENOMEM;
		return NULL;
	}
	return resize(CALLER, at, total);
}

void in_free(void *at) IN_PLACE_OF("free");
void in_free(void *at)
{
	if (!LIKELY_NOT(gmem_inside) && is_programs(at))
		gmem_je_free(at);
	else
		free_slow(at);
}

int in_posix_memalign(void **ret, size_t alignment, size_t bytes) IN_PLACE_OF("posix_memalign");
int in_posix_memalign(void **ret, size_t alignment, size_t bytes)
{
	enum whose owner = whose(CALLER);
	int before = errno;
	void *at;

	if (alignment < sizeof(void *) || alignment & (alignment - 1))
		return EINVAL;
	if (!LIKELY_NOT(owner != PROGRAMS))
		return gmem_je_posix_memalign(ret, alignment, bytes);
	at = allocate_slow(owner, bytes, alignment);
	errno = before;
	if (at)
		*ret = at;
	return at ? 0 : ENOMEM;
}

static bool is_alignment(size_t alignment)
{
	if (alignment && !(alignment & (alignment - 1)))
		return true;
	errno = EINVAL;
	return false;
}

void *in_aligned_alloc(size_t alignment, size_t bytes) IN_PLACE_OF("aligned_alloc");
void *in_aligned_alloc(size_t alignment, size_t bytes)
{
	return is_alignment(alignment) ? aligned(CALLER, alignment, bytes) : NULL;
}

void *in_memalign(size_t alignment, size_t bytes) IN_PLACE_OF("memalign");
void *in_memalign(size_t alignment, size_t bytes)
{
	return is_alignment(alignment) ? aligned(CALLER, alignment, bytes) : NULL;
}

void *in_valloc(size_t bytes) IN_PLACE_OF("valloc");
void *in_valloc(size_t bytes)
{
	return aligned(CALLER, (size_t)sysconf(_SC_PAGESIZE), bytes);
}

void *in_pvalloc(size_t bytes) IN_PLACE_OF("pvalloc");
void *in_pvalloc(size_t bytes)
{
	size_t page = (size_t)sysconf(_SC_PAGESIZE);

	if (bytes > SIZE_MAX - page) {
		errno = ENOMEM;
		return NULL;
	}
	return aligned(CALLER, page, (bytes + page - 1) & ~(page - 1));
}

size_t in_malloc_usable_size(void *at) IN_PLACE_OF("malloc_usable_size");
size_t in_malloc_usable_size(void *at)
{
	return gmem_notes_own(at) ? gmem_notes_size(at) : gmem_je_malloc_usable_size(at);
}

/* Copies of the program's own, which else the C library would allocate as its. */
char *in_strdup(const char *text) IN_PLACE_OF("strdup");
char *in_strdup(const char *text)
{
	size_t bytes = strlen(text) + 1;
	char *at = in_malloc(bytes);

	return at ? memcpy(at, text, bytes) : NULL;
}

char *in_strndup(const char *text, size_t most) IN_PLACE_OF("strndup");
char *in_strndup(const char *text, size_t most)
{
	size_t length = strnlen(text, most);
	char *at = in_malloc(length + 1);

	if (!at)
		return NULL;
	at[length] = '\0';
	return memcpy(at, text, length);
}

/* glibc's own names, for those that go past interposition on purpose. */
void *in_libc_malloc(size_t bytes) IN_PLACE_OF("__libc_malloc");
void *in_libc_malloc(size_t bytes)
{
	return in_malloc(bytes);
}

void *in_libc_calloc(size_t count, size_t bytes) IN_PLACE_OF("__libc_calloc");
void *in_libc_calloc(size_t count, size_t bytes)
{
	return in_calloc(count, bytes);
}

void *in_libc_realloc(void *at, size_t bytes) IN_PLACE_OF("__libc_realloc");
void *in_libc_realloc(void *at, size_t bytes)
{
	return resize(CALLER, at, bytes);
}

void *in_libc_memalign(size_t alignment, size_t bytes) IN_PLACE_OF("__libc_memalign");
void *in_libc_memalign(size_t alignment, size_t bytes)
{
	return is_alignment(alignment) ? aligned(CALLER, alignment, bytes) : NULL;
}

void in_libc_free(void *at) IN_PLACE_OF("__libc_free");
void in_libc_free(void *at)
{
	in_free(at);
}
