/* SPDX-License-Identifier: Apache-2.0
 *
 * What a process has done while there was no daemon, or had done and its daemon had read but not handled: by the kernel's
 * word on what it has mapped.
 */
#include <stdlib.h>

#include <gmem/internal.h>
#include <gmem/maps.h>
#include <gmem/recover.h>

static struct gmem_object *object_behind(struct gmem_recovery *recovery, const struct gmem_mapped *piece)
{
	for (size_t i = 0; i < recovery->object_count; i++) {
		struct gmem_object *object = recovery->objects[i];
		struct gmem_file *file = atomic_load(&object->files->files[GMEM_HOST][object->class_]);

		if (file == piece->file && piece->offset >= object->offset && piece->offset < object->offset + object->bytes)
			return object;
	}
	return NULL;
}

/* Mapped, and no region says so: its event was read by the predecessor, and not handled any more. */
static void add_missing(struct gmem_session *session, struct gmem_recovery *recovery, struct gmem_mapped piece)
{
	while (piece.va < piece.end) {
		struct gmem_object *object = object_behind(recovery, &piece);
		struct gmem_region like = { .object = object, .fork = GMEM_FORK_SHARE, .committed = true };
		struct gmem_place place;
		uint64_t upto = piece.end, step;

		if (!object)
			return;
		like.read_only = piece.private_;
		if (upto - piece.va > object->offset + object->bytes - piece.offset)
			upto = piece.va + (object->offset + object->bytes - piece.offset);
		if (!gmem_as_lookup(&session->as, piece.va, &place)) {
			step = place.region_va + place.region_bytes - piece.va;
			gmem_object_unref(place.object);
		} else {
			uint64_t next = gmem_as_next(&session->as, piece.va);

			step = (next < upto ? next : upto) - piece.va;
			like.va = piece.va;
			like.offset = piece.offset - object->offset;
			like.bytes = step;
			gmem_as_insert_like(&session->as, &like);
		}
		if (step > upto - piece.va)
			step = upto - piece.va;
		piece.va += step;
		piece.offset += step;
	}
}

static const struct gmem_file *file_at(struct gmem_session *session, uint64_t va)
{
	struct gmem_file *file = NULL;
	struct gmem_place place;

	if (!gmem_as_lookup(&session->as, va, &place)) {
		if (gmem_object_file(place.object, GMEM_HOST, &file))
			file = NULL;
		gmem_object_unref(place.object);
	}
	return file;
}

/* A region of which some is not mapped any more. Its pages stay: add_missing() may find that they have moved, in this process
 * or in one whose turn comes later. What nobody maps in the end goes behind all of them. */
static void remove_unmapped(struct gmem_session *session, const struct gmem_maps *maps, const struct gmem_region_info *region)
{
	uint64_t va = region->va, end = region->va + region->bytes;
	const struct gmem_file *file = file_at(session, va);

	while (va < end) {
		uint64_t gap_end = end;
		bool mapped = gmem_maps_at(maps, va, region->offset + (va - region->va), file, &gap_end);

		if (gap_end > end)
			gap_end = end;
		if (!mapped)
			gmem_as_remove(&session->as, va, gap_end - va, NULL, NULL);
		va = gap_end;
	}
}

void gmem_reconcile(struct gmem_session *session, struct gmem_recovery *recovery)
{
	struct gmem_view *view = gmem_as_view(&session->as, GMEM_HOST);
	struct gmem_region_info *regions = NULL;
	struct gmem_maps maps;
	size_t count = 0;

	if (!view || view->pidfd < 0 || gmem_maps_read(session, view->pid, view->pidfd, &maps)) {
		gmem_view_unref(view);
		return; /* what it had is what it has, as far as anybody knows */
	}
	gmem_session_regions(session->core, session->id, NULL, 0, &count);
	regions = calloc(count + 1, sizeof(*regions));
	if (regions) {
		gmem_session_regions(session->core, session->id, regions, count, &count);
		for (size_t i = 0; i < count; i++)
			if (regions[i].committed)
				remove_unmapped(session, &maps, &regions[i]);
		for (size_t i = 0; i < maps.count; i++)
			add_missing(session, recovery, maps.pieces[i]);
	}
	free(regions);
	gmem_maps_free(&maps);
	gmem_view_unref(view);
}
