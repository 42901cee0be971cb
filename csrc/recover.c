/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <gmem/crash.h>
#include <gmem/agent.h>
#include <gmem/devmem.h>
#include <gmem/internal.h>
#include <gmem/migrate.h>
#include <gmem/pages.h>
#include <gmem/overlay.h>
#include <gmem/pmap.h>
#include <gmem/pool.h>
#include <gmem/recover.h>
#include <gmem/ring.h>
#include <gmem/tier.h>
#include <gmem/uffd.h>

static struct gmem_account *find_account(struct gmem_recovery *recovery, uint64_t id)
{
	for (size_t low = 0, high = recovery->account_count; low < high;) {
		size_t mid = (low + high) / 2;
		struct gmem_account *account = recovery->accounts[mid];

		if (account->session_id == id)
			return account;
		if (account->session_id < id)
			low = mid + 1;
		else
			high = mid;
	}
	return NULL;
}

static struct gmem_object *find_object(struct gmem_recovery *recovery, uint64_t pn)
{
	for (size_t low = 0, high = recovery->object_count; low < high;) {
		size_t mid = (low + high) / 2;
		struct gmem_object *object = recovery->objects[mid];

		if (object->pn == pn)
			return object;
		if (object->pn < pn)
			low = mid + 1;
		else
			high = mid;
	}
	return NULL;
}

/* ---- load ---- */

struct numbered {
	struct gmem_record record;
	uint32_t number;
};

static int by_id(const void *a, const void *b)
{
	uint64_t x = ((const struct numbered *)a)->record.id, y = ((const struct numbered *)b)->record.id;

	return (x > y) - (x < y);
}

/* All records of a kind, by id; freed by the caller. */
static int collect(struct gmem_keep *keep, enum gmem_record_kind kind, struct numbered **ret, size_t *ret_count)
{
	size_t capacity = 64, count = 0;
	struct numbered *all = malloc(capacity * sizeof(*all)), one = { .number = 0 };

	while (all && (one.number = gmem_record_next(keep, kind, one.number, &one.record))) {
		if (count == capacity) {
			struct numbered *grown = realloc(all, 2 * capacity * sizeof(*all));

			if (!grown)
				break;
			all = grown;
			capacity *= 2;
		}
		all[count++] = one;
	}
	if (!all || one.number) {
		free(all);
		return -ENOMEM;
	}
	qsort(all, count, sizeof(*all), by_id);
	*ret = all;
	*ret_count = count;
	return 0;
}

/* A parent has a lower id than its children. */
static int load_accounts(struct gmem_core *core, struct gmem_recovery *recovery)
{
	struct numbered *all;
	size_t count;
	int err = collect(&core->keep, GMEM_RECORD_ACCOUNT, &all, &count);

	if (err)
		return err;
	recovery->accounts = calloc(count + 1, sizeof(*recovery->accounts));
	err = recovery->accounts ? 0 : -ENOMEM;
	for (size_t i = 0; !err && i < count; i++) {
		struct gmem_account *parent = find_account(recovery, all[i].record.account.parent);

		err = gmem_account_create(core, all[i].record.id, all[i].record.account.uid, parent, all[i].number,
					  &recovery->accounts[i]);
		recovery->account_count += !err;
	}
	free(all);
	return err;
}

/* Now: what nobody has asked for at the end is given up. */
static int load_files(struct gmem_core *core, struct gmem_recovery *recovery)
{
	struct gmem_keep *keep = &core->keep;
	int err = 0;

	for (size_t i = 0; !err && i < keep->left_count;) {
		unsigned long long id;
		int hnid, class_;
		struct gmem_account *account = NULL;
		struct gmem_file *file;

		if (sscanf(keep->left[i].name, "file.%llu.%d.%d", &id, &hnid, &class_) == 3 && hnid >= 0 &&
		    hnid < GMEM_HNODE_MAX && class_ >= 0 && class_ < GMEM_CLASS_COUNT)
			account = find_account(recovery, id);
		if (account)
			err = gmem_account_file(account, hnid, (enum gmem_class)class_, &file); /* takes it out */
		else
			i++;
	}
	return err;
}

static int load_sessions(struct gmem_core *core, struct gmem_recovery *recovery)
{
	struct numbered *all;
	size_t count;
	int err = collect(&core->keep, GMEM_RECORD_SESSION, &all, &count);

	for (size_t i = 0; !err && i < count; i++) {
		struct gmem_account *account = find_account(recovery, all[i].record.id);
		struct gmem_session *session;

		err = account ? gmem_session_adopt(core, &all[i].record, all[i].number, account, &session) : -EPROTO;
		if (!err)
			gmem_session_unref(session);
	}
	if (!err)
		free(all);
	return err;
}

/* One whose descriptor was not kept is lost: its reads fail. */
static int load_source(struct gmem_core *core, struct gmem_object *object, const struct gmem_record *record)
{
	struct gmem_file_args args = { .offset = record->object.source_offset,
				       .bytes = record->object.bytes - record->object.source_tail,
				       .write = record->object.source == GMEM_RECORD_FILE_WRITE,
				       .private_ = record->object.source == GMEM_RECORD_FILE_PRIVATE };
	struct gmem_source *source;
	int fd, err;

	if (record->object.source == GMEM_RECORD_NO_SOURCE)
		return 0;
	fd = gmem_keep_take(&core->keep, "source.%llu", (unsigned long long)object->pn);
	err = record->object.source == GMEM_RECORD_REMOTE ? gmem_remotesource_adopt(core, fd, &source) :
							     gmem_filesource_create(fd, &args, &source);
	if (!err) {
		gmem_source_set(object, source);
		atomic_fetch_add(&object->account->sources, 1);
	}
	return err;
}

static int load_object(struct gmem_core *core, struct gmem_recovery *recovery, const struct numbered *one)
{
	struct gmem_account *account = find_account(recovery, one->record.object.account);
	struct gmem_account *files = find_account(recovery, one->record.object.files);
	bool has_range = !(one->record.object.flags & GMEM_OBJECT_SUCCEEDED);
	const struct gmem_record *r = &one->record;
	uint64_t pages = (r->object.bytes + (1ull << (r->object.shift & 63)) - 1) >> (r->object.shift & 63);
	int err;

	if (!account || !files || r->object.class_ >= GMEM_CLASS_COUNT || r->object.shift < GMEM_SHIFT_4K ||
	    r->object.shift > GMEM_SHIFT_2M || !pages)
		return -EPROTO;
	err = gmem_lpt_extent_take(&core->lpt, r->id, pages);
	if (!err && has_range)
		err = gmem_range_take(&core->va[r->object.class_], core->window.base + r->object.offset, r->object.bytes);
	if (!err)
		err = gmem_object_adopt(core, account, files, r, one->number, &recovery->objects[recovery->object_count]);
	if (err)
		return err == -EEXIST ? -EPROTO : err;
	if (r->object.source && r->object.source != GMEM_RECORD_FILE_PRIVATE)
		gmem_object_uncharge(recovery->objects[recovery->object_count]);
	else if (has_range)
		atomic_fetch_add(&core->committed_bytes[r->object.class_], r->object.bytes);
	return load_source(core, recovery->objects[recovery->object_count++], r);
}

static void set_owner(struct numbered *objects, size_t count, uint64_t pn, bool owns)
{
	struct numbered key = { .record.id = pn }, *one = bsearch(&key, objects, count, sizeof(key), by_id);

	if (!one)
		return;
	one->record.object.flags = (uint8_t)(owns ? one->record.object.flags & ~GMEM_OBJECT_SUCCEEDED :
						    one->record.object.flags | GMEM_OBJECT_SUCCEEDED);
}

/* Which of a pool's two objects has the range, when one was just giving it to the other, the pool's record says. */
static int settle_owners(struct gmem_core *core, struct numbered *objects, size_t count)
{
	struct numbered *pools;
	size_t pool_count;
	int err = collect(&core->keep, GMEM_RECORD_POOL, &pools, &pool_count);

	for (size_t i = 0; !err && i < pool_count; i++) {
		const struct gmem_record *r = &pools[i].record;

		set_owner(objects, count, r->pool.object, true);
		if (r->pool.other)
			set_owner(objects, count, r->pool.other - 1, false);
	}
	if (!err)
		free(pools);
	return err;
}

/* What their pages are copies of. */
static int load_sources(struct gmem_recovery *recovery)
{
	int err = 0;

	for (size_t i = 0; !err && i < recovery->object_count; i++) {
		struct gmem_object *object = recovery->objects[i];
		struct gmem_object *next = object->successor ? find_object(recovery, object->successor - 1) : NULL;

		if (object->successor)
			err = next ? gmem_object_seal(object, next) : -EPROTO;
	}
	return err;
}

static int load_pools(struct gmem_core *core, struct gmem_recovery *recovery)
{
	struct numbered *all;
	size_t count;
	int err = collect(&core->keep, GMEM_RECORD_POOL, &all, &count);

	if (err)
		return err;
	for (size_t i = 0; !err && i < count; i++) {
		const struct gmem_record *r = &all[i].record;
		struct gmem_object *object = find_object(recovery, r->pool.object);
		struct gmem_object *next = r->pool.other && !r->pool.published ? find_object(recovery, r->pool.other - 1) : NULL;

		if (!object) {
			gmem_record_drop(&core->keep, &all[i].number);
			continue;
		}
		/* nobody writes to what was being published */
		if (next && !gmem_object_sealed(object))
			err = gmem_object_seal(object, next);
		if (!err)
			err = gmem_pool_adopt(core, r, all[i].number, object, next);
	}
	free(all);
	return err;
}

static int load_objects(struct gmem_core *core, struct gmem_recovery *recovery)
{
	struct numbered *all;
	size_t count;
	int err = collect(&core->keep, GMEM_RECORD_OBJECT, &all, &count);

	if (!err)
		err = settle_owners(core, all, count);
	if (err)
		return err;
	recovery->objects = calloc(count + 1, sizeof(*recovery->objects));
	err = recovery->objects ? 0 : -ENOMEM;
	for (size_t i = 0; !err && i < count; i++)
		err = load_object(core, recovery, &all[i]);
	free(all);
	return err;
}

/* A region goes before what it stands on, so one that has lost its ground was on its way out. */
static int load_regions(struct gmem_core *core, struct gmem_recovery *recovery)
{
	struct numbered *all;
	size_t count;
	int err = collect(&core->keep, GMEM_RECORD_REGION, &all, &count);

	if (err)
		return err;
	for (size_t i = 0; !err && i < count; i++) {
		struct gmem_session *session = gmem_session_get(core, all[i].record.region.session);
		struct gmem_object *object = find_object(recovery, all[i].record.id);
		int known = session && object ? gmem_as_adopt(&session->as, object, &all[i].record, all[i].number) : -ENOENT;

		if (known == -ENOMEM)
			err = known;
		else if (known)
			gmem_record_drop(&core->keep, &all[i].number);
		gmem_session_unref(session);
	}
	free(all);
	return err;
}

static int load_hints(struct gmem_core *core)
{
	struct numbered *all;
	size_t count;
	int err = collect(&core->keep, GMEM_RECORD_HINT, &all, &count);

	if (err)
		return err;
	for (size_t i = 0; !err && i < count; i++) {
		struct gmem_session *session = gmem_session_get(core, all[i].record.id);
		int known = session ? gmem_hints_adopt(&session->as.hints, &all[i].record, all[i].number) : -ENOENT;

		if (known == -ENOMEM)
			err = known;
		else if (known)
			gmem_record_drop(&core->keep, &all[i].number);
		gmem_session_unref(session);
	}
	free(all);
	return err;
}

int gmem_recover_load(struct gmem_core *core)
{
	struct gmem_recovery *recovery = calloc(1, sizeof(*recovery));
	int err;

	if (!recovery)
		return -ENOMEM;
	core->recovery = recovery;
	recovery->next_id = atomic_load(&core->next_id);
	err = load_accounts(core, recovery);
	if (!err)
		err = load_files(core, recovery);
	if (!err)
		err = load_sessions(core, recovery);
	if (!err)
		err = load_objects(core, recovery);
	if (!err)
		err = load_sources(recovery);
	if (!err)
		err = load_pools(core, recovery);
	if (!err)
		err = load_regions(core, recovery);
	if (!err)
		err = load_hints(core);
	return err;
}

/* ---- processes ---- */

static void resume_agent(struct gmem_core *core, struct gmem_view *view)
{
	int fd = gmem_keep_take(&core->keep, "agent.%llu.%llu", (unsigned long long)view->session_id,
				(unsigned long long)view->id);
	struct gmem_agent *agent;

	if (fd >= 0 && !gmem_agent_create(fd, &agent))
		atomic_store(&view->agent, agent);
}

static void give_up(struct gmem_core *core, const char *kind, unsigned long long session, unsigned long long context, int fd)
{
	if (fd < 0)
		return;
	gmem_keep_forget(&core->keep, "%s.%llu.%llu", kind, session, context);
	close(fd);
}

/* NULL: its descriptors are not there, as it had not come far enough; or its device is not. */
static struct gmem_view *resume_view(struct gmem_session *session, int hnid, uint64_t context, pid_t pid)
{
	struct gmem_core *core = session->core;
	unsigned long long id = session->id, number = context;
	int uffd = gmem_keep_take(&core->keep, "uffd.%llu.%llu", id, number);
	int pidfd = gmem_keep_take(&core->keep, "pid.%llu.%llu", id, number);
	struct gmem_view *view = NULL;

	/* Nobody would watch what a context touches, and it would read zeros: it is ended before its userfaultfd is closed. */
	if (uffd < 0 || !gmem_core_hnode(core, hnid) ||
	    gmem_session_view(session, hnid, context, uffd, pidfd, pid, !context, &view)) {
		if (context && pidfd >= 0)
			syscall(SYS_pidfd_send_signal, pidfd, SIGKILL, NULL, 0);
		give_up(core, "uffd", id, number, uffd);
		give_up(core, "pid", id, number, pidfd);
		return NULL;
	}
	resume_agent(core, view);
	gmem_crash(GMEM_CRASH_RECOVER_VIEW);
	return view;
}

/* One whose process has what it had mapped, and says so to the driver. */
static struct gmem_view *resume_channel(struct gmem_session *session, struct gmem_hnode *hnode, uint64_t context, pid_t pid)
{
	unsigned long long id = session->id, number = context;
	int fd = gmem_keep_take(&session->core->keep, "chan.%llu.%llu", id, number);
	struct gmem_pmap *pmap;
	struct gmem_view *view = NULL;

	if (fd < 0)
		return NULL;
	if (!hnode->ops->pmap_adopt || hnode->ops->pmap_adopt(hnode->device, session->id, fd, &pmap)) {
		give_up(session->core, "chan", id, number, fd);
	} else if (gmem_session_view_pmap(session, hnode, context, pmap, fd, pid, &view)) {
		hnode->ops->pmap_destroy(pmap);
		gmem_keep_forget(&session->core->keep, "chan.%llu.%llu", id, number);
	}
	return view;
}

static struct gmem_view *resume_context(struct gmem_session *session, const struct gmem_record *record)
{
	int hnid = record->context.hnid;
	struct gmem_hnode *hnode = gmem_core_hnode(session->core, hnid);

	return hnode && gmem_hnode_own_frames(hnode) ?
		       resume_channel(session, hnode, record->id, record->context.pid) :
		       resume_view(session, hnid, record->id, record->context.pid);
}

static int resume_contexts(struct gmem_core *core)
{
	struct numbered *all;
	size_t count;
	int err = collect(&core->keep, GMEM_RECORD_CONTEXT, &all, &count);

	if (err)
		return err;
	for (size_t i = 0; i < count; i++) {
		struct gmem_session *session = gmem_session_get(core, all[i].record.context.session);
		int hnid = all[i].record.context.hnid;
		struct gmem_view *view = NULL;

		if (session)
			view = resume_context(session, &all[i].record);
		if (view) {
			view->record = all[i].number;
			atomic_fetch_add(&core->context_count, 1);
			atomic_fetch_add(&gmem_core_hnode(core, hnid)->contexts, 1);
		} else {
			gmem_record_drop(&core->keep, &all[i].number);
		}
		gmem_session_unref(session);
	}
	free(all);
	return 0;
}

static int resume_overlays(struct gmem_core *core)
{
	struct numbered *all;
	size_t count;
	int err = collect(&core->keep, GMEM_RECORD_OVERLAY, &all, &count);

	if (err)
		return err;
	for (size_t i = 0; i < count; i++) {
		struct gmem_view *view = gmem_context_find(core, all[i].record.id);

		if (!view || gmem_overlay_adopt(view, &all[i].record, all[i].number))
			gmem_record_drop(&core->keep, &all[i].number);
		gmem_view_unref(view);
	}
	free(all);
	return 0;
}

/* Memory that a device has of each object, before it is asked for what it has of nobody. */
static int resume_mems(struct gmem_core *core, int hnid)
{
	struct gmem_recovery *recovery = core->recovery;
	struct gmem_file *file;
	int err = 0;

	for (size_t i = 0; !err && i < recovery->object_count; i++)
		if (recovery->objects[i]->shift == GMEM_SHIFT_2M)
			err = gmem_object_file(recovery->objects[i], hnid, &file);
	return err;
}

static int resume_devices(struct gmem_core *core)
{
	int err = 0;

	for (int h = 1; !err && h < GMEM_HNODE_MAX; h++) {
		struct gmem_hnode *hnode = gmem_core_hnode(core, h);

		if (!hnode || !gmem_hnode_own_frames(hnode))
			continue;
		err = resume_mems(core, h);
		if (!err && hnode->ops->settle)
			hnode->ops->settle(hnode->device);
	}
	return err;
}

typedef void (*session_fn)(struct gmem_session *session, struct gmem_recovery *recovery);

static void for_sessions(struct gmem_core *core, session_fn fn)
{
	for (size_t b = 0; b < GMEM_SESSION_BUCKETS; b++)
		for (struct gmem_session *s = core->sessions[b]; s; s = s->next)
			fn(s, core->recovery);
}

static void resume_process(struct gmem_session *session, struct gmem_recovery *recovery)
{
	(void)recovery;
	resume_view(session, GMEM_HOST, 0, atomic_load(&session->pid));
}

/* ---- pages ---- */

static int protect_view(struct gmem_view *view, struct gmem_range range, void *arg)
{
	(void)arg;
	gmem_view_protect(view, range, GMEM_PROT_READ);
	return 0;
}

/* NULL: it has nothing there. */
static struct gmem_file *file_on(struct gmem_object *object, struct gmem_hnode *hnode, int hnid)
{
	struct gmem_file *file = NULL;

	if (hnode && gmem_hnode_own_frames(hnode))
		return gmem_object_file(object, hnid, &file) ? NULL : file;
	return atomic_load(&object->files->files[hnid][object->class_]);
}

static void drop_copy(struct gmem_object *object, uint64_t index, int hnid)
{
	struct gmem_hnode *hnode = gmem_core_hnode(object->core, hnid);
	struct gmem_file *file = file_on(object, hnode, hnid);
	uint64_t bytes = 1ull << object->shift;

	if (hnode && gmem_hnode_is_peer(hnode)) {
		gmem_tier_free(hnode, object->pn + index, bytes);
	} else if (file) {
		gmem_file_punch(file, object->offset + index * bytes, bytes);
	}
}

/* The device is there, and so is the page. */
static bool has_page(struct gmem_object *object, uint64_t index, int hnid)
{
	struct gmem_hnode *hnode = gmem_core_hnode(object->core, hnid);
	struct gmem_file *file;

	if (!hnode)
		return false;
	if (gmem_hnode_is_peer(hnode))
		return hnode->keep && hnode->keep->restored;
	if (!gmem_hnode_own_frames(hnode))
		return true;
	file = file_on(object, hnode, hnid);
	return file && gmem_devmem_at(file, object->offset + (index << object->shift));
}

/* The rule of lpt.h, by the direction alone. Who could write may have gone on doing so: now he can't, until he faults. */
static gmem_word_t settle(struct gmem_object *object, uint64_t index, gmem_word_t word)
{
	uint32_t valid = gmem_word_valid(word), gone = 0;
	enum gmem_dir dir = gmem_word_dir(word);

	if (dir == GMEM_DIR_COPY || dir == GMEM_DIR_FILL)
		gone = 1u << gmem_word_target(word) & ~valid;
	else if (dir == GMEM_DIR_UPGRADE || dir == GMEM_DIR_DISCARD)
		gone = ~valid;
	for (int h = 0; h < GMEM_HNODE_MAX; h++)
		if (gone >> h & 1)
			drop_copy(object, index, h);
	if (dir == GMEM_DIR_DISCARD)
		return gmem_word_why(word) == GMEM_WHY_LOST ?
			       gmem_word_set_state(gmem_word_set_why(0, GMEM_WHY_LOST), GMEM_POISONED) : 0;
	for (int h = 0; h < GMEM_HNODE_MAX; h++)
		if (valid >> h & 1)
			gmem_object_for_views(object, h, index << object->shift, 1ull << object->shift, protect_view, NULL);
	word = gmem_word_set(gmem_word_set(gmem_word_set_writer(word, -1), 2, 15, 0), 6, 15, 0);
	return gmem_word_set_state(word, valid ? GMEM_RESIDENT : GMEM_NOMAP);
}

static gmem_word_t without_lost_devices(struct gmem_object *object, uint64_t index, gmem_word_t word)
{
	uint32_t valid = gmem_word_valid(word);

	for (int h = 0; h < GMEM_HNODE_MAX; h++)
		if ((valid >> h & 1) && !has_page(object, index, h)) {
			valid &= ~(1u << h);
			drop_copy(object, index, h);
		}
	if (valid == gmem_word_valid(word))
		return word;
	if (valid)
		return gmem_word_set_writer(gmem_word_set_valid(word, valid), -1);
	gmem_count(&object->core->stats.poisoned_pages, 1);
	gmem_core_post(object->core, GMEM_EVENT_POISONED, object->account->session_id, index << object->shift, 0, 0, -EIO);
	return gmem_word_set_state(gmem_word_set_why(0, GMEM_WHY_LOST), GMEM_POISONED);
}

static int resume_page(struct gmem_object *object, uint64_t index)
{
	_Atomic gmem_word_t *at = &object->core->lpt.words[object->pn + index];
	gmem_word_t word = atomic_load(at) & ~GMEM_WORD_WAITERS;
	uint32_t valid;
	int err = 0;

	if (gmem_word_state(word) == GMEM_BUSY)
		word = settle(object, index, word);
	word = without_lost_devices(object, index, word);
	valid = gmem_word_valid(word);
	for (int h = 0; !err && h < GMEM_HNODE_MAX; h++) {
		struct gmem_hnode *hnode = valid >> h & 1 ? gmem_core_hnode(object->core, h) : NULL;

		if (!hnode)
			continue;
		err = gmem_hnode_frame_adopt(hnode, object, index);
		if (!err && (gmem_word_flags(word) & GMEM_PAGE_PINNED))
			gmem_hnode_pinned(hnode, (int64_t)1 << object->shift);
	}
	gmem_crash(GMEM_CRASH_RECOVER_PAGE);
	atomic_store(at, word);
	return err;
}

static int resume_object(struct gmem_object *object)
{
	struct gmem_lpt *lpt = &object->core->lpt;
	uint64_t pn = object->pn, end = object->pn + object->pages, stop;
	int err = 0;

	while (!err && pn < end && !gmem_lpt_next_touched(lpt, &pn, end, &stop))
		for (; !err && pn < stop; pn++)
			err = resume_page(object, pn - object->pn);
	return err;
}

/* Words that were left between the end of their object and that of its extent. */
static void clear_between(struct gmem_core *core, struct gmem_recovery *recovery)
{
	uint64_t pn = 0, stop;

	for (size_t i = 0; i <= recovery->object_count; i++) {
		struct gmem_object *object = i < recovery->object_count ? recovery->objects[i] : NULL;
		uint64_t end = object ? object->pn : core->lpt.pages;

		while (pn < end && !gmem_lpt_next_touched(&core->lpt, &pn, end, &stop)) {
			gmem_file_punch(core->lpt.file, pn * sizeof(gmem_word_t), (stop - pn) * sizeof(gmem_word_t));
			pn = stop;
		}
		pn = object ? (object->pn + object->pages + 511) & ~511ull : pn;
	}
}

static int resume_holds(struct gmem_core *core)
{
	struct numbered *all;
	size_t count;
	int err = collect(&core->keep, GMEM_RECORD_HOLD, &all, &count);

	if (err)
		return err;
	for (size_t i = 0; i < count; i++) {
		struct gmem_view *view = gmem_context_find(core, all[i].record.id);
		struct gmem_range range = { all[i].record.hold.va, all[i].record.hold.bytes };

		if (!view || gmem_hold_adopt(view, range, (struct gmem_hold_name){ all[i].number, all[i].record.hold.index,
										     all[i].record.hold.asked }))
			gmem_record_drop(&core->keep, &all[i].number);
		gmem_view_unref(view);
	}
	free(all);
	return 0;
}

/* A predecessor that was killed between the cut of a region and the end of its pages has left those behind. */
static void release_unmapped(struct gmem_recovery *recovery)
{
	for (size_t i = 0; i < recovery->object_count; i++)
		gmem_session_release_piece(recovery->objects[i], 0, recovery->objects[i]->bytes, NULL);
}

/* ---- going on ---- */

/* A fault that the predecessor has read is not told again; who waits for it has to ask once more. */
static void wake_all(struct gmem_core *core, struct gmem_view *view)
{
	gmem_rwlock_read(&view->as->lock);
	for (size_t i = 0; i < view->as->count; i++)
		gmem_uffd_wake(view->uffd, view->as->regions[i]->va, view->as->regions[i]->bytes);
	gmem_rwlock_unlock(&view->as->lock);
	for (int c = 0; view->id && c < GMEM_CLASS_COUNT; c++)
		gmem_uffd_wake(view->uffd, core->window.part_base[c], core->window.part_bytes[c]);
}

/* Once one is served, it may fork: the child is watched already, and a second time would end that. */
static void go_on(struct gmem_session *session, struct gmem_recovery *recovery)
{
	if (session->id >= recovery->next_id)
		return;
	for (struct gmem_view *view = session->as.views; view; view = view->next) {
		if (view->pmap)
			gmem_view_flush(view); /* one that did not answer is told of */
		else if (!gmem_faults_watch(session->core, view))
			wake_all(session->core, view);
	}
	gmem_ring_resume(session);
}

static void let_go(struct gmem_core *core)
{
	struct gmem_recovery *recovery = core->recovery;

	core->recovery = NULL;
	for (size_t i = 0; i < recovery->object_count; i++)
		gmem_object_unref(recovery->objects[i]);
	for (size_t i = 0; i < recovery->account_count; i++)
		gmem_account_unref(recovery->accounts[i]);
	free(recovery->objects);
	free(recovery->accounts);
	free(recovery);
}

bool gmem_core_recovers(struct gmem_core *core)
{
	return core->recovering;
}

int gmem_core_resume(struct gmem_core *core)
{
	int err = 0;

	if (!core->recovering)
		return 0;
	for_sessions(core, resume_process);
	err = resume_contexts(core);
	if (!err)
		err = resume_devices(core);
	if (!err)
		err = resume_overlays(core);
	for (size_t i = 0; !err && i < core->recovery->object_count; i++)
		err = resume_object(core->recovery->objects[i]);
	if (!err)
		err = resume_holds(core);
	if (err)
		return err;
	clear_between(core, core->recovery);
	gmem_crash(GMEM_CRASH_RECOVER_MAPS);
	for_sessions(core, gmem_reconcile);
	release_unmapped(core->recovery);
	core->recovering = false;
	gmem_crash(GMEM_CRASH_RECOVER_DONE);
	for_sessions(core, go_on);
	let_go(core);
	gmem_keep_drop_left(&core->keep);
	gmem_pools_go_on(core);
	return 0;
}
