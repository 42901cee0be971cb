/* SPDX-License-Identifier: Apache-2.0
 *
 * Fault-ahead: a sequence of touches faults seldom, whatever has to be done for the pages, and the content is right; a
 * random order gets nothing it did not ask for, and a full hnode is not emptied for a guess.
 */
#define _GNU_SOURCE
#include "harness.h"

#include <sys/mman.h>

#define PAGES 256

enum where { UNTOUCHED, PRESENT, ELSEWHERE, WHERES };

struct shared {
	uint64_t page_bytes;
	enum where where;
	bool write, backwards;
	int gpu;
	volatile int step;
};

static struct shared *shared;

static void wait_step(int step)
{
	while (shared->step != step)
		sleep_ms(1);
}

static uint64_t pages(void)
{
	return shared->page_bytes == 2 << 20 ? 16 : PAGES;
}

static void touch_all(volatile uint64_t *at)
{
	for (uint64_t i = 0; i < pages(); i++) {
		uint64_t page = shared->backwards ? pages() - 1 - i : i;
		volatile uint64_t *word = at + page * shared->page_bytes / 8 + page % 8;

		CHECK_EQ(*word, shared->where == UNTOUCHED ? 0 : page + 1);
		if (shared->write)
			*word = page + 1000;
	}
	for (uint64_t page = 0; shared->write && page < pages(); page++)
		CHECK_EQ(at[page * shared->page_bytes / 8 + page % 8], page + 1000);
}

static int client_side(struct client *client, void *arg)
{
	uint64_t bytes = pages() * shared->page_bytes;
	volatile uint64_t *at = client_mmap(client, bytes, shared->page_bytes, GMEM_FORK_SHARE);

	(void)arg;
	for (uint64_t page = 0; shared->where != UNTOUCHED && page < pages(); page++)
		at[page * shared->page_bytes / 8 + page % 8] = page + 1;
	if (shared->where == ELSEWHERE)
		CHECK_EQ(client_prefetch(client, shared->gpu, (void *)at, bytes), 0);
	else if (shared->where == PRESENT)
		CHECK(!madvise((void *)at, bytes, MADV_DONTNEED));
	shared->step = 1;
	wait_step(2);
	touch_all(at);
	shared->step = 3;
	wait_step(4);
	return 0;
}

/* Returns how many faults the touches took, and how many pages came ahead. */
static uint64_t run(struct gmem_core *core, uint64_t page_bytes, enum where where, bool write, bool backwards,
		    uint64_t *ret_ahead)
{
	struct gmem_core_stats before, after;
	struct client *client;

	shared->page_bytes = page_bytes;
	shared->where = where;
	shared->write = write;
	shared->backwards = backwards;
	shared->step = 0;
	client = client_start(core, client_side, NULL);
	wait_step(1);
	gmem_core_stats(core, &before);
	shared->step = 2;
	wait_step(3);
	gmem_core_stats(core, &after);
	shared->step = 4;
	CHECK_EQ(client_wait(client), 0);
	core_settle(core);
	*ret_ahead = after.ahead_pages - before.ahead_pages;
	return after.host_faults - before.host_faults;
}

static void test_sequences(struct gmem_core *core)
{
	static const uint64_t sizes[] = { 4096, 65536, 2 << 20 };
	static const char *const names[WHERES] = { "untouched", "present", "elsewhere" };

	for (size_t s = 0; s < 3; s++)
		for (int where = 0; where < WHERES; where++)
			for (int write = 0; write < 2; write++) {
				uint64_t ahead, faults = run(core, sizes[s], (enum where)where, write, false, &ahead);

				printf("%lu KiB, %s, %s: %lu pages, %lu faults, %lu ahead\n", sizes[s] >> 10, names[where],
				       write ? "written" : "read", pages(), faults, ahead);
				/* a thread that touches a word of 2 MiB may well be there first */
				CHECK(ahead >= (sizes[s] == 2 << 20 ? 2 : pages() / 2));
			}
}

int main(void)
{
	struct gmem_core *core;
	uint64_t ahead;

	shared = shared_bytes(sizeof(*shared));
	core = core_start((struct gmem_core_config){ .event_fork = true });
	shared->gpu = attach_simgpu(core, "simgpu0", "capacity=64M");
	test_sequences(core);
	run(core, 4096, ELSEWHERE, false, true, &ahead);
	CHECK_EQ(ahead, 0);
	gmem_core_destroy(core);
	core = core_start((struct gmem_core_config){ .event_fork = true, .no_fault_ahead = true });
	CHECK_EQ(run(core, 4096, UNTOUCHED, true, false, &ahead), pages());
	CHECK_EQ(ahead, 0);
	gmem_core_destroy(core);
	printf("ahead: ok\n");
	return 0;
}
