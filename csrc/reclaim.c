/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <time.h>

#include <gmem/age.h>
#include <gmem/evict.h>
#include <gmem/internal.h>
#include <gmem/migrate.h>
#include <gmem/reclaim.h>

#define PRESSURE_NS 50000000ull /* how long after a full hnode room is still made ahead */
#define TELL_NS 1000000000ull   /* how often an hnode under pressure says so */
#define BATCH_BYTES (4ull << 20)
#define DEVICE_BATCH_BYTES (32ull << 20) /* whose translations and copies are cheap by the dozen */
#define EMPTY_TRIES 16
#define OTHERS_TRIES 256
#define DRAIN_TRIES 20000
#define PATIENT_TRIES 2000
#define DRAIN_PAUSE_NS 100000

/* Whose pages are to leave: an account's own; those of its user's other accounts, if it has none there itself; anybody's
 * (NULL). */
struct domain {
	struct gmem_account *account;
	bool others;
};

static uint32_t next_locked(struct gmem_hnode *hnode, const struct domain *domain)
{
	uint32_t frame = GMEM_FRAME_NONE;

	if (!domain)
		return gmem_policy_next(&hnode->policy);
	if (!domain->others)
		return gmem_hnode_mate_locked(hnode, domain->account);
	for (int tries = 0; tries < OTHERS_TRIES; tries++) {
		frame = gmem_policy_next(&hnode->policy);
		if (!frame || hnode->frames[frame].object->account->tenant == domain->account->tenant)
			return frame;
	}
	return GMEM_FRAME_NONE;
}

/* The next candidate, with a reference on its object; false if there is none. */
static bool candidate(struct gmem_hnode *hnode, const struct domain *domain, struct gmem_object **ret_object,
		      uint64_t *ret_index)
{
	bool found = false;
	uint32_t frame;

	gmem_mutex_lock(&hnode->lock);
	frame = next_locked(hnode, domain);
	if (frame && gmem_object_tryref(hnode->frames[frame].object)) {
		*ret_object = hnode->frames[frame].object;
		*ret_index = hnode->frames[frame].index;
		found = true;
	}
	gmem_mutex_unlock(&hnode->lock);
	return found;
}

/* Candidates of bytes in all, locked, with references on their objects. *ret_busy: there were some not to be had. */
static size_t gather(struct gmem_hnode *hnode, const struct domain *domain, uint64_t bytes, struct gmem_page *pages,
		     bool *ret_busy)
{
	uint64_t gathered = 0;
	size_t n = 0;

	for (size_t tries = 0; gathered < bytes && tries < GMEM_EVICT_BATCH; tries++) {
		struct gmem_object *object;
		uint64_t index;

		if (!candidate(hnode, domain, &object, &index))
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

static uint64_t room_of(struct gmem_hnode *hnode, const struct domain *domain)
{
	return domain ? gmem_account_room(domain->account, hnode->hnid) : gmem_hnode_free_bytes(hnode);
}

static int reclaim(struct gmem_hnode *hnode, struct domain *domain, uint64_t bytes)
{
	uint64_t batch = gmem_hnode_own_frames(hnode) ? DEVICE_BATCH_BYTES : BATCH_BYTES;
	struct gmem_page pages[GMEM_EVICT_BATCH];
	uint64_t tries = 0, empty = 0, room;
	bool busy = false;
	int last = -ENOMEM, nowhere = 0;

	while ((room = room_of(hnode, domain)) < bytes) {
		uint64_t need = bytes - room < batch ? bytes - room : batch;
		size_t count;
		int err;

		if (domain)
			domain->others = !gmem_counter(&domain->account->shares[hnode->hnid].resident_bytes);
		count = gather(hnode, domain, need, pages, &busy);
		if (!count && empty++ > EMPTY_TRIES)
			return -EAGAIN;
		err = evict(hnode, pages, count, false);
		gmem_age(hnode, count);
		if (err == -EBUSY || err == -EAGAIN)
			busy = true;
		else if (err == -ENOMEM || err == -EDQUOT)
			nowhere = err; /* to put it; others may have a copy elsewhere, and can just be dropped */
		else if (err && err != -EPERM)
			last = err;
		tries += count ? count : 1;
		if (tries > 2 * frames_made(hnode))
			return nowhere ? nowhere : busy ? -EAGAIN : last;
	}
	return 0;
}

int gmem_reclaim(struct gmem_hnode *hnode, uint64_t bytes)
{
	return bytes > gmem_counter(&hnode->limit_bytes) ? -ENOMEM : reclaim(hnode, NULL, bytes);
}

static bool can_be(const struct gmem_share *share, uint64_t bytes)
{
	uint64_t quota = gmem_counter(&share->quota_bytes);

	return !quota || quota >= bytes;
}

int gmem_reclaim_own(struct gmem_hnode *hnode, struct gmem_account *account, uint64_t bytes)
{
	struct domain domain = { .account = account };

	if (!can_be(&account->shares[hnode->hnid], bytes) || !can_be(&account->tenant->shares[hnode->hnid], bytes))
		return -EDQUOT;
	return reclaim(hnode, &domain, bytes);
}

static void pause_ns(long ns)
{
	struct timespec t = { 0, ns };

	nanosleep(&t, NULL);
}

int gmem_reclaim_patiently(struct gmem_hnode *hnode, struct gmem_account *account, uint64_t bytes)
{
	int err = -EAGAIN;

	for (int tries = 0; err == -EAGAIN && tries < PATIENT_TRIES; tries++) {
		if (tries)
			pause_ns(DRAIN_PAUSE_NS);
		err = account ? gmem_reclaim_own(hnode, account, bytes) : gmem_reclaim(hnode, bytes);
	}
	return err;
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
		if (!gather(hnode, NULL, 1, &page, &busy)) {
			pause_ns(DRAIN_PAUSE_NS);
			continue;
		}
		err = evict(hnode, &page, 1, true);
		if (!err)
			tries = 0;
		else if (err == -EBUSY || err == -EAGAIN)
			pause_ns(DRAIN_PAUSE_NS);
		else if (err != -EBADMSG) /* else it is lost, and gone */
			return err;
	}
	return err ? err : -EBUSY;
}

struct teller {
	struct gmem_core *core;
	uint64_t told_ns;
};

static void tell(struct teller *teller, uint64_t session, int hnid)
{
	uint64_t now = gmem_now_ns();

	if (now - teller->told_ns < TELL_NS)
		return;
	gmem_core_post(teller->core, GMEM_EVENT_PRESSURE, session, 0, 0, hnid, 0);
	teller->told_ns = now;
}

static bool lately(uint64_t when_ns)
{
	return when_ns && gmem_now_ns() - when_ns < PRESSURE_NS;
}

/* Makes room below a quota ahead of its next allocation. Called and returns with the lock held. */
static void relieve_account_locked(struct gmem_hnode *hnode, struct teller *teller)
{
	struct gmem_account *account = hnode->pressed;
	uint64_t quota = gmem_counter(&account->shares[hnode->hnid].quota_bytes);

	hnode->pressed = NULL;
	if (!lately(account->pressure_ns[hnode->hnid]))
		account->pressure_ns[hnode->hnid] = 0;
	gmem_mutex_unlock(&hnode->lock);
	tell(teller, account->session_id, hnode->hnid);
	gmem_reclaim_own(hnode, account, quota / 32); /* what can't be done now, the next allocation will have to */
	gmem_account_unref(account);
	gmem_mutex_lock(&hnode->lock);
}

/* Some of what was advised cold, looked at once it is locked. Whatever can't go now is the policy's to offer. */
static size_t gather_cold(struct gmem_hnode *hnode, struct gmem_page *pages)
{
	uint64_t gathered = 0;
	size_t n = 0;

	while (gathered < BATCH_BYTES && n < GMEM_EVICT_BATCH) {
		struct gmem_object *object = NULL;
		struct gmem_frame *frame;
		uint64_t index = 0;
		uint32_t number;

		gmem_mutex_lock(&hnode->lock);
		number = gmem_hnode_next_cold_locked(hnode);
		if (number && hnode->frames[number].object && gmem_object_tryref(hnode->frames[number].object)) {
			object = hnode->frames[number].object;
			index = hnode->frames[number].index;
		}
		gmem_mutex_unlock(&hnode->lock);
		if (!number)
			break;
		if (!object)
			continue;
		if (!gmem_page_trylock(object, index, false, &pages[n])) {
			frame = gmem_hnode_frame(hnode, object, index);
			if (frame && frame->cold) {
				frame->cold = false;
				gathered += pages[n++].bytes;
				continue;
			}
			gmem_page_unlock(&pages[n]);
		}
		gmem_object_unref(object);
	}
	return n;
}

/* Under pressure what is cold leaves ahead of need, so that who needs the room need not wait. False: there is none. */
static bool relieve_of_cold_locked(struct gmem_hnode *hnode)
{
	struct gmem_page pages[GMEM_EVICT_BATCH];
	size_t count;

	if (!hnode->cold_count || !lately(hnode->pressure_ns))
		return false;
	gmem_mutex_unlock(&hnode->lock);
	count = gather_cold(hnode, pages);
	if (count)
		evict(hnode, pages, count, false);
	gmem_mutex_lock(&hnode->lock);
	return true;
}

/* The same for the whole hnode; false if there is nothing to do. */
static bool relieve_locked(struct gmem_hnode *hnode, struct teller *teller)
{
	int err;

	if (!lately(hnode->pressure_ns)) {
		hnode->pressure_ns = 0;
		return false;
	}
	if (gmem_hnode_free_locked(hnode) >= gmem_counter(&hnode->low_bytes))
		return false;
	gmem_mutex_unlock(&hnode->lock);
	tell(teller, 0, hnode->hnid);
	err = gmem_reclaim(hnode, gmem_counter(&hnode->high_bytes));
	gmem_mutex_lock(&hnode->lock);
	if (err == -ENOMEM)
		hnode->pressure_ns = 0; /* that has been through all of them: not again before somebody asks */
	else if (err)
		gmem_mutex_wait(&hnode->lock, &hnode->wake, DRAIN_PAUSE_NS * 10);
	return true;
}

/* Makes room ahead of the next allocation while there is pressure. */
static void *reclaimer(void *arg)
{
	struct gmem_hnode *hnode = arg;
	struct teller teller = { .core = hnode->core }, account_teller = teller;

	pthread_setname_np(pthread_self(), "gmem-reclaim");
	gmem_duty_enlist(hnode->core, GMEM_ROLE_RECLAIM);
	gmem_mutex_lock(&hnode->lock);
	while (!hnode->stop) {
		gmem_duty_begin(GMEM_DOING_RECLAIM, 0, 0);
		if (hnode->pressed)
			relieve_account_locked(hnode, &account_teller);
		else if (!relieve_of_cold_locked(hnode) && !relieve_locked(hnode, &teller)) {
			gmem_duty_end();
			gmem_mutex_wait(&hnode->lock, &hnode->wake, 0);
		}
	}
	gmem_mutex_unlock(&hnode->lock);
	gmem_duty_leave(hnode->core);
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
