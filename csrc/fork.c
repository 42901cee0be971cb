/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <time.h>
#include <unistd.h>

#include <gmem/crash.h>
#include <gmem/fork.h>
#include <gmem/internal.h>
#include <gmem/uffd.h>

#define UNCLAIMED_MAX 256 /* of one user: each is a userfaultfd, and a session */
#define REAP_BATCH 64
#define FORK_WAIT_STEPS 500 /* of 1 ms: the event has been read when the child runs, but perhaps not been handled */

static int inherit_region(struct gmem_session *child, const struct gmem_region *region, bool committed)
{
	struct gmem_region like = *region;

	like.committed = committed;
	return gmem_as_insert_private(&child->as, &like);
}

static int inherit_regions(struct gmem_session *parent, struct gmem_session *child, bool committed)
{
	int err = 0;

	gmem_rwlock_read(&parent->as.lock);
	for (size_t i = 0; !err && i < parent->as.count; i++) {
		struct gmem_region *r = parent->as.regions[i];

		/* The child's as is not shared yet, so its locks are free: same rank, but no cycle. */
		if (r->fork != GMEM_FORK_NONE && r->committed)
			err = inherit_region(child, r, committed);
	}
	if (!err)
		err = gmem_hints_copy(&parent->as.hints, &child->as.hints);
	gmem_rwlock_unlock(&parent->as.lock);
	return err;
}

static void protect_regions(struct gmem_session *child, int uffd)
{
	gmem_rwlock_read(&child->as.lock);
	for (size_t i = 0; i < child->as.count; i++)
		gmem_uffd_protect(uffd, child->as.regions[i]->va, child->as.regions[i]->bytes, true, false);
	gmem_rwlock_unlock(&child->as.lock);
}

/* For a child that can't be served: what it has not mapped and is not zero would read as zero once its userfaultfd is
 * closed. */
static void poison_regions(struct gmem_session *child, int uffd)
{
	struct gmem_lpt *lpt = &child->core->lpt;

	gmem_rwlock_read(&child->as.lock);
	for (size_t i = 0; i < child->as.count && child->core->features.poison; i++) {
		const struct gmem_region *r = child->as.regions[i];
		uint64_t page_bytes = 1ull << r->object->shift, stop;
		uint64_t pn = r->object->pn + (r->offset >> r->object->shift);
		uint64_t end = r->object->pn + ((r->offset + r->bytes + page_bytes - 1) >> r->object->shift);

		for (; pn < end && !gmem_lpt_next_touched(lpt, &pn, end, &stop); pn = stop)
			for (uint64_t at = pn; at < stop; at++) {
				uint64_t offset = (at - r->object->pn) << r->object->shift;

				if (gmem_word_valid(atomic_load(&lpt->words[at])) && offset >= r->offset)
					gmem_uffd_poison(uffd, r->va + (offset - r->offset), page_bytes);
			}
	}
	gmem_rwlock_unlock(&child->as.lock);
}

static int count_unclaimed(struct gmem_session *child)
{
	_Atomic uint32_t *unclaimed = &child->account->tenant->unclaimed;

	if (atomic_fetch_add(unclaimed, 1) < UNCLAIMED_MAX) {
		atomic_store(&child->unclaimed, true);
		return 0;
	}
	atomic_fetch_sub(unclaimed, 1);
	return -EDQUOT;
}

void gmem_session_claimed(struct gmem_session *child)
{
	if (atomic_exchange(&child->unclaimed, false))
		atomic_fetch_sub(&child->account->tenant->unclaimed, 1);
}

void gmem_session_forked(struct gmem_session *parent, int uffd)
{
	struct gmem_core *core = parent->core;
	struct gmem_session *child;
	struct gmem_view *view;
	uint64_t id = 0;
	int err = gmem_session_new(core, parent->uid, 0, parent, &child);

	if (!err) {
		id = child->id;
		err = inherit_regions(parent, child, true);
		if (!err)
			err = count_unclaimed(child);
		if (!err)
			err = gmem_session_watch(child, GMEM_HOST, 0, uffd, -1, 0, true, &view);
		/* Its page tables were copied before movers knew it: what was writable then may not be now. The child
		 * does not run before its atfork handler hears that it is stored. */
		if (!err)
			protect_regions(child, uffd);
		else
			poison_regions(child, uffd);
		atomic_store(&child->stored, !err);
		gmem_session_record(child);
		gmem_crash(GMEM_CRASH_FORKED);
		gmem_session_unref(child);
	}
	gmem_core_post(core, err ? GMEM_EVENT_ERROR : GMEM_EVENT_FORK, parent->id, 0, id, 0, err);
	if (err) {
		close(uffd);
		if (id)
			gmem_session_destroy(core, id);
	}
}

static struct gmem_session *claim_child(struct gmem_core *core, uint64_t parent)
{
	struct gmem_session *best = NULL;

	gmem_rwlock_read(&core->sessions_lock);
	for (size_t b = 0; b < GMEM_SESSION_BUCKETS; b++)
		for (struct gmem_session *s = core->sessions[b]; s; s = s->next)
			if (s->parent == parent && atomic_load(&s->stored) && !atomic_load(&s->bound) &&
			    (!best || s->id < best->id))
				best = s;
	if (best && !atomic_exchange(&best->bound, true))
		gmem_session_claimed(gmem_session_ref(best));
	else
		best = NULL;
	gmem_rwlock_unlock(&core->sessions_lock);
	return best;
}

static bool forks_by_event(struct gmem_session *session)
{
	struct gmem_view *view = gmem_as_view(&session->as, GMEM_HOST);
	bool by_event = view && view->events && session->core->features.event_fork;

	gmem_view_unref(view);
	return by_event;
}

int gmem_session_fork(struct gmem_core *core, uint64_t parent_id, uid_t uid, pid_t pid, uint64_t *ret_child,
		      bool *ret_stored)
{
	struct gmem_session *parent = gmem_session_get(core, parent_id), *child = NULL;
	const struct timespec step = { 0, 1000000 };
	int err = 0;

	if (!parent)
		return -ENOENT;
	for (int i = 0; !child && forks_by_event(parent) && i < FORK_WAIT_STEPS; i++) {
		child = claim_child(core, parent_id);
		if (!child)
			nanosleep(&step, NULL);
	}
	*ret_stored = child != NULL;
	if (!child) {
		err = gmem_session_new(core, uid, pid, parent, &child);
		if (!err) {
			atomic_store(&child->bound, true);
			err = inherit_regions(parent, child, false);
		}
	}
	if (child) {
		atomic_store(&child->pid, pid);
		gmem_session_record(child);
		*ret_child = child->id;
		gmem_session_unref(child);
		if (err)
			gmem_session_destroy(core, *ret_child);
	}
	gmem_session_unref(parent);
	return err;
}

static size_t reap_some(struct gmem_core *core)
{
	uint64_t gone[REAP_BATCH];
	size_t count = 0;

	gmem_rwlock_read(&core->sessions_lock);
	for (size_t b = 0; b < GMEM_SESSION_BUCKETS; b++)
		for (struct gmem_session *s = core->sessions[b]; s && count < REAP_BATCH; s = s->next) {
			struct gmem_view *view = atomic_load(&s->stored) && !atomic_load(&s->bound) ?
							 gmem_as_view(&s->as, GMEM_HOST) : NULL;

			/* write-protecting nothing tells whether the mm is still there */
			if (view && gmem_uffd_alive(view->uffd) == -ESRCH)
				gone[count++] = s->id;
			gmem_view_unref(view);
		}
	gmem_rwlock_unlock(&core->sessions_lock);
	for (size_t i = 0; i < count; i++)
		gmem_session_destroy(core, gone[i]);
	return count;
}

void gmem_core_reap(struct gmem_core *core)
{
	while (reap_some(core) == REAP_BATCH)
		;
}
