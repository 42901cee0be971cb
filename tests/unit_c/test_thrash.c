/* SPDX-License-Identifier: Apache-2.0
 *
 * Thrash control: CPU and device count in words of one page, which bounces until it is held: both get their share, and no
 * step is lost. What it gains is for `make bench ONLY=thrash`.
 */
#define _GNU_SOURCE
#include "harness.h"

#include <gmem/internal.h>
#include <gmem/thrash.h>
#include <stdatomic.h>

#define PARTIES 2

struct shared {
	volatile bool ready, stop;
	volatile uint64_t va;
	uint64_t page_bytes;
	bool reads_only; /* the second party reads the first one's word */
	_Atomic uint64_t steps[PARTIES], bad;
	_Atomic int done;
};

static struct shared *shared;

static void count_up(int me)
{
	volatile uint64_t *words = (volatile uint64_t *)shared->va, mine = 0, seen = 0;

	while (!shared->stop) {
		if (me && shared->reads_only) {
			atomic_fetch_add(&shared->bad, words[0] < seen);
			seen = words[0];
		} else {
			atomic_fetch_add(&shared->bad, words[me] != mine);
			words[me] = ++mine;
		}
		atomic_fetch_add_explicit(&shared->steps[me], 1, memory_order_relaxed);
	}
	atomic_fetch_add(&shared->done, 1);
}

static int device_side(struct client *client, void *arg)
{
	(void)client, (void)arg;
	while (!shared->ready)
		sleep_ms(1);
	count_up(1);
	return 0;
}

static int host_side(struct client *client, void *arg)
{
	(void)arg;
	shared->va = (uint64_t)client_mmap(client, 4 * shared->page_bytes, shared->page_bytes, GMEM_FORK_SHARE);
	shared->ready = true;
	count_up(0);
	while (shared->done < PARTIES)
		sleep_ms(1);
	return 0;
}

static void run(uint64_t page_bytes, bool reads_only)
{
	struct gmem_core *core = core_start((struct gmem_core_config){ .event_fork = true, .hold_ns = 500000 });
	uint64_t until = now_ns() + 20000000000ull;
	struct client *client, *context;
	struct gmem_core_stats stats;

	memset(shared, 0, sizeof(*shared));
	shared->page_bytes = page_bytes;
	shared->reads_only = reads_only;
	CHECK_EQ(attach_simgpu(core, "simgpu0", "capacity=64M"), 1);
	client = client_start(core, host_side, NULL);
	context = context_start(client, 1, device_side, NULL);
	do { /* on a busy machine threads that get their turn late do not bounce much */
		sleep_ms(50);
		gmem_core_stats(core, &stats);
	} while (now_ns() < until && (stats.throttled_faults < 10 || !shared->steps[0] || !shared->steps[1]));
	shared->stop = true;
	CHECK_EQ(client_wait(context), 0);
	CHECK_EQ(client_wait(client), 0);
	CHECK_EQ(shared->bad, 0);
	CHECK(stats.throttled_faults >= 10 && shared->steps[0] && shared->steps[1]);
	printf("%lu KiB, %s: %lu and %lu steps, %lu faults, %lu throttled\n", page_bytes >> 10,
	       reads_only ? "writer and reader" : "two writers", shared->steps[0], shared->steps[1],
	       stats.host_faults + stats.device_faults, stats.throttled_faults);
	core_settle(core);
	gmem_core_destroy(core);
}

/* The judgement itself, with a clock of its own. */
static void check_judgement(void)
{
	struct gmem_core *core = core_start((struct gmem_core_config){ .hold_ns = 500000 });
	struct gmem_page page = { .core = core, .bytes = 4096 };
	uint64_t now = (1ull << 40) + 100000000, until;

	CHECK_EQ(attach_simgpu(core, "simgpu0", "capacity=4M"), 1);
	page.word = gmem_word_set_writer(gmem_word_set_valid(0, 1u << 0), 0);
	CHECK(gmem_thrash_takes(&page, 1, true) && gmem_thrash_takes(&page, 1, false));
	CHECK(!gmem_thrash_takes(&page, 0, true) && !gmem_thrash_takes(&page, 0, false));
	for (int i = 0; i < 4; i++, now += 100000) {
		CHECK_EQ(gmem_thrash_until(&page, 1, true, now), 0);
		gmem_thrash_note(&page, now);
	}
	until = gmem_thrash_until(&page, 1, true, now);
	CHECK(until > now && until < now + 700000);
	CHECK(gmem_thrash_bounces(&page, now));
	CHECK_EQ(gmem_thrash_until(&page, 0, true, now), 0); /* who has it goes on */
	CHECK_EQ(gmem_thrash_until(&page, 1, true, until + 70000), 0);
	gmem_thrash_note(&page, until + 70000); /* as soon as it may: it goes on */
	CHECK(gmem_thrash_until(&page, 1, true, until + 140000) > 0);
	gmem_thrash_note(&page, until + 5000000); /* calm since */
	CHECK_EQ(gmem_thrash_until(&page, 1, true, until + 5100000), 0);
	/* copies to read beside each other, and tiers, are nobody's loss */
	page.word = gmem_word_set_writer(gmem_word_set_valid(page.word, 3u), -1);
	CHECK(!gmem_thrash_takes(&page, 1, false) && gmem_thrash_takes(&page, 1, true));
	CHECK_EQ(gmem_word_state(page.word), gmem_word_state(0));
	gmem_core_destroy(core);
}

int main(void)
{
	shared = shared_bytes(sizeof(*shared));
	check_judgement();
	run(4096, false);
	run(65536, false);
	run(4096, true);
	return 0;
}
