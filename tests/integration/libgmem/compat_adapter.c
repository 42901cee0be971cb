/* SPDX-License-Identifier: Apache-2.0
 *
 * How an AI framework's memory adapter uses it: libgmem.so is loaded late, for one function; mmap(2) and munmap(2) are
 * libc's, and each freed block is given back by its whole pages.
 */
#include "compat.h"

#include <dlfcn.h>

#define BLOCKS 6
#define BLOCK_BYTES (PAGE + PAGE / 2)

typedef int free_eager_fn(unsigned long, size_t, void *);

static size_t round_up(size_t bytes)
{
	return (bytes + PAGE - 1) & ~(PAGE - 1);
}

int main(int argc, char **argv)
{
	void *library = dlopen(argc > 1 ? argv[1] : "libgmem.so", RTLD_NOW);
	free_eager_fn *free_eager;
	size_t bytes = round_up(BLOCKS * BLOCK_BYTES);
	uint8_t *pool;

	if (!library)
		FAILED("%s", dlerror());
	*(void **)&free_eager = dlsym(library, "gmemFreeEager");
	CHECK(free_eager);
	CHECK(!free_eager(number(&library), bytes, NULL)); /* nothing of its */
	pool = peer_memory(bytes);
	for (int round = 1; round <= 3; round++) {
		for (int i = 0; i < BLOCKS; i++)
			memset(pool + i * BLOCK_BYTES, round * BLOCKS + i, BLOCK_BYTES);
		for (int i = 0; i < BLOCKS; i++) {
			uint8_t *block = pool + i * BLOCK_BYTES, *first = (uint8_t *)round_up(number(block));

			CHECK(all(block, BLOCK_BYTES, (uint8_t)(round * BLOCKS + i)));
			CHECK(!free_eager(number(block), BLOCK_BYTES, NULL));
			CHECK(all(block, (size_t)(first - block), (uint8_t)(round * BLOCKS + i)));
			if (first + PAGE <= block + BLOCK_BYTES)
				CHECK(all(first, PAGE, 0));
		}
	}
	CHECK(!munmap(pool, bytes));
	CHECK(!dlclose(library));
	pool = peer_memory(PAGE); /* goes on after that */
	pool[0] = 1;
	CHECK(!munmap(pool, PAGE));
	return 0;
}
