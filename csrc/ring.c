/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <gmem/crash.h>
#include <gmem/internal.h>
#include <gmem/memfd.h>
#include <gmem/ring.h>

#define TURN_NS 1000000     /* then it is another ring's turn */
#define CLOSE_NS 200000     /* a request so soon after the last: the next one may be as well */
#define LINGER_NS 20000     /* so long it is waited for without sleeping: a wake-up costs about that */
#define LINGER_LOOKS 64     /* between two yields */
#define RETRY_NAP_NS 50000

/* ---- the two queues ---- */

static struct gmem_ring_sqe *sq_entry(const struct gmem_ring *ring, uint32_t i)
{
	return (struct gmem_ring_sqe *)((uint8_t *)ring->shared + GMEM_RING_SQ_OFFSET) + i % GMEM_RING_SQ_ENTRIES;
}

static struct gmem_ring_cqe *cq_entry(const struct gmem_ring *ring, uint32_t i)
{
	return (struct gmem_ring_cqe *)((uint8_t *)ring->shared + GMEM_RING_CQ_OFFSET) + i % GMEM_RING_CQ_ENTRIES;
}

static void set_flags(struct gmem_ring *ring, uint32_t flags)
{
	ring->flags = flags;
	__atomic_store_n(&ring->shared->server_flags, flags, __ATOMIC_SEQ_CST);
}

static void wake_client(struct gmem_ring *ring)
{
	syscall(SYS_futex, &ring->shared->cq_tail, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

/* Completions are visible at once to a client that spins; one that sleeps is woken for many at a time. */
static void tell_client(struct gmem_ring *ring)
{
	if (ring->told == ring->cq_tail)
		return;
	ring->told = ring->cq_tail;
	atomic_thread_fence(memory_order_seq_cst);
	if (__atomic_load_n(&ring->shared->client_waits, __ATOMIC_RELAXED))
		wake_client(ring);
}

static void break_ring(struct gmem_ring *ring)
{
	if (ring->broken)
		return;
	ring->broken = true;
	gmem_count(&ring->session->core->stats.ring_errors, 1);
	set_flags(ring, GMEM_RING_BROKEN);
	wake_client(ring);
}

static void look_at_cq_head(struct gmem_ring *ring)
{
	ring->cq_head = __atomic_load_n(&ring->shared->cq_head, __ATOMIC_ACQUIRE);
	if (ring->cq_tail - ring->cq_head > GMEM_RING_CQ_ENTRIES)
		break_ring(ring);
}

static uint32_t room(const struct gmem_ring *ring)
{
	uint32_t used = ring->cq_tail - ring->cq_head + ring->job_count;

	/* more than all, if the client takes back what it has read */
	return used < GMEM_RING_CQ_ENTRIES ? GMEM_RING_CQ_ENTRIES - used : 0;
}

/* How many entries can be taken: as many as were submitted, and have room for their completions. The client's head is
 * another cache line that it keeps writing: looked at when there seems to be little room. */
static uint32_t takeable(struct gmem_ring *ring, bool *ret_full)
{
	uint32_t waiting = __atomic_load_n(&ring->shared->sq_tail, __ATOMIC_ACQUIRE) - ring->sq_head, most;

	*ret_full = false;
	if (waiting > GMEM_RING_SQ_ENTRIES)
		break_ring(ring);
	most = room(ring);
	if (waiting > most) {
		look_at_cq_head(ring);
		most = room(ring);
	}
	if (ring->broken)
		return 0;
	*ret_full = waiting && !most;
	return waiting < most ? waiting : most;
}

static void log_taken(struct gmem_ring *ring, const struct gmem_ring_job *job)
{
	size_t i = (size_t)(job - ring->jobs);

	if (!ring->log)
		return;
	ring->log->entries[i].sq_index = job->sq_index;
	atomic_store_explicit(&ring->log->entries[i].hold_record, 0, memory_order_relaxed);
	memcpy(&ring->log->entries[i].sqe, &job->sqe, sizeof(job->sqe));
	atomic_store_explicit(&ring->log->entries[i].state, GMEM_RING_LOG_TAKEN, memory_order_release);
}

static void log_state(struct gmem_ring *ring, uint8_t index, enum gmem_ring_log_state state)
{
	if (!ring->log)
		return;
	ring->log->entries[index].cq_index = ring->cq_tail;
	atomic_store_explicit(&ring->log->entries[index].state, state, memory_order_release);
}

void gmem_ring_note_hold(struct gmem_ring *ring, const struct gmem_ring_job *job, struct gmem_hold_name hold)
{
	size_t i = (size_t)(job - ring->jobs);

	if (!ring->log)
		return;
	ring->log->entries[i].hold_asked = hold.asked;
	atomic_store_explicit(&ring->log->entries[i].hold_record, hold.record, memory_order_release);
}

static bool take(struct gmem_ring *ring)
{
	bool full;
	uint32_t count = takeable(ring, &full), left = GMEM_RING_JOBS - ring->job_count;

	count = count < left ? count : left;
	for (uint32_t i = 0; i < count; i++) {
		struct gmem_ring_job *job = &ring->jobs[ring->order[ring->job_count++]];

		memcpy(&job->sqe, sq_entry(ring, ring->sq_head++), sizeof(job->sqe));
		__asm__ volatile("" ::: "memory"); /* nothing is read from there again */
		job->running = job->again = false;
		job->hold.record = 0;
		job->sq_index = ring->sq_head - 1;
		log_taken(ring, job);
	}
	if (count)
		gmem_crash(GMEM_CRASH_RING_TAKEN);
	if (count)
		__atomic_store_n(&ring->shared->sq_head, ring->sq_head, __ATOMIC_RELEASE);
	return count;
}

/* ---- jobs ---- */

static struct gmem_ring_job *job_at(struct gmem_ring *ring, uint32_t i)
{
	return &ring->jobs[ring->order[i]];
}

static void complete(struct gmem_ring *ring, uint32_t i)
{
	struct gmem_ring_job *job = job_at(ring, i);
	uint8_t index = ring->order[i];

	log_state(ring, index, GMEM_RING_LOG_COMPLETES);
	gmem_crash(GMEM_CRASH_RING_COMPLETES);
	memcpy(cq_entry(ring, ring->cq_tail++), &job->cqe, sizeof(job->cqe));
	__atomic_store_n(&ring->shared->cq_tail, ring->cq_tail, __ATOMIC_RELEASE);
	gmem_crash(GMEM_CRASH_RING_COMPLETED);
	log_state(ring, index, GMEM_RING_LOG_FREE);
	ring->running -= job->running;
	ring->job_count--;
	memmove(&ring->order[i], &ring->order[i + 1], ring->job_count - i);
	ring->order[ring->job_count] = index;
	gmem_count(&ring->session->core->stats.ring_requests, 1);
}

static bool has_to_wait(struct gmem_ring *ring, uint32_t i)
{
	const struct gmem_ring_sqe *sqe = &job_at(ring, i)->sqe;

	if (ring->running == GMEM_RING_LANES && gmem_ring_op_is_long(sqe))
		return true;
	for (uint32_t before = 0; before < i; before++)
		if (job_at(ring, before)->sqe.stream == sqe->stream)
			return true;
	return false;
}

static void start_jobs(struct gmem_ring *ring)
{
	for (uint32_t i = 0; i < ring->job_count && !atomic_load_explicit(&ring->closed, memory_order_relaxed);) {
		struct gmem_ring_job *job = job_at(ring, i);

		if (job->running || has_to_wait(ring, i)) {
			i++;
		} else if (gmem_ring_op_start(ring->session, job)) {
			complete(ring, i);
		} else {
			job->running = true;
			ring->running++;
			i++;
		}
	}
}

/* A slice of each. */
static void step_jobs(struct gmem_ring *ring)
{
	for (uint32_t i = 0; i < ring->job_count && !atomic_load_explicit(&ring->closed, memory_order_relaxed);) {
		struct gmem_ring_job *job = job_at(ring, i);

		if (job->running && gmem_ring_op_step(ring->session, job))
			complete(ring, i);
		else
			i++;
		tell_client(ring);
	}
}

/* All that is under way waits for somebody else's release. */
static bool only_retries(struct gmem_ring *ring)
{
	for (uint32_t i = 0; i < ring->job_count; i++)
		if (job_at(ring, i)->running && !job_at(ring, i)->retry_ns)
			return false;
	return ring->running;
}

/* ---- a turn ---- */

/* Waits a moment for the next request, if the last ones came quickly and nobody else waits. */
static bool linger(struct gmem_rings *rings, struct gmem_ring *ring)
{
	uint64_t until = ring->served_ns + LINGER_NS;
	bool full;

	while (ring->lingers && rings->spins) {
		for (int i = 0; i < LINGER_LOOKS; i++) {
			if (takeable(ring, &full))
				return true;
			gmem_cpu_relax();
		}
		if (ring->broken || atomic_load(&ring->closed) || atomic_load(&rings->queued))
			return false;
		ring->lingers = gmem_now_ns() < until;
		sched_yield();
	}
	return false;
}

static bool fall_asleep(struct gmem_ring *ring)
{
	uint32_t count;
	bool full;

	takeable(ring, &full);
	for (;;) {
		if (ring->broken)
			return true;
		set_flags(ring, GMEM_RING_SLEEPS | (full ? GMEM_RING_FULL : 0));
		atomic_thread_fence(memory_order_seq_cst);
		count = takeable(ring, &full);
		if (!count && full == !!(ring->flags & GMEM_RING_FULL))
			return true;
		if (count) {
			set_flags(ring, 0);
			return false;
		}
	}
}

bool gmem_ring_serve(struct gmem_rings *rings, struct gmem_ring *ring)
{
	const struct timespec nap = { 0, RETRY_NAP_NS };
	uint64_t start = gmem_now_ns();

	if (ring->broken)
		return false;
	if (ring->flags)
		set_flags(ring, 0);
	look_at_cq_head(ring);
	if (start - ring->served_ns < CLOSE_NS)
		ring->lingers = true;
	while (!ring->broken && !atomic_load(&ring->closed)) {
		bool took = take(ring);

		start_jobs(ring);
		tell_client(ring);
		step_jobs(ring);
		if (took || ring->job_count) {
			ring->served_ns = gmem_now_ns();
			if (ring->served_ns - start > TURN_NS)
				return true;
		} else if (!linger(rings, ring) && fall_asleep(ring)) {
			return false;
		}
		if (only_retries(ring)) {
			if (atomic_load(&rings->queued))
				return true;
			nanosleep(&nap, NULL);
		}
	}
	return false;
}

/* ---- making, ending ---- */

static int map_shared(struct gmem_ring *ring)
{
	void *at = mmap(NULL, GMEM_RING_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, ring->file->fd, 0);

	if (at == MAP_FAILED)
		return -errno;
	madvise(at, GMEM_RING_BYTES, MADV_DONTFORK);
	ring->shared = at;
	return 0;
}

static int map_log(struct gmem_ring *ring)
{
	void *at = mmap(NULL, sizeof(*ring->log), PROT_READ | PROT_WRITE, MAP_SHARED, ring->log_file->fd, 0);

	if (at == MAP_FAILED)
		return -errno;
	ring->log = at;
	return 0;
}

static void fill_shared(struct gmem_ring *ring)
{
	*ring->shared = (struct gmem_ring_shared){
		.magic = GMEM_RING_MAGIC, .version = GMEM_RING_VERSION,
		.sq_entries = GMEM_RING_SQ_ENTRIES, .cq_entries = GMEM_RING_CQ_ENTRIES,
		.sq_offset = GMEM_RING_SQ_OFFSET, .cq_offset = GMEM_RING_CQ_OFFSET,
		.server_flags = GMEM_RING_SLEEPS,
	};
	ring->flags = GMEM_RING_SLEEPS;
}

int gmem_ring_keep(struct gmem_ring *ring)
{
	struct gmem_keep *keep = &ring->session->core->keep;
	unsigned long long id = ring->session->id;
	int err;

	if (!gmem_keeps(keep))
		return 0;
	err = gmem_file_create("gmem-jobs", GMEM_CLASS_SMALL, sizeof(*ring->log), id, &ring->log_file);
	if (!err)
		err = map_log(ring);
	if (!err)
		err = gmem_keep_fd(keep, ring->log_file->fd, "jobs.%llu", id);
	if (!err)
		err = gmem_keep_fd(keep, ring->file->fd, "ring.%llu", id);
	return err ? err : gmem_keep_fd(keep, ring->bell, "bell.%llu", id);
}

void gmem_ring_forget(struct gmem_ring *ring)
{
	static const char *const names[] = { "jobs.%llu", "ring.%llu", "bell.%llu" };
	struct gmem_keep *keep = &ring->session->core->keep;
	unsigned long long id = ring->session->id;

	gmem_keep_forget(keep, names[0], id);
	gmem_keep_forget(keep, names[1], id);
	gmem_keep_forget(keep, names[2], id);
}

void gmem_ring_destroy(struct gmem_ring *ring)
{
	if (ring->shared)
		munmap(ring->shared, GMEM_RING_BYTES);
	if (ring->log)
		munmap(ring->log, sizeof(*ring->log));
	gmem_file_unref(ring->log_file);
	if (ring->bell >= 0)
		close(ring->bell);
	gmem_file_unref(ring->file);
	free(ring);
}

void gmem_ring_end(struct gmem_ring *ring)
{
	set_flags(ring, GMEM_RING_CLOSED);
	wake_client(ring);
	gmem_ring_forget(ring);
	gmem_ring_destroy(ring);
}

int gmem_ring_create(struct gmem_session *session, struct gmem_ring **ret)
{
	struct gmem_ring *ring = calloc(1, sizeof(*ring));
	int err;

	if (!ring)
		return -ENOMEM;
	ring->session = session;
	ring->bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	for (uint8_t i = 0; i < GMEM_RING_JOBS; i++)
		ring->order[i] = i;
	err = ring->bell < 0 ? -errno : 0;
	if (!err)
		err = gmem_file_create("gmem-ring", GMEM_CLASS_SMALL, GMEM_RING_BYTES, session->id, &ring->file);
	if (!err)
		err = map_shared(ring);
	if (!err)
		fill_shared(ring);
	if (err)
		gmem_ring_destroy(ring);
	else
		*ret = ring;
	return err;
}

/* ---- a predecessor's ---- */

/* What was taken and not completed, oldest first. The words in shared memory may be anything: who changes them has lost
 * requests of his own, and the bounds are checked at each look. */
static void redo(struct gmem_ring *ring)
{
	ring->sq_head = __atomic_load_n(&ring->shared->sq_head, __ATOMIC_ACQUIRE);
	ring->cq_tail = __atomic_load_n(&ring->shared->cq_tail, __ATOMIC_ACQUIRE);
	for (uint8_t i = 0; i < GMEM_RING_JOBS; i++) {
		uint32_t state = atomic_load(&ring->log->entries[i].state), at = ring->log->entries[i].sq_index, place;

		if (state == GMEM_RING_LOG_COMPLETES && (int32_t)(ring->log->entries[i].cq_index - ring->cq_tail) < 0)
			state = GMEM_RING_LOG_FREE; /* the client has it */
		if (state == GMEM_RING_LOG_FREE) {
			atomic_store(&ring->log->entries[i].state, GMEM_RING_LOG_FREE);
			continue;
		}
		memcpy(&ring->jobs[i].sqe, &ring->log->entries[i].sqe, sizeof(ring->jobs[i].sqe));
		ring->jobs[i].again = true;
		ring->jobs[i].hold = (struct gmem_hold_name){ atomic_load(&ring->log->entries[i].hold_record),
							      0, ring->log->entries[i].hold_asked };
		ring->jobs[i].sq_index = at;
		if ((int32_t)(at + 1 - ring->sq_head) > 0)
			ring->sq_head = at + 1;
		for (place = ring->job_count++; place && (int32_t)(ring->log->entries[ring->order[place - 1]].sq_index - at) > 0; place--)
			ring->order[place] = ring->order[place - 1];
		ring->order[place] = i;
	}
	__atomic_store_n(&ring->shared->sq_head, ring->sq_head, __ATOMIC_RELEASE);
}

/* order[] behind the jobs: the indices that are free. */
static void list_free(struct gmem_ring *ring)
{
	uint32_t next = ring->job_count;

	for (uint8_t i = 0; i < GMEM_RING_JOBS; i++)
		if (atomic_load(&ring->log->entries[i].state) == GMEM_RING_LOG_FREE)
			ring->order[next++] = i;
}

static int adopt(struct gmem_session *session, const int fds[3], struct gmem_ring *ring)
{
	int err;

	ring->session = session;
	ring->bell = fds[1];
	err = gmem_file_adopt(fds[0], GMEM_CLASS_SMALL, GMEM_RING_BYTES, session->id, &ring->file);
	if (!err)
		err = gmem_file_adopt(fds[2], GMEM_CLASS_SMALL, sizeof(*ring->log), session->id, &ring->log_file);
	if (!err)
		err = map_shared(ring);
	return err ? err : map_log(ring);
}

int gmem_ring_adopt(struct gmem_session *session, struct gmem_ring **ret)
{
	struct gmem_keep *keep = &session->core->keep;
	unsigned long long id = session->id;
	int fds[3] = { gmem_keep_take(keep, "ring.%llu", id), gmem_keep_take(keep, "bell.%llu", id),
		       gmem_keep_take(keep, "jobs.%llu", id) };
	struct gmem_ring *ring = calloc(1, sizeof(*ring));

	if (!ring || fds[0] < 0 || fds[1] < 0 || fds[2] < 0 || adopt(session, fds, ring)) {
		free(ring); /* it had not come to the client */
		return -ENOENT;
	}
	redo(ring);
	list_free(ring);
	set_flags(ring, 0);
	ring->told = ring->cq_tail;
	wake_client(ring);
	*ret = ring;
	return 0;
}
