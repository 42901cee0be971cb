/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#ifdef GMEM_LIBURING
#include <liburing.h>
#endif

#include "aio.h"
#include "slots.h"

#define SUBMIT_AT_ONCE_BYTES 65536 /* worth a system call of its own while more are being prepared */

_Atomic(gmem_aio_fault_fn) gmem_aio_fault;

struct gmem_lane {
	struct gmem_aio *aio;         /* (C) */
	uint8_t *buffers;             /* (C) */
	struct gmem_slots slots;      /* which parts of them are taken */
	struct gmem_aio_op *ops;      /* (C) depth of them */
	/* whoever has the lane */
	struct gmem_aio_op *free_ops;
	struct gmem_aio_op *done;     /* by system calls: submitted and so done */
	unsigned in_flight;
	bool by_ring;
	struct gmem_lane *next;       /* aio's lock: of those not taken */
#ifdef GMEM_LIBURING
	struct io_uring ring;
	bool fixed_buffers, fixed_file; /* (C) */
#endif
};

struct gmem_aio {
	int fd;                      /* (C) */
	enum gmem_aio_engine engine; /* (C) */
	unsigned depth;              /* (C) */
	struct gmem_mutex lock;
	pthread_cond_t returned;
	struct gmem_lane *free;      /* lock; the last one used first: its buffers are in the cache */
	unsigned count;              /* lock */
};

/* ---- one I/O by system calls, whole or with an error ---- */

static int transfer_rest(int fd, const struct gmem_aio_op *op, uint32_t done)
{
	while (done < op->bytes) {
		off_t at = (off_t)(op->offset + done);
		ssize_t n = op->write ? pwrite(fd, op->buffer + done, op->bytes - done, at) :
					pread(fd, op->buffer + done, op->bytes - done, at);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n < 0 ? -errno : -EIO;
		done += (uint32_t)n;
	}
	return 0;
}

/* ---- io_uring ---- */

#ifdef GMEM_LIBURING
static int ring_init(struct gmem_lane *lane)
{
	struct iovec all = { lane->buffers, GMEM_AIO_LANE_BYTES };
	unsigned depth = lane->aio->depth;
	int err = -EINVAL;

	/* Completions wait until somebody asks for them, instead of interrupting: 5.19 */
#ifdef IORING_SETUP_COOP_TASKRUN
	err = io_uring_queue_init(depth, &lane->ring, IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG);
#endif
	if (err == -EINVAL)
		err = io_uring_queue_init(depth, &lane->ring, 0);
	if (err)
		return err;
	/* Either may be refused by RLIMIT_MEMLOCK, and then costs a little on each I/O. */
	lane->fixed_buffers = !io_uring_register_buffers(&lane->ring, &all, 1);
	lane->fixed_file = !io_uring_register_files(&lane->ring, &lane->aio->fd, 1);
	return 0;
}

/* The kernel takes rings apart some time later; the file is to be let go now: it has a lock, and takes room. */
static void ring_deinit(struct gmem_lane *lane)
{
	if (lane->fixed_file)
		io_uring_unregister_files(&lane->ring);
	io_uring_queue_exit(&lane->ring);
}

static void ring_submit(struct gmem_lane *lane, struct gmem_aio_op *op)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(&lane->ring);
	int fd = lane->fixed_file ? 0 : lane->aio->fd;

	assert(sqe); /* there are no more operations than entries */
	if (lane->fixed_buffers && op->write)
		io_uring_prep_write_fixed(sqe, fd, op->buffer, op->bytes, op->offset, 0);
	else if (lane->fixed_buffers)
		io_uring_prep_read_fixed(sqe, fd, op->buffer, op->bytes, op->offset, 0);
	else if (op->write)
		io_uring_prep_write(sqe, fd, op->buffer, op->bytes, op->offset);
	else
		io_uring_prep_read(sqe, fd, op->buffer, op->bytes, op->offset);
	if (lane->fixed_file)
		io_uring_sqe_set_flags(sqe, IOSQE_FIXED_FILE);
	io_uring_sqe_set_data(sqe, op);
	if (op->bytes >= SUBMIT_AT_ONCE_BYTES)
		io_uring_submit(&lane->ring); /* what is not taken now is submitted by the next wait */
}

/* There is no giving up: the kernel reads and writes the buffers until it says that it is done. */
static struct gmem_aio_op *ring_wait(struct gmem_lane *lane)
{
	struct io_uring_cqe *cqe = NULL;
	struct gmem_aio_op *op;
	int n;

	while (io_uring_peek_cqe(&lane->ring, &cqe) || !cqe) {
		n = io_uring_submit_and_wait(&lane->ring, 1);
		if (n < 0 && n != -EINTR) /* short of memory, or of room for completions */
			clock_nanosleep(CLOCK_MONOTONIC, 0, &(struct timespec){ 0, 50000 }, NULL);
	}
	op = io_uring_cqe_get_data(cqe);
	n = cqe->res;
	io_uring_cqe_seen(&lane->ring, cqe);
	/* What only the ring could not do is done without it; a rest is, too: it says why it was left. */
	if (n == -EAGAIN || n == -EINTR || n == -ENOMEM || n == -ECANCELED)
		n = 0;
	op->result = n < 0 ? n : transfer_rest(lane->aio->fd, op, (uint32_t)n);
	return op;
}
#else
static int ring_init(struct gmem_lane *lane)
{
	(void)lane;
	return -EOPNOTSUPP; /* built without liburing */
}

static void ring_deinit(struct gmem_lane *lane)
{
	(void)lane;
}

static void ring_submit(struct gmem_lane *lane, struct gmem_aio_op *op)
{
	(void)lane;
	(void)op;
}

static struct gmem_aio_op *ring_wait(struct gmem_lane *lane)
{
	(void)lane;
	return NULL;
}
#endif

/* ---- lanes ---- */

static void lane_destroy(struct gmem_lane *lane)
{
	if (lane->aio->engine == GMEM_AIO_URING)
		ring_deinit(lane);
	gmem_slots_deinit(&lane->slots);
	munmap(lane->buffers, GMEM_AIO_LANE_BYTES);
	free(lane->ops);
	free(lane);
}

static int lane_buffers(struct gmem_lane *lane)
{
	int err;

	lane->buffers = mmap(NULL, GMEM_AIO_LANE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (lane->buffers == MAP_FAILED)
		return -errno;
	madvise(lane->buffers, GMEM_AIO_LANE_BYTES, MADV_HUGEPAGE);
	madvise(lane->buffers, GMEM_AIO_LANE_BYTES, MADV_DONTFORK); /* a fork would move pages that I/O goes to */
	err = gmem_slots_init(&lane->slots, GMEM_AIO_LANE_BYTES);
	if (err)
		munmap(lane->buffers, GMEM_AIO_LANE_BYTES);
	return err;
}

static int lane_create(struct gmem_aio *aio, struct gmem_lane **ret)
{
	struct gmem_lane *lane = calloc(1, sizeof(*lane));
	int err = -ENOMEM;

	if (lane)
		lane->ops = calloc(aio->depth, sizeof(*lane->ops));
	if (lane && lane->ops) {
		lane->aio = aio;
		err = lane_buffers(lane);
	}
	if (!err && aio->engine == GMEM_AIO_URING) {
		err = ring_init(lane);
		if (err) {
			gmem_slots_deinit(&lane->slots);
			munmap(lane->buffers, GMEM_AIO_LANE_BYTES);
		}
	}
	if (err) {
		if (lane)
			free(lane->ops);
		free(lane);
		return err;
	}
	for (unsigned i = 0; i < aio->depth; i++) {
		lane->ops[i].next = lane->free_ops;
		lane->free_ops = &lane->ops[i];
	}
	*ret = lane;
	return 0;
}

struct gmem_lane *gmem_lane_get(struct gmem_aio *aio, size_t count)
{
	struct gmem_lane *lane;

	gmem_mutex_lock(&aio->lock);
	for (;;) {
		lane = aio->free;
		if (lane) {
			aio->free = lane->next;
			break;
		}
		/* If no more can be made, those that there are do. */
		if (aio->count < GMEM_AIO_LANES && !lane_create(aio, &lane)) {
			aio->count++;
			break;
		}
		gmem_mutex_wait(&aio->lock, &aio->returned, 0);
	}
	gmem_mutex_unlock(&aio->lock);
	lane->by_ring = aio->engine == GMEM_AIO_URING && count > 1;
	return lane;
}

void gmem_lane_put(struct gmem_lane *lane)
{
	struct gmem_aio *aio = lane->aio;

	assert(!lane->in_flight);
	gmem_mutex_lock(&aio->lock);
	lane->next = aio->free;
	aio->free = lane;
	pthread_cond_signal(&aio->returned);
	gmem_mutex_unlock(&aio->lock);
}

struct gmem_aio_op *gmem_lane_op(struct gmem_lane *lane, uint32_t bytes)
{
	struct gmem_aio_op *op = lane->free_ops;
	uint64_t at;

	if (!op || gmem_slots_alloc(&lane->slots, bytes, &at))
		return NULL;
	lane->free_ops = op->next;
	*op = (struct gmem_aio_op){ .bytes = bytes, .buffer = lane->buffers + at };
	return op;
}

void gmem_lane_op_free(struct gmem_lane *lane, struct gmem_aio_op *op)
{
	gmem_slots_free(&lane->slots, (uint64_t)(op->buffer - lane->buffers), op->bytes);
	op->next = lane->free_ops;
	lane->free_ops = op;
}

void gmem_lane_submit(struct gmem_lane *lane, struct gmem_aio_op *op)
{
	lane->in_flight++;
	if (lane->by_ring) {
		ring_submit(lane, op);
		return;
	}
	op->result = transfer_rest(lane->aio->fd, op, 0);
	op->next = lane->done;
	lane->done = op;
}

struct gmem_aio_op *gmem_lane_wait(struct gmem_lane *lane)
{
	gmem_aio_fault_fn fault = atomic_load_explicit(&gmem_aio_fault, memory_order_relaxed);
	struct gmem_aio_op *op;

	if (!lane->in_flight)
		return NULL;
	if (lane->by_ring) {
		op = ring_wait(lane);
	} else {
		op = lane->done;
		lane->done = op->next;
	}
	lane->in_flight--;
	if (fault)
		op->result = fault(op);
	return op;
}

/* ---- all of them ---- */

int gmem_aio_create(int fd, enum gmem_aio_engine engine, unsigned depth, struct gmem_aio **ret)
{
	struct gmem_aio *aio = calloc(1, sizeof(*aio));
	int err = 0;

	if (!aio)
		return -ENOMEM;
	*aio = (struct gmem_aio){ .fd = fd, .engine = engine == GMEM_AIO_SYNC ? engine : GMEM_AIO_URING, .depth = depth };
	if (aio->engine == GMEM_AIO_URING) {
		err = lane_create(aio, &aio->free);
		if (err && engine == GMEM_AIO_AUTO)
			aio->engine = GMEM_AIO_SYNC;
	}
	if (aio->engine == GMEM_AIO_SYNC) {
		aio->depth = 1; /* done when it is submitted: more would only leave the cache */
		err = lane_create(aio, &aio->free);
	}
	if (err) {
		free(aio);
		return err;
	}
	aio->count = 1;
	gmem_mutex_init(&aio->lock, GMEM_RANK_DRIVER);
	pthread_cond_init(&aio->returned, NULL);
	*ret = aio;
	return 0;
}

void gmem_aio_destroy(struct gmem_aio *aio)
{
	while (aio->free) {
		struct gmem_lane *lane = aio->free;

		aio->free = lane->next;
		lane_destroy(lane);
	}
	pthread_cond_destroy(&aio->returned);
	gmem_mutex_deinit(&aio->lock);
	free(aio);
}

enum gmem_aio_engine gmem_aio_engine(const struct gmem_aio *aio)
{
	return aio->engine;
}
