/* SPDX-License-Identifier: Apache-2.0
 *
 * The agent: both its ends, on one file. What it is asked for is dropped, and nothing else, whatever it is asked for.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <gmem_wire.h>

#include <gmem/agent.h>

#include "../../client/src/agent.h"
#include "harness.h"

#define PAGES 64
#define BYTES (PAGES * 4096ul)

/* gmemd's end; the client's struct of the same name is known to agent.c of the client only. */
static struct gmem_agent *ours;

static _Atomic int beside_count;
static _Atomic uint64_t beside_va;

static void beside(void *arg, uint64_t va, uint64_t bytes)
{
	(void)arg;
	(void)bytes;
	if (!beside_count++)
		beside_va = va;
}

static bool is_mapped(const void *at)
{
	int fd = open("/proc/self/pagemap", O_RDONLY);
	uint64_t entry;

	CHECK(pread(fd, &entry, 8, (off_t)((uintptr_t)at / 4096 * 8)) == 8);
	close(fd);
	return entry >> 63;
}

static void wait_done(void)
{
	for (int i = 0; ours->shared->tail != ours->shared->head; i++) {
		CHECK(i < 5000);
		sleep_ms(1);
	}
}

static void put(const void *at, uint64_t bytes)
{
	gmem_agent_put(ours, (struct gmem_range){ (uintptr_t)at, bytes });
}

static void drops_what_it_is_asked_for(uint8_t *window)
{
	for (int i = 0; i < PAGES; i++)
		window[i * 4096] = (uint8_t)(i + 1);
	put(window + 3 * 4096, 4096);
	put(window + 4 * 4096, 4096); /* one entry */
	put(window + 9 * 4096, 4096);
	gmem_agent_flush(ours);
	wait_done();
	CHECK_EQ(ours->shared->head, 2);
	for (int i = 0; i < PAGES; i++)
		CHECK_EQ(is_mapped(window + i * 4096), i != 3 && i != 4 && i != 9);
	for (int i = 0; i < PAGES; i++)
		CHECK_EQ(window[i * 4096], i + 1);
}

static void leaves_the_rest_alone(uint8_t *window, uint8_t *outside)
{
	memset(outside, 7, BYTES);
	put(outside, BYTES);
	put(window, BYTES + 4096);         /* runs out of it */
	put(window - 4096, 8192);          /* begins before it */
	put((void *)UINT64_MAX, 4096);
	put(window + 4096, UINT64_MAX);
	put(NULL, UINT64_MAX);
	put(window + 1, 4096);             /* the kernel refuses it */
	gmem_agent_flush(ours);
	wait_done();
	CHECK_EQ(beside_va, (uintptr_t)outside); /* what lies elsewhere is not the agent's to judge */
	CHECK(beside_count >= 5); /* some may lie side by side */
	for (unsigned long i = 0; i < BYTES; i++)
		CHECK_EQ(outside[i], 7);
	CHECK(is_mapped(window));
}

/* More than fits, and ends that lie: entries are lost, memory is not. */
static void overflows(uint8_t *window)
{
	for (int round = 0; round < 100; round++)
		for (int i = 0; i < PAGES; i += 2)
			put(window + i * 4096, 4096);
	gmem_agent_flush(ours);
	wait_done();
	__atomic_store_n(&ours->shared->tail, 0x80000000u, __ATOMIC_RELEASE);
	for (int i = 0; i < PAGES; i += 2)
		put(window + i * 4096, 4096);
	gmem_agent_flush(ours);
	for (int i = 0; i < PAGES; i++)
		CHECK_EQ(window[i * 4096], i + 1);
}

/* A program's, and part of each thread's stack: more than the agent's has room for. */
static _Thread_local volatile char local_storage[1 << 20];

int main(void)
{
	int file = memfd_create("window", 0);
	struct gmem_agent *theirs = NULL;
	uint8_t *window, *outside;

	local_storage[0] = 1;
	CHECK(!ftruncate(file, BYTES));
	window = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
	outside = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(window != MAP_FAILED && outside != MAP_FAILED);
	CHECK_EQ(gmem_agent_start(open("/dev/zero", O_RDWR), (uintptr_t)window, BYTES, beside, NULL, &theirs), -EPROTO);
	CHECK_EQ(gmem_agent_create(-1, &ours), 0);
	CHECK_EQ(gmem_agent_start(dup(ours->file->fd), (uintptr_t)window, BYTES, beside, NULL, &theirs), 0);
	drops_what_it_is_asked_for(window);
	leaves_the_rest_alone(window, outside);
	overflows(window);
	gmem_agent_stop(theirs); /* while it sleeps */
	gmem_agent_destroy(ours);
	for (int i = 0; i < 50; i++) { /* while it works */
		CHECK_EQ(gmem_agent_create(-1, &ours), 0);
		CHECK_EQ(gmem_agent_start(dup(ours->file->fd), (uintptr_t)window, BYTES, beside, NULL, &theirs), 0);
		for (int j = 0; j < PAGES; j += 2)
			put(window + j * 4096, 4096);
		gmem_agent_flush(ours);
		gmem_agent_stop(theirs);
		gmem_agent_destroy(ours);
	}
	printf("agent: ok\n");
	return 0;
}
