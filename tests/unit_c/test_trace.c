/* SPDX-License-Identifier: Apache-2.0
 *
 * The ring that accesses are recorded in: order, what is lost when nobody reads, several writers and a reader at once,
 * beginnings and ends under way. Then a core: what each kind of use leaves in a trace.
 */
#define _GNU_SOURCE
#include "harness.h"

#include <errno.h>
#include <sched.h>

#include <gmem/trace.h>

#define SMALLEST 1024
#define WRITERS 4
#define EACH 200000
#define CLIENT_PAGES 8

static const struct gmem_trace_config everything = { .hnid = -1 };

static struct gmem_access numbered(uint64_t page)
{
	return (struct gmem_access){ .page = page, .kind = GMEM_ACCESS_FAULT, .shift = 12 };
}

static void add(struct gmem_trace *trace, uint64_t first, uint64_t count)
{
	for (uint64_t page = first; page < first + count; page++)
		gmem_trace_add(trace, 7, numbered(page));
}

/* Reads all there is; the pages must be those from first on. */
static uint64_t take(struct gmem_trace *trace, uint64_t first, uint64_t *ret_lost)
{
	struct gmem_access accesses[100];
	uint64_t total = 0, before = 0;
	size_t count;

	while ((count = gmem_trace_take(trace, accesses, 100, ret_lost)) > 0)
		for (size_t i = 0; i < count; i++, total++) {
			CHECK_EQ(accesses[i].page, first + total);
			CHECK_EQ(accesses[i].session, 7);
			CHECK(accesses[i].time_ns >= before);
			before = accesses[i].time_ns;
		}
	return total;
}

static void test_order_and_overflow(void)
{
	struct gmem_trace trace;
	struct gmem_access none;
	uint64_t lost = 99;

	gmem_trace_init(&trace);
	CHECK(!gmem_trace_is_on(&trace));
	add(&trace, 0, 10); /* off */
	CHECK_EQ(gmem_trace_take(&trace, &none, 1, &lost), 0);
	CHECK_EQ(lost, 0);
	CHECK_EQ(gmem_trace_begin(&trace, &everything), 0);
	CHECK_EQ(gmem_trace_begin(&trace, &everything), -EBUSY);
	CHECK(gmem_trace_is_on(&trace));
	add(&trace, 5, SMALLEST + 300);
	CHECK_EQ(take(&trace, 5, &lost), SMALLEST); /* the first ones: what comes too late is dropped */
	CHECK_EQ(lost, 300);
	for (uint64_t lap = 0; lap < 10; lap++) {
		add(&trace, lap * 1000, 700);
		CHECK_EQ(take(&trace, lap * 1000, &lost), 700);
	}
	CHECK_EQ(lost, 300);
	add(&trace, 50, 3);
	gmem_trace_end(&trace);
	add(&trace, 53, 3);
	CHECK_EQ(gmem_trace_begin(&trace, &everything), -EBUSY); /* what is there has not been given up */
	CHECK_EQ(take(&trace, 50, &lost), 3);
	gmem_trace_free(&trace);
	CHECK_EQ(gmem_trace_begin(&trace, &everything), 0);
	CHECK_EQ(take(&trace, 0, &lost), 0);
	CHECK_EQ(lost, 0);
	gmem_trace_deinit(&trace); /* while it is on */
}

static void test_sizes(void)
{
	static const struct { uint64_t bytes, slots; } sizes[] = {
		{ 0, 1024 }, { 40 * 2048 - 1, 1024 }, { 40 * 2048, 2048 }, { 1 << 20, 16384 },
	};

	for (size_t i = 0; i < sizeof(sizes) / sizeof(*sizes); i++) {
		struct gmem_trace_config config = { .hnid = -1, .buffer_bytes = sizes[i].bytes };
		struct gmem_trace trace;
		uint64_t lost;

		gmem_trace_init(&trace);
		CHECK_EQ(gmem_trace_begin(&trace, &config), 0);
		add(&trace, 0, sizes[i].slots + 1);
		CHECK_EQ(take(&trace, 0, &lost), sizes[i].slots);
		CHECK_EQ(lost, 1);
		gmem_trace_deinit(&trace);
	}
}

static void test_filters(void)
{
	struct gmem_trace_config config = { .session = 1ull << 32 | 7, .hnid = 2 };
	struct gmem_access here = { .hnid = 2, .kind = GMEM_ACCESS_FAULT }, there = { .hnid = 1, .kind = GMEM_ACCESS_FAULT };
	struct gmem_access gone = { .hnid = GMEM_ACCESS_NOWHERE, .kind = GMEM_ACCESS_GONE }, read[8];
	struct gmem_trace trace;
	uint64_t lost;

	gmem_trace_init(&trace);
	CHECK_EQ(gmem_trace_begin(&trace, &config), 0);
	gmem_trace_add(&trace, 7, here); /* the same low half */
	gmem_trace_add(&trace, config.session, here);
	gmem_trace_add(&trace, config.session, there);
	there.flags = GMEM_ACCESS_OWNED;
	gmem_trace_add(&trace, config.session, there);
	there.kind = GMEM_ACCESS_PREFETCH; /* leaves no copy on 2 */
	gmem_trace_add(&trace, config.session, there);
	there = (struct gmem_access){ .hnid = 1, .kind = GMEM_ACCESS_FAULT, .flags = GMEM_ACCESS_WRITE };
	gmem_trace_add(&trace, config.session, there);
	gmem_trace_add(&trace, config.session, gone);
	CHECK_EQ(gmem_trace_take(&trace, read, 8, &lost), 4);
	CHECK_EQ(read[0].hnid, 2);
	CHECK_EQ(read[0].session, 7);
	CHECK_EQ(read[1].kind, GMEM_ACCESS_PREFETCH);
	CHECK_EQ(read[2].flags, GMEM_ACCESS_WRITE);
	CHECK_EQ(read[3].kind, GMEM_ACCESS_GONE);
	CHECK_EQ(lost, 0);
	gmem_trace_deinit(&trace);
}

/* ---- several writers, one reader ---- */

struct writer {
	struct gmem_trace *trace;
	uint64_t number;
	atomic_bool *stop; /* NULL: EACH accesses */
};

static void *write_many(void *arg)
{
	struct writer *writer = arg;

	for (uint64_t i = 0; writer->stop ? !atomic_load(writer->stop) : i < EACH; i++) {
		struct gmem_access access = numbered(i);

		access.va = ~i; /* torn records would show */
		gmem_trace_add(writer->trace, writer->number, access);
	}
	return NULL;
}

static void start_writers(struct writer *writers, pthread_t *threads, struct gmem_trace *trace, atomic_bool *stop)
{
	for (uint64_t w = 0; w < WRITERS; w++) {
		writers[w] = (struct writer){ trace, w + 1, stop };
		CHECK(!pthread_create(&threads[w], NULL, write_many, &writers[w]));
	}
}

static void join_writers(pthread_t *threads)
{
	for (int w = 0; w < WRITERS; w++)
		pthread_join(threads[w], NULL);
}

/* next: of each writer the number that may come at the earliest. */
static size_t take_some(struct gmem_trace *trace, uint64_t next[WRITERS + 1], uint64_t *ret_lost)
{
	struct gmem_access accesses[64];
	size_t count = gmem_trace_take(trace, accesses, 64, ret_lost);

	for (size_t i = 0; i < count; i++) {
		const struct gmem_access *access = &accesses[i];

		CHECK(access->session >= 1 && access->session <= WRITERS);
		CHECK_EQ(access->va, ~access->page);
		CHECK(access->page >= next[access->session]);
		next[access->session] = access->page + 1;
	}
	return count;
}

static void test_writers(void)
{
	uint64_t next[WRITERS + 1] = { 0 }, lost = 0, total = 0, idle = 0;
	struct gmem_trace trace;
	struct writer writers[WRITERS];
	pthread_t threads[WRITERS];

	gmem_trace_init(&trace);
	CHECK_EQ(gmem_trace_begin(&trace, &everything), 0);
	start_writers(writers, threads, &trace, NULL);
	while (total + lost < (uint64_t)WRITERS * EACH) {
		size_t count = take_some(&trace, next, &lost);

		total += count;
		idle += !count;
		if (!count)
			sched_yield();
	}
	join_writers(threads);
	CHECK_EQ(take_some(&trace, next, &lost), 0);
	CHECK_EQ(total + lost, (uint64_t)WRITERS * EACH); /* each one was read once, or counted once */
	printf("%lu accesses of %d writers: %lu read, %lu lost\n", total + lost, WRITERS, total, lost);
	gmem_trace_deinit(&trace);
}

/* Whoever is at it when a recording ends must not touch what has been given back, nor write into the next one twice. */
static void test_ends_under_way(void)
{
	struct gmem_trace trace;
	struct writer writers[WRITERS];
	pthread_t threads[WRITERS];
	atomic_bool stop = false;

	gmem_trace_init(&trace);
	start_writers(writers, threads, &trace, &stop);
	for (int round = 0; round < 300; round++) {
		uint64_t next[WRITERS + 1] = { 0 }, lost;

		CHECK_EQ(gmem_trace_begin(&trace, &everything), 0);
		for (int i = 0; i < round % 50; i++)
			take_some(&trace, next, &lost);
		gmem_trace_end(&trace);
		while (take_some(&trace, next, &lost))
			;
		gmem_trace_free(&trace);
	}
	atomic_store(&stop, true);
	join_writers(threads);
	gmem_trace_deinit(&trace);
}

/* ---- a core ---- */

struct shared {
	volatile int step, done;
	int gpu;
	uint64_t va;
};

static struct shared *shared;

static void wait_for(volatile int *what, int value)
{
	while (*what < value)
		sleep_ms(1);
}

static void act(struct client *client, volatile uint8_t *at, int step)
{
	switch (step) {
	case 1:
		at[0] = 1;
		break;
	case 2:
		CHECK_EQ(at[4096], 0);
		break;
	case 3:
		CHECK_EQ(client_prefetch(client, shared->gpu, (void *)at, 2 * 4096), 0);
		break;
	case 4:
		CHECK_EQ(at[0], 1);
		break;
	case 5:
		at[0] = 2;
		break;
	case 6:
		CHECK_EQ(client_discard(client, (void *)at, 4096), 0);
		break;
	case 7:
		CHECK_EQ(client_munmap(client, (void *)at, CLIENT_PAGES * 4096), 0);
		break;
	}
}

static int client_side(struct client *client, void *arg)
{
	volatile uint8_t *at = client_mmap(client, CLIENT_PAGES * 4096, 4096, GMEM_FORK_NONE);

	(void)arg;
	shared->va = (uint64_t)at;
	for (int step = 1; step <= 7; step++) {
		shared->done = step;
		wait_for(&shared->step, step);
		act(client, at, step);
	}
	shared->done = 8;
	wait_for(&shared->step, 8);
	return 0;
}

static int context_side(struct client *context, void *arg)
{
	(void)context, (void)arg;
	CHECK_EQ(*(volatile uint8_t *)(shared->va + 4096), 0);
	wait_for(&shared->step, 8);
	return 0;
}

/* The next access, which may take a moment: a thread goes on before its fault has been written down. */
static struct gmem_access next(struct gmem_core *core)
{
	struct gmem_access access;
	uint64_t lost;

	while (!gmem_trace_read(core, &access, 1, &lost))
		sleep_ms(1);
	CHECK_EQ(lost, 0);
	return access;
}

static void expect(struct gmem_core *core, enum gmem_access_kind kind, uint64_t page, int hnid, uint8_t flags)
{
	struct gmem_access access = next(core);

	CHECK_EQ(access.kind, kind);
	CHECK_EQ(access.page, page);
	CHECK_EQ(access.hnid, hnid);
	CHECK_EQ(access.flags, flags);
	CHECK_EQ(access.shift, 12);
}

static void go(int step)
{
	wait_for(&shared->done, step);
	shared->step = step;
}

static void step_through(struct gmem_core *core, struct client *client)
{
	const uint8_t fresh = GMEM_ACCESS_EMPTY | GMEM_ACCESS_OWNED;
	struct gmem_range second = { shared->va + 4096, 4096 };
	struct client *context;
	struct gmem_access access;
	uint64_t pn;

	go(1);
	access = next(core);
	pn = access.page;
	CHECK_EQ(access.kind, GMEM_ACCESS_FAULT);
	CHECK_EQ(access.flags, fresh | GMEM_ACCESS_WRITE);
	CHECK_EQ(access.session, client->session);
	CHECK_EQ(access.va, shared->va);
	go(2);
	expect(core, GMEM_ACCESS_FAULT, pn + 1, GMEM_HOST, fresh);
	go(3);
	expect(core, GMEM_ACCESS_PREFETCH, pn, shared->gpu, GMEM_ACCESS_OWNED);
	expect(core, GMEM_ACCESS_PREFETCH, pn + 1, shared->gpu, GMEM_ACCESS_OWNED);
	go(4);
	expect(core, GMEM_ACCESS_FAULT, pn, GMEM_HOST, 0);
	go(5);
	expect(core, GMEM_ACCESS_FAULT, pn, GMEM_HOST, GMEM_ACCESS_WRITE | GMEM_ACCESS_RESIDENT | GMEM_ACCESS_OWNED);
	context = context_start(client, shared->gpu, context_side, NULL);
	expect(core, GMEM_ACCESS_FAULT, pn + 1, shared->gpu, GMEM_ACCESS_RESIDENT | GMEM_ACCESS_OWNED);
	CHECK_EQ(gmem_acquire(core, context->context, &second, 1, true, 0), 0);
	expect(core, GMEM_ACCESS_ACQUIRE, pn + 1, shared->gpu, GMEM_ACCESS_WRITE | GMEM_ACCESS_RESIDENT | GMEM_ACCESS_OWNED);
	CHECK_EQ(gmem_release(core, context->context, &second, 1), 0);
	go(6);
	access = next(core);
	CHECK_EQ(access.kind, GMEM_ACCESS_GONE);
	CHECK_EQ(access.page, pn);
	CHECK_EQ(access.va, 1);
	go(7);
	access = next(core);
	CHECK_EQ(access.kind, GMEM_ACCESS_GONE);
	CHECK_EQ(access.page, pn);
	CHECK_EQ(access.va, CLIENT_PAGES);
	CHECK_EQ(access.session, client->session);
	CHECK_EQ(access.hnid, GMEM_ACCESS_NOWHERE);
	go(8);
	CHECK_EQ(client_wait(context), 0);
}

static void test_core(void)
{
	struct gmem_core *core = core_start((struct gmem_core_config){ .no_fault_ahead = true });
	struct gmem_trace_config config = { .hnid = 5, .buffer_bytes = 1 << 20 };
	struct client *client;
	struct gmem_core_features features;

	gmem_core_features(core, &features);
	shared->gpu = attach_simgpu(core, "simgpu0", "capacity=8M");
	CHECK_EQ(gmem_trace_start(core, &config), -ENODEV);
	config.hnid = -1;
	CHECK_EQ(gmem_trace_start(core, &config), 0);
	CHECK_EQ(gmem_trace_start(core, &config), -EBUSY);
	client = client_start(core, client_side, NULL);
	wait_for(&shared->done, 1);
	if (features.continue_wp)
		step_through(core, client);
	else /* no read duplicates: other flags */
		shared->step = 8;
	gmem_trace_close(core);
	CHECK_EQ(client_wait(client), 0);
	CHECK_EQ(gmem_trace_start(core, &config), 0); /* ends with the core */
	gmem_core_destroy(core);
}

/* What a stream of faults fetches ahead is in the trace, as a guess. */
static int streaming_client(struct client *client, void *arg)
{
	volatile uint8_t *at = client_mmap(client, 256 * 4096, 4096, GMEM_FORK_NONE);

	(void)arg;
	for (int page = 0; page < 256; page++)
		at[page * 4096] = 1;
	shared->done = 1;
	wait_for(&shared->step, 1);
	return 0;
}

static void test_stream(void)
{
	struct gmem_core *core = core_start((struct gmem_core_config){ .event_fork = false });
	struct gmem_trace_config config = { .hnid = -1, .buffer_bytes = 1 << 20 };
	struct gmem_core_stats stats;
	struct client *client;
	uint64_t faults = 0, ahead = 0, lost;
	struct gmem_access access;
	bool seen[256] = { false };

	*shared = (struct shared){ 0 };
	CHECK_EQ(gmem_trace_start(core, &config), 0);
	client = client_start(core, streaming_client, NULL);
	wait_for(&shared->done, 1);
	shared->step = 1;
	CHECK_EQ(client_wait(client), 0);
	core_settle(core);
	gmem_trace_stop(core);
	while (gmem_trace_read(core, &access, 1, &lost)) {
		if (access.kind == GMEM_ACCESS_GONE)
			continue;
		CHECK_EQ(access.hnid, GMEM_HOST);
		faults += access.kind == GMEM_ACCESS_FAULT;
		ahead += access.kind == GMEM_ACCESS_AHEAD;
		seen[access.page % 512] = true; /* an extent is a page of words, and begins with one */
	}
	gmem_core_stats(core, &stats);
	CHECK_EQ(lost, 0);
	CHECK(faults > 0 && faults <= stats.host_faults); /* those that met a page at work were not answered */
	CHECK_EQ(ahead, stats.ahead_pages);
	for (int page = 0; page < 256; page++)
		CHECK(seen[page]);
	printf("256 pages in a row: %lu faults, %lu ahead\n", faults, ahead);
	gmem_core_destroy(core);
}

int main(void)
{
	shared = shared_bytes(sizeof(*shared)); /* older than any core */
	test_order_and_overflow();
	test_sizes();
	test_filters();
	test_writers();
	test_ends_under_way();
	test_core();
	test_stream();
	printf("trace: ok\n");
	return 0;
}
