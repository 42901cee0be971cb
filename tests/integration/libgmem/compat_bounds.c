/* SPDX-License-Identifier: Apache-2.0
 *
 * Sizes, addresses and arguments at the edges, and what is refused.
 */
#include "compat.h"

#include <fcntl.h>

#define FLAGS (MAP_PRIVATE | MAP_ANONYMOUS | MAP_PEER_SHARED)
#define RW (PROT_READ | PROT_WRITE)
#define ADVISE(hnid, at, bytes, behaviour) hmadvise(hnid, number(at), bytes, behaviour)

static int hnid;

static void free_eager(void)
{
	uint8_t *data = peer_memory(4 * PAGE);
	unsigned long at = number(data);

	memset(data, 7, 4 * PAGE);
	CHECK(!gmemFreeEager(at, 2, NULL));
	CHECK(!gmemFreeEager(at, 0, NULL));
	CHECK(!gmemFreeEager(at + 1, PAGE, NULL));
	CHECK(!gmemFreeEager(at, PAGE - 1, NULL));
	CHECK(all(data, 4 * PAGE, 7));
	CHECK(!gmemFreeEager(at + 1, 3 * PAGE - 2, NULL)); /* one whole page, the second */
	CHECK(all(data, PAGE, 7) && all(data + PAGE, PAGE, 0) && all(data + 2 * PAGE, 2 * PAGE, 7));
	GIVES(gmemFreeEager(~0ul, 2, NULL), EINVAL);
	GIVES(gmemFreeEager(~0ul, 1, NULL), EINVAL);
	GIVES(gmemFreeEager(at, (size_t)-1, NULL), EINVAL);
	GIVES(gmemFreeEager(~0ul - 255, 16, NULL), EINVAL); /* beyond the end once it is rounded */
	CHECK(all(data + 2 * PAGE, 2 * PAGE, 7));
	CHECK(!gmemFreeEager(0, ~0ul - PAGE, NULL)); /* everything: what is not peer-shared is passed over */
	CHECK(all(data, 4 * PAGE, 0));
	CHECK(!munmap(data, 4 * PAGE));
	CHECK(!gmemFreeEager(at, 4 * PAGE, NULL)); /* nothing there */
}

static void prefetch(void)
{
	uint8_t *data = peer_memory(3 * PAGE), ordinary[16];
	unsigned long at = number(data);
	long before, after, home;

	data[PAGE] = 1;
	moved(&before, &home);
	CHECK(!gmemPrefetch(at + PAGE + 5, 2, hnid, NULL)); /* outward: the page */
	moved(&after, &home);
	CHECK(after == before + 1);
	CHECK(data[PAGE] == 1);
	CHECK(!gmemPrefetch(at + PAGE - 1, 2, hnid, NULL)); /* two pages */
	CHECK(!gmemPrefetch(at + 1, 0, hnid, NULL));
	CHECK(!gmemPrefetch(at, 3 * PAGE, 0, NULL)); /* the host */
	GIVES(gmemPrefetch(at, PAGE, -1, NULL), EINVAL);
	GIVES(gmemPrefetch(at, PAGE, 99, NULL), EINVAL);
	GIVES(gmemPrefetch(at, PAGE, 1 << 20, NULL), EINVAL);
	GIVES(gmemPrefetch(at, 0, 99, NULL), EINVAL);
	GIVES(gmemPrefetch(at, 3 * PAGE + 1, hnid, NULL), EINVAL);
	GIVES(gmemPrefetch(number(ordinary), 16, hnid, NULL), EINVAL);
	GIVES(gmemPrefetch(~0ul, 2, hnid, NULL), EINVAL);
	GIVES(gmemPrefetch(~0ul - 16, 2, hnid, NULL), EINVAL);
	GIVES(gmemPrefetch(at, (size_t)-1, hnid, NULL), EINVAL);
	CHECK(!munmap(data, 3 * PAGE));
	GIVES(gmemPrefetch(at, PAGE, hnid, NULL), EINVAL);
}

static void holes(void)
{
	uint8_t *data = peer_memory(5 * PAGE);
	unsigned long at = number(data);

	memset(data, 3, 5 * PAGE);
	CHECK(!munmap(data + 2 * PAGE, PAGE));
	GIVES(gmemPrefetch(at, 5 * PAGE, hnid, NULL), EINVAL);
	CHECK(!gmemPrefetch(at, 2 * PAGE, hnid, NULL));
	CHECK(all(data, 2 * PAGE, 3));
	CHECK(!gmemFreeEager(at + PAGE, 3 * PAGE, NULL)); /* on both sides of the hole */
	CHECK(all(data, PAGE, 3) && all(data + PAGE, PAGE, 0));
	CHECK(all(data + 3 * PAGE, PAGE, 0) && all(data + 4 * PAGE, PAGE, 3));
	REFUSED(hmemcpy(-1, at, at + PAGE, PAGE + 1), EINVAL); /* into it */
	CHECK(!munmap(data, 5 * PAGE)); /* a hole is nothing wrong */
}

/* Regions that happen to lie side by side are one range. */
static void several(void)
{
	enum { COUNT = 4 };
	uint8_t *each[COUNT], *low, *high;

	for (int i = 0; i < COUNT; i++) {
		each[i] = peer_memory(PAGE);
		memset(each[i], i + 1, PAGE);
	}
	for (int i = 0; i < COUNT; i++) {
		for (int k = 0; k < COUNT; k++) {
			low = each[i];
			high = each[k];
			if (high != low + PAGE)
				continue;
			CHECK(!gmemPrefetch(number(low), 2 * PAGE, hnid, NULL));
			CHECK(!hmemcpy(-1, number(low) + 100, number(high) + 100, 50));
			CHECK(all(low + 100, 50, (uint8_t)(k + 1)) && low[99] == i + 1 && low[150] == i + 1);
		}
		CHECK(each[i][0] == i + 1);
	}
	CHECK(!gmemFreeEager(0, ~0ul - PAGE, NULL));
	for (int i = 0; i < COUNT; i++) {
		CHECK(all(each[i], PAGE, 0));
		CHECK(!munmap(each[i], PAGE));
	}
}

static void advice(void)
{
	uint8_t *data = peer_memory(2 * PAGE);

	CHECK(!ADVISE(hnid, data, 1, MADV_PREFETCH));
	CHECK(!ADVISE(hnid, data, 1, 26));
	CHECK(!ADVISE(hnid, data, 1, 32));
	CHECK(!ADVISE(hnid, data, PAGE, MADV_PINNED));
	CHECK(!ADVISE(hnid, data, PAGE, MADV_UNPINNED));
	data[0] = 9;
	CHECK(!ADVISE(-1, data, PAGE, MADV_DONTNEED) && data[0] == 0);
	data[0] = 9;
	CHECK(!ADVISE(hnid, data, PAGE, MADV_DONTNEED) && data[0] == 0);
	CHECK(!ADVISE(-1, data, 0, MADV_DONTNEED));
	CHECK(!ADVISE(hnid, data, 0, MADV_PREFETCH));
	REFUSED(ADVISE(-1, data, PAGE, MADV_PREFETCH), EINVAL);
	REFUSED(ADVISE(-2, data, PAGE, MADV_DONTNEED), EINVAL);
	REFUSED(ADVISE(77, data, PAGE, MADV_DONTNEED), EINVAL);
	REFUSED(ADVISE(77, data, 1, MADV_DONTNEED), EINVAL);
	REFUSED(ADVISE(77, data, PAGE, MADV_PINNED), EINVAL);
	REFUSED(ADVISE(hnid, data, PAGE, 0), EINVAL);
	REFUSED(ADVISE(hnid, data, PAGE, 0x1003), EINVAL);
	REFUSED(hmadvise(-1, ~0ul, 2, MADV_DONTNEED), EINVAL);
	REFUSED(hmadvise(hnid, ~0ul, 2, MADV_PREFETCH), EINVAL);
	CHECK(!munmap(data, 2 * PAGE));
}

static void copies(void)
{
	uint8_t *data = peer_memory(4 * PAGE), ordinary[16];
	unsigned long at = number(data);

	for (size_t i = 0; i < 2 * PAGE; i++)
		data[i] = (uint8_t)(i * 7);
	CHECK(!hmemcpy(hnid, at + 2 * PAGE + 3, at + 5, PAGE + 11)); /* any alignment, to the device */
	for (size_t i = 0; i < PAGE + 11; i++)
		CHECK(data[2 * PAGE + 3 + i] == (uint8_t)((i + 5) * 7));
	CHECK(data[2 * PAGE + 2] == 0 && data[2 * PAGE + 3 + PAGE + 11] == 0);
	CHECK(!hmemcpy(-1, at + 3 * PAGE, at + 1, 1) && data[3 * PAGE] == 7);
	CHECK(!hmemcpy(-1, at, at + PAGE, 0));
	REFUSED(hmemcpy(-2, at, at + PAGE, 1), EINVAL);
	REFUSED(hmemcpy(50, at, at + PAGE, 1), EINVAL);
	REFUSED(hmemcpy(50, at, at + PAGE, 0), EINVAL);
	REFUSED(hmemcpy(-1, number(ordinary), at, 8), EINVAL);
	REFUSED(hmemcpy(-1, at, number(ordinary), 8), EINVAL);
	REFUSED(hmemcpy(-1, at, number(ordinary), 0), EINVAL);
	REFUSED(hmemcpy(-1, at, at + 3 * PAGE, PAGE + 1), EINVAL);
	REFUSED(hmemcpy(-1, at, at + 10, 100), EINVAL); /* overlapping */
	REFUSED(hmemcpy(-1, at, at + PAGE, (size_t)-1), EINVAL);
	CHECK(!mprotect(data + PAGE, PAGE, PROT_READ));
	REFUSED(hmemcpy(-1, at + PAGE, at, 8), EINVAL);
	REFUSED(hmemcpy(-1, at + PAGE - 8, at + 3 * PAGE, 16), EINVAL);
	CHECK(!hmemcpy(-1, at, at + PAGE, 8)); /* the source need not be */
	CHECK(!munmap(data, 4 * PAGE));
}

static void mappings(void)
{
	uint8_t *data = peer_memory(5), *other;
	int file = open("/proc/self/exe", O_RDONLY);

	CHECK(file >= 0);
	CHECK(all(data, PAGE, 0)); /* a whole page stands behind it */
	REFUSED(munmap(data + 4096, 4096), EINVAL);
	REFUSED(munmap(data + 1, PAGE), EINVAL);
	REFUSED(munmap(data, 0), EINVAL);
	CHECK(!munmap(data, 5)); /* rounded up */
	REFUSED(madvise(data, 4096, MADV_NORMAL), ENOMEM);
	REFUSED(mmap(NULL, 0, RW, FLAGS, -1, 0), EINVAL);
	REFUSED(mmap(NULL, PAGE, RW, MAP_SHARED | MAP_ANONYMOUS | MAP_PEER_SHARED, -1, 0), EINVAL);
	REFUSED(mmap(NULL, PAGE, RW, FLAGS | MAP_HUGETLB, -1, 0), EINVAL);
	REFUSED(mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE | MAP_PEER_SHARED, file, 0), EINVAL);
	REFUSED(mmap((void *)0x10000000, PAGE, RW, FLAGS | MAP_FIXED, -1, 0), EINVAL);
	REFUSED(mmap(NULL, PAGE, RW, FLAGS, -1, 5), EINVAL);
	REFUSED(mmap(NULL, (size_t)-1, RW, FLAGS, -1, 0), ENOMEM);
	REFUSED(mmap(NULL, 1ul << 46, RW, FLAGS, -1, 0), ENOMEM); /* more than there could ever be */
	data = mmap((void *)0x10000000, PAGE, RW, FLAGS | MAP_POPULATE, 77, 0); /* a hint, a descriptor: of no matter */
	CHECK(data != MAP_FAILED && all(data, PAGE, 0));
	/* something else in its place */
	other = mmap(data, PAGE, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	CHECK(other == data);
	GIVES(gmemPrefetch(number(data), PAGE, hnid, NULL), EINVAL);
	other[0] = 1;
	CHECK(!munmap(other, PAGE));
	close(file);
}

int main(void)
{
	hnid = gmemGetNumaId();
	CHECK(hnid > 0);
	free_eager();
	prefetch();
	holes();
	several();
	advice();
	copies();
	mappings();
	return 0;
}
