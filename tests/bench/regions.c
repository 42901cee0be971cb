/* SPDX-License-Identifier: Apache-2.0
 *
 * Regions: first touch, mapping and unmapping, and what an address costs to look up.
 */
#define _GNU_SOURCE
#include "bench.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <gmem/internal.h>

#define REPETITIONS 7

/* ---- first touch of huge pages, in order ---- */

#define TOUCH_BYTES (128 * MIB)

static uint64_t touch_all(volatile uint8_t *at)
{
	uint64_t start = now_ns();

	for (uint64_t i = 0; i < TOUCH_BYTES; i += HUGE_BYTES)
		at[i] = 1;
	return now_ns() - start;
}

static uint64_t kernel_first_touch(void)
{
	int fd = memfd_create("bench-touch", MFD_CLOEXEC | MFD_HUGETLB);
	uint64_t ns;
	void *at;

	CHECK(fd >= 0 && !ftruncate(fd, TOUCH_BYTES));
	at = mmap(NULL, TOUCH_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
	CHECK(at != MAP_FAILED);
	ns = touch_all(at);
	munmap(at, TOUCH_BYTES);
	close(fd);
	return ns;
}

static const struct row first_touch_row = { "first_touch_2m", "GB/s", "ratio >= 1.0", "the kernel's first touch" };

static int touching_client(struct client *client, void *arg)
{
	struct pairs pairs = { 0 };

	(void)arg;
	for (int r = -1; r < REPETITIONS; r++) {
		uint8_t *at = client_mmap(client, TOUCH_BYTES, HUGE_BYTES, GMEM_FORK_NONE);
		uint64_t ours = touch_all(at), bare;

		CHECK_EQ(client_munmap(client, at, TOUCH_BYTES), 0);
		bare = kernel_first_touch();
		if (r >= 0)
			pairs_add(&pairs, (double)TOUCH_BYTES / (double)ours, (double)TOUCH_BYTES / (double)bare);
	}
	row_print(&first_touch_row, &pairs, NULL);
	return 0;
}

void first_touch(void)
{
	struct gmem_core *core;

	if (!huge_pages) {
		row_print(&first_touch_row, NULL, "no huge pages");
		return;
	}
	core = core_start((struct gmem_core_config){ .hugepages = true });
	CHECK_EQ(client_wait(client_start(core, touching_client, NULL)), 0);
	gmem_core_destroy(core);
}

/* ---- mmap and munmap of memory that nobody touches ---- */

#define MAPPINGS 200

static int echo_socks[2];

/* The bare round trip: a message of the same kind to a thread of the daemon and back. */
static void *echo_thread(void *arg)
{
	char message[128];
	ssize_t n;

	while ((n = recv(echo_socks[0], message, sizeof(message), 0)) > 0)
		CHECK(send(echo_socks[0], message, (size_t)n, MSG_NOSIGNAL) == n);
	return arg;
}

static void round_trip(void)
{
	char message[96] = { 0 };

	CHECK(send(echo_socks[1], message, sizeof(message), MSG_NOSIGNAL) == sizeof(message));
	CHECK(recv(echo_socks[1], message, sizeof(message), 0) == sizeof(message));
}

static uint64_t map_gmem(struct client *client, uint64_t bytes)
{
	uint64_t start = now_ns();
	void *at = client_mmap(client, bytes, 0, GMEM_FORK_NONE);

	CHECK_EQ(client_munmap(client, at, bytes), 0);
	return now_ns() - start;
}

static uint64_t map_kernel(struct client *client, uint64_t bytes)
{
	uint64_t start = now_ns();
	void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, client->fds[GMEM_CLASS_SMALL], 0);

	CHECK(at != MAP_FAILED && !munmap(at, bytes));
	round_trip();
	round_trip();
	return now_ns() - start;
}

static int mapping_client(struct client *client, void *arg)
{
	static const struct { const char *id; uint64_t bytes; } sizes[] = {
		{ "mmap_munmap_2m", 2 * MIB }, { "mmap_munmap_1t", 1024 * GIB },
	};

	(void)arg;
	for (int s = 0; s < 2; s++) {
		struct row row = { sizes[s].id, "us", NULL, "kernel mmap and munmap, two socket round trips" };
		struct times ours = { 0 }, bare = { 0 };
		struct pairs pairs = { 0 };

		for (int r = 0; r < REPETITIONS; r++) {
			times_clear(&ours);
			times_clear(&bare);
			for (int i = 0; i < MAPPINGS; i++) {
				times_add(&ours, map_gmem(client, sizes[s].bytes));
				times_add(&bare, map_kernel(client, sizes[s].bytes));
			}
			pairs_add(&pairs, times_percentile(&ours, 50) / 1e3, times_percentile(&bare, 50) / 1e3);
		}
		row_print(&row, &pairs, NULL);
		times_free(&ours);
		times_free(&bare);
	}
	return 0;
}

static uint64_t status_kib(const char *field)
{
	FILE *f = fopen("/proc/self/status", "re");
	size_t length = strlen(field);
	unsigned long kib = 0;
	char line[256];

	CHECK(f);
	while (fgets(line, sizeof(line), f))
		if (!strncmp(line, field, length))
			kib = strtoul(line + length, NULL, 10);
	fclose(f);
	return kib;
}

struct terabyte {
	atomic_int step;
	uint64_t client_kib;
};

static int terabyte_client(struct client *client, void *arg)
{
	struct terabyte *shared = arg;
	uint64_t before;

	CHECK_EQ(client_munmap(client, client_mmap(client, 2 * MIB, 0, GMEM_FORK_NONE), 2 * MIB), 0);
	before = status_kib("VmRSS:") + status_kib("VmPTE:");
	atomic_store(&shared->step, 1);
	while (atomic_load(&shared->step) != 2)
		sleep_ms(1);
	client_mmap(client, 1024 * GIB, 0, GMEM_FORK_NONE);
	shared->client_kib = status_kib("VmRSS:") + status_kib("VmPTE:") - before;
	atomic_store(&shared->step, 3);
	while (atomic_load(&shared->step) != 4)
		sleep_ms(1);
	return 0;
}

/* Memory that a mapped and untouched TiB costs, in the daemon and in the client. */
static void measure_terabyte(struct gmem_core *core)
{
	const struct row row = { "mmap_1t_memory", "KiB", "value <= 1024", NULL };
	struct terabyte *shared = shared_bytes(sizeof(*shared));
	struct client *client = client_start(core, terabyte_client, shared);
	struct gmem_core_stats stats;
	struct pairs pairs = { 0 };
	uint64_t before;

	while (atomic_load(&shared->step) != 1)
		sleep_ms(1);
	gmem_core_stats(core, &stats);
	before = status_kib("VmRSS:") + status_kib("VmPTE:") + stats.lpt_bytes / KIB;
	atomic_store(&shared->step, 2);
	while (atomic_load(&shared->step) != 3)
		sleep_ms(1);
	gmem_core_stats(core, &stats);
	pairs_add(&pairs, (double)(status_kib("VmRSS:") + status_kib("VmPTE:") + stats.lpt_bytes / KIB - before +
				   shared->client_kib), 0);
	atomic_store(&shared->step, 4);
	CHECK_EQ(client_wait(client), 0);
	row_print(&row, &pairs, NULL);
}

void mappings(void)
{
	struct gmem_core *core;
	pthread_t thread;

	CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, echo_socks));
	core = core_start((struct gmem_core_config){ .hugepages = true, .overcommit = true });
	CHECK(!pthread_create(&thread, NULL, echo_thread, NULL));
	CHECK_EQ(client_wait(client_start(core, mapping_client, NULL)), 0);
	measure_terabyte(core);
	gmem_core_destroy(core);
}

/* ---- page table ---- */

#define TOUCHED 16384ul
#define LOOKUPS 400000ul
#define ADDRESSES 4096

struct table {
	uint64_t va, bytes;
	atomic_int step;
	uint64_t lpt_before;
};

static int table_client(struct client *client, void *arg)
{
	struct table *table = arg;
	uint8_t *at = client_mmap(client, table->bytes, 4 * KIB, GMEM_FORK_NONE);

	table->va = (uint64_t)at;
	atomic_store(&table->step, 1);
	while (atomic_load(&table->step) != 2)
		sleep_ms(1);
	for (uint64_t i = 0; i < TOUCHED; i++)
		at[i * 4 * KIB] = 1;
	atomic_store(&table->step, 3);
	while (atomic_load(&table->step) != 4)
		sleep_ms(1);
	return 0;
}

/* From an address to its page's word, over touched pages in random order. */
static double look_up(struct gmem_core *core, struct gmem_session *session, uint64_t va)
{
	static uint64_t addresses[ADDRESSES];
	uint64_t random = 88172645463325252ull, sum = 0, start;

	for (int i = 0; i < ADDRESSES; i++) {
		random ^= random << 13;
		random ^= random >> 7;
		random ^= random << 17;
		addresses[i] = va + random % TOUCHED * 4 * KIB;
	}
	start = now_ns();
	for (uint64_t i = 0; i < LOOKUPS; i++) {
		struct gmem_place place;

		CHECK_EQ(gmem_as_lookup(&session->as, addresses[i % ADDRESSES], &place), 0);
		sum += atomic_load_explicit(&core->lpt.words[place.object->pn + place.index], memory_order_relaxed);
		gmem_object_unref(place.object);
	}
	CHECK(sum);
	return (double)(now_ns() - start) / LOOKUPS;
}

static void measure_table(struct gmem_core *core, const char *name, uint64_t bytes)
{
	struct table *table = shared_bytes(sizeof(*table));
	struct pairs memory = { 0 }, lookup = { 0 };
	struct gmem_session *session;
	char memory_id[64], lookup_id[64];
	const struct row memory_row = { memory_id, "B", "value <= 16", NULL };
	const struct row lookup_row = { lookup_id, "ns", "value <= 15", NULL };
	struct gmem_core_stats before, after;
	struct client *client;

	table->bytes = bytes;
	client = client_start(core, table_client, table);
	while (atomic_load(&table->step) != 1)
		sleep_ms(1);
	gmem_core_stats(core, &before);
	atomic_store(&table->step, 2);
	while (atomic_load(&table->step) != 3)
		sleep_ms(1);
	gmem_core_stats(core, &after);
	session = gmem_session_get(core, client->session);
	CHECK(session);
	for (int r = -1; r < REPETITIONS; r++) {
		double ns = look_up(core, session, table->va);

		if (r >= 0)
			pairs_add(&lookup, ns, 0);
	}
	pairs_add(&memory, (double)(after.lpt_bytes - before.lpt_bytes) / TOUCHED, 0);
	gmem_session_unref(session);
	atomic_store(&table->step, 4);
	CHECK_EQ(client_wait(client), 0);
	snprintf(memory_id, sizeof(memory_id), "lpt_bytes_per_page_%s", name);
	snprintf(lookup_id, sizeof(lookup_id), "lpt_lookup_%s", name);
	row_print(&memory_row, &memory, NULL);
	row_print(&lookup_row, &lookup, NULL);
}

void page_table(void)
{
	struct gmem_core *core = core_start((struct gmem_core_config){ .hugepages = true, .overcommit = true });

	measure_table(core, "1g", GIB);
	measure_table(core, "4t", 4096 * GIB);
	gmem_core_destroy(core);
}
