/* SPDX-License-Identifier: Apache-2.0
 *
 * The core's parts by themselves: ranges, LPT words and extents, events, guarded copies, options, uffd checks.
 */
#define _GNU_SOURCE
#include "harness.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <gmem/event.h>
#include <gmem/internal.h>
#include <gmem/uffd.h>

#define PIECES 512

/* Random allocations against a plain map of who owns which page. */
static void test_range(void)
{
	static uint8_t owner[1 << 16];
	struct { uint64_t start, bytes; } held[PIECES] = { 0 };
	struct gmem_range_allocator ranges;
	uint64_t free_pages = sizeof(owner), start;

	srand(1);
	CHECK_EQ(gmem_range_init(&ranges, 0x1000000, 0x1000000 + sizeof(owner) * 4096ull), 0);
	CHECK_EQ(gmem_range_alloc(&ranges, 0, 4096, &start), -EINVAL);
	CHECK_EQ(gmem_range_alloc(&ranges, 4096, 3, &start), -EINVAL);
	CHECK_EQ(gmem_range_alloc(&ranges, sizeof(owner) * 4096ull + 1, 4096, &start), -ENOMEM);
	for (int round = 0; round < 200000; round++) {
		int i = rand() % PIECES;
		uint64_t pages = 1 + (uint64_t)(rand() % 300), align = 4096ull << rand() % 5;

		if (held[i].bytes) {
			gmem_range_free(&ranges, held[i].start, held[i].bytes);
			for (uint64_t p = 0; p < held[i].bytes / 4096; p++)
				owner[(held[i].start - 0x1000000) / 4096 + p] = 0;
			free_pages += held[i].bytes / 4096;
			held[i].bytes = 0;
		} else if (!gmem_range_alloc(&ranges, pages * 4096, align, &start)) {
			CHECK_EQ(start % align, 0);
			held[i].start = start;
			held[i].bytes = pages * 4096;
			for (uint64_t p = 0; p < pages; p++)
				CHECK_EQ(owner[(start - 0x1000000) / 4096 + p]++, 0);
			free_pages -= pages;
		}
		CHECK_EQ(gmem_range_free_bytes(&ranges), free_pages * 4096);
	}
	for (int i = 0; i < PIECES; i++)
		if (held[i].bytes)
			gmem_range_free(&ranges, held[i].start, held[i].bytes);
	CHECK_EQ(ranges.count, 1);
	gmem_range_deinit(&ranges);
}

static void test_words(void)
{
	gmem_word_t w = 0;

	CHECK(gmem_word_is_valid(w));
	w = gmem_word_set_writer(gmem_word_set_valid(gmem_word_set_state(w, GMEM_RESIDENT), 1 << 15), 15);
	w |= GMEM_WORD_FLAG(GMEM_PAGE_PINNED);
	w = gmem_word_set_why(w, GMEM_WHY_LOST);
	CHECK(gmem_word_is_valid(w));
	CHECK_EQ(gmem_word_writer(w), 15);
	CHECK_EQ(gmem_word_valid(w), 1 << 15);
	CHECK_EQ(gmem_word_flags(w), GMEM_PAGE_PINNED);
	CHECK_EQ(gmem_word_why(w), GMEM_WHY_LOST);
	w = gmem_word_set_busy(w, GMEM_DIR_COPY, 7);
	CHECK_EQ(gmem_word_dir(w), GMEM_DIR_COPY);
	CHECK_EQ(gmem_word_target(w), 7);
	CHECK_EQ(gmem_word_writer(w), 15);
	CHECK(gmem_word_is_valid(w) && !(w & GMEM_WORD_WAITERS));
	/* two writers, a writer beside readers, resident nowhere */
	CHECK(!gmem_word_is_valid(gmem_word_set_writer(gmem_word_set_valid(1, 3), 0)));
	CHECK(!gmem_word_is_valid(gmem_word_set_valid(1, 0)));
	CHECK(!gmem_word_is_valid(gmem_word_set_valid(0, 1)));
}

static void test_lpt(void)
{
	struct gmem_lpt lpt;
	uint64_t a, b, at, stop;

	CHECK_EQ(gmem_lpt_init(&lpt, 1 << 20, -1), 0);
	CHECK_EQ(gmem_lpt_extent_alloc(&lpt, 100000, &a), 0);
	CHECK_EQ(gmem_lpt_extent_alloc(&lpt, 1, &b), 0);
	CHECK(b >= a + 100000 || b < a);
	CHECK_EQ(gmem_lpt_bytes(&lpt), 0); /* untouched pages cost nothing */
	lpt.words[a + 70000] = 5;
	at = a;
	CHECK_EQ(gmem_lpt_next_touched(&lpt, &at, a + 100000, &stop), 0);
	CHECK(at <= a + 70000 && stop > a + 70000 && stop - at <= 512);
	at = stop;
	CHECK_EQ(gmem_lpt_next_touched(&lpt, &at, a + 100000, &stop), -ENOENT);
	CHECK_EQ(gmem_lpt_bytes(&lpt), 4096);
	gmem_lpt_extent_free(&lpt, a, 100000);
	CHECK_EQ(gmem_lpt_bytes(&lpt), 0);
	CHECK_EQ(lpt.words[a + 70000], 0);
	gmem_lpt_extent_free(&lpt, b, 1);
	CHECK_EQ(lpt.extents.count, 1);
	gmem_lpt_deinit(&lpt);
}

static void test_events(void)
{
	static struct gmem_event got[2 * GMEM_EVENT_RING];
	struct gmem_events events;
	uint64_t signals;

	CHECK_EQ(gmem_events_init(&events), 0);
	CHECK_EQ(gmem_events_read(&events, got, 4), 0);
	for (uint64_t i = 0; i < GMEM_EVENT_RING + 10; i++)
		gmem_events_post(&events, &(struct gmem_event){ .type = GMEM_EVENT_ERROR, .value = i });
	CHECK_EQ(events.lost, 10);
	CHECK_EQ(gmem_events_read(&events, got, 3), 3);
	CHECK_EQ(got[2].value, 2);
	CHECK_EQ(gmem_events_read(&events, got, 2 * GMEM_EVENT_RING), GMEM_EVENT_RING - 3);
	CHECK_EQ(got[GMEM_EVENT_RING - 4].value, GMEM_EVENT_RING - 1);
	CHECK_EQ(read(events.fd, &signals, 8), -1); /* empty: nothing to wake up for */
	gmem_events_deinit(&events);
}

/* A client can punch its memfd, or there may be no page to be had: an error, not a dead daemon. */
__attribute__((unused)) static void test_guarded_copy(void)
{
	char page[4096];
	int fd = memfd_create("t", 0);
	char *at;

	CHECK_EQ(gmem_copy_guard_init(), 0);
	at = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	CHECK(!ftruncate(fd, 4096));
	CHECK_EQ(gmem_copy(page, at, 4096), 0);
	CHECK_EQ(gmem_copy(page, at + 4096, 4096), -EFAULT); /* beyond the file: SIGBUS */
	CHECK_EQ(gmem_copy(at + 4096, page, 4096), -EFAULT);
	CHECK_EQ(gmem_copy(at, page, 4096), 0);
	munmap(at, 8192);
	close(fd);
}

static void test_uffd_check(void)
{
	int pair[2], uffd = gmem_uffd_new(-1);

	CHECK(!pipe(pair));
	CHECK(uffd >= 0);
	CHECK_EQ(gmem_uffd_check(uffd), 0);
	CHECK_EQ(gmem_uffd_check(pair[0]), -EINVAL);
	CHECK_EQ(gmem_uffd_check(-1), -EBADF);
	fcntl(uffd, F_SETFL, 0);
	CHECK_EQ(gmem_uffd_check(uffd), -EINVAL); /* blocking */
	close(uffd);
	close(pair[0]);
	close(pair[1]);
}

static int try_option(const char *key, const char *value, uint64_t *bytes, uint64_t *flag, char *message)
{
	struct gmem_driver_option options[] = { { "capacity", bytes, false, NULL }, { "replayable", flag, true, NULL } };
	struct gmem_driver_config config = { .name = "x", .keys = &key, .values = &value, .count = 1,
					     .message = message };

	return gmem_driver_options(&config, options, 2);
}

static void test_options(void)
{
	char message[GMEM_MESSAGE_MAX];
	uint64_t bytes = 0, flag = 9;

	CHECK_EQ(try_option("capacity", "48M", &bytes, &flag, message), 0);
	CHECK_EQ(bytes, 48 << 20);
	CHECK_EQ(try_option("capacity", "2GiB", &bytes, &flag, message), 0);
	CHECK_EQ(bytes, 2ull << 30);
	CHECK_EQ(try_option("replayable", "off", &bytes, &flag, message), 0);
	CHECK_EQ(flag, 0);
	CHECK_EQ(try_option("capacity", "-1", &bytes, &flag, message), -EINVAL);
	CHECK_EQ(try_option("capacity", "99999999999999999999", &bytes, &flag, message), -EINVAL);
	CHECK_EQ(try_option("capacity", "99999999T", &bytes, &flag, message), -EINVAL);
	CHECK_EQ(try_option("capacity", "4Q", &bytes, &flag, message), -EINVAL);
	CHECK(strstr(message, "capacity"));
	CHECK_EQ(try_option("colour", "1", &bytes, &flag, message), -EINVAL);
	CHECK(strstr(message, "colour"));
}

/* Random advice against one hint for each unit of a small space. */
#define UNITS 64

static void advise_units(struct gmem_hint *units, uint64_t va, uint64_t end, enum gmem_advice advice, int hnid)
{
	for (uint64_t at = va; at < end; at++) {
		struct gmem_hint *hint = &units[at];

		if (advice == GMEM_ADVISE_PREFERRED)
			hint->preferred = (int8_t)hnid;
		else if (advice == GMEM_ADVISE_ACCESSED_BY)
			hint->accessed_by |= (uint16_t)(1 << hnid);
		else if (advice == GMEM_ADVISE_NOT_ACCESSED_BY)
			hint->accessed_by &= (uint16_t)~(1 << hnid);
		else
			hint->read_mostly = advice == GMEM_ADVISE_READ_MOSTLY;
	}
}

static void check_hints(const struct gmem_hints *hints, const struct gmem_hint *units)
{
	for (uint64_t at = 0; at < UNITS; at++) {
		struct gmem_hint hint = gmem_hints_at(hints, at);

		CHECK_EQ(hint.preferred, units[at].preferred);
		CHECK_EQ(hint.read_mostly, units[at].read_mostly);
		CHECK_EQ(hint.accessed_by, units[at].accessed_by);
	}
	for (size_t i = 0; i < hints->count; i++) {
		CHECK(hints->ranges[i].va < hints->ranges[i].end);
		CHECK(!i || hints->ranges[i - 1].end <= hints->ranges[i].va);
	}
}

/* What a successor makes of the records, which are in no order. */
static void check_recorded(struct gmem_keep *keep, uint64_t session, const struct gmem_hint *units)
{
	struct gmem_hints adopted;
	struct gmem_record record;

	gmem_hints_init(&adopted, keep, session);
	for (uint32_t at = 0; (at = gmem_record_next(keep, GMEM_RECORD_HINT, at, &record));)
		if (record.id == session)
			CHECK_EQ(gmem_hints_adopt(&adopted, &record, at), 0);
	check_hints(&adopted, units);
	free(adopted.ranges); /* the records stay */
}

static void test_hints(void)
{
	static const enum gmem_advice advices[] = { GMEM_ADVISE_PREFERRED, GMEM_ADVISE_READ_MOSTLY,
						    GMEM_ADVISE_NO_READ_MOSTLY, GMEM_ADVISE_ACCESSED_BY,
						    GMEM_ADVISE_NOT_ACCESSED_BY };
	struct gmem_hints hints, copy;
	struct gmem_hint units[UNITS];
	struct gmem_record record;
	struct gmem_keep keep;
	unsigned seed = 7;
	int sockets[2];

	CHECK(!socketpair(AF_UNIX, SOCK_DGRAM, 0, sockets));
	CHECK_EQ(gmem_keep_init(&keep, sockets[0], 8, NULL, 0), 0);
	gmem_hints_init(&hints, &keep, 1);
	gmem_hints_init(&copy, &keep, 2);

	for (int i = 0; i < UNITS; i++)
		units[i] = GMEM_NO_HINT;
	CHECK_EQ(gmem_hints_set(&hints, 0, 4, GMEM_ADVISE_COLD, 0), -EINVAL);
	CHECK_EQ(hints.count, 0);
	for (int round = 0; round < 20000; round++) {
		uint64_t va = (uint64_t)rand_r(&seed) % UNITS, end = va + 1 + (uint64_t)rand_r(&seed) % (UNITS - va);
		enum gmem_advice advice = advices[rand_r(&seed) % 5];
		int hnid = advice == GMEM_ADVISE_PREFERRED ? rand_r(&seed) % 4 - 1 : rand_r(&seed) % 3;

		CHECK_EQ(gmem_hints_set(&hints, va, end, advice, hnid), 0);
		advise_units(units, va, end, advice, hnid);
		check_hints(&hints, units);
		if (round % 50 == 0)
			check_recorded(&keep, 1, units);
	}
	CHECK_EQ(gmem_hints_copy(&hints, &copy), 0);
	check_hints(&copy, units);
	check_recorded(&keep, 2, units);
	gmem_hints_deinit(&copy);
	CHECK_EQ(gmem_hints_set(&hints, 0, UNITS, GMEM_ADVISE_PREFERRED, -1), 0);
	gmem_hints_deinit(&hints);
	/* a hint outlives mappings in it, and goes with the last of its range */
	CHECK_EQ(gmem_hints_set(&hints, 10, 20, GMEM_ADVISE_PREFERRED, 1), 0);
	CHECK_EQ(gmem_hints_set(&hints, 30, 32, GMEM_ADVISE_PREFERRED, 2), 0);
	gmem_hints_unmapped(&hints, 12, 31);
	CHECK_EQ(gmem_hints_at(&hints, 15).preferred, 1);
	CHECK_EQ(gmem_hints_at(&hints, 31).preferred, 2);
	gmem_hints_unmapped(&hints, 10, 31);
	CHECK_EQ(gmem_hints_at(&hints, 15).preferred, -1);
	CHECK_EQ(gmem_hints_at(&hints, 30).preferred, 2);
	gmem_hints_unmapped(&hints, 0, 100);
	CHECK_EQ(hints.count, 0);
	CHECK_EQ(gmem_record_next(&keep, GMEM_RECORD_HINT, 0, &record), 0); /* nothing is left behind */
	gmem_hints_deinit(&hints);
	gmem_keep_deinit(&keep);
	close(sockets[1]);
}

#ifdef GMEM_DEBUG
static struct gmem_mutex low, high;
static struct gmem_rwlock shared;

static void in_order(void)
{
	gmem_mutex_lock(&low);
	gmem_rwlock_read(&shared);
	gmem_mutex_lock(&high);
	CHECK_EQ(gmem_lockrank_held(), 3);
	gmem_mutex_unlock(&low); /* in any order */
	gmem_mutex_unlock(&high);
	gmem_rwlock_unlock(&shared);
	gmem_mutex_lock(&low);
	gmem_mutex_unlock(&low);
	CHECK_EQ(gmem_lockrank_held(), 0);
}

static void in_wrong_order(void)
{
	gmem_mutex_lock(&high);
	gmem_mutex_lock(&low);
}

static void below_a_shared_one(void)
{
	gmem_rwlock_write(&shared);
	gmem_mutex_lock(&low);
}

static void twice(void)
{
	gmem_rwlock_read(&shared);
	gmem_rwlock_read(&shared);
}

static void unlocks_what_it_has_not(void)
{
	gmem_mutex_lock(&low);
	gmem_mutex_unlock(&high);
}

static int signal_of(void (*fn)(void))
{
	int status;
	pid_t pid;

	fflush(NULL);
	pid = fork();
	CHECK(pid >= 0);
	if (!pid) {
		CHECK(freopen("/dev/null", "w", stderr));
		signal(SIGABRT, SIG_DFL);
		fn();
		_exit(0);
	}
	CHECK(waitpid(pid, &status, 0) == pid);
	return WIFSIGNALED(status) ? WTERMSIG(status) : -WEXITSTATUS(status);
}

/* A debug build ends at the first lock that is taken out of order, whether or not anybody else is there to wait for. */
static void test_lock_ranks(void)
{
	gmem_mutex_init(&low, GMEM_RANK_AS);
	gmem_rwlock_init(&shared, GMEM_RANK_OBJECT);
	gmem_mutex_init(&high, GMEM_RANK_HNODE);
	CHECK_EQ(signal_of(in_order), 0);
	CHECK_EQ(signal_of(in_wrong_order), SIGABRT);
	CHECK_EQ(signal_of(below_a_shared_one), SIGABRT);
	CHECK_EQ(signal_of(twice), SIGABRT);
	CHECK_EQ(signal_of(unlocks_what_it_has_not), SIGABRT);
	gmem_mutex_deinit(&low);
	gmem_rwlock_deinit(&shared);
	gmem_mutex_deinit(&high);
}
#endif

static void test_policy_names(void)
{
	struct gmem_core_config config = { .feature_mask = ~0ull, .policy = "random" };
	struct gmem_core *core;

	CHECK_EQ(gmem_core_create(&config, &core), -EINVAL);
}

/* Bad requests: each refused, with nothing left behind. */
static void test_refusals(struct gmem_core *core)
{
	struct gmem_region_info region;
	struct gmem_core_stats stats;
	struct gmem_page_info info;
	uint64_t id;
	size_t count;

	CHECK_EQ(attach_simgpu(core, "a", "capacity=4095"), -EINVAL);
	CHECK_EQ(attach_simgpu(core, "", "capacity=1M"), -EINVAL);
	CHECK_EQ(gmem_session_create(core, 1, 1, &id), 0);
	CHECK_EQ(gmem_mmap(core, id, &(struct gmem_mmap_args){ .bytes = 0 }, &region), -EINVAL);
	CHECK_EQ(gmem_mmap(core, id, &(struct gmem_mmap_args){ .bytes = 1ull << 63 }, &region), -EINVAL);
	CHECK_EQ(gmem_mmap(core, id, &(struct gmem_mmap_args){ .bytes = -1ull }, &region), -EINVAL);
	CHECK_EQ(gmem_mmap(core, id, &(struct gmem_mmap_args){ .bytes = 1ull << 50 }, &region), -ENOMEM);
	CHECK_EQ(gmem_mmap(core, id, &(struct gmem_mmap_args){ .bytes = 4096, .page_bytes = 8192 }, &region), -EINVAL);
	CHECK_EQ(gmem_mmap(core, 999, &(struct gmem_mmap_args){ .bytes = 4096 }, &region), -ENOENT);
	CHECK_EQ(gmem_mmap(core, id, &(struct gmem_mmap_args){ .bytes = 5000 }, &region), 0);
	CHECK_EQ(region.bytes, 8192);
	CHECK_EQ(gmem_mmap_commit(core, id, region.va), -ENOTCONN);
	CHECK_EQ(gmem_mmap_commit(core, id, region.va + 4096), -EINVAL);
	CHECK_EQ(gmem_mmap_commit(core, id, 4096), -EINVAL);
	CHECK_EQ(gmem_query(core, id, region.va, 3 * 4096, &info, 1, &count), -EINVAL);
	CHECK_EQ(gmem_prefetch(core, id, 0, region.va, 3 * 4096), -EINVAL);
	CHECK_EQ(gmem_prefetch(core, id, 5, region.va, 4096), -ENODEV);
	CHECK_EQ(gmem_munmap(core, id, region.va + 1, 4096), -EINVAL);
	CHECK_EQ(gmem_munmap(core, id, region.va, -4096ull), -EINVAL);
	CHECK_EQ(gmem_session_attach(core, id, -1, -1), -EBADF);
	CHECK_EQ(gmem_context_detach(core, 12345), -ENOENT);
	CHECK_EQ(gmem_acquire(core, 12345, NULL, 0, true, 0), -ENOENT);
	CHECK_EQ(gmem_device_detach(core, 0, true), -EINVAL);
	CHECK_EQ(gmem_device_detach(core, 7, true), -ENOENT);
	CHECK_EQ(gmem_munmap(core, id, region.va, region.bytes), 0);
	CHECK_EQ(gmem_munmap(core, id, region.va, region.bytes), 0); /* idempotent */
	gmem_core_stats(core, &stats);
	CHECK_EQ(stats.objects, 0);
	CHECK_EQ(gmem_session_destroy(core, id), 0);
	CHECK_EQ(gmem_session_destroy(core, id), -ENOENT);
}

int main(void)
{
	struct gmem_core *core;

	test_range();
	test_words();
	test_lpt();
	test_events();
#ifndef __SANITIZE_THREAD__ /* its own handler blocks the signal while ours runs, and ours does not return */
	test_guarded_copy();
#endif
	test_uffd_check();
	test_options();
	test_hints();
#ifdef GMEM_DEBUG
	test_lock_ranks();
#endif
	test_policy_names();
	core = core_start((struct gmem_core_config){ .hugepages = false });
	test_refusals(core);
	gmem_core_destroy(core);
	printf("parts: ok\n");
	return 0;
}
