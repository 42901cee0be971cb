/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <time.h>

#include <gmem/evict.h>
#include <gmem/internal.h>
#include <gmem/migrate.h>
#include <gmem/reclaim.h>

#define PRESSURE_NS 50000000ull /* how long after a full hnode room is still made ahead */
#define TELL_NS 1000000000ull   /* how often an hnode under pressure says so */
#define BATCH_BYTES (4ull << 20)
#define EMPTY_TRIES 16
#define DRAIN_TRIES 20000
#define DRAIN_PAUSE_NS 100000

/* The list: head is newest, next leads towards older pages, prev towards newer ones. */
void gmem_sieve_insert(struct gmem_hnode *hnode, uint32_t frame)
{
	struct gmem_frame *frames = hnode->frames;

	frames[frame].prev = GMEM_FRAME_NONE;
	frames[frame].next = hnode->head;
	if (hnode->head)
		frames[hnode->head].prev = frame;
	else
		hnode->tail = frame;
	hnode->head = frame;
}

void gmem_sieve_remove(struct gmem_hnode *hnode, uint32_t frame)
{
	struct gmem_frame *frames = hnode->frames;

	if (hnode->hand == frame)
		hnode->hand = frames[frame].prev;
	if (frames[frame].prev)
		frames[frames[frame].prev].next = frames[frame].next;
	else
		hnode->head = frames[frame].next;
	if (frames[frame].next)
		frames[frames[frame].next].prev = frames[frame].prev;
	else
		hnode->tail = frames[frame].prev;
}

void gmem_sieve_next_is(struct gmem_hnode *hnode, uint32_t frame)
{
	hnode->hand = frame;
}

uint32_t gmem_sieve_next(struct gmem_hnode *hnode)
{
	uint32_t frame = hnode->hand ? hnode->hand : hnode->tail;

	/* Each step clears a mark, so the second round ends at the latest. */
	while (frame && atomic_exchange_explicit(&hnode->frames[frame].visited, 0, memory_order_relaxed)) {
		frame = hnode->frames[frame].prev;
		if (!frame)
			frame = hnode->tail;
	}
	hnode->hand = frame ? hnode->frames[frame].prev : GMEM_FRAME_NONE;
	return frame;
}

/* The next candidate, with a reference on its object; false if there is none. */
static bool candidate(struct gmem_hnode *hnode, struct gmem_object **ret_object, uint64_t *ret_index)
{
	bool found = false;
	uint32_t frame;

	gmem_mutex_lock(&hnode->lock);
	frame = gmem_sieve_next(hnode);
	if (frame && gmem_object_tryref(hnode->frames[frame].object)) {
		*ret_object = hnode->frames[frame].object;
		*ret_index = hnode->frames[frame].index;
		found = true;
	}
	gmem_mutex_unlock(&hnode->lock);
	return found;
}

/* Candidates of bytes in all, locked, with references on their objects. *ret_busy: there were some not to be had. */
static size_t gather(struct gmem_hnode *hnode, uint64_t bytes, struct gmem_page *pages, bool *ret_busy)
{
	uint64_t gathered = 0;
	size_t n = 0;

	for (size_t tries = 0; gathered < bytes && tries < GMEM_EVICT_BATCH; tries++) {
		struct gmem_object *object;
		uint64_t index;

		if (!candidate(hnode, &object, &index))
			break; /* empty, or its object is just being freed */
		if (gmem_page_trylock(object, index, false, &pages[n])) {
			gmem_object_unref(object);
			*ret_busy = true;
		} else {
			gathered += pages[n++].bytes;
		}
	}
	return n;
}

static int evict(struct gmem_hnode *hnode, struct gmem_page *pages, size_t count, bool forced)
{
	struct gmem_object *objects[GMEM_EVICT_BATCH];
	int err;

	for (size_t i = 0; i < count; i++)
		objects[i] = pages[i].object;
	err = gmem_evict(hnode, pages, count, forced);
	for (size_t i = 0; i < count; i++)
		gmem_object_unref(objects[i]);
	return err;
}

static uint64_t frames_made(struct gmem_hnode *hnode)
{
	uint64_t frames;

	gmem_mutex_lock(&hnode->lock);
	frames = hnode->frames_bumped;
	gmem_mutex_unlock(&hnode->lock);
	return frames;
}

int gmem_reclaim(struct gmem_hnode *hnode, uint64_t bytes)
{
	struct gmem_page pages[GMEM_EVICT_BATCH];
	uint64_t tries = 0, empty = 0, room;
	bool busy = false;
	int last = -ENOMEM;

	if (bytes > gmem_counter(&hnode->limit_bytes))
		return -ENOMEM;
	while ((room = gmem_hnode_free_bytes(hnode)) < bytes) {
		uint64_t need = bytes - room < BATCH_BYTES ? bytes - room : BATCH_BYTES;
		size_t count = gather(hnode, need, pages, &busy);
		int err;

		if (!count && empty++ > EMPTY_TRIES)
			return -EAGAIN;
		err = evict(hnode, pages, count, false);
		if (err == -EBUSY || err == -EAGAIN)
			busy = true;
		else if (err == -ENOMEM)
			return -ENOMEM; /* nowhere to put it: the others would fare no better */
		else if (err && err != -EPERM)
			last = err;
		tries += count ? count : 1;
		if (tries > 2 * frames_made(hnode))
			return busy ? -EAGAIN : last;
	}
	return 0;
}

static void pause_ns(long ns)
{
	struct timespec t = { 0, ns };

	nanosleep(&t, NULL);
}

static bool is_empty(struct gmem_hnode *hnode)
{
	bool empty;

	gmem_mutex_lock(&hnode->lock);
	empty = !hnode->used_bytes;
	gmem_mutex_unlock(&hnode->lock);
	return empty;
}

int gmem_reclaim_drain(struct gmem_hnode *hnode)
{
	int err = 0;

	for (int tries = 0; tries < DRAIN_TRIES; tries++) {
		struct gmem_page page;
		bool busy = false;

		if (is_empty(hnode))
			return 0;
		if (!gather(hnode, 1, &page, &busy)) {
			pause_ns(DRAIN_PAUSE_NS);
			continue;
		}
		err = evict(hnode, &page, 1, true);
		if (!err)
			tries = 0;
		else if (err == -EBUSY || err == -EAGAIN)
			pause_ns(DRAIN_PAUSE_NS);
		else
			return err;
	}
	return err ? err : -EBUSY;
}

/* Makes room ahead of the next allocation while the hnode is under pressure. */
static void *reclaimer(void *arg)
{
	struct gmem_hnode *hnode = arg;
	uint64_t told_ns = 0;

	pthread_setname_np(pthread_self(), "gmem-reclaim");
	gmem_mutex_lock(&hnode->lock);
	while (!hnode->stop) {
		uint64_t now = gmem_now_ns();
		uint64_t room = gmem_hnode_free_locked(hnode);
		bool pressed = hnode->pressure_ns && now - hnode->pressure_ns < PRESSURE_NS;
		int err;

		if (!pressed || room >= hnode->low_bytes) {
			if (!pressed)
				hnode->pressure_ns = 0;
			gmem_mutex_wait(&hnode->lock, &hnode->wake, 0);
			continue;
		}
		gmem_mutex_unlock(&hnode->lock);
		if (now - told_ns > TELL_NS) {
			gmem_core_post(hnode->core, GMEM_EVENT_PRESSURE, 0, 0, 0, hnode->hnid, 0);
			told_ns = now;
		}
		err = gmem_reclaim(hnode, hnode->high_bytes);
		gmem_mutex_lock(&hnode->lock);
		if (err)
			gmem_mutex_wait(&hnode->lock, &hnode->wake, DRAIN_PAUSE_NS * 10);
	}
	gmem_mutex_unlock(&hnode->lock);
	return NULL;
}

int gmem_reclaimer_start(struct gmem_hnode *hnode)
{
	int err = -pthread_create(&hnode->reclaimer, NULL, reclaimer, hnode);

	if (!err)
		hnode->reclaimer_runs = true;
	return err;
}

void gmem_reclaimer_stop(struct gmem_hnode *hnode)
{
	if (!hnode->reclaimer_runs)
		return;
	gmem_mutex_lock(&hnode->lock);
	hnode->stop = true;
	pthread_cond_signal(&hnode->wake);
	gmem_mutex_unlock(&hnode->lock);
	pthread_join(hnode->reclaimer, NULL);
	hnode->reclaimer_runs = false;
}
