/* SPDX-License-Identifier: Apache-2.0
 *
 * The file tier: its parts by themselves, then the driver through its ops with each engine, against an oracle: what it
 * keeps, what it refuses, and what it says when the file is damaged, full, cut short or failing.
 */
#define _GNU_SOURCE
#include "harness.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../../csrc/drivers/crc32c.h"
#include "../../csrc/drivers/store.h"
#include "tierops.h"

#define KEYS 4096
#define BATCH 64

static const char *engine; /* of the run */
static char folder[64];
static bool hugepages;

/* ---- helpers ---- */

static char *in_folder(const char *name)
{
	static char path[8][128];
	static int next;
	char *at = path[next++ % 8];

	snprintf(at, sizeof(path[0]), "%s/%s", folder, name);
	return at;
}

static const char *with_engine(const char *options)
{
	static _Thread_local char text[300];

	snprintf(text, sizeof(text), "%s%s%s", options, strstr(options, "engine=") ? "" : " engine=",
		 strstr(options, "engine=") ? "" : engine);
	return text;
}

/* options: "path=... capacity=8M"; an engine is added. */
static int attach(const char *options, struct gmem_device **ret)
{
	return tier_attach(with_engine(options), KEYS, NULL, ret);
}

static struct gmem_device *attached(const char *path, const char *options)
{
	char text[256];

	snprintf(text, sizeof(text), "path=%s %s", path, options);
	return tier_attached(with_engine(text), KEYS, NULL);
}

static void refused(const char *options, int err, const char *why)
{
	tier_refused(with_engine(options), KEYS, err, why);
}

/* The store is the device's first member; tests look where a page lies. */
static struct gmem_store *store_of(struct gmem_device *device)
{
	return (struct gmem_store *)(void *)device;
}

static uint64_t offset_of(struct gmem_device *device, uint64_t key)
{
	uint32_t crc;

	return gmem_place_offset(gmem_index_get(&store_of(device)->index, key, &crc));
}

static uint8_t *pages_memory(size_t bytes)
{
	uint8_t *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	CHECK(at != MAP_FAILED);
	return at;
}

static uint8_t *one_page;

/* By a batch, for a page alone is not sent through the ring; the hammer does both. */
static int one(struct gmem_device *device, uint64_t key, size_t bytes, bool write)
{
	struct gmem_peer_io io[] = { { key, one_page, bytes, 99 }, { KEYS, one_page, bytes, 99 } };

	CHECK_EQ((write ? tier_ops->peer_map_batch : tier_ops->peer_unmap_batch)(device, io, 2), 0);
	CHECK_EQ(io[1].result, -EINVAL);
	return io[0].result;
}

static int push(struct gmem_device *device, uint64_t key, size_t bytes, uint64_t version)
{
	tier_fill(one_page, bytes, key, version);
	return one(device, key, bytes, true);
}

/* 0 and the right content, or the error. */
static int pull(struct gmem_device *device, uint64_t key, size_t bytes, uint64_t version)
{
	int err;

	memset(one_page, 0xaa, bytes);
	err = one(device, key, bytes, false);
	if (!err)
		CHECK(tier_is_filled(one_page, bytes, key, version));
	return err;
}

static void write_file(const char *path, const void *data, size_t bytes, off_t at)
{
	int fd = open(path, O_RDWR | O_CREAT, 0600);

	CHECK(fd >= 0);
	CHECK_EQ(pwrite(fd, data, bytes, at), (ssize_t)bytes);
	CHECK(!fsync(fd));
	close(fd);
}

static void read_file(const char *path, void *data, size_t bytes, off_t at)
{
	int fd = open(path, O_RDONLY);

	CHECK(fd >= 0);
	CHECK_EQ(pread(fd, data, bytes, at), (ssize_t)bytes);
	close(fd);
}

/* ---- parts ---- */

static void test_crc32c(void)
{
	static uint8_t data[300000]; /* blocks are of 65280 bytes */

	CHECK_EQ(gmem_crc32c(0, "123456789", 9), 0xe3069283u); /* RFC 3720 has more of them */
	CHECK_EQ(gmem_crc32c_tables(0, "123456789", 9), 0xe3069283u);
	CHECK_EQ(gmem_crc32c(0, data, 32), 0x8a9136aau);
	tier_fill(data, sizeof(data), 1, 1);
	for (size_t bytes = 0; bytes < sizeof(data) - 8; bytes += bytes < 100 ? 1 : bytes < 20000 ? 1361 : 9973) {
		uint32_t crc = gmem_crc32c(0, data + bytes % 8, bytes);

		CHECK_EQ(gmem_crc32c_tables(0, data + bytes % 8, bytes), crc);
		CHECK_EQ(gmem_crc32c(gmem_crc32c(0, data + bytes % 8, bytes / 3), data + bytes % 8 + bytes / 3,
				     bytes - bytes / 3), crc);
	}
}

/* Random sizes against a map of who owns which 4 KiB; a size is refused only if no aligned place is free of others. */
static void test_slots(void)
{
	enum { CHUNKS = 6, PAGES = CHUNKS * 512, HELD = 2000 };
	static const uint32_t sizes[] = { KIB4, KIB4, KIB4, KIB64, KIB64, MIB2 };
	static uint8_t owned[PAGES];
	static struct { uint64_t at; uint32_t bytes; } held[HELD];
	struct gmem_slots slots;
	uint64_t used = 0;

	srand(7);
	CHECK_EQ(gmem_slots_init(&slots, KIB4), -EINVAL);
	CHECK_EQ(gmem_slots_init(&slots, CHUNKS * MIB2), 0);
	for (int round = 0; round < 300000; round++) {
		int i = rand() % (round / 50000 % 2 ? HELD : HELD / 20); /* nearly empty, and nearly full */
		uint32_t bytes = sizes[rand() % 6];

		if (held[i].bytes) {
			gmem_slots_free(&slots, held[i].at, held[i].bytes);
			memset(owned + held[i].at / KIB4, 0, held[i].bytes / KIB4);
			used -= held[i].bytes;
			held[i].bytes = 0;
		} else if (!gmem_slots_alloc(&slots, bytes, &held[i].at)) {
			CHECK(held[i].at % bytes == 0 && held[i].at + bytes <= CHUNKS * MIB2);
			for (uint64_t p = held[i].at / KIB4; p < (held[i].at + bytes) / KIB4; p++)
				CHECK_EQ(owned[p]++, 0);
			held[i].bytes = bytes;
			used += bytes;
		} else {
			for (uint64_t at = 0; at < PAGES; at += bytes / KIB4) /* nothing that fits is free */
				CHECK(memchr(owned + at, 1, bytes / KIB4));
		}
		CHECK_EQ(gmem_slots_used(&slots), used);
	}
	for (int i = 0; i < HELD; i++)
		if (held[i].bytes)
			gmem_slots_free(&slots, held[i].at, held[i].bytes);
	for (int i = 0; i < CHUNKS; i++) /* all chunks are empty again */
		CHECK_EQ(gmem_slots_alloc(&slots, MIB2, &held[i].at), 0);
	CHECK_EQ(gmem_slots_alloc(&slots, KIB4, &held[6].at), -ENOSPC);
	gmem_slots_deinit(&slots);
}

static void test_index(void)
{
	struct gmem_index index;
	uint32_t crc = 0;
	uint64_t old;

	CHECK_EQ(gmem_index_init(&index, 1ull << 31, MIB2), 0); /* sparse */
	CHECK_EQ(index.header->magic, GMEM_INDEX_MAGIC);
	CHECK(!memcmp(index.header, "gemindex", 8));
	CHECK_EQ(index.header->version, 1);
	CHECK_EQ(gmem_index_get(&index, (1ull << 31) - 1, &crc), 0);
	for (uint32_t version = 1; version < 5; version++) {
		old = gmem_index_set(&index, 77, version * MIB2, KIB64, version);
		CHECK_EQ(gmem_place_offset(old), (version - 1) * MIB2);
		CHECK_EQ(gmem_place_bytes(old), version == 1 ? 0 : KIB64);
		CHECK_EQ(gmem_place_offset(gmem_index_get(&index, 77, &crc)), version * MIB2);
		CHECK_EQ(crc, version);
	}
	CHECK_EQ(gmem_place_bytes(gmem_index_clear(&index, 77)), KIB64);
	CHECK_EQ(gmem_index_clear(&index, 77), 0);
	gmem_index_deinit(&index);
}

/* ---- what is kept ---- */

static void test_round_trips(void)
{
	static const size_t sizes[] = { KIB4, KIB64, MIB2 };
	struct gmem_device *device = attached(folder, "capacity=16M");
	struct gmem_device_info info;

	CHECK_EQ(tier_ops->info(device, &info), 0);
	CHECK_EQ(info.capacity_bytes, 16 << 20);
	CHECK_EQ(info.caps, GMEM_CAP_PEER | GMEM_CAP_SLOW);
	CHECK(info.bandwidth_bytes_per_s > 1 << 20 && info.latency_ns > 100);
	for (uint64_t version = 1; version < 4; version++) /* replaced */
		for (int s = 0; s < 3; s++) {
			CHECK_EQ(push(device, 10 + s, sizes[s], version), 0);
			CHECK_EQ(pull(device, 10 + s, sizes[s], version), 0);
			CHECK_EQ(pull(device, 10 + s, sizes[s], version), 0); /* it stays */
		}
	CHECK_EQ(tier_usage(device).pages, 3);
	CHECK_EQ(tier_usage(device).page_bytes, KIB4 + KIB64 + MIB2);
	CHECK_EQ(tier_usage(device).stored_bytes, KIB4 + KIB64 + MIB2);
	CHECK_EQ(pull(device, 10, KIB64, 0), -EINVAL); /* another size */
	CHECK_EQ(pull(device, 10, 5000, 0), -EINVAL);
	CHECK_EQ(push(device, KEYS, KIB4, 0), -EINVAL);
	CHECK_EQ(push(device, 1, 8192, 0), -EINVAL);
	CHECK_EQ(pull(device, 1, KIB4, 0), -ENOENT);
	for (int s = 0; s < 3; s++) {
		CHECK_EQ(tier_ops->peer_free(device, 10 + s, sizes[s]), 0);
		CHECK_EQ(tier_ops->peer_free(device, 10 + s, sizes[s]), -ENOENT);
		CHECK_EQ(pull(device, 10 + s, sizes[s], 0), -ENOENT);
	}
	CHECK_EQ(tier_usage(device).stored_bytes, 0);
	for (int i = 0; i < 8; i++) /* all of the capacity again */
		CHECK_EQ(push(device, i, MIB2, 1), 0);
	CHECK_EQ(push(device, 99, KIB4, 1), -ENOSPC);
	CHECK_EQ(tier_ops->health(device), 0);
	tier_ops->remove(device);
}

static void test_batches(const char *options)
{
	static const size_t sizes[] = { KIB4, KIB64, KIB4, MIB2, KIB4 };
	struct gmem_device *device = attached(folder, options);
	struct gmem_peer_io io[BATCH];
	uint8_t *memory = pages_memory(BATCH * MIB2);

	for (uint64_t version = 1; version < 3; version++) {
		for (size_t i = 0; i < BATCH; i++) {
			io[i] = (struct gmem_peer_io){ i, memory + i * MIB2, sizes[i % 5], 99 };
			tier_fill(io[i].memory, io[i].bytes, i, version);
		}
		io[7].bytes = 12345;
		CHECK_EQ(tier_ops->peer_map_batch(device, io, BATCH), 0);
		for (size_t i = 0; i < BATCH; i++)
			CHECK_EQ(io[i].result, i == 7 ? -EINVAL : 0);
		memset(memory, 0, BATCH * MIB2);
		io[7].bytes = KIB4;
		CHECK_EQ(tier_ops->peer_unmap_batch(device, io, BATCH), 0);
		for (size_t i = 0; i < BATCH; i++) {
			CHECK_EQ(io[i].result, i == 7 ? -ENOENT : 0);
			CHECK(i == 7 || tier_is_filled(io[i].memory, io[i].bytes, i, version));
		}
	}
	CHECK_EQ(tier_ops->peer_map_batch(device, io, 0), 0);
	munmap(memory, BATCH * MIB2);
	tier_ops->remove(device);
}

static void test_full(void)
{
	struct gmem_device *device = attached(folder, "capacity=4M");
	struct gmem_peer_io io[BATCH];
	uint8_t *memory = pages_memory(BATCH * KIB64);
	int kept = 0;

	for (int i = 0; i < 1024; i++)
		CHECK_EQ(push(device, i, KIB4, 1), 0);
	CHECK_EQ(push(device, 2000, KIB4, 1), -ENOSPC);
	CHECK_EQ(push(device, 5, KIB4, 2), -ENOSPC); /* the new one has to be somewhere first */
	CHECK_EQ(pull(device, 5, KIB4, 1), 0);
	for (int i = 0; i < 1024; i += 2)
		CHECK_EQ(tier_ops->peer_free(device, i, KIB4), 0);
	CHECK_EQ(push(device, 2000, KIB64, 1), -ENOSPC); /* half is free, but nowhere 64 KiB */
	for (int i = 0; i < 1024; i += 2)
		CHECK_EQ(push(device, i, KIB4, 3), 0);
	for (int i = 0; i < 1024; i++)
		CHECK_EQ(pull(device, i, KIB4, i % 2 ? 1 : 3), 0);
	for (int i = 0; i < 1024; i++)
		if (offset_of(device, i) >= GMEM_SCRATCH_DATA + MIB2)
			CHECK_EQ(tier_ops->peer_free(device, i, KIB4), 0);
		else
			kept = i;
	for (size_t i = 0; i < BATCH; i++) { /* 2 MiB are free: 32 of 64 */
		io[i] = (struct gmem_peer_io){ 2000 + i, memory + i * KIB64, KIB64, 99 };
		tier_fill(io[i].memory, KIB64, 2000 + i, 1);
	}
	CHECK_EQ(tier_ops->peer_map_batch(device, io, BATCH), 0);
	for (size_t i = 0; i < BATCH; i++)
		CHECK_EQ(io[i].result, i < 32 ? 0 : -ENOSPC);
	CHECK_EQ(pull(device, 2031, KIB64, 1), 0);
	CHECK_EQ(pull(device, kept, KIB4, kept % 2 ? 1 : 3), 0);
	munmap(memory, BATCH * KIB64);
	tier_ops->remove(device);
}

/* ---- what goes wrong ---- */

static void test_damage(void)
{
	char *path = in_folder("damaged"), text[GMEM_MESSAGE_MAX];
	struct gmem_device *device = attached(path, "capacity=16M");
	static uint8_t a[KIB64], b[KIB64];

	for (int i = 0; i < 16; i++)
		CHECK_EQ(push(device, i, KIB64, 1), 0);
	CHECK_EQ(push(device, 100, MIB2, 1), 0);
	read_file(path, a, 1, (off_t)offset_of(device, 3) + 40000);
	a[0] ^= 1; /* one bit */
	write_file(path, a, 1, (off_t)offset_of(device, 3) + 40000);
	write_file(path, "x", 1, (off_t)offset_of(device, 100) + (off_t)MIB2 - 1);
	CHECK_EQ(pull(device, 3, KIB64, 1), -EBADMSG);
	CHECK(one_page[0] == 0xaa); /* nothing of it gets out */
	CHECK_EQ(pull(device, 100, MIB2, 1), -EBADMSG);
	snprintf(text, sizeof(text), "%s", tier_ops->last_error(device));
	CHECK(strstr(text, "damaged"));
	/* two pages in each other's place: each is whole, and not the one asked for */
	read_file(path, a, KIB64, (off_t)offset_of(device, 5));
	read_file(path, b, KIB64, (off_t)offset_of(device, 6));
	write_file(path, b, KIB64, (off_t)offset_of(device, 5));
	write_file(path, a, KIB64, (off_t)offset_of(device, 6));
	CHECK_EQ(pull(device, 5, KIB64, 1), -EBADMSG);
	CHECK_EQ(pull(device, 6, KIB64, 1), -EBADMSG);
	for (int i = 0; i < 16; i++)
		if (i != 3 && i != 5 && i != 6)
			CHECK_EQ(pull(device, i, KIB64, 1), 0);
	CHECK_EQ(push(device, 3, KIB64, 2), 0);
	CHECK_EQ(pull(device, 3, KIB64, 2), 0);
	CHECK_EQ(tier_ops->health(device), 0);
	tier_ops->remove(device);
	CHECK(access(path, F_OK)); /* made by it */
}

/* Equal content under two keys, and all that is known of one taken for the other's: only the key tells. */
static void test_misdirected_twin(void)
{
	struct gmem_device *device = attached(folder, "capacity=4M");
	struct gmem_index_entry *entries = store_of(device)->index.entries;

	memset(one_page, 1, KIB4);
	CHECK_EQ(tier_ops->peer_map(device, 1, one_page, KIB4), 0);
	CHECK_EQ(tier_ops->peer_map(device, 2, one_page, KIB4), 0);
	CHECK_EQ(tier_ops->peer_unmap(device, 1, one_page, KIB4), 0);
	entries[1].crc[1] = atomic_load(&entries[2].crc[1]);
	entries[1].place = atomic_exchange(&entries[2].place, atomic_load(&entries[1].place));
	CHECK_EQ(tier_ops->peer_unmap(device, 1, one_page, KIB4), -EBADMSG);
	CHECK_EQ(tier_ops->peer_unmap(device, 2, one_page, KIB4), 0); /* its own checksum, and equal content */
	tier_ops->remove(device);
}

static void test_cut_short(void)
{
	char *path = in_folder("short");
	struct gmem_device *device = attached(path, "capacity=8M");

	for (int i = 0; i < 8; i++)
		CHECK_EQ(push(device, i, KIB64, 1), 0);
	CHECK(!truncate(path, (off_t)offset_of(device, 4) + 8192));
	CHECK_EQ(pull(device, 4, KIB64, 1), -EIO);
	CHECK(strstr(tier_ops->last_error(device), "reading 65536 bytes"));
	CHECK_EQ(pull(device, 3, KIB64, 1), 0);
	CHECK_EQ(tier_ops->health(device), 0);
	for (int i = 0; i < GMEM_STORE_ERRORS_MAX; i++)
		CHECK_EQ(pull(device, 4, KIB64, 1), -EIO);
	CHECK_EQ(tier_ops->health(device), -EIO);
	CHECK_EQ(pull(device, 3, KIB64, 1), 0); /* it is back */
	CHECK_EQ(tier_ops->health(device), 0);
	tier_ops->remove(device);
}

static _Atomic int failing_writes, failing_reads; /* how many more */
static int fail_with;

static int inject(const struct gmem_aio_op *op)
{
	_Atomic int *left = op->write ? &failing_writes : &failing_reads;

	if (atomic_load(left) <= 0)
		return op->result;
	atomic_fetch_sub(left, 1);
	return -fail_with;
}

static void test_failing(void)
{
	struct gmem_device *device = attached(folder, "capacity=8M");
	uint64_t before;

	gmem_aio_fault = inject;
	fail_with = EIO;
	CHECK_EQ(push(device, 1, KIB64, 1), 0);
	before = offset_of(device, 1);
	failing_writes = 1; /* the slot is bad, another is not */
	CHECK_EQ(push(device, 2, KIB64, 1), 0);
	CHECK_EQ(pull(device, 2, KIB64, 1), 0);
	CHECK_EQ(tier_usage(device).stored_bytes, 3 * KIB64); /* one is never used again */
	failing_writes = 2;
	CHECK_EQ(push(device, 1, KIB64, 2), -EIO);
	CHECK_EQ(failing_writes, 0);
	CHECK_EQ(offset_of(device, 1), before);
	CHECK_EQ(pull(device, 1, KIB64, 1), 0); /* the old one */
	CHECK(strstr(tier_ops->last_error(device), "writing 65536 bytes"));
	CHECK(strstr(tier_ops->last_error(device), strerror(EIO)));
	CHECK_EQ(tier_usage(device).pages, 2);
	failing_reads = 1; /* a second try */
	CHECK_EQ(pull(device, 1, KIB64, 1), 0);
	failing_reads = 2;
	CHECK_EQ(pull(device, 1, KIB64, 1), -EIO);
	fail_with = ENOSPC;
	failing_writes = 1;
	before = tier_usage(device).stored_bytes;
	CHECK_EQ(push(device, 1, KIB64, 2), -ENOSPC);
	CHECK_EQ(tier_usage(device).stored_bytes, before);
	CHECK_EQ(pull(device, 1, KIB64, 1), 0);
	gmem_aio_fault = NULL;
	tier_ops->remove(device);
}

/* When nothing works any more it says so, keeps its slots, is not asked each time, and comes back. */
static void test_lost(void)
{
	struct gmem_device *device = attached(folder, "capacity=8M");
	uint64_t used;

	CHECK_EQ(push(device, 1, KIB4, 1), 0);
	gmem_aio_fault = inject;
	fail_with = EIO;
	failing_writes = 1000;
	for (int i = 0; i < GMEM_STORE_ERRORS_MAX / 2; i++) {
		CHECK_EQ(tier_ops->health(device), 0);
		CHECK_EQ(push(device, 2, KIB4, 1), -EIO);
	}
	CHECK_EQ(tier_ops->health(device), -EIO);
	used = tier_usage(device).stored_bytes;
	CHECK_EQ(push(device, 2, KIB4, 1), -EIO);
	for (int left = failing_writes, i = 0; i < 100; i++) {
		CHECK_EQ(push(device, 2, KIB4, 1), -EIO);
		CHECK(failing_writes >= left - 4);
	}
	CHECK_EQ(tier_usage(device).stored_bytes, used);
	failing_writes = 0;
	store_of(device)->tried_ns = 0; /* a second later */
	CHECK_EQ(push(device, 2, KIB4, 1), 0);
	CHECK_EQ(tier_ops->health(device), 0);
	CHECK_EQ(pull(device, 1, KIB4, 1), 0);
	CHECK_EQ(push(device, 3, KIB4, 1), 0);
	gmem_aio_fault = NULL;
	tier_ops->remove(device);
}

/* A client's memfd that it has cut short under us. */
__attribute__((unused)) static void test_memory_gone(void)
{
	struct gmem_device *device = attached(folder, "capacity=8M");
	int fd = memfd_create("t", 0);
	uint8_t *at;

	CHECK(!ftruncate(fd, KIB64));
	at = mmap(NULL, KIB64, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	CHECK_EQ(push(device, 1, KIB64, 1), 0);
	CHECK(!ftruncate(fd, 8192));
	CHECK_EQ(tier_ops->peer_map(device, 1, at, KIB64), -EFAULT);
	CHECK_EQ(tier_ops->peer_unmap(device, 1, at, KIB64), -EFAULT);
	CHECK_EQ(pull(device, 1, KIB64, 1), 0);
	CHECK_EQ(tier_usage(device).stored_bytes, KIB64);
	munmap(at, KIB64);
	close(fd);
	tier_ops->remove(device);
}

/* ---- full filesystems ---- */

static void fill_filesystem(struct gmem_device *device)
{
	uint64_t stored = 0, used;
	int err;

	while (!(err = push(device, stored, MIB2, 1)))
		CHECK(++stored < 8);
	CHECK_EQ(err, -ENOSPC);
	CHECK(stored >= 2);
	CHECK(strstr(tier_ops->last_error(device), "filesystem is full"));
	used = tier_usage(device).stored_bytes;
	CHECK_EQ(used, stored * MIB2);
	CHECK_EQ(push(device, 0, MIB2, 2), -ENOSPC);
	for (uint64_t i = 0; i < stored; i++)
		CHECK_EQ(pull(device, i, MIB2, 1), 0);
	CHECK_EQ(tier_ops->peer_free(device, 0, MIB2), 0);
	CHECK_EQ(push(device, 20, MIB2, 1), 0); /* where there had been one */
	CHECK_EQ(pull(device, 20, MIB2, 1), 0);
	CHECK_EQ(tier_ops->health(device), 0);
}

static void test_file_limit(void)
{
	struct rlimit old, limit;
	struct gmem_device *device = attached(folder, "capacity=16M preallocate=off");

	CHECK(!getrlimit(RLIMIT_FSIZE, &old));
	limit = old;
	limit.rlim_cur = 9 << 20;
	signal(SIGXFSZ, SIG_IGN);
	CHECK(!setrlimit(RLIMIT_FSIZE, &limit));
	fill_filesystem(device);
	CHECK(!setrlimit(RLIMIT_FSIZE, &old));
	tier_ops->remove(device);
}

static void test_tmpfs(void)
{
	char *small = in_folder("small"), text[160];
	struct gmem_device *device;

	CHECK(!mkdir(small, 0700));
	if (mount("tmpfs", small, "tmpfs", 0, "size=11M")) {
		printf("small tmpfs: not run, no permission\n");
		CHECK(!rmdir(small));
		return;
	}
	snprintf(text, sizeof(text), "path=%s capacity=16M", small);
	refused(text, -ENOSPC, "capacity: 16.0 MiB, but the filesystem has 1");
	snprintf(text, sizeof(text), "path=%s/new capacity=16M", small);
	refused(text, -ENOSPC, "MiB free");
	CHECK(access(in_folder("small/new"), F_OK)); /* nothing is left */
	device = attached(small, "capacity=16M preallocate=off");
	fill_filesystem(device);
	tier_ops->remove(device);
	device = attached(small, "capacity=8M");
	CHECK_EQ(push(device, 1, KIB64, 1), 0);
	CHECK_EQ(pull(device, 1, KIB64, 1), 0);
	tier_ops->remove(device);
	CHECK(!umount(small));
	CHECK(!rmdir(small));
}

/* Filesystems that refuse O_DIRECT: some do at open, all do where a file is sealed into memory, like a memfd. */
static void test_no_direct(void)
{
	struct gmem_device *device = attached(folder, "capacity=8M direct=off");

	CHECK(!store_of(device)->scratch.direct);
	CHECK_EQ(push(device, 1, KIB64, 1), 0);
	CHECK_EQ(pull(device, 1, KIB64, 1), 0);
	tier_ops->remove(device);
	device = attached("/dev/shm", "capacity=8M");
	CHECK_EQ(push(device, 1, KIB64, 1), 0);
	CHECK_EQ(pull(device, 1, KIB64, 1), 0);
	if (!store_of(device)->scratch.direct) {
		CHECK(strstr(tier_ops->last_error(device), "O_DIRECT"));
		refused("path=/dev/shm capacity=8M direct=on", -EINVAL, "direct: ");
	}
	tier_ops->remove(device);
}

/* ---- refusals ---- */

static void test_options(void)
{
	struct gmem_device *device;
	char text[256];
	int err;

	refused("capacity=8M", -EINVAL, "path: ");
	refused("path=relative capacity=8M", -EINVAL, "path: ");
	refused("path=/no/such/folder/x capacity=8M", -ENOENT, "path: /no/such/folder/x");
	refused("path=/dev/null capacity=8M", -EINVAL, "path: /dev/null is neither");
	snprintf(text, sizeof(text), "path=%s capacity=2097151", folder);
	refused(text, -EINVAL, "capacity: smaller than one chunk of 2 MiB");
	snprintf(text, sizeof(text), "path=%s capacity=0", folder);
	refused(text, -EINVAL, "capacity: ");
	snprintf(text, sizeof(text), "path=%s capacity=16000000T", folder);
	refused(text, -EINVAL, "capacity: ");
	snprintf(text, sizeof(text), "path=%s capacity=1000T", folder);
	err = attach(text, &device);
	CHECK((err == -EFBIG || err == -ENOSPC) && strstr(tier_message, "capacity: "));
	snprintf(text, sizeof(text), "path=%s capacity=lots", folder);
	refused(text, -EINVAL, "capacity: ");
	snprintf(text, sizeof(text), "path=%s depth=0", folder);
	refused(text, -EINVAL, "depth: ");
	snprintf(text, sizeof(text), "path=%s depth=1025", folder);
	refused(text, -EINVAL, "depth: ");
	snprintf(text, sizeof(text), "path=%s direct=perhaps", folder);
	refused(text, -EINVAL, "direct: ");
	snprintf(text, sizeof(text), "path=%s engine=steam", folder);
	refused(text, -EINVAL, "engine: ");
	snprintf(text, sizeof(text), "path=%s colour=red", folder);
	refused(text, -EINVAL, "colour: ");
}

static void test_paths(void)
{
	static const char foreign[] = "somebody's thesis\n";
	char *path = in_folder("thesis"), *given = in_folder("given"), text[256], read[64] = "";
	struct gmem_device *device, *second;
	struct stat st;

	write_file(path, foreign, sizeof(foreign), 0);
	snprintf(text, sizeof(text), "path=%s capacity=8M", path);
	refused(text, -EEXIST, "left alone");
	CHECK(!stat(path, &st) && st.st_size == sizeof(foreign));
	read_file(path, read, sizeof(foreign), 0);
	CHECK(!strcmp(read, foreign));
	/* one at a time */
	path = in_folder("pages");
	device = attached(path, "capacity=8M");
	CHECK(!stat(path, &st) && (st.st_mode & 0777) == 0600);
	CHECK(st.st_blocks * 512 >= 8 << 20); /* preallocated */
	snprintf(text, sizeof(text), "path=%s capacity=8M", path);
	refused(text, -EBUSY, "in use");
	second = attached(folder, "capacity=8M"); /* directories can be shared */
	tier_ops->remove(second);
	CHECK(!link(path, in_folder("left")));
	tier_ops->remove(device);
	CHECK(access(path, F_OK) && !access(in_folder("left"), F_OK));
	/* what a daemon left that was killed: taken, and gone afterwards */
	device = attached(in_folder("left"), "capacity=4M");
	CHECK_EQ(push(device, 1, KIB64, 1), 0);
	tier_ops->remove(device);
	CHECK(access(in_folder("left"), F_OK));
	/* a file that was given stays, and is taken again */
	write_file(given, "", 0, 0);
	for (int i = 0; i < 2; i++) {
		device = attached(given, "capacity=4M");
		CHECK_EQ(pull(device, 1, KIB64, 1), -ENOENT);
		CHECK_EQ(push(device, 1, KIB64, 1), 0);
		tier_ops->remove(device);
		CHECK(!access(given, F_OK));
	}
}

static void deny_io_uring(void)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 425 /* io_uring_setup */, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = { sizeof(code) / sizeof(code[0]), code };

	CHECK(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	CHECK(!prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program));
}

/* As in a container. */
static void test_uring_refused(void)
{
	int status;
	pid_t pid;

	fflush(stdout);
	pid = fork();
	if (!pid) {
		struct gmem_device *device;
		char text[160];

		deny_io_uring();
		snprintf(text, sizeof(text), "path=%s capacity=8M engine=io_uring", folder);
		CHECK(attach(text, &device) && strstr(tier_message, "engine: io_uring: "));
		device = attached(folder, "capacity=8M engine=auto");
		CHECK_EQ(gmem_aio_engine(store_of(device)->aio), GMEM_AIO_SYNC);
		CHECK_EQ(push(device, 1, KIB64, 1), 0);
		CHECK_EQ(pull(device, 1, KIB64, 1), 0);
		tier_ops->remove(device);
		_exit(0);
	}
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	CHECK_EQ(status, 0);
}

/* ---- many operations ---- */

#define THREADS 4
#define THREAD_KEYS 256

struct worker {
	struct gmem_device *device;
	pthread_t thread;
	uint64_t seed, base;
	uint64_t pushed, full;
	uint32_t version[THREAD_KEYS]; /* 0: not stored */
	uint32_t bytes[THREAD_KEYS];
};

static uint64_t draw(uint64_t *seed)
{
	*seed ^= *seed << 13;
	*seed ^= *seed >> 7;
	*seed ^= *seed << 17;
	return *seed;
}

static void push_some(struct worker *w, struct gmem_peer_io *io, uint8_t *memory, uint32_t now)
{
	static const uint32_t sizes[] = { KIB4, KIB4, KIB4, KIB4, KIB64, KIB64, KIB64, MIB2 };
	uint64_t first = draw(&w->seed) % THREAD_KEYS, count = 1 + draw(&w->seed) % 24, used = 0;

	for (uint64_t i = 0; i < count; i++) {
		uint64_t k = (first + i) % THREAD_KEYS;

		if (!w->version[k])
			w->bytes[k] = sizes[draw(&w->seed) % 8];
		if (used + w->bytes[k] > 4 * MIB2)
			count = i;
		if (i == count)
			break;
		io[i] = (struct gmem_peer_io){ w->base + k, memory + used, w->bytes[k], 99 };
		tier_fill(io[i].memory, w->bytes[k], w->base + k, now);
		used += w->bytes[k];
	}
	if (count == 1)
		io[0].result = tier_ops->peer_map(w->device, io[0].key, io[0].memory, io[0].bytes);
	else
		CHECK_EQ(tier_ops->peer_map_batch(w->device, io, count), 0);
	for (uint64_t i = 0; i < count; i++) {
		CHECK(!io[i].result || io[i].result == -ENOSPC);
		if (!io[i].result)
			w->version[io[i].key - w->base] = now;
		w->pushed += !io[i].result;
		w->full += !!io[i].result;
	}
}

static void pull_some(struct worker *w, struct gmem_peer_io *io, uint8_t *memory)
{
	uint64_t first = draw(&w->seed) % THREAD_KEYS, count = 1 + draw(&w->seed) % 24, used = 0, n = 0;

	for (uint64_t i = 0; i < count; i++) {
		uint64_t k = (first + i) % THREAD_KEYS;
		uint32_t bytes = w->version[k] ? w->bytes[k] : KIB4;

		if (used + bytes > 4 * MIB2)
			break;
		io[n++] = (struct gmem_peer_io){ w->base + k, memory + used, bytes, 99 };
		used += bytes;
	}
	if (n == 1)
		io[0].result = tier_ops->peer_unmap(w->device, io[0].key, io[0].memory, io[0].bytes);
	else
		CHECK_EQ(tier_ops->peer_unmap_batch(w->device, io, n), 0);
	for (uint64_t i = 0; i < n; i++) {
		uint32_t version = w->version[io[i].key - w->base];

		CHECK_EQ(io[i].result, version ? 0 : -ENOENT);
		CHECK(!version || tier_is_filled(io[i].memory, io[i].bytes, io[i].key, version));
	}
}

static void *work(void *arg)
{
	struct worker *w = arg;
	uint8_t *memory = pages_memory(4 * MIB2);
	struct gmem_peer_io io[24];
	uint64_t until = now_ns() + 2500000000ull;

	for (uint32_t now = 1; now_ns() < until; now++) {
		uint64_t what = draw(&w->seed) % 10, k = draw(&w->seed) % THREAD_KEYS;

		if (what < 4)
			push_some(w, io, memory, now);
		else if (what < 8)
			pull_some(w, io, memory);
		for (uint64_t i = 0; what >= 8 && i < 12; i++, k = (k + 1) % THREAD_KEYS) {
			CHECK_EQ(tier_ops->peer_free(w->device, w->base + k, w->bytes[k]), w->version[k] ? 0 : -ENOENT);
			w->version[k] = 0;
		}
		tier_ops->last_error(w->device);
	}
	munmap(memory, 4 * MIB2);
	return NULL;
}

static void test_hammer(unsigned threads, const char *options)
{
	struct gmem_device *device = attached(folder, options);
	struct worker *workers = calloc(threads, sizeof(*workers));
	uint64_t pushed = 0, full = 0, pages = 0;

	for (unsigned i = 0; i < threads; i++) {
		workers[i].device = device;
		workers[i].base = i * THREAD_KEYS;
		workers[i].seed = 88172645463325252ull + i;
		CHECK(!pthread_create(&workers[i].thread, NULL, work, &workers[i]));
	}
	for (unsigned i = 0; i < threads; i++) {
		pthread_join(workers[i].thread, NULL);
		pushed += workers[i].pushed;
		full += workers[i].full;
		for (int k = 0; k < THREAD_KEYS; k++) {
			pages += workers[i].version[k] != 0;
			if (workers[i].version[k])
				CHECK_EQ(pull(device, workers[i].base + k, workers[i].bytes[k], workers[i].version[k]), 0);
		}
	}
	CHECK_EQ(tier_usage(device).pages, pages);
	CHECK_EQ(tier_usage(device).stored_bytes, tier_usage(device).page_bytes);
	CHECK(pushed > 50 && full > 5); /* both were tried */
	free(workers);
	tier_ops->remove(device);
}

/* One key from several threads is the core's mistake; it must not cost more than that page. */
static void *same_key(void *arg)
{
	struct gmem_device *device = arg;
	uint8_t *memory = pages_memory(KIB64);

	for (int i = 0; i < 300; i++) {
		int err;

		tier_fill(memory, KIB64, 1, (uint64_t)i);
		err = tier_ops->peer_map(device, 1, memory, KIB64);
		CHECK(!err || err == -ENOSPC);
		err = tier_ops->peer_unmap(device, 1, memory, KIB64);
		CHECK(!err || err == -EBADMSG || err == -ENOENT);
		if (i % 3 == 0)
			tier_ops->peer_free(device, 1, KIB64);
	}
	munmap(memory, KIB64);
	return NULL;
}

static void test_same_key(void)
{
	struct gmem_device *device = attached(folder, "capacity=2M");
	pthread_t threads[THREADS];

	for (int i = 0; i < THREADS; i++)
		CHECK(!pthread_create(&threads[i], NULL, same_key, device));
	for (int i = 0; i < THREADS; i++)
		pthread_join(threads[i], NULL);
	tier_ops->peer_free(device, 1, KIB64);
	CHECK_EQ(tier_usage(device).pages, 0);
	CHECK_EQ(tier_usage(device).stored_bytes, 0);
	tier_ops->remove(device);
}

/* ---- below a core ---- */

static int store_and_read(struct client *client, void *arg)
{
	static const uint64_t page_bytes[] = { KIB4, KIB64, MIB2 };
	int hnid = (int)(intptr_t)arg;

	for (int s = 0; s < 3; s++) {
		uint64_t bytes = 4 * page_bytes[s];
		uint64_t *at = client_mmap(client, bytes, page_bytes[s], GMEM_FORK_SHARE);

		for (uint64_t i = 0; i < bytes / 8; i++)
			at[i] = i * 31 + (uint64_t)s;
		CHECK_EQ(client_prefetch(client, hnid, at, bytes), 0);
		CHECK_EQ(client_query(client, at).valid, 1 << hnid);
		for (uint64_t i = 0; i < bytes / 8; i++)
			CHECK_EQ(at[i], i * 31 + (uint64_t)s);
		CHECK(client_query(client, at).valid & 1 << GMEM_HOST);
	}
	return 0;
}

static void test_core(void)
{
	struct gmem_core *core = core_start((struct gmem_core_config){ .hugepages = hugepages });
	const char *keys[] = { "path", "capacity", "engine" }, *values[] = { folder, "32M", engine };
	struct gmem_driver_config config = { .name = "nvme0", .keys = keys, .values = values, .count = 3,
					     .message = tier_message };
	int hnid;

	CHECK_EQ(gmem_device_attach(core, tier_ops, &config, &hnid), 0);
	CHECK_EQ(client_wait(client_start(core, store_and_read, (void *)(intptr_t)hnid)), 0);
	core_settle(core);
	CHECK_EQ(gmem_device_detach(core, hnid, false), 0);
	gmem_core_destroy(core);
}

static void run(const char *name)
{
	struct gmem_device *device;
	char text[160];

	engine = name;
	snprintf(text, sizeof(text), "path=%s capacity=2M", folder);
	if (attach(text, &device)) {
		CHECK(strstr(tier_message, "engine: "));
		printf("%s: not run: %s\n", name, tier_message);
		return;
	}
	tier_ops->remove(device);
	test_round_trips();
	test_batches("capacity=64M");
	test_batches("capacity=64M depth=1");
	test_full();
	test_damage();
	test_misdirected_twin();
	test_cut_short();
	test_failing();
	test_lost();
#ifndef __SANITIZE_THREAD__ /* see test_parts.c */
	test_memory_gone();
#endif
	test_file_limit();
	test_tmpfs();
	test_no_direct();
	test_options();
	test_paths();
	test_hammer(1, "capacity=16M");
	test_hammer(THREADS, "capacity=32M");
	test_hammer(THREADS, "capacity=16M direct=off depth=7");
	test_same_key();
	test_core();
	printf("file, %s: ok\n", name);
}

static void remove_folder(void)
{
	static const char *const names[] = { "damaged", "short", "thesis", "pages", "given", "left" };

	for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++)
		unlink(in_folder(names[i]));
	umount2(in_folder("small"), MNT_DETACH); /* of a test that failed */
	rmdir(in_folder("small"));
	rmdir(folder);
}

int main(void)
{
	alarm(time_limit_s);
	snprintf(folder, sizeof(folder), "%s", "/var/tmp/gmem-test-XXXXXX");
	CHECK(mkdtemp(folder));
	atexit(remove_folder);
	one_page = pages_memory(MIB2);
	tier_ops = gmem_driver_builtin("file");
	CHECK(tier_ops);
	hugepages = hugepages_reserve(16);
	test_crc32c();
	test_slots();
	test_index();
	run("io_uring");
	run("sync");
	test_uring_refused();
	return 0;
}
