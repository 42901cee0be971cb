/* SPDX-License-Identifier: Apache-2.0
 *
 * mmap() and munmap() of plain memory as a program under libgmem-preload.so has them, beside libc's own, which are found
 * past it. usage: LD_PRELOAD=libgmem-preload.so preload REPETITIONS
 * A line for each size and repetition: bytes, ns a pair with the library, ns a pair without.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define PAIRS 200
#define SLICES 201

struct functions {
	void *(*mmap)(void *at, size_t bytes, int prot, int flags, int fd, off_t offset);
	int (*munmap)(void *at, size_t bytes);
};

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

static double pair_ns(const struct functions *f, size_t bytes)
{
	uint64_t start = now_ns();

	for (int i = 0; i < PAIRS; i++) {
		void *at = f->mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		if (at == MAP_FAILED || f->munmap(at, bytes))
			exit(1);
	}
	return (double)(now_ns() - start) / PAIRS;
}

static int by_value(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

/* Medians of short slices, taken in turn: what else the machine does meanwhile hits both alike. */
static void compare(const struct functions *both, size_t bytes, double ret[2])
{
	static double ns[2][SLICES];

	for (int i = 0; i < SLICES; i++)
		for (int k = 0; k < 2; k++)
			ns[k ^ (i & 1)][i] = pair_ns(&both[k ^ (i & 1)], bytes);
	for (int k = 0; k < 2; k++) {
		qsort(ns[k], SLICES, sizeof(ns[k][0]), by_value);
		ret[k] = ns[k][SLICES / 2];
	}
}

static void find(void *library, const char *name, void *ret)
{
	void *found = dlsym(library, name);

	if (!found) {
		fprintf(stderr, "preload: %s\n", dlerror());
		exit(2);
	}
	memcpy(ret, &found, sizeof(found));
}

int main(int argc, char **argv)
{
	static const size_t sizes[] = { 4096, 1 << 20 };
	struct functions both[2];
	void *libc = dlopen("libc.so.6", RTLD_NOW | RTLD_NOLOAD);

	if (argc != 2 || !libc) {
		fprintf(stderr, "usage: preload REPETITIONS\n");
		return 2;
	}
	for (int k = 0; k < 2; k++) {
		find(k ? libc : RTLD_DEFAULT, "mmap", &both[k].mmap);
		find(k ? libc : RTLD_DEFAULT, "munmap", &both[k].munmap);
	}
	if (both[0].mmap == both[1].mmap || both[0].munmap == both[1].munmap) {
		fprintf(stderr, "preload: libgmem-preload.so is not loaded\n");
		return 2;
	}
	for (size_t s = 0; s < sizeof(sizes) / sizeof(sizes[0]); s++) {
		for (int r = -1; r < atoi(argv[1]); r++) { /* the first one warms everything up */
			double ns[2];

			compare(both, sizes[s], ns);
			if (r >= 0)
				printf("%zu %g %g\n", sizes[s], ns[0], ns[1]);
		}
	}
	return 0;
}
