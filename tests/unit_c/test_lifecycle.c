/* SPDX-License-Identifier: Apache-2.0
 *
 * Processes come, fork, die and are killed; devices fill up, are detached, can't replay: nothing leaks, nothing hangs,
 * nobody reads zeros that were never written.
 */
#define _GNU_SOURCE
#include "harness.h"

#include <gmem/stats.h>

#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 65536ul
#define PAGES 32
#define MOVES 2000

struct shared {
	volatile int step;
	volatile uint64_t va;
	volatile int result;
};

static struct shared *shared;

static int count_fds(void)
{
	DIR *dir = opendir("/proc/self/fd");
	int count = 0;

	while (readdir(dir))
		count++;
	closedir(dir);
	return count;
}

/* A fault thread may hold on to a view for a moment after its process has gone: as many as stay for a while. */
static int settled_fds(void)
{
	int last = count_fds(), now;

	for (int same = 0, tries = 0; same < 20 && tries < 400; tries++) {
		sleep_ms(5);
		now = count_fds();
		same = now == last ? same + 1 : 0;
		last = now;
	}
	return last;
}

static void wait_step(int step)
{
	while (shared->step != step)
		sleep_ms(1);
}

static int writes_for_ever(struct client *client, void *arg)
{
	volatile uint64_t *p = (volatile uint64_t *)shared->va;

	(void)arg;
	if (!client->hnid) {
		p = client_mmap(client, PAGES * PAGE, PAGE, GMEM_FORK_SHARE);
		shared->va = (uint64_t)p;
		shared->step = 1;
	}
	for (uint64_t i = 0;; i++)
		p[i % PAGES * PAGE / 8]++;
	return 0;
}

static void expect_empty(struct gmem_core *core)
{
	struct gmem_hnode_stats hnodes[GMEM_HNODE_MAX];
	struct gmem_core_stats stats;
	size_t count;

	core_settle(core);
	gmem_core_stats(core, &stats);
	CHECK_EQ(stats.sessions, 0);
	CHECK_EQ(stats.contexts, 0);
	CHECK_EQ(stats.objects, 0);
	CHECK_EQ(stats.lpt_bytes, 0);
	gmem_hnodes(core, hnodes, &count);
	for (size_t i = 0; i < count; i++)
		CHECK_EQ(hnodes[i].used_bytes, 0);
}

/* Killed in the middle of faults and migrations, client first or context first. */
static void test_kill(struct gmem_core *core, int rounds)
{
	int before = 0;

	for (int i = 0; i < rounds; i++) {
		struct client *client, *context;

		shared->step = 0;
		client = client_start(core, writes_for_ever, NULL);
		wait_step(1);
		context = context_start(client, 1, writes_for_ever, NULL);
		sleep_ms(5 + i % 7);
		kill(i % 2 ? client->pid : context->pid, SIGKILL);
		sleep_ms(i % 3);
		kill(i % 2 ? context->pid : client->pid, SIGKILL);
		CHECK(WIFSIGNALED(client_wait(context)));
		CHECK(WIFSIGNALED(client_wait(client)));
		expect_empty(core);
		if (i == 2)
			before = settled_fds();
	}
	CHECK(settled_fds() <= before); /* some may have been closing then */
	printf("%d clients killed: no page, no fd left\n", rounds);
}

/* ---- fork by event: the child shares, both ways, under eviction ---- */

static int forks(struct client *client, void *arg)
{
	volatile uint64_t *p = client_mmap(client, PAGES * PAGE, PAGE, GMEM_FORK_SHARE);
	int status;
	pid_t pid;

	(void)arg;
	for (int i = 0; i < PAGES; i++)
		p[i * PAGE / 8] = 100 + i;
	CHECK_EQ(client_prefetch(client, 1, (void *)p, PAGES / 2 * PAGE), 0);
	pid = fork();
	if (!pid) {
		for (int round = 0; round < 50; round++)
			for (int i = 0; i < PAGES; i++)
				__atomic_fetch_add(&p[i * PAGE / 8], 1, __ATOMIC_RELAXED);
		_exit(0);
	}
	for (int round = 0; round < 50; round++)
		for (int i = 0; i < PAGES; i++) {
			__atomic_fetch_add(&p[i * PAGE / 8], 1, __ATOMIC_RELAXED);
			if (round % 10 == 0 && i % 8 == 0)
				CHECK_EQ(client_prefetch(client, 1, (void *)&p[i * PAGE / 8], PAGE), 0);
		}
	CHECK(waitpid(pid, &status, 0) == pid);
	CHECK_EQ(status, 0);
	for (int i = 0; i < PAGES; i++)
		CHECK_EQ(p[i * PAGE / 8], 200 + i);
	return 0;
}

static void test_fork(struct gmem_core *core)
{
	struct gmem_event events[64];
	struct client *client;
	size_t count, forked = 0;

	while (gmem_event_read(core, events, 64))
		;
	client = client_start(core, forks, NULL);
	CHECK_EQ(client_wait(client), 0);
	count = gmem_event_read(core, events, 64);
	for (size_t i = 0; i < count; i++)
		if (events[i].type == GMEM_EVENT_FORK) {
			uint64_t child;
			bool stored;

			forked++;
			CHECK_EQ(gmem_session_fork(core, events[i].session, 0, 1, &child, &stored), -ENOENT);
		}
	CHECK_EQ(forked, 1);
	gmem_core_reap(core); /* the child never showed itself, and is gone */
	expect_empty(core);
	printf("fork: shared both ways, orphan reaped\n");
}

/* ---- a session that ends under a living client gives SIGBUS, not zeros ---- */

static int outlives(struct client *client, void *arg)
{
	volatile uint64_t *p = client_mmap(client, PAGES * PAGE, PAGE, GMEM_FORK_SHARE);

	(void)arg;
	p[0] = 1;
	shared->step = 1;
	wait_step(2);
	shared->result = (int)p[0]; /* SIGBUS */
	return 0;
}

static void test_session_end(struct gmem_core *core)
{
	struct client *client;
	int status;

	shared->step = 0;
	shared->result = -1;
	client = client_start(core, outlives, NULL);
	wait_step(1);
	CHECK_EQ(gmem_session_destroy(core, client->session), 0);
	shared->step = 2;
	CHECK(waitpid(client->pid, &status, 0) == client->pid);
	CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS);
	CHECK_EQ(shared->result, -1);
	client_free(client);
	expect_empty(core);
	printf("ended session: SIGBUS\n");
}

/* ---- contexts that touch what they may not; devices that are too small ---- */

static int maps_and_waits(struct client *client, void *arg)
{
	volatile uint64_t *p = client_mmap(client, PAGES * PAGE, PAGE, GMEM_FORK_SHARE);

	(void)arg;
	p[0] = 77;
	shared->va = (uint64_t)p;
	shared->step = 1;
	wait_step(2);
	CHECK_EQ(p[0], 77);
	return 0;
}

static int touches(struct client *client, void *arg)
{
	(void)client;
	shared->result = (int)*(volatile uint64_t *)(shared->va + (uint64_t)arg);
	return 0;
}

static int touches_when_told(struct client *client, void *arg)
{
	wait_step(5);
	return touches(client, arg);
}

static int signal_of(struct client *context)
{
	int status = client_wait(context);

	return WIFSIGNALED(status) ? WTERMSIG(status) : -status;
}

static void test_device_faults(struct gmem_core *core)
{
	struct gmem_range range = { 0, PAGE };
	struct client *client, *context;
	int strict = attach_simgpu(core, "strict", "capacity=1M replayable=off");
	int tiny = attach_simgpu(core, "tiny", "capacity=8K");

	CHECK(strict > 0 && tiny > 0);
	shared->step = 0;
	client = client_start(core, maps_and_waits, NULL);
	wait_step(1);
	range.va = shared->va;
	CHECK_EQ(signal_of(context_start(client, 1, touches, (void *)(PAGES * PAGE))), SIGSEGV);
	CHECK_EQ(signal_of(context_start(client, strict, touches, NULL)), SIGBUS);
	CHECK_EQ(signal_of(context_start(client, tiny, touches, NULL)), SIGBUS);
	shared->result = 0;
	CHECK_EQ(signal_of(context_start(client, 1, touches, NULL)), 0);
	CHECK_EQ(shared->result, 77);
	CHECK_EQ(gmem_prefetch(core, client->session, tiny, shared->va, PAGE), -ENOMEM);

	/* bracketed by acquire and release it may */
	shared->result = 0;
	context = context_start(client, strict, touches_when_told, NULL);
	while (!context->context)
		sleep_ms(1);
	CHECK_EQ(gmem_release(core, context->context, &range, 1), -EINVAL);
	CHECK_EQ(gmem_acquire(core, context->context, &(struct gmem_range){ shared->va, PAGES * PAGE }, 1, true, 0),
		 -ENOMEM); /* more than the device has */
	CHECK_EQ(gmem_acquire(core, context->context, &range, 1, true, 0), 0);
	CHECK_EQ(gmem_acquire(core, context->context, &range, 1, false, 0), 0);
	CHECK_EQ(gmem_release(core, context->context, &range, 1), 0);
	CHECK_EQ(gmem_prefetch(core, client->session, 0, shared->va, PAGE), -EBUSY);
	CHECK_EQ(gmem_discard(core, client->session, shared->va, PAGE), -EBUSY);
	CHECK_EQ(gmem_device_detach(core, strict, false), -EBUSY);
	shared->step = 5;
	CHECK_EQ(signal_of(context), 0);
	CHECK_EQ(shared->result, 77);
	CHECK_EQ(gmem_prefetch(core, client->session, 0, shared->va, PAGE), 0); /* the hold ended with its context */
	CHECK_EQ(gmem_device_detach(core, strict, false), 0);
	CHECK_EQ(gmem_device_detach(core, tiny, false), 0);
	shared->step = 2;
	CHECK_EQ(client_wait(client), 0);
	expect_empty(core);
	printf("device faults: refused or served as they should\n");
}

/* Everything pinned: the next page is refused at once, and after an unpin it fits. */
static int pins(struct client *client, void *arg)
{
	char *p = client_mmap(client, PAGES * PAGE, PAGE, GMEM_FORK_SHARE);

	(void)arg;
	memset(p, 1, PAGES * PAGE);
	CHECK_EQ(client_advise(client, 1, p, 8 * PAGE, GMEM_ADVISE_PINNED), 0);
	CHECK_EQ(client_advise(client, 1, p + 8 * PAGE, PAGE, GMEM_ADVISE_PINNED), -ENOMEM);
	CHECK_EQ(client_prefetch(client, 1, p + 8 * PAGE, PAGE), -ENOMEM);
	CHECK_EQ(client_advise(client, 1, p, PAGE, GMEM_ADVISE_UNPINNED), 0);
	CHECK_EQ(client_prefetch(client, 1, p + 8 * PAGE, PAGE), 0);
	for (unsigned long i = 0; i < PAGES; i++)
		CHECK_EQ(p[i * PAGE], 1);
	return 0;
}

/* ---- faults across a slow link keep nobody else waiting ---- */

static void *touch_page(void *at)
{
	(void)*(volatile char *)at;
	__atomic_fetch_add(&shared->step, 1, __ATOMIC_SEQ_CST);
	return NULL;
}

static int waits_for_the_link(struct client *client, void *arg)
{
	char *p = client_mmap(client, PAGES * PAGE, PAGE, GMEM_FORK_SHARE);
	pthread_t threads[2]; /* as many as there are fault threads */

	memset(p, 1, 2 * PAGE);
	CHECK_EQ(client_prefetch(client, (int)(long)arg, p, 2 * PAGE), 0);
	shared->step = 1;
	for (int i = 0; i < 2; i++) {
		CHECK(!pthread_create(&threads[i], NULL, touch_page, p + i * PAGE));
		sleep_ms(20); /* so that they are not read as one batch */
	}
	for (int i = 0; i < 2; i++)
		pthread_join(threads[i], NULL);
	return 0;
}

static int does_not_wait(struct client *client, void *arg)
{
	volatile char *p = client_mmap(client, PAGES * PAGE, 4096, GMEM_FORK_SHARE);

	(void)arg;
	while (shared->step < 1)
		sleep_ms(1);
	sleep_ms(60); /* both are waiting by now */
	for (unsigned long i = 0; i < PAGES * PAGE; i += 4096)
		p[i] = 1;
	shared->result = shared->step;
	return 0;
}

static void test_slow_link(struct gmem_core *core)
{
	int slow = attach_simgpu(core, "slow", "capacity=4M latency=700000000");
	struct client *other, *client;

	CHECK(slow > 0);
	shared->step = 0;
	other = client_start(core, does_not_wait, NULL);
	client = client_start(core, waits_for_the_link, (void *)(long)slow);
	CHECK_EQ(client_wait(other), 0);
	CHECK_EQ(shared->result, 1); /* it was done before either of the two */
	CHECK_EQ(client_wait(client), 0);
	CHECK_EQ(shared->step, 3);
	CHECK_EQ(gmem_device_detach(core, slow, false), 0);
	expect_empty(core);
	printf("slow link: others go on\n");
}

/* ---- what hmemcpy moves goes across the link, and counts as moved ---- */

#define LINK_NS 20000000

static int has_copies(struct client *client, void *arg)
{
	char *p = client_mmap(client, PAGES * PAGE, PAGE, GMEM_FORK_SHARE);

	(void)arg;
	memset(p, 1, PAGE);
	shared->va = (uint64_t)p;
	while (shared->step < 1)
		sleep_ms(1);
	for (unsigned long i = 0; i < PAGE; i++)
		CHECK_EQ(p[3 * PAGE + i], i < PAGE / 2);
	return 0;
}

/* Pages of the client's; what it took in bytes each way, and in time. */
static struct gmem_core_stats copied(struct gmem_core *core, struct client *client, int hnid, int to, int from, bool by_link)
{
	struct gmem_core_stats before, after;
	uint64_t start;

	gmem_core_stats(core, &before);
	start = gmem_now_ns();
	CHECK_EQ(gmem_hmemcpy(core, client->session, hnid, shared->va + (uint64_t)to * PAGE, shared->va + (uint64_t)from * PAGE,
			      PAGE / 2, false), 0);
	CHECK(!by_link || gmem_now_ns() - start >= LINK_NS);
	gmem_core_stats(core, &after);
	after.h2d_bytes -= before.h2d_bytes;
	after.d2h_bytes -= before.d2h_bytes;
	return after;
}

static void test_hmemcpy_link(struct gmem_core *core)
{
	struct gmem_core_stats took;
	struct client *client;
	char options[64];
	int slow;

	snprintf(options, sizeof(options), "capacity=4M latency=%d", LINK_NS);
	slow = attach_simgpu(core, "slow", options);
	CHECK(slow > 0);
	shared->step = 0;
	shared->va = 0;
	client = client_start(core, has_copies, NULL);
	while (!shared->va)
		sleep_ms(1);
	took = copied(core, client, slow, 1, 0, true);
	CHECK_EQ(took.h2d_bytes, PAGE / 2);
	took = copied(core, client, slow, 2, 1, false); /* on the device */
	CHECK(!took.h2d_bytes && !took.d2h_bytes);
	took = copied(core, client, GMEM_HOST, 3, 2, true);
	CHECK_EQ(took.d2h_bytes, PAGE / 2);
	shared->step = 1;
	CHECK_EQ(client_wait(client), 0);
	CHECK_EQ(gmem_device_detach(core, slow, false), 0);
	expect_empty(core);
	printf("hmemcpy: across the link\n");
}

/* munmap(2) returns when its event has been read; a region that gets the same address at once must outlive it. */
static int remaps(struct client *client, void *arg)
{
	(void)arg;
	for (int i = 0; i < 300; i++) {
		volatile char *p = client_mmap(client, 2 << 20, 2 << 20, GMEM_FORK_SHARE);

		*p = 1; /* SIGBUS if the event of the round before took it away */
		CHECK_EQ(client_munmap(client, (void *)p, 2 << 20), 0);
	}
	return 0;
}

static atomic_bool moved_enough;

static void *fault_for_ever(void *arg)
{
	volatile uint64_t *at = arg;

	while (!moved_enough) {
		madvise((void *)at, PAGE, MADV_DONTNEED); /* it stays in its file: the next touch is a minor fault */
		for (size_t i = 0; i < PAGE / 8; i += 512)
			at[i]++;
	}
	return NULL;
}

/* An mremap is two events, and beside faults of other threads several threads of the daemon read them. */
static int moves(struct client *client, void *arg)
{
	volatile uint64_t *from = client_mmap(client, PAGE, 4096, GMEM_FORK_SHARE);
	void *to = client_mmap(client, PAGE, 4096, GMEM_FORK_SHARE);
	pthread_t threads[3];

	(void)arg;
	for (int i = 0; i < 3; i++)
		CHECK(!pthread_create(&threads[i], NULL, fault_for_ever, client_mmap(client, PAGE, 4096, GMEM_FORK_SHARE)));
	for (uint64_t i = 1; i <= MOVES; i++) {
		void *free = (void *)from;

		from[0] = i;
		CHECK(mremap(free, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to);
		from = to;
		CHECK_EQ(from[0], i); /* SIGBUS if the second was done before the first */
		from[512 * (i % 16)] = i;
		to = free;
	}
	moved_enough = true;
	for (int i = 0; i < 3; i++)
		pthread_join(threads[i], NULL);
	return 0;
}

static void test_order_of_events(struct gmem_core *core)
{
	struct gmem_core_stats before, after;

	gmem_core_stats(core, &before);
	CHECK_EQ(client_wait(client_start(core, moves, NULL)), 0);
	gmem_core_stats(core, &after);
	CHECK_EQ(after.outside_faults, before.outside_faults);
	expect_empty(core);
	printf("events: in order\n");
}

int main(void)
{
	struct gmem_core_features features;
	struct gmem_core *core;
	struct gmem_hnode_stats hnodes[GMEM_HNODE_MAX];
	size_t count;

	shared = shared_bytes(sizeof(*shared));
	core = core_start((struct gmem_core_config){ .event_fork = true });
	gmem_core_features(core, &features);
	CHECK_EQ(attach_simgpu(core, "simgpu0", "capacity=512K"), 1);
	test_kill(core, 40);
	if (features.event_fork)
		test_fork(core);
	else
		printf("fork by event: not run, needs CAP_SYS_PTRACE\n");
	if (features.poison)
		test_session_end(core);
	test_device_faults(core);
	test_slow_link(core);
	test_hmemcpy_link(core);
	CHECK_EQ(client_wait(client_start(core, pins, NULL)), 0);
	expect_empty(core);
	CHECK_EQ(client_wait(client_start(core, remaps, NULL)), 0);
	expect_empty(core);
	test_order_of_events(core);
	gmem_hnodes(core, hnodes, &count);
	CHECK_EQ(hnodes[1].pinned_bytes, 0);
	CHECK_EQ(hnodes[1].peak_bytes, 512 << 10);
	gmem_core_destroy(core);
	printf("lifecycle: ok\n");
	return 0;
}
