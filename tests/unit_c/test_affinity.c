/* SPDX-License-Identifier: Apache-2.0
 *
 * Where faults are answered: those of one thread on the CPU it runs on, however far apart, and again where it goes; and what
 * a thread knows of the time it has waited for a CPU.
 */
#define _GNU_SOURCE
#include "harness.h"

#include <gmem/affinity.h>
#include <gmem/internal.h>
#include <sched.h>
#include <sys/mman.h>

#define PAGES 64

struct shared {
	int cpus[2];
	_Atomic int turn;
};

static struct shared *shared;

/* One by one, in an order that is no stream, on pages that are present. */
static void fault(uint8_t *at)
{
	CHECK(!madvise(at, PAGES * 4096, MADV_DONTNEED));
	for (int i = 0; i < PAGES; i++) {
		((volatile uint8_t *)at)[i * 29 % PAGES * 4096]++;
		sleep_ms(i % 16 ? 0 : 1);
	}
}

static int wandering(struct client *client, void *arg)
{
	uint8_t *at = client_mmap(client, PAGES * 4096, 4096, GMEM_FORK_NONE);

	(void)arg;
	memset(at, 1, PAGES * 4096);
	for (int turn = 0; turn < 2; turn++) {
		CHECK_EQ(gmem_cpu_stay(shared->cpus[turn]), 0);
		while (atomic_load(&shared->turn) == turn)
			fault(at);
	}
	return 0;
}

/* Each thread follows in its own time. On a busy machine it gives way. What is looked at is the threads' own. */
__attribute__((no_sanitize("thread"), noinline)) static bool stays_at(struct gmem_core *core, int cpu)
{
	bool found = false;

	for (uint32_t i = 0; i < atomic_load(&core->faults.thread_count); i++) {
		struct gmem_service *service = &core->faults.services[i];

		found = found || service->cpu == cpu || service->skip;
	}
	return found;
}

static void test_follows(void)
{
	struct gmem_core *core = core_start((struct gmem_core_config){ .event_fork = true });
	struct client *client = client_start(core, wandering, NULL);

	for (int turn = 0; turn < 2; turn++) {
		while (!stays_at(core, shared->cpus[turn]))
			sleep_ms(1);
		atomic_store(&shared->turn, turn + 1);
	}
	CHECK_EQ(client_wait(client), 0);
	core_settle(core);
	gmem_core_destroy(core);
}

static void test_waits(void)
{
	struct gmem_waits before, after;

	CHECK_EQ(gmem_thread_waits(&before), 0);
	for (int i = 0; i < 5; i++)
		sleep_ms(1);
	CHECK_EQ(gmem_thread_waits(&after), 0);
	CHECK(after.count >= before.count + 5);
	CHECK(after.ns >= before.ns);
}

int main(void)
{
	cpu_set_t allowed;
	int found = 0;

	shared = shared_bytes(sizeof(*shared));
	test_waits();
	CHECK_EQ(gmem_cpus_get(&allowed), 0);
	for (int cpu = 0; cpu < CPU_SETSIZE && found < 2; cpu++)
		if (CPU_ISSET(cpu, &allowed))
			shared->cpus[found++] = cpu;
	if (found == 2)
		test_follows();
	printf("affinity: ok, %d CPUs\n", found);
	return 0;
}
