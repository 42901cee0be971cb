/* SPDX-License-Identifier: Apache-2.0
 *
 * adopted DEVICE KERNELS.SO [allocator]: what a program's allocator does to memory that has been adopted. MADV_DONTNEED reads zero
 * afterwards, MADV_FREE may, and nothing beside is lost. allocator: by whatever malloc() there is.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include "check.h"

#define PAGE 4096ul
#define MIB (1ul << 20)

static struct gmem *session;
static int hnid;

static uint8_t *anonymous(size_t bytes)
{
	uint8_t *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(at != MAP_FAILED);
	return at;
}

static void adopt(void *at, size_t bytes)
{
	struct gmem_range range;

	OK(gmem_adopt(session, at, bytes, NULL, &range));
	CHECK(range.bytes);
}

static bool all(const uint8_t *at, size_t bytes, int value)
{
	for (size_t i = 0; i < bytes; i++)
		if (at[i] != (uint8_t)value)
			return false;
	return true;
}

static uint64_t frames(const void *at, size_t bytes)
{
	struct gmem_page pages[1024];
	uint64_t there = 0;
	size_t count;

	OK(gmem_query(session, at, bytes, pages, 1024, &count));
	for (size_t i = 0; i < count; i++)
		there += pages[i].state != GMEM_PAGE_NOMAP;
	return there;
}

/* Pages of 64 KiB that begin anywhere: parts of them are zeroed, whole ones given back, wherever they are. */
static void test_dropped(bool on_device)
{
	size_t bytes = 4 * MIB + 3 * PAGE;
	uint8_t *at = anonymous(bytes + 5 * PAGE) + 5 * PAGE;

	memset(at, 7, bytes);
	adopt(at, bytes);
	memset(at, 8, bytes);
	if (on_device)
		OK(gmem_prefetch(session, hnid, at, 3 * MIB));
	for (size_t first = 0; first < 40; first += 13)
		for (size_t count = 1; count < 40; count += 6) {
			uint8_t *from = at + MIB / 2 + first * PAGE, *to = from + count * PAGE;

			CHECK(!madvise(from, count * PAGE - 1, MADV_DONTNEED)); /* to the end of a page, as the kernel has it */
			CHECK(all(from, count * PAGE, 0) && all(from - PAGE, PAGE, 8) && all(to, PAGE, 8));
			memset(from, 8, count * PAGE);
		}
	CHECK(all(at, bytes, 8));
	CHECK(!madvise(at + MIB, 2 * MIB, MADV_DONTNEED));
	CHECK(frames(at + MIB + 64 * 1024, 2 * MIB - 128 * 1024) == 0); /* it is really given back */
	CHECK(all(at, MIB, 8) && all(at + MIB, 2 * MIB, 0) && all(at + 3 * MIB, bytes - 3 * MIB, 8));
	CHECK(!madvise(at, bytes, MADV_DONTNEED) && all(at, bytes, 0));
	memset(at, 9, bytes);
	CHECK(!madvise(at, bytes, MADV_FREE));
	CHECK(frames(at + 64 * 1024, 4 * MIB - 128 * 1024) == 0);
	memset(at, 3, MIB);
	CHECK(all(at, MIB, 3));
	CHECK(!munmap(at, bytes));
}

/* What is adopted, what is not, what has moved, and what may not be written to. */
static void test_mixed(void)
{
	uint8_t *at = anonymous(8 * MIB), *to = anonymous(2 * MIB);

	memset(at, 5, 8 * MIB);
	adopt(at + MIB, MIB);
	adopt(at + 3 * MIB, MIB);
	CHECK(!madvise(at + PAGE, 5 * MIB, MADV_DONTNEED));
	CHECK(all(at, PAGE, 5) && all(at + PAGE, 5 * MIB, 0) && all(at + PAGE + 5 * MIB, 3 * MIB - PAGE, 5));
	memset(at, 6, 8 * MIB);
	CHECK(!madvise(at, 5 * MIB, MADV_FREE)); /* the kernel alone would refuse it */
	memset(at, 6, 8 * MIB);
	CHECK(all(at, 8 * MIB, 6));
	CHECK(!mprotect(at + MIB, MIB, PROT_NONE));
	CHECK(!madvise(at + MIB + PAGE, MIB - 2 * PAGE, MADV_DONTNEED));
	CHECK(!mprotect(at + MIB, MIB, PROT_READ));
	CHECK(all(at + MIB, PAGE, 6) && all(at + MIB + PAGE, MIB - 2 * PAGE, 0) && all(at + 2 * MIB - PAGE, PAGE, 6));
	CHECK(mremap(at + 3 * MIB, MIB, MIB, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to && all(to, MIB, 6));
	CHECK(!madvise(to + PAGE, MIB, MADV_DONTNEED)); /* and a page behind it */
	CHECK(all(to, PAGE, 6) && all(to + PAGE, 2 * MIB - PAGE, 0));
	CHECK(madvise(at + 3 * MIB, MIB, MADV_DONTNEED) == -1 && errno == ENOMEM); /* nothing is mapped there */
	CHECK(madvise(at + 1, PAGE, MADV_DONTNEED) == -1 && errno == EINVAL);
	errno = 77;
	CHECK(!madvise(at, 0, MADV_DONTNEED) && errno == 77);
	/* freed, and something plain there instead */
	CHECK(!munmap(to, MIB));
	CHECK(mmap(to, MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == to);
	memset(to, 4, MIB);
	CHECK(!madvise(to, PAGE, MADV_DONTNEED) && all(to, PAGE, 0) && all(to + PAGE, MIB - PAGE, 4));
	CHECK(!munmap(at, 8 * MIB));
	CHECK(!munmap(to, 2 * MIB));
}

struct neighbour {
	volatile uint64_t *words; /* one in every other page */
	size_t count;
	atomic_bool stop;
	atomic_ulong rounds;
};

static void *count(void *arg)
{
	struct neighbour *side = arg;

	for (uint64_t n = 0; !side->stop; n++) {
		for (size_t i = 0; i < side->count; i++) {
			volatile uint64_t *word = &side->words[i * 2 * PAGE / 8];

			if (*word != n)
				FAILED("%llu instead of %llu in page %zu", (unsigned long long)*word, (unsigned long long)n, 2 * i);
			*word = n + 1;
		}
		side->rounds = n + 1;
	}
	return NULL;
}

/* Another thread counts in the pages between those that are dropped, which are parts of the same pages of gmemd. */
static void test_neighbours(void)
{
	size_t bytes = 2 * MIB;
	uint8_t *at = anonymous(bytes);
	struct neighbour side = { (volatile uint64_t *)(void *)at, bytes / PAGE / 2, false, 0 };
	pthread_t thread;

	adopt(at, bytes);
	CHECK(!pthread_create(&thread, NULL, count, &side));
	for (int round = 0; round < 40 || side.rounds < 20; round++)
		for (size_t i = 1; i < bytes / PAGE; i += 2 * (1 + (size_t)round % 5)) {
			uint8_t *page = at + i * PAGE;

			memset(page, round + 1, PAGE);
			if (round % 10 == 9 && i % 64 == 1)
				gmem_prefetch(session, hnid, page, PAGE); /* if there is room */
			CHECK(!madvise(page, PAGE, MADV_DONTNEED));
			CHECK(all(page, PAGE, 0));
		}
	side.stop = true;
	CHECK(!pthread_join(thread, NULL));
	CHECK(!munmap(at, bytes));
}

static void test_fork(void)
{
	uint8_t *at = anonymous(2 * MIB);
	int status;
	pid_t child;

	memset(at, 2, 2 * MIB);
	adopt(at, 2 * MIB);
	child = fork();
	if (!child) {
		CHECK(!madvise(at, MIB + PAGE, MADV_DONTNEED));
		CHECK(all(at, MIB + PAGE, 0) && all(at + MIB + PAGE, MIB - PAGE, 2));
		_exit(0);
	}
	CHECK(child > 0 && waitpid(child, &status, 0) == child && !status);
	CHECK(all(at, 2 * MIB, 2));
	CHECK(!munmap(at, 2 * MIB));
}

/* Blocks are written, adopted, freed and asked for again: calloc()'s read zero, whatever the allocator knows. */
static void test_allocator(void)
{
	static uint8_t *blocks[16];

	for (int round = 0; round < 6; round++) {
		for (int i = 0; i < 16; i++) {
			size_t bytes = (size_t)(1 + i % 5) * MIB / 2;
			struct gmem_range range;

			blocks[i] = calloc(1, bytes);
			CHECK(blocks[i] && all(blocks[i], bytes, 0));
			memset(blocks[i], 0xa0 + i, bytes);
			if (gmem_adopt(session, blocks[i], bytes, NULL, &range))
				CHECK(strstr(gmem_last_error(), "managed"));
			CHECK(all(blocks[i], bytes, 0xa0 + i));
		}
		for (int i = 0; i < 16; i++) {
			CHECK(all(blocks[i], (size_t)(1 + i % 5) * MIB / 2, 0xa0 + i));
			free(blocks[i]);
		}
	}
}

int main(int argc, char **argv)
{
	CHECK(argc >= 3);
	OK(gmem_open(NULL, NULL, &session));
	hnid = hnid_of(session, argv[1]);
	if (argc > 3) {
		test_allocator();
	} else {
		test_dropped(false);
		test_dropped(true);
		test_mixed();
		test_neighbours();
		test_fork();
	}
	OK(gmem_close(session));
	printf("adopted: ok\n");
	return 0;
}
