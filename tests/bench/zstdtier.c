/* SPDX-License-Identifier: Apache-2.0
 *
 * The compressed tier's driver beside its library alone, on pages that compress two to one: what a page costs above
 * compression (copy, checksum, slab, index), and how much more it takes than what the library makes of it. Pages that do not
 * compress are stored as they are, beside a copy.
 */
#define _GNU_SOURCE
#include "bench.h"

#include <sys/mman.h>

#include <gmem/driver.h>

#include "../../csrc/drivers/codec.h"

#define REPETITIONS 5
#define DATA_BYTES (32 * MIB)

static const char *const names[GMEM_ALGORITHM_COUNT] = { "zstd", "lz4" };
static const struct gmem_driver_ops *ops;
static uint8_t *memory, *got;

static void fill(bool noise)
{
	uint64_t x = 88172645463325252ull, *words = (uint64_t *)memory;

	for (size_t i = 0; i < DATA_BYTES / 8; i++) {
		x ^= x << 13;
		x ^= x >> 7;
		x ^= x << 17;
		words[i] = noise ? x : x >> 32; /* four random bytes of eight */
	}
}

static struct gmem_device *attach(const char *algorithm)
{
	const char *keys[] = { "algorithm", "capacity" }, *values[] = { algorithm, "128M" };
	char message[GMEM_MESSAGE_MAX];
	struct gmem_driver_config config = { .name = "z", .keys = keys, .values = values, .count = 2, .message = message,
					     .key_count = DATA_BYTES / 4096 };
	struct gmem_device *device;

	return ops->probe(&config, &device) ? NULL : device;
}

static double mb_per_s(uint64_t start)
{
	return (double)DATA_BYTES * 1e3 / (double)(now_ns() - start);
}

static double store(struct gmem_device *device, uint64_t page_bytes)
{
	uint64_t start = now_ns();

	for (uint64_t at = 0; at < DATA_BYTES; at += page_bytes)
		CHECK_EQ(ops->peer_map(device, at / page_bytes, memory + at, page_bytes), 0);
	return mb_per_s(start);
}

static double load(struct gmem_device *device, uint64_t page_bytes)
{
	uint64_t start = now_ns();

	for (uint64_t at = 0; at < DATA_BYTES; at += page_bytes)
		CHECK_EQ(ops->peer_unmap(device, at / page_bytes, got + at, page_bytes), 0);
	return mb_per_s(start);
}

/* The library, with what it makes of the pages: how many bytes that is in all, and how fast each way is. */
static uint64_t alone(struct gmem_codec *codec, uint64_t page_bytes, double *ret_pack, double *ret_unpack)
{
	struct gmem_codec_worker *worker;
	uint64_t packed_bytes = 0, pack_ns = 0, unpack_ns = 0;

	CHECK_EQ(gmem_codec_take(codec, &worker), 0);
	for (uint64_t at = 0; at < DATA_BYTES; at += page_bytes) {
		uint64_t start, middle;
		size_t packed;

		memcpy(worker->page, memory + at, page_bytes);
		start = now_ns();
		packed = gmem_codec_pack(codec, worker, page_bytes, page_bytes);
		middle = now_ns();
		CHECK(packed);
		CHECK_EQ(gmem_codec_unpack(codec, worker, packed, page_bytes), 0);
		unpack_ns += now_ns() - middle;
		pack_ns += middle - start;
		packed_bytes += packed;
	}
	gmem_codec_give(codec, worker);
	*ret_pack = (double)DATA_BYTES * 1e3 / (double)pack_ns;
	*ret_unpack = (double)DATA_BYTES * 1e3 / (double)unpack_ns;
	return packed_bytes;
}

static void row(const char *algorithm, const char *what, const char *size, const char *unit, const char *target,
		const char *floor_is, const struct pairs *pairs)
{
	char id[64];

	snprintf(id, sizeof(id), "%s_%s_%s", algorithm, what, size);
	row_print(&(struct row){ id, unit, target, floor_is }, pairs->count ? pairs : NULL,
		  pairs->count ? NULL : "its library can't be had");
}

static void packed_rows(enum gmem_algorithm algorithm, const struct size *size)
{
	struct gmem_device *device = attach(names[algorithm]);
	struct pairs stores = { 0 }, loads = { 0 }, held = { 0 };
	struct gmem_codec *codec = NULL;
	char message[GMEM_MESSAGE_MAX];

	fill(false);
	if (device)
		CHECK_EQ(gmem_codec_create(algorithm, 1, NULL, message, &codec), 0);
	for (int r = 0; device && r < REPETITIONS; r++) {
		double pack, unpack;
		uint64_t packed = alone(codec, size->page_bytes, &pack, &unpack);
		struct gmem_device_usage usage;

		pairs_add(&stores, store(device, size->page_bytes), pack);
		pairs_add(&loads, load(device, size->page_bytes), unpack);
		CHECK(!memcmp(memory, got, DATA_BYTES));
		CHECK_EQ(ops->peer_usage(device, &usage), 0);
		pairs_add(&held, (double)usage.stored_bytes / DATA_BYTES, (double)packed / DATA_BYTES);
	}
	row(names[algorithm], "store", size->name, "MB/s", "ratio >= 0.7", "the library alone", &stores);
	row(names[algorithm], "load", size->name, "MB/s", "ratio >= 0.7", "the library alone", &loads);
	row(names[algorithm], "held", size->name, "B/B", "ratio <= 1.15", "what the library makes of it", &held);
	if (device) {
		gmem_codec_destroy(codec);
		ops->remove(device);
	}
}

static void raw_rows(enum gmem_algorithm algorithm, const struct size *size)
{
	struct gmem_device *device = attach(names[algorithm]);
	struct pairs stores = { 0 }, loads = { 0 };

	fill(true);
	for (int r = 0; device && r < REPETITIONS; r++) {
		double put = store(device, size->page_bytes), taken = load(device, size->page_bytes);
		uint64_t start = now_ns();

		CHECK(!memcmp(memory, got, DATA_BYTES));
		start = now_ns();
		memcpy(got, memory, DATA_BYTES);
		pairs_add(&stores, put, mb_per_s(start));
		pairs_add(&loads, taken, mb_per_s(start));
	}
	row(names[algorithm], "raw_store", size->name, "MB/s", NULL, "memcpy", &stores);
	row(names[algorithm], "raw_load", size->name, "MB/s", NULL, "memcpy", &loads);
	if (device)
		ops->remove(device);
}

void compressed_tier(void)
{
	static const struct size sizes[] = SIZES;

	ops = gmem_driver_builtin("zstd");
	memory = mmap(NULL, 2 * DATA_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	CHECK(memory != MAP_FAILED);
	got = memory + DATA_BYTES;
	for (int algorithm = 0; algorithm < GMEM_ALGORITHM_COUNT; algorithm++)
		for (size_t s = 0; row_wanted(names[algorithm]) && s < sizeof(sizes) / sizeof(sizes[0]); s++) {
			packed_rows((enum gmem_algorithm)algorithm, &sizes[s]);
			raw_rows((enum gmem_algorithm)algorithm, &sizes[s]);
		}
}
