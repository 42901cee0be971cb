/* SPDX-License-Identifier: Apache-2.0
 *
 * Rings: what each entry does, in which order, and what becomes of clients that do not keep to the rules. The test
 * submits and reaps itself; a client's process is there for the memory.
 */
#define _GNU_SOURCE
#include "harness.h"

#include <errno.h>
#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <gmem_wire.h>

#define PATIENCE_NS 20000000000ull
#define PAGE 65536ul
#define PAGES 64ul
#define BIG_PAGES 4096ul /* of 4 KiB */
#define UNMAPPED (200ull << 30) /* from the window's base: more than any test maps */

struct ring {
	struct gmem_ring_shared *s;
	struct gmem_ring_sqe *sq;
	struct gmem_ring_cqe *cq;
	int bell;
	uint32_t tail, head;
};

struct shared {
	volatile int step;
	volatile uint64_t va, big;
	pid_t daemon;
	int fds[2];
};

static struct shared *shared;
static struct gmem_core *core;
static struct gmem_window window;

static struct ring ring_map(uint64_t session)
{
	struct ring ring = { 0 };
	int fds[2];

	CHECK_EQ(gmem_session_ring(core, session, fds), 0);
	ring.s = mmap(NULL, GMEM_RING_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fds[0], 0);
	CHECK(ring.s != MAP_FAILED);
	CHECK_EQ(ring.s->magic, GMEM_RING_MAGIC);
	CHECK_EQ(ring.s->version, GMEM_RING_VERSION);
	CHECK(ftruncate(fds[0], 0) && ftruncate(fds[0], 1 << 20)); /* sealed */
	ring.sq = (void *)((char *)ring.s + ring.s->sq_offset);
	ring.cq = (void *)((char *)ring.s + ring.s->cq_offset);
	ring.bell = dup(fds[1]);
	return ring;
}

static void ring_unmap(struct ring *ring)
{
	munmap(ring->s, GMEM_RING_BYTES);
	close(ring->bell);
}

static void ring_bell(struct ring *ring)
{
	eventfd_write(ring->bell, 1);
}

static bool try_stage(struct ring *ring, struct gmem_ring_sqe sqe)
{
	if (ring->tail - __atomic_load_n(&ring->s->sq_head, __ATOMIC_ACQUIRE) == GMEM_RING_SQ_ENTRIES)
		return false;
	ring->sq[ring->tail++ % GMEM_RING_SQ_ENTRIES] = sqe;
	return true;
}

/* Submits what is staged, all at once. */
static void publish(struct ring *ring)
{
	__atomic_store_n(&ring->s->sq_tail, ring->tail, __ATOMIC_RELEASE);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (__atomic_load_n(&ring->s->server_flags, __ATOMIC_RELAXED) & GMEM_RING_SLEEPS)
		ring_bell(ring);
}

static bool try_submit(struct ring *ring, struct gmem_ring_sqe sqe)
{
	if (!try_stage(ring, sqe))
		return false;
	publish(ring);
	return true;
}

static void submit(struct ring *ring, struct gmem_ring_sqe sqe)
{
	CHECK(try_submit(ring, sqe));
}

static bool try_reap(struct ring *ring, struct gmem_ring_cqe *ret)
{
	if (__atomic_load_n(&ring->s->cq_tail, __ATOMIC_ACQUIRE) == ring->head)
		return false;
	*ret = ring->cq[ring->head++ % GMEM_RING_CQ_ENTRIES];
	__atomic_store_n(&ring->s->cq_head, ring->head, __ATOMIC_RELEASE);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (__atomic_load_n(&ring->s->server_flags, __ATOMIC_RELAXED) & GMEM_RING_FULL)
		ring_bell(ring);
	return true;
}

static struct gmem_ring_cqe reap(struct ring *ring)
{
	const struct timespec wait = { 1, 0 };
	uint64_t until = now_ns() + PATIENCE_NS;
	struct gmem_ring_cqe cqe;

	while (!try_reap(ring, &cqe)) {
		CHECK(now_ns() < until);
		__atomic_store_n(&ring->s->client_waits, 1, __ATOMIC_SEQ_CST);
		if (__atomic_load_n(&ring->s->cq_tail, __ATOMIC_SEQ_CST) == ring->head)
			syscall(SYS_futex, &ring->s->cq_tail, FUTEX_WAIT, ring->head, &wait, NULL, 0);
		__atomic_store_n(&ring->s->client_waits, 0, __ATOMIC_RELAXED);
	}
	return cqe;
}

static struct gmem_ring_cqe call(struct ring *ring, struct gmem_ring_sqe sqe)
{
	struct gmem_ring_cqe cqe;

	sqe.user_data = now_ns();
	submit(ring, sqe);
	cqe = reap(ring);
	CHECK_EQ(cqe.user_data, sqe.user_data);
	return cqe;
}

static void expect(struct ring *ring, struct gmem_ring_sqe sqe, int result, enum gmem_ring_blame blame, int line)
{
	struct gmem_ring_cqe cqe = call(ring, sqe);

	if (cqe.result != result || cqe.blame != (uint32_t)blame) {
		fprintf(stderr, "%s:%d: op %d gave %d for argument %u, not %d for %d\n", __FILE__, line, sqe.op,
			cqe.result, cqe.blame, result, blame);
		exit(1);
	}
}

#define EXPECT(ring, result, about, ...)                                                                               \
	expect(ring, (struct gmem_ring_sqe){ __VA_ARGS__ }, result, GMEM_RING_BLAME_##about, __LINE__)

static void wait_step(int step)
{
	while (shared->step != step)
		sleep_ms(1);
}

static uint64_t ring_errors(void)
{
	struct gmem_core_stats stats;

	gmem_core_stats(core, &stats);
	return stats.ring_errors;
}

static struct gmem_page_info page_at(uint64_t session, uint64_t va)
{
	struct gmem_page_info info;
	size_t count;

	CHECK_EQ(gmem_query(core, session, va, 1, &info, 1, &count), 0);
	return info;
}

/* A session without a process, for what needs no memory. */
static struct ring bare_ring(uint64_t *ret_session)
{
	CHECK_EQ(gmem_session_create(core, getuid(), getpid(), ret_session), 0);
	return ring_map(*ret_session);
}

/* ---- every op ---- */

static int has_memory(struct client *client, void *arg)
{
	uint64_t *p = client_mmap(client, PAGES * PAGE, PAGE, GMEM_FORK_SHARE), *big;

	(void)arg;
	big = client_mmap(client, BIG_PAGES * 4096, 4096, GMEM_FORK_SHARE);
	for (size_t i = 0; i < PAGES; i++)
		p[i * PAGE / 8] = 100 + i;
	for (size_t i = 0; i < BIG_PAGES; i++)
		big[i * 512] = i;
	shared->va = (uint64_t)p;
	shared->big = (uint64_t)big;
	shared->step = 1;
	wait_step(2);
	for (size_t i = 0; i < PAGES / 2; i++) /* the second half was copied over the first */
		CHECK_EQ(p[i * PAGE / 8], 100 + PAGES / 2 + i);
	CHECK_EQ(p[(PAGES - 1) * PAGE / 8], 0); /* and its last page discarded */
	shared->step = 3;
	wait_step(4);
	return 0;
}

static int device_waits(struct client *client, void *arg)
{
	(void)client;
	(void)arg;
	wait_step(4);
	return 0;
}

static void test_bad_arguments(struct ring *ring, uint64_t va)
{
	uint64_t bytes = PAGES * PAGE;

	EXPECT(ring, -EINVAL, OP, .op = GMEM_RING_OP_COUNT);
	EXPECT(ring, -EINVAL, OP, .op = 0xffff);
	EXPECT(ring, -EINVAL, FLAGS, .op = GMEM_RING_NOP, .flags = 1);
	EXPECT(ring, -EINVAL, FLAGS, .op = GMEM_RING_NOP, .reserved = { 0, 0, 1 });
	EXPECT(ring, -EINVAL, ADVICE, .op = GMEM_RING_ADVISE, .va = va, .bytes = bytes, .arg = 77);
	EXPECT(ring, -EINVAL, HNID, .op = GMEM_RING_ADVISE, .hnid = -1, .va = va, .bytes = bytes,
	       .arg = GMEM_ADVISE_PINNED);
	EXPECT(ring, -EINVAL, HNID, .op = GMEM_RING_ADVISE, .hnid = -1, .va = va, .bytes = bytes,
	       .arg = GMEM_ADVISE_ACCESSED_BY);
	EXPECT(ring, -EINVAL, HNID, .op = GMEM_RING_PREFETCH, .hnid = 9, .va = va, .bytes = bytes);
	EXPECT(ring, -EINVAL, HNID, .op = GMEM_RING_PREFETCH, .hnid = -1, .va = va, .bytes = bytes);
	EXPECT(ring, -EINVAL, HNID, .op = GMEM_RING_PREFETCH, .hnid = INT16_MIN, .va = va, .bytes = bytes);
	EXPECT(ring, -EINVAL, BYTES, .op = GMEM_RING_PREFETCH, .va = va);
	EXPECT(ring, -EINVAL, BYTES, .op = GMEM_RING_PREFETCH, .va = va, .bytes = UINT64_MAX);
	EXPECT(ring, -EINVAL, VA, .op = GMEM_RING_PREFETCH, .va = va, .bytes = INT64_MAX);
	EXPECT(ring, -EINVAL, VA, .op = GMEM_RING_PREFETCH, .va = va, .bytes = bytes + UNMAPPED / 2);
	EXPECT(ring, -EINVAL, VA, .op = GMEM_RING_PREFETCH, .va = 4096, .bytes = 4096);
	EXPECT(ring, -EINVAL, VA, .op = GMEM_RING_DISCARD, .va = window.base + window.bytes - 4096, .bytes = 8192);
	EXPECT(ring, -EINVAL, DST, .op = GMEM_RING_HMEMCPY, .va = 1, .arg = va, .bytes = 8);
	EXPECT(ring, -EINVAL, SRC, .op = GMEM_RING_HMEMCPY, .va = va, .arg = UINT64_MAX, .bytes = 8);
	EXPECT(ring, -EINVAL, DST, .op = GMEM_RING_HMEMCPY, .va = va, .arg = va + 4, .bytes = 8);
	EXPECT(ring, -EINVAL, BYTES, .op = GMEM_RING_MMAP);
	EXPECT(ring, -ENOMEM, BYTES, .op = GMEM_RING_MMAP, .bytes = INT64_MAX);
	EXPECT(ring, -EINVAL, PAGE_BYTES, .op = GMEM_RING_MMAP, .bytes = 4096, .arg = 8192);
	EXPECT(ring, -EINVAL, VA, .op = GMEM_RING_MMAP_COMMIT, .va = va + 1);
	EXPECT(ring, -EINVAL, VA, .op = GMEM_RING_MUNMAP, .va = va + 1, .bytes = 4096);
	EXPECT(ring, -EINVAL, VA, .op = GMEM_RING_MUNMAP, .va = 0, .bytes = 4096);
	EXPECT(ring, -ENOENT, CONTEXT, .op = GMEM_RING_ACQUIRE, .va = va, .bytes = 4096, .arg = 12345);
	EXPECT(ring, -ENOENT, CONTEXT, .op = GMEM_RING_RELEASE, .va = va, .bytes = 4096, .arg = 12345);
	EXPECT(ring, -EINVAL, RANGES, .op = GMEM_RING_ACQUIRE, .va = 8, .bytes = 4096, .arg = 12345);
}

static void test_ops(void)
{
	struct client *client, *context, *other;
	struct gmem_ring_cqe cqe;
	struct ring ring, others;
	uint64_t va, half = PAGES / 2 * PAGE;
	int gpu = 1;

	shared->step = 0;
	client = client_start(core, has_memory, NULL);
	ring = ring_map(client->session);
	wait_step(1);
	va = shared->va;
	EXPECT(&ring, 0, NONE, .op = GMEM_RING_NOP);
	test_bad_arguments(&ring, va);

	EXPECT(&ring, 0, NONE, .op = GMEM_RING_PREFETCH, .hnid = gpu, .va = va, .bytes = PAGES * PAGE);
	CHECK_EQ(page_at(client->session, va).valid, 1 << gpu);
	CHECK_EQ(page_at(client->session, va + (PAGES - 1) * PAGE).valid, 1 << gpu);
	EXPECT(&ring, 0, NONE, .op = GMEM_RING_PREFETCH, .va = va + 8, .bytes = PAGES * PAGE - 16);
	CHECK_EQ(page_at(client->session, va + (PAGES - 1) * PAGE).valid, 1);
	EXPECT(&ring, 0, NONE, .op = GMEM_RING_ADVISE, .va = va, .bytes = half, .arg = GMEM_ADVISE_READ_MOSTLY);
	CHECK(page_at(client->session, va + half - 1).flags & GMEM_PAGE_READ_MOSTLY);
	CHECK(!(page_at(client->session, va + half).flags & GMEM_PAGE_READ_MOSTLY));
	EXPECT(&ring, 0, NONE, .op = GMEM_RING_ADVISE, .va = va, .bytes = half, .arg = GMEM_ADVISE_NO_READ_MOSTLY);
	EXPECT(&ring, 0, NONE, .op = GMEM_RING_HMEMCPY, .hnid = -1, .va = va, .arg = va + half, .bytes = half);
	/* not all of the last page but one: only the last goes */
	EXPECT(&ring, 0, NONE, .op = GMEM_RING_DISCARD, .va = va + PAGES * PAGE - 2 * PAGE + 1, .bytes = 2 * PAGE - 1);
	CHECK_EQ(page_at(client->session, va + (PAGES - 1) * PAGE).state, GMEM_NOMAP);
	CHECK_EQ(page_at(client->session, va + (PAGES - 2) * PAGE).state, GMEM_RESIDENT);
	/* a discard of many slices leaves no page between two of them */
	EXPECT(&ring, 0, NONE, .op = GMEM_RING_DISCARD, .va = shared->big + 1, .bytes = BIG_PAGES * 4096 - 2);
	for (size_t i = 1; i < BIG_PAGES - 1; i++)
		CHECK_EQ(page_at(client->session, shared->big + i * 4096).state, GMEM_NOMAP);
	CHECK_EQ(page_at(client->session, shared->big).state, GMEM_RESIDENT);
	CHECK_EQ(page_at(client->session, shared->big + (BIG_PAGES - 1) * 4096).state, GMEM_RESIDENT);
	shared->step = 2;
	wait_step(3);

	cqe = call(&ring, (struct gmem_ring_sqe){ .op = GMEM_RING_REGION, .va = va + 5 });
	CHECK_EQ(cqe.result, 0);
	CHECK_EQ(cqe.values[GMEM_RING_VA], va);
	CHECK_EQ(cqe.values[GMEM_RING_LENGTH], PAGES * PAGE);
	CHECK_EQ(cqe.values[GMEM_RING_PAGE_BYTES], PAGE);
	EXPECT(&ring, -EINVAL, VA, .op = GMEM_RING_REGION, .va = window.base + UNMAPPED);
	cqe = call(&ring, (struct gmem_ring_sqe){ .op = GMEM_RING_MMAP, .bytes = 5000, .arg = 4096 });
	CHECK_EQ(cqe.result, 0);
	CHECK_EQ(cqe.values[GMEM_RING_LENGTH], 8192);
	CHECK_EQ(cqe.values[GMEM_RING_PAGE_BYTES], 4096);
	CHECK_EQ(cqe.values[GMEM_RING_OFFSET], cqe.values[GMEM_RING_VA] - window.base);
	EXPECT(&ring, -EINVAL, VA, .op = GMEM_RING_MMAP_COMMIT, .va = cqe.values[GMEM_RING_VA]); /* not mapped there */
	EXPECT(&ring, 0, NONE, .op = GMEM_RING_MUNMAP, .va = cqe.values[GMEM_RING_VA], .bytes = 8192);
	EXPECT(&ring, -EINVAL, VA, .op = GMEM_RING_PREFETCH, .va = cqe.values[GMEM_RING_VA], .bytes = 8192);

	context = context_start(client, gpu, device_waits, NULL);
	while (!__atomic_load_n(&context->context, __ATOMIC_ACQUIRE))
		sleep_ms(1);
	EXPECT(&ring, 0, NONE, .op = GMEM_RING_ACQUIRE, .flags = GMEM_RING_WRITE, .va = va, .bytes = 4 * PAGE,
	       .arg = context->context);
	CHECK_EQ(page_at(client->session, va).valid, 1 << gpu);
	EXPECT(&ring, -EBUSY, NONE, .op = GMEM_RING_PREFETCH, .va = va, .bytes = PAGE);
	EXPECT(&ring, -EINVAL, RANGES, .op = GMEM_RING_RELEASE, .va = va, .bytes = PAGE, .arg = context->context);
	EXPECT(&ring, 0, NONE, .op = GMEM_RING_RELEASE, .va = va, .bytes = 4 * PAGE, .arg = context->context);
	EXPECT(&ring, 0, NONE, .op = GMEM_RING_PREFETCH, .va = va, .bytes = PAGE);
	EXPECT(&ring, -ENOMEM, RANGES, .op = GMEM_RING_ACQUIRE, .va = shared->big, .bytes = BIG_PAGES * 4096,
	       .arg = context->context);
	/* another session's context is not there */
	other = calloc(1, sizeof(*other));
	others = bare_ring(&other->session);
	EXPECT(&others, -ENOENT, CONTEXT, .op = GMEM_RING_RELEASE, .va = va, .bytes = 4096, .arg = context->context);
	EXPECT(&others, -EINVAL, VA, .op = GMEM_RING_DISCARD, .va = va, .bytes = 4096);
	CHECK_EQ(gmem_session_destroy(core, other->session), 0);
	CHECK(__atomic_load_n(&others.s->server_flags, __ATOMIC_ACQUIRE) & GMEM_RING_CLOSED);
	ring_unmap(&others);
	free(other);
	shared->step = 4;
	CHECK_EQ(client_wait(context), 0);
	CHECK_EQ(client_wait(client), 0);
	ring_unmap(&ring);
	printf("every op, and every argument to blame\n");
}

/* ---- streams ---- */

static int has_big(struct client *client, void *arg)
{
	uint64_t *big = client_mmap(client, BIG_PAGES * 4096, 4096, GMEM_FORK_SHARE);

	(void)arg;
	for (size_t i = 0; i < BIG_PAGES; i++)
		big[i * 512] = i;
	shared->big = (uint64_t)big;
	shared->step = 1;
	wait_step(2);
	return 0;
}

/* Stream 1 has a long copy and then NOPs, stream 2 only NOPs: those of 2 overtake, those of 1 do not. */
static void test_streams(void)
{
	struct client *client;
	struct ring ring;
	uint32_t last[16] = { 0 }, early = 0;
	bool copied = false;

	shared->step = 0;
	client = client_start(core, has_big, NULL);
	ring = ring_map(client->session);
	wait_step(1);
	CHECK(try_stage(&ring, (struct gmem_ring_sqe){ .op = GMEM_RING_HMEMCPY, .stream = 1, .user_data = 1,
						       .va = shared->big, .arg = shared->big + BIG_PAGES * 2048,
						       .bytes = BIG_PAGES * 2048 }));
	for (int i = 0; i < 10; i++)
		for (uint16_t stream = 1; stream <= 2; stream++)
			CHECK(try_stage(&ring, (struct gmem_ring_sqe){ .stream = stream,
								       .user_data = stream * 100 + i }));
	publish(&ring);
	for (int i = 0; i < 21; i++) {
		struct gmem_ring_cqe cqe = reap(&ring);

		CHECK_EQ(cqe.result, 0);
		if (cqe.user_data == 1) {
			copied = true;
		} else if (cqe.user_data < 200) {
			CHECK(copied);
			CHECK_EQ(cqe.user_data, 100 + last[1]++);
		} else {
			early += !copied;
			CHECK_EQ(cqe.user_data, 200 + last[2]++);
		}
	}
	CHECK_EQ(early, 10);
	/* each of many streams in order, long and short mixed */
	memset(last, 0, sizeof(last));
	for (uint32_t n = 0; n < 16 * 15; n++)
		submit(&ring, (struct gmem_ring_sqe){ .op = n % 3 ? GMEM_RING_NOP : GMEM_RING_PREFETCH,
						      .stream = n % 16, .user_data = n, .hnid = n % 2,
						      .va = shared->big + n * 4096 * 8, .bytes = 4096 * 8 });
	for (uint32_t n = 0; n < 16 * 15; n++) {
		struct gmem_ring_cqe cqe = reap(&ring);

		CHECK_EQ(cqe.result, 0);
		CHECK_EQ(cqe.user_data / 16, last[cqe.user_data % 16]++);
	}
	shared->step = 2;
	CHECK_EQ(client_wait(client), 0);
	ring_unmap(&ring);
	printf("streams: in order each, interleaved\n");
}

/* ---- back-pressure ---- */

static void test_back_pressure(void)
{
	uint64_t session, submitted = 0;
	struct ring ring = bare_ring(&session);
	uint64_t before = ring_errors();

	/* nothing is consumed: it stops when the completion queue and then the submission queue are full */
	for (uint64_t idle_since = now_ns(); now_ns() - idle_since < 300000000;)
		if (try_submit(&ring, (struct gmem_ring_sqe){ .user_data = submitted })) {
			submitted++;
			idle_since = now_ns();
		}
	CHECK_EQ(submitted, GMEM_RING_SQ_ENTRIES + GMEM_RING_CQ_ENTRIES);
	CHECK_EQ(ring.s->cq_tail, GMEM_RING_CQ_ENTRIES);
	CHECK(ring.s->server_flags & GMEM_RING_FULL);
	for (uint64_t n = 0; n < submitted; n++)
		CHECK_EQ(reap(&ring).user_data, n);
	CHECK_EQ(ring_errors(), before);
	EXPECT(&ring, 0, NONE, .op = GMEM_RING_NOP);
	gmem_session_destroy(core, session);
	ring_unmap(&ring);
	printf("back-pressure: nothing lost\n");
}

/* ---- clients that do not keep to the rules ---- */

static void wait_broken(struct ring *ring)
{
	uint64_t until = now_ns() + PATIENCE_NS;

	while (!(__atomic_load_n(&ring->s->server_flags, __ATOMIC_ACQUIRE) & GMEM_RING_BROKEN)) {
		CHECK(now_ns() < until);
		sleep_ms(1);
	}
}

static void test_bad_words(struct ring *good)
{
	static const struct {
		uint32_t tail, head;
	} bad[] = { { GMEM_RING_SQ_ENTRIES + 1, 0 }, { UINT32_MAX, 0 }, { 0, 1 }, { 1, 2 }, { 1u << 31, 0 },
		    { 0, GMEM_RING_CQ_ENTRIES } };

	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		uint64_t session, before = ring_errors();
		struct ring ring = bare_ring(&session);
		uint32_t completed;

		__atomic_store_n(&ring.s->cq_head, bad[i].head, __ATOMIC_SEQ_CST);
		__atomic_store_n(&ring.s->sq_tail, bad[i].tail, __ATOMIC_SEQ_CST);
		ring_bell(&ring);
		wait_broken(&ring);
		CHECK_EQ(ring_errors(), before + 1);
		/* not served any more, whatever it says now */
		completed = ring.s->cq_tail;
		ring.s->cq_head = 0;
		ring.s->sq_tail = 1;
		ring_bell(&ring);
		EXPECT(good, 0, NONE, .op = GMEM_RING_NOP);
		sleep_ms(5);
		CHECK_EQ(ring.s->cq_tail, completed);
		CHECK_EQ(gmem_session_destroy(core, session), 0);
		ring_unmap(&ring);
	}
	printf("bad heads and tails: the ring is broken, others are not\n");
}

static uint64_t seed = 0x9e3779b97f4a7c15ull;

static uint64_t draw(void)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	return seed ^= seed << 17;
}

/* All bytes that the client can write, the heads and tails sometimes plausible; and then a session that is served. */
static void test_random_bytes(struct ring *good, int rounds)
{
	for (int round = 0; round < rounds; round++) {
		uint64_t session;
		struct ring ring = bare_ring(&session);
		uint64_t *words = (uint64_t *)ring.s;

		for (int again = 0; again < 3; again++) {
			uint32_t plausible = draw() % 300;

			for (size_t i = 0; i < GMEM_RING_BYTES / 8; i++)
				words[i] = draw() & (draw() % 4 ? 0xf : ~0ull);
			for (size_t i = 0; i < GMEM_RING_SQ_ENTRIES; i++) { /* many are known ops on the window */
				ring.sq[i].op = draw() % (GMEM_RING_OP_COUNT + 1);
				ring.sq[i].flags = 0;
				if (draw() % 2)
					ring.sq[i].va = window.base + (draw() % window.bytes & ~4095ull);
				memset(ring.sq[i].reserved, 0, sizeof(ring.sq[i].reserved));
				if (ring.sq[i].op == GMEM_RING_MMAP)
					ring.sq[i].bytes %= 1 << 20;
			}
			if (draw() % 4) {
				__atomic_store_n(&ring.s->cq_head, ring.s->cq_tail, __ATOMIC_SEQ_CST);
				__atomic_store_n(&ring.s->sq_tail, plausible, __ATOMIC_SEQ_CST);
			}
			ring_bell(&ring);
			EXPECT(good, 0, NONE, .op = GMEM_RING_NOP);
		}
		CHECK_EQ(gmem_session_destroy(core, session), 0);
		ring_unmap(&ring);
	}
	printf("%d rings of random bytes: others are served\n", rounds);
}

/* Sound entries on memory that is there, in any order: each is answered, whatever the others do to the same pages. */
static void test_random_ops(uint32_t count)
{
	static const uint64_t advice[] = { GMEM_ADVISE_READ_MOSTLY, GMEM_ADVISE_NO_READ_MOSTLY, GMEM_ADVISE_PINNED,
					   GMEM_ADVISE_UNPINNED, GMEM_ADVISE_COLD, GMEM_ADVISE_DISCARD };
	uint32_t submitted = 0, answered = 0, done_well = 0;
	struct client *client;
	struct ring ring;

	shared->step = 0;
	client = client_start(core, has_big, NULL);
	ring = ring_map(client->session);
	wait_step(1);
	while (answered < count) {
		struct gmem_ring_sqe sqe = { .op = draw() % GMEM_RING_OP_COUNT, .stream = draw() % 12,
					     .hnid = (int16_t)(draw() % 2),
					     .va = shared->big + draw() % (BIG_PAGES * 4096),
					     .bytes = 1 + draw() % (256 << 10) };
		struct gmem_ring_cqe cqe;

		if (sqe.op == GMEM_RING_ADVISE)
			sqe.arg = advice[draw() % 6];
		else if (sqe.op == GMEM_RING_HMEMCPY)
			sqe.arg = shared->big + draw() % (BIG_PAGES * 4096);
		else if (sqe.op == GMEM_RING_MUNMAP && draw() % 64)
			sqe.op = GMEM_RING_NOP;
		if (sqe.op == GMEM_RING_MUNMAP) {
			sqe.va &= ~4095ull;
			sqe.bytes = 4096;
		}
		if (submitted < count && try_submit(&ring, sqe)) {
			submitted++;
			continue;
		}
		cqe = reap(&ring);
		do {
			answered++;
			done_well += !cqe.result;
		} while (try_reap(&ring, &cqe));
	}
	CHECK_EQ(answered, submitted);
	shared->step = 2;
	CHECK_EQ(client_wait(client), 0);
	ring_unmap(&ring);
	printf("%u random requests, %u of them done: all answered\n", answered, done_well);
}

/* What a queue of a hundred thousand comes to: an answer each. */
static void test_many_errors(int count)
{
	uint64_t session, start = now_ns();
	struct ring ring = bare_ring(&session);
	int submitted = 0, answered = 0;
	struct gmem_ring_cqe cqe;

	while (answered < count) {
		while (submitted < count &&
		       try_submit(&ring, (struct gmem_ring_sqe){ .op = GMEM_RING_ADVISE, .va = window.base + UNMAPPED,
								 .bytes = 4096, .arg = GMEM_ADVISE_COLD }))
			submitted++;
		cqe = reap(&ring);
		do {
			CHECK_EQ(cqe.result, -EINVAL);
			CHECK_EQ(cqe.blame, GMEM_RING_BLAME_VA);
			answered++;
		} while (try_reap(&ring, &cqe));
	}
	CHECK_EQ(submitted, count);
	gmem_session_destroy(core, session);
	ring_unmap(&ring);
	printf("%d advices on nothing: all answered, %llu ns each\n", count,
	       (unsigned long long)((now_ns() - start) / (uint64_t)count));
}

/* ---- ends ---- */

static int fetch_fd(int fd)
{
	int pidfd = (int)syscall(SYS_pidfd_open, shared->daemon, 0);
	int got = (int)syscall(SYS_pidfd_getfd, pidfd, fd, 0);

	CHECK(got >= 0);
	close(pidfd);
	return got;
}

static int submits_for_ever(struct client *client, void *arg)
{
	struct gmem_ring_cqe cqe;
	struct ring ring = { 0 };
	uint64_t *p = client_mmap(client, PAGES * PAGE, PAGE, GMEM_FORK_SHARE);

	(void)arg;
	wait_step(1);
	ring.bell = fetch_fd(shared->fds[1]);
	ring.s = mmap(NULL, GMEM_RING_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fetch_fd(shared->fds[0]), 0);
	CHECK(ring.s != MAP_FAILED);
	ring.sq = (void *)((char *)ring.s + ring.s->sq_offset);
	ring.cq = (void *)((char *)ring.s + ring.s->cq_offset);
	shared->step = 2;
	for (uint64_t n = 0;; n++) {
		try_submit(&ring, (struct gmem_ring_sqe){ .op = GMEM_RING_PREFETCH, .hnid = n % 2, .stream = n % 11,
							  .va = (uint64_t)p + n % PAGES * PAGE, .bytes = PAGE });
		while (try_reap(&ring, &cqe))
			;
	}
	return 0;
}

/* Killed in the middle of submitting, with requests under way. */
static void test_kill(int rounds)
{
	for (int i = 0; i < rounds; i++) {
		struct client *client;

		shared->step = 0;
		shared->daemon = getpid();
		client = client_start(core, submits_for_ever, NULL);
		CHECK_EQ(gmem_session_ring(core, client->session, shared->fds), 0);
		shared->step = 1;
		wait_step(2);
		sleep_ms(3 + i % 5);
		kill(client->pid, SIGKILL);
		CHECK(WIFSIGNALED(client_wait(client)));
	}
	printf("%d clients killed while they submit\n", rounds);
}

static void test_teardown_while_busy(int rounds)
{
	for (int i = 0; i < rounds; i++) {
		struct client *client;
		struct ring ring;

		shared->step = 0;
		client = client_start(core, has_big, NULL);
		ring = ring_map(client->session);
		wait_step(1);
		for (uint32_t n = 0; n < 64; n++)
			submit(&ring, (struct gmem_ring_sqe){ .op = GMEM_RING_PREFETCH, .hnid = (int16_t)(n % 2),
							      .stream = n % 5, .va = shared->big,
							      .bytes = BIG_PAGES * 4096 });
		sleep_ms(i % 4);
		CHECK_EQ(gmem_session_destroy(core, client->session), 0);
		CHECK(__atomic_load_n(&ring.s->server_flags, __ATOMIC_ACQUIRE) & GMEM_RING_CLOSED);
		kill(client->pid, SIGKILL);
		waitpid(client->pid, NULL, 0);
		client_free(client);
		ring_unmap(&ring);
	}
	printf("%d sessions ended with rings at work\n", rounds);
}

/* More rings of one user at work than there are threads; another's requests are served. */
static void test_many_rings(void)
{
	uint64_t sessions[12];
	struct ring rings[12];
	struct gmem_ring_cqe cqe;

	for (int i = 0; i < 12; i++)
		rings[i] = bare_ring(&sessions[i]);
	for (int n = 0; n < 20000; n++)
		for (int i = 0; i < 12; i++) {
			try_submit(&rings[i], (struct gmem_ring_sqe){ .stream = (uint16_t)n });
			while (try_reap(&rings[i], &cqe))
				CHECK_EQ(cqe.result, 0);
		}
	for (int i = 0; i < 12; i++) {
		while (rings[i].head != rings[i].tail)
			reap(&rings[i]);
		CHECK_EQ(gmem_session_destroy(core, sessions[i]), 0);
		ring_unmap(&rings[i]);
	}
	printf("twelve rings at once\n");
}

static void test_latency(void)
{
	uint64_t session, start;
	struct ring ring = bare_ring(&session);
	int count = 20000;

	start = now_ns();
	for (int i = 0; i < count; i++) {
		struct gmem_ring_cqe cqe;

		submit(&ring, (struct gmem_ring_sqe){ 0 });
		while (!try_reap(&ring, &cqe))
			sched_yield();
	}
	printf("NOP, spinning: %llu ns\n", (unsigned long long)((now_ns() - start) / (uint64_t)count));
	start = now_ns();
	for (int i = 0; i < count / 4; i++)
		call(&ring, (struct gmem_ring_sqe){ 0 });
	printf("NOP, futex: %llu ns\n", (unsigned long long)((now_ns() - start) / (uint64_t)(count / 4)));
	gmem_session_destroy(core, session);
	ring_unmap(&ring);
}

static void test_destroy_with_rings(void)
{
	uint64_t session;
	struct ring ring = bare_ring(&session), other = bare_ring(&session);

	for (int i = 0; i < 100; i++)
		submit(&ring, (struct gmem_ring_sqe){ .user_data = (uint64_t)i });
	gmem_core_destroy(core);
	CHECK(ring.s->server_flags & GMEM_RING_CLOSED);
	ring_unmap(&ring);
	ring_unmap(&other);
	printf("the core ended with rings open\n");
}

int main(void)
{
	uint64_t session;
	struct ring good;

	shared = shared_bytes(sizeof(*shared));
	core = core_start((struct gmem_core_config){ .event_fork = true });
	gmem_core_window(core, &window);
	CHECK_EQ(attach_simgpu(core, "simgpu0", "capacity=8M"), 1);
	good = bare_ring(&session);
	test_latency();
	test_ops();
	test_streams();
	test_back_pressure();
	test_bad_words(&good);
	test_random_bytes(&good, 150);
	test_random_ops(30000);
	test_many_errors(200000);
	test_many_rings();
	test_teardown_while_busy(12);
	test_kill(20);
	EXPECT(&good, 0, NONE, .op = GMEM_RING_NOP);
	gmem_session_destroy(core, session);
	ring_unmap(&good);
	core_settle(core);
	test_destroy_with_rings();
	return 0;
}
