/* SPDX-License-Identifier: Apache-2.0
 *
 * Kept ranges: a region in one is as fresh as any other, nobody else gets its addresses, and what can't be kept is not.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <gmem/kept.h>

#include "harness.h"

#define MIB (1ul << 20)
#define BYTES (4 * MIB)

static sigjmp_buf escape;

static void on_sigbus(int sig)
{
	siglongjmp(escape, sig);
}

static bool gets_sigbus(volatile uint8_t *at)
{
	signal(SIGBUS, on_sigbus);
	if (sigsetjmp(escape, 1))
		return true;
	return *at, false;
}

static void fill(uint8_t *at, uint8_t with)
{
	for (uint64_t i = 0; i < BYTES; i += 4096)
		at[i] = (uint8_t)(with + i / 4096);
}

/* A mover may hold the old region's object for a moment. */
static uint8_t *soon(struct client *client, uint64_t page_bytes, enum gmem_fork fork)
{
	uint8_t *at = NULL;

	for (int tries = 0; !at && tries < 2000; tries++) {
		at = client_mmap_kept(client, BYTES, page_bytes, fork);
		if (!at)
			sleep_ms(1);
	}
	return at;
}

static int reuses(struct client *client, void *arg)
{
	const uint64_t page_bytes = (uint64_t)arg;
	uint8_t *at = client_mmap(client, BYTES, page_bytes, GMEM_FORK_NONE), *other;

	for (int round = 0; round < 20; round++) {
		for (uint64_t i = 0; i < BYTES; i += 4096)
			CHECK_EQ(at[i], 0);
		fill(at, (uint8_t)round);
		for (uint64_t i = 0; i < BYTES; i += 4096)
			CHECK_EQ(at[i], (uint8_t)(round + i / 4096));
		CHECK_EQ(client_keep(client, at, BYTES), 0);
		CHECK_EQ(client_keep(client, at, BYTES), -EINVAL); /* it is no region any more */
		other = client_mmap(client, BYTES, page_bytes, GMEM_FORK_NONE); /* one who knows nothing of kept ranges */
		CHECK(other != at);
		CHECK_EQ(client_munmap(client, other, BYTES), 0);
		CHECK(!client_mmap_kept(client, 2 * BYTES, page_bytes, GMEM_FORK_NONE));
		CHECK(!client_mmap_kept(client, BYTES, page_bytes, GMEM_FORK_SHARE)); /* another kind of mapping */
		CHECK(soon(client, page_bytes, GMEM_FORK_NONE) == at);
		CHECK(!client_mmap_kept(client, BYTES, page_bytes, GMEM_FORK_NONE));
	}
	return 0;
}

static int refuses(struct client *client, void *arg)
{
	uint8_t *at = client_mmap(client, BYTES, 4096, GMEM_FORK_NONE), *more[GMEM_KEPT_MAX + 1];

	(void)arg;
	CHECK_EQ(client_keep(client, at, BYTES / 2), -EAGAIN); /* a part */
	CHECK_EQ(client_keep(client, at + 4096, BYTES - 4096), -EAGAIN);
	fill(at, 7);
	CHECK_EQ(at[4096], 8); /* nothing was done */
	for (int i = 0; i <= GMEM_KEPT_MAX; i++)
		more[i] = client_mmap(client, BYTES, 4096, GMEM_FORK_NONE);
	for (int i = 0; i < GMEM_KEPT_MAX; i++)
		CHECK_EQ(client_keep(client, more[i], BYTES), 0);
	CHECK_EQ(client_keep(client, more[GMEM_KEPT_MAX], BYTES), -EAGAIN);
	CHECK(!munmap(more[0], BYTES)); /* the event makes room */
	for (int tries = 0; client_keep(client, more[GMEM_KEPT_MAX], BYTES); tries++) {
		CHECK(tries < 2000);
		sleep_ms(1);
	}
	return 0;
}

/* The mark that a touch leaves behind would meet whoever comes next. */
static int touches(struct client *client, void *arg)
{
	uint8_t *at = client_mmap(client, BYTES, 4096, GMEM_FORK_NONE);

	(void)arg;
	fill(at, 1);
	CHECK_EQ(client_keep(client, at, BYTES), 0);
	for (int tries = 0; !gets_sigbus(at + MIB); tries++) { /* a mover may still map what it had begun with */
		CHECK(tries < 2000);
		sleep_ms(1);
	}
	CHECK(!client_mmap_kept(client, BYTES, 4096, GMEM_FORK_NONE));
	CHECK(!munmap(at, BYTES));
	CHECK(client_mmap(client, BYTES, 4096, GMEM_FORK_NONE)); /* its addresses are free again */
	return 0;
}

static int shares(struct client *client, void *arg)
{
	uint8_t *at = client_mmap(client, BYTES, 4096, GMEM_FORK_SHARE);

	(void)arg;
	fill(at, 3);
	CHECK_EQ(client_keep(client, at, BYTES), 0);
	CHECK(soon(client, 4096, GMEM_FORK_SHARE) == at);
	for (uint64_t i = 0; i < BYTES; i += 4096)
		CHECK_EQ(at[i], 0);
	return 0;
}

static uint64_t free_addresses(struct gmem_core *core, struct client *client)
{
	struct gmem_mmap_args args = { .bytes = 4096, .page_bytes = 4096, .fork = GMEM_FORK_NONE };
	struct gmem_region_info region;

	CHECK_EQ(gmem_mmap(core, client->session, &args, &region), 0);
	CHECK_EQ(gmem_munmap(core, client->session, region.va, 4096), 0);
	return region.va;
}

static int idle(struct client *client, void *arg)
{
	atomic_int *step = arg;
	uint8_t *at = client_mmap(client, BYTES, 4096, GMEM_FORK_NONE);

	fill(at, 1);
	CHECK_EQ(client_keep(client, at, BYTES), 0);
	atomic_store(step, 1);
	while (atomic_load(step) != 2)
		sleep_ms(1);
	return 0;
}

/* Memory goes with the munmap, addresses with the session. */
static void frees_all(struct gmem_core *core, atomic_int *step)
{
	struct client *client;
	struct gmem_core_stats stats;
	uint64_t first = 0;

	for (int round = 0; round < 3; round++) {
		atomic_store(step, 0);
		client = client_start(core, idle, step);
		while (atomic_load(step) != 1)
			sleep_ms(1);
		core_settle(core);
		gmem_core_stats(core, &stats);
		CHECK_EQ(stats.objects, 0);
		first = first ? first : free_addresses(core, client);
		CHECK_EQ(free_addresses(core, client), first);
		atomic_store(step, 2);
		CHECK_EQ(client_wait(client), 0);
	}
}

int main(void)
{
	bool huge = hugepages_reserve(16);
	atomic_int *step = shared_bytes(sizeof(*step)); /* older than the core */
	struct gmem_core *core = core_start((struct gmem_core_config){ .hugepages = huge, .overcommit = true });

	CHECK_EQ(client_wait(client_start(core, reuses, (void *)4096ul)), 0);
	CHECK_EQ(client_wait(client_start(core, reuses, (void *)65536ul)), 0);
	CHECK_EQ(client_wait(client_start(core, reuses, (void *)(2 * MIB))), 0);
	CHECK_EQ(client_wait(client_start(core, refuses, NULL)), 0);
	CHECK_EQ(client_wait(client_start(core, touches, NULL)), 0);
	CHECK_EQ(client_wait(client_start(core, shares, NULL)), 0);
	frees_all(core, step);
	core_settle(core);
	gmem_core_destroy(core);
	puts("kept: ok");
	return 0;
}
