/* SPDX-License-Identifier: Apache-2.0 */
#include <time.h>

#include <gmem/density.h>
#include <gmem/fault.h>
#include <gmem/internal.h>
#include <gmem/prefetch.h>
#include <gmem/run.h>

#define PIECE_BYTES (128ull << 10) /* a thread that catches up waits for so much at most, or for one page */
#define HELP_WAITS 100     /* for a filler's piece; across a slow link it may come late all the same */
#define HELP_WAIT_NS 200000
#define ANSWER_WAITS 20
#define ANSWER_WAIT_NS 20000
#define AHEAD_PART 16
#define TURNS (GMEM_RECENT / 3)
#define PATIENCE 64 /* faults that continue no stream */
#define HELPED_BYTES (64ull << 10) /* with smaller pages two threads mostly wait for each other in the kernel */

static uint64_t first_window(uint64_t page_bytes)
{
	return page_bytes >= GMEM_HUGE_BYTES ? 1 : 4;
}

/* Pages that are not in a row are moved one by one. A stream has no more than a small part of the hnode ahead: together with
 * others it must not push out what it has just fetched. */
static uint64_t last_window(struct gmem_core *core, int hnid, uint64_t page_bytes, int64_t stride)
{
	struct gmem_hnode *hnode = gmem_core_hnode(core, hnid);
	uint64_t pages = page_bytes >= GMEM_HUGE_BYTES ? 8 : page_bytes == 4096 ? 64 : 32, most = 1;

	if (hnode)
		most = gmem_counter(&hnode->limit_bytes) / AHEAD_PART / page_bytes;
	pages = stride == (int64_t)page_bytes ? pages : pages / 2;
	return pages < most ? pages : most ? most : 1;
}

static uint64_t piece_bytes(uint64_t page_bytes)
{
	return page_bytes > PIECE_BYTES ? page_bytes : PIECE_BYTES;
}

/* What it takes to give a view the page of that index in an object. */
enum need { MAPPING, ZEROES, CONTENT };

static enum need need_of(struct gmem_core *core, const struct gmem_object *object, uint64_t index, int hnid)
{
	uint32_t valid = gmem_word_valid(atomic_load_explicit(&core->lpt.words[object->pn + index], memory_order_relaxed));

	if (valid >> hnid & 1)
		return MAPPING;
	return valid || atomic_load(&object->source) ? CONTENT : ZEROES;
}

static uint64_t load(const _Atomic uint64_t *at)
{
	return atomic_load_explicit(at, memory_order_relaxed);
}

static void store(_Atomic uint64_t *at, uint64_t value)
{
	atomic_store_explicit(at, value, memory_order_relaxed);
}

static int64_t stride_of(const struct gmem_stream *stream)
{
	return atomic_load_explicit(&stream->stride, memory_order_acquire);
}

/* How many strides b is behind a; false: not a whole number of them. */
static bool strides(uint64_t a, uint64_t b, int64_t stride, uint64_t *ret)
{
	uint64_t far = stride > 0 ? b - a : a - b, step = (uint64_t)(stride > 0 ? stride : -stride);

	if ((stride > 0 ? b < a : a < b) || far % step)
		return false;
	*ret = far / step;
	return true;
}

/* Whether many other faults have come since it last went on: then a fault that seems to continue it does so by chance. */
static bool has_ended(const struct gmem_view *view, const struct gmem_stream *stream)
{
	return atomic_load_explicit(&view->recent_hand, memory_order_relaxed) -
	       atomic_load_explicit(&stream->hand, memory_order_relaxed) > PATIENCE;
}

/* The stream that this address continues: behind its window, or in it, if the thread was quicker than we. */
static struct gmem_stream *find(struct gmem_view *view, uint64_t va)
{
	for (int i = 0; i < GMEM_STREAMS; i++) {
		struct gmem_stream *stream = &view->streams[i];
		int64_t stride = stride_of(stream);
		uint64_t from, left;

		if (stride && !has_ended(view, stream) && strides(load(&stream->begin), va, stride, &from) && strides(va, load(&stream->end), stride, &left))
			return stream;
	}
	return NULL;
}

/* Two neighbours, one right after the other, are a stream, and so are four pages at the same distance from each other, or
 * three neighbours; also if a few other streams take turns with it. 0: this page continues nothing. */
static int64_t learn(struct gmem_view *view, uint64_t va, uint64_t page_bytes)
{
	uint32_t hand = atomic_fetch_add_explicit(&view->recent_hand, 1, memory_order_relaxed);
	int64_t found = 0;

	for (uint32_t back = 1; !found && back <= TURNS; back++) {
		uint64_t before[3], step;

		for (uint32_t i = 0; i < 3; i++)
			before[i] = load(&view->recent[(hand - back * (i + 1)) % GMEM_RECENT]);
		step = va - before[0];
		if (step == page_bytes ? back == 1 || before[0] - before[1] == step :
					 step && before[2] && before[0] - before[1] == step && before[1] - before[2] == step)
			found = (int64_t)step;
	}
	store(&view->recent[hand % GMEM_RECENT], va);
	return found;
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

/* Where a stream goes on behind this fault; the page may be cut. */
static uint64_t next_place(const struct gmem_place *place, int64_t stride)
{
	return stride == 1ll << place->object->shift ? place->range.va + place->range.bytes : place->range.va + (uint64_t)stride;
}

/* In the place of the one that is oldest. */
static struct gmem_stream *begin_stream(struct gmem_view *view, const struct gmem_place *place, int64_t stride, bool write)
{
	uint64_t behind = next_place(place, stride);
	struct gmem_stream *stream = &view->streams[atomic_fetch_add_explicit(&view->stream_hand, 1, memory_order_relaxed) %
						    GMEM_STREAMS];

	atomic_store_explicit(&stream->stride, 0, memory_order_relaxed);
	atomic_thread_fence(memory_order_release);
	store(&stream->window, 0);
	atomic_store_explicit(&stream->quick, true, memory_order_relaxed);
	atomic_store_explicit(&stream->hand, atomic_load_explicit(&view->recent_hand, memory_order_relaxed), memory_order_relaxed);
	atomic_store_explicit(&stream->write, write, memory_order_relaxed);
	store(&stream->begin, behind);
	store(&stream->end, behind);
	store(&stream->next, behind);
	atomic_store_explicit(&stream->stride, stride, memory_order_release);
	return stream;
}

/* Of the places at behind, behind + stride, and so on, those in the region; most at most. */
static uint64_t in_region(const struct gmem_place *place, uint64_t behind, int64_t stride, uint64_t most)
{
	uint64_t end = place->region_va + place->region_bytes, step = (uint64_t)(stride > 0 ? stride : -stride), count;

	if (behind < place->region_va || behind >= end)
		return 0;
	count = (stride > 0 ? end - 1 - behind : behind - place->region_va) / step + 1;
	return count < most ? count : most;
}

/* Of the page at that address of the same region. */
static uint64_t index_at(const struct gmem_place *place, uint64_t va)
{
	return place->index + (uint64_t)((int64_t)(va - place->range.va) >> place->object->shift);
}

/* Mapping what is here takes less than waking somebody; and two that zero small pages of one file wait for its lock in turn. */
static bool two_are_quicker(uint64_t page_bytes, enum need need)
{
	return need == CONTENT ? page_bytes >= HELPED_BYTES : need == ZEROES && page_bytes >= GMEM_HUGE_BYTES;
}

/* The fault is the stream's next: the window grows. */
static void advance(struct gmem_core *core, struct gmem_view *view, struct gmem_stream *stream, const struct gmem_place *place,
		    bool write, bool all)
{
	int64_t stride = stride_of(stream);
	uint64_t page_bytes = 1ull << place->object->shift, last = last_window(core, view->hnid, page_bytes, stride), behind, window, end, passed;
	enum need need;

	if (!stride)
		return;
	if (load(&stream->window) && place->range.va != load(&stream->end))
		atomic_store_explicit(&stream->quick, true, memory_order_relaxed);
	behind = next_place(place, stride);
	window = all ? last : load(&stream->window) * 2;
	window = window < first_window(page_bytes) ? first_window(page_bytes) : window;
	window = window < last ? window : last;
	end = behind + in_region(place, behind, stride, window) * (uint64_t)stride;
	/* Read, then written: what came read-only is gone over once more, and from now on pages come writable. */
	if (write && !atomic_exchange_explicit(&stream->write, true, memory_order_relaxed))
		store(&stream->next, behind);
	store(&stream->window, window);
	atomic_store_explicit(&stream->hand, atomic_load_explicit(&view->recent_hand, memory_order_relaxed), memory_order_relaxed);
	store(&stream->begin, behind);
	if (strides(load(&stream->end), end, stride, &passed))
		store(&stream->end, end);
	if (strides(load(&stream->next), behind, stride, &passed))
		store(&stream->next, behind);
	need = end == behind ? MAPPING : need_of(core, place->object, index_at(place, behind), view->hnid);
	atomic_store_explicit(&stream->maps, need == MAPPING, memory_order_relaxed);
	if (stride == (int64_t)page_bytes && end - behind > piece_bytes(page_bytes) && two_are_quicker(page_bytes, need))
		ask_for_help(core, view);
}

/* ---- what is missing where most is here ---- */

/* In one word, as several threads take from it: address, number of pages, whether to be written. */
static uint64_t block_make(uint64_t va, uint64_t count, bool write)
{
	return va | count << 1 | write;
}

static uint64_t block_va(uint64_t block) { return block & ~4095ull; }
static uint64_t block_count(uint64_t block) { return block >> 1 & 2047; }

static void ask_for_block(struct gmem_core *core, struct gmem_view *view, const struct gmem_place *place, bool write)
{
	uint64_t index, count, none = 0, va;

	if (!gmem_density_around(core, place, view->hnid, write, &index, &count))
		return;
	va = place->range.va - ((place->index - index) << place->object->shift);
	for (int i = 0; i < GMEM_BLOCKS; i++, none = 0)
		if (atomic_compare_exchange_strong(&view->blocks[i], &none, block_make(va, count, write)))
			return;
}

/* Only into what is to spare: a guess makes nobody leave now. If others need the room later, it is the first to go. */
static bool is_to_spare(struct gmem_hnode *hnode, const struct gmem_object *object, uint64_t bytes)
{
	const struct gmem_share *share = &object->account->shares[hnode->hnid];

	return gmem_hnode_free_bytes(hnode) >= bytes + gmem_counter(&hnode->high_bytes) &&
	       gmem_account_room(object->account, hnode->hnid) >= bytes + gmem_counter(&share->quota_bytes) / 32;
}

/* Up to count pages from va on. How many are done with; 0: no more of this block. */
static uint64_t fetch_missing(struct gmem_core *core, struct gmem_view *view, uint64_t va, uint64_t count, bool write)
{
	struct gmem_hnode *hnode = gmem_core_hnode(core, view->hnid);
	struct gmem_run_args args = { .hnid = view->hnid, .view = view, .why = GMEM_WHY_PREFETCH, .cool = true };
	struct gmem_place place;
	uint64_t index, missing, left, done = 0;
	int moved;

	if (!hnode || gmem_as_lookup(view->as, va, &place))
		return 0;
	write = write && !place.read_only;
	args.own = write;
	args.private_view = place.read_only;
	left = (place.region_va + place.region_bytes - va) >> place.object->shift;
	count = count < left ? count : left;
	if (place.range.va != va || !gmem_density_missing(core, place.object, place.index, count, view->hnid, write, &index,
							     &missing)) {
		done = count;
	} else if (is_to_spare(hnode, place.object, missing << place.object->shift)) {
		args.object = place.object;
		args.hint = place.hint;
		args.index = index;
		args.count = missing;
		args.va = va + ((index - place.index) << place.object->shift);
		moved = gmem_run_move(&args);
		gmem_count(&core->stats.ahead_pages, moved > 0 ? (uint64_t)moved : 0);
		done = index - place.index + (moved > 0 ? (uint64_t)moved : 1); /* one that is not for a run is left alone */
		done = moved < 0 ? 0 : done;
	}
	gmem_object_unref(place.object);
	return done;
}

/* Takes a piece of the block. */
static bool claim_block(_Atomic uint64_t *at, uint64_t page_bytes, uint64_t *ret)
{
	uint64_t block = load(at), count = block_count(block), piece = piece_bytes(page_bytes) / page_bytes, rest = 0;

	if (!block)
		return false;
	piece = piece < count ? piece : count;
	if (piece < count)
		rest = block_make(block_va(block) + piece * page_bytes, count - piece, block & 1);
	*ret = block_make(block_va(block), piece, block & 1);
	return atomic_compare_exchange_strong(at, &block, rest);
}

/* ---- fetching ---- */

/* Takes a piece of what the stream wants; several threads may do so. */
static bool claim(struct gmem_stream *stream, int64_t stride, uint64_t page_bytes, uint64_t most, struct gmem_range *ret)
{
	uint64_t next = load(&stream->next), end = load(&stream->end), left;

	if (!strides(next, end, stride, &left) || !left)
		return false;
	*ret = (struct gmem_range){ next, page_bytes };
	if (stride != (int64_t)page_bytes)
		return atomic_compare_exchange_strong(&stream->next, &next, next + (uint64_t)stride);
	ret->bytes = most < end - next ? most : end - next;
	return atomic_compare_exchange_strong(&stream->next, &next, next + ret->bytes);
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

void gmem_stream_fault(struct gmem_core *core, struct gmem_view *view, const struct gmem_place *place, bool write, bool came)
{
	uint64_t page_bytes = 1ull << place->object->shift;
	bool all = place->hint.accessed_by >> view->hnid & 1;
	struct gmem_stream *stream = find(view, place->range.va);
	int64_t stride;

	if (!core->fault_ahead)
		return;
	if (!stream) {
		stride = learn(view, place->range.va, page_bytes);
		if (!stride && all)
			stride = (int64_t)page_bytes;
		if (stride)
			stream = begin_stream(view, place, stride, write);
	}
	if (stream)
		advance(core, view, stream, place, write, all);
	else if (came && page_bytes < GMEM_BLOCK_BYTES)
		ask_for_block(core, view, place, write);
}

void gmem_stream_parked(struct gmem_core *core, struct gmem_view *view, const struct gmem_place *place, bool write)
{
	struct gmem_stream *stream = core->fault_ahead ? find(view, place->range.va) : NULL;

	if (stream)
		advance(core, view, stream, place, write, place->hint.accessed_by >> view->hnid & 1);
}

static bool wants_more(const struct gmem_stream *stream)
{
	int64_t stride = stride_of(stream);
	uint64_t left;

	return stride && strides(load(&stream->next), load(&stream->end), stride, &left) && left;
}

bool gmem_stream_pending(const struct gmem_view *view)
{
	for (int i = 0; i < GMEM_STREAMS; i++)
		if (wants_more(&view->streams[i]))
			return true;
	for (int i = 0; i < GMEM_BLOCKS; i++)
		if (load(&view->blocks[i]))
			return true;
	return false;
}

bool gmem_stream_overtakes(const struct gmem_view *view)
{
	for (int i = 0; i < GMEM_STREAMS; i++) {
		const struct gmem_stream *stream = &view->streams[i];

		if (wants_more(stream) && !atomic_load_explicit(&stream->maps, memory_order_relaxed) &&
		    !atomic_load_explicit(&stream->quick, memory_order_relaxed))
			return true;
	}
	for (int i = 0; i < GMEM_BLOCKS; i++)
		if (load(&view->blocks[i]))
			return true;
	return false;
}

void gmem_stream_unhurried(struct gmem_view *view)
{
	for (int i = 0; i < GMEM_STREAMS; i++)
		atomic_store_explicit(&view->streams[i].quick, false, memory_order_relaxed);
}

/* What is behind a slow link is for a filler. */
static bool leave_to_filler(struct gmem_core *core, struct gmem_view *view, const struct gmem_place *place)
{
	if (!gmem_fault_is_slow(core, place, view->hnid))
		return false;
	ask_for_help(core, view);
	return true;
}

static bool step_block(struct gmem_core *core, struct gmem_view *view, _Atomic uint64_t *at, bool may_wait)
{
	uint64_t piece = load(at), page_bytes, va, count, done;
	struct gmem_place place;
	bool left;

	if (!piece)
		return false;
	if (gmem_as_lookup(view->as, block_va(piece), &place)) {
		store(at, 0);
		return false;
	}
	page_bytes = 1ull << place.object->shift;
	left = !may_wait && leave_to_filler(core, view, &place);
	gmem_object_unref(place.object);
	if (left || !claim_block(at, page_bytes, &piece))
		return false;
	va = block_va(piece);
	for (count = block_count(piece); count; count -= done, va += done * page_bytes) {
		done = fetch_missing(core, view, va, count, piece & 1);
		if (!done) {
			store(at, 0);
			break;
		}
		done = done < count ? done : count;
	}
	return true;
}

/* How much one thread takes on from this place on: of huge pages that are only mapped as many as there are in a row. */
static uint64_t one_turn(struct gmem_core *core, const struct gmem_view *view, const struct gmem_place *place)
{
	uint64_t page_bytes = 1ull << place->object->shift, count = 0, left;

	left = (place->region_va + place->region_bytes - place->range.va) >> place->object->shift;
	while (page_bytes >= GMEM_HUGE_BYTES && count < left && count < GMEM_RUN_PAGES &&
	       need_of(core, place->object, place->index + count, view->hnid) == MAPPING)
		count++;
	return count > 1 ? count * page_bytes : piece_bytes(page_bytes);
}

static bool step_stream(struct gmem_core *core, struct gmem_view *view, struct gmem_stream *stream, bool may_wait)
{
	int64_t stride = stride_of(stream);
	struct gmem_range piece;
	struct gmem_place place;
	uint64_t page_bytes, most;
	bool left;

	if (!wants_more(stream))
		return false;
	if (gmem_as_lookup(view->as, load(&stream->next), &place)) {
		atomic_store_explicit(&stream->stride, 0, memory_order_relaxed);
		return false;
	}
	page_bytes = 1ull << place.object->shift;
	left = !may_wait && leave_to_filler(core, view, &place);
	most = one_turn(core, view, &place);
	gmem_object_unref(place.object);
	if (left || !claim(stream, stride, page_bytes, most, &piece))
		return false;
	if (!fetch_ahead(core, view, piece, atomic_load_explicit(&stream->write, memory_order_relaxed)))
		store(&stream->end, load(&stream->next));
	return true;
}

bool gmem_stream_step(struct gmem_core *core, struct gmem_view *view, bool may_wait)
{
	for (int i = 0; i < GMEM_STREAMS; i++)
		if (step_stream(core, view, &view->streams[i], may_wait))
			return true;
	for (int i = 0; i < GMEM_BLOCKS; i++)
		if (step_block(core, view, &view->blocks[i], may_wait))
			return true;
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
		uint64_t a = load(&stream->begin), b = load(&stream->end);

		if (!stride_of(stream) || (a < b ? a : b) >= end || (a < b ? b : a) <= va)
			continue;
		atomic_store_explicit(&stream->stride, 0, memory_order_relaxed);
		found = true;
	}
	for (int i = 0; i < GMEM_BLOCKS; i++) {
		uint64_t at = block_va(load(&view->blocks[i]));

		if (!at || at >= end || at + GMEM_BLOCK_BYTES <= va)
			continue;
		store(&view->blocks[i], 0);
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

/* A thread may have gone on to ask for this before its fault has begun a stream. That is a guess at worst: not for long. */
static void let_answer(struct gmem_core *core, struct gmem_view *view)
{
	for (int looks = 0; looks < ANSWER_WAITS; looks++) {
		bool served = false;

		for (uint32_t i = 0; i < atomic_load(&core->faults.thread_count); i++)
			served = served || atomic_load(&core->faults.services[i].view) == (uintptr_t)view;
		if (!served)
			return;
		nanosleep(&(struct timespec){ 0, ANSWER_WAIT_NS }, NULL);
	}
}

void gmem_stream_cancel(struct gmem_core *core, struct gmem_as *as, int hnid, uint64_t va, uint64_t bytes)
{
	struct gmem_view *view = next_view(as, NULL), *next;

	while (view) {
		if (view->hnid != hnid)
			let_answer(core, view);
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
