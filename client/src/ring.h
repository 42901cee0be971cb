/* SPDX-License-Identifier: Apache-2.0
 *
 * The client's end of a session's ring (gmem_wire.h). Any number of threads submit and wait; one of those that wait
 * reaps for all, spinning a moment and then in a futex. Nothing is reaped while nobody waits, polls or submits.
 */
#ifndef GMEM_CLIENT_RING_H
#define GMEM_CLIENT_RING_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <gmem_wire.h>

#define GMEM_STREAM_MAX 0x7fff /* beyond are those of synchronous calls, one for each thread */
#define GMEM_CALL_FOREVER UINT64_MAX

struct gmem_link;
struct gmem_ring;
struct gmem_call; /* a request under way */

/* Called once, under the ring's lock: a completion, or -errno if there will be none. */
typedef void (*gmem_call_fn)(void *arg, const struct gmem_ring_sqe *sqe, int err, const struct gmem_ring_cqe *cqe);

/* Takes both descriptors in every case. */
int gmem_ring_create(struct gmem_link *link, int file, int bell, struct gmem_ring **ret);
/* Requests under way fail with -ECANCELED. */
void gmem_ring_destroy(struct gmem_ring *ring);

/* Around a fork: held by the parent; the child drops its copy. */
void gmem_ring_lock(struct gmem_ring *ring);
void gmem_ring_unlock(struct gmem_ring *ring);
void gmem_ring_abandon(struct gmem_ring *ring);

/* Where its descriptor is, for who moves it to another number. */
int *gmem_ring_bell(struct gmem_ring *ring);

/* The stream of this thread's synchronous calls. */
uint16_t gmem_ring_own_stream(void);

/* Queues a request, after waiting for room. fn: NULL if somebody will gmem_call_wait(). -ENOTCONN: the link has no
 * ring; -ECONNRESET: gmemd is gone. The call is the caller's, to be put. */
int gmem_call_start(struct gmem_link *link, const struct gmem_ring_sqe *sqe, gmem_call_fn fn, void *arg,
		    struct gmem_call **ret);
/* 0: it is complete, and ret says how. -ETIMEDOUT, -ECONNRESET, -ECANCELED. */
int gmem_call_wait(struct gmem_call *call, uint64_t timeout_ns, struct gmem_ring_cqe *ret);
/* Whether gmem_call_wait() would return at once. */
bool gmem_call_poll(struct gmem_call *call);
/* A call that is not complete goes on. */
void gmem_call_put(struct gmem_call *call);

/* Start and wait, on the thread's own stream. */
int gmem_ring_call(struct gmem_link *link, struct gmem_ring_sqe *sqe, struct gmem_ring_cqe *ret);

/* The same, for callers that look around meanwhile: -ETIMEDOUT and the call, after timeout_ns. */
int gmem_link_call(struct gmem_link *link, struct gmem_ring_sqe *sqe, uint64_t timeout_ns, struct gmem_ring_cqe *ret,
		   struct gmem_call **ret_call);

/* ---- for a thread that takes completions for others (Python) ---- */

struct gmem_done {
	uint64_t tag;
	int32_t err;  /* 0: cqe is valid */
	uint32_t op;
	struct gmem_ring_cqe cqe;
};

/* Like gmem_call_start(), for gmem_link_next_done(). */
int gmem_link_start(struct gmem_link *link, const struct gmem_ring_sqe *sqe, uint64_t tag);
/* -ETIMEDOUT: none within the time. */
int gmem_link_next_done(struct gmem_link *link, uint64_t timeout_ns, struct gmem_done *ret);
/* Everything under way, and whatever comes later, fails with -ECANCELED. */
void gmem_link_cancel(struct gmem_link *link);
bool gmem_link_has_ring(const struct gmem_link *link);

/* ---- words.c ---- */

/* Name of the argument that a failure is about; NULL if none. */
const char *gmem_ring_argument(uint32_t blame);
/* A sentence on a failure, argument first. */
void gmem_ring_words(uint32_t op, const struct gmem_ring_cqe *cqe, char *ret, size_t capacity);

#endif
