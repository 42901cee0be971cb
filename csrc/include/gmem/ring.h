/* SPDX-License-Identifier: Apache-2.0
 *
 * Ring: a session's requests through shared memory (layout: gmem_wire.h), served by threads of the core. Nothing in
 * that memory is believed: an entry is copied once and then checked, and heads, tails and sizes are our own; the two
 * words that are the client's are checked against them at each look.
 *
 * A ring is idle, in the run queue, or served by one thread for a turn of bounded length. An idle one is queued by its
 * doorbell.
 */
#ifndef GMEM_RING_H
#define GMEM_RING_H

#include <gmem_wire.h>

#include <gmem/lockrank.h>
#include <gmem/types.h>

#define GMEM_RINGS_MAX 8192
#define GMEM_RING_THREADS 4
#define GMEM_RING_JOBS 32 /* entries that were taken and are not complete */
#define GMEM_RING_LANES 8 /* of these, under way at the same time, a slice each in turn */

struct gmem_core;
struct gmem_file;
struct gmem_session;

struct gmem_ring_job {
	struct gmem_ring_sqe sqe; /* our copy */
	struct gmem_ring_cqe cqe;
	bool running;
	bool again;               /* a predecessor may have done it */
	uint32_t sq_index;
	struct gmem_hold_name hold; /* that a predecessor has chosen to release; record 0: none */
	uint64_t done, slice;     /* bytes */
	uint64_t since_ns;        /* when it began to wait for somebody's release */
	uint64_t retry_ns;
};

/* What has been taken and not been completed, where a successor finds it, and the client does not. */
enum gmem_ring_log_state { GMEM_RING_LOG_FREE, GMEM_RING_LOG_TAKEN, GMEM_RING_LOG_COMPLETES };
struct gmem_ring_log {
	struct {
		_Atomic uint32_t state;
		uint32_t sq_index, cq_index; /* the latter while it completes */
		_Atomic uint32_t hold_record; /* that it is about to release; 0: none yet */
		uint64_t hold_asked;
		struct gmem_ring_sqe sqe;
	} entries[GMEM_RING_JOBS];               /* as jobs[] */
};

enum gmem_ring_state { GMEM_RING_IDLE, GMEM_RING_QUEUED, GMEM_RING_SERVED };

struct gmem_ring {
	struct gmem_ring *next;          /* rings->lock; run queue */
	enum gmem_ring_state state;      /* rings->lock */
	bool rung;                       /* rings->lock; the doorbell, while it was served */
	atomic_bool closed;              /* (A) */
	struct gmem_session *session;    /* (C) outlives it */
	struct gmem_file *file;          /* (C) */
	int bell;                        /* (C) */
	struct gmem_file *log_file;      /* (C) NULL: nothing is kept */
	struct gmem_ring_log *log;       /* (C) */
	uint32_t slot;                   /* (C) */
	struct gmem_ring_shared *shared; /* (C) the client may write anything there at any time */
	/* what follows is that of the thread that serves it */
	bool broken;
	bool lingers;                    /* the last request came soon after the one before */
	uint32_t sq_head, cq_tail;
	uint32_t cq_head;                /* the client's, when it was last looked at */
	uint32_t told;                   /* cq_tail when the client was last woken */
	uint32_t flags;                  /* server_flags */
	uint64_t served_ns;
	uint32_t job_count, running;
	uint8_t order[GMEM_RING_JOBS];   /* index of jobs[], oldest first; then the free ones */
	struct gmem_ring_job jobs[GMEM_RING_JOBS];
};

struct gmem_ring_slot {
	struct gmem_ring *ring;
	uint32_t generation;
	uint32_t next_free;
};

struct gmem_rings {
	int epoll_fd, stop_fd;        /* (C) */
	bool spins;                   /* (C) there is a CPU to spin on while a client runs on another */
	struct gmem_mutex lock;
	pthread_cond_t turned;        /* a turn has ended */
	struct gmem_ring_slot slots[GMEM_RINGS_MAX]; /* lock */
	uint32_t slots_used, slots_free;             /* lock; index + 1 of the first free one, 0: none */
	struct gmem_ring *first, **last;             /* lock; run queue */
	atomic_uint queued;                          /* (A) how many are in it; changed under lock */
	uint32_t sleeping;                           /* lock; threads that wait for a doorbell */
	uint32_t thread_count;                       /* lock; those that run */
	uint32_t started;
	pthread_t threads[GMEM_RING_THREADS];
	struct gmem_ring *serving[GMEM_RING_THREADS]; /* lock */
};

/* ---- rings.c: all of them, and the threads that serve them ---- */

int gmem_rings_start(struct gmem_core *core);
void gmem_rings_stop(struct gmem_core *core);
/* Goes on with the ring that a predecessor served, if the session had one: what it had not completed is done again. */
void gmem_ring_resume(struct gmem_session *session);
/* The hold that a job is about to release: done again, it is to release no other. */
void gmem_ring_note_hold(struct gmem_ring *ring, const struct gmem_ring_job *job, struct gmem_hold_name hold);
/* Ends a session's ring, if it has one: waits for the slice that is under way. */
void gmem_ring_close(struct gmem_session *session);

/* ---- ring.c: one ring ---- */

int gmem_ring_create(struct gmem_session *session, struct gmem_ring **ret);
void gmem_ring_destroy(struct gmem_ring *ring);
/* Where a successor finds it, before the client has it. */
int gmem_ring_keep(struct gmem_ring *ring);
void gmem_ring_forget(struct gmem_ring *ring);
/* The one that a predecessor served, with what it had not completed. */
int gmem_ring_adopt(struct gmem_session *session, struct gmem_ring **ret);
/* One that nobody serves any more: its client is told, and it is freed. */
void gmem_ring_end(struct gmem_ring *ring);
/* A turn. False: there is nothing more to do until the doorbell rings. */
bool gmem_ring_serve(struct gmem_rings *rings, struct gmem_ring *ring);

/* ---- ringop.c: what an entry asks for ---- */

/* Whether it is done in slices. */
bool gmem_ring_op_is_long(const struct gmem_ring_sqe *sqe);
/* Checks a job and begins it. True: it is complete, and cqe says how. */
bool gmem_ring_op_start(struct gmem_session *session, struct gmem_ring_job *job);
/* The next slice of a long one. */
bool gmem_ring_op_step(struct gmem_session *session, struct gmem_ring_job *job);

#endif
