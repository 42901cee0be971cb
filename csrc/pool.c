/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <stdlib.h>
#include <time.h>

#include <gmem/copy.h>
#include <gmem/crash.h>
#include <gmem/internal.h>
#include <gmem/migrate.h>
#include <gmem/pool.h>
#include <gmem/source.h>
#include <gmem/uffd.h>

#define AGAIN_TRIES 2000

/* ---- table ---- */

static struct gmem_pool *find_locked(struct gmem_core *core, uint64_t id)
{
	struct gmem_pool *pool;

	for (pool = core->pools; pool && (pool->id != id || pool->unlinked); pool = pool->chain)
		;
	return pool;
}

struct gmem_object *gmem_pool_object(struct gmem_core *core, uint64_t id)
{
	struct gmem_object *object = NULL;
	struct gmem_pool *pool;

	gmem_mutex_lock(&core->pools_lock);
	pool = find_locked(core, id);
	if (pool)
		object = gmem_object_ref(pool->object);
	gmem_mutex_unlock(&core->pools_lock);
	return object;
}

static void insert(struct gmem_pool *pool)
{
	gmem_mutex_lock(&pool->core->pools_lock);
	pool->chain = pool->core->pools;
	pool->core->pools = pool;
	gmem_mutex_unlock(&pool->core->pools_lock);
}

static void take_out_locked(struct gmem_pool *pool)
{
	struct gmem_pool **at;

	for (at = &pool->core->pools; *at != pool; at = &(*at)->chain)
		;
	*at = pool->chain;
}

static void destroy(struct gmem_pool *pool)
{
	gmem_record_drop(&pool->core->keep, &pool->record);
	gmem_object_unref(pool->next);
	gmem_object_unref(pool->object);
	free(pool);
}

static int write_record(struct gmem_pool *pool, const struct gmem_object *object, const struct gmem_object *other,
			bool published)
{
	struct gmem_record record = { .kind = GMEM_RECORD_POOL, .id = pool->id };

	record.pool.object = object->pn;
	record.pool.other = other ? other->pn + 1 : 0;
	record.pool.published = published;
	return gmem_record_put(&pool->core->keep, &record, &pool->record);
}

void gmem_pool_ids(struct gmem_core *core, uint64_t *ids, size_t capacity, size_t *ret_count)
{
	size_t count = 0;

	gmem_mutex_lock(&core->pools_lock);
	for (struct gmem_pool *pool = core->pools; pool; pool = pool->chain) {
		if (pool->unlinked)
			continue;
		if (count < capacity)
			ids[count] = pool->id;
		count++;
	}
	gmem_mutex_unlock(&core->pools_lock);
	*ret_count = count;
}

static void count_pages(struct gmem_object *object, struct gmem_pool_info *info)
{
	struct gmem_lpt *lpt = &object->core->lpt;
	uint64_t pn = object->pn, end = object->pn + object->pages, stop;

	for (; pn < end && !gmem_lpt_next_touched(lpt, &pn, end, &stop); pn = stop)
		for (uint64_t at = pn; at < stop; at++) {
			uint32_t valid = gmem_word_valid(atomic_load_explicit(&lpt->words[at], memory_order_relaxed));

			for (int h = 0; valid >> h; h++)
				info->resident_bytes[h] += valid >> h & 1 ? 1ull << object->shift : 0;
		}
}

static void count_regions(struct gmem_object *object, struct gmem_pool_info *info)
{
	gmem_mutex_lock(&object->lock);
	for (struct gmem_region *region = object->regions; region; region = region->next)
		if (region->read_only)
			info->readers++;
		else
			info->writers++;
	gmem_mutex_unlock(&object->lock);
}

int gmem_pool_info(struct gmem_core *core, uint64_t id, struct gmem_pool_info *ret)
{
	struct gmem_object *object = gmem_pool_object(core, id);

	if (!object)
		return -ENOENT;
	*ret = (struct gmem_pool_info){ .pool = id, .va = core->window.base + object->offset, .bytes = object->bytes,
					.page_bytes = 1ull << object->shift, .class_ = object->class_,
					.sealed = gmem_object_sealed(object),
					.fetched_bytes = gmem_remotesource_fetched(atomic_load(&object->source)) };
	count_regions(object, ret);
	count_pages(object, ret);
	gmem_object_unref(object);
	return 0;
}

/* ---- create, open, unlink ---- */

int gmem_pool_add(struct gmem_core *core, uint64_t id, struct gmem_object *object)
{
	struct gmem_pool *pool = calloc(1, sizeof(*pool));
	int err;

	if (!pool)
		return -ENOMEM;
	*pool = (struct gmem_pool){ .core = core, .id = id };
	err = write_record(pool, object, NULL, false);
	if (err) {
		free(pool);
		return err;
	}
	pool->object = gmem_object_ref(object);
	insert(pool);
	return 0;
}

int gmem_pool_create(struct gmem_core *core, uint64_t id, const struct gmem_pool_args *args, uint64_t *ret_pool)
{
	struct gmem_session *session = gmem_session_get(core, id);
	struct gmem_account *files = NULL;
	struct gmem_object *object = NULL;
	uint64_t pool;
	int err;

	if (!session)
		return -ENOENT;
	pool = gmem_keep_next_id(&core->keep, &core->next_id);
	err = gmem_account_create(core, pool, session->uid, NULL, 0, &files);
	if (!err)
		err = gmem_object_reserve(session, &args->memory, args->persistent ? files : session->account, files, &object);
	if (!err)
		err = gmem_pool_add(core, pool, object);
	gmem_object_unref(object);
	gmem_account_unref(files);
	gmem_session_unref(session);
	if (!err)
		*ret_pool = pool;
	return err;
}

int gmem_pool_adopt(struct gmem_core *core, const struct gmem_record *known, uint32_t record,
		    struct gmem_object *object, struct gmem_object *next)
{
	struct gmem_pool *pool = calloc(1, sizeof(*pool));

	if (!pool)
		return -ENOMEM;
	*pool = (struct gmem_pool){ .id = known->id, .core = core, .record = record, .object = gmem_object_ref(object),
				    .next = next ? gmem_object_ref(next) : NULL };
	insert(pool);
	return 0;
}

/* What the session has there: this pool, as it was opened. */
static int open_already(const struct gmem_place *place, struct gmem_object *object, bool write)
{
	bool before = place->object->successor == object->pn + 1;

	if (place->object != object && !before)
		return -EEXIST;
	return write && place->read_only ? -EBUSY : 0;
}

static struct gmem_region_info info_of(const struct gmem_region *region)
{
	struct gmem_object *object = region->object;

	return (struct gmem_region_info){ .va = region->va, .bytes = region->bytes,
					  .offset = object->offset + region->offset, .page_bytes = 1ull << object->shift,
					  .class_ = object->class_, .committed = region->committed,
					  .read_only = region->read_only, .sealed = gmem_object_sealed(object), .fd = -1 };
}

int gmem_pool_open(struct gmem_core *core, uint64_t id, uint64_t number, bool write, struct gmem_region_info *ret)
{
	struct gmem_session *session = gmem_session_get(core, id);
	struct gmem_object *object = gmem_pool_object(core, number);
	struct gmem_region region = { .object = object, .fork = GMEM_FORK_SHARE, .read_only = !write };
	struct gmem_place place;
	int err = !session || !object ? -ENOENT : write && gmem_object_sealed(object) ? -EPERM : 0;

	if (!err) {
		region.va = core->window.base + object->offset;
		region.bytes = object->bytes;
		if (!gmem_as_lookup(&session->as, region.va, &place)) {
			err = open_already(&place, object, write);
			region = (struct gmem_region){ .object = object, .va = place.region_va, .bytes = place.region_bytes,
						       .offset = place.region_offset, .committed = place.committed,
						       .read_only = place.read_only };
			gmem_object_unref(place.object);
		} else {
			err = gmem_as_insert_like(&session->as, &region);
		}
	}
	if (!err)
		*ret = info_of(&region);
	gmem_object_unref(object);
	gmem_session_unref(session);
	return err;
}

int gmem_pool_unlink(struct gmem_core *core, uint64_t id)
{
	struct gmem_pool *pool;
	bool busy = false;

	gmem_mutex_lock(&core->pools_lock);
	pool = find_locked(core, id);
	if (pool) {
		busy = pool->busy;
		pool->unlinked = true;
		if (!busy)
			take_out_locked(pool);
	}
	gmem_mutex_unlock(&core->pools_lock);
	if (pool && !busy)
		destroy(pool);
	return pool ? 0 : -ENOENT;
}

/* ---- publish ---- */

static void pause_for(int tries)
{
	const struct timespec pause = { 0, tries < 16 ? 1000 : 500000 };

	nanosleep(&pause, NULL);
}

/* An hnode from which the CPU can read it; the page has content. */
static int readable(struct gmem_page *page, struct gmem_hnode **ret)
{
	struct gmem_hnode *from = gmem_page_source(page);
	bool mapped;
	int err = 0;

	if (!from)
		return -EIO;
	if (gmem_hnode_is_peer(from)) {
		err = gmem_page_fetch(page, GMEM_HOST, NULL, (struct gmem_range){ 0, 0 }, GMEM_WHY_HMEMCPY, &mapped);
		from = gmem_core_hnode(page->core, GMEM_HOST);
	}
	*ret = from;
	return err;
}

static int copy_content(struct gmem_page *from, struct gmem_hnode *where, struct gmem_page *to)
{
	struct gmem_hnode *host = gmem_core_hnode(to->core, GMEM_HOST), *engine = gmem_copy_engine(where, host);
	uint8_t *src, *dst;
	int err = gmem_object_alias(from->object, where->hnid, &src);

	if (!err)
		err = gmem_object_alias(to->object, GMEM_HOST, &dst);
	if (err)
		return err;
	if (engine)
		return gmem_copy_by_engine(engine, &(struct gmem_sg){ dst + to->offset, src + from->offset, from->bytes }, 1);
	return gmem_copy(dst + to->offset, src + from->offset, from->bytes);
}

/* To the same page of the next object, which nobody has mapped: committed there before it goes here. A crash in between
 * leaves it in both. */
static int move_content(struct gmem_page *page, struct gmem_object *next)
{
	struct gmem_hnode *where;
	struct gmem_page to;
	bool mapped;
	int err = gmem_page_downgrade(page);

	if (!err)
		err = readable(page, &where);
	if (err)
		return err;
	gmem_page_lock(next, page->index, &to); /* who has it BUSY waits for no page */
	if (!gmem_word_valid(to.word)) {
		err = gmem_page_fetch(&to, GMEM_HOST, NULL, (struct gmem_range){ 0, 0 }, GMEM_WHY_HMEMCPY, &mapped);
		if (!err) {
			err = copy_content(page, where, &to);
			gmem_crash(GMEM_CRASH_PUBLISH_COPY);
			if (err) {
				to.word = gmem_word_set_valid(to.word, 0);
				gmem_page_forget(&to, gmem_core_hnode(page->core, GMEM_HOST));
			}
		}
	}
	gmem_page_unlock(&to);
	gmem_crash(GMEM_CRASH_PUBLISH_MOVED);
	return err;
}

/* What was lost is lost there, too. */
static void lose(struct gmem_object *next, uint64_t index)
{
	struct gmem_page page;

	gmem_page_lock(next, index, &page);
	if (!gmem_word_valid(page.word))
		page.word = gmem_word_set_state(gmem_word_set_why(0, GMEM_WHY_LOST), GMEM_POISONED);
	gmem_page_unlock(&page);
}

static int publish_page(struct gmem_object *object, struct gmem_object *next, uint64_t index)
{
	int err = -EAGAIN;

	for (int tries = 0; (err == -EAGAIN || err == -EBUSY) && tries < AGAIN_TRIES; tries++) {
		struct gmem_page page;

		if (tries)
			pause_for(tries);
		gmem_page_lock(object, index, &page);
		if (gmem_page_poisoned(&page))
			lose(next, index);
		err = gmem_word_valid(page.word) ? move_content(&page, next) : 0;
		/* a device that holds it to read keeps its copy */
		if (!err && gmem_word_valid(page.word) && gmem_page_give_back(&page))
			page.park = false;
		page.park = false;
		gmem_page_unlock(&page);
	}
	return err;
}

static int publish_pages(struct gmem_object *object, struct gmem_object *next)
{
	struct gmem_lpt *lpt = &object->core->lpt;
	uint64_t pn = object->pn, end = object->pn + object->pages, stop;
	int err = 0;

	while (!err && pn < end && !gmem_lpt_next_touched(lpt, &pn, end, &stop))
		for (; !err && pn < stop; pn++)
			if (atomic_load(&lpt->words[pn]))
				err = publish_page(object, next, pn - object->pn);
	return err;
}

static int make_next(struct gmem_pool *pool)
{
	struct gmem_object *object = pool->object;
	struct gmem_account *files;
	int err = gmem_account_create(pool->core, gmem_keep_next_id(&pool->core->keep, &pool->core->next_id),
				      object->account->tenant->uid, NULL, 0, &files);

	if (err)
		return err;
	err = gmem_object_create(pool->core, object->account, files, object->class_, object->offset, object->bytes,
				 object->shift, GMEM_OBJECT_POOLED | GMEM_OBJECT_SEALED | GMEM_OBJECT_SUCCEEDED, &pool->next);
	gmem_account_unref(files);
	return err ? err : write_record(pool, object, pool->next, false);
}

/* Range, charge and name are those of the next one from now on. */
static int replace(struct gmem_pool *pool)
{
	struct gmem_object *object = pool->object, *next = pool->next;
	int err = write_record(pool, next, object, true);

	gmem_crash(GMEM_CRASH_PUBLISHED);
	if (!err)
		err = gmem_object_succeed(object, next);
	if (!err)
		err = write_record(pool, next, NULL, true);
	if (err)
		return err;
	gmem_mutex_lock(&pool->core->pools_lock);
	pool->object = next;
	pool->next = NULL;
	gmem_mutex_unlock(&pool->core->pools_lock);
	gmem_object_unref(object); /* regions that were there before keep it */
	return 0;
}

static int publish(struct gmem_pool *pool)
{
	int err = pool->next ? 0 : make_next(pool);

	if (!err && !gmem_object_sealed(pool->object))
		err = gmem_object_seal(pool->object, pool->next);
	if (!err)
		err = publish_pages(pool->object, pool->next);
	return err ? err : replace(pool);
}

int gmem_pool_publish(struct gmem_core *core, uint64_t id)
{
	struct gmem_pool *pool;
	bool done = false, gone;
	int err = 0;

	if (!core->features.continue_wp)
		return -EOPNOTSUPP;
	gmem_mutex_lock(&core->pools_lock);
	pool = find_locked(core, id);
	if (!pool || pool->busy)
		err = pool ? -EBUSY : -ENOENT;
	else if (!(done = !pool->next && gmem_object_sealed(pool->object)))
		pool->busy = true;
	gmem_mutex_unlock(&core->pools_lock);
	if (err || done)
		return err;
	err = publish(pool);
	gmem_mutex_lock(&core->pools_lock);
	pool->busy = false;
	gone = pool->unlinked;
	if (gone)
		take_out_locked(pool);
	gmem_mutex_unlock(&core->pools_lock);
	if (gone)
		destroy(pool);
	return err == -EAGAIN ? -EBUSY : err;
}

/* ---- recovery, end ---- */

void gmem_pools_go_on(struct gmem_core *core)
{
	uint64_t id;

	do {
		struct gmem_pool *pool;

		id = 0;
		gmem_mutex_lock(&core->pools_lock);
		for (pool = core->pools; pool && !id; pool = pool->chain)
			if (pool->next && !pool->busy)
				id = pool->id;
		gmem_mutex_unlock(&core->pools_lock);
	} while (id && !gmem_pool_publish(core, id)); /* what fails can be asked for again */
}

/* The page of a place, or poison instead: without a daemon it would read zero. */
static void complete_page(struct gmem_view *view, const struct gmem_place *place)
{
	const struct gmem_range nowhere = { 0, 0 };
	struct gmem_object *object = place->object;
	struct gmem_source *source = atomic_load(&object->source);
	struct gmem_page page;
	int err = -EAGAIN;
	bool mapped;

	if (gmem_word_valid(atomic_load(&object->core->lpt.words[object->pn + place->index])))
		return;
	for (int tries = 0; !source->slow && err == -EAGAIN && tries < AGAIN_TRIES; tries++) {
		if (tries)
			pause_for(tries);
		gmem_page_lock(object, place->index, &page);
		err = gmem_page_poisoned(&page) ? -EIO :
		      gmem_page_fetch(&page, GMEM_HOST, NULL, nowhere, GMEM_WHY_DETACH, &mapped);
		page.park = false;
		gmem_page_unlock(&page);
	}
	if (err && object->core->features.poison)
		gmem_uffd_poison(view->uffd, place->range.va, place->range.bytes);
}

/* The first place at or behind va. */
static bool next_place(struct gmem_as *as, uint64_t va, struct gmem_place *ret)
{
	uint64_t next = gmem_as_next(as, va);

	return next != UINT64_MAX && !gmem_as_lookup(as, next > va ? next : va, ret);
}

static void complete(struct gmem_session *session)
{
	struct gmem_view *view = gmem_as_view(&session->as, GMEM_HOST);
	struct gmem_place place;
	uint64_t va = 0;

	while (view && next_place(&session->as, va, &place)) {
		va = atomic_load(&place.object->source) ? place.range.va + place.range.bytes :
							  place.region_va + place.region_bytes;
		if (atomic_load(&place.object->source))
			complete_page(view, &place);
		gmem_object_unref(place.object);
	}
	gmem_view_unref(view);
}

void gmem_pools_complete(struct gmem_core *core)
{
	for (size_t b = 0; b < GMEM_SESSION_BUCKETS; b++) {
		struct gmem_session *session, *next;

		gmem_rwlock_read(&core->sessions_lock);
		session = core->sessions[b] ? gmem_session_ref(core->sessions[b]) : NULL;
		gmem_rwlock_unlock(&core->sessions_lock);
		for (; session; session = next) {
			complete(session);
			gmem_rwlock_read(&core->sessions_lock);
			next = session->next ? gmem_session_ref(session->next) : NULL;
			gmem_rwlock_unlock(&core->sessions_lock);
			gmem_session_unref(session);
		}
	}
}

void gmem_pools_end(struct gmem_core *core)
{
	struct gmem_pool *pool;

	while ((pool = core->pools)) {
		core->pools = pool->chain;
		destroy(pool);
	}
}
