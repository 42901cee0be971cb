/* SPDX-License-Identifier: Apache-2.0
 *
 * No lost update: CPU threads and kernels on two devices write words of the same pages while the devices, far too small,
 * evict all the time. Each writer owns some words (plain increments, checked against what it last wrote) and all share
 * one word a page (atomic increments, whose sum is checked). usage: test_coherence [SECONDS a case]
 */
#define _GNU_SOURCE
#include "harness.h"

#include <stdatomic.h>
#include <sys/mman.h>

#define WRITERS 4 /* two CPU threads, two contexts */
#define PAGES_MAX 64

struct shared {
	volatile bool ready, stop;
	volatile uint64_t va;
	uint64_t page_bytes;
	_Atomic int done;
	_Atomic uint64_t bad, operations, atomics[PAGES_MAX];
	uint64_t last[WRITERS][PAGES_MAX][4];
};

static struct shared *shared;

static uint64_t random_next(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

/* Word `slot` of a writer, in the page's k-th quarter; word 0 of each page is everyone's. */
static volatile uint64_t *word(uint64_t page, int writer, int k)
{
	return (volatile uint64_t *)(shared->va + page * shared->page_bytes + (uint64_t)k * shared->page_bytes / 4) +
	       1 + writer;
}

static void write_words(int writer)
{
	uint64_t seed = 88172645463325252ull + (uint64_t)writer * 7919, page = 0;

	while (!shared->stop) {
		/* one writer of each kind walks, and gets pages ahead; the other one jumps */
		page = (writer % 2 ? random_next(&seed) : page + 1) % PAGES_MAX;
		int k = (int)(random_next(&seed) % 4);
		volatile uint64_t *at = word(page, writer, k);
		uint64_t seen = *at;

		if (seen != shared->last[writer][page][k]) {
			atomic_fetch_add(&shared->bad, 1);
			fprintf(stderr, "writer %d page %lu quarter %d: %lu, wrote %lu\n", writer, page, k, seen,
				shared->last[writer][page][k]);
		}
		shared->last[writer][page][k] = seen + 1;
		*at = seen + 1;
		if (random_next(&seed) % 4 == 0) {
			atomic_fetch_add((_Atomic uint64_t *)(shared->va + page * shared->page_bytes), 1);
			atomic_fetch_add(&shared->atomics[page], 1);
		}
		atomic_fetch_add(&shared->operations, 1);
	}
	atomic_fetch_add(&shared->done, 1);
}

static int device_side(struct client *client, void *arg)
{
	(void)client;
	while (!shared->ready)
		sleep_ms(1);
	write_words((int)(long)arg);
	return 0;
}

static void *cpu_thread(void *arg)
{
	write_words((int)(long)arg);
	return NULL;
}

static int host_side(struct client *client, void *arg)
{
	pthread_t threads[2];
	int bad = 0;

	(void)arg;
	shared->va = (uint64_t)client_mmap(client, PAGES_MAX * shared->page_bytes, shared->page_bytes, GMEM_FORK_SHARE);
	shared->ready = true;
	for (long i = 0; i < 2; i++)
		CHECK(!pthread_create(&threads[i], NULL, cpu_thread, (void *)i));
	for (int i = 0; i < 2; i++)
		pthread_join(threads[i], NULL);
	while (shared->done < WRITERS)
		sleep_ms(1);
	for (uint64_t page = 0; page < PAGES_MAX; page++) {
		bad += *(volatile uint64_t *)(shared->va + page * shared->page_bytes) != shared->atomics[page];
		for (int w = 0; w < WRITERS; w++)
			for (int k = 0; k < 4; k++)
				bad += *word(page, w, k) != shared->last[w][page][k];
	}
	CHECK_EQ(bad, 0);
	return 0;
}

static void run(uint64_t page_bytes, bool hugepages, double seconds)
{
	struct gmem_core *core = core_start((struct gmem_core_config){ .hugepages = hugepages, .event_fork = true });
	struct gmem_hnode_stats hnodes[GMEM_HNODE_MAX];
	struct gmem_core_stats stats;
	struct client *client, *contexts[2];
	char capacity[64];
	size_t count;

	memset(shared, 0, sizeof(*shared));
	shared->page_bytes = page_bytes;
	snprintf(capacity, sizeof(capacity), "capacity=%lu", page_bytes * PAGES_MAX / 8);
	CHECK_EQ(attach_simgpu(core, "simgpu0", capacity), 1);
	CHECK_EQ(attach_simgpu(core, "simgpu1", capacity), 2);
	client = client_start(core, host_side, NULL);
	for (long i = 0; i < 2; i++)
		contexts[i] = context_start(client, (int)i + 1, device_side, (void *)(2 + i));
	sleep_ms((int)(seconds * 1000));
	shared->stop = true;
	for (int i = 0; i < 2; i++)
		CHECK_EQ(client_wait(contexts[i]), 0);
	CHECK_EQ(client_wait(client), 0);
	CHECK_EQ(shared->bad, 0);
	core_settle(core);
	gmem_core_stats(core, &stats);
	gmem_hnodes(core, hnodes, &count);
	CHECK(stats.evictions > 0 && stats.d2h_bytes > 0 && stats.h2d_bytes > 0 && stats.invalidations > 0);
	CHECK_EQ(stats.poisoned_pages, 0);
	CHECK_EQ(stats.leftovers, 0);
	for (size_t i = 0; i < count; i++) {
		CHECK(hnodes[i].peak_bytes <= hnodes[i].info.capacity_bytes);
		CHECK_EQ(hnodes[i].used_bytes, 0);
	}
	printf("%lu KiB, %s: %lu operations, %lu evictions (%lu clean), %lu faults, %lu ahead, %lu parked, %lu retries: "
	       "nothing lost\n",
	       page_bytes >> 10, hugepages ? "hugetlb" : "shmem", shared->operations, stats.evictions,
	       stats.evicted_clean, stats.host_faults + stats.device_faults, stats.ahead_pages, stats.parked_faults,
	       stats.retries);
	gmem_core_destroy(core);
}

int main(int argc, char **argv)
{
	double seconds = argc > 1 ? atof(argv[1]) : 1.2;

	shared = shared_bytes(sizeof(*shared));
	time_limit_s += (unsigned)seconds;
	run(4096, false, seconds);
	run(65536, false, seconds);
	run(2 << 20, false, seconds);
	if (hugepages_reserve(256))
		run(2 << 20, true, seconds);
	else
		printf("hugetlb: not run, no permission\n");
	return 0;
}
