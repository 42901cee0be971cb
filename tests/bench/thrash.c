/* SPDX-License-Identifier: Apache-2.0
 *
 * CPU and device count in one page at once: what both get done while a page that bounces is held for a while, against what
 * they get done when every fault takes it. Both have the same page size and time.
 */
#define _GNU_SOURCE
#include "bench.h"

#include <stdatomic.h>

#define REPETITIONS 5
#define RUN_US 100000
#define HOLD_NS 500000

struct shared {
	volatile bool ready, stop;
	volatile uint64_t va;
	uint64_t page_bytes;
	_Atomic uint64_t steps[2];
	atomic_int done;
};

static struct shared *shared;

static void count_up(int me)
{
	volatile uint64_t *word = (volatile uint64_t *)shared->va + me;

	for (; !shared->stop; ++*word)
		atomic_fetch_add_explicit(&shared->steps[me], 1, memory_order_relaxed);
	atomic_fetch_add(&shared->done, 1);
}

static int device_side(struct client *client, void *arg)
{
	(void)client, (void)arg;
	while (!shared->ready)
		nap_us(100);
	count_up(1);
	return 0;
}

static int host_side(struct client *client, void *arg)
{
	(void)arg;
	shared->va = (uint64_t)client_mmap(client, shared->page_bytes, shared->page_bytes, GMEM_FORK_SHARE);
	shared->ready = true;
	count_up(0);
	while (shared->done < 2)
		nap_us(100);
	return 0;
}

static double steps_per_us(uint64_t page_bytes, uint64_t hold_ns)
{
	struct gmem_core *core = core_start((struct gmem_core_config){ .hugepages = huge_pages, .hold_ns = hold_ns });
	struct client *client, *context;
	uint64_t start, steps;

	memset(shared, 0, sizeof(*shared));
	shared->page_bytes = page_bytes;
	CHECK_EQ(attach_simgpu(core, "simgpu0", "capacity=64M"), 1);
	client = client_start(core, host_side, NULL);
	context = context_start(client, 1, device_side, NULL);
	while (!shared->steps[0] || !shared->steps[1])
		nap_us(100);
	steps = shared->steps[0] + shared->steps[1];
	start = now_ns();
	nap_us(RUN_US);
	steps = shared->steps[0] + shared->steps[1] - steps;
	start = now_ns() - start;
	shared->stop = true;
	CHECK_EQ(client_wait(context), 0);
	CHECK_EQ(client_wait(client), 0);
	gmem_core_destroy(core);
	return (double)steps / ((double)start / 1e3);
}

void thrash(void)
{
	const struct size sizes[] = SIZES;

	shared = shared_bytes(sizeof(*shared));
	for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
		struct pairs pairs = { 0 };
		char id[32];

		snprintf(id, sizeof(id), "thrash_%s", sizes[i].name);
		for (int r = 0; r < REPETITIONS && row_wanted(id); r++) {
			double held = steps_per_us(sizes[i].page_bytes, HOLD_NS);

			pairs_add(&pairs, held, steps_per_us(sizes[i].page_bytes, 0));
		}
		if (row_wanted(id))
			row_print(&(struct row){ id, "steps/us", "ratio >= 1.0", "pages that bounce are not held" },
				  &pairs, NULL);
	}
}
