/* SPDX-License-Identifier: Apache-2.0
 *
 * The compressed tier through its ops, with each library, against an oracle: what it keeps, what it takes, what it refuses,
 * and what the next daemon finds of it.
 */
#define _GNU_SOURCE
#include "harness.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <gmem/keep.h>

#include "../../csrc/drivers/slab.h"
#include "tierops.h"

#define KEYS 8192

static const char *algorithm; /* of the run */
static uint8_t *page, *got; /* 2 MiB each */

/* ---- helpers ---- */

static const char *with_algorithm(const char *options)
{
	static _Thread_local char text[300];

	snprintf(text, sizeof(text), "%s algorithm=%s", options, algorithm);
	return text;
}

static int attach(const char *options, struct gmem_driver_keep *keep, struct gmem_device **ret)
{
	return tier_attach(with_algorithm(options), KEYS, keep, ret);
}

static struct gmem_device *attached(const char *options, struct gmem_driver_keep *keep)
{
	return tier_attached(with_algorithm(options), KEYS, keep);
}

enum content { ZEROS, WORDS, TEXT, NOISE, HALF, CONTENTS };

/* Of a key and a version, the same each time. */
static void fill(uint8_t *at, size_t bytes, enum content content, uint64_t key, uint64_t version)
{
	uint64_t x = key * 0x9e3779b97f4a7c15ull + version * 0xbf58476d1ce4e5b9ull + 1;
	uint64_t *words = (uint64_t *)(void *)at;

	for (size_t i = 0; i < bytes / 8; i++) {
		bool noisy = content == NOISE || (content == HALF && i % 2);

		x ^= x << 13;
		x ^= x >> 7;
		x ^= x << 17;
		words[i] = content == ZEROS ? 0 : content == WORDS ? key + 1 : noisy ? x : (x & 0x0303) + 0x6161616161616161ull;
	}
}

static int push(struct gmem_device *device, uint64_t key, size_t bytes, enum content content, uint64_t version)
{
	fill(page, bytes, content, key, version);
	return tier_ops->peer_map(device, key, page, bytes);
}

static void check(struct gmem_device *device, uint64_t key, size_t bytes, enum content content, uint64_t version)
{
	fill(page, bytes, content, key, version);
	memset(got, 0xa5, bytes);
	CHECK_EQ(tier_ops->peer_unmap(device, key, got, bytes), 0);
	CHECK(!memcmp(page, got, bytes));
}

/* ---- tests ---- */

static void test_round_trips(void)
{
	static const size_t sizes[] = { KIB4, KIB64, MIB2 };
	struct gmem_device *device = attached("capacity=64M", NULL);
	uint64_t key = 0;

	for (int s = 0; s < 3; s++)
		for (int content = 0; content < CONTENTS; content++, key++) {
			CHECK_EQ(push(device, key, sizes[s], content, 0), 0);
			check(device, key, sizes[s], content, 0);
			check(device, key, sizes[s], content, 0);
			CHECK_EQ(push(device, key, sizes[s], (content + 1) % CONTENTS, 1), 0);
			check(device, key, sizes[s], (content + 1) % CONTENTS, 1);
			CHECK_EQ(push(device, key, sizes[s], content, 2), 0);
		}
	CHECK_EQ(tier_usage(device).pages, key);
	CHECK_EQ(tier_usage(device).page_bytes, CONTENTS * (KIB4 + KIB64 + MIB2));
	CHECK_EQ(tier_usage(device).raw_pages, 3);
	for (uint64_t k = 0; k < key; k++) {
		check(device, k, sizes[k / CONTENTS], k % CONTENTS, 2);
		CHECK_EQ(tier_ops->peer_free(device, k, sizes[k / CONTENTS]), 0);
		CHECK_EQ(tier_ops->peer_unmap(device, k, got, sizes[k / CONTENTS]), -EIO);
	}
	CHECK_EQ(tier_usage(device).pages, 0);
	CHECK_EQ(tier_usage(device).page_bytes, 0);
	tier_ops->remove(device);
}

static void test_what_it_takes(void)
{
	struct gmem_device *device = attached("capacity=64M", NULL);
	uint64_t empty = tier_usage(device).stored_bytes, text;

	for (uint64_t key = 0; key < 512; key++)
		CHECK_EQ(push(device, key, KIB64, ZEROS, 0), 0);
	CHECK(tier_usage(device).stored_bytes - empty <= 64 * KIB4); /* entries only */
	for (uint64_t key = 0; key < 256; key++)
		CHECK_EQ(push(device, key, KIB64, TEXT, 0), 0);
	text = tier_usage(device).stored_bytes - empty;
	CHECK(text < 256 * KIB64 / 2);
	for (uint64_t key = 0; key < 256; key++)
		CHECK_EQ(push(device, key, KIB64, NOISE, 0), 0);
	CHECK(tier_usage(device).stored_bytes >= 256 * KIB64);
	CHECK(tier_usage(device).stored_bytes < 256 * KIB64 + 256 * KIB4);
	for (uint64_t key = 0; key < 512; key++)
		tier_ops->peer_free(device, key, KIB64);
	CHECK_EQ(tier_usage(device).stored_bytes, empty); /* and all of it is given back */
	tier_ops->remove(device);
}

/* Full is an answer; what was stored stays, and room that was made can be used again, for another kind of page. */
static void test_full(void)
{
	struct gmem_device *device = attached("capacity=16M", NULL);
	struct gmem_device_info info;
	uint64_t stored = 0, assured;
	int err = 0;

	CHECK_EQ(tier_ops->info(device, &info), 0);
	assured = info.assured_bytes;
	CHECK(assured > 12 << 20 && assured < 16 << 20 && info.capacity_bytes >= 16 << 20);
	while (!(err = push(device, stored, KIB4, NOISE, 0)))
		stored++;
	CHECK_EQ(err, -ENOSPC);
	CHECK(stored * KIB4 >= assured);
	CHECK(tier_usage(device).stored_bytes <= 16 << 20);
	CHECK_EQ(push(device, 3, KIB4, NOISE, 7), -ENOSPC); /* both would have to be there for a moment */
	for (uint64_t key = 0; key < stored; key++)
		check(device, key, KIB4, NOISE, 0);
	for (uint64_t key = 10; key < 210; key++)
		CHECK_EQ(tier_ops->peer_free(device, key, KIB4), 0);
	for (uint64_t key = 10; key < 210; key++)
		CHECK_EQ(push(device, key, KIB4, TEXT, 8), 0);
	CHECK_EQ(push(device, 3, KIB4, TEXT, 7), 0);
	check(device, 3, KIB4, TEXT, 7);
	for (uint64_t key = 0; key < stored; key++)
		CHECK_EQ(tier_ops->peer_free(device, key, KIB4), 0);
	for (uint64_t key = 0; key < 3; key++)
		CHECK_EQ(push(device, key, MIB2, NOISE, 1), 0);
	check(device, 2, MIB2, NOISE, 1);
	tier_ops->remove(device);
}

/* Sizes of every class, freed in another order, so that slabs are squeezed. */
static void test_against_an_oracle(void)
{
	enum { COUNT = 2000 };
	static struct { uint8_t content, stored, size; uint32_t version; } oracle[COUNT];
	static const size_t sizes[] = { KIB4, KIB64 };
	struct gmem_device *device = attached("capacity=5M", NULL);
	uint64_t x = 12345, refused = 0;

	memset(oracle, 0, sizeof(oracle));
	for (uint32_t step = 1; step < 12000; step++) {
		uint64_t key;
		int err;

		x ^= x << 13;
		x ^= x >> 7;
		x ^= x << 17;
		key = x % COUNT;
		if (oracle[key].stored && x >> 40 & 1) {
			check(device, key, sizes[oracle[key].size], oracle[key].content, oracle[key].version);
		} else if (oracle[key].stored && x >> 41 & 1) {
			CHECK_EQ(tier_ops->peer_free(device, key, sizes[oracle[key].size]), 0);
			oracle[key].stored = 0;
		} else {
			uint8_t content = (uint8_t)(x >> 50) % CONTENTS, size = oracle[key].stored ? oracle[key].size : (x >> 45) % 16 == 0;

			err = push(device, key, sizes[size], content, step);
			CHECK(!err || err == -ENOSPC);
			refused += err != 0;
			if (!err) {
				oracle[key].content = content;
				oracle[key].stored = 1;
				oracle[key].size = size;
				oracle[key].version = step;
			}
		}
	}
	CHECK(refused > 0);
	for (uint64_t key = 0; key < COUNT; key++)
		if (oracle[key].stored)
			check(device, key, sizes[oracle[key].size], oracle[key].content, oracle[key].version);
	tier_ops->remove(device);
}

static void test_batches_and_bad_pages(void)
{
	struct gmem_device *device = attached("capacity=64M", NULL);
	uint8_t *memory = mmap(NULL, 64 * KIB4, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct gmem_peer_io io[64];

	for (uint64_t i = 0; i < 64; i++) {
		fill(memory + i * KIB4, KIB4, i % CONTENTS, i, 0);
		io[i] = (struct gmem_peer_io){ .key = i, .memory = memory + i * KIB4, .bytes = KIB4, .result = 1 };
	}
	io[7].key = KEYS;
	io[8].bytes = 5000;
	mprotect(memory + 9 * KIB4, KIB4, PROT_READ);
	CHECK_EQ(tier_ops->peer_map_batch(device, io, 64), 0);
	for (uint64_t i = 0; i < 64; i++)
		CHECK_EQ(io[i].result, i == 7 || i == 8 ? -EINVAL : 0);
	mprotect(memory, 64 * KIB4, PROT_READ | PROT_WRITE);
	memset(memory, 0, 64 * KIB4);
	CHECK_EQ(tier_ops->peer_unmap_batch(device, io, 64), 0);
	for (uint64_t i = 0; i < 64; i++) {
		CHECK_EQ(io[i].result, i == 7 || i == 8 ? -EINVAL : 0);
		fill(page, KIB4, i % CONTENTS, i, 0);
		CHECK(i == 7 || i == 8 || !memcmp(page, memory + i * KIB4, KIB4));
	}
	tier_ops->remove(device);
	munmap(memory, 64 * KIB4);
}

/* ---- what outlives it ---- */

/* The first one is left as it is, as by a kill; the second one has its pages, and its room. */
static void test_the_next_one_takes_over(void)
{
	static const size_t sizes[] = { KIB4, KIB64, MIB2 };
	struct gmem_kept_fd left[16];
	struct gmem_device *first, *second;
	struct gmem_device_usage before, after;
	struct tier_held held, again;
	size_t count;

	tier_hold(&held, NULL, 0);
	first = attached("capacity=32M", &held.driver);
	CHECK(!held.driver.restored);
	for (uint64_t key = 0; key < 600; key++)
		CHECK_EQ(push(first, key, sizes[key % 200 == 0 ? 2 : key % 10 == 0], key % CONTENTS, 1), 0);
	for (uint64_t key = 0; key < 600; key += 3)
		CHECK_EQ(tier_ops->peer_free(first, key, KIB4), 0);
	before = tier_usage(first);
	count = tier_held_fds(&held, left);
	CHECK_EQ(count, 2);
	tier_hold(&again, left, count);
	second = attached("capacity=32M", &again.driver);
	CHECK(again.driver.restored);
	after = tier_usage(second);
	CHECK_EQ(after.pages, before.pages);
	CHECK_EQ(after.page_bytes, before.page_bytes);
	CHECK_EQ(after.raw_pages, before.raw_pages);
	CHECK_EQ(after.stored_bytes, before.stored_bytes);
	for (uint64_t key = 0; key < 600; key++)
		if (key % 3)
			check(second, key, sizes[key % 200 == 0 ? 2 : key % 10 == 0], key % CONTENTS, 1);
		else
			CHECK_EQ(push(second, key, KIB4, (key + 1) % CONTENTS, 2), 0);
	for (uint64_t key = 0; key < 600; key++) {
		size_t bytes = key % 3 ? sizes[key % 200 == 0 ? 2 : key % 10 == 0] : KIB4;

		check(second, key, bytes, key % 3 ? key % CONTENTS : (key + 1) % CONTENTS, key % 3 ? 1 : 2);
		CHECK_EQ(tier_ops->peer_free(second, key, bytes), 0);
	}
	CHECK_EQ(tier_usage(second).pages, 0);
	tier_ops->remove(second);
	tier_let_go(&again);
	tier_ops->remove(first);
	tier_let_go(&held);
}

/* Slabs of one size and entries of another do not belong together; nothing is made of them. */
static void test_what_does_not_fit_is_refused(void)
{
	struct gmem_kept_fd left[16];
	struct gmem_device *first, *second;
	struct tier_held held, again;

	tier_hold(&held, NULL, 0);
	first = attached("capacity=32M", &held.driver);
	CHECK_EQ(push(first, 1, KIB4, NOISE, 1), 0);
	CHECK_EQ(tier_held_fds(&held, left), 2);
	tier_hold(&again, left, 2);
	CHECK_EQ(attach("capacity=16M", &again.driver, &second), -EPROTO);
	CHECK(strstr(tier_message, "taken over"));
	check(first, 1, KIB4, NOISE, 1);
	tier_let_go(&again);
	tier_ops->remove(first);
	tier_let_go(&held);
}

static void test_damage(void)
{
	struct gmem_kept_fd left[16];
	struct gmem_device *device;
	struct tier_held held;
	struct stat st;
	uint8_t byte;
	off_t data;
	int slabs;

	tier_hold(&held, NULL, 0);
	device = attached("capacity=32M", &held.driver);
	CHECK_EQ(push(device, 5, KIB64, NOISE, 1), 0);
	CHECK_EQ(tier_held_fds(&held, left), 2);
	slabs = strstr(left[0].name, "slabs") ? left[0].fd : left[1].fd;
	CHECK_EQ(fstat(slabs, &st), 0);
	data = lseek(slabs, 2 << 20, SEEK_DATA); /* behind the header */
	CHECK(data > 0 && pread(slabs, &byte, 1, data + 100) == 1);
	byte ^= 1;
	CHECK_EQ(pwrite(slabs, &byte, 1, data + 100), 1);
	CHECK_EQ(tier_ops->peer_unmap(device, 5, got, KIB64), -EBADMSG);
	CHECK(strstr(tier_ops->last_error(device), "damaged"));
	CHECK_EQ(tier_ops->peer_free(device, 5, KIB64), 0);
	CHECK_EQ(push(device, 5, KIB64, NOISE, 2), 0);
	check(device, 5, KIB64, NOISE, 2);
	close(left[0].fd);
	close(left[1].fd);
	tier_ops->remove(device);
	tier_let_go(&held);
}

static void test_options(void)
{
	static const char *const bad[] = { "capacity=1M", "ratio=0", "ratio=99", "colour=red", "capacity=many" };
	struct gmem_device *device;

	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		CHECK_EQ(attach(bad[i], NULL, &device), -EINVAL);
		CHECK(!strncmp(tier_message, bad[i], strcspn(bad[i], "=")) || strstr(tier_message, "colour"));
	}
}

/* ---- threads ---- */

struct hammer {
	struct gmem_device *device;
	uint64_t first;
};

static void *hammer(void *arg)
{
	struct hammer *h = arg;
	uint8_t *mine = aligned_alloc(64, KIB4), *back = aligned_alloc(64, KIB4);

	for (uint64_t round = 1; round < 40; round++)
		for (uint64_t key = h->first; key < h->first + 64; key++) {
			fill(mine, KIB4, (key + round) % CONTENTS, key, round);
			CHECK_EQ(tier_ops->peer_map(h->device, key, mine, KIB4), 0);
			CHECK_EQ(tier_ops->peer_unmap(h->device, key, back, KIB4), 0);
			CHECK(!memcmp(mine, back, KIB4));
			if ((key + round) % 3 == 0)
				CHECK_EQ(tier_ops->peer_free(h->device, key, KIB4), 0);
		}
	free(mine);
	free(back);
	return NULL;
}

static void test_threads(void)
{
	struct gmem_device *device = attached("capacity=64M", NULL);
	pthread_t threads[4];
	struct hammer hammers[4];

	for (int i = 0; i < 4; i++) {
		hammers[i] = (struct hammer){ device, (uint64_t)i * 64 };
		CHECK_EQ(pthread_create(&threads[i], NULL, hammer, &hammers[i]), 0);
	}
	for (int i = 0; i < 4; i++)
		pthread_join(threads[i], NULL);
	tier_ops->remove(device);
}

int main(void)
{
	static const char *const algorithms[] = { "zstd", "lz4" };

	page = mmap(NULL, 2 * MIB2, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	got = page + MIB2;
	tier_ops = gmem_driver_builtin("zstd");
	CHECK(tier_ops);
	for (int i = 0; i < 2; i++) {
		algorithm = algorithms[i];
		test_round_trips();
		test_what_it_takes();
		test_full();
		test_against_an_oracle();
		test_batches_and_bad_pages();
		test_the_next_one_takes_over();
		test_what_does_not_fit_is_refused();
		test_damage();
		test_options();
		test_threads();
		printf("zstd tier, %s: ok\n", algorithm);
	}
	return 0;
}
