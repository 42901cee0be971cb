/* SPDX-License-Identifier: Apache-2.0
 *
 * A program that knows nothing of gmem, as `gmemctl run` has it. usage: anyprog malloc|compute|fork|spawn; prints
 * nanoseconds of one operation.
 */
#define _GNU_SOURCE
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define SLOTS 20000
#define ALLOCATIONS 5000000
#define WORDS (4ul << 20) /* of each of three arrays: 32 MiB */
#define SWEEPS 20
#define FORK_BYTES (64ul << 20)
#define FORKS 5
#define SPAWNS 40

extern char **environ;

static double now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (double)now.tv_sec * 1e9 + (double)now.tv_nsec;
}

/* Sizes as trees, strings and small arrays have them; what is allocated is written to. */
static double allocate(void)
{
	static char *slots[SLOTS];
	unsigned seed = 1;
	double start = now_ns();

	for (int i = 0; i < ALLOCATIONS; i++) {
		int at = rand_r(&seed) % SLOTS;
		size_t bytes = (size_t)rand_r(&seed) % (i % 64 ? 500 : 20000) + 1;

		free(slots[at]);
		slots[at] = malloc(bytes);
		slots[at][0] = slots[at][bytes - 1] = 1;
	}
	return (now_ns() - start) / ALLOCATIONS;
}

/* STREAM's triad, its first touches included. */
static double compute(void)
{
	double *a = malloc(WORDS * 8), *b = malloc(WORDS * 8), *c = malloc(WORDS * 8), start = now_ns();

	for (size_t i = 0; i < WORDS; i++) {
		b[i] = 1;
		c[i] = 2;
	}
	for (int sweep = 0; sweep < SWEEPS; sweep++) {
		for (size_t i = 0; i < WORDS; i++)
			a[i] = b[i] + 3 * c[i];
		b[sweep] += a[WORDS - 1];
	}
	return (now_ns() - start) / SWEEPS / WORDS;
}

static double fork_children(void)
{
	char *heap = malloc(FORK_BYTES);
	double start;

	memset(heap, 1, FORK_BYTES);
	start = now_ns();
	for (int i = 0; i < FORKS; i++) {
		pid_t child = fork();

		if (!child)
			_exit(heap[i] != 1);
		waitpid(child, NULL, 0);
	}
	return (now_ns() - start) / FORKS;
}

static double spawn_programs(void)
{
	char *const command[] = { "true", NULL };
	double start = now_ns();

	for (int i = 0; i < SPAWNS; i++) {
		pid_t child;

		if (posix_spawn(&child, "/bin/true", NULL, NULL, command, environ))
			return 0;
		waitpid(child, NULL, 0);
	}
	return (now_ns() - start) / SPAWNS;
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "";
	double ns = !strcmp(what, "malloc")  ? allocate() :
		    !strcmp(what, "compute") ? compute() :
		    !strcmp(what, "fork")    ? fork_children() :
		    !strcmp(what, "spawn")   ? spawn_programs() : 0;

	printf("%.3f\n", ns);
	return ns > 0 ? 0 : 1;
}
