/* SPDX-License-Identifier: Apache-2.0
 *
 * Reads and writes of a file, many in flight: by io_uring where it can be had, else by pread and pwrite, one after the
 * other. A lane is one ring, the buffers that its I/O goes through and its operations, for one caller at a time: so no
 * lock is held over an I/O, and nobody reaps what another waits for. Lanes are made when all are taken, up to
 * GMEM_AIO_LANES, and kept: after that nothing is allocated.
 */
#ifndef GMEM_DRIVERS_AIO_H
#define GMEM_DRIVERS_AIO_H

#include <gmem/driver.h>
#include <gmem/lockrank.h>

#define GMEM_AIO_LANES 8
#define GMEM_AIO_LANE_BYTES (4 * GMEM_HUGE_BYTES) /* of buffers: pages in flight of one caller */
#define GMEM_AIO_DEPTH_MAX 1024

enum gmem_aio_engine { GMEM_AIO_AUTO = 0, GMEM_AIO_URING, GMEM_AIO_SYNC };

struct gmem_aio_op {
	/* the caller's */
	uint64_t offset;
	uint32_t bytes;
	bool write;
	struct gmem_peer_io *io;
	uint32_t crc;
	unsigned tries;
	/* the lane's */
	uint8_t *buffer; /* of bytes, aligned to them */
	int result;      /* 0: all of it, else -errno; -EIO if the file is too short */
	struct gmem_aio_op *next;
};

struct gmem_aio;
struct gmem_lane;

/* engine: GMEM_AIO_AUTO takes what there is. -EOPNOTSUPP, -EPERM, -ENOSYS, ...: this engine can't be had. */
int gmem_aio_create(int fd, enum gmem_aio_engine engine, unsigned depth, struct gmem_aio **ret);
void gmem_aio_destroy(struct gmem_aio *aio);
enum gmem_aio_engine gmem_aio_engine(const struct gmem_aio *aio);

/* Waits if GMEM_AIO_LANES are taken. A lane is put back with nothing in flight and no operation taken. count: how many
 * operations there will be; a single one is quicker without the ring (a write of 4 KiB by a quarter). */
struct gmem_lane *gmem_lane_get(struct gmem_aio *aio, size_t count);
void gmem_lane_put(struct gmem_lane *lane);
/* An operation with a buffer; NULL if depth or buffers are used up: wait for one in flight. */
struct gmem_aio_op *gmem_lane_op(struct gmem_lane *lane, uint32_t bytes);
void gmem_lane_op_free(struct gmem_lane *lane, struct gmem_aio_op *op);
void gmem_lane_submit(struct gmem_lane *lane, struct gmem_aio_op *op);
/* The next one that is done, which may be submitted again; NULL if none is in flight. */
struct gmem_aio_op *gmem_lane_wait(struct gmem_lane *lane);

/* For tests: called for each operation that is done, and may change its result. NULL but in tests. */
typedef int (*gmem_aio_fault_fn)(const struct gmem_aio_op *op);
extern _Atomic(gmem_aio_fault_fn) gmem_aio_fault;

#endif
