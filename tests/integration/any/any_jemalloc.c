/* SPDX-License-Identifier: Apache-2.0
 *
 * A program with an allocator of its own inside: jemalloc, which maps its memory, drops it by MADV_DONTNEED and counts on zeros; and
 * what programs ask of the C library's allocator beside malloc().
 */
#include "any.h"

#include <malloc.h>
#include <pthread.h>

#define BLOCKS 24
#define ROUNDS 8
#define THREADS 3

void *gmem_je_malloc(size_t bytes);
void *gmem_je_calloc(size_t count, size_t bytes);
void *gmem_je_realloc(void *at, size_t bytes);
void gmem_je_free(void *at);
int gmem_je_mallctl(const char *name, void *old, size_t *old_bytes, void *new, size_t new_bytes);
int gmem_je_atfork(void (*prepare)(void), void (*parent)(void), void (*child)(void));

int gmem_je_atfork(void (*prepare)(void), void (*parent)(void), void (*child)(void))
{
	return pthread_atfork(prepare, parent, child);
}

static size_t bytes_of(int i)
{
	return (size_t)(1 + i % 7) * (MIB / 8) + (size_t)i * 100;
}

static void *churn(void *arg)
{
	unsigned char *blocks[BLOCKS], seed = (unsigned char)(10 * (1 + (uintptr_t)arg));

	for (int round = 0; round < ROUNDS; round++) {
		for (int i = 0; i < BLOCKS; i++) {
			blocks[i] = gmem_je_calloc(1, bytes_of(i));
			CHECK(blocks[i] && all(blocks[i], bytes_of(i), 0));
			memset(blocks[i], seed + i, bytes_of(i));
		}
		for (int i = 0; i < BLOCKS; i += 3) {
			blocks[i] = gmem_je_realloc(blocks[i], 2 * bytes_of(i));
			CHECK(blocks[i] && all(blocks[i], bytes_of(i), seed + i));
		}
		for (int i = 0; i < BLOCKS; i++) {
			CHECK(all(blocks[i], bytes_of(i), seed + i));
			gmem_je_free(blocks[i]);
		}
		CHECK(!gmem_je_mallctl("arena.4096.purge", NULL, NULL, NULL, 0)); /* all arenas */
	}
	return NULL;
}

static void threads(void)
{
	pthread_t running[THREADS];

	for (uintptr_t i = 0; i < THREADS; i++)
		CHECK(!pthread_create(&running[i], NULL, churn, (void *)i));
	for (int i = 0; i < THREADS; i++)
		CHECK(!pthread_join(running[i], NULL));
}

static void forked(void)
{
	unsigned char *block = gmem_je_malloc(4 * MIB);
	pid_t child;

	CHECK(is_managed(block));
	memset(block, 5, 4 * MIB);
	child = fork();
	if (!child) {
		CHECK(all(block, 4 * MIB, 5));
		memset(block, 6, 4 * MIB);
		gmem_je_free(block);
		churn(NULL);
		_exit(21);
	}
	CHECK(wait_for(child) == 21 && all(block, 4 * MIB, 5));
	gmem_je_free(block);
}

/* Of the C library's own allocator, whose place is taken: answered, and without harm. */
static void settings(void)
{
	unsigned char *block = malloc(3 * MIB);

	memset(block, 9, 3 * MIB);
	mallopt(M_MMAP_THRESHOLD, 1 << 16);
	mallopt(M_ARENA_MAX, 1);
	malloc_trim(0);
	(void)mallinfo2();
	CHECK(malloc_usable_size(block) >= 3 * MIB && all(block, 3 * MIB, 9));
	free(block);
}

int main(void)
{
	churn(NULL);
	threads();
	forked();
	settings();
	puts("ok");
	return 0;
}
