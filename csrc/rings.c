/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <gmem/internal.h>
#include <gmem/memfd.h>
#include <gmem/ring.h>

#define STOP_TOKEN UINT64_MAX

static void enqueue_locked(struct gmem_rings *rings, struct gmem_ring *ring)
{
	ring->state = GMEM_RING_QUEUED;
	ring->rung = false;
	ring->next = NULL;
	*rings->last = ring;
	rings->last = &ring->next;
	atomic_fetch_add(&rings->queued, 1);
}

static void dequeue_locked(struct gmem_rings *rings, struct gmem_ring **at)
{
	struct gmem_ring *ring = *at;

	*at = ring->next;
	if (rings->last == &ring->next)
		rings->last = at;
	atomic_fetch_sub(&rings->queued, 1);
}

/* One user's rings leave a thread for the others'. */
static bool has_its_share_locked(struct gmem_rings *rings, const struct gmem_ring *ring)
{
	uint32_t count = 0;

	for (uint32_t i = 0; i < GMEM_RING_THREADS; i++)
		count += rings->serving[i] && rings->serving[i]->session->uid == ring->session->uid;
	return count >= GMEM_RING_THREADS - 1;
}

static struct gmem_ring *next_locked(struct gmem_rings *rings)
{
	for (struct gmem_ring **at = &rings->first; *at; at = &(*at)->next)
		if (!has_its_share_locked(rings, *at)) {
			struct gmem_ring *ring = *at;

			dequeue_locked(rings, at);
			ring->state = GMEM_RING_SERVED;
			return ring;
		}
	return NULL;
}

static void bell_locked(struct gmem_rings *rings, uint64_t token)
{
	const struct gmem_ring_slot *slot = &rings->slots[token & 0xffffffff];

	if (slot->generation != token >> 32 || !slot->ring)
		return;
	if (slot->ring->state == GMEM_RING_IDLE)
		enqueue_locked(rings, slot->ring);
	else
		slot->ring->rung = true;
}

/* Waits for a doorbell if there is nothing else to do; a busy thread looks only when no other one listens. False: the
 * end. */
static bool listen_locked(struct gmem_rings *rings, bool idle)
{
	struct epoll_event event;
	int n;

	if (!idle && rings->sleeping)
		return true;
	rings->sleeping += idle;
	gmem_mutex_unlock(&rings->lock);
	n = epoll_wait(rings->epoll_fd, &event, 1, idle ? -1 : 0);
	gmem_mutex_lock(&rings->lock);
	rings->sleeping -= idle;
	if (n <= 0)
		return true;
	if (event.data.u64 == STOP_TOKEN)
		return false;
	bell_locked(rings, event.data.u64);
	return true;
}

static void *ring_thread(void *arg)
{
	struct gmem_core *core = arg;
	struct gmem_rings *rings = core->rings;
	struct gmem_ring *ring = NULL;
	uint32_t me;

	pthread_setname_np(pthread_self(), "gmem-ring");
	gmem_duty_enlist(core, GMEM_ROLE_RING);
	gmem_mutex_lock(&rings->lock);
	me = rings->thread_count++;
	while (listen_locked(rings, !ring)) {
		bool more;

		ring = next_locked(rings);
		if (!ring)
			continue;
		rings->serving[me] = ring;
		gmem_mutex_unlock(&rings->lock);
		gmem_duty_begin(GMEM_DOING_REQUESTS, ring->session->id, 0);
		more = gmem_ring_serve(rings, ring);
		gmem_duty_end();
		gmem_mutex_lock(&rings->lock);
		rings->serving[me] = NULL;
		ring->state = GMEM_RING_IDLE;
		if ((more || ring->rung) && !atomic_load(&ring->closed))
			enqueue_locked(rings, ring);
		pthread_cond_broadcast(&rings->turned);
	}
	gmem_mutex_unlock(&rings->lock);
	gmem_duty_leave(core);
	return NULL;
}

int gmem_rings_start(struct gmem_core *core)
{
	struct epoll_event event = { .events = EPOLLIN, .data.u64 = STOP_TOKEN };
	struct gmem_rings *rings = calloc(1, sizeof(*rings));
	int err = 0;

	if (!rings)
		return -ENOMEM;
	core->rings = rings;
	rings->last = &rings->first;
	rings->spins = sysconf(_SC_NPROCESSORS_ONLN) > 1;
	gmem_mutex_init(&rings->lock, GMEM_RANK_RING);
	pthread_cond_init(&rings->turned, NULL);
	rings->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	rings->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (rings->epoll_fd < 0 || rings->stop_fd < 0 ||
	    epoll_ctl(rings->epoll_fd, EPOLL_CTL_ADD, rings->stop_fd, &event))
		err = -errno;
	for (; !err && rings->started < GMEM_RING_THREADS; rings->started += !err)
		err = -pthread_create(&rings->threads[rings->started], NULL, ring_thread, core);
	if (err)
		gmem_rings_stop(core);
	return err;
}

void gmem_rings_stop(struct gmem_core *core)
{
	struct gmem_rings *rings = core->rings;
	uint64_t one = 1;

	if (write(rings->stop_fd, &one, sizeof(one)) < 0) {
		/* the counter is not 0, so the threads stop all the same */
	}
	while (rings->started)
		pthread_join(rings->threads[--rings->started], NULL);
	close(rings->epoll_fd);
	close(rings->stop_fd);
	gmem_mutex_deinit(&rings->lock);
	pthread_cond_destroy(&rings->turned);
	free(rings);
	core->rings = NULL;
}

/* ---- a session's ---- */

static int enter_locked(struct gmem_rings *rings, struct gmem_ring *ring)
{
	struct epoll_event event = { .events = EPOLLIN | EPOLLET };
	struct gmem_ring_slot *slot;

	if (!rings->slots_free && rings->slots_used == GMEM_RINGS_MAX)
		return -ENFILE;
	ring->slot = rings->slots_free ? rings->slots_free - 1 : rings->slots_used;
	slot = &rings->slots[ring->slot];
	/* The counter only ever grows; each write is an edge. */
	event.data.u64 = (uint64_t)slot->generation << 32 | ring->slot;
	if (epoll_ctl(rings->epoll_fd, EPOLL_CTL_ADD, ring->bell, &event))
		return -errno;
	if (rings->slots_free)
		rings->slots_free = slot->next_free;
	else
		rings->slots_used++;
	slot->ring = ring;
	return 0;
}

int gmem_session_ring(struct gmem_core *core, uint64_t id, int ret_fds[2])
{
	struct gmem_session *session = gmem_session_get(core, id);
	struct gmem_ring *made = NULL;
	int err;

	if (!session)
		return -ENOENT;
	err = gmem_ring_create(session, &made);
	gmem_mutex_lock(&core->rings->lock);
	if (!err && atomic_load(&session->closed))
		err = -ENOENT;
	if (!err && !session->ring) {
		err = gmem_ring_keep(made);
		if (!err)
			err = enter_locked(core->rings, made);
		if (!err) {
			session->ring = made;
			made = NULL;
		} else {
			gmem_ring_forget(made);
		}
	}
	if (!err) {
		ret_fds[0] = session->ring->file->fd;
		ret_fds[1] = session->ring->bell;
	}
	gmem_mutex_unlock(&core->rings->lock);
	if (made)
		gmem_ring_destroy(made);
	gmem_session_unref(session);
	return err;
}

void gmem_ring_close(struct gmem_session *session)
{
	struct gmem_rings *rings = session->core->rings;
	struct gmem_ring *ring;

	gmem_mutex_lock(&rings->lock);
	ring = session->ring;
	session->ring = NULL;
	if (ring) {
		struct gmem_ring_slot *slot = &rings->slots[ring->slot];

		atomic_store(&ring->closed, true);
		epoll_ctl(rings->epoll_fd, EPOLL_CTL_DEL, ring->bell, NULL);
		slot->ring = NULL;
		slot->generation++;
		slot->next_free = rings->slots_free;
		rings->slots_free = ring->slot + 1;
		while (ring->state == GMEM_RING_SERVED)
			gmem_mutex_wait(&rings->lock, &rings->turned, 0);
		for (struct gmem_ring **at = &rings->first; ring->state == GMEM_RING_QUEUED && *at; at = &(*at)->next)
			if (*at == ring) {
				dequeue_locked(rings, at);
				break;
			}
	}
	gmem_mutex_unlock(&rings->lock);
	if (ring)
		gmem_ring_end(ring);
}

void gmem_ring_resume(struct gmem_session *session)
{
	struct gmem_rings *rings = session->core->rings;
	struct gmem_ring *ring;
	uint64_t one = 1;

	if (gmem_ring_adopt(session, &ring))
		return;
	gmem_mutex_lock(&rings->lock);
	if (!enter_locked(rings, ring)) {
		session->ring = ring;
		enqueue_locked(rings, ring);
		if (write(ring->bell, &one, sizeof(one)) < 0) { /* the threads sleep until a bell rings */
			/* its counter is full, so it rings anyhow */
		}
	}
	gmem_mutex_unlock(&rings->lock);
}
