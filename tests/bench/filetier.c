/* SPDX-License-Identifier: Apache-2.0
 *
 * The file tier's driver on this machine's disk, beside a plain loop of pread or pwrite with O_DIRECT over a file of the
 * same size: what a page costs above its I/O (copy, checksum, index), and what many in flight gain.
 * GMEM_BENCH_FOLDER says where the files are; /var/tmp.
 */
#define _GNU_SOURCE
#include "bench.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <gmem/driver.h>

#define REPETITIONS 5
#define FILE_BYTES (256 * MIB)
#define BATCH 64
#define ROUND_NS 200000000ull

struct shape {
	const char *name;
	uint64_t page_bytes;
	size_t batch;
};

static const struct shape shapes[] = {
	{ "4k_1", 4 * KIB, 1 }, { "4k_64", 4 * KIB, 64 }, { "64k_64", 64 * KIB, 64 }, { "2m_8", HUGE_BYTES, 8 },
};

static const struct gmem_driver_ops *ops;
static const char *folder;
static uint8_t *memory;
static int floor_fd;

static uint64_t draw(uint64_t bound)
{
	static uint64_t x = 88172645463325252ull;

	x ^= x << 13;
	x ^= x >> 7;
	x ^= x << 17;
	return x % bound;
}

/* Small pages in random order, big ones in their own. */
static uint64_t next_page(const struct shape *shape, uint64_t n)
{
	uint64_t pages = FILE_BYTES / shape->page_bytes;

	return shape->page_bytes < HUGE_BYTES ? draw(pages) : n % pages;
}

static void push_or_pull(struct gmem_device *device, const struct shape *shape, struct gmem_peer_io *io, bool write)
{
	if (shape->batch == 1)
		io->result = write ? ops->peer_map(device, io->key, io->memory, io->bytes) :
				     ops->peer_unmap(device, io->key, io->memory, io->bytes);
	else
		CHECK_EQ((write ? ops->peer_map_batch : ops->peer_unmap_batch)(device, io, shape->batch), 0);
	for (size_t i = 0; i < shape->batch; i++)
		CHECK_EQ(io[i].result, 0);
}

static double tier_mb_per_s(struct gmem_device *device, const struct shape *shape, bool write)
{
	uint64_t start = now_ns(), bytes = 0, n = 0;
	struct gmem_peer_io io[BATCH];

	while (now_ns() - start < ROUND_NS) {
		for (size_t i = 0; i < shape->batch; i++)
			io[i] = (struct gmem_peer_io){ next_page(shape, n++), memory + i * shape->page_bytes,
						       shape->page_bytes, 0 };
		push_or_pull(device, shape, io, write);
		bytes += shape->batch * shape->page_bytes;
	}
	return (double)bytes * 1e3 / (double)(now_ns() - start);
}

static double loop_mb_per_s(const struct shape *shape, bool write)
{
	uint64_t start = now_ns(), bytes = 0, size = shape->page_bytes;

	for (uint64_t n = 0; now_ns() - start < ROUND_NS; n++, bytes += size) {
		off_t at = (off_t)(next_page(shape, n) * size);

		CHECK_EQ(write ? pwrite(floor_fd, memory, size, at) : pread(floor_fd, memory, size, at), size);
	}
	return (double)bytes * 1e3 / (double)(now_ns() - start);
}

static struct gmem_device *attach(const char *engine)
{
	const char *keys[] = { "path", "capacity", "engine" }, *values[] = { folder, "512M", engine };
	char message[GMEM_MESSAGE_MAX];
	struct gmem_driver_config config = { .name = "f", .keys = keys, .values = values, .count = 3,
					     .message = message, .key_count = 1 << 20 };
	struct gmem_device *device;

	return ops->probe(&config, &device) ? NULL : device;
}

static void shape_rows(const char *engine, const struct shape *shape)
{
	struct gmem_device *device = attach(engine);
	struct pairs pairs[2] = { 0 };
	struct gmem_peer_io io;

	for (uint64_t key = 0; device && key < FILE_BYTES / shape->page_bytes; key++) { /* nothing is read that never was */
		io = (struct gmem_peer_io){ key, memory, shape->page_bytes, 0 };
		CHECK_EQ(ops->peer_map_batch(device, &io, 1), 0);
		CHECK_EQ(io.result, 0);
	}
	for (int r = 0; device && r < REPETITIONS; r++)
		for (int write = 0; write < 2; write++)
			pairs_add(&pairs[write], tier_mb_per_s(device, shape, write), loop_mb_per_s(shape, write));
	for (int write = 0; write < 2; write++) {
		char id[64];
		struct row row = { id, "MB/s", NULL, write ? "pwrite O_DIRECT" : "pread O_DIRECT" };

		snprintf(id, sizeof(id), "file_%s_%s_%s", engine, write ? "write" : "read", shape->name);
		row_print(&row, device ? &pairs[write] : NULL, device ? NULL : "no such engine here");
	}
	if (device)
		ops->remove(device);
}

static void open_floor(void)
{
	floor_fd = open(folder, O_TMPFILE | O_RDWR | O_DIRECT, 0600);
	CHECK(floor_fd >= 0);
	CHECK(!fallocate(floor_fd, 0, 0, FILE_BYTES));
	for (uint64_t at = 0; at < FILE_BYTES; at += HUGE_BYTES)
		CHECK_EQ(pwrite(floor_fd, memory, HUGE_BYTES, (off_t)at), HUGE_BYTES);
}

void file_tier(void)
{
	static const char *const engines[] = { "io_uring", "sync" };

	folder = getenv("GMEM_BENCH_FOLDER") ? getenv("GMEM_BENCH_FOLDER") : "/var/tmp";
	ops = gmem_driver_builtin("file");
	memory = mmap(NULL, BATCH * HUGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(memory != MAP_FAILED);
	for (uint64_t i = 0; i < BATCH * HUGE_BYTES / 8; i += 8)
		((uint64_t *)memory)[i] = i;
	open_floor();
	for (size_t e = 0; e < 2; e++)
		for (size_t s = 0; s < sizeof(shapes) / sizeof(shapes[0]); s++)
			shape_rows(engines[e], &shapes[s]);
	close(floor_fd);
}
