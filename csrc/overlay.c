/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <stdlib.h>

#include <gmem/internal.h>
#include <gmem/overlay.h>
#include <gmem/pages.h>
#include <gmem/uffd.h>

int gmem_context_overlays(struct gmem_core *core, uint64_t id, int hnid, struct gmem_region_info *regions,
			  size_t capacity, size_t *ret_count)
{
	struct gmem_session *session = gmem_session_get(core, id);
	size_t count = 0;
	int err = 0;

	if (!session)
		return -ENOENT;
	gmem_rwlock_read(&session->as.lock);
	for (size_t i = 0; !err && i < session->as.count; i++) {
		struct gmem_region *region = session->as.regions[i];
		struct gmem_file *file;
		int fd;

		if (region->object->files == session->account &&
		    region->va - session->core->window.base == region->object->offset + region->offset)
			continue;
		err = gmem_object_file(region->object, hnid, &file);
		if (!err)
			err = gmem_object_lend(region->object, file, region->read_only, &fd);
		if (!err && count < capacity)
			regions[count] = (struct gmem_region_info){
				.va = region->va, .bytes = region->bytes, .fork = region->fork,
				.offset = region->object->offset + region->offset,
				.page_bytes = 1ull << region->object->shift, .class_ = region->object->class_,
				.read_only = region->read_only, .fd = fd,
			};
		count++;
	}
	gmem_rwlock_unlock(&session->as.lock);
	if (!err)
		*ret_count = count;
	gmem_session_unref(session);
	return err;
}

bool gmem_overlay_maps(struct gmem_view *view, const struct gmem_place *place)
{
	struct gmem_overlay *overlay;
	bool found;

	if (view->hnid == GMEM_HOST)
		return true;
	if (!atomic_load(&view->overlay_count))
		return !place->object->pooled;
	gmem_mutex_lock(&view->as->views_lock);
	for (overlay = view->overlays; overlay; overlay = overlay->next)
		if (place->range.va - overlay->range.va < overlay->range.bytes)
			break;
	found = overlay ? overlay->pn == place->object->pn : !place->object->pooled;
	gmem_mutex_unlock(&view->as->views_lock);
	return found;
}

static void insert(struct gmem_view *view, struct gmem_overlay *overlay)
{
	gmem_mutex_lock(&view->as->views_lock);
	overlay->next = view->overlays;
	view->overlays = overlay;
	atomic_fetch_add(&view->overlay_count, 1);
	gmem_mutex_unlock(&view->as->views_lock);
}

/* One that overlaps the range. */
static struct gmem_overlay *take_out(struct gmem_view *view, struct gmem_range range)
{
	struct gmem_overlay **at, *overlay;

	gmem_mutex_lock(&view->as->views_lock);
	for (at = &view->overlays; *at; at = &(*at)->next)
		if ((*at)->range.va < range.va + range.bytes && range.va < (*at)->range.va + (*at)->range.bytes)
			break;
	overlay = *at;
	if (overlay) {
		*at = overlay->next;
		atomic_fetch_sub(&view->overlay_count, 1);
	}
	gmem_mutex_unlock(&view->as->views_lock);
	return overlay;
}

static void drop_range(struct gmem_view *view, struct gmem_range range)
{
	struct gmem_overlay *overlay;

	while ((overlay = take_out(view, range))) {
		gmem_record_drop(&view->session->core->keep, &overlay->record);
		free(overlay);
	}
}

static int add(struct gmem_view *view, struct gmem_range range, uint64_t pn, uint32_t known)
{
	struct gmem_record record = { .kind = GMEM_RECORD_OVERLAY, .id = view->id };
	struct gmem_overlay *overlay = malloc(sizeof(*overlay));
	int err = overlay ? 0 : -ENOMEM;

	record.overlay.va = range.va;
	record.overlay.bytes = range.bytes;
	record.overlay.object = pn;
	if (!err) {
		*overlay = (struct gmem_overlay){ .range = range, .pn = pn, .record = known };
		err = known ? 0 : gmem_record_put(&view->session->core->keep, &record, &overlay->record);
	}
	if (err)
		free(overlay);
	else
		insert(view, overlay);
	return err;
}

int gmem_overlay_adopt(struct gmem_view *view, const struct gmem_record *known, uint32_t record)
{
	return add(view, (struct gmem_range){ known->overlay.va, known->overlay.bytes }, known->overlay.object, record);
}

void gmem_overlays_free(struct gmem_view *view)
{
	drop_range(view, (struct gmem_range){ 0, UINT64_MAX });
}

/* Of each pool's region in the range, that it is mapped there now. */
static int add_range(struct gmem_view *view, uint64_t va, uint64_t end)
{
	struct gmem_place place;
	int err = 0;

	for (; !err && va < end && !gmem_as_lookup(view->as, va, &place); va = place.region_va + place.region_bytes) {
		uint64_t stop = place.region_va + place.region_bytes;

		if (place.object->pooled)
			err = add(view, (struct gmem_range){ va, (stop < end ? stop : end) - va }, place.object->pn, 0);
		gmem_object_unref(place.object);
	}
	return err;
}

int gmem_context_overlay(struct gmem_core *core, uint64_t context, uint64_t va, uint64_t bytes)
{
	struct gmem_view *view = gmem_context_find(core, context);
	int err;

	if (!view)
		return -ENOENT;
	err = va & 4095 || bytes & 4095 || !bytes ? -EINVAL : gmem_range_check(view->session, va, bytes);
	if (!err)
		err = gmem_uffd_register(view->uffd, va, bytes);
	if (!err) {
		drop_range(view, (struct gmem_range){ va, bytes });
		err = add_range(view, va, va + bytes);
	}
	gmem_view_unref(view);
	return err;
}

int gmem_context_uncover(struct gmem_core *core, uint64_t context, uint64_t va, uint64_t bytes)
{
	const struct gmem_window *window = &core->window;
	struct gmem_view *view = gmem_context_find(core, context);
	int err;

	if (!view)
		return -ENOENT;
	err = va & 4095 || bytes & 4095 || !bytes || va < window->base || va - window->base >= window->bytes ||
	      bytes > window->bytes - (va - window->base) ? -EINVAL : gmem_uffd_register(view->uffd, va, bytes);
	if (!err)
		drop_range(view, (struct gmem_range){ va, bytes });
	gmem_view_unref(view);
	return err;
}
