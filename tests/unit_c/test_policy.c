/* SPDX-License-Identifier: Apache-2.0
 *
 * Policies by themselves: what each one keeps, what all of them owe their caller, and replays whose counts are known.
 */
#define _GNU_SOURCE
#include "harness.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include <gmem/policies.h>
#include <gmem/replay.h>
#include <gmem/shadow.h>

#define FRAMES 200

static void start(struct gmem_policy *policy, const char *name, uint32_t frames)
{
	CHECK(gmem_policy_find(name) != NULL);
	CHECK_EQ(gmem_policy_init(policy, gmem_policy_find(name), FRAMES + 1), 0);
	for (uint32_t f = 1; f <= frames; f++)
		gmem_policy_insert(policy, f, f);
}

static void touch(struct gmem_policy *policy, uint32_t frame, int times)
{
	while (times--)
		gmem_policy_touch(policy, frame);
}

/* Evicts the candidate. */
static uint32_t evict(struct gmem_policy *policy)
{
	uint32_t frame = gmem_policy_next(policy);

	gmem_policy_remove(policy, frame, frame, GMEM_LEAVE_EVICTED);
	return frame;
}

static void test_names(void)
{
	size_t count = 0;

	for (const char *name; (name = gmem_policy_name(count)); count++)
		CHECK(!strcmp(gmem_policy_find(name)->name, name));
	CHECK_EQ(count, 6);
	CHECK(gmem_policy_find(NULL) == gmem_policy_find(gmem_policy_name(0)));
	CHECK(gmem_policy_find("random") == NULL);
}

static void test_lru(void)
{
	struct gmem_policy policy;

	start(&policy, "lru", 4);
	touch(&policy, 1, 1);
	CHECK_EQ(evict(&policy), 2);
	CHECK_EQ(gmem_policy_next(&policy), 3); /* stays: it is the youngest now */
	CHECK_EQ(evict(&policy), 4);
	gmem_policy_cool(&policy, 3);
	CHECK_EQ(evict(&policy), 3);
	CHECK_EQ(evict(&policy), 1);
	CHECK_EQ(gmem_policy_next(&policy), GMEM_FRAME_NONE);
	gmem_policy_deinit(&policy);
}

static void test_clock(void)
{
	struct gmem_policy policy;

	start(&policy, "clock", 4);
	touch(&policy, 1, 2);
	CHECK_EQ(evict(&policy), 2);
	CHECK_EQ(evict(&policy), 3);
	CHECK_EQ(evict(&policy), 4);
	CHECK_EQ(evict(&policy), 1); /* its one mark is spent */
	gmem_policy_deinit(&policy);
}

/* SIEVE evicts what was not used, keeps what was, and survives removals under its hand. */
static void test_sieve(void)
{
	struct gmem_policy policy;

	start(&policy, "sieve", 8);
	touch(&policy, 1, 1);
	touch(&policy, 2, 1);
	CHECK_EQ(evict(&policy), 3);
	CHECK_EQ(gmem_policy_next(&policy), 4);
	CHECK_EQ(policy.hand, 5);
	gmem_policy_remove(&policy, 5, 5, GMEM_LEAVE_FREED);
	CHECK_EQ(gmem_policy_next(&policy), 6);
	for (uint32_t f = 1; f <= 8; f++)
		touch(&policy, f, f != 3 && f != 5);
	CHECK_EQ(gmem_policy_next(&policy), 7); /* all used: one round clears, the second takes */
	gmem_policy_cool(&policy, 2);
	CHECK_EQ(gmem_policy_next(&policy), 2);
	for (uint32_t left = 6; left; left--)
		evict(&policy);
	CHECK(!policy.queues[0].head && !policy.queues[0].tail && !policy.hand && !policy.count);
	gmem_policy_deinit(&policy);
}

/* One pass does not push out what was used, and who comes back soon enters the main queue. */
static void test_s3fifo(void)
{
	struct gmem_policy policy;

	start(&policy, "s3fifo", 20);
	for (uint32_t f = 1; f <= 10; f++)
		touch(&policy, f, 3);
	for (uint32_t f = 11; f <= 18; f++)
		CHECK_EQ(evict(&policy), f);
	gmem_policy_insert(&policy, 11, 11);
	CHECK_EQ(policy.nodes[11].queue, 1);
	gmem_policy_insert(&policy, 30, 30);
	CHECK_EQ(policy.nodes[30].queue, 0);
	gmem_policy_cool(&policy, 5);
	CHECK_EQ(evict(&policy), 5);
	gmem_policy_deinit(&policy);
}

/* What was used most stays, also if it had to leave for a while; what comes once passes by. */
static void test_lfu(void)
{
	struct gmem_policy policy;

	start(&policy, "lfu", 100);
	for (uint32_t f = 1; f <= 50; f++)
		touch(&policy, f, 5);
	for (uint32_t f = 101; f <= 140; f++) {
		CHECK(evict(&policy) > 50);
		gmem_policy_insert(&policy, f, f);
	}
	gmem_policy_remove(&policy, 7, 7, GMEM_LEAVE_EVICTED);
	gmem_policy_insert(&policy, 7, 7);
	for (int i = 0; i < 41; i++) /* the others are what came last, and not a matter of counts yet */
		CHECK(evict(&policy) > 50);
	gmem_policy_cool(&policy, 9);
	CHECK_EQ(evict(&policy), 9);
	gmem_policy_deinit(&policy);
}

/* However few frames there are, pages that are used by turns do not displace each other. */
static void test_lfu_together(void)
{
	struct gmem_policy policy;

	start(&policy, "lfu", 24);
	for (uint32_t f = 1; f <= 24; f++)
		touch(&policy, f, 3);
	for (uint32_t f = 101; f <= 200; f++) {
		uint32_t gone = evict(&policy);

		CHECK(gone <= 24 || gone + 6 <= f);
		gmem_policy_insert(&policy, f, f);
	}
	gmem_policy_deinit(&policy);
}

/* What was cooled leaves before all others, also if that is more than one. */
static void test_cool(const char *name)
{
	struct gmem_policy policy;

	start(&policy, name, 100);
	for (uint32_t f = 1; f <= 100; f++)
		touch(&policy, f, 2);
	for (uint32_t f = 60; f < 80; f++)
		gmem_policy_cool(&policy, f);
	for (uint32_t f = 101; f <= 120; f++) {
		uint32_t gone = evict(&policy);

		CHECK(gone >= 60 && gone < 80);
		gmem_policy_insert(&policy, f, f);
	}
	gmem_policy_deinit(&policy);
}

/* Every frame is offered once before any is offered again; after marks have been spent, also those that had some. */
static void test_offers(const char *name)
{
	uint8_t seen[FRAMES + 1] = { 0 };
	struct gmem_policy policy;

	start(&policy, name, FRAMES);
	for (int i = 0; i < 30; i++)
		gmem_policy_remove(&policy, 100 + (uint32_t)i, 100 + (uint64_t)i, GMEM_LEAVE_FREED);
	for (int round = 0; round < 3; round++) {
		for (uint32_t i = 0; i < FRAMES - 30; i++) {
			uint32_t frame = gmem_policy_next(&policy);

			CHECK(frame && frame <= FRAMES && (frame < 100 || frame >= 130));
			CHECK_EQ(seen[frame]++, round);
		}
	}
	for (uint32_t f = 1; f < 100; f++)
		touch(&policy, f, 3);
	memset(seen, 0, sizeof(seen));
	for (uint32_t i = 0; i < 6 * FRAMES; i++)
		seen[gmem_policy_next(&policy)] = 1;
	for (uint32_t f = 1; f <= FRAMES; f++)
		CHECK_EQ(seen[f], f < 100 || f >= 130);
	gmem_policy_deinit(&policy);
}

/* Random operations against a plain set of what is inserted: offers are of it, and nothing is lost. */
static void test_random(const char *name, unsigned int seed)
{
	uint8_t in[FRAMES + 1] = { 0 };
	struct gmem_policy policy;
	uint32_t count = 0, last = 0;

	srand(seed);
	start(&policy, name, 0);
	for (int i = 0; i < 100000; i++) {
		uint32_t f = 1 + (uint32_t)rand() % FRAMES, busy = 0;

		if (!in[f]) {
			gmem_policy_insert(&policy, f, f * 3 + (uint64_t)(rand() % 2));
			in[f] = 1;
			count++;
		} else if (rand() % 4) {
			gmem_policy_touch(&policy, f);
		} else if (rand() % 8 == 0) {
			gmem_policy_cool(&policy, f);
			CHECK_EQ(gmem_policy_next(&policy), f);
		} else {
			gmem_policy_remove(&policy, f, f * 3, rand() % 2 ? GMEM_LEAVE_EVICTED : GMEM_LEAVE_FREED);
			in[f] = 0;
			count--;
		}
		for (; rand() % 3 == 0 && count; busy++) {
			f = gmem_policy_next(&policy);
			CHECK(in[f]);
			CHECK(count == 1 || !busy || f != last);
			last = f;
		}
		if (busy && rand() % 2) {
			gmem_policy_remove(&policy, last, last * 3, GMEM_LEAVE_EVICTED);
			in[last] = 0;
			count--;
		}
		CHECK_EQ(policy.count, count);
	}
	while (count--) {
		uint32_t f = evict(&policy);

		CHECK_EQ(in[f]--, 1);
	}
	CHECK_EQ(gmem_policy_next(&policy), GMEM_FRAME_NONE);
	gmem_policy_deinit(&policy);
}

static void test_ghosts(void)
{
	struct gmem_ghosts ghosts;
	uint16_t note = 7;
	uint32_t kept = 0;

	CHECK_EQ(gmem_ghosts_init(&ghosts, 1000), 0);
	for (uint16_t key = 0; key < 1000; key++)
		gmem_ghosts_add(&ghosts, key, key, 1000);
	CHECK(!gmem_ghosts_take(&ghosts, 5000, 1000, &note));
	CHECK(!gmem_ghosts_take(&ghosts, 3, 100, &note)); /* too long ago */
	CHECK(gmem_ghosts_take(&ghosts, 999, 100, &note));
	CHECK_EQ(note, 999);
	CHECK(!gmem_ghosts_take(&ghosts, 999, 100, &note)); /* forgotten */
	for (uint16_t key = 10; key < 999; key++)
		if (gmem_ghosts_take(&ghosts, key, 2000, &note)) {
			kept++;
			CHECK_EQ(note, key);
		}
	CHECK(kept > 900); /* a few were pushed out of their bucket */
	gmem_ghosts_deinit(&ghosts);
}

static void test_shadow(void)
{
	struct gmem_shadow shadow;

	CHECK_EQ(gmem_shadow_init(&shadow, &gmem_policy_lru), 0);
	for (uint64_t round = 0; round < 3; round++)
		for (uint64_t key = 0; key < GMEM_SHADOW_FRAMES; key++)
			CHECK_EQ(gmem_shadow_access(&shadow, key, GMEM_SHADOW_FRAMES), round > 0);
	gmem_shadow_forget(&shadow, 5);
	gmem_shadow_forget(&shadow, 5);
	CHECK_EQ(shadow.used, GMEM_SHADOW_FRAMES - 1);
	CHECK(!gmem_shadow_access(&shadow, 5, GMEM_SHADOW_FRAMES));
	CHECK(!gmem_shadow_access(&shadow, 1 << 20, 10)); /* shrinks */
	CHECK_EQ(shadow.used, 10);
	CHECK(gmem_shadow_access(&shadow, 5, 10));
	CHECK(!gmem_shadow_access(&shadow, 6, 10));
	gmem_shadow_deinit(&shadow);
}

/* A large hnode: the sample decides like the whole would, and frequency wins over a scan. */
static void test_sampled(void)
{
	enum { HOT = 20000, SCAN = 40000, COUNT = 4000000 };
	uint64_t *pages = malloc(COUNT * sizeof(*pages));
	struct gmem_accesses accesses;
	struct gmem_replay lru, acme;

	srand(1);
	for (uint64_t i = 0; i < COUNT; i++)
		pages[i] = i % 2 ? (uint64_t)rand() % HOT : HOT + i / 2 % SCAN;
	CHECK_EQ(gmem_accesses_init(&accesses, pages, NULL, COUNT), 0);
	CHECK_EQ(gmem_replay(&accesses, "lru", 24000, GMEM_VISIBLE_ALL, 0, &lru), 0);
	CHECK_EQ(gmem_replay(&accesses, "acme", 24000, GMEM_VISIBLE_ALL, 0, &acme), 0);
	CHECK(acme.misses < lru.misses * 8 / 10);
	gmem_accesses_deinit(&accesses);
	free(pages);
}

static void test_replay(void)
{
	const uint64_t pages[] = { 70, 50, 60, 70, 10, 50, 60, 70 };
	const uint8_t writes[] = { 1, 0, 0, 0, 0, 0, 1, 0 };
	struct gmem_accesses accesses;
	struct gmem_replay r;

	CHECK_EQ(gmem_accesses_init(&accesses, pages, writes, 8), 0);
	CHECK_EQ(accesses.distinct, 4);
	CHECK_EQ(accesses.ids[3], 0);
	CHECK_EQ(gmem_replay(&accesses, "lru", 3, GMEM_VISIBLE_ALL, 0, &r), 0);
	/* 70 50 60 in, hit 70, 10 for 50, 50 for 60, 60 for 70 (dirty), 70 for 10 */
	CHECK_EQ(r.misses, 7);
	CHECK_EQ(r.evicted_dirty, 1);
	CHECK_EQ(r.evicted_clean, 3);
	CHECK_EQ(gmem_replay(&accesses, "lru", 3, GMEM_VISIBLE_FAULTS, 0, &r), 0);
	CHECK_EQ(r.misses, 5); /* 10 for 70 (dirty), 70 for 50 */
	CHECK_EQ(gmem_replay_opt(&accesses, 3, &r), 0);
	CHECK_EQ(r.misses, 5); /* 10 takes the place of 70 */
	CHECK_EQ(r.evicted_dirty, 1);
	CHECK_EQ(gmem_replay_static(&accesses, 2, &r), 0);
	CHECK_EQ(r.misses, 5); /* 70 and 50 stay; 60 twice, 10 */
	CHECK_EQ(gmem_replay(&accesses, "lru", 0, 0, 0, &r), -EINVAL);
	CHECK_EQ(gmem_replay(&accesses, "none", 1, 0, 0, &r), -EINVAL);
	CHECK_EQ(gmem_replay_opt(&accesses, 0, &r), -EINVAL);
	CHECK_EQ(gmem_replay_static(&accesses, 0, &r), -EINVAL);
	gmem_accesses_deinit(&accesses);
	CHECK_EQ(gmem_accesses_init(&accesses, pages, NULL, 0), 0);
	CHECK_EQ(gmem_replay_opt(&accesses, 3, &r), 0);
	CHECK_EQ(gmem_replay(&accesses, NULL, 3, 0, 0, &r), 0);
	CHECK_EQ(r.misses, 0);
	gmem_accesses_deinit(&accesses);
}

int main(void)
{
	test_names();
	test_lru();
	test_clock();
	test_sieve();
	test_s3fifo();
	test_lfu();
	test_lfu_together();
	for (size_t i = 0; gmem_policy_name(i); i++) {
		test_offers(gmem_policy_name(i));
		test_cool(gmem_policy_name(i));
		for (unsigned int seed = 1; seed <= 5; seed++)
			test_random(gmem_policy_name(i), seed);
	}
	test_ghosts();
	test_shadow();
	test_sampled();
	test_replay();
	printf("policy: ok\n");
	return 0;
}
