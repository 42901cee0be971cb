/* SPDX-License-Identifier: Apache-2.0
 *
 * Pages go through buffers of our own in both directions. What is pushed lies in memory of a client, who may change it
 * while it is read: a checksum taken before or after the write would be of something else. What is pulled is checked
 * before anybody can see it, and hands the client's pages to no I/O: one that is punched under a DMA is a page that the
 * kernel keeps for as long as that takes. The copy costs 0.1 ms for 2 MiB and so does the checksum, and both are done
 * while other pages are read or written: a batch is bounded by the disk all the same.
 */
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include <gmem/crash.h>
#include <gmem/memfd.h>
#include <gmem/stats.h>

#include "crc32c.h"
#include "store.h"

#define PIECE_BYTES 65536            /* copied, then checksummed while it is in the cache */
#define RETRY_NS 1000000000ull       /* a lost device is tried once in a while: a cable may be back */
#define TRIES_MAX 2

/* Everything that the index says is stored is taken; the rest is free, whatever it had been. */
static int count_stored(struct gmem_store *store)
{
	uint64_t key = 0;

	for (; !gmem_index_next(&store->index, &key); key++) {
		uint32_t crc;
		uint64_t place = gmem_index_get(&store->index, key, &crc), bytes = gmem_place_bytes(place);

		if (gmem_place_offset(place) < GMEM_SCRATCH_DATA ||
		    gmem_slots_take(&store->slots, gmem_place_offset(place) - GMEM_SCRATCH_DATA, bytes))
			return -EPROTO;
		atomic_fetch_add(&store->pages, 1);
		atomic_fetch_add(&store->page_bytes, bytes);
	}
	return 0;
}

/* index_fd: -1: a new one. */
static int store_init(struct gmem_store *store, const struct gmem_scratch *scratch, uint64_t key_count, int index_fd,
		      enum gmem_aio_engine engine, unsigned depth)
{
	int err;

	*store = (struct gmem_store){ .scratch = *scratch };
	err = gmem_slots_init(&store->slots, scratch->capacity);
	if (err)
		goto no_slots;
	err = index_fd < 0 ? gmem_index_init(&store->index, key_count, scratch->capacity) :
			     gmem_index_adopt(&store->index, key_count, index_fd);
	if (err && index_fd >= 0)
		close(index_fd);
	if (err)
		goto no_index;
	err = count_stored(store);
	if (err)
		goto no_aio;
	err = gmem_aio_create(scratch->fd, engine, depth, &store->aio);
	if (err)
		goto no_aio;
	gmem_mutex_init(&store->lock, GMEM_RANK_DRIVER);
	if (scratch->note[0])
		gmem_store_note(store, "%s", scratch->note);
	return 0;
no_aio:
	gmem_index_deinit(&store->index);
no_index:
	gmem_slots_deinit(&store->slots);
no_slots:
	if (index_fd < 0)
		gmem_scratch_close(&store->scratch);
	else
		gmem_scratch_leave(&store->scratch);
	return err;
}

int gmem_store_init(struct gmem_store *store, const struct gmem_scratch *scratch, uint64_t key_count,
		    enum gmem_aio_engine engine, unsigned depth)
{
	return store_init(store, scratch, key_count, -1, engine, depth);
}

int gmem_store_adopt(struct gmem_store *store, const struct gmem_scratch *scratch, uint64_t key_count, int index_fd,
		     enum gmem_aio_engine engine, unsigned depth)
{
	return store_init(store, scratch, key_count, index_fd, engine, depth);
}

void gmem_store_deinit(struct gmem_store *store)
{
	gmem_mutex_deinit(&store->lock);
	gmem_aio_destroy(store->aio);
	gmem_index_deinit(&store->index);
	gmem_slots_deinit(&store->slots);
	gmem_scratch_close(&store->scratch);
}

/* ---- what operators are told ---- */

void gmem_store_note(struct gmem_store *store, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	gmem_mutex_lock(&store->lock);
	vsnprintf(store->error, sizeof(store->error), format, args);
	gmem_mutex_unlock(&store->lock);
	va_end(args);
}

void gmem_store_error(struct gmem_store *store, char *ret_text)
{
	gmem_mutex_lock(&store->lock);
	memcpy(ret_text, store->error, sizeof(store->error));
	gmem_mutex_unlock(&store->lock);
}

bool gmem_store_is_lost(struct gmem_store *store)
{
	return atomic_load(&store->errors) >= GMEM_STORE_ERRORS_MAX;
}

static void count_error(struct gmem_store *store, const struct gmem_aio_op *op)
{
	atomic_fetch_add(&store->errors, 1);
	gmem_store_note(store, "%s %u bytes at %llu of the file failed: %s", op->write ? "writing" : "reading", op->bytes,
			(unsigned long long)op->offset, strerror(-op->result));
}

static void count_success(struct gmem_store *store)
{
	if (atomic_load_explicit(&store->errors, memory_order_relaxed))
		atomic_store(&store->errors, 0);
}

/* Pushes to a lost device would only take time: one a second finds out whether it is back. */
static bool worth_trying(struct gmem_store *store)
{
	uint64_t now, before;

	if (!gmem_store_is_lost(store))
		return true;
	now = gmem_now_ns();
	before = atomic_load(&store->tried_ns);
	return now - before >= RETRY_NS && atomic_compare_exchange_strong(&store->tried_ns, &before, now);
}

/* ---- slots: offsets of the file ---- */

static int take_slot(struct gmem_store *store, uint64_t bytes, uint64_t *ret_offset)
{
	uint64_t at;
	int err = gmem_slots_alloc(&store->slots, bytes, &at);

	if (!err)
		*ret_offset = GMEM_SCRATCH_DATA + at;
	return err;
}

static void free_slot(struct gmem_store *store, uint64_t offset, uint64_t bytes)
{
	gmem_slots_free(&store->slots, offset - GMEM_SCRATCH_DATA, bytes);
}

static void free_place(struct gmem_store *store, uint64_t place)
{
	free_slot(store, gmem_place_offset(place), gmem_place_bytes(place));
	atomic_fetch_sub(&store->pages, 1);
	atomic_fetch_sub(&store->page_bytes, gmem_place_bytes(place));
}

static bool is_page(const struct gmem_store *store, const struct gmem_peer_io *io)
{
	return io->key < store->index.key_count &&
	       (io->bytes == 1u << GMEM_SHIFT_4K || io->bytes == 1u << GMEM_SHIFT_64K || io->bytes == 1u << GMEM_SHIFT_2M);
}

/* ---- push ---- */

static int copy_in(struct gmem_aio_op *op)
{
	uint32_t crc = gmem_crc32c(0, &op->io->key, sizeof(op->io->key));

	for (uint32_t done = 0; done < op->bytes; done += PIECE_BYTES) {
		uint32_t bytes = op->bytes - done < PIECE_BYTES ? op->bytes - done : PIECE_BYTES;
		int err = gmem_copy(op->buffer + done, (const uint8_t *)op->io->memory + done, bytes);

		if (err)
			return err;
		crc = gmem_crc32c(crc, op->buffer + done, bytes);
	}
	op->crc = crc;
	return 0;
}

/* -EAGAIN: when something in flight is done. Any other result is the io's. */
static int push_start(struct gmem_store *store, struct gmem_lane *lane, struct gmem_peer_io *io)
{
	struct gmem_aio_op *op;
	uint64_t offset;
	int err;

	if (!is_page(store, io))
		return -EINVAL;
	op = gmem_lane_op(lane, (uint32_t)io->bytes);
	if (!op)
		return -EAGAIN;
	err = worth_trying(store) ? take_slot(store, io->bytes, &offset) : -EIO;
	if (!err) {
		op->io = io;
		op->write = true;
		op->offset = offset;
		err = copy_in(op);
		if (err)
			free_slot(store, offset, io->bytes);
	}
	if (err)
		gmem_lane_op_free(lane, op);
	else
		gmem_lane_submit(lane, op);
	return err;
}

/* The old page is as it was. -EINPROGRESS: it is being written again, elsewhere. */
static int push_failed(struct gmem_store *store, struct gmem_lane *lane, struct gmem_aio_op *op)
{
	uint64_t offset;

	if (op->result == -ENOSPC || op->result == -EDQUOT || op->result == -EFBIG) {
		gmem_store_note(store, "the filesystem is full: %llu pages are stored; preallocate=on would have told",
				(unsigned long long)atomic_load(&store->pages));
		free_slot(store, op->offset, op->bytes);
		return -ENOSPC;
	}
	count_error(store, op);
	/* When everything fails it is not the slot's fault. */
	if (gmem_store_is_lost(store))
		free_slot(store, op->offset, op->bytes);
	else
		atomic_fetch_add(&store->bad_bytes, op->bytes);
	if (++op->tries == TRIES_MAX || take_slot(store, op->bytes, &offset))
		return -EIO;
	op->offset = offset;
	gmem_lane_submit(lane, op);
	return -EINPROGRESS;
}

static int push_done(struct gmem_store *store, struct gmem_lane *lane, struct gmem_aio_op *op)
{
	uint64_t old;

	if (op->result)
		return push_failed(store, lane, op);
	count_success(store);
	gmem_crash(GMEM_CRASH_STORE_WRITTEN);
	old = gmem_index_set(&store->index, op->io->key, op->offset, op->bytes, op->crc);
	atomic_fetch_add(&store->pages, 1);
	atomic_fetch_add(&store->page_bytes, op->bytes);
	gmem_crash(GMEM_CRASH_STORE_FLIPPED);
	if (old)
		free_place(store, old);
	return 0;
}

/* ---- pull ---- */

static int pull_start(struct gmem_store *store, struct gmem_lane *lane, struct gmem_peer_io *io)
{
	struct gmem_aio_op *op;
	uint64_t place;
	uint32_t crc = 0;

	if (!is_page(store, io))
		return -EINVAL;
	place = gmem_index_get(&store->index, io->key, &crc);
	if (!place)
		return -ENOENT;
	if (gmem_place_bytes(place) != io->bytes)
		return -EINVAL;
	op = gmem_lane_op(lane, (uint32_t)io->bytes);
	if (!op)
		return -EAGAIN;
	op->io = io;
	op->write = false;
	op->offset = gmem_place_offset(place);
	op->crc = crc;
	gmem_lane_submit(lane, op);
	return 0;
}

static int copy_out(struct gmem_store *store, const struct gmem_aio_op *op)
{
	uint32_t crc = gmem_crc32c(0, &op->io->key, sizeof(op->io->key));

	if (gmem_crc32c(crc, op->buffer, op->bytes) != op->crc) {
		gmem_store_note(store, "%u bytes at %llu of the file are damaged, or another page's", op->bytes,
				(unsigned long long)op->offset);
		return -EBADMSG;
	}
	return gmem_copy(op->io->memory, op->buffer, op->bytes);
}

/* A page that can't be read is gone for good, so it is read twice. */
static int pull_done(struct gmem_store *store, struct gmem_lane *lane, struct gmem_aio_op *op)
{
	if (!op->result) {
		count_success(store);
		return copy_out(store, op);
	}
	count_error(store, op);
	if (++op->tries == TRIES_MAX)
		return -EIO;
	gmem_lane_submit(lane, op);
	return -EINPROGRESS;
}

/* ---- batches ---- */

static void finish(struct gmem_store *store, struct gmem_lane *lane, struct gmem_aio_op *op)
{
	int err = op->write ? push_done(store, lane, op) : pull_done(store, lane, op);

	if (err == -EINPROGRESS)
		return;
	op->io->result = err;
	gmem_lane_op_free(lane, op);
}

/* Keeps as many in flight as the lane has room for: while one is copied or checked, others are read or written. */
static void run(struct gmem_store *store, struct gmem_peer_io *io, size_t count,
		int (*start)(struct gmem_store *store, struct gmem_lane *lane, struct gmem_peer_io *io))
{
	struct gmem_lane *lane = gmem_lane_get(store->aio, count);
	struct gmem_aio_op *op;
	size_t next = 0;

	do {
		while (next < count) {
			int err = start(store, lane, &io[next]);

			if (err == -EAGAIN)
				break;
			if (err)
				io[next].result = err;
			next++;
		}
		op = gmem_lane_wait(lane);
		if (op)
			finish(store, lane, op);
	} while (op || next < count);
	gmem_lane_put(lane);
}

void gmem_store_push(struct gmem_store *store, struct gmem_peer_io *io, size_t count)
{
	run(store, io, count, push_start);
}

void gmem_store_pull(struct gmem_store *store, struct gmem_peer_io *io, size_t count)
{
	run(store, io, count, pull_start);
}

int gmem_store_free(struct gmem_store *store, uint64_t key)
{
	uint64_t place = key < store->index.key_count ? gmem_index_clear(&store->index, key) : 0;

	if (!place)
		return -ENOENT;
	free_place(store, place);
	return 0;
}
