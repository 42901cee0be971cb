/* SPDX-License-Identifier: Apache-2.0
 *
 * zstd: compressed RAM. A page is, in the index, one repeated word (zeros above all); else it is in a slab: compressed,
 * or as it is if that saves less than an eighth.
 *
 * Pages are copied in and out of a worker's buffers, never compressed or decompressed in place: the memory at the other
 * end may be a client's, who can change it while it is read (so that what is checked would not be what is stored) or
 * punch it (SIGBUS, which gmem_copy() turns into an error, inside of a library that does not expect it). It costs 2 to 4
 * percent of a compression.
 *
 * No lock is held while a page is compressed or decompressed, and none for longer than a few loads and stores, but for
 * the kernel's own on a file that is written to.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <gmem/driver.h>
#include <gmem/memfd.h>

#include "codec.h"
#include "crc32c.h"
#include "entries.h"
#include "slab.h"

#define CAPACITY_MIN (4ull << 20)
#define CAPACITY_MAX (8ull << 40)
#define LEVEL_MAX 19
#define FAST_MAX 100
#define RATIO_MAX 32
#define SQUEEZES_MAX 256 /* for one page: 2 MiB and more */
#define CHUNK_BYTES 65536u

/* An entry's word: kind 0..2, page size 3..4, place from 5 on. Its check: checksum 0..31, stored bytes 32..63; or the
 * word that the page repeats. */
enum kind { NOTHING = 0, WORD, RAW, PACKED_ZSTD, PACKED_LZ4 };

struct gmem_device {
	struct gmem_quota quota;
	struct gmem_slabs *slabs;          /* (C) */
	struct gmem_entries *entries;          /* (C) */
	struct gmem_codec *codec;          /* (C) */
	enum kind packed;                  /* (C) */
	uint64_t key_count, ratio, bytes_per_s, latency_ns; /* (C) */
	_Atomic uint64_t pages, page_bytes, raw_pages;      /* (A) */
	_Atomic(const char *) error;                        /* (A) a literal */
};

static uint64_t make_word(enum kind kind, unsigned size, gmem_place_t place)
{
	return kind | (uint64_t)size << 3 | place << 5;
}

static enum kind kind_of(uint64_t word)
{
	return (enum kind)(word & 7);
}

static uint64_t page_bytes_of(uint64_t word)
{
	static const uint64_t bytes[4] = { 1 << GMEM_SHIFT_4K, 1 << GMEM_SHIFT_64K, 1 << GMEM_SHIFT_2M };

	return bytes[word >> 3 & 3];
}

static gmem_place_t place_of(uint64_t word)
{
	return word >> 5;
}

static int check_page(struct gmem_device *tier, uint64_t key, size_t bytes, unsigned *ret_size)
{
	for (unsigned size = 0; size < 3; size++)
		if (key < tier->key_count && bytes == page_bytes_of((uint64_t)size << 3)) {
			*ret_size = size;
			return 0;
		}
	return -EINVAL;
}

/* Of the key as well: an entry can't be taken for another page's. */
static uint32_t checksum_begin(uint64_t key)
{
	return gmem_crc32c(0, &key, sizeof(key));
}

static void count(struct gmem_device *tier, uint64_t word, uint64_t sign)
{
	atomic_fetch_add_explicit(&tier->pages, sign, memory_order_relaxed);
	atomic_fetch_add_explicit(&tier->page_bytes, sign * page_bytes_of(word), memory_order_relaxed);
	if (kind_of(word) == RAW)
		atomic_fetch_add_explicit(&tier->raw_pages, sign, memory_order_relaxed);
}

/* A word that has left the index. */
static void dispose(struct gmem_device *tier, uint64_t word)
{
	if (!word)
		return;
	if (kind_of(word) != WORD)
		gmem_slabs_free(tier->slabs, place_of(word));
	count(tier, word, -1ull);
}

static int damaged(struct gmem_device *tier)
{
	atomic_store(&tier->error, "a stored page is damaged: its checksum differs");
	return -EBADMSG;
}

/* ---- push ---- */

/* The slot of a slab that is being emptied: its content goes to another, and the index follows if nothing has changed. */
static void move_slot(void *arg, uint64_t key, gmem_place_t place)
{
	struct gmem_device *tier = arg;
	uint64_t word = key < tier->key_count ? gmem_entries_get(tier->entries, key).word : 0;
	gmem_place_t to;

	if (kind_of(word) < PACKED_ZSTD || place_of(word) != place || gmem_slabs_copy(tier->slabs, place, &to))
		return;
	gmem_slabs_free(tier->slabs, gmem_entries_move(tier->entries, key, word, (word & 31) | to << 5) ? place : to);
}

static int reserve(struct gmem_device *tier, uint64_t key, uint64_t bytes, gmem_place_t *ret)
{
	int err = gmem_entries_reserve(tier->entries, key);

	if (err || !bytes)
		return err;
	err = gmem_slabs_alloc(tier->slabs, bytes, ret);
	if (err)
		gmem_entries_release(tier->entries, key);
	return err;
}

/* Room for an entry, and for its bytes if there are any. */
static int make_room(struct gmem_device *tier, uint64_t key, uint64_t bytes, gmem_place_t *ret)
{
	int err = reserve(tier, key, bytes, ret);

	for (int i = 0; err == -ENOSPC && i < SQUEEZES_MAX && !gmem_slabs_squeeze(tier->slabs, move_slot, tier); i++)
		err = reserve(tier, key, bytes, ret);
	return err;
}

/* Whether the page repeats its first word. */
static bool is_word(const uint8_t *page, size_t bytes)
{
	return !memcmp(page, page + 8, bytes - 8);
}

static int store_word(struct gmem_device *tier, const uint8_t *page, uint64_t key, unsigned size)
{
	struct gmem_entry entry = { .word = make_word(WORD, size, 0) };
	int err = make_room(tier, key, 0, NULL);

	if (err)
		return err;
	memcpy(&entry.check, page, sizeof(entry.check));
	count(tier, entry.word, 1);
	dispose(tier, gmem_entries_put(tier->entries, key, entry));
	return 0;
}

static int store_bytes(struct gmem_device *tier, struct gmem_codec_worker *worker, uint64_t key, size_t bytes,
		       unsigned size)
{
	/* What saves less than an eighth is not worth its decompression. The slot is no larger than this and its header. */
	size_t most = bytes - bytes / 8 - GMEM_SLOT_HEADER, packed = gmem_codec_pack(tier->codec, worker, bytes, most);
	uint8_t *from = packed ? worker->packed : worker->page; /* whole frames: no header is written before them */
	size_t stored = packed ? packed : bytes;
	struct gmem_entry entry;
	gmem_place_t place;
	int err = make_room(tier, key, stored, &place);

	if (err)
		return err;
	entry.word = make_word(packed ? tier->packed : RAW, size, place);
	entry.check = gmem_crc32c(checksum_begin(key), from, stored) | (uint64_t)stored << 32;
	err = gmem_slabs_write(tier->slabs, place, key, from, stored);
	if (err) {
		gmem_slabs_free(tier->slabs, place);
		gmem_entries_release(tier->entries, key);
		return err;
	}
	count(tier, entry.word, 1);
	dispose(tier, gmem_entries_put(tier->entries, key, entry));
	return 0;
}

static int store(struct gmem_device *tier, struct gmem_codec_worker *worker, uint64_t key, const void *src, size_t bytes)
{
	unsigned size;
	int err = check_page(tier, key, bytes, &size);

	if (!err)
		err = gmem_copy(worker->page, src, bytes);
	if (err)
		return err;
	return is_word(worker->page, bytes) ? store_word(tier, worker->page, key, size) :
					      store_bytes(tier, worker, key, bytes, size);
}

/* ---- pull ---- */

static int load_word(struct gmem_codec_worker *worker, uint64_t word, uint8_t *dst, size_t bytes)
{
	size_t chunk = bytes < CHUNK_BYTES ? bytes : CHUNK_BYTES;
	int err = 0;

	for (size_t at = 0; at < chunk; at += sizeof(word))
		memcpy(worker->page + at, &word, sizeof(word));
	for (size_t at = 0; !err && at < bytes; at += chunk)
		err = gmem_copy(dst + at, worker->page, chunk);
	return err;
}

static int load_raw(struct gmem_device *tier, struct gmem_codec_worker *worker, uint64_t key, struct gmem_entry entry,
		    uint8_t *dst, size_t bytes)
{
	size_t chunk = bytes < CHUNK_BYTES ? bytes : CHUNK_BYTES; /* stays in the cache from file to page */
	uint32_t crc = checksum_begin(key);
	int err = 0;

	for (size_t at = 0; !err && at < bytes; at += chunk) {
		err = gmem_slabs_read(tier->slabs, place_of(entry.word), at, worker->page, chunk);
		if (err)
			break;
		crc = gmem_crc32c(crc, worker->page, chunk);
		err = gmem_copy(dst + at, worker->page, chunk);
	}
	return err ? err : crc == (uint32_t)entry.check ? 0 : -EBADMSG;
}

static int load_packed(struct gmem_device *tier, struct gmem_codec_worker *worker, uint64_t key,
		       struct gmem_entry entry, uint8_t *dst, size_t bytes)
{
	size_t stored = (size_t)(entry.check >> 32);
	int err;

	if (kind_of(entry.word) != tier->packed || stored > bytes)
		return -EBADMSG;
	err = gmem_slabs_read(tier->slabs, place_of(entry.word), 0, worker->packed, stored);
	if (!err && gmem_crc32c(checksum_begin(key), worker->packed, stored) != (uint32_t)entry.check)
		err = -EBADMSG;
	if (!err)
		err = gmem_codec_unpack(tier->codec, worker, stored, bytes);
	return err ? err : gmem_copy(dst, worker->page, bytes);
}

static int load_entry(struct gmem_device *tier, struct gmem_codec_worker *worker, uint64_t key,
		      struct gmem_entry entry, uint8_t *dst, size_t bytes)
{
	if (!entry.word)
		return -EIO; /* what the core believes to be here is lost */
	if (page_bytes_of(entry.word) != bytes)
		return -EINVAL;
	if (kind_of(entry.word) == WORD)
		return load_word(worker, entry.check, dst, bytes);
	if (kind_of(entry.word) == RAW)
		return load_raw(tier, worker, key, entry, dst, bytes);
	return load_packed(tier, worker, key, entry, dst, bytes);
}

static int load(struct gmem_device *tier, struct gmem_codec_worker *worker, uint64_t key, void *dst, size_t bytes)
{
	struct gmem_entry entry, again;
	unsigned size;
	int err = check_page(tier, key, bytes, &size);

	if (err)
		return err;
	entry = gmem_entries_get(tier->entries, key);
	for (;;) {
		err = load_entry(tier, worker, key, entry, dst, bytes);
		if (err != -EBADMSG)
			return err;
		again = gmem_entries_get(tier->entries, key);
		if (again.word == entry.word)
			return damaged(tier);
		entry = again; /* its slab was squeezed meanwhile */
	}
}

/* ---- ops ---- */

static int zstd_map_batch(struct gmem_device *tier, struct gmem_peer_io *io, size_t count)
{
	struct gmem_codec_worker *worker;
	int err = gmem_codec_take(tier->codec, &worker);

	if (err)
		return err;
	for (size_t i = 0; i < count; i++)
		io[i].result = store(tier, worker, io[i].key, io[i].memory, io[i].bytes);
	gmem_codec_give(tier->codec, worker);
	return 0;
}

static int zstd_unmap_batch(struct gmem_device *tier, struct gmem_peer_io *io, size_t count)
{
	struct gmem_codec_worker *worker;
	int err = gmem_codec_take(tier->codec, &worker);

	if (err)
		return err;
	for (size_t i = 0; i < count; i++)
		io[i].result = load(tier, worker, io[i].key, io[i].memory, io[i].bytes);
	gmem_codec_give(tier->codec, worker);
	return 0;
}

static int zstd_map(struct gmem_device *tier, uint64_t key, const void *src, size_t bytes)
{
	struct gmem_codec_worker *worker;
	int err = gmem_codec_take(tier->codec, &worker);

	if (err)
		return err;
	err = store(tier, worker, key, src, bytes);
	gmem_codec_give(tier->codec, worker);
	return err;
}

static int zstd_unmap(struct gmem_device *tier, uint64_t key, void *dst, size_t bytes)
{
	struct gmem_codec_worker *worker;
	int err = gmem_codec_take(tier->codec, &worker);

	if (err)
		return err;
	err = load(tier, worker, key, dst, bytes);
	gmem_codec_give(tier->codec, worker);
	return err;
}

static int zstd_free(struct gmem_device *tier, uint64_t key, size_t bytes)
{
	(void)bytes;
	if (key >= tier->key_count)
		return -EINVAL;
	dispose(tier, gmem_entries_take(tier->entries, key));
	return 0;
}

static int zstd_usage(struct gmem_device *tier, struct gmem_device_usage *ret)
{
	*ret = (struct gmem_device_usage){
		.pages = atomic_load(&tier->pages), .page_bytes = atomic_load(&tier->page_bytes),
		.stored_bytes = atomic_load(&tier->quota.used), .raw_pages = atomic_load(&tier->raw_pages),
	};
	return 0;
}

/* Whatever pages contain, they take no more than their size and 16 bytes each in the index, and what slabs that are not
 * full waste. So the index is counted as dense: in a region that is committed as a whole, it is. */
static uint64_t assured_bytes(const struct gmem_device *tier)
{
	uint64_t slack = gmem_slabs_slack_max() + 3 * GMEM_FRAME_BYTES;

	return (tier->quota.limit - slack) / 257 * 256 / GMEM_FRAME_BYTES * GMEM_FRAME_BYTES;
}

static int zstd_info(struct gmem_device *tier, struct gmem_device_info *ret)
{
	*ret = (struct gmem_device_info){
		.capacity_bytes = tier->quota.limit * tier->ratio, .assured_bytes = assured_bytes(tier),
		.page_bytes_mask = 1ull << GMEM_SHIFT_4K | 1ull << GMEM_SHIFT_64K | 1ull << GMEM_SHIFT_2M,
		.caps = GMEM_CAP_PEER,
		.bandwidth_bytes_per_s = tier->bytes_per_s, .latency_ns = tier->latency_ns,
	};
	return 0;
}

static int zstd_health(struct gmem_device *tier)
{
	(void)tier; /* memory does not go away */
	return 0;
}

static const char *zstd_last_error(struct gmem_device *tier)
{
	return atomic_load(&tier->error);
}

static void zstd_remove(struct gmem_device *tier)
{
	if (tier->entries)
		gmem_entries_destroy(tier->entries);
	if (tier->slabs)
		gmem_slabs_destroy(tier->slabs);
	if (tier->codec)
		gmem_codec_destroy(tier->codec);
	free(tier);
}

/* ---- probe ---- */

struct options {
	uint64_t capacity, level, fast, ratio;
	const char *algorithm;
};

#define UNSET UINT64_MAX

static int refuse_bounds(const struct gmem_driver_config *config, const char *key, const char *bounds)
{
	snprintf(config->message, GMEM_MESSAGE_MAX, "%s: must be %s", key, bounds);
	return -EINVAL;
}

static int read_options(const struct gmem_driver_config *config, struct options *ret)
{
	const struct gmem_driver_option options[] = {
		{ "capacity", &ret->capacity, false, NULL }, { "level", &ret->level, false, NULL },
		{ "fast", &ret->fast, false, NULL },         { "ratio", &ret->ratio, false, NULL },
		{ "algorithm", NULL, false, &ret->algorithm },
	};
	int err = gmem_driver_options(config, options, sizeof(options) / sizeof(options[0]));
	bool lz4 = !strcmp(ret->algorithm, "lz4");

	if (err)
		return err;
	if (!lz4 && strcmp(ret->algorithm, "zstd"))
		return refuse_bounds(config, "algorithm", "zstd or lz4");
	if (ret->capacity < CAPACITY_MIN || ret->capacity > CAPACITY_MAX)
		return refuse_bounds(config, "capacity", "4M to 8T");
	if (ret->ratio < 1 || ret->ratio > RATIO_MAX)
		return refuse_bounds(config, "ratio", "1 to 32");
	if (ret->level != UNSET && (lz4 || ret->level < 1 || ret->level > LEVEL_MAX))
		return refuse_bounds(config, "level", lz4 ? "left out: lz4 has none" : "1 to 19");
	if (ret->fast != UNSET && (lz4 || ret->level != UNSET || ret->fast < 1 || ret->fast > FAST_MAX))
		return refuse_bounds(config, "fast", lz4 || ret->level != UNSET ?
				     "left out with lz4 or a level: it is zstd's level -fast" : "1 to 100");
	return 0;
}

/* Everything that the entries say is stored is; the rest of the slabs is free. */
static int count_stored(struct gmem_device *tier)
{
	uint64_t key = 0;
	int err = 0;

	for (; !err && !gmem_entries_next(tier->entries, &key); key++) {
		uint64_t word = gmem_entries_get(tier->entries, key).word;

		if (kind_of(word) == RAW || kind_of(word) == PACKED_ZSTD || kind_of(word) == PACKED_LZ4)
			err = gmem_slabs_take(tier->slabs, place_of(word));
		else if (kind_of(word) != WORD)
			err = -EPROTO;
		count(tier, word, 1);
	}
	gmem_slabs_settle(tier->slabs);
	return err;
}

/* New, or what a predecessor has left. */
static int open_memory(const struct gmem_driver_config *config, struct gmem_device *tier)
{
	int slabs = gmem_driver_kept_fd(config, "slabs"), entries = gmem_driver_kept_fd(config, "entries"), err;
	bool kept = slabs >= 0 && entries >= 0;

	err = gmem_slabs_create("gmem-zstd-slabs", &tier->quota, slabs, &tier->slabs);
	if (!err)
		err = gmem_entries_create("gmem-zstd-entries", config->key_count, &tier->quota, entries, &tier->entries);
	if (!err && kept)
		err = count_stored(tier);
	if (!err && !kept)
		err = gmem_driver_keep_fd(config, "slabs", gmem_slabs_fd(tier->slabs));
	if (!err && !kept)
		err = gmem_driver_keep_fd(config, "entries", gmem_entries_fd(tier->entries));
	if (err)
		snprintf(config->message, GMEM_MESSAGE_MAX, "%s: %s", kept ? "what was left can't be taken over" : "memory",
			 strerror(-err));
	return err;
}

static int open_tier(const struct gmem_driver_config *config, const struct options *options, struct gmem_device *tier)
{
	bool lz4 = !strcmp(options->algorithm, "lz4");
	int level = options->fast != UNSET ? -(int)options->fast : options->level != UNSET ? (int)options->level : 1;
	int err = gmem_copy_guard_init();

	tier->quota.limit = options->capacity;
	tier->ratio = options->ratio;
	tier->key_count = config->key_count;
	tier->packed = lz4 ? PACKED_LZ4 : PACKED_ZSTD;
	atomic_init(&tier->error, "");
	if (!err)
		err = gmem_codec_create(lz4 ? GMEM_ALGORITHM_LZ4 : GMEM_ALGORITHM_ZSTD, level, NULL, config->message,
					&tier->codec);
	if (!err)
		err = gmem_codec_measure(tier->codec, &tier->bytes_per_s, &tier->latency_ns);
	return err ? err : open_memory(config, tier);
}

static int zstd_probe(const struct gmem_driver_config *config, struct gmem_device **ret)
{
	struct options options = { .capacity = 1ull << 30, .level = UNSET, .fast = UNSET, .ratio = 4, .algorithm = "zstd" };
	struct gmem_device *tier;
	int err = read_options(config, &options);

	if (err)
		return err;
	tier = calloc(1, sizeof(*tier));
	if (!tier)
		return -ENOMEM;
	err = open_tier(config, &options, tier);
	if (err)
		zstd_remove(tier);
	else
		*ret = tier;
	return err;
}

const struct gmem_driver_ops gmem_zstd_ops = {
	.abi = GMEM_DRIVER_ABI, .size = sizeof(struct gmem_driver_ops), .name = "zstd",
	.probe = zstd_probe, .remove = zstd_remove, .info = zstd_info, .health = zstd_health,
	.last_error = zstd_last_error, .peer_map = zstd_map, .peer_unmap = zstd_unmap, .peer_free = zstd_free,
	.peer_map_batch = zstd_map_batch, .peer_unmap_batch = zstd_unmap_batch, .peer_usage = zstd_usage,
};
