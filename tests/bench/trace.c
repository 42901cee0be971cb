/* SPDX-License-Identifier: Apache-2.0
 *
 * What recording costs: the look whether anybody records, which every access pays; one access put down, by one thread and by
 * two at once; and faults with a recording going on beside the same faults without.
 */
#define _GNU_SOURCE
#include "bench.h"

#include <sys/mman.h>

#include <gmem/trace.h>

#define REPETITIONS 9
#define LOOKS 20000000u
#define BUFFER_BYTES (64 * MIB)
#define ADDS 400000u /* of each thread; less than the buffer holds */
#define PAGES 256
#define ROUNDS 16

/* ---- the look ---- */

static double look_ns(const struct gmem_trace *trace)
{
	uint64_t start = now_ns(), seen = 0;

	for (unsigned i = 0; i < LOOKS; i++) {
		__asm__ volatile("" ::: "memory");
		seen += gmem_trace_is_on(trace);
	}
	CHECK_EQ(seen, 0);
	return (double)(now_ns() - start) / LOOKS;
}

static double loop_ns(void)
{
	uint64_t start = now_ns();

	for (unsigned i = 0; i < LOOKS; i++)
		__asm__ volatile("" ::: "memory");
	return (double)(now_ns() - start) / LOOKS;
}

static void look_row(void)
{
	const struct row row = { "trace_off", "ns", "value <= 2", "the loop alone" };
	struct gmem_trace trace;
	struct pairs pairs = { 0 };

	gmem_trace_init(&trace);
	for (int r = 0; r < REPETITIONS; r++) {
		double bare = loop_ns();

		pairs_add(&pairs, look_ns(&trace), bare);
	}
	row_print(&row, &pairs, NULL);
	gmem_trace_deinit(&trace);
}

/* ---- one access ---- */

static void *add_many(void *arg)
{
	const struct gmem_access access = { .kind = GMEM_ACCESS_FAULT, .shift = 12 };

	for (unsigned i = 0; i < ADDS; i++)
		gmem_trace_add(arg, 1, access);
	return NULL;
}

static double add_ns(unsigned threads)
{
	const struct gmem_trace_config config = { .hnid = -1, .buffer_bytes = BUFFER_BYTES };
	struct gmem_trace trace;
	struct gmem_access none;
	pthread_t thread;
	uint64_t start, lost;

	gmem_trace_init(&trace);
	CHECK_EQ(gmem_trace_begin(&trace, &config), 0);
	start = now_ns();
	if (threads > 1)
		CHECK(!pthread_create(&thread, NULL, add_many, &trace));
	add_many(&trace);
	if (threads > 1)
		CHECK(!pthread_join(thread, NULL));
	start = now_ns() - start;
	gmem_trace_take(&trace, &none, 1, &lost);
	CHECK_EQ(lost, 0);
	gmem_trace_deinit(&trace);
	return (double)start / (ADDS * threads);
}

static void add_rows(void)
{
	static const struct row rows[] = {
		{ "trace_access_1_thread", "ns", "value <= 150", NULL }, { "trace_access_2_threads", "ns", "value <= 300", NULL },
	};

	for (unsigned threads = 1; threads <= 2; threads++) {
		struct pairs pairs = { 0 };

		for (int r = 0; r < REPETITIONS && row_wanted(rows[threads - 1].id); r++)
			pairs_add(&pairs, add_ns(threads), 0);
		if (pairs.count)
			row_print(&rows[threads - 1], &pairs, NULL);
	}
}

/* ---- faults ---- */

struct shared {
	volatile int turn, done;
	volatile uint64_t ns;
};

static struct shared *shared;

static int storming_client(struct client *client, void *arg)
{
	uint8_t *at = client_mmap(client, PAGES * 4096, 4096, GMEM_FORK_NONE);
	uint32_t *order = random_order(PAGES);

	(void)arg;
	for (int page = 0; page < PAGES; page++)
		at[page * 4096] = 1;
	for (int turn = 1; turn <= 2 * REPETITIONS; turn++) {
		uint64_t start;

		while (shared->turn < turn)
			nap_us(100);
		start = now_ns();
		for (int round = 0; round < ROUNDS; round++) {
			CHECK(!madvise(at, PAGES * 4096, MADV_DONTNEED));
			for (int i = 0; i < PAGES; i++)
				((volatile uint8_t *)at)[order[i] * 4096] = 1;
		}
		shared->ns = now_ns() - start;
		shared->done = turn;
	}
	free(order);
	return 0;
}

static double storm_us(int turn)
{
	shared->turn = turn;
	while (shared->done < turn)
		nap_us(100);
	return (double)shared->ns / 1e3 / (PAGES * ROUNDS);
}

static double recorded_storm_us(struct gmem_core *core, int turn)
{
	const struct gmem_trace_config config = { .hnid = -1, .buffer_bytes = BUFFER_BYTES };
	struct gmem_access accesses[64];
	size_t count, total = 0;
	uint64_t lost;
	double us;

	CHECK_EQ(gmem_trace_start(core, &config), 0);
	us = storm_us(turn);
	gmem_trace_stop(core);
	while ((count = gmem_trace_read(core, accesses, 64, &lost)))
		total += count;
	gmem_trace_close(core);
	CHECK(total + lost + 1 >= PAGES * ROUNDS); /* the last one may come after the stop */
	return us;
}

static void fault_row(void)
{
	const struct row row = { "trace_fault_storm_4k", "us", "ratio <= 1.05", "the same without a recording" };
	struct gmem_core *core = core_start((struct gmem_core_config){ .no_fault_ahead = true });
	struct client *client = client_start(core, storming_client, NULL);
	struct pairs pairs = { 0 };

	for (int r = 0; r < REPETITIONS; r++) {
		double off = storm_us(2 * r + 1);

		pairs_add(&pairs, recorded_storm_us(core, 2 * r + 2), off);
	}
	CHECK_EQ(client_wait(client), 0);
	gmem_core_destroy(core);
	row_print(&row, &pairs, NULL);
}

void trace_rows(void)
{
	shared = shared_bytes(sizeof(*shared));
	if (row_wanted("trace_off"))
		look_row();
	add_rows();
	if (row_wanted("trace_fault_storm_4k"))
		fault_row();
}
