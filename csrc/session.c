/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#include <gmem/agent.h>
#include <gmem/fork.h>
#include <gmem/freeze.h>
#include <gmem/internal.h>
#include <gmem/overlay.h>
#include <gmem/pages.h>
#include <gmem/ring.h>
#include <gmem/uffd.h>

static struct gmem_session **bucket(struct gmem_core *core, uint64_t id)
{
	return &core->sessions[id % GMEM_SESSION_BUCKETS];
}

int gmem_session_new(struct gmem_core *core, uid_t uid, pid_t pid, struct gmem_session *parent,
		     struct gmem_session **ret)
{
	struct gmem_record record = { .kind = GMEM_RECORD_SESSION, .id = gmem_keep_next_id(&core->keep, &core->next_id) };
	struct gmem_account *account;
	uint32_t number = 0;
	int err = gmem_account_create(core, record.id, uid, parent ? parent->account : NULL, 0, &account);

	if (err)
		return err;
	record.session.parent = parent ? parent->id : 0;
	record.session.uid = uid;
	record.session.pid = pid;
	err = gmem_record_put(&core->keep, &record, &number);
	if (!err)
		err = gmem_session_adopt(core, &record, number, account, ret);
	if (err)
		gmem_record_drop(&core->keep, &number);
	gmem_account_unref(account);
	return err;
}

int gmem_session_adopt(struct gmem_core *core, const struct gmem_record *known, uint32_t record,
		       struct gmem_account *account, struct gmem_session **ret)
{
	struct gmem_session *session = calloc(1, sizeof(*session));
	int err = session ? gmem_as_init(&session->as, &core->keep, known->id) : -ENOMEM;

	if (err) {
		free(session);
		return err;
	}
	session->refs = 2; /* the table's and the caller's */
	session->core = core;
	session->id = known->id;
	session->uid = known->session.uid;
	session->pid = known->session.pid;
	session->parent = known->session.parent;
	session->stored = known->session.stored;
	session->bound = known->session.bound;
	session->record = record;
	session->account = gmem_account_ref(account);
	gmem_rwlock_write(&core->sessions_lock);
	session->next = *bucket(core, session->id);
	*bucket(core, session->id) = session;
	gmem_rwlock_unlock(&core->sessions_lock);
	atomic_fetch_add(&core->session_count, 1);
	*ret = session;
	return 0;
}

void gmem_session_record(struct gmem_session *session)
{
	struct gmem_record record = { .kind = GMEM_RECORD_SESSION, .id = session->id };

	record.session.parent = session->parent;
	record.session.uid = session->uid;
	record.session.pid = atomic_load(&session->pid);
	record.session.stored = atomic_load(&session->stored);
	record.session.bound = atomic_load(&session->bound);
	gmem_rwlock_write(&session->core->sessions_lock);
	if (session->record)
		gmem_record_put(&session->core->keep, &record, &session->record);
	gmem_rwlock_unlock(&session->core->sessions_lock);
}

struct gmem_session *gmem_session_ref(struct gmem_session *session)
{
	atomic_fetch_add(&session->refs, 1);
	return session;
}

void gmem_session_unref(struct gmem_session *session)
{
	if (!session || atomic_fetch_sub(&session->refs, 1) != 1)
		return;
	gmem_as_deinit(&session->as);
	gmem_account_unref(session->account);
	free(session);
}

struct gmem_session *gmem_session_get(struct gmem_core *core, uint64_t id)
{
	struct gmem_session *session;

	gmem_rwlock_read(&core->sessions_lock);
	for (session = *bucket(core, id); session && session->id != id; session = session->next)
		;
	if (session)
		gmem_session_ref(session);
	gmem_rwlock_unlock(&core->sessions_lock);
	return session;
}

void gmem_session_ids(struct gmem_core *core, uint64_t *ids, size_t capacity, size_t *ret_count)
{
	size_t count = 0;

	gmem_rwlock_read(&core->sessions_lock);
	for (size_t b = 0; b < GMEM_SESSION_BUCKETS; b++)
		for (struct gmem_session *s = core->sessions[b]; s; s = s->next) {
			if (atomic_load(&s->stored) && !atomic_load(&s->bound))
				continue;
			if (count < capacity)
				ids[count] = s->id;
			count++;
		}
	gmem_rwlock_unlock(&core->sessions_lock);
	*ret_count = count;
}

int gmem_session_create(struct gmem_core *core, uid_t uid, pid_t pid, uint64_t *ret_session)
{
	struct gmem_session *session;
	struct gmem_file *file;
	int err = gmem_session_new(core, uid, pid, NULL, &session);

	if (err)
		return err;
	session->bound = true;
	gmem_session_record(session);
	*ret_session = session->id;
	for (int c = 0; !err && c < GMEM_CLASS_COUNT; c++)
		if (c == GMEM_CLASS_SMALL || core->hugepages)
			err = gmem_account_file(session->account, GMEM_HOST, c, &file);
	gmem_session_unref(session);
	if (err)
		gmem_session_destroy(core, *ret_session);
	return err;
}

int gmem_session_borrow(struct gmem_session *session, int hnid, int ret_fds[GMEM_CLASS_COUNT])
{
	int err = 0;

	for (int c = 0; !err && c < GMEM_CLASS_COUNT; c++) {
		struct gmem_file *file;

		ret_fds[c] = -1;
		if (c == GMEM_CLASS_HUGE && !session->core->hugepages)
			continue;
		err = gmem_account_file(session->account, hnid, c, &file);
		if (!err)
			ret_fds[c] = file->fd;
	}
	return err;
}

int gmem_session_files(struct gmem_core *core, uint64_t id, int ret_fds[GMEM_CLASS_COUNT])
{
	struct gmem_session *session = gmem_session_get(core, id);
	int err;

	if (!session)
		return -ENOENT;
	err = gmem_session_borrow(session, GMEM_HOST, ret_fds);
	gmem_session_unref(session);
	return err;
}

#define VIEW_NAME(view) (unsigned long long)(view)->session_id, (unsigned long long)(view)->id

static void forget_view(struct gmem_view *view)
{
	struct gmem_keep *keep = &view->session->core->keep;

	gmem_record_drop(keep, &view->record);
	gmem_keep_forget(keep, view->pmap ? "chan.%llu.%llu" : "uffd.%llu.%llu", VIEW_NAME(view));
	if (view->pidfd >= 0)
		gmem_keep_forget(keep, "pid.%llu.%llu", VIEW_NAME(view));
	if (atomic_load(&view->agent))
		gmem_keep_forget(keep, "agent.%llu.%llu", VIEW_NAME(view));
}

/* Before it is watched: what is served now must be served by a successor. fd: its userfaultfd, or its channel. */
static int keep_view(struct gmem_view *view, int fd)
{
	struct gmem_record record = { .kind = GMEM_RECORD_CONTEXT, .id = view->id };
	struct gmem_keep *keep = &view->session->core->keep;
	int err = gmem_keep_fd(keep, fd, view->pmap ? "chan.%llu.%llu" : "uffd.%llu.%llu", VIEW_NAME(view));

	if (!err && view->pidfd >= 0)
		err = gmem_keep_fd(keep, view->pidfd, "pid.%llu.%llu", VIEW_NAME(view));
	record.context.session = view->session_id;
	record.context.hnid = view->hnid;
	record.context.pid = view->pid;
	if (!err && view->id)
		err = gmem_record_put(keep, &record, &view->record);
	if (err)
		forget_view(view);
	return err;
}

int gmem_session_view(struct gmem_session *session, int hnid, uint64_t context, int uffd, int pidfd, pid_t pid,
		      bool events, struct gmem_view **ret)
{
	struct gmem_view *view = calloc(1, sizeof(*view));
	int err;

	if (!view)
		return -ENOMEM;
	*view = (struct gmem_view){ .refs = 1, .id = context, .hnid = hnid, .uffd = uffd, .pidfd = pidfd, .pid = pid,
				    .events = events, .replayable = true, .session_id = session->id,
				    .as = &session->as, .session = gmem_session_ref(session) };
	if (hnid != GMEM_HOST)
		view->replayable = gmem_core_hnode(session->core, hnid)->info.caps & GMEM_CAP_REPLAYABLE;
	err = session->core->recovering ? 0 : keep_view(view, uffd);
	if (err) {
		gmem_session_unref(session);
		free(view);
		return err;
	}
	/* movers must know it before it can map anything */
	gmem_as_add_view(&session->as, view);
	*ret = view;
	return 0;
}

int gmem_session_watch(struct gmem_session *session, int hnid, uint64_t context, int uffd, int pidfd, pid_t pid,
		       bool events, struct gmem_view **ret)
{
	struct gmem_view *view;
	int err = gmem_session_view(session, hnid, context, uffd, pidfd, pid, events, &view);

	if (err)
		return err;
	err = gmem_faults_watch(session->core, view);
	if (err) { /* the descriptors stay the caller's */
		gmem_as_remove_view(&session->as, view);
		forget_view(view);
		gmem_session_unref(session);
		free(view);
		return err;
	}
	*ret = view;
	return 0;
}

int gmem_session_view_pmap(struct gmem_session *session, struct gmem_hnode *hnode, uint64_t context, struct gmem_pmap *pmap,
			   int channel, pid_t pid, struct gmem_view **ret)
{
	struct gmem_view *view = calloc(1, sizeof(*view));
	int err = 0;

	if (!view)
		return -ENOMEM;
	*view = (struct gmem_view){ .refs = 1, .id = context, .hnid = hnode->hnid, .uffd = -1, .pidfd = -1, .pid = pid,
				    .hnode = hnode, .pmap = pmap, .session_id = session->id, .as = &session->as,
				    .session = gmem_session_ref(session) };
	if (hnode->ops->pmap_adopt && !session->core->recovering)
		err = keep_view(view, channel);
	if (err) {
		gmem_session_unref(session);
		free(view);
		return err;
	}
	gmem_as_add_view(&session->as, view);
	if (ret)
		*ret = view;
	return 0;
}

void gmem_session_unwatch(struct gmem_session *session, struct gmem_view *view)
{
	struct gmem_hnode *hnode = gmem_core_hnode(session->core, view->hnid);

	if (view->pmap)
		atomic_store(&view->dead, true);
	else
		gmem_faults_unwatch(session->core, view);
	if (!gmem_as_remove_view(&session->as, view))
		return;
	forget_view(view);
	if (view->id) {
		gmem_release_all(view);
		gmem_overlays_free(view);
		atomic_fetch_sub(&session->core->context_count, 1);
		if (hnode)
			atomic_fetch_sub(&hnode->contexts, 1);
	}
	gmem_view_unref(view); /* the one that gmem_session_watch returned */
}

/* Any context's view, dead or not; referenced. */
static struct gmem_view *any_context(struct gmem_as *as)
{
	struct gmem_view *view;

	gmem_mutex_lock(&as->views_lock);
	for (view = as->views; view && view->hnid == GMEM_HOST; view = view->next)
		;
	if (view)
		gmem_view_ref(view);
	gmem_mutex_unlock(&as->views_lock);
	return view;
}

static struct gmem_view *host_view(struct gmem_as *as)
{
	struct gmem_view *view;

	gmem_mutex_lock(&as->views_lock);
	for (view = as->views; view && view->hnid != GMEM_HOST; view = view->next)
		;
	if (view)
		gmem_view_ref(view);
	gmem_mutex_unlock(&as->views_lock);
	return view;
}

uint64_t gmem_session_features(struct gmem_core *core, bool events)
{
	uint64_t features = GMEM_UFFD_FEAT_MISSING_SHMEM | GMEM_UFFD_FEAT_MINOR_SHMEM |
			    GMEM_UFFD_FEAT_WP_HUGETLBFS_SHMEM | GMEM_UFFD_FEAT_MISSING_HUGETLBFS |
			    GMEM_UFFD_FEAT_MINOR_HUGETLBFS | GMEM_UFFD_FEAT_POISON | GMEM_UFFD_FEAT_THREAD_ID;

	if (events)
		features |= GMEM_UFFD_FEAT_EVENT_UNMAP | GMEM_UFFD_FEAT_EVENT_REMAP;
	if (events && core->features.event_fork)
		features |= GMEM_UFFD_FEAT_EVENT_FORK;
	return features & core->features.uffd;
}

static void close_pair(int uffd, int pidfd)
{
	if (uffd >= 0)
		close(uffd);
	if (pidfd >= 0)
		close(pidfd);
}

/* Registers what the client has mapped already: the regions a forked child re-attaches. */
static int register_regions(struct gmem_session *session, int uffd)
{
	struct gmem_as *as = &session->as;
	int err = 0;

	gmem_rwlock_read(&as->lock);
	for (size_t i = 0; !err && i < as->count; i++)
		err = gmem_uffd_register(uffd, as->regions[i]->va, as->regions[i]->bytes);
	gmem_rwlock_unlock(&as->lock);
	if (!err)
		gmem_as_commit_all(as);
	return err;
}

int gmem_session_attach(struct gmem_core *core, uint64_t id, int uffd, int pidfd)
{
	struct gmem_session *session = gmem_session_get(core, id);
	struct gmem_view *view = session ? host_view(&session->as) : NULL;
	int err = !session ? -ENOENT : view ? -EEXIST : gmem_uffd_check(uffd);

	gmem_view_unref(view);
	if (!err)
		err = gmem_uffd_api(uffd, gmem_session_features(core, true));
	if (!err)
		err = register_regions(session, uffd);
	if (!err)
		err = gmem_session_watch(session, GMEM_HOST, 0, uffd, pidfd, session->pid, true, &view);
	if (err)
		close_pair(uffd, pidfd);
	gmem_session_unref(session);
	return err;
}

int gmem_view_agent(struct gmem_core *core, uint64_t id, uint64_t context, int *ret_fd)
{
	struct gmem_session *session = gmem_session_get(core, id);
	struct gmem_view *view = NULL;
	struct gmem_agent *agent, *none = NULL;
	int err = 0;

	if (session)
		view = context ? gmem_context_find(core, context) : host_view(&session->as);
	if (!view || view->session != session)
		err = -ENOENT;
	else if (!core->features.uffd_device)
		err = -EOPNOTSUPP;
	else if (!atomic_load(&view->agent)) {
		err = gmem_agent_create(-1, &agent);
		if (!err && !atomic_compare_exchange_strong(&view->agent, &none, agent))
			gmem_agent_destroy(agent);
		else if (!err)
			gmem_keep_fd(&core->keep, agent->file->fd, "agent.%llu.%llu", VIEW_NAME(view));
	}
	if (!err)
		*ret_fd = ((struct gmem_agent *)atomic_load(&view->agent))->file->fd;
	gmem_view_unref(view);
	gmem_session_unref(session);
	return err;
}

bool gmem_session_covers(struct gmem_core *core, uint64_t id, uint64_t va, uint64_t bytes)
{
	struct gmem_session *session = gmem_session_get(core, id);
	bool covers = session && !gmem_range_check(session, va, bytes);

	gmem_session_unref(session);
	return covers;
}

int gmem_session_regions(struct gmem_core *core, uint64_t id, struct gmem_region_info *regions, size_t capacity,
			 size_t *ret_count)
{
	struct gmem_session *session = gmem_session_get(core, id);
	struct gmem_as *as;

	if (!session)
		return -ENOENT;
	as = &session->as;
	gmem_rwlock_read(&as->lock);
	for (size_t i = 0; i < as->count && i < capacity; i++) {
		struct gmem_region *region = as->regions[i];
		struct gmem_file *file = NULL;
		int fd = -1;

		if (!gmem_object_file(region->object, GMEM_HOST, &file))
			gmem_object_lend(region->object, file, region->read_only, &fd);
		regions[i] = (struct gmem_region_info){
			.va = region->va, .bytes = region->bytes, .fork = region->fork,
			.offset = region->object->offset + region->offset,
			.page_bytes = 1ull << region->object->shift, .class_ = region->object->class_,
			.committed = region->committed, .read_only = region->read_only, .fd = fd,
		};
	}
	*ret_count = as->count;
	gmem_rwlock_unlock(&as->lock);
	gmem_session_unref(session);
	return 0;
}

/* ---- end ---- */

void gmem_session_release_piece(struct gmem_object *object, uint64_t offset, uint64_t bytes, void *arg)
{
	struct gmem_core *core = object->core;
	uint64_t page_bytes = 1ull << object->shift;
	uint64_t pn = object->pn + ((offset + page_bytes - 1) >> object->shift), stop;
	uint64_t end = object->pn + ((offset + bytes) >> object->shift);

	/* With arg (the core) this is a fault thread: it hands the work on. The whole object going is no work here. */
	if (object->pooled || !gmem_object_mapped(object, 0, object->bytes))
		return;
	if (arg) {
		struct gmem_work work = { .object = gmem_object_ref(object), .offset = offset, .bytes = bytes };

		if (!gmem_work_post(core, &work))
			return;
		gmem_object_unref(object);
	}
	while (pn < end && !gmem_lpt_next_touched(&core->lpt, &pn, end, &stop)) {
		for (; pn < stop; pn++) {
			uint64_t at = (pn - object->pn) << object->shift;
			struct gmem_page page;

			if (gmem_object_mapped(object, at, page_bytes))
				continue;
			gmem_page_lock(object, pn - object->pn, &page);
			gmem_page_discard(&page);
			gmem_page_unlock(&page);
		}
	}
}

static bool first_region(struct gmem_as *as, struct gmem_range *ret)
{
	bool found;

	gmem_rwlock_read(&as->lock);
	found = as->count > 0;
	if (found)
		*ret = (struct gmem_range){ as->regions[0]->va, as->regions[0]->bytes };
	gmem_rwlock_unlock(&as->lock);
	return found;
}

/* A child that shares it still may go on. */
static void thaw(struct gmem_session *session, uint64_t va)
{
	struct gmem_place place;

	if (gmem_as_lookup(&session->as, va, &place))
		return;
	gmem_object_thaw(place.object, session->id);
	gmem_object_unref(place.object);
}

/* Contexts first: nothing may map pages again while they are freed. A process that is still there and still has the
 * memory mapped (it broke its connection, or its session was ended) gets SIGBUS, never zeros. */
static void tear_down(struct gmem_session *session)
{
	struct gmem_core *core = session->core;
	struct gmem_view *host = host_view(&session->as), *view;
	struct gmem_range range;

	while ((view = any_context(&session->as))) {
		gmem_session_unwatch(session, view);
		gmem_view_unref(view);
	}
	while (first_region(&session->as, &range)) {
		thaw(session, range.va);
		gmem_as_remove(&session->as, range.va, range.bytes, gmem_session_release_piece, NULL);
		if (!host)
			continue;
		if (atomic_load(&core->stopping) || atomic_load(&session->disowned))
			gmem_uffd_unregister(host->uffd, range.va, range.bytes);
		else if (core->features.poison)
			gmem_uffd_poison(host->uffd, range.va, range.bytes);
		gmem_uffd_wake(host->uffd, range.va, range.bytes);
	}
	if (host)
		gmem_session_unwatch(session, host);
	gmem_view_unref(host);
	gmem_kept_end(session->account);
}

int gmem_session_destroy(struct gmem_core *core, uint64_t id)
{
	struct gmem_session **at, *session;

	gmem_rwlock_write(&core->sessions_lock);
	for (at = bucket(core, id); *at && (*at)->id != id; at = &(*at)->next)
		;
	session = *at;
	if (session)
		*at = session->next;
	gmem_rwlock_unlock(&core->sessions_lock);
	if (!session)
		return -ENOENT;
	atomic_store(&session->closed, true);
	gmem_session_claimed(session);
	gmem_ring_close(session);
	tear_down(session);
	gmem_rwlock_write(&core->sessions_lock);
	gmem_record_drop(&core->keep, &session->record);
	gmem_rwlock_unlock(&core->sessions_lock);
	atomic_fetch_sub(&core->session_count, 1);
	gmem_session_unref(session);
	return 0;
}

int gmem_session_disown(struct gmem_core *core, uint64_t id)
{
	struct gmem_session *session = gmem_session_get(core, id);
	bool stored;

	if (!session)
		return -ENOENT;
	stored = atomic_load(&session->stored);
	if (stored) {
		atomic_store(&session->bound, false);
		gmem_session_record(session);
	} else {
		atomic_store(&session->disowned, true);
	}
	gmem_session_unref(session);
	return stored ? 0 : gmem_session_destroy(core, id);
}

int gmem_session_stats(struct gmem_core *core, uint64_t id, struct gmem_session_stats *ret)
{
	struct gmem_session *session = gmem_session_get(core, id);

	if (!session)
		return -ENOENT;
	*ret = (struct gmem_session_stats){
		.session = id, .uid = session->uid, .pid = atomic_load(&session->pid),
		.mapped_bytes = gmem_counter(&session->account->mapped_bytes),
		.host_faults = gmem_counter(&session->account->host_faults),
		.device_faults = gmem_counter(&session->account->device_faults),
	};
	for (int h = 0; h < GMEM_HNODE_MAX; h++) {
		ret->resident_bytes[h] = gmem_counter(&session->account->shares[h].resident_bytes);
		ret->quota_bytes[h] = gmem_counter(&session->account->shares[h].quota_bytes);
	}
	gmem_rwlock_read(&session->as.lock);
	ret->regions = session->as.count;
	gmem_rwlock_unlock(&session->as.lock);
	gmem_mutex_lock(&session->as.views_lock);
	for (struct gmem_view *view = session->as.views; view; view = view->next)
		ret->contexts += view->hnid != GMEM_HOST;
	gmem_mutex_unlock(&session->as.views_lock);
	gmem_session_unref(session);
	return 0;
}
