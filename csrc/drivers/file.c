/* SPDX-License-Identifier: Apache-2.0
 *
 * file: a tier that stores pages in a file or on a block device. What it is asked and what it says is here; store.h is
 * the pages, scratch.h the file, aio.h the I/O.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <gmem/driver.h>
#include <gmem/memfd.h>
#include <gmem/stats.h>

#include "store.h"

#define DEPTH_DEFAULT 64
#define MEASURE_BYTES (4 * GMEM_HUGE_BYTES) /* what is written and read to know the device; 4 chunks at most */
#define MEASURE_READS 16

struct gmem_device {
	struct gmem_store store;
	uint64_t bandwidth, latency_ns; /* (C) */
};

static int refuse(const struct gmem_driver_config *config, int err, const char *why)
{
	snprintf(config->message, GMEM_MESSAGE_MAX, "%s", why);
	return err;
}

/* ---- options ---- */

struct options {
	const char *path, *engine;
	uint64_t capacity, preallocate, direct, erase, depth;
};

static int read_options(const struct gmem_driver_config *config, struct options *ret)
{
	const struct gmem_driver_option known[] = {
		{ "path", NULL, false, &ret->path },
		{ "capacity", &ret->capacity, false, NULL },
		{ "preallocate", &ret->preallocate, true, NULL },
		{ "direct", &ret->direct, true, NULL },
		{ "erase", &ret->erase, true, NULL },
		{ "depth", &ret->depth, false, NULL },
		{ "engine", NULL, false, &ret->engine },
	};
	int err;

	*ret = (struct options){ .engine = "auto", .capacity = UINT64_MAX, .preallocate = GMEM_AUTO,
				 .direct = GMEM_AUTO, .depth = DEPTH_DEFAULT };
	err = gmem_driver_options(config, known, sizeof(known) / sizeof(known[0]));
	if (err)
		return err;
	if (ret->capacity == 0)
		return refuse(config, -EINVAL, "capacity: smaller than one chunk of 2 MiB");
	if (ret->capacity == UINT64_MAX)
		ret->capacity = 0; /* not said */
	if (!ret->depth || ret->depth > GMEM_AIO_DEPTH_MAX)
		return refuse(config, -EINVAL, "depth: from 1 to 1024");
	if (!config->key_count)
		return refuse(config, -EINVAL, "driver: the core does not say how many keys there are");
	return 0;
}

static int read_engine(const struct gmem_driver_config *config, const char *text, enum gmem_aio_engine *ret)
{
	static const char *const names[] = { "auto", "io_uring", "sync" };

	for (unsigned i = 0; i < sizeof(names) / sizeof(names[0]); i++)
		if (!strcmp(text, names[i])) {
			*ret = (enum gmem_aio_engine)i;
			return 0;
		}
	return refuse(config, -EINVAL, "engine: auto, io_uring or sync");
}

/* ---- how fast it is ---- */

static int io_once(struct gmem_lane *lane, uint64_t offset, uint32_t bytes, bool write)
{
	struct gmem_aio_op *op = gmem_lane_op(lane, bytes);
	int err;

	op->offset = offset;
	op->write = write;
	if (write)
		memset(op->buffer, 0, bytes);
	gmem_lane_submit(lane, op);
	err = gmem_lane_wait(lane)->result;
	gmem_lane_op_free(lane, op);
	return err;
}

/* What is read has to be written first: a filesystem answers for blocks that never were without a look at the disk. */
static int measure(struct gmem_device *device)
{
	uint64_t capacity = device->store.scratch.capacity, bytes = capacity < MEASURE_BYTES ? capacity : MEASURE_BYTES;
	struct gmem_lane *lane = gmem_lane_get(device->store.aio, 1);
	uint64_t begin = 0, took, best = UINT64_MAX;
	int err = 0;

	for (uint64_t at = 0; !err && at < bytes; at += GMEM_HUGE_BYTES)
		err = io_once(lane, GMEM_SCRATCH_DATA + at, GMEM_HUGE_BYTES, true);
	begin = gmem_now_ns();
	for (uint64_t at = 0; !err && at < bytes; at += GMEM_HUGE_BYTES)
		err = io_once(lane, GMEM_SCRATCH_DATA + at, GMEM_HUGE_BYTES, false);
	took = gmem_now_ns() - begin;
	device->bandwidth = (uint64_t)((double)bytes * 1e9 / (double)(took + 1));
	for (uint64_t i = 0; !err && i < MEASURE_READS; i++) {
		begin = gmem_now_ns();
		err = io_once(lane, GMEM_SCRATCH_DATA + i * 7919 * 4096 % bytes, 4096, false);
		took = gmem_now_ns() - begin;
		best = took < best ? took : best;
	}
	device->latency_ns = best;
	gmem_lane_put(lane);
	return err;
}

/* ---- identity ---- */

/* Where a predecessor has left its pages. */
static int take_over(const struct gmem_driver_config *config, const struct options *options, enum gmem_aio_engine engine,
		     const struct gmem_scratch_config *wanted, int index, int fd, struct gmem_store *ret)
{
	struct gmem_index_header header;
	struct gmem_scratch scratch;
	int err = pread(index, &header, sizeof(header), 0) == sizeof(header) ? 0 : -EPROTO;

	if (!err && header.magic == GMEM_INDEX_MAGIC && header.version != GMEM_INDEX_VERSION)
		err = -EPROTONOSUPPORT; /* the rest of it may mean something else */
	if (!err)
		err = gmem_scratch_adopt(wanted, fd, header.capacity_bytes, &scratch);
	if (err) {
		close(index);
		close(fd);
	}
	if (!err)
		err = gmem_store_adopt(ret, &scratch, config->key_count, index, engine, (unsigned)options->depth);
	if (err)
		snprintf(config->message, GMEM_MESSAGE_MAX, "path: what was left there can't be taken over: %s", strerror(-err));
	return err;
}

static int open_store(const struct gmem_driver_config *config, const struct options *options,
		      enum gmem_aio_engine engine, struct gmem_store *ret)
{
	const struct gmem_scratch_config wanted = {
		.path = options->path, .capacity = options->capacity, .erase = options->erase,
		.preallocate = (enum gmem_choice)options->preallocate, .direct = (enum gmem_choice)options->direct,
	};
	struct gmem_scratch scratch;
	int index = gmem_driver_kept_fd(config, "index"), fd = gmem_driver_kept_fd(config, "scratch"), err;

	if (index >= 0 && fd >= 0)
		return take_over(config, options, engine, &wanted, index, fd, ret);
	err = gmem_scratch_open(&wanted, config->message, &scratch);
	if (err)
		return err;
	err = gmem_store_init(ret, &scratch, config->key_count, engine, (unsigned)options->depth);
	if (err)
		goto refused;
	err = gmem_driver_keep_fd(config, "scratch", ret->scratch.fd);
	if (!err)
		err = gmem_driver_keep_fd(config, "index", ret->index.fd);
	if (err)
		gmem_store_deinit(ret);
refused:
	if (err)
		snprintf(config->message, GMEM_MESSAGE_MAX, "%s: %s", engine == GMEM_AIO_URING ? "engine: io_uring" : "memory",
			 strerror(-err));
	return err;
}

static int file_probe(const struct gmem_driver_config *config, struct gmem_device **ret)
{
	struct gmem_device *device = calloc(1, sizeof(*device));
	enum gmem_aio_engine engine;
	struct options options;
	int err;

	if (!device)
		return -ENOMEM;
	err = read_options(config, &options);
	if (!err)
		err = read_engine(config, options.engine, &engine);
	if (!err)
		err = gmem_copy_guard_init();
	if (!err)
		err = open_store(config, &options, engine, &device->store);
	if (err) {
		free(device);
		return err;
	}
	if (device->store.index.header->latency_ns) { /* a predecessor's, and full of pages */
		device->bandwidth = device->store.index.header->bandwidth;
		device->latency_ns = device->store.index.header->latency_ns;
		*ret = device;
		return 0;
	}
	err = measure(device);
	if (err) {
		snprintf(config->message, GMEM_MESSAGE_MAX, "path: %.64s: a first write and read failed: %s", options.path,
			 strerror(-err));
		gmem_store_deinit(&device->store);
		free(device);
		return err;
	}
	device->store.index.header->bandwidth = device->bandwidth;
	device->store.index.header->latency_ns = device->latency_ns + !device->latency_ns;
	*ret = device;
	return 0;
}

static void file_remove(struct gmem_device *device)
{
	gmem_store_deinit(&device->store);
	free(device);
}

static int file_info(struct gmem_device *device, struct gmem_device_info *ret)
{
	*ret = (struct gmem_device_info){
		.capacity_bytes = device->store.scratch.capacity,
		.page_bytes_mask = 1ull << GMEM_SHIFT_4K | 1ull << GMEM_SHIFT_64K | 1ull << GMEM_SHIFT_2M,
		.caps = GMEM_CAP_PEER | GMEM_CAP_SLOW,
		.bandwidth_bytes_per_s = device->bandwidth, .latency_ns = device->latency_ns,
	};
	return 0;
}

static int file_health(struct gmem_device *device)
{
	return gmem_store_is_lost(&device->store) ? -EIO : 0;
}

/* A copy for each thread: the sentence may be replaced while it is read. */
static const char *file_last_error(struct gmem_device *device)
{
	static _Thread_local char text[GMEM_MESSAGE_MAX];

	gmem_store_error(&device->store, text);
	return text;
}

/* ---- pages ---- */

static int file_peer_map(struct gmem_device *device, uint64_t key, const void *src, size_t bytes)
{
	struct gmem_peer_io io = { .key = key, .memory = (void *)(uintptr_t)src, .bytes = bytes };

	gmem_store_push(&device->store, &io, 1);
	return io.result;
}

static int file_peer_unmap(struct gmem_device *device, uint64_t key, void *dst, size_t bytes)
{
	struct gmem_peer_io io = { .key = key, .memory = dst, .bytes = bytes };

	gmem_store_pull(&device->store, &io, 1);
	return io.result;
}

static int file_peer_map_batch(struct gmem_device *device, struct gmem_peer_io *io, size_t count)
{
	gmem_store_push(&device->store, io, count);
	return 0;
}

static int file_peer_unmap_batch(struct gmem_device *device, struct gmem_peer_io *io, size_t count)
{
	gmem_store_pull(&device->store, io, count);
	return 0;
}

static int file_peer_free(struct gmem_device *device, uint64_t key, size_t bytes)
{
	(void)bytes;
	return gmem_store_free(&device->store, key);
}

static int file_peer_usage(struct gmem_device *device, struct gmem_device_usage *ret)
{
	uint64_t pages = atomic_load(&device->store.pages);

	*ret = (struct gmem_device_usage){
		.pages = pages, .raw_pages = pages, .page_bytes = atomic_load(&device->store.page_bytes),
		.stored_bytes = gmem_slots_used(&device->store.slots), /* bad slots as well */
	};
	return 0;
}

const struct gmem_driver_ops gmem_file_ops = {
	.abi = GMEM_DRIVER_ABI, .size = sizeof(struct gmem_driver_ops), .name = "file",
	.probe = file_probe, .remove = file_remove, .info = file_info, .health = file_health,
	.last_error = file_last_error, .peer_map = file_peer_map, .peer_unmap = file_peer_unmap,
	.peer_free = file_peer_free, .peer_map_batch = file_peer_map_batch, .peer_unmap_batch = file_peer_unmap_batch,
	.peer_usage = file_peer_usage,
};
