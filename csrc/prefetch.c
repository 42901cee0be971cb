/* SPDX-License-Identifier: Apache-2.0 */
#include <time.h>

#include <gmem/fault.h>
#include <gmem/internal.h>
#include <gmem/prefetch.h>
#include <gmem/run.h>

#define PIECE_BYTES (128ull << 10) /* a thread that catches up waits for so much at most, or for one page */
#define HELP_WAITS 100     /* for a filler's piece; across a slow link it may come late all the same */
#define HELP_WAIT_NS 200000
#define HELPED_BYTES (64ull << 10) /* with smaller pages two threads mostly wait for each other in the kernel */

static uint64_t first_window(uint64_t page_bytes)
{
	return page_bytes >= GMEM_HUGE_BYTES ? page_bytes : 4 * page_bytes;
}

static uint64_t last_window(uint64_t page_bytes)
{
	return page_bytes >= GMEM_HUGE_BYTES ? 8 * page_bytes : page_bytes == 4096 ? 64 * page_bytes : 32 * page_bytes;
}

static uint64_t piece_bytes(uint64_t page_bytes)
{
	return page_bytes > PIECE_BYTES ? page_bytes : PIECE_BYTES;
}

static uint64_t load(const _Atomic uint64_t *at)
{
	return atomic_load_explicit(at, memory_order_relaxed);
}

static void store(_Atomic uint64_t *at, uint64_t value)
{
	atomic_store_explicit(at, value, memory_order_relaxed);
}

/* The stream that this address continues: behind its window, or in it, if the thread was quicker than we. */
static struct gmem_stream *find(struct gmem_view *view, uint64_t va)
{
	for (int i = 0; i < GMEM_STREAMS; i++) {
		struct gmem_stream *stream = &view->streams[i];
		uint64_t begin = load(&stream->begin);

		if (begin && va >= begin && va <= load(&stream->end))
			return stream;
	}
	return NULL;
}

static void ask_for_help(struct gmem_core *core, struct gmem_view *view)
{
	struct gmem_work work = { .fault = { .view = view }, .ahead = true };

	if (atomic_exchange(&view->helped, true))
		return;
	gmem_view_ref(view);
	if (!gmem_work_post(core, &work))
		return;
	atomic_store(&view->helped, false);
	gmem_view_unref(view);
}

void gmem_stream_fault(struct gmem_core *core, struct gmem_view *view, const struct gmem_place *place, bool write)
{
	uint64_t page_bytes = 1ull << place->object->shift, behind = place->range.va + place->range.bytes;
	uint64_t region_end = place->region_va + place->region_bytes, window, end;
	struct gmem_stream *stream = find(view, place->range.va);

	bool all = place->hint.accessed_by >> view->hnid & 1;

	if (!core->fault_ahead)
		return;
	if (!stream) {
		stream = &view->streams[atomic_fetch_add_explicit(&view->stream_hand, 1, memory_order_relaxed) %
					GMEM_STREAMS];
		store(&stream->window, 0);
		atomic_store_explicit(&stream->write, write, memory_order_relaxed);
		store(&stream->begin, behind);
		store(&stream->end, behind);
		store(&stream->next, behind);
		if (!all)
			return;
	}
	window = all ? last_window(page_bytes) : load(&stream->window) * 2;
	if (window < first_window(page_bytes))
		window = first_window(page_bytes);
	if (window > last_window(page_bytes))
		window = last_window(page_bytes);
	end = behind + window < region_end ? behind + window : region_end;
	/* Read, then written: what came read-only is gone over once more, and from now on pages come writable. */
	if (write && !atomic_exchange_explicit(&stream->write, true, memory_order_relaxed))
		store(&stream->next, behind);
	store(&stream->window, window);
	store(&stream->begin, behind);
	if (end > load(&stream->end))
		store(&stream->end, end);
	if (behind > load(&stream->next))
		store(&stream->next, behind);
	if (page_bytes >= HELPED_BYTES && end - behind > piece_bytes(page_bytes))
		ask_for_help(core, view);
}

/* Takes a piece of what the stream wants; several threads may do so. */
static bool claim(struct gmem_stream *stream, uint64_t page_bytes, struct gmem_range *ret)
{
	uint64_t next = load(&stream->next), end = load(&stream->end), piece;

	piece = piece_bytes(page_bytes);
	if (next >= end)
		return false;
	if (piece > end - next)
		piece = end - next;
	*ret = (struct gmem_range){ next, piece };
	return atomic_compare_exchange_strong(&stream->next, &next, next + piece);
}

/* The pages of one piece, as many runs as it takes. False: the guess leads nowhere, or meets another thread's work. */
static bool fetch_ahead(struct gmem_core *core, struct gmem_view *view, struct gmem_range range, bool write)
{
	while (range.bytes) {
		struct gmem_run_args args = { .hnid = view->hnid, .view = view, .va = range.va,
					      .why = GMEM_WHY_PREFETCH };
		struct gmem_place place;
		uint64_t page_bytes, moved;
		int count;

		if (gmem_as_lookup(view->as, range.va, &place))
			return false;
		page_bytes = 1ull << place.object->shift;
		args.object = place.object;
		args.hint = place.hint;
		args.index = place.index;
		args.own = write && !place.read_only;
		args.private_view = place.read_only;
		args.count = range.bytes >> place.object->shift;
		/* pieces begin and end with whole pages, unless the region was cut meanwhile */
		count = place.range.va == range.va && place.range.bytes == page_bytes &&
				range.va + range.bytes <= place.region_va + place.region_bytes ?
				gmem_run_move(&args) : 0;
		gmem_object_unref(place.object);
		if (count <= 0)
			return false;
		gmem_count(&core->stats.ahead_pages, (uint64_t)count);
		moved = (uint64_t)count * page_bytes;
		range.va += moved;
		range.bytes -= moved;
	}
	return true;
}

bool gmem_stream_pending(const struct gmem_view *view)
{
	for (int i = 0; i < GMEM_STREAMS; i++)
		if (load(&view->streams[i].next) < load(&view->streams[i].end))
			return true;
	return false;
}

/* What is behind a slow link is for a filler. */
static bool leave_to_filler(struct gmem_core *core, struct gmem_view *view, const struct gmem_place *place)
{
	if (!gmem_fault_is_slow(core, place, view->hnid))
		return false;
	ask_for_help(core, view);
	return true;
}

bool gmem_stream_step(struct gmem_core *core, struct gmem_view *view, bool may_wait)
{
	for (int i = 0; i < GMEM_STREAMS; i++) {
		struct gmem_stream *stream = &view->streams[i];
		uint64_t next = load(&stream->next);
		struct gmem_range piece;
		struct gmem_place place;
		uint64_t page_bytes;
		bool left;

		if (!next || next >= load(&stream->end))
			continue;
		if (gmem_as_lookup(view->as, next, &place)) {
			store(&stream->begin, 0);
			store(&stream->end, 0);
			continue;
		}
		page_bytes = 1ull << place.object->shift;
		left = !may_wait && leave_to_filler(core, view, &place);
		gmem_object_unref(place.object);
		if (left || !claim(stream, page_bytes, &piece))
			continue;
		if (!fetch_ahead(core, view, piece, atomic_load_explicit(&stream->write, memory_order_relaxed)))
			store(&stream->end, load(&stream->next));
		return true;
	}
	return false;
}

void gmem_stream_help(struct gmem_core *core, struct gmem_view *view)
{
	do {
		while (gmem_stream_step(core, view, true))
			;
		atomic_store(&view->helped, false);
		/* what was asked for after the last look, and before others could ask again */
	} while (gmem_stream_pending(view) && !atomic_exchange(&view->helped, true));
}

static bool forget(struct gmem_view *view, uint64_t va, uint64_t end)
{
	bool found = false;

	for (int i = 0; i < GMEM_STREAMS; i++) {
		struct gmem_stream *stream = &view->streams[i];

		if (load(&stream->begin) >= end || load(&stream->end) <= va)
			continue;
		store(&stream->next, load(&stream->end));
		store(&stream->begin, 0);
		store(&stream->end, 0);
		found = true;
	}
	return found;
}

/* The view after the one of that address; referenced. Views that come and go meanwhile may be missed. */
static struct gmem_view *next_view(struct gmem_as *as, const struct gmem_view *behind)
{
	struct gmem_view *view;

	gmem_mutex_lock(&as->views_lock);
	for (view = as->views; view && behind && view != behind; view = view->next)
		;
	view = behind && view ? view->next : behind ? NULL : as->views;
	if (view)
		gmem_view_ref(view);
	gmem_mutex_unlock(&as->views_lock);
	return view;
}

void gmem_stream_cancel(struct gmem_core *core, struct gmem_as *as, int hnid, uint64_t va, uint64_t bytes)
{
	struct gmem_view *view = next_view(as, NULL), *next;

	while (view) {
		if (view->hnid != hnid && forget(view, va, va + bytes)) {
			gmem_faults_quiesce(core, view);
			for (int i = 0; atomic_load(&view->helped) && i < HELP_WAITS; i++)
				nanosleep(&(struct timespec){ 0, HELP_WAIT_NS }, NULL);
		}
		next = next_view(as, view);
		gmem_view_unref(view);
		view = next;
	}
}
