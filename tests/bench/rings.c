/* SPDX-License-Identifier: Apache-2.0
 *
 * Requests over the ring: one that asks for nothing, beside a word passed to and fro between two processes; and those
 * of mapping and unmapping.
 */
#define _GNU_SOURCE
#include "bench.h"

#include <linux/futex.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <gmem_wire.h>

#define REPETITIONS 9
#define SPINNING 4000
#define SLEEPING 200
#define IDLE_US 400 /* so long nobody spins any more */

static int cpus[2]; /* of the daemon and of the client: two that spin on one would measure the scheduler */

static bool choose_cpus(void)
{
	cpu_set_t allowed;
	int count = 0;

	CHECK(!sched_getaffinity(0, sizeof(allowed), &allowed));
	for (int cpu = 0; cpu < CPU_SETSIZE && count < 2; cpu++)
		if (CPU_ISSET(cpu, &allowed))
			cpus[count++] = cpu;
	return count == 2;
}

static void stay_on(int cpu)
{
	cpu_set_t one;

	CPU_ZERO(&one);
	CPU_SET(cpu, &one);
	CHECK(!sched_setaffinity(0, sizeof(one), &one));
}

struct ring {
	struct gmem_ring_shared *s;
	struct gmem_ring_sqe *sq;
	struct gmem_ring_cqe *cq;
	int bell;
	uint32_t tail, head;
};

static void ring_submit(struct ring *ring, struct gmem_ring_sqe sqe)
{
	sqe.user_data = ring->tail;
	ring->sq[ring->tail % GMEM_RING_SQ_ENTRIES] = sqe;
	__atomic_store_n(&ring->s->sq_tail, ++ring->tail, __ATOMIC_RELEASE);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (__atomic_load_n(&ring->s->server_flags, __ATOMIC_RELAXED) & GMEM_RING_SLEEPS)
		eventfd_write(ring->bell, 1);
}

static bool ring_has_more(const struct ring *ring)
{
	return __atomic_load_n(&ring->s->cq_tail, __ATOMIC_ACQUIRE) != ring->head;
}

static struct gmem_ring_cqe ring_reap(struct ring *ring, bool sleeps)
{
	struct gmem_ring_cqe cqe;

	while (!ring_has_more(ring)) {
		if (!sleeps)
			continue;
		__atomic_store_n(&ring->s->client_waits, 1, __ATOMIC_SEQ_CST);
		if (!ring_has_more(ring))
			syscall(SYS_futex, &ring->s->cq_tail, FUTEX_WAIT, ring->head, NULL, NULL, 0);
		__atomic_store_n(&ring->s->client_waits, 0, __ATOMIC_RELAXED);
	}
	cqe = ring->cq[ring->head % GMEM_RING_CQ_ENTRIES];
	CHECK_EQ(cqe.user_data, ring->head);
	CHECK_EQ(cqe.result, 0);
	__atomic_store_n(&ring->s->cq_head, ++ring->head, __ATOMIC_RELEASE);
	return cqe;
}

static struct gmem_ring_cqe ring_call(struct ring *ring, struct gmem_ring_sqe sqe)
{
	ring_submit(ring, sqe);
	return ring_reap(ring, false);
}

static double ring_us(struct ring *ring, bool sleeps)
{
	int count = sleeps ? SLEEPING : SPINNING;
	uint64_t total = 0;

	for (int i = 0; i < count; i++) {
		uint64_t start;

		if (sleeps)
			nap_us(IDLE_US);
		start = now_ns();
		ring_submit(ring, (struct gmem_ring_sqe){ 0 });
		ring_reap(ring, sleeps);
		total += now_ns() - start;
	}
	return (double)total / count / 1e3;
}

/* Even turns are the parent's, odd ones the child's; the child ends after its last. */
static void await(atomic_uint *turn, unsigned mine, bool sleeps)
{
	unsigned now;

	while ((now = atomic_load_explicit(turn, memory_order_acquire)) != mine)
		if (sleeps)
			syscall(SYS_futex, turn, FUTEX_WAIT, now, NULL, NULL, 0);
}

static void pass(atomic_uint *turn, unsigned mine, bool sleeps)
{
	atomic_store_explicit(turn, mine + 1, memory_order_release);
	if (sleeps)
		syscall(SYS_futex, turn, FUTEX_WAKE, 1, NULL, NULL, 0);
}

static double word_us(bool sleeps)
{
	unsigned count = sleeps ? SLEEPING : SPINNING;
	atomic_uint *turn = shared_bytes(4096);
	uint64_t total = 0;
	pid_t pid = fork();

	CHECK(pid >= 0);
	if (!pid) {
		stay_on(cpus[0]);
		for (unsigned i = 0; i < count; i++) {
			await(turn, 2 * i + 1, sleeps);
			pass(turn, 2 * i + 1, sleeps);
		}
		_exit(0);
	}
	for (unsigned i = 0; i < count; i++) {
		uint64_t start;

		if (sleeps)
			nap_us(IDLE_US);
		start = now_ns();
		pass(turn, 2 * i, sleeps);
		await(turn, 2 * i + 2, sleeps);
		total += now_ns() - start;
	}
	CHECK(waitpid(pid, NULL, 0) == pid);
	munmap(turn, 4096);
	return (double)total / count / 1e3;
}

/* ---- mmap and munmap of memory that nobody touches ---- */

#define MAPPINGS 200

/* As libgmem does it: what is given back stays mapped for the next region of its size. */
static uint64_t map_kept(struct client *client, struct ring *ring, uint64_t bytes)
{
	uint64_t start = now_ns();
	struct gmem_ring_cqe got = ring_call(ring, (struct gmem_ring_sqe){ .op = GMEM_RING_MMAP, .bytes = bytes,
									   .flags = GMEM_RING_NO_INHERIT | GMEM_RING_KEEP });
	void *at = (void *)got.values[GMEM_RING_VA];

	if (!got.values[GMEM_RING_KEPT]) { /* the first one */
		CHECK(mmap(at, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED_NOREPLACE | MAP_NORESERVE,
			   client->fds[got.values[GMEM_RING_HUGE]], (off_t)got.values[GMEM_RING_OFFSET]) == at);
		ring_call(ring, (struct gmem_ring_sqe){ .op = GMEM_RING_MMAP_COMMIT, .va = (uint64_t)at });
	}
	got = ring_call(ring, (struct gmem_ring_sqe){ .op = GMEM_RING_MUNMAP, .flags = GMEM_RING_KEEP, .va = (uint64_t)at,
						      .bytes = bytes });
	CHECK_EQ(got.result, 0);
	return now_ns() - start;
}

static uint64_t map_fresh(struct client *client, struct ring *ring, uint64_t bytes)
{
	uint64_t start = now_ns();
	struct gmem_ring_cqe got = ring_call(ring, (struct gmem_ring_sqe){ .op = GMEM_RING_MMAP, .bytes = bytes,
									   .flags = GMEM_RING_NO_INHERIT });
	void *at = (void *)got.values[GMEM_RING_VA];

	CHECK(mmap(at, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED_NOREPLACE | MAP_NORESERVE,
		   client->fds[got.values[GMEM_RING_HUGE]], (off_t)got.values[GMEM_RING_OFFSET]) == at);
	ring_call(ring, (struct gmem_ring_sqe){ .op = GMEM_RING_MMAP_COMMIT, .va = (uint64_t)at });
	CHECK(!munmap(at, bytes));
	ring_call(ring, (struct gmem_ring_sqe){ .op = GMEM_RING_MUNMAP, .va = (uint64_t)at, .bytes = bytes });
	return now_ns() - start;
}

static uint64_t map_kernel(struct client *client, struct ring *ring, uint64_t bytes)
{
	uint64_t start = now_ns();
	void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE,
			client->fds[GMEM_CLASS_SMALL], 0);

	CHECK(at != MAP_FAILED && !munmap(at, bytes));
	for (int i = 0; i < 2; i++)
		ring_call(ring, (struct gmem_ring_sqe){ 0 });
	return now_ns() - start;
}

static void mapping_row(struct client *client, struct ring *ring, const char *id, uint64_t bytes, bool kept)
{
	const struct row row = { id, "us", kept ? "ratio <= 2.0" : NULL, "kernel mmap and munmap, two empty requests" };
	uint64_t (*map_gmem)(struct client *, struct ring *, uint64_t) = kept ? map_kept : map_fresh;
	struct times ours = { 0 }, bare = { 0 };
	struct pairs pairs = { 0 };

	for (int r = 0; r < REPETITIONS; r++) {
		times_clear(&ours);
		times_clear(&bare);
		for (int i = 0; i < MAPPINGS; i++) {
			times_add(&ours, map_gmem(client, ring, bytes));
			times_add(&bare, map_kernel(client, ring, bytes));
		}
		pairs_add(&pairs, times_percentile(&ours, 50) / 1e3, times_percentile(&bare, 50) / 1e3);
	}
	row_print(&row, &pairs, NULL);
	times_free(&ours);
	times_free(&bare);
}

struct files {
	int fds[2];
};

#define ONE_CPU "needs two CPUs"

static const struct row spinning = { "ring_request_spinning", "us", "ratio <= 1.5",
				   "shared-memory ping-pong, spinning" };
static const struct row sleeping = { "ring_request_futex", "us", "ratio <= 1.3", "shared-memory ping-pong, futex" };

static int rows(struct client *client, void *arg)
{
	int daemon = (int)syscall(SYS_pidfd_open, getppid(), 0);
	struct pairs pairs[2] = { 0 };
	struct files *files = arg;
	struct ring ring = { 0 };

	stay_on(cpus[1]);
	while (!__atomic_load_n(&files->fds[1], __ATOMIC_ACQUIRE))
		nap_us(100);
	ring.bell = (int)syscall(SYS_pidfd_getfd, daemon, files->fds[1], 0);
	ring.s = mmap(NULL, GMEM_RING_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED,
		      (int)syscall(SYS_pidfd_getfd, daemon, files->fds[0], 0), 0);
	CHECK(ring.s != MAP_FAILED);
	ring.sq = (void *)((char *)ring.s + ring.s->sq_offset);
	ring.cq = (void *)((char *)ring.s + ring.s->cq_offset);
	for (int r = -1; r < REPETITIONS; r++)
		for (int sleeps = 0; sleeps < 2; sleeps++) {
			double ours = ring_us(&ring, sleeps), bare = word_us(sleeps);

			if (r >= 0)
				pairs_add(&pairs[sleeps], ours, bare);
		}
	row_print(&spinning, &pairs[0], NULL);
	row_print(&sleeping, &pairs[1], NULL);
	mapping_row(client, &ring, "ring_mmap_munmap_2m", 2 * MIB, true);
	mapping_row(client, &ring, "ring_mmap_munmap_1t", 1024 * GIB, true);
	mapping_row(client, &ring, "ring_mmap_munmap_fresh_2m", 2 * MIB, false);
	mapping_row(client, &ring, "ring_mmap_munmap_fresh_1t", 1024 * GIB, false);
	return 0;
}

void ring_requests(void)
{
	struct files *files = shared_bytes(sizeof(*files));
	struct gmem_core *core;
	struct client *client;
	int fds[2];

	if (!choose_cpus()) {
		row_print(&spinning, NULL, ONE_CPU);
		row_print(&sleeping, NULL, ONE_CPU);
		return;
	}
	stay_on(cpus[0]);
	core = core_start((struct gmem_core_config){ .overcommit = true });
	client = client_start(core, rows, files);
	CHECK_EQ(gmem_session_ring(core, client->session, fds), 0);
	files->fds[0] = fds[0];
	__atomic_store_n(&files->fds[1], fds[1], __ATOMIC_RELEASE);
	CHECK_EQ(client_wait(client), 0);
	gmem_core_destroy(core);
}
