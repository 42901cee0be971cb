/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <stdlib.h>

#include <gmem/crash.h>
#include <gmem/as.h>
#include <gmem/devmem.h>
#include <gmem/internal.h>
#include <gmem/source.h>
#include <gmem/tier.h>
#include <gmem/vm_object.h>

static uint64_t pages_of(uint64_t bytes, uint8_t shift)
{
	return (bytes + (1ull << shift) - 1) >> shift;
}

int gmem_object_create(struct gmem_core *core, struct gmem_account *account, struct gmem_account *files,
		       enum gmem_class class_, uint64_t offset, uint64_t bytes, uint8_t shift, unsigned flags,
		       struct gmem_object **ret)
{
	struct gmem_record record = { .kind = GMEM_RECORD_OBJECT };
	uint32_t number = 0;
	int err = gmem_lpt_extent_alloc(&core->lpt, pages_of(bytes, shift), &record.id);

	if (err)
		return err;
	record.object.account = account->session_id;
	record.object.files = files->session_id;
	record.object.offset = offset;
	record.object.bytes = bytes;
	record.object.shift = shift;
	record.object.class_ = (uint8_t)class_;
	record.object.flags = (uint8_t)flags;
	err = gmem_record_put(&core->keep, &record, &number);
	if (!err)
		err = gmem_object_adopt(core, account, files, &record, number, ret);
	if (err) {
		gmem_record_drop(&core->keep, &number);
		gmem_lpt_extent_free(&core->lpt, record.id, pages_of(bytes, shift));
	}
	return err;
}

int gmem_object_adopt(struct gmem_core *core, struct gmem_account *account, struct gmem_account *files,
		      const struct gmem_record *known, uint32_t record, struct gmem_object **ret)
{
	struct gmem_object *object = calloc(1, sizeof(*object));

	if (!object)
		return -ENOMEM;
	object->refs = 1;
	object->core = core;
	object->pn = known->id;
	object->pages = pages_of(known->object.bytes, known->object.shift);
	object->offset = known->object.offset;
	object->bytes = known->object.bytes;
	object->shift = known->object.shift;
	object->class_ = (enum gmem_class)known->object.class_;
	object->pooled = known->object.flags & GMEM_OBJECT_POOLED;
	atomic_init(&object->sealed, known->object.flags & GMEM_OBJECT_SEALED);
	atomic_init(&object->succeeded, known->object.flags & GMEM_OBJECT_SUCCEEDED);
	object->successor = known->object.successor;
	object->record = record;
	object->account = gmem_account_ref(account);
	object->files = gmem_account_ref(files);
	gmem_mutex_init(&object->lock, GMEM_RANK_OBJECT);
	if (!atomic_load(&object->succeeded))
		gmem_account_map(account, (int64_t)object->bytes);
	atomic_fetch_add(&core->object_count, 1);
	*ret = object;
	return 0;
}

static void describe_source(const struct gmem_object *object, struct gmem_record *record, int *ret_fd)
{
	const struct gmem_source *source = atomic_load(&object->source);

	if (source && source->ops->describe)
		source->ops->describe(source, record, ret_fd);
}

static bool is_described(const struct gmem_object *object)
{
	const struct gmem_source *source = atomic_load(&object->source);

	return source && source->ops->describe;
}

static int rewrite_record(struct gmem_object *object)
{
	struct gmem_record record = { .kind = GMEM_RECORD_OBJECT, .id = object->pn };
	int fd;

	record.object.account = object->account->session_id;
	record.object.files = object->files->session_id;
	record.object.offset = object->offset;
	record.object.bytes = object->bytes;
	record.object.successor = object->successor;
	record.object.shift = object->shift;
	record.object.class_ = (uint8_t)object->class_;
	record.object.flags = (uint8_t)((object->pooled ? GMEM_OBJECT_POOLED : 0) |
					(atomic_load(&object->sealed) ? GMEM_OBJECT_SEALED : 0) |
					(atomic_load(&object->succeeded) ? GMEM_OBJECT_SUCCEEDED : 0));
	describe_source(object, &record, &fd);
	return gmem_record_put(&object->core->keep, &record, &object->record);
}

void gmem_object_uncharge(struct gmem_object *object)
{
	object->uncharged = true;
	gmem_account_map(object->account, -(int64_t)object->bytes);
}

/* The descriptor first: a record without it is a source that is lost. */
int gmem_object_set_source(struct gmem_object *object, struct gmem_source *source, bool uncharged)
{
	struct gmem_record record = { .object = { .bytes = object->bytes } };
	int fd = -1, err = 0;

	gmem_source_set(object, source);
	describe_source(object, &record, &fd);
	atomic_fetch_add(&object->account->sources, 1);
	if (uncharged)
		gmem_object_uncharge(object);
	if (gmem_keeps(&object->core->keep))
		err = gmem_keep_fd(&object->core->keep, fd, "source.%llu", (unsigned long long)object->pn);
	return err ? err : rewrite_record(object);
}

static void forget_source(struct gmem_object *object)
{
	if (!is_described(object))
		return;
	gmem_keep_forget(&object->core->keep, "source.%llu", (unsigned long long)object->pn);
	atomic_fetch_sub(&object->account->sources, 1);
}

int gmem_object_seal(struct gmem_object *object, struct gmem_object *next)
{
	struct gmem_source *source = NULL;
	int err = next ? gmem_source_of_object(next, &source) : 0;

	if (err)
		return err;
	object->successor = next ? next->pn + 1 : 0;
	if (source)
		gmem_source_set(object, source);
	atomic_store(&object->sealed, true);
	return rewrite_record(object);
}

int gmem_object_succeed(struct gmem_object *object, struct gmem_object *next)
{
	int err;

	if (atomic_exchange(&object->succeeded, true))
		return 0;
	atomic_store(&next->succeeded, false);
	gmem_account_map(object->account, -(int64_t)object->bytes);
	gmem_account_map(next->account, (int64_t)next->bytes);
	err = rewrite_record(object);
	return err ? err : rewrite_record(next);
}

struct gmem_object *gmem_object_ref(struct gmem_object *object)
{
	atomic_fetch_add(&object->refs, 1);
	return object;
}

bool gmem_object_tryref(struct gmem_object *object)
{
	unsigned refs = atomic_load(&object->refs);

	while (refs)
		if (atomic_compare_exchange_weak(&object->refs, &refs, refs + 1))
			return true;
	return false;
}

/* Nobody maps the object and nobody can find it any more: only its memory is left. */
static void free_pages(struct gmem_object *object)
{
	struct gmem_core *core = object->core;
	uint64_t pn = object->pn, end = object->pn + object->pages, stop;
	uint32_t used = 0;

	while (pn < end && !gmem_lpt_next_touched(&core->lpt, &pn, end, &stop)) {
		for (; pn < stop; pn++) {
			gmem_word_t word = atomic_load(&core->lpt.words[pn]);
			uint32_t valid = gmem_word_valid(word);

			used |= valid;
			for (int h = 0; valid; h++, valid >>= 1) {
				struct gmem_hnode *hnode = valid & 1 ? gmem_core_hnode(core, h) : NULL;

				if (!hnode)
					continue;
				if (gmem_word_flags(word) & GMEM_PAGE_PINNED)
					gmem_hnode_pinned(hnode, -(int64_t)(1ull << object->shift));
				if (gmem_hnode_is_peer(hnode))
					gmem_tier_free(hnode, pn, 1ull << object->shift);
				gmem_hnode_frame_free(hnode, object, pn - object->pn);
			}
		}
	}
	for (int h = 0; h < GMEM_HNODE_MAX; h++) {
		struct gmem_file *file = atomic_load(&object->files->files[h][object->class_]);
		struct gmem_file *mem = atomic_load(&object->files->mems[h][object->class_]);

		if (mem && used >> h & 1)
			gmem_file_punch(mem, object->offset, object->bytes);
		/* the host's even if nothing is recorded there: the client can have touched it unwatched */
		if (file && (h == GMEM_HOST || used >> h & 1))
			gmem_file_punch(file, object->offset, object->bytes);
	}
}

void gmem_object_unref(struct gmem_object *object)
{
	struct gmem_core *core;

	if (!object || atomic_fetch_sub(&object->refs, 1) != 1)
		return;
	core = object->core;
	for (int h = 0; h < GMEM_HNODE_MAX; h++)
		gmem_alias_unmap(atomic_load(&object->aliases[h]), object->bytes);
	gmem_crash(GMEM_CRASH_OBJECT_FREE);
	if (!atomic_load(&core->stopping))
		free_pages(object);
	if (gmem_core_traces(core))
		gmem_object_trace_gone(object, 0, object->pages);
	gmem_crash(GMEM_CRASH_OBJECT_FREED);
	gmem_record_drop(&core->keep, &object->record); /* before its ranges may come to be another's */
	gmem_crash(GMEM_CRASH_OBJECT_FORGOTTEN);
	gmem_lpt_extent_free(&core->lpt, object->pn, object->pages);
	if (!atomic_load(&object->succeeded)) {
		if (!object->uncharged) {
			gmem_account_map(object->account, -(int64_t)object->bytes);
			atomic_fetch_sub(&core->committed_bytes[object->class_], object->bytes);
		}
		if (!atomic_load(&object->kept) || !gmem_kept_ready(object->account, core->window.base + object->offset))
			gmem_range_free(&core->va[object->class_], core->window.base + object->offset, object->bytes);
	}
	atomic_fetch_sub(&core->object_count, 1);
	forget_source(object);
	gmem_source_release(atomic_load(&object->source)); /* perhaps the last reference on the one that has its range */
	gmem_account_unref(object->files);
	gmem_account_unref(object->account);
	gmem_mutex_deinit(&object->lock);
	free(object);
}

int gmem_object_file(struct gmem_object *object, int hnid, struct gmem_file **ret)
{
	return gmem_account_file(object->files, hnid, object->class_, ret);
}

int gmem_object_lend(struct gmem_object *object, struct gmem_file *file, bool read_only, int *ret_fd)
{
	if (object->pooled || read_only)
		return gmem_file_lend(file, read_only, ret_fd);
	*ret_fd = file->fd; /* of one session: it can only spoil its own */
	return 0;
}

int gmem_object_alias(struct gmem_object *object, int hnid, uint8_t **ret)
{
	uint8_t *alias = atomic_load(&object->aliases[hnid]);
	struct gmem_file *file;
	int err;

	if (alias) {
		*ret = alias;
		return 0;
	}
	err = gmem_object_file(object, hnid, &file);
	if (err)
		return err;
	gmem_mutex_lock(&object->lock);
	alias = atomic_load(&object->aliases[hnid]);
	if (!alias) {
		err = gmem_alias_map(file, object->offset, object->bytes, &alias);
		if (!err)
			atomic_store(&object->aliases[hnid], alias);
	}
	gmem_mutex_unlock(&object->lock);
	if (!err)
		*ret = alias;
	return err;
}

int gmem_object_at(struct gmem_object *object, int hnid, uint64_t offset, uint8_t **ret)
{
	struct gmem_file *file;
	uint8_t *alias;
	int err = gmem_object_file(object, hnid, &file);

	if (err)
		return err;
	if (file->mem) {
		alias = gmem_devmem_at(file, object->offset + offset);
		if (alias)
			*ret = alias;
		return alias ? 0 : -ENOENT;
	}
	err = gmem_object_alias(object, hnid, &alias);
	if (!err)
		*ret = alias + offset;
	return err;
}

int gmem_object_zero(struct gmem_object *object, int hnid, uint64_t offset, uint64_t bytes)
{
	struct gmem_file *file;
	uint8_t *alias;
	int err = gmem_object_file(object, hnid, &file);

	if (err)
		return err;
	if (object->class_ == GMEM_CLASS_HUGE && !file->mem && !gmem_object_alias(object, hnid, &alias))
		return gmem_file_zero(file, object->offset + offset, alias + offset, bytes);
	return gmem_file_populate(file, object->offset + offset, bytes);
}

#define VIEW_BATCH 16

struct view_ref {
	struct gmem_view *view;
	struct gmem_range range;
};

static bool clip(const struct gmem_region *region, uint64_t offset, uint64_t bytes, struct gmem_range *ret)
{
	uint64_t start = offset > region->offset ? offset : region->offset;
	uint64_t end = offset + bytes < region->offset + region->bytes ? offset + bytes : region->offset + region->bytes;

	if (start >= end)
		return false;
	ret->va = region->va + (start - region->offset);
	ret->bytes = end - start;
	return true;
}

/* Views number skip and later, at most VIEW_BATCH of them, referenced. */
static size_t gather(struct gmem_object *object, int hnid, uint64_t offset, uint64_t bytes, size_t skip,
		     struct view_ref *refs, uint64_t *ret_generation)
{
	size_t seen = 0, count = 0;
	struct gmem_range range;

	gmem_mutex_lock(&object->lock);
	*ret_generation = object->regions_generation;
	for (struct gmem_region *region = object->regions; region; region = region->next) {
		if (!clip(region, offset, bytes, &range))
			continue;
		gmem_mutex_lock(&region->as->views_lock);
		for (struct gmem_view *view = region->as->views; view && count < VIEW_BATCH; view = view->next) {
			if ((hnid >= 0 && view->hnid != hnid) || seen++ < skip)
				continue;
			refs[count++] = (struct view_ref){ gmem_view_ref(view), range };
		}
		gmem_mutex_unlock(&region->as->views_lock);
	}
	gmem_mutex_unlock(&object->lock);
	return count;
}

int gmem_object_for_views(struct gmem_object *object, int hnid, uint64_t offset, uint64_t bytes, gmem_view_fn fn,
			  void *arg)
{
	struct view_ref refs[VIEW_BATCH];
	uint64_t generation, first_generation = 0;
	size_t skip = 0, count;
	int err = 0;

	do {
		count = gather(object, hnid, offset, bytes, skip, refs, &generation);
		/* If the list changed between two batches, begin again: what fn does is idempotent. */
		if (skip && generation != first_generation) {
			for (size_t i = 0; i < count; i++)
				gmem_view_unref(refs[i].view);
			skip = 0;
			count = VIEW_BATCH;
			continue;
		}
		first_generation = generation;
		for (size_t i = 0; i < count; i++) {
			if (!err && !atomic_load(&refs[i].view->dead))
				err = fn(refs[i].view, refs[i].range, arg);
			gmem_view_unref(refs[i].view);
		}
		skip += count;
	} while (!err && count == VIEW_BATCH);
	return err;
}

bool gmem_object_mapped(struct gmem_object *object, uint64_t offset, uint64_t bytes)
{
	struct gmem_range range;
	bool mapped = false;

	gmem_mutex_lock(&object->lock);
	for (struct gmem_region *region = object->regions; region && !mapped; region = region->next)
		mapped = clip(region, offset, bytes, &range);
	gmem_mutex_unlock(&object->lock);
	return mapped;
}
