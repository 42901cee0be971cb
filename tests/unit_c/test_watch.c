/* SPDX-License-Identifier: Apache-2.0
 *
 * Watch: a driver that does not come back is found and named, further threads are started where all are held up, and the
 * end of it is told; a userfaultfd that is made to block holds a thread up only for a moment.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <gmem/watch.h>

#include "harness.h"
#include "shelf.h"

#define PAGES 4
#define PAGE_BYTES 4096ull
#define VICTIMS 6
#define STUCK_MS 300

enum order { IDLE, FILL, SUM, DISCARD, BLOCK, LEAVE };

struct puppet {
	_Atomic int order;
	uint64_t va, value, result;
	int hnid; /* FILL: where its pages are to go */
	struct client *client;
};

static struct puppet *puppets; /* the last one is the healthy one */

/* O_NONBLOCK is a flag of the description, which the daemon's descriptor shares. */
static void block_uffd(void)
{
	char path[32], target[64];
	int found = 0;

	for (int fd = 3; fd < 256; fd++) {
		ssize_t n;

		snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
		n = readlink(path, target, sizeof(target) - 1);
		if (n < 0)
			continue;
		target[n] = '\0';
		if (!strcmp(target, "anon_inode:[userfaultfd]")) {
			CHECK(!fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_NONBLOCK));
			found++;
		}
	}
	CHECK(found);
}

static volatile uint64_t *word(const struct puppet *puppet, uint64_t page)
{
	return (volatile uint64_t *)(uintptr_t)(puppet->va + page * PAGE_BYTES);
}

static int play(struct client *client, void *arg)
{
	struct puppet *puppet = arg;

	puppet->va = (uint64_t)client_mmap(client, PAGES * PAGE_BYTES, PAGE_BYTES, GMEM_FORK_SHARE);
	for (;;) {
		switch (atomic_load(&puppet->order)) {
		case IDLE:
			sleep_ms(1);
			continue;
		case FILL:
			for (uint64_t page = 0; page < PAGES; page++)
				*word(puppet, page) = puppet->value + page;
			CHECK_EQ(client_prefetch(client, puppet->hnid, (void *)(uintptr_t)puppet->va, PAGES * PAGE_BYTES), 0);
			break;
		case SUM:
			puppet->result = 0;
			for (uint64_t page = 0; page < PAGES; page++)
				puppet->result += *word(puppet, page);
			break;
		case DISCARD:
			CHECK_EQ(client_discard(client, (void *)(uintptr_t)puppet->va, PAGES * PAGE_BYTES), 0);
			break;
		case BLOCK:
			block_uffd();
			break;
		default:
			return 0;
		}
		atomic_store(&puppet->order, IDLE);
	}
}

static void begin(struct puppet *puppet, enum order order)
{
	atomic_store(&puppet->order, order);
}

static uint64_t end(struct puppet *puppet)
{
	while (atomic_load(&puppet->order) != IDLE)
		sleep_ms(1);
	return puppet->result;
}

static uint64_t tell(struct puppet *puppet, enum order order)
{
	begin(puppet, order);
	return end(puppet);
}

static struct puppet *start(struct gmem_core *core, int number)
{
	struct puppet *puppet = &puppets[number];

	memset(puppet, 0, sizeof(*puppet));
	puppet->value = 1000 * (uint64_t)(number + 1);
	puppet->client = client_start(core, play, puppet);
	tell(puppet, SUM);
	return puppet;
}

static uint64_t expected(const struct puppet *puppet)
{
	return PAGES * puppet->value + PAGES * (PAGES - 1) / 2;
}

static void leave(struct puppet *puppet)
{
	begin(puppet, LEAVE);
	CHECK_EQ(client_wait(puppet->client), 0);
}

/* Threads of a role, and how many of them are reported; *ret_one: one that is. */
static size_t count_role(struct gmem_core *core, const char *role, size_t *ret_stuck, struct gmem_thread_info *ret_one)
{
	struct gmem_thread_info threads[64];
	size_t count, found = 0;

	gmem_core_threads(core, threads, 64, &count);
	CHECK(count > 0 && count <= 64);
	*ret_stuck = 0;
	for (size_t i = 0; i < count; i++) {
		if (strcmp(threads[i].role, role))
			continue;
		found++;
		if (threads[i].stuck) {
			(*ret_stuck)++;
			*ret_one = threads[i];
		}
	}
	return found;
}

static size_t await_stuck(struct gmem_core *core, const char *role, size_t wanted, struct gmem_thread_info *ret_one)
{
	size_t stuck = 0;

	for (int i = 0; i < 20000; i++) {
		count_role(core, role, &stuck, ret_one);
		if (wanted ? stuck >= wanted : !stuck)
			break;
		sleep_ms(1);
	}
	CHECK(wanted ? stuck >= wanted : !stuck);
	return stuck;
}

/* The first event of that type. */
static struct gmem_event await_event(struct gmem_core *core, uint32_t type)
{
	struct gmem_event event;

	for (int i = 0; i < 20000; i++) {
		while (gmem_event_read(core, &event, 1))
			if (event.type == type)
				return event;
		sleep_ms(1);
	}
	fprintf(stderr, "no event %u\n", type);
	exit(1);
}

static void run_hanging_driver(void)
{
	static struct shelf slow = { .capacity = 64 << 20, .caps = GMEM_CAP_SLOW },
			    fine = { .capacity = 64 << 20, .caps = GMEM_CAP_SLOW };
	struct gmem_core *core = core_start((struct gmem_core_config){ .stuck_ns = STUCK_MS * 1000000ull });
	struct puppet *healthy = start(core, VICTIMS);
	struct gmem_thread_info thread = { 0 };
	struct gmem_core_stats stats;
	struct gmem_event event;
	size_t before, stuck;

	healthy->hnid = shelf_attach(core, &fine, "fine");
	for (int i = 0; i < VICTIMS; i++)
		start(core, i)->hnid = i ? puppets[0].hnid : shelf_attach(core, &slow, "slow");
	for (int i = 0; i <= VICTIMS; i++)
		tell(&puppets[i], FILL);
	CHECK_EQ(slow.pages, VICTIMS * PAGES);
	before = count_role(core, "fill", &stuck, &thread);
	CHECK_EQ(stuck, 0);
	CHECK(count_role(core, "fault", &stuck, &thread) && count_role(core, "ring", &stuck, &thread) &&
	      count_role(core, "reclaim", &stuck, &thread));

	/* one */
	slow.hold_pulls = true;
	begin(&puppets[0], SUM);
	CHECK_EQ(await_stuck(core, "fill", 1, &thread), 1);
	CHECK(!strcmp(thread.doing, "fault") && thread.op && !strcmp(thread.op, "peer_unmap"));
	CHECK_EQ(thread.hnid, puppets[0].hnid);
	CHECK_EQ(thread.session, puppets[0].client->session);
	CHECK_EQ(thread.va & ~(PAGE_BYTES - 1), puppets[0].va);
	CHECK(thread.held_ns >= STUCK_MS * 1000000ull / 2 && thread.tid > 0);
	event = await_event(core, GMEM_EVENT_STUCK);
	CHECK_EQ(event.value, thread.index);
	CHECK_EQ(event.session, thread.session);
	CHECK_EQ(event.hnid, thread.hnid);
	gmem_core_stats(core, &stats);
	CHECK_EQ(stats.stuck_reports, 1);
	CHECK_EQ(tell(healthy, SUM), expected(healthy));
	sleep_ms(2 * STUCK_MS);
	gmem_core_stats(core, &stats);
	CHECK_EQ(stats.stuck_reports, 1); /* told once */

	/* all, and more than there were */
	for (int i = 1; i < VICTIMS; i++)
		begin(&puppets[i], SUM);
	tell(healthy, FILL);
	CHECK_EQ(tell(healthy, SUM), expected(healthy));
	await_stuck(core, "fill", before, &thread);
	CHECK(count_role(core, "fill", &stuck, &thread) > before);
	tell(healthy, FILL);
	CHECK_EQ(tell(healthy, SUM), expected(healthy));

	slow.hold_pulls = false;
	for (int i = 0; i < VICTIMS; i++)
		CHECK_EQ(end(&puppets[i]), expected(&puppets[i]));
	event = await_event(core, GMEM_EVENT_UNSTUCK);
	await_stuck(core, "fill", 0, &thread);
	for (int i = 0; i <= VICTIMS; i++)
		leave(&puppets[i]);
	gmem_core_destroy(core);
}

/* Nobody can say any more whether it has a message without waiting for one: that client is given up. */
static void run_blocking_uffd(void)
{
	struct gmem_core *core = core_start((struct gmem_core_config){ .fault_threads = 1 });
	struct puppet *bad = start(core, 0), *healthy; /* in this order: a child has its parent's descriptors */
	struct gmem_event event;

	healthy = start(core, 1);
	tell(bad, DISCARD);
	tell(bad, BLOCK);
	begin(bad, FILL); /* what it touches is served or not: that is its own affair */
	for (uint64_t round = 0; round < 3; round++) {
		healthy->value += 10;
		tell(healthy, DISCARD);
		tell(healthy, FILL);
		CHECK_EQ(tell(healthy, SUM), expected(healthy));
	}
	event = await_event(core, GMEM_EVENT_VIEW_GONE);
	CHECK_EQ(event.session, bad->client->session);
	CHECK_EQ(event.value, 0);
	CHECK(!kill(bad->client->pid, SIGKILL));
	CHECK(WIFSIGNALED(client_wait(bad->client)));
	CHECK_EQ(tell(healthy, SUM), expected(healthy));
	leave(healthy);
	gmem_core_destroy(core);
}

struct sleeper {
	struct gmem_core *core;
	int fd, err;
	bool poked, poked_again;
};

/* As a fault thread that reads a userfaultfd, and is not told that there is nothing to read. */
static void *sleep_in_read(void *arg)
{
	struct sleeper *sleeper = arg;
	char byte;

	gmem_duty_enlist(sleeper->core, GMEM_ROLE_FAULT);
	gmem_duty_begin(GMEM_DOING_READ, 7, 0);
	sleeper->err = read(sleeper->fd, &byte, 1) < 0 ? errno : 0;
	sleeper->poked = gmem_duty_poked();
	sleeper->poked_again = gmem_duty_poked();
	gmem_duty_end();
	gmem_duty_leave(sleeper->core);
	return NULL;
}

/* A read that sleeps is interrupted; one that ends by itself before that is left alone. */
static void run_sleeper(void)
{
	struct gmem_core *core = core_start((struct gmem_core_config){ .fault_threads = 1 });
	struct sleeper sleepers[2];
	pthread_t threads[2];
	int ends[2];

	for (int i = 0; i < 2; i++) {
		CHECK(!pipe(ends));
		sleepers[i] = (struct sleeper){ .core = core, .fd = ends[0], .err = -1 };
		if (i)
			CHECK(write(ends[1], "x", 1) == 1);
		CHECK(!pthread_create(&threads[i], NULL, sleep_in_read, &sleepers[i]));
	}
	for (int i = 0; i < 2; i++)
		CHECK(!pthread_join(threads[i], NULL));
	CHECK_EQ(sleepers[0].err, EINTR);
	CHECK(sleepers[0].poked && !sleepers[0].poked_again);
	CHECK_EQ(sleepers[1].err, 0);
	CHECK(!sleepers[1].poked);
	gmem_core_destroy(core);
}

int main(void)
{
	puppets = shared_bytes((VICTIMS + 1) * sizeof(*puppets));
	run_hanging_driver();
	run_blocking_uffd();
	run_sleeper();
	printf("watch: ok\n");
	return 0;
}
