/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "link.h"
#include "ring.h"

#define SECOND_NS 1000000000ull
#define SPIN_NS 20000       /* before a waiter sleeps: a wake-up costs about that */
#define SPIN_LOOKS 64       /* between two yields */
#define LOOK_NS 200000000ull /* how often a sleeper looks whether gmemd is still there */

struct gmem_call {
	struct gmem_ring *ring;         /* not to be used once it is complete: the session may be closed */
	struct gmem_call *next, **prev; /* ring->lock; those under way */
	unsigned refs;                  /* atomic; the ring's, until it is complete, and the caller's. 0: on a stack, and
					 * not to be used once it is complete */
	bool complete;                  /* ring->lock to write; may be read without, acquiring */
	int err;
	gmem_call_fn fn;
	void *arg;
	struct gmem_ring_sqe sqe;
	struct gmem_ring_cqe cqe;
};

struct finished {
	struct finished *next;
	struct gmem_ring *ring;
	struct gmem_done done;
};

struct gmem_ring {
	struct gmem_link *link;
	struct gmem_ring_shared *shared;
	struct gmem_ring_sqe *sqes;
	struct gmem_ring_cqe *cqes;
	uint32_t sq_mask, cq_mask;
	size_t bytes;
	int bell;
	bool spins;
	pthread_mutex_t lock; /* guards what follows */
	pthread_cond_t changed;
	unsigned waiters;     /* on changed */
	bool reaping;         /* one of them sleeps on the completion queue */
	int dead;             /* 0, or why nothing will be complete any more */
	uint32_t sq_tail, cq_head;
	uint32_t sq_head;     /* gmemd's, when it was last looked at */
	struct gmem_call *calls; /* under way */
	struct finished *done, **done_last; /* for gmem_link_next_done() */
};

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * SECOND_NS + (uint64_t)now.tv_nsec;
}

static struct timespec timespec_of(uint64_t ns)
{
	return (struct timespec){ .tv_sec = (time_t)(ns / SECOND_NS), .tv_nsec = (long)(ns % SECOND_NS) };
}

static uint64_t deadline_of(uint64_t timeout_ns)
{
	return timeout_ns > INT64_MAX / 2 ? UINT64_MAX : now_ns() + timeout_ns;
}

static void relax(void)
{
#if defined(__x86_64__)
	__builtin_ia32_pause();
#elif defined(__aarch64__)
	__asm__ volatile("yield");
#endif
}

/* ---- completions ---- */

static void take_out(struct gmem_call *call)
{
	*call->prev = call->next;
	if (call->next)
		call->next->prev = call->prev;
}

static void complete_locked(struct gmem_call *call, int err, const struct gmem_ring_cqe *cqe)
{
	bool counted = call->refs;

	take_out(call);
	call->err = err;
	if (cqe)
		call->cqe = *cqe;
	if (call->fn)
		call->fn(call->arg, &call->sqe, err, cqe);
	__atomic_store_n(&call->complete, true, __ATOMIC_RELEASE);
	if (counted)
		gmem_call_put(call);
}

static void ring_bell(struct gmem_ring *ring)
{
	while (eventfd_write(ring->bell, 1) && errno == EINTR)
		;
}

static bool has_more(const struct gmem_ring *ring)
{
	return __atomic_load_n(&ring->shared->cq_tail, __ATOMIC_ACQUIRE) != ring->cq_head;
}

static bool reap_locked(struct gmem_ring *ring)
{
	uint32_t tail = __atomic_load_n(&ring->shared->cq_tail, __ATOMIC_ACQUIRE);

	if (ring->dead || tail == ring->cq_head)
		return false;
	while (ring->cq_head != tail) {
		struct gmem_ring_cqe cqe = ring->cqes[ring->cq_head++ & ring->cq_mask];

		complete_locked((struct gmem_call *)(uintptr_t)cqe.user_data, 0, &cqe);
	}
	__atomic_store_n(&ring->shared->cq_head, ring->cq_head, __ATOMIC_RELEASE);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (__atomic_load_n(&ring->shared->server_flags, __ATOMIC_RELAXED) & GMEM_RING_FULL)
		ring_bell(ring);
	return true;
}

/* There will be no more completions: everybody hears why. */
static void fail_locked(struct gmem_ring *ring, int err)
{
	reap_locked(ring);
	__atomic_store_n(&ring->dead, err, __ATOMIC_RELEASE);
	while (ring->calls)
		complete_locked(ring->calls, err, NULL);
	syscall(SYS_futex, &ring->shared->cq_tail, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
	pthread_cond_broadcast(&ring->changed);
}

/* ---- waiting ---- */

static bool has_ended(const struct gmem_ring *ring)
{
	const uint32_t ends = GMEM_RING_BROKEN | GMEM_RING_CLOSED;

	return __atomic_load_n(&ring->shared->server_flags, __ATOMIC_ACQUIRE) & ends;
}

static bool spin(struct gmem_ring *ring, uint64_t until)
{
	uint64_t end = now_ns() + SPIN_NS;

	end = end < until ? end : until;
	do {
		for (int i = 0; i < SPIN_LOOKS; i++) {
			if (has_more(ring))
				return true;
			relax();
		}
		sched_yield();
	} while (ring->spins && now_ns() < end);
	return has_more(ring);
}

/* Until there is something to reap, or it is time to look around. Without the lock; cq_head is ours meanwhile. */
static void doze(struct gmem_ring *ring, uint64_t until)
{
	uint64_t now, left;
	struct timespec timeout;

	if (spin(ring, until))
		return;
	now = now_ns();
	left = until > now ? until - now : 0;
	timeout = timespec_of(left < LOOK_NS ? left : LOOK_NS);
	__atomic_store_n(&ring->shared->client_waits, 1, __ATOMIC_RELAXED);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (!has_more(ring) && !__atomic_load_n(&ring->dead, __ATOMIC_ACQUIRE) && !has_ended(ring))
		syscall(SYS_futex, &ring->shared->cq_tail, FUTEX_WAIT, ring->cq_head, &timeout, NULL, 0);
	__atomic_store_n(&ring->shared->client_waits, 0, __ATOMIC_RELAXED);
}

static bool is_over(const struct gmem_ring *ring)
{
	return has_ended(ring) || gmem_link_is_lost(ring->link);
}

/* One step of waiting for whatever the caller waits for: reaps, or sleeps until somebody else has. */
static void pump_locked(struct gmem_ring *ring, uint64_t until)
{
	if (ring->reaping) {
		uint64_t look = now_ns() + LOOK_NS;
		struct timespec at = timespec_of(until < look ? until : look);

		ring->waiters++;
		pthread_cond_timedwait(&ring->changed, &ring->lock, &at);
		ring->waiters--;
		return;
	}
	if (reap_locked(ring) || ring->dead)
		return;
	ring->reaping = true;
	pthread_mutex_unlock(&ring->lock);
	doze(ring, until);
	pthread_mutex_lock(&ring->lock);
	ring->reaping = false;
	if (!reap_locked(ring) && !ring->dead && is_over(ring))
		fail_locked(ring, -ECONNRESET);
	/* also one who is to reap from now on, if this thread goes */
	if (ring->waiters)
		pthread_cond_broadcast(&ring->changed);
}

/* ---- calls ---- */

static bool has_room(struct gmem_ring *ring)
{
	/* gmemd keeps writing that cache line: looked at when it seems to be full */
	if (ring->sq_tail - ring->sq_head > ring->sq_mask)
		ring->sq_head = __atomic_load_n(&ring->shared->sq_head, __ATOMIC_ACQUIRE);
	return ring->sq_tail - ring->sq_head <= ring->sq_mask;
}

static void submit_locked(struct gmem_ring *ring, struct gmem_call *call)
{
	call->prev = &ring->calls;
	call->next = ring->calls;
	if (call->next)
		call->next->prev = &call->next;
	ring->calls = call;
	ring->sqes[ring->sq_tail++ & ring->sq_mask] = call->sqe;
	__atomic_store_n(&ring->shared->sq_tail, ring->sq_tail, __ATOMIC_RELEASE);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (__atomic_load_n(&ring->shared->server_flags, __ATOMIC_RELAXED) & GMEM_RING_SLEEPS)
		ring_bell(ring);
}

/* After waiting for room. */
static int queue(struct gmem_ring *ring, struct gmem_call *call)
{
	int err;

	call->sqe.user_data = (uintptr_t)call;
	pthread_mutex_lock(&ring->lock);
	if (!ring->reaping)
		reap_locked(ring);
	while (!ring->dead && !has_room(ring))
		pump_locked(ring, UINT64_MAX);
	err = ring->dead;
	if (!err)
		submit_locked(ring, call);
	pthread_mutex_unlock(&ring->lock);
	return err;
}

int gmem_call_start(struct gmem_link *link, const struct gmem_ring_sqe *sqe, gmem_call_fn fn, void *arg,
		    struct gmem_call **ret)
{
	struct gmem_call *call;
	int err;

	if (!link->ring)
		return -ENOTCONN;
	call = malloc(sizeof(*call));
	if (!call)
		return -ENOMEM;
	*call = (struct gmem_call){ .ring = link->ring, .refs = 2, .fn = fn, .arg = arg, .sqe = *sqe };
	err = queue(link->ring, call);
	if (err)
		free(call);
	else
		*ret = call;
	return err;
}

void gmem_call_put(struct gmem_call *call)
{
	if (__atomic_sub_fetch(&call->refs, 1, __ATOMIC_ACQ_REL) == 0)
		free(call);
}

static bool is_complete(const struct gmem_call *call)
{
	return __atomic_load_n(&call->complete, __ATOMIC_ACQUIRE);
}

int gmem_call_wait(struct gmem_call *call, uint64_t timeout_ns, struct gmem_ring_cqe *ret)
{
	if (!is_complete(call)) {
		struct gmem_ring *ring = call->ring;
		uint64_t until = deadline_of(timeout_ns);

		pthread_mutex_lock(&ring->lock);
		while (!call->complete) {
			pump_locked(ring, until);
			if (!call->complete && until != UINT64_MAX && now_ns() >= until)
				break;
		}
		pthread_mutex_unlock(&ring->lock);
	}
	if (!is_complete(call))
		return -ETIMEDOUT;
	if (!call->err && ret)
		*ret = call->cqe;
	return call->err;
}

bool gmem_call_poll(struct gmem_call *call)
{
	if (!is_complete(call)) {
		struct gmem_ring *ring = call->ring;

		pthread_mutex_lock(&ring->lock);
		if (!call->complete && !ring->reaping)
			reap_locked(ring);
		pthread_mutex_unlock(&ring->lock);
	}
	return is_complete(call);
}

uint16_t gmem_ring_own_stream(void)
{
	static _Thread_local uint16_t own;

	if (!own)
		own = (uint16_t)(GMEM_STREAM_MAX + 1) | ((uint16_t)gettid() & GMEM_STREAM_MAX);
	return own;
}

int gmem_link_call(struct gmem_link *link, struct gmem_ring_sqe *sqe, uint64_t timeout_ns, struct gmem_ring_cqe *ret,
		   struct gmem_call **ret_call)
{
	struct gmem_call *call;
	int err;

	sqe->stream = gmem_ring_own_stream();
	err = gmem_call_start(link, sqe, NULL, NULL, &call);
	if (err)
		return err;
	err = gmem_call_wait(call, timeout_ns, ret);
	if (err == -ETIMEDOUT)
		*ret_call = call;
	else
		gmem_call_put(call);
	return err;
}

int gmem_ring_call(struct gmem_link *link, struct gmem_ring_sqe *sqe, struct gmem_ring_cqe *ret)
{
	struct gmem_call call = { .ring = link->ring }; /* allocates nothing: an allocator's own requests come here */
	int err;

	if (!link->ring)
		return -ENOTCONN;
	sqe->stream = gmem_ring_own_stream();
	call.sqe = *sqe;
	err = queue(link->ring, &call);
	return err ? err : gmem_call_wait(&call, GMEM_CALL_FOREVER, ret);
}

/* ---- completions for a thread that takes them for others ---- */

static void enqueue(void *arg, const struct gmem_ring_sqe *sqe, int err, const struct gmem_ring_cqe *cqe)
{
	struct finished *finished = arg;
	struct gmem_ring *ring = finished->ring;

	finished->done.err = err;
	finished->done.op = sqe->op;
	if (cqe)
		finished->done.cqe = *cqe;
	*ring->done_last = finished;
	ring->done_last = &finished->next;
}

int gmem_link_start(struct gmem_link *link, const struct gmem_ring_sqe *sqe, uint64_t tag)
{
	struct finished *finished = calloc(1, sizeof(*finished));
	struct gmem_call *call;
	int err;

	if (!finished)
		return -ENOMEM;
	finished->ring = link->ring;
	finished->done.tag = tag;
	err = gmem_call_start(link, sqe, enqueue, finished, &call);
	if (err)
		free(finished);
	else
		gmem_call_put(call);
	return err;
}

int gmem_link_next_done(struct gmem_link *link, uint64_t timeout_ns, struct gmem_done *ret)
{
	struct gmem_ring *ring = link->ring;
	uint64_t until = deadline_of(timeout_ns);
	struct finished *finished;

	if (!ring)
		return -ENOTCONN;
	pthread_mutex_lock(&ring->lock);
	while (!ring->done && !ring->dead && now_ns() < until)
		pump_locked(ring, until);
	finished = ring->done;
	if (finished) {
		ring->done = finished->next;
		if (!ring->done)
			ring->done_last = &ring->done;
	}
	pthread_mutex_unlock(&ring->lock);
	if (!finished)
		return -ETIMEDOUT;
	*ret = finished->done;
	free(finished);
	return 0;
}

void gmem_link_cancel(struct gmem_link *link)
{
	if (!link->ring)
		return;
	pthread_mutex_lock(&link->ring->lock);
	if (!link->ring->dead)
		fail_locked(link->ring, -ECANCELED);
	pthread_mutex_unlock(&link->ring->lock);
}

bool gmem_link_has_ring(const struct gmem_link *link)
{
	return link->ring;
}

/* ---- life ---- */

static int map_ring(struct gmem_ring *ring, int file)
{
	const struct gmem_ring_shared *shared;
	struct stat stat;
	void *at;

	if (fstat(file, &stat))
		return -errno;
	ring->bytes = (size_t)stat.st_size;
	if (ring->bytes < sizeof(*shared))
		return -EPROTO;
	at = mmap(NULL, ring->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
	if (at == MAP_FAILED)
		return -errno;
	madvise(at, ring->bytes, MADV_DONTFORK);
	madvise(at, ring->bytes, MADV_DONTDUMP);
	shared = ring->shared = at;
	if (shared->magic != GMEM_RING_MAGIC || shared->version != GMEM_RING_VERSION)
		return -EPROTO;
	ring->sqes = (void *)((char *)at + shared->sq_offset);
	ring->cqes = (void *)((char *)at + shared->cq_offset);
	ring->sq_mask = shared->sq_entries - 1;
	ring->cq_mask = shared->cq_entries - 1;
	return 0;
}

int gmem_ring_create(struct gmem_link *link, int file, int bell, struct gmem_ring **ret)
{
	struct gmem_ring *ring = calloc(1, sizeof(*ring));
	pthread_condattr_t attributes;
	int err = ring ? map_ring(ring, file) : -ENOMEM;

	close(file);
	if (err) {
		if (ring && ring->shared)
			munmap(ring->shared, ring->bytes);
		close(bell);
		free(ring);
		return err;
	}
	ring->link = link;
	ring->bell = bell;
	ring->spins = sysconf(_SC_NPROCESSORS_ONLN) > 1;
	ring->done_last = &ring->done;
	pthread_mutex_init(&ring->lock, NULL);
	pthread_condattr_init(&attributes);
	pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
	pthread_cond_init(&ring->changed, &attributes);
	pthread_condattr_destroy(&attributes);
	*ret = ring;
	return 0;
}

static void ring_free(struct gmem_ring *ring)
{
	for (struct finished *finished = ring->done, *next; finished; finished = next) {
		next = finished->next;
		free(finished);
	}
	close(ring->bell);
	free(ring);
}

void gmem_ring_destroy(struct gmem_ring *ring)
{
	pthread_mutex_lock(&ring->lock);
	if (!ring->dead)
		fail_locked(ring, -ECANCELED);
	pthread_mutex_unlock(&ring->lock);
	munmap(ring->shared, ring->bytes);
	pthread_cond_destroy(&ring->changed);
	pthread_mutex_destroy(&ring->lock);
	ring_free(ring);
}

int *gmem_ring_bell(struct gmem_ring *ring)
{
	return &ring->bell;
}

void gmem_ring_lock(struct gmem_ring *ring)
{
	pthread_mutex_lock(&ring->lock);
}

void gmem_ring_unlock(struct gmem_ring *ring)
{
	pthread_mutex_unlock(&ring->lock);
}

void gmem_ring_abandon(struct gmem_ring *ring)
{
	/* The mapping was not inherited, and whoever waited is not here. */
	while (ring->calls) {
		struct gmem_call *call = ring->calls;
		bool counted = call->refs; /* else it is on the stack of a thread that is not here */

		take_out(call);
		call->err = -ECANCELED;
		call->complete = true;
		if (counted)
			gmem_call_put(call);
	}
	ring_free(ring);
}
