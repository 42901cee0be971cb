/* SPDX-License-Identifier: Apache-2.0
 *
 * A small heap in plain memory for what gmem allocates while it works for a thread (gmem_inside), and for what the C
 * library allocates on its behalf. It takes no lock of another's and calls nobody. Sizes are powers of two; a chunk of
 * addresses serves one size; nothing is given back to the kernel.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <string.h>

#include "any.h"
#include "syscalls.h"

#define CHUNK_SHIFT 22
#define CHUNK_BYTES (1ul << CHUNK_SHIFT)
#define CHUNKS (GMEM_NOTES_BYTES >> CHUNK_SHIFT)
#define SHIFT_LEAST 4
#define SHIFTS (CHUNK_SHIFT + 1)
#define NOWHERE (1ul << 62) /* no address is there */

struct block {
	struct block *next;
};

uintptr_t gmem_notes_base = NOWHERE;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* guards what follows */
static struct block *unused[SHIFTS];
static uintptr_t fresh[SHIFTS], fresh_end[SHIFTS];
static uint8_t shifts[CHUNKS]; /* of the blocks in each chunk */
static size_t chunk_count;

static int shift_of(size_t bytes)
{
	int shift = SHIFT_LEAST;

	while (bytes > 1ul << shift)
		shift++;
	return shift;
}

static bool map_locked(void)
{
	void *at = gmem_sys_mmap(NULL, GMEM_NOTES_BYTES + CHUNK_BYTES, PROT_READ | PROT_WRITE,
				 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (at == MAP_FAILED)
		return false;
	gmem_notes_base = ((uintptr_t)at + CHUNK_BYTES - 1) & ~(CHUNK_BYTES - 1);
	return true;
}

static void *take_locked(int shift)
{
	struct block *block = unused[shift];

	if (block) {
		unused[shift] = block->next;
		return block;
	}
	if (fresh[shift] == fresh_end[shift]) {
		if ((gmem_notes_base == NOWHERE && !map_locked()) || chunk_count == CHUNKS)
			return NULL;
		shifts[chunk_count] = (uint8_t)shift;
		fresh[shift] = gmem_notes_base + (chunk_count++ << CHUNK_SHIFT);
		fresh_end[shift] = fresh[shift] + CHUNK_BYTES;
	}
	fresh[shift] += 1ul << shift;
	return (void *)(fresh[shift] - (1ul << shift));
}

void *gmem_notes_malloc(size_t bytes)
{
	void *at;

	if (bytes > CHUNK_BYTES)
		return NULL;
	pthread_mutex_lock(&lock);
	at = take_locked(shift_of(bytes));
	pthread_mutex_unlock(&lock);
	return at;
}

size_t gmem_notes_size(const void *at)
{
	return 1ul << shifts[((uintptr_t)at - gmem_notes_base) >> CHUNK_SHIFT];
}

void gmem_notes_free(void *at)
{
	struct block *block = at;
	int shift = shifts[((uintptr_t)at - gmem_notes_base) >> CHUNK_SHIFT];

	pthread_mutex_lock(&lock);
	block->next = unused[shift];
	unused[shift] = block;
	pthread_mutex_unlock(&lock);
}

void *gmem_notes_realloc(void *at, size_t bytes)
{
	size_t before = gmem_notes_size(at);
	void *to;

	if (bytes <= before)
		return at;
	to = gmem_notes_malloc(bytes);
	if (to) {
		memcpy(to, at, before);
		gmem_notes_free(at);
	}
	return to;
}

void gmem_notes_lock(void)
{
	pthread_mutex_lock(&lock);
}

void gmem_notes_unlock(void)
{
	pthread_mutex_unlock(&lock);
}
