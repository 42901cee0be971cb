/* SPDX-License-Identifier: Apache-2.0
 *
 * For programs that know openEuler's interface only: <libgmem.h>, <sys/mman.h> and the C library. A failed check says
 * where and what, and ends the program.
 */
#ifndef COMPAT_H
#define COMPAT_H

#define _GNU_SOURCE
#include <errno.h>
#include <libgmem.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define PAGE (2ul << 20)

#define FAILED(...)                                                                                  \
	do {                                                                                         \
		fprintf(stderr, "%s:%d: ", __FILE__, __LINE__);                                      \
		fprintf(stderr, __VA_ARGS__);                                                        \
		fprintf(stderr, " (errno: %s)\n", strerror(errno));                                  \
		_exit(1);                                                                            \
	} while (0)

#define CHECK(condition)                                                                             \
	do {                                                                                         \
		if (!(condition))                                                                    \
			FAILED("not true: %s", #condition);                                          \
	} while (0)

/* As gmem... functions fail: -errno; as system calls do: -1 and errno. */
#define GIVES(call, number)                                                                          \
	do {                                                                                         \
		long got_ = (call);                                                                  \
		if (got_ != -(number))                                                               \
			FAILED("%s gave %ld, not -%s", #call, got_, #number);                        \
	} while (0)

#define REFUSED(call, number)                                                                        \
	do {                                                                                         \
		errno = 0;                                                                           \
		long got_ = (long)(call);                                                            \
		if (got_ != -1 || errno != (number))                                                 \
			FAILED("%s gave %ld, not -1 with %s", #call, got_, #number);                 \
	} while (0)

static inline uint8_t *peer_memory(size_t bytes)
{
	void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_PEER_SHARED, -1, 0);

	CHECK(at != MAP_FAILED);
	CHECK((uintptr_t)at % PAGE == 0);
	return at;
}

static inline unsigned long number(const void *at)
{
	return (unsigned long)at;
}

/* Whether all bytes of the range have that value. */
static inline int all(const uint8_t *at, size_t bytes, uint8_t value)
{
	for (size_t i = 0; i < bytes; i++)
		if (at[i] != value)
			return 0;
	return 1;
}

static inline void moved(long *ret_to_device, long *ret_to_host)
{
	FILE *file = fopen("/proc/gmemstat", "r");

	CHECK(file);
	CHECK(fscanf(file, "migrating H2D     : %ld\nmigrating D2H     : %ld\n", ret_to_device, ret_to_host) == 2);
	CHECK(fgetc(file) == EOF);
	fclose(file);
}

#endif
