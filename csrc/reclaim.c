/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <time.h>

#include <gmem/internal.h>
#include <gmem/migrate.h>
#include <gmem/reclaim.h>

#define PRESSURE_NS 50000000ull /* how long after a full hnode room is still made ahead */
#define TELL_NS 1000000000ull   /* how often an hnode under pressure says so */
#define DRAIN_TRIES 20000
#define DRAIN_PAUSE_NS 100000

/* Where what leaves this hnode goes: a device's pages to the host, the host's to a tier with room. */
static int next_tier(struct gmem_hnode *hnode, uint64_t bytes)
{
	if (hnode->hnid != GMEM_HOST)
		return GMEM_HOST;
	for (int h = 1; h < GMEM_HNODE_MAX; h++) {
		struct gmem_hnode *tier = gmem_core_hnode(hnode->core, h);
		bool room;

		if (!tier || !gmem_hnode_is_peer(tier) || (tier->info.caps & GMEM_CAP_COMPUTE))
			continue;
		gmem_mutex_lock(&tier->lock);
		room = !tier->draining && tier->used_bytes + bytes <= tier->info.capacity_bytes;
		gmem_mutex_unlock(&tier->lock);
		if (room)
			return h;
	}
	return -ENOMEM;
}

static int evict_locked(struct gmem_hnode *hnode, struct gmem_page *page, bool forced)
{
	struct gmem_frame *frame = gmem_hnode_frame(hnode, page->object, page->index);
	uint32_t here = 1u << hnode->hnid;
	bool mapped, clean;
	int err = 0, target;

	if (!frame || !(gmem_word_valid(page->word) & here))
		return 0; /* it has left by itself */
	if (frame->holds)
		return -EBUSY;
	if (!forced && (gmem_word_flags(page->word) & GMEM_PAGE_PINNED))
		return -EPERM;
	clean = gmem_word_valid(page->word) != here;
	if (!clean) {
		target = next_tier(hnode, page->bytes);
		if (target < 0)
			return target;
		err = gmem_page_fetch(page, target, NULL, (struct gmem_range){ 0, 0 }, GMEM_WHY_EVICTED, &mapped);
	}
	frame->evicted = true;
	if (!err)
		err = gmem_page_drop(page, hnode->hnid);
	if (err) {
		frame->evicted = false;
		return err;
	}
	gmem_count(&hnode->evictions, 1);
	gmem_count(&hnode->core->stats.evictions, 1);
	if (clean) {
		gmem_count(&hnode->evicted_clean, 1);
		gmem_count(&hnode->core->stats.evicted_clean, 1);
	}
	return 0;
}

int gmem_reclaim_evict(struct gmem_hnode *hnode, struct gmem_object *object, uint64_t index, bool forced)
{
	struct gmem_page page;
	int err = gmem_page_trylock(object, index, false, &page);

	if (err)
		return err;
	err = evict_locked(hnode, &page, forced);
	page.park = false; /* whoever waits for a release has set WAITERS himself */
	gmem_page_unlock(&page);
	return err;
}

/* The next candidate, with a reference on its object; false if there is none. */
static bool candidate(struct gmem_hnode *hnode, struct gmem_object **ret_object, uint64_t *ret_index)
{
	bool found = false;
	uint32_t frame;

	gmem_mutex_lock(&hnode->lock);
	frame = gmem_policy_next(&hnode->policy);
	if (frame && gmem_object_tryref(hnode->frames[frame].object)) {
		*ret_object = hnode->frames[frame].object;
		*ret_index = hnode->frames[frame].index;
		found = true;
	}
	gmem_mutex_unlock(&hnode->lock);
	return found;
}

static uint64_t free_bytes(struct gmem_hnode *hnode, uint64_t *ret_frames)
{
	uint64_t bytes;

	gmem_mutex_lock(&hnode->lock);
	bytes = hnode->info.capacity_bytes - hnode->used_bytes;
	*ret_frames = hnode->frames_bumped;
	gmem_mutex_unlock(&hnode->lock);
	return bytes;
}

int gmem_reclaim(struct gmem_hnode *hnode, uint64_t bytes)
{
	bool busy = false;
	uint64_t frames, tries = 0;
	int last = -ENOMEM;

	if (bytes > hnode->info.capacity_bytes)
		return -ENOMEM;
	while (free_bytes(hnode, &frames) < bytes) {
		struct gmem_object *object;
		uint64_t index;
		int err;

		if (tries++ > 2 * frames)
			return busy ? -EAGAIN : last;
		if (!candidate(hnode, &object, &index)) {
			busy = true; /* empty, or its object is just being freed */
			if (tries > 16)
				return -EAGAIN;
			continue;
		}
		err = gmem_reclaim_evict(hnode, object, index, false);
		gmem_object_unref(object);
		if (err == -EBUSY || err == -EAGAIN)
			busy = true;
		else if (err == -ENOMEM)
			return -ENOMEM; /* nowhere to put it: the others would fare no better */
		else if (err && err != -EPERM)
			last = err;
	}
	return 0;
}

static void pause_ns(long ns)
{
	struct timespec t = { 0, ns };

	nanosleep(&t, NULL);
}

int gmem_reclaim_drain(struct gmem_hnode *hnode)
{
	int err = 0;

	for (int tries = 0; tries < DRAIN_TRIES; tries++) {
		struct gmem_object *object;
		uint64_t index;

		gmem_mutex_lock(&hnode->lock);
		if (!hnode->used_bytes) {
			gmem_mutex_unlock(&hnode->lock);
			return 0;
		}
		gmem_mutex_unlock(&hnode->lock);
		if (!candidate(hnode, &object, &index)) {
			pause_ns(DRAIN_PAUSE_NS);
			continue;
		}
		err = gmem_reclaim_evict(hnode, object, index, true);
		gmem_object_unref(object);
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
		uint64_t room = hnode->info.capacity_bytes - hnode->used_bytes;
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
