/* SPDX-License-Identifier: Apache-2.0
 *
 * Two at once, on disjoint pages, against one alone: threads of one client, and two sessions. In an order that nobody can
 * guess, so that each page is a fault. The same of the bare handler says what the kernel and two CPUs leave room for.
 */
#define _GNU_SOURCE
#include "bench.h"

#include <sys/mman.h>

#define REPETITIONS 7
#define BYTES (4 * MIB)
#define PAGE (4 * KIB)
#define ROUNDS 2

static const uint32_t *order; /* of the pages */

/* Touches a whole range ROUNDS times, all translations dropped before each. */
static void storm(uint8_t *at)
{
	for (int round = 0; round < ROUNDS; round++) {
		CHECK(!madvise(at, BYTES, MADV_DONTNEED));
		for (uint64_t i = 0; i < BYTES / PAGE; i++)
			((volatile uint8_t *)at)[order[i] * PAGE]++;
	}
}

static void *storm_thread(void *arg)
{
	storm(arg);
	return NULL;
}

static double faults_per_us(uint64_t ns, int threads)
{
	return (double)(threads * ROUNDS) * (BYTES / PAGE) / ((double)ns / 1e3);
}

static void two_threads(uint8_t *const at[2], struct pairs *pairs)
{
	uint64_t start = now_ns(), middle;
	pthread_t thread;

	storm(at[0]);
	middle = now_ns();
	CHECK(!pthread_create(&thread, NULL, storm_thread, at[1]));
	storm(at[0]);
	pthread_join(thread, NULL);
	pairs_add(pairs, faults_per_us(now_ns() - middle, 2), faults_per_us(middle - start, 1));
}

/* One alone may happen to run in the scheduler's slow placement, and two would look good beside it. */
static void beside_the_best(struct pairs *pairs)
{
	double best = 0;

	for (size_t i = 0; i < pairs->count; i++)
		best = pairs->floor[i] > best ? pairs->floor[i] : best;
	for (size_t i = 0; i < pairs->count; i++)
		pairs->floor[i] = best;
}

static uint8_t *populated_region(struct client *client)
{
	uint8_t *at = client_mmap(client, BYTES, PAGE, GMEM_FORK_NONE);

	for (uint64_t i = 0; i < BYTES; i += PAGE)
		at[i] = 1;
	return at;
}

static int threaded_client(struct client *client, void *arg)
{
	struct floor *floor = arg;
	struct pairs ours = { 0 }, bare = { 0 };
	struct floor_range range;
	uint8_t *regions[2] = { populated_region(client), populated_region(client) }, *ranges[2];

	CHECK(floor_attach(floor, 2 * BYTES, PAGE, &range));
	ranges[0] = range.at;
	ranges[1] = range.at + BYTES;
	for (int r = 0; r < REPETITIONS; r++) {
		two_threads(regions, &ours);
		two_threads(ranges, &bare);
	}
	beside_the_best(&ours);
	beside_the_best(&bare);
	row_print(&(struct row){ "concurrent_threads_4k", "faults/us", "ratio >= 1.5", "one thread, its best" }, &ours,
		  NULL);
	row_print(&(struct row){ "concurrent_threads_4k_bare", "faults/us", NULL, "one thread, its best, bare handler" },
		  &bare, NULL);
	return 0;
}

/* Sessions take turns: number 0 storms alone, then both at once, and each says how long it took. */
struct turns {
	pthread_barrier_t barrier;
	atomic_int next;
	uint64_t alone_ns, both_ns;
};

static int session_client(struct client *client, void *arg)
{
	struct turns *turns = arg;
	int number = atomic_fetch_add(&turns->next, 1);
	uint8_t *at = populated_region(client);
	struct pairs pairs = { 0 };

	for (int r = 0; r < REPETITIONS; r++) {
		uint64_t start = now_ns();

		pthread_barrier_wait(&turns->barrier);
		if (!number) {
			start = now_ns();
			storm(at);
			turns->alone_ns = now_ns() - start;
		}
		pthread_barrier_wait(&turns->barrier);
		start = now_ns();
		storm(at);
		pthread_barrier_wait(&turns->barrier);
		turns->both_ns = now_ns() - start;
		pthread_barrier_wait(&turns->barrier);
		pairs_add(&pairs, faults_per_us(turns->both_ns, 2), faults_per_us(turns->alone_ns, 1));
	}
	beside_the_best(&pairs);
	if (!number)
		row_print(&(struct row){ "concurrent_sessions_4k", "faults/us", "ratio >= 1.5", "one session, its best" },
			  &pairs, NULL);
	return 0;
}

void faults_concurrent(void)
{
	struct gmem_core *core = core_start((struct gmem_core_config){ .hugepages = true });
	struct turns *turns = shared_bytes(sizeof(*turns));
	pthread_barrierattr_t shared;
	struct client *clients[2];

	order = random_order(BYTES / PAGE);
	CHECK_EQ(client_wait(client_start(core, threaded_client, floor_create(false))), 0);
	pthread_barrierattr_init(&shared);
	pthread_barrierattr_setpshared(&shared, PTHREAD_PROCESS_SHARED);
	CHECK(!pthread_barrier_init(&turns->barrier, &shared, 2));
	for (int i = 0; i < 2; i++)
		clients[i] = client_start(core, session_client, turns);
	for (int i = 0; i < 2; i++)
		CHECK_EQ(client_wait(clients[i]), 0);
	gmem_core_destroy(core);
}
