/* SPDX-License-Identifier: Apache-2.0
 *
 * gmem_malloc() and gmem_free() beside the same allocator without gmem: an arena and a cache of its own, with
 * jemalloc's default hooks, in a shared library (probe/allocator.c) as programs have it. usage: heap REPETITIONS
 * A line for each size and repetition: bytes, ns a pair with gmem, ns a pair without.
 */
#include <jemalloc/jemalloc.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include <gmem.h>

#define BATCH 64
#define BATCHES 50
#define SLICES 41

void *gmem_je_mallocx(size_t bytes, int flags);
void gmem_je_dallocx(void *at, int flags);
int gmem_je_mallctl(const char *name, void *old, size_t *old_bytes, void *new, size_t new_bytes);

static struct gmem *session;
static int flags;

static void *plain_malloc(size_t bytes)
{
	return gmem_je_mallocx(bytes, flags);
}

static void plain_free(void *at)
{
	gmem_je_dallocx(at, flags);
}

static void *managed_malloc(size_t bytes)
{
	return gmem_malloc(session, bytes);
}

static void managed_free(void *at)
{
	gmem_free(session, at);
}

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

static double pair_ns(void *(*take)(size_t), void (*give)(void *), size_t bytes)
{
	void *at[BATCH];
	uint64_t start = now_ns();

	for (int b = 0; b < BATCHES; b++) {
		for (int i = 0; i < BATCH; i++) {
			at[i] = take(bytes);
			if (!at[i])
				exit(1);
			*(volatile char *)at[i] = 1;
		}
		for (int i = 0; i < BATCH; i++)
			give(at[i]);
	}
	return (double)(now_ns() - start) / ((double)BATCH * BATCHES);
}

static int by_value(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

/* Medians of short slices, taken in turn: what else the machine does meanwhile hits both alike. */
static void compare(size_t bytes, double *ret_managed, double *ret_plain)
{
	double managed[SLICES], plain[SLICES];

	for (int i = 0; i < SLICES; i++) {
		managed[i] = pair_ns(managed_malloc, managed_free, bytes);
		plain[i] = pair_ns(plain_malloc, plain_free, bytes);
	}
	qsort(managed, SLICES, sizeof(managed[0]), by_value);
	qsort(plain, SLICES, sizeof(plain[0]), by_value);
	*ret_managed = managed[SLICES / 2];
	*ret_plain = plain[SLICES / 2];
}

int main(int argc, char **argv)
{
	static const size_t sizes[] = { 64, 4096, 65536 };
	unsigned arena, cache;
	size_t bytes = sizeof(arena);

	if (argc != 2 || gmem_open(NULL, NULL, &session)) {
		fprintf(stderr, "heap: %s\n", argc == 2 ? gmem_last_error() : "usage: heap REPETITIONS");
		return 2;
	}
	if (gmem_je_mallctl("arenas.create", &arena, &bytes, NULL, 0) ||
	    gmem_je_mallctl("tcache.create", &cache, &bytes, NULL, 0))
		return 1;
	flags = MALLOCX_ARENA(arena) | MALLOCX_TCACHE(cache);
	for (size_t s = 0; s < sizeof(sizes) / sizeof(sizes[0]); s++) {
		for (int r = -1; r < atoi(argv[1]); r++) { /* the first one warms memory up */
			double managed, plain;

			compare(sizes[s], &managed, &plain);
			if (r >= 0)
				printf("%zu %g %g\n", sizes[s], managed, plain);
		}
	}
	return gmem_close(session) ? 1 : 0;
}
