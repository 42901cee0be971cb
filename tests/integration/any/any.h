/* SPDX-License-Identifier: Apache-2.0
 *
 * Programs that know nothing of gmem, run by `gmemctl run`. They look at addresses to see whether memory is managed.
 */
#ifndef ANY_H
#define ANY_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define MIB (1ul << 20)

#define CHECK(condition)                                                                                        \
	do {                                                                                                    \
		if (!(condition)) {                                                                             \
			fprintf(stderr, "%s:%d: not true: %s (errno %d)\n", __FILE__, __LINE__, #condition, errno); \
			exit(1);                                                                                \
		}                                                                                               \
	} while (0)

static inline bool is_managed(const void *at)
{
	return (uintptr_t)at >= 0x660000000000 && (uintptr_t)at < 0x700000000000;
}

static inline bool all(const void *at, size_t bytes, int value)
{
	const unsigned char *byte = at;

	for (size_t i = 0; i < bytes; i++)
		if (byte[i] != (unsigned char)value)
			return false;
	return true;
}

static inline void *map(size_t bytes, int prot)
{
	void *at = mmap(NULL, bytes, prot, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(at != MAP_FAILED);
	return at;
}

/* The child's exit status. */
static inline int wait_for(pid_t child)
{
	int status;

	CHECK(child > 0 && waitpid(child, &status, 0) == child);
	CHECK(WIFEXITED(status));
	return WEXITSTATUS(status);
}

#endif
