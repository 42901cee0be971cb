/* SPDX-License-Identifier: Apache-2.0
 *
 * Touches that follow no sequence, of pages whose content is on a device: with guesses, and with every page fetched by its own
 * fault. All pages in random order, of which the later ones come with their block; one in eight, for which a guess would be
 * wrong; every third one in order.
 */
#define _GNU_SOURCE
#include "bench.h"

#include <stdatomic.h>

#define REPETITIONS 7
#define BYTES (16 * MIB)

enum order { SHUFFLED, SPARSE, STRIDED, ORDERS };

struct shared {
	uint64_t page_bytes, ns, touched;
	enum order order;
	int gpu;
	atomic_int step;
};

static struct shared *shared;

static void wait_step(int step)
{
	while (shared->step != step)
		nap_us(100);
}

/* Every eighth page, at no fixed distance. */
static bool is_sparse(uint32_t page)
{
	return page % 8 == page / 8 * 5 % 8;
}

static uint64_t touch(volatile uint8_t *at)
{
	uint32_t pages = (uint32_t)(BYTES / shared->page_bytes), *order = random_order(pages);
	uint64_t start = now_ns(), touched = 0, sum = 0;

	for (uint32_t i = 0; i < pages; i++) {
		uint32_t page = shared->order == STRIDED ? i : order[i];

		if ((shared->order == SPARSE && !is_sparse(page)) || (shared->order == STRIDED && page % 3))
			continue;
		sum += at[page * shared->page_bytes];
		touched++;
	}
	shared->ns = now_ns() - start;
	shared->touched = touched;
	free(order);
	return sum;
}

static int client_side(struct client *client, void *arg)
{
	volatile uint8_t *at = client_mmap(client, BYTES, shared->page_bytes, GMEM_FORK_SHARE);

	(void)arg;
	for (uint64_t i = 0; i < BYTES; i += shared->page_bytes)
		at[i] = 1;
	CHECK_EQ(client_prefetch(client, shared->gpu, (void *)at, BYTES), 0);
	shared->step = 1;
	wait_step(2);
	CHECK_EQ(touch(at), shared->touched);
	shared->step = 3;
	wait_step(4);
	return 0;
}

/* Microseconds and faults for each page that is touched. */
static void measure(const struct size *size, bool guesses, double *ret_us, double *ret_faults)
{
	struct gmem_core *core = core_start((struct gmem_core_config){ .no_fault_ahead = !guesses });
	struct gmem_core_stats before, after;
	struct client *client;

	shared->page_bytes = size->page_bytes;
	shared->step = 0;
	shared->gpu = attach_simgpu(core, "simgpu0", "capacity=64M");
	client = client_start(core, client_side, NULL);
	wait_step(1);
	gmem_core_stats(core, &before);
	shared->step = 2;
	wait_step(3);
	gmem_core_stats(core, &after);
	shared->step = 4;
	*ret_us = (double)shared->ns / 1e3 / (double)shared->touched;
	*ret_faults = (double)(after.host_faults - before.host_faults) / (double)shared->touched;
	CHECK_EQ(client_wait(client), 0);
	gmem_core_destroy(core);
}

void density(void)
{
	static const struct size sizes[] = { { "4k", 4 * KIB }, { "64k", 64 * KIB } };
	static const char *const names[ORDERS] = { "density_random", "density_sparse", "density_stride" };
	static const char *const faults_target[ORDERS] = { "ratio <= 0.6", "ratio <= 1.0", "ratio <= 0.5" };
	static const char *const time_target[ORDERS] = { "ratio <= 1.0", "ratio <= 1.05", "ratio <= 1.0" };

	shared = shared_bytes(sizeof(*shared));
	for (int order = 0; order < ORDERS; order++)
		for (size_t s = 0; s < 2; s++) {
			struct pairs times = { 0 }, counts = { 0 };
			char id[48], counted[64];

			snprintf(id, sizeof(id), "%s_%s", names[order], sizes[s].name);
			snprintf(counted, sizeof(counted), "%s_faults", id);
			if (!row_wanted(id))
				continue;
			shared->order = (enum order)order;
			for (int r = 0; r < REPETITIONS; r++) {
				double us[2], faults[2];

				measure(&sizes[s], true, &us[0], &faults[0]);
				measure(&sizes[s], false, &us[1], &faults[1]);
				pairs_add(&times, us[0], us[1]);
				pairs_add(&counts, faults[0], faults[1]);
			}
			row_print(&(struct row){ id, "us", time_target[order], "a fault for each page" }, &times, NULL);
			row_print(&(struct row){ counted, "faults", faults_target[order], "a fault for each page" }, &counts, NULL);
		}
}
