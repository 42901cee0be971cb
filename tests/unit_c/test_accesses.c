/* SPDX-License-Identifier: Apache-2.0
 *
 * Traces as replays see them: stays, sizes, what other hnodes take away; traces that are none; and counts that are known.
 */
#define _GNU_SOURCE
#include "harness.h"

#include <errno.h>

#include <gmem/replay.h>

#define ALL_KINDS 0x1e
#define W GMEM_ACCESS_WRITE
#define E GMEM_ACCESS_EMPTY
#define O GMEM_ACCESS_OWNED

static struct gmem_access on(int hnid, uint64_t page, uint8_t shift, uint8_t flags)
{
	return (struct gmem_access){ .page = page, .hnid = (uint8_t)hnid, .kind = GMEM_ACCESS_FAULT, .shift = shift,
				     .flags = flags, .session = 1 };
}

static struct gmem_access gone(uint64_t page, uint64_t pages)
{
	return (struct gmem_access){ .page = page, .va = pages, .hnid = GMEM_ACCESS_NOWHERE, .kind = GMEM_ACCESS_GONE,
				     .shift = 12 };
}

static const struct gmem_accesses_filter device = { .hnid = 1, .kinds = ALL_KINDS };

static void test_stays(void)
{
	const struct gmem_access trace[] = {
		on(1, 10, 12, E | W), on(1, 11, 12, 0), on(0, 10, 12, 0), /* a read elsewhere takes nothing */
		on(1, 10, 12, 0),     on(0, 10, 12, W), on(1, 10, 12, 0), gone(0, 100),
		on(1, 11, 12, E | O), on(0, 99, 12, W), gone(11, 1),	  gone(11, 1),
	};
	struct gmem_accesses a;
	struct gmem_replay r;

	CHECK_EQ(gmem_accesses_load(&a, trace, sizeof(trace) / sizeof(*trace), &device), 0);
	CHECK_EQ(a.uses, 5);
	CHECK_EQ(a.absent, 5);
	CHECK_EQ(a.pages, 2);
	CHECK_EQ(a.distinct, 4); /* 10, 11, 10 after the write elsewhere, 11 after its end */
	CHECK_EQ(a.count, 9);
	CHECK_EQ(a.peak, 2);
	CHECK_EQ(a.unit_shift, 12);
	CHECK_EQ(gmem_replay(&a, "lru", 2, GMEM_VISIBLE_ALL, 0, &r), 0);
	CHECK_EQ(r.misses, 4);
	CHECK_EQ(r.in_units, 2);  /* 10 and 11 came empty once */
	CHECK_EQ(r.out_units, 1); /* 10, to where it was written; what was dirty at the end of its content is not copied */
	CHECK_EQ(r.evicted_dirty + r.evicted_clean, 0);
	CHECK_EQ(gmem_replay(&a, "lru", 1, GMEM_VISIBLE_ALL, 0, &r), 0);
	CHECK_EQ(r.misses, 5);
	CHECK_EQ(r.evicted_dirty, 1); /* 10 for 11 */
	CHECK_EQ(r.evicted_clean, 1); /* 11 for 10 */
	CHECK_EQ(r.in_units, 3);
	gmem_accesses_deinit(&a);
}

static void test_sizes(void)
{
	/* units of 64 KiB: 1, 32, 1, 32 */
	const struct gmem_access trace[] = {
		on(1, 1, 16, 0), on(1, 2, 21, W), on(1, 3, 16, 0), on(1, 1, 16, 0), on(1, 4, 21, 0), on(1, 2, 21, 0),
	};
	struct gmem_accesses a;
	struct gmem_replay r;

	CHECK_EQ(gmem_accesses_load(&a, trace, 6, &device), 0);
	CHECK_EQ(a.unit_shift, 16);
	CHECK_EQ(a.peak, 66);
	CHECK_EQ(gmem_replay(&a, "lru", 34, GMEM_VISIBLE_ALL, 0, &r), 0);
	CHECK_EQ(r.misses, 5); /* 4 takes the place of 2; 2 takes those of 3, 1 and 4 */
	CHECK_EQ(r.evicted_dirty, 1);
	CHECK_EQ(r.evicted_clean, 3);
	CHECK_EQ(r.in_units, 98);
	CHECK_EQ(r.out_units, 32);
	CHECK_EQ(r.dropped_units, 34);
	CHECK_EQ(gmem_replay(&a, "lru", 66, GMEM_VISIBLE_ALL, 0, &r), 0);
	CHECK_EQ(r.misses, 4);
	CHECK_EQ(gmem_replay(&a, "lru", 31, GMEM_VISIBLE_ALL, 0, &r), 0);
	CHECK_EQ(r.misses, 5); /* the large ones pass through */
	CHECK_EQ(gmem_replay_opt(&a, 34, &r), 0);
	CHECK_EQ(r.misses, 5);
	CHECK_EQ(gmem_replay_opt(&a, 31, &r), 0);
	CHECK_EQ(r.misses, 5);
	CHECK_EQ(gmem_replay_static(&a, 34, &r), 0);
	CHECK_EQ(r.misses, 4); /* 1, 2 and 3 stay */
	CHECK_EQ(r.out_units, 0);
	gmem_accesses_deinit(&a);
}

static void test_filter(void)
{
	struct gmem_access trace[] = { on(1, 1, 12, 0), on(1, 2, 12, 0), on(2, 3, 12, 0), on(1, 4, 12, 0), on(2, 4, 12, O) };
	struct gmem_accesses_filter filter = device;
	struct gmem_accesses a;

	trace[1].kind = GMEM_ACCESS_AHEAD;
	trace[3].session = 2;
	trace[4].kind = GMEM_ACCESS_PREFETCH; /* takes 4 along */
	CHECK_EQ(gmem_accesses_load(&a, trace, 5, &filter), 0);
	CHECK_EQ(a.uses, 3);
	CHECK_EQ(a.count, 4);
	CHECK_EQ(a.ops[3], GMEM_OP_TAKEN);
	gmem_accesses_deinit(&a);
	filter.kinds &= ~(1u << GMEM_ACCESS_AHEAD);
	filter.session = 1;
	CHECK_EQ(gmem_accesses_load(&a, trace, 5, &filter), 0);
	CHECK_EQ(a.uses, 1);
	CHECK_EQ(a.count, 1);
	gmem_accesses_deinit(&a);
	filter.hnid = 7;
	CHECK_EQ(gmem_accesses_load(&a, trace, 5, &filter), 0);
	CHECK_EQ(a.count, 0);
	gmem_accesses_deinit(&a);
}

static void test_nonsense(void)
{
	const struct gmem_access bad[] = {
		{ .kind = 0, .shift = 12 }, { .kind = GMEM_ACCESS_KINDS, .shift = 12 }, { .kind = 1, .shift = 11 },
		{ .kind = 1, .shift = 31 }, { .kind = 1, .shift = 12, .hnid = 16 }, { .kind = 1, .shift = 12, .flags = 0x10 },
		{ .kind = 1, .shift = 12, .page = UINT64_MAX }, { .kind = GMEM_ACCESS_GONE, .shift = 12, .hnid = 1 },
		{ .kind = GMEM_ACCESS_GONE, .shift = 12, .hnid = GMEM_ACCESS_NOWHERE, .va = UINT64_MAX },
	};
	struct gmem_access trace[2] = { on(1, 1, 12, 0) };
	struct gmem_accesses a;

	for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
		trace[1] = bad[i];
		CHECK_EQ(gmem_access_check(trace, 2), 1);
		CHECK_EQ(gmem_accesses_load(&a, trace, 2, &device), -EINVAL);
		CHECK(!a.ids);
	}
	CHECK_EQ(gmem_access_check(trace, 1), 1);
}

/* Whatever sound records say, replays end, lose nobody, and OPT is the least where pages are of one size. */
static void test_random(unsigned int seed, bool sizes)
{
	enum { COUNT = 3000 };
	static struct gmem_access trace[COUNT];
	struct gmem_replay opt, r;
	struct gmem_accesses a;

	srand(seed);
	for (int i = 0; i < COUNT; i++) {
		int what = rand() % 40;

		trace[i] = on(what < 5 ? 2 : 1, (uint64_t)(rand() % 60), sizes && rand() % 4 ? 16 : 12, (uint8_t)(rand() % 16));
		trace[i].kind = (uint8_t)(1 + rand() % 4);
		if (what == 39)
			trace[i] = gone((uint64_t)(rand() % 60), rand() % 3 ? 1 : (uint64_t)rand() << 8);
	}
	CHECK_EQ(gmem_accesses_load(&a, trace, COUNT, &device), 0);
	CHECK(a.count <= 2 * COUNT && a.distinct >= a.pages && a.pages <= 60);
	for (uint64_t capacity = 1; capacity < 1000; capacity = capacity * 3 / 2 + 1) {
		CHECK_EQ(gmem_replay_opt(&a, capacity, &opt), 0);
		for (size_t p = 0; gmem_policy_name(p); p++) {
			CHECK_EQ(gmem_replay(&a, gmem_policy_name(p), capacity, GMEM_VISIBLE_ALL, 0, &r), 0);
			CHECK(r.misses <= a.uses && r.misses >= a.distinct);
			CHECK(r.evicted_dirty + r.evicted_clean <= r.misses);
			CHECK(sizes || r.misses >= opt.misses);
			CHECK(capacity < a.peak || r.misses == a.distinct);
		}
		CHECK_EQ(gmem_replay_static(&a, capacity, &r), 0);
		CHECK(sizes || r.misses + 60 >= opt.misses);
	}
	gmem_accesses_deinit(&a);
}

int main(void)
{
	test_stays();
	test_sizes();
	test_filter();
	test_nonsense();
	for (unsigned int seed = 1; seed <= 6; seed++)
		test_random(seed, seed & 1);
	printf("accesses: ok\n");
	return 0;
}
