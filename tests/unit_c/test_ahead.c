/* SPDX-License-Identifier: Apache-2.0
 *
 * Fault-ahead: touches in a row, or at a distance, fault seldom, whatever has to be done for the pages, and so do those of a
 * block that is here for the most part; the content is right. A sparse order gets nothing it did not ask for, and a full
 * hnode is not emptied for a guess.
 */
#define _GNU_SOURCE
#include "harness.h"

#include <gmem/internal.h>
#include <gmem/prefetch.h>
#include <gmem/vm_object.h>
#include <sys/mman.h>
#include <time.h>

#define PAGES 256

enum where { UNTOUCHED, PRESENT, ELSEWHERE, WHERES };

enum order { FORWARDS, BACKWARDS, EVERY_THIRD, TWO_AT_ONCE, SHUFFLED, SPARSE, ORDERS };

struct shared {
	uint64_t page_bytes;
	enum where where;
	enum order order;
	bool write;
	int gpu;
	uint32_t pages[PAGES]; /* in the order they are touched in */
	uint32_t touched, nap_us;
	volatile uint64_t va;
	volatile int step;
};

static struct shared *shared;

static void wait_step(int step)
{
	while (shared->step != step)
		sleep_ms(1);
}

static uint64_t pages(void)
{
	return shared->page_bytes == 2 << 20 ? 16 : PAGES;
}

static void shuffle(uint32_t *at, uint32_t count)
{
	uint64_t x = 88172645463325252ull; /* xorshift64, Marsaglia 2003 */

	for (uint32_t i = count; i > 1; i--) {
		uint32_t other, kept = at[i - 1];

		x ^= x << 13;
		x ^= x >> 7;
		x ^= x << 17;
		other = (uint32_t)(x % i);
		at[i - 1] = at[other];
		at[other] = kept;
	}
}

static void make_order(enum order order)
{
	uint32_t all = (uint32_t)pages(), n = 0;

	for (uint32_t i = 0; i < all; i++) {
		uint32_t half = all / 2, page = i;

		if ((order == EVERY_THIRD && i % 3) || (order == SPARSE && i % 8 != i / 8 * 5 % 8))
			continue;
		if (order == BACKWARDS)
			page = all - 1 - i;
		if (order == TWO_AT_ONCE) { /* one upwards by two, the other one downwards by three */
			page = i % 2 ? all - 1 - i / 2 * 3 : i / 2 * 2;
			if (page < half ? i % 2 : !(i % 2))
				break;
		}
		shared->pages[n++] = page;
	}
	if (order == SHUFFLED || order == SPARSE)
		shuffle(shared->pages, n);
	shared->touched = n;
}

static void touch_all(volatile uint64_t *at)
{
	const struct timespec nap = { 0, shared->nap_us * 1000l };

	for (uint32_t i = 0; i < shared->touched; i++) {
		uint64_t page = shared->pages[i];
		volatile uint64_t *word = at + page * shared->page_bytes / 8 + page % 8;

		CHECK_EQ(*word, shared->where == UNTOUCHED ? 0 : page + 1);
		if (shared->write)
			*word = page + 1000;
		if (shared->nap_us)
			nanosleep(&nap, NULL);
	}
}

static void check_all(volatile uint64_t *at)
{
	for (uint64_t page = 0; shared->where != UNTOUCHED && page < pages(); page++) {
		uint64_t have = at[page * shared->page_bytes / 8 + page % 8];

		CHECK(have == page + 1 || (shared->write && have == page + 1000));
	}
}

static int client_side(struct client *client, void *arg)
{
	uint64_t bytes = pages() * shared->page_bytes;
	volatile uint64_t *at = client_mmap(client, bytes, shared->page_bytes, GMEM_FORK_SHARE);

	(void)arg;
	for (uint64_t page = 0; shared->where != UNTOUCHED && page < pages(); page++)
		at[page * shared->page_bytes / 8 + page % 8] = page + 1;
	if (shared->where == ELSEWHERE)
		CHECK_EQ(client_prefetch(client, shared->gpu, (void *)at, bytes), 0);
	else if (shared->where == PRESENT)
		CHECK(!madvise((void *)at, bytes, MADV_DONTNEED));
	shared->step = 1;
	wait_step(2);
	touch_all(at);
	shared->step = 3;
	wait_step(4);
	check_all(at);
	return 0;
}

static struct gmem_core_stats taken(const struct gmem_core_stats *a, const struct gmem_core_stats *b)
{
	struct gmem_core_stats ret = *b;

	ret.host_faults -= a->host_faults;
	ret.ahead_pages -= a->ahead_pages;
	ret.evictions -= a->evictions;
	return ret;
}

/* What was guessed while the pages were written is over. */
static struct gmem_core_stats when_quiet(struct gmem_core *core)
{
	struct gmem_core_stats now, before = { .ahead_pages = UINT64_MAX };

	for (gmem_core_stats(core, &now); now.ahead_pages != before.ahead_pages; gmem_core_stats(core, &now)) {
		before = now;
		sleep_ms(10);
	}
	return now;
}

static uint64_t helped; /* how often somebody was asked to help with them */

static uint64_t helped_so_far(struct gmem_core *core)
{
	uint64_t helped;

	gmem_mutex_lock(&core->fillers.lock);
	helped = core->fillers.helped;
	gmem_mutex_unlock(&core->fillers.lock);
	return helped;
}

/* What the touches took. */
static struct gmem_core_stats run(struct gmem_core *core, uint64_t page_bytes, enum where where, bool write, enum order order)
{
	struct gmem_core_stats before, after;
	struct client *client;

	shared->page_bytes = page_bytes;
	shared->where = where;
	shared->write = write;
	shared->step = 0;
	make_order(order);
	client = client_start(core, client_side, NULL);
	wait_step(1);
	before = when_quiet(core);
	helped = helped_so_far(core);
	shared->step = 2;
	wait_step(3);
	after = when_quiet(core);
	helped = helped_so_far(core) - helped;
	shared->step = 4;
	CHECK_EQ(client_wait(client), 0);
	core_settle(core);
	return taken(&before, &after);
}

static void test_sequences(struct gmem_core *core)
{
	static const uint64_t sizes[] = { 4096, 65536, 2 << 20 };
	static const char *const names[WHERES] = { "untouched", "present", "elsewhere" };

	for (size_t s = 0; s < 3; s++)
		for (int where = 0; where < WHERES; where++)
			for (int write = 0; write < 2; write++) {
				struct gmem_core_stats took = run(core, sizes[s], (enum where)where, write, FORWARDS);

				printf("%lu KiB, %s, %s: %lu pages, %lu faults, %lu ahead\n", sizes[s] >> 10, names[where],
				       write ? "written" : "read", pages(), took.host_faults, took.ahead_pages);
				/* a thread that touches a word of 2 MiB may well be there first */
				CHECK(took.ahead_pages >= (sizes[s] == 2 << 20 ? 2 : pages() / 2));
			}
}

/* Threads are woken to help with copies, and with zeroing huge pages. */
static void test_help(struct gmem_core *core)
{
	static const uint64_t sizes[] = { 65536, 2 << 20 };

	shared->nap_us = 100;
	for (int s = 0; s < 2; s++)
		for (int where = 0; where < WHERES; where++) {
			struct gmem_core_stats took = run(core, sizes[s], (enum where)where, false, FORWARDS);

			printf("%lu KiB, %d: %lu faults, help %lu times\n", sizes[s] >> 10, where, took.host_faults, helped);
			CHECK_EQ(helped > 0, where == ELSEWHERE || (where == UNTOUCHED && sizes[s] == 2 << 20));
			CHECK(took.ahead_pages > 0);
		}
	shared->nap_us = 0;
}

/* The naps give the daemon time: what counts here is what it guesses, not whether it is quick. */
static void test_strides(struct gmem_core *core)
{
	static const enum order orders[] = { BACKWARDS, EVERY_THIRD, TWO_AT_ONCE };
	static const char *const names[] = { "backwards", "every third", "two at once" };

	shared->nap_us = 100;
	for (int i = 0; i < 3; i++)
		for (int where = 0; where < WHERES; where++) {
			struct gmem_core_stats took = run(core, 65536, (enum where)where, i == 1, orders[i]);

			printf("%s, %d: %u touched, %lu faults, %lu ahead\n", names[i], where, shared->touched,
			       took.host_faults, took.ahead_pages);
			CHECK(took.ahead_pages >= shared->touched / 2);
			CHECK(took.host_faults <= shared->touched / 2 + 8);
		}
	shared->nap_us = 0;
}

/* What a client runs ahead of is fetched on its CPU, and elsewhere again when it has found something else to do. */
static void test_quick(void)
{
	struct gmem_view view = { 0 };
	struct gmem_stream *stream = &view.streams[1];

	CHECK(!gmem_stream_overtakes(&view));
	stream->stride = 4096;
	stream->next = 8 * 4096;
	stream->end = 9 * 4096;
	CHECK(gmem_stream_overtakes(&view));
	stream->quick = true;
	CHECK(!gmem_stream_overtakes(&view));
	CHECK(gmem_stream_pending(&view));
	gmem_stream_unhurried(&view);
	CHECK(gmem_stream_overtakes(&view));
	stream->maps = true;
	CHECK(!gmem_stream_overtakes(&view));
}

static int idle_client(struct client *client, void *arg)
{
	(void)arg;
	shared->va = (uint64_t)client_mmap(client, PAGES * 4096, 4096, GMEM_FORK_SHARE);
	wait_step(2);
	return 0;
}

/* Whether a reader of pages 0, 1 and another one is held to be ahead of what is fetched for him. From the start he is; once he
 * has been seen to do something else he is if that page is within the window. */
static bool hurries(struct gmem_core *core, const struct gmem_session *session, uint64_t va, bool seen_idle, uint64_t last)
{
	struct gmem_view view = { 0 };
	const uint64_t touched[] = { 0, 1, last };

	for (int i = 0; i < 3; i++) {
		struct gmem_place place;

		CHECK_EQ(gmem_as_lookup((struct gmem_as *)&session->as, va + touched[i] * 4096, &place), 0);
		if (i == 2 && seen_idle)
			gmem_stream_unhurried(&view);
		(i < 2 ? gmem_stream_fault(core, &view, &place, false, false) : gmem_stream_parked(core, &view, &place, false));
		gmem_object_unref(place.object);
	}
	CHECK(gmem_stream_pending(&view));
	return !gmem_stream_overtakes(&view);
}

static void test_hurry(struct gmem_core *core)
{
	struct gmem_session *session;
	struct client *client;

	shared->step = 1;
	shared->va = 0;
	client = client_start(core, idle_client, NULL);
	while (!shared->va)
		sleep_ms(1);
	session = gmem_session_get(core, client->session);
	CHECK(session);
	CHECK(hurries(core, session, shared->va, false, 6));
	CHECK(hurries(core, session, shared->va, true, 3));
	CHECK(!hurries(core, session, shared->va, true, 6)); /* the window was of four pages */
	gmem_session_unref(session);
	shared->step = 2;
	CHECK_EQ(client_wait(client), 0);
	core_settle(core);
}

/* In an order without any, neighbours come one after the other by chance: once in as many faults as there are pages. */
static void test_no_sequence(struct gmem_core *core)
{
	shared->nap_us = 100;
	for (int write = 0; write < 2; write++) {
		struct gmem_core_stats took = run(core, 4096, PRESENT, write, SHUFFLED);

		printf("shuffled, present: %lu faults, %lu ahead\n", took.host_faults, took.ahead_pages);
		CHECK(took.ahead_pages <= PAGES / 16);
		CHECK(took.host_faults + took.ahead_pages >= PAGES);
	}
	shared->nap_us = 0;
}

/* A block of which most is here gets the rest; the threshold alone, without guesses, would leave all faults. */
static void test_density(struct gmem_core *core, bool fault_ahead)
{
	static const uint64_t sizes[] = { 4096, 65536 };

	shared->nap_us = 100;
	for (int s = 0; s < 2; s++)
		for (int write = 0; write < 2; write++) {
			struct gmem_core_stats took = run(core, sizes[s], ELSEWHERE, write, SHUFFLED);

			printf("shuffled, %lu KiB, %s: %lu faults, %lu ahead\n", sizes[s] >> 10, write ? "written" : "read",
			       took.host_faults, took.ahead_pages);
			if (fault_ahead) /* read, then written: two faults a page without */
				CHECK(took.host_faults <= (write ? 2 : 1) * PAGES * 3 / 5);
			else
				CHECK_EQ(took.ahead_pages, 0);
			/* an eighth of each block is not most of it, and what is present costs no bandwidth to leave alone */
			took = run(core, sizes[s], ELSEWHERE, write, SPARSE);
			CHECK_EQ(took.ahead_pages, 0);
			took = run(core, sizes[s], PRESENT, write, SPARSE);
			CHECK_EQ(took.ahead_pages, 0);
			took = run(core, sizes[s], UNTOUCHED, write, SPARSE);
			CHECK_EQ(took.ahead_pages, 0);
		}
	shared->nap_us = 0;
}

/* Half of some blocks' pages in any order, beside others that were used before, in room for little more than both. */
#define BESIDE 64
#define HALF (PAGES / 2)

static int crowded(struct client *client, void *arg)
{
	volatile uint64_t *beside = client_mmap(client, BESIDE * 65536, 65536, GMEM_FORK_SHARE);
	volatile uint64_t *at = client_mmap(client, PAGES * 65536, 65536, GMEM_FORK_SHARE);

	(void)arg;
	for (uint64_t page = 0; page < PAGES; page++) {
		at[page * 8192] = page + 1;
		if (page % 32 == 31)
			CHECK_EQ(client_prefetch(client, shared->gpu, (void *)(at + (page - 31) * 8192), 32 * 65536), 0);
	}
	for (uint64_t page = 0; page < BESIDE; page++)
		beside[page * 8192] = page;
	shared->step = 1;
	wait_step(2);
	for (int i = 0; i < HALF; i++) {
		CHECK_EQ(at[shared->pages[i] * 8192ul], shared->pages[i] + 1);
		sleep_ms(1);
	}
	shared->step = 3;
	wait_step(4);
	for (uint64_t page = 0; page < BESIDE; page++)
		CHECK_EQ(beside[page * 8192], page);
	shared->step = 5;
	wait_step(6);
	return 0;
}

/* Without a tier, only what the device has, too, can leave: it is found behind all that can't. */
static void test_guesses_give_way(bool tier)
{
	struct gmem_core *core = core_start((struct gmem_core_config){ .host_limit_bytes = (BESIDE + HALF + 16) * 65536 });
	struct gmem_core_stats begun, first, second;
	struct client *client;

	shared->gpu = attach_simgpu(core, "simgpu0", "capacity=64M");
	CHECK(!tier || attach_builtin(core, "zstd", "zstd0", "capacity=64M") > 0);
	shared->page_bytes = 65536;
	shared->step = 0;
	make_order(SHUFFLED);
	client = client_start(core, crowded, NULL);
	wait_step(1);
	gmem_core_stats(core, &begun);
	shared->step = 2;
	wait_step(3);
	gmem_core_stats(core, &first);
	shared->step = 4;
	wait_step(5);
	gmem_core_stats(core, &second);
	shared->step = 6;
	CHECK_EQ(client_wait(client), 0);
	core_settle(core);
	gmem_core_destroy(core);
	printf("crowded: %lu faults, %lu ahead, %lu evictions\n", first.host_faults - begun.host_faults,
	       first.ahead_pages - begun.ahead_pages, first.evictions - begun.evictions);
	CHECK(first.ahead_pages > begun.ahead_pages);
	CHECK(first.evictions > begun.evictions); /* the guesses, as they were too many: */
	CHECK_EQ(second.d2h_bytes, first.d2h_bytes); /* what was used for certain, and longest ago, is all there */
}

int main(void)
{
	struct gmem_core *core;

	shared = shared_bytes(sizeof(*shared));
	core = core_start((struct gmem_core_config){ .event_fork = true });
	shared->gpu = attach_simgpu(core, "simgpu0", "capacity=64M");
	test_sequences(core);
	test_help(core);
	test_strides(core);
	test_quick();
	test_hurry(core);
	test_no_sequence(core);
	test_density(core, true);
	gmem_core_destroy(core);
	test_guesses_give_way(true);
	test_guesses_give_way(false);
	core = core_start((struct gmem_core_config){ .event_fork = true, .no_fault_ahead = true });
	shared->gpu = attach_simgpu(core, "simgpu0", "capacity=64M");
	CHECK_EQ(run(core, 4096, UNTOUCHED, true, FORWARDS).host_faults, PAGES);
	CHECK_EQ(run(core, 4096, UNTOUCHED, true, FORWARDS).ahead_pages, 0);
	test_density(core, false);
	gmem_core_destroy(core);
	printf("ahead: ok\n");
	return 0;
}
