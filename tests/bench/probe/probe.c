/* SPDX-License-Identifier: Apache-2.0
 *
 * What client_rows.py measures with: loops of touches and copies over addresses that it is given, so that no Python
 * runs between two readings of the clock. Linked with floor.c into a shared object.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>

#include "../../unit_c/harness.h"
#include "../order.h"

uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

void *shared_bytes(size_t bytes)
{
	void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	CHECK(at != MAP_FAILED);
	return at;
}

/* Of the calling process, before anything is timed in it. */
void probe_prepare(void)
{
	prctl(PR_SET_TIMERSLACK, 1000); /* naps as short as asked for */
}

void probe_die_with_parent(void)
{
	prctl(PR_SET_PDEATHSIG, SIGKILL);
}

static void nap(unsigned us)
{
	struct timespec pause = { 0, us * 1000l };

	if (us)
		nanosleep(&pause, NULL);
}

/* WRITE does not read first: on a page that is elsewhere, reading before writing is two faults. */
enum access { READ, WRITE, INCREMENT };

static uint64_t touch(volatile uint8_t *at, enum access access)
{
	uint64_t start = now_ns();

	if (access == READ)
		(void)*at;
	else if (access == WRITE)
		*at = 1;
	else
		(*at)++;
	return now_ns() - start;
}

/* Minor faults: drops the translations of two ranges (their pages stay), then touches pages of both in turn, each after
 * a nap. bare NULL: one range only. Each of ours_ns and bare_ns gets rounds * pages times. */
void probe_faults(uint8_t *ours, uint8_t *bare, uint64_t page_bytes, uint32_t pages, unsigned rounds, unsigned nap_us,
		  uint64_t *ours_ns, uint64_t *bare_ns)
{
	for (unsigned round = 0; round < rounds; round++) {
		uint32_t *order = random_order(pages);

		CHECK(!madvise(ours, pages * page_bytes, MADV_DONTNEED));
		CHECK(!bare || !madvise(bare, pages * page_bytes, MADV_DONTNEED));
		for (uint32_t i = 0; i < pages; i++) {
			for (unsigned turn = 0; turn < 2; turn++) {
				bool mine = turn == (i & 1);

				if (!mine && !bare)
					continue;
				nap(nap_us);
				*(mine ? ours_ns++ : bare_ns++) =
					touch((mine ? ours : bare) + order[i] * page_bytes, INCREMENT);
			}
		}
		free(order);
	}
}

/* Touches each page once: in order without a pause (nap_us 0), else in random order, each after a nap. Returns the time
 * of the touches alone, in ns; ns gets each of them. */
uint64_t probe_touches(uint8_t *at, uint64_t page_bytes, uint32_t pages, bool write, unsigned nap_us, uint64_t *ns)
{
	uint32_t *order = random_order(pages);
	uint64_t sum = 0;

	for (uint32_t i = 0; i < pages; i++) {
		nap(nap_us);
		ns[i] = touch(at + (nap_us ? order[i] : i) * page_bytes, write ? WRITE : READ);
		sum += ns[i];
	}
	free(order);
	return sum;
}

/* The same pages by memcpy. */
uint64_t probe_copies(uint8_t *dst, const uint8_t *src, uint64_t page_bytes, uint32_t pages, unsigned nap_us,
		      uint64_t *ns)
{
	uint32_t *order = random_order(pages);
	uint64_t sum = 0;

	for (uint32_t i = 0; i < pages; i++) {
		uint64_t at = (nap_us ? order[i] : i) * page_bytes, start;

		nap(nap_us);
		start = now_ns();
		memcpy(dst + at, src + at, page_bytes);
		ns[i] = now_ns() - start;
		sum += ns[i];
	}
	free(order);
	return sum;
}
