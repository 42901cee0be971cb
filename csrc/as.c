/* SPDX-License-Identifier: Apache-2.0 */
#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include <gmem/crash.h>
#include <gmem/as.h>
#include <gmem/internal.h>

int gmem_as_init(struct gmem_as *as, struct gmem_keep *keep, uint64_t session_id)
{
	as->regions = calloc(8, sizeof(*as->regions));
	if (!as->regions)
		return -ENOMEM;
	as->session_id = session_id;
	as->count = 0;
	as->capacity = 8;
	as->views = NULL;
	gmem_hints_init(&as->hints, keep, session_id);
	gmem_rwlock_init(&as->lock, GMEM_RANK_AS);
	gmem_mutex_init(&as->views_lock, GMEM_RANK_VIEWS);
	return 0;
}

void gmem_as_deinit(struct gmem_as *as)
{
	assert(!as->count && !as->views);
	free(as->regions);
	gmem_hints_deinit(&as->hints);
	gmem_rwlock_deinit(&as->lock);
	gmem_mutex_deinit(&as->views_lock);
}

/* Index of the first region that ends behind va. */
static size_t find(struct gmem_as *as, uint64_t va)
{
	size_t low = 0, high = as->count;

	while (low < high) {
		size_t mid = (low + high) / 2;

		if (as->regions[mid]->va + as->regions[mid]->bytes <= va)
			low = mid + 1;
		else
			high = mid;
	}
	return low;
}

static int grow_locked(struct gmem_as *as, size_t count)
{
	struct gmem_region **grown;

	if (count <= as->capacity)
		return 0;
	grown = realloc(as->regions, as->capacity * 2 * sizeof(*grown));
	if (!grown)
		return -ENOMEM;
	as->regions = grown;
	as->capacity *= 2;
	return 0;
}

static int write_record_locked(struct gmem_region *region)
{
	struct gmem_record record = { .kind = GMEM_RECORD_REGION, .id = region->object->pn };

	record.region.session = region->as->session_id;
	record.region.va = region->va;
	record.region.bytes = region->bytes;
	record.region.offset = region->offset;
	record.region.fork = (uint8_t)region->fork;
	record.region.committed = region->committed;
	record.region.read_only = region->read_only;
	record.region.asked = region->asked;
	return gmem_record_put(&region->object->core->keep, &record, &region->record);
}

static void link_object(struct gmem_region *region)
{
	struct gmem_object *object = region->object;

	gmem_mutex_lock(&object->lock);
	region->next = object->regions;
	object->regions = region;
	object->regions_generation++;
	gmem_mutex_unlock(&object->lock);
	atomic_fetch_add(&object->core->region_count, 1);
}

static void unlink_object(struct gmem_region *region)
{
	struct gmem_object *object = region->object;
	struct gmem_region **at = &object->regions;

	gmem_mutex_lock(&object->lock);
	while (*at != region)
		at = &(*at)->next;
	*at = region->next;
	object->regions_generation++;
	gmem_mutex_unlock(&object->lock);
	atomic_fetch_sub(&object->core->region_count, 1);
}

static void place_locked(struct gmem_as *as, struct gmem_region *region)
{
	size_t at = find(as, region->va);

	memmove(&as->regions[at + 1], &as->regions[at], (as->count - at) * sizeof(*as->regions));
	as->regions[at] = region;
	as->count++;
}

static void take_out_locked(struct gmem_as *as, size_t at)
{
	memmove(&as->regions[at], &as->regions[at + 1], (as->count - at - 1) * sizeof(*as->regions));
	as->count--;
}

/* known: the number of the record that it has already, or 0. */
static int insert_locked(struct gmem_as *as, const struct gmem_region *like, uint32_t known)
{
	struct gmem_region *region;
	size_t at = find(as, like->va);

	if (at < as->count && as->regions[at]->va < like->va + like->bytes)
		return -EEXIST;
	if (as->count >= GMEM_REGIONS_MAX)
		return -ENOMEM;
	region = malloc(sizeof(*region));
	if (!region || grow_locked(as, as->count + 1)) {
		free(region);
		return -ENOMEM;
	}
	*region = (struct gmem_region){ .va = like->va, .bytes = like->bytes, .offset = like->offset, .as = as,
					.fork = like->fork, .read_only = like->read_only, .committed = like->committed,
					.record = known, .object = like->object };
	if (!known && write_record_locked(region)) {
		free(region);
		return -ENOMEM;
	}
	gmem_object_ref(region->object);
	place_locked(as, region);
	link_object(region);
	gmem_crash(GMEM_CRASH_REGION_LINKED);
	return 0;
}

int gmem_as_insert_like(struct gmem_as *as, const struct gmem_region *like)
{
	int err;

	gmem_rwlock_write(&as->lock);
	err = insert_locked(as, like, 0);
	gmem_rwlock_unlock(&as->lock);
	return err;
}

int gmem_as_insert(struct gmem_as *as, struct gmem_object *object, uint64_t va, uint64_t offset, uint64_t bytes,
		   enum gmem_fork fork, bool committed)
{
	const struct gmem_region like = { .va = va, .bytes = bytes, .offset = offset, .object = object, .fork = fork,
					  .committed = committed };

	return gmem_as_insert_like(as, &like);
}

int gmem_as_insert_private(struct gmem_as *as, const struct gmem_region *like)
{
	return insert_locked(as, like, 0);
}

int gmem_as_adopt(struct gmem_as *as, struct gmem_object *object, const struct gmem_record *known, uint32_t record)
{
	const struct gmem_region like = { .va = known->region.va, .bytes = known->region.bytes, .offset = known->region.offset,
					  .object = object, .fork = (enum gmem_fork)known->region.fork,
					  .committed = known->region.committed, .read_only = known->region.read_only };
	int err;

	gmem_rwlock_write(&as->lock);
	err = insert_locked(as, &like, record);
	if (!err)
		as->regions[find(as, known->region.va)]->asked = known->region.asked;
	gmem_rwlock_unlock(&as->lock);
	return err;
}

void gmem_as_asked(struct gmem_as *as, uint64_t va, uint64_t asked)
{
	size_t at;

	gmem_rwlock_write(&as->lock);
	at = find(as, va);
	if (at < as->count && as->regions[at]->va == va) {
		as->regions[at]->asked = asked;
		write_record_locked(as->regions[at]);
	}
	gmem_rwlock_unlock(&as->lock);
}

bool gmem_as_find_asked(struct gmem_as *as, uint64_t asked, uint64_t bytes, uint64_t *ret_va)
{
	bool found = false;

	gmem_rwlock_read(&as->lock);
	for (size_t i = 0; !found && i < as->count; i++) {
		const struct gmem_region *region = as->regions[i];

		found = region->asked == asked && region->bytes == bytes;
		if (found)
			*ret_va = region->va;
	}
	gmem_rwlock_unlock(&as->lock);
	return found;
}

uint64_t gmem_as_next(struct gmem_as *as, uint64_t va)
{
	uint64_t next = UINT64_MAX;
	size_t at;

	gmem_rwlock_read(&as->lock);
	at = find(as, va);
	if (at < as->count)
		next = as->regions[at]->va;
	gmem_rwlock_unlock(&as->lock);
	return next;
}

void gmem_as_commit(struct gmem_as *as, uint64_t va)
{
	size_t at;

	gmem_rwlock_write(&as->lock);
	at = find(as, va);
	if (at < as->count && as->regions[at]->va == va) {
		as->regions[at]->committed = true;
		write_record_locked(as->regions[at]);
	}
	gmem_rwlock_unlock(&as->lock);
}

void gmem_as_commit_all(struct gmem_as *as)
{
	gmem_rwlock_write(&as->lock);
	for (size_t i = 0; i < as->count; i++) {
		as->regions[i]->committed = true;
		write_record_locked(as->regions[i]);
	}
	gmem_rwlock_unlock(&as->lock);
}

/* Changes what a region covers; the object's readers see it in one step. */
static void resize(struct gmem_region *region, uint64_t va, uint64_t offset, uint64_t bytes)
{
	gmem_mutex_lock(&region->object->lock);
	region->va = va;
	region->offset = offset;
	region->bytes = bytes;
	region->object->regions_generation++;
	gmem_mutex_unlock(&region->object->lock);
	write_record_locked(region);
}

/* Cuts [start, end) out of the region at index at; returns the piece that went, with an object reference. */
static struct gmem_region cut_locked(struct gmem_as *as, size_t at, uint64_t start, uint64_t end)
{
	struct gmem_region *region = as->regions[at], piece;
	uint64_t region_end = region->va + region->bytes;

	start = start > region->va ? start : region->va;
	end = end < region_end ? end : region_end;
	piece = *region;
	piece.va = start;
	piece.offset = region->offset + (start - region->va);
	piece.bytes = end - start;
	if (start == region->va && end == region_end) {
		take_out_locked(as, at);
		unlink_object(region);
		gmem_record_drop(&region->object->core->keep, &region->record);
		free(region);
		return piece; /* takes over the region's reference */
	}
	gmem_object_ref(region->object);
	if (start == region->va) {
		resize(region, end, region->offset + (end - region->va), region_end - end);
	} else {
		struct gmem_region tail = *region;

		tail.va = end;
		tail.offset += end - region->va;
		tail.bytes = region_end - end;
		resize(region, region->va, region->offset, start - region->va);
		gmem_crash(GMEM_CRASH_REGION_CUT);
		/* Out of memory: the tail is forgotten, and a touch of it is a clear SIGBUS. */
		if (end < region_end)
			insert_locked(as, &tail, 0);
	}
	return piece;
}

void gmem_as_remove(struct gmem_as *as, uint64_t va, uint64_t bytes, gmem_piece_fn fn, void *arg)
{
	for (;;) {
		struct gmem_region piece;
		size_t at;

		gmem_rwlock_write(&as->lock);
		at = find(as, va);
		if (at == as->count || as->regions[at]->va >= va + bytes) {
			gmem_hints_unmapped(&as->hints, va, va + bytes);
			gmem_rwlock_unlock(&as->lock);
			return;
		}
		piece = cut_locked(as, at, va, va + bytes);
		gmem_rwlock_unlock(&as->lock);
		if (fn)
			fn(piece.object, piece.offset, piece.bytes, arg);
		gmem_object_unref(piece.object);
	}
}

/* What was announced there (gmem_adopt) has come; its last piece comes last. */
static void arrived_locked(struct gmem_as *as, const struct gmem_region *piece, uint64_t va)
{
	size_t at = find(as, va);
	struct gmem_region *region = at < as->count ? as->regions[at] : NULL;

	if (!region || region->object != piece->object || region->va + region->bytes != va + piece->bytes)
		return;
	region->committed = true;
	write_record_locked(region);
}

void gmem_as_move(struct gmem_as *as, uint64_t from, uint64_t to, uint64_t bytes)
{
	gmem_rwlock_write(&as->lock);
	for (;;) {
		size_t at = find(as, from);
		struct gmem_region piece, moved;

		if (at == as->count || as->regions[at]->va >= from + bytes)
			break;
		moved = piece = cut_locked(as, at, from, from + bytes);
		moved.va = to + (piece.va - from);
		if (insert_locked(as, &moved, 0) == -EEXIST)
			arrived_locked(as, &piece, moved.va);
		gmem_object_unref(piece.object); /* the inserted region has its own, or none could be made */
	}
	gmem_rwlock_unlock(&as->lock);
}

int gmem_as_lookup(struct gmem_as *as, uint64_t va, struct gmem_place *ret)
{
	struct gmem_region *region;
	uint64_t offset, page, start, end;
	size_t at;

	gmem_rwlock_read(&as->lock);
	at = find(as, va);
	if (at == as->count || as->regions[at]->va > va) {
		gmem_rwlock_unlock(&as->lock);
		return -ENOENT;
	}
	region = as->regions[at];
	offset = region->offset + (va - region->va);
	ret->index = offset >> region->object->shift;
	page = ret->index << region->object->shift;
	start = page > region->offset ? page : region->offset;
	end = page + (1ull << region->object->shift);
	if (end > region->offset + region->bytes)
		end = region->offset + region->bytes;
	ret->range = (struct gmem_range){ region->va + (start - region->offset), end - start };
	ret->region_va = region->va;
	ret->region_bytes = region->bytes;
	ret->region_offset = region->offset;
	ret->fork = region->fork;
	ret->committed = region->committed;
	ret->read_only = region->read_only;
	ret->hint = gmem_hints_at(&as->hints, va);
	ret->object = gmem_object_ref(region->object);
	gmem_rwlock_unlock(&as->lock);
	return 0;
}

int gmem_as_advise(struct gmem_as *as, uint64_t va, uint64_t bytes, enum gmem_advice advice, int hnid)
{
	int err;

	gmem_rwlock_write(&as->lock);
	err = gmem_hints_set(&as->hints, va, va + bytes, advice, hnid);
	gmem_rwlock_unlock(&as->lock);
	return err;
}

void gmem_as_add_view(struct gmem_as *as, struct gmem_view *view)
{
	gmem_mutex_lock(&as->views_lock);
	view->next = as->views;
	as->views = gmem_view_ref(view);
	gmem_mutex_unlock(&as->views_lock);
}

bool gmem_as_remove_view(struct gmem_as *as, struct gmem_view *view)
{
	struct gmem_view **at;
	bool found = false;

	gmem_mutex_lock(&as->views_lock);
	for (at = &as->views; *at && *at != view; at = &(*at)->next)
		;
	if (*at) {
		*at = view->next;
		found = true;
	}
	gmem_mutex_unlock(&as->views_lock);
	if (found)
		gmem_view_unref(view);
	return found;
}

struct gmem_view *gmem_as_view(struct gmem_as *as, int hnid)
{
	struct gmem_view *view;

	gmem_mutex_lock(&as->views_lock);
	for (view = as->views; view && (view->hnid != hnid || atomic_load(&view->dead)); view = view->next)
		;
	if (view)
		gmem_view_ref(view);
	gmem_mutex_unlock(&as->views_lock);
	return view;
}
