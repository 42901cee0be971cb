/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>

#include <gmem/copy.h>
#include <gmem/crash.h>
#include <gmem/freeze.h>
#include <gmem/internal.h>
#include <gmem/pmap.h>
#include <gmem/run.h>
#include <gmem/source.h>
#include <gmem/thrash.h>
#include <gmem/tier.h>
#include <gmem/uffd.h>

struct run {
	const struct gmem_run_args *args;
	struct gmem_core *core;
	uint64_t page_bytes;
	size_t count;
	bool mapped; /* the copy mapped the pages on its way, read-only */
	struct gmem_page pages[GMEM_RUN_PAGES];
};

#define SAME_FLAGS GMEM_WORD_FLAG(GMEM_PAGE_PINNED | GMEM_PAGE_READ_MOSTLY)

static bool alike(const struct gmem_page *a, const struct gmem_page *b)
{
	return gmem_word_valid(a->word) == gmem_word_valid(b->word) &&
	       gmem_word_writer(a->word) == gmem_word_writer(b->word) && !((a->word ^ b->word) & SAME_FLAGS);
}

/* No acquire holds any copy of it. */
static bool is_free(struct gmem_page *page)
{
	uint32_t valid = gmem_word_valid(page->word);

	for (int h = 0; valid >> h; h++) {
		struct gmem_hnode *hnode = valid >> h & 1 ? gmem_core_hnode(page->core, h) : NULL;
		struct gmem_frame *frame = hnode ? gmem_hnode_frame(hnode, page->object, page->index) : NULL;

		if (frame && frame->holds)
			return false;
	}
	return true;
}

/* Lets go of the pages from number count on. */
static void shorten(struct run *run, size_t count)
{
	while (run->count > count)
		gmem_page_unlock(&run->pages[--run->count]);
}

static void lock_pages(struct run *run)
{
	const struct gmem_run_args *args = run->args;
	size_t most = args->count < GMEM_RUN_PAGES ? args->count : GMEM_RUN_PAGES;
	uint64_t now = args->wanted ? 0 : gmem_now_ns();

	while (run->count < most) {
		struct gmem_page *page = &run->pages[run->count];

		if (gmem_page_trylock(args->object, args->index + run->count, false, page))
			return;
		run->count++;
		gmem_page_hint(page, args->hint);
		if (gmem_page_poisoned(page) || !is_free(page) || (!args->wanted && gmem_thrash_bounces(page, now)) || (run->count > 1 && !alike(page, &run->pages[0]))) {
			shorten(run, run->count - 1);
			return;
		}
	}
}

/* Looked at once they are locked: what was unmapped before is left alone, what is unmapped later is discarded behind us. */
static void keep_mapped(struct run *run)
{
	for (size_t i = 0; i < run->count; i++)
		if (!gmem_object_mapped(run->args->object, run->pages[i].offset, run->page_bytes))
			shorten(run, i);
}

static uint64_t run_bytes(const struct run *run)
{
	return run->count * run->page_bytes;
}

static uint64_t file_offset(const struct run *run)
{
	return run->args->object->offset + run->pages[0].offset;
}

static bool by_driver(struct gmem_hnode *from, struct gmem_hnode *to)
{
	return gmem_hnode_is_peer(from) || gmem_copy_engine(from, to);
}

static void mark_all(struct run *run, enum gmem_dir dir, int target)
{
	for (size_t i = 0; i < run->count; i++)
		gmem_page_mark(&run->pages[i], dir, target);
}

static void free_frames(struct run *run, struct gmem_hnode *to)
{
	for (size_t i = 0; i < run->count; i++)
		gmem_hnode_frame_free(to, run->args->object, run->pages[i].index);
}

/* A frame for each page, and readers only from here on. What does not work out shortens the run. */
static void prepare(struct run *run, struct gmem_hnode *to)
{
	for (size_t i = 0; i < run->count; i++)
		if (gmem_hnode_frame_alloc(to, run->args->object, run->pages[i].index))
			shorten(run, i);
	if (run->count && gmem_pages_downgrade(run->pages, run->count)) {
		free_frames(run, to);
		shorten(run, 0);
	}
}

static void undo(struct run *run, struct gmem_hnode *to)
{
	struct gmem_file *file;

	if (!gmem_object_file(run->args->object, to->hnid, &file))
		gmem_file_punch(file, file_offset(run), run_bytes(run));
	free_frames(run, to);
	mark_all(run, GMEM_DIR_MAP, 0);
}

static int pull(struct run *run, struct gmem_hnode *from, uint8_t *dst)
{
	struct gmem_peer_io io[GMEM_RUN_PAGES];
	int err = 0;

	for (size_t i = 0; i < run->count; i++)
		io[i] = (struct gmem_peer_io){ .key = run->pages[i].pn, .memory = dst + i * run->page_bytes,
					       .bytes = run->page_bytes };
	gmem_tier_pull(from, io, run->count);
	for (size_t i = 0; i < run->count; i++)
		err = io[i].result ? io[i].result : err;
	return err; /* of which page, whoever fetches it alone will see */
}

/* Behind a device's own link, or a tier's. */
static int fill_by_driver(struct run *run, struct gmem_hnode *from, struct gmem_hnode *to, struct gmem_file *file)
{
	struct gmem_page *pages[GMEM_RUN_PAGES];
	uint8_t *dst;
	int err;

	for (size_t i = 0; i < run->count; i++)
		pages[i] = &run->pages[i];
	if (!gmem_hnode_is_peer(from))
		return gmem_copy_pages(from, to, pages, run->count);
	err = gmem_file_reserve(file, file_offset(run), run_bytes(run));
	if (!err)
		err = gmem_object_at(run->args->object, to->hnid, run->pages[0].offset, &dst);
	return err ? err : pull(run, from, dst);
}

static int first_touch(struct run *run, struct gmem_hnode *to)
{
	struct gmem_object *object = run->args->object;
	int err = gmem_object_zero(object, to->hnid, run->pages[0].offset, run_bytes(run));
	uint8_t *alias;

	if (err || !atomic_load(&object->source))
		return err;
	err = gmem_object_alias(object, to->hnid, &alias);
	return err ? err : gmem_source_pull(object, run->pages[0].index, run->count, alias + run->pages[0].offset);
}

static int fill(struct run *run, struct gmem_hnode *from, struct gmem_hnode *to)
{
	struct gmem_object *object = run->args->object;
	uint8_t *src, *dst;
	struct gmem_file *file;
	int err = gmem_object_file(object, to->hnid, &file);

	mark_all(run, GMEM_DIR_FILL, to->hnid);
	if (err || !from)
		return err ? err : first_touch(run, to);
	if (by_driver(from, to))
		return fill_by_driver(run, from, to, file);
	err = gmem_object_at(object, to->hnid, run->pages[0].offset, &dst);
	if (!err)
		err = gmem_object_at(object, from->hnid, run->pages[0].offset, &src);
	return err ? err : gmem_file_fill(file, file_offset(run), dst, src, run_bytes(run));
}

/* Through the view: allocates, fills and maps in one go. */
static int copy(struct run *run, struct gmem_hnode *from, struct gmem_hnode *to)
{
	uint64_t done;
	uint8_t *src;
	int err = gmem_object_alias(run->args->object, from->hnid, &src);

	if (!err)
		err = gmem_alias_touch(src + run->pages[0].offset, run_bytes(run));
	if (err)
		return err;
	mark_all(run, GMEM_DIR_COPY, to->hnid);
	/* A thread that has caught up goes on at once, unless it still needs write access: map() wakes it then. */
	err = gmem_uffd_copy_wp(run->args->view->uffd, run->args->va, src + run->pages[0].offset, run_bytes(run),
				!run->args->own, &done);
	run->mapped = !err;
	return err;
}

static void committed(struct run *run, struct gmem_hnode *from, struct gmem_hnode *to)
{
	for (size_t i = 0; i < run->count; i++)
		gmem_page_arrived(&run->pages[i], from, to, run->args->why);
	if (!from)
		gmem_count(&run->core->stats.first_touches, run->count);
}

static int fetch(struct run *run)
{
	struct gmem_hnode *to = gmem_core_hnode(run->core, run->args->hnid), *from;
	bool through_view = run->args->view && !run->args->private_view && run->core->features.continue_wp;
	uint64_t start = gmem_now_ns();
	int err;

	if (gmem_word_valid(run->pages[0].word) >> run->args->hnid & 1)
		return 0;
	from = gmem_page_source(&run->pages[0]);
	if (!to || gmem_hnode_is_peer(to) || !gmem_hnode_takes(to, run->args->object) ||
	    (from && !gmem_copy_reaches(from, to)))
		return -EOPNOTSUPP;
	through_view = through_view && from && !by_driver(from, to);
	prepare(run, to);
	if (!run->count)
		return 0;
	err = through_view ? copy(run, from, to) : fill(run, from, to);
	gmem_crash(GMEM_CRASH_RUN_MOVED);
	if (err)
		undo(run, to);
	else
		committed(run, from, to);
	gmem_count(&run->core->stats.migration_ns, gmem_now_ns() - start);
	return err;
}

static void release_copies(struct run *run, struct gmem_hnode *hnode)
{
	struct gmem_file *file;

	for (size_t i = 0; i < run->count; i++)
		gmem_page_notify(&run->pages[i], hnode, GMEM_CAUSE_MIGRATE);
	if (!gmem_hnode_is_peer(hnode) && !gmem_object_file(run->args->object, hnode->hnid, &file))
		gmem_file_punch(file, file_offset(run), run_bytes(run));
	gmem_crash(GMEM_CRASH_RUN_RELEASE);
	for (size_t i = 0; i < run->count; i++) {
		struct gmem_page *page = &run->pages[i];

		if (gmem_hnode_is_peer(hnode))
			gmem_tier_free(hnode, page->pn, page->bytes);
		if (gmem_word_flags(page->word) & GMEM_PAGE_PINNED)
			gmem_hnode_pinned(hnode, -(int64_t)page->bytes);
		gmem_hnode_frame_free(hnode, page->object, page->index);
	}
}

/* UPGRADE, for all of them: first the words say that the other copies are gone, then they go. */
static int own(struct run *run)
{
	int hnid = run->args->hnid;
	uint32_t gone = gmem_word_valid(run->pages[0].word) & ~(1u << hnid);

	if (gmem_word_writer(run->pages[0].word) == hnid)
		return 0;
	for (size_t i = 0; i < run->count; i++) {
		struct gmem_page *page = &run->pages[i];

		page->word = gmem_word_set_valid(page->word, 1u << hnid);
		page->word = gmem_word_set_writer(page->word, hnid) | GMEM_WORD_FLAG(GMEM_PAGE_DIRTY);
		if (gmem_object_tracks(run->args->object))
			page->word |= GMEM_WORD_FLAG(GMEM_PAGE_CHANGED);
	}
	/* First touches, too: what is mapped writable must be valid in the words that a successor finds. */
	mark_all(run, GMEM_DIR_UPGRADE, hnid);
	gmem_crash(GMEM_CRASH_RUN_OWN);
	if (!gone)
		return 0;
	for (int h = 0; gone >> h; h++)
		if (gone >> h & 1)
			release_copies(run, gmem_core_hnode(run->core, h));
	gmem_count(&run->core->stats.invalidations, run->count);
	return 0;
}

static int map(struct run *run)
{
	struct gmem_view *view = run->args->view;
	struct gmem_range range = { run->args->va, run_bytes(run) };
	bool writable = gmem_word_writer(run->pages[0].word) == run->args->hnid || run->args->private_view;

	if (run->mapped)
		return writable ? gmem_view_protect(view, range, GMEM_PROT_WRITE) : 0;
	return gmem_view_enter(view, range, run->args->object, run->pages[0].offset,
			       writable ? GMEM_PROT_WRITE : GMEM_PROT_READ);
}

/* A guess, or what was asked for. before: the words as they were found are alike in all but what does not matter here. */
static void trace(struct run *run, gmem_word_t before)
{
	const struct gmem_run_args *args = run->args;
	struct gmem_use use = { args->wanted ? GMEM_ACCESS_PREFETCH : GMEM_ACCESS_AHEAD, args->hnid,
				args->view ? args->view->session_id : args->object->account->session_id, args->va, before,
				args->own && !args->wanted };

	for (size_t i = 0; i < run->count; i++, use.va += run->page_bytes)
		gmem_page_trace(&run->pages[i], &use);
}

int gmem_run_move(const struct gmem_run_args *args)
{
	struct run run = { .args = args, .core = args->object->core, .page_bytes = 1ull << args->object->shift };
	gmem_word_t before;
	bool sole;
	bool frozen = gmem_object_frozen(args->object), used, shared;
	int err, count;

	/* Sealed meanwhile: nobody owns its pages any more. */
	shared = frozen || args->private_view || gmem_object_sealed(args->object);
	if (frozen && (args->own || !run.core->features.continue_wp))
		return 0;
	lock_pages(&run);
	keep_mapped(&run);
	if (!run.count)
		return 0;
	before = run.pages[0].word;
	/* A stream comes back to what is here and was aged: it maps the pages before anybody is seen to use them. */
	used = args->wanted || gmem_word_valid(run.pages[0].word) >> args->hnid & 1;
	err = fetch(&run);
	if (!err && run.count) {
		gmem_word_t word = run.pages[0].word;

		sole = gmem_word_valid(word) == 1u << args->hnid && !(gmem_word_flags(word) & GMEM_PAGE_READ_MOSTLY) &&
		       !gmem_object_tracks(args->object);
		if ((args->own || sole || !run.core->features.continue_wp) && !shared)
			err = own(&run);
	}
	gmem_crash(GMEM_CRASH_RUN_MAP);
	if (!err && run.count && args->view)
		err = map(&run);
	gmem_crash(GMEM_CRASH_RUN_MAPPED);
	count = (int)run.count;
	for (int i = 0; !err && i < count; i++) {
		struct gmem_hnode *hnode = gmem_core_hnode(run.core, args->hnid);

		if (used)
			gmem_hnode_touch(hnode, args->object, run.pages[i].index);
		else if (args->cool)
			gmem_hnode_cool(hnode, args->object, run.pages[i].index);
	}
	if (!err && gmem_core_traces(run.core))
		trace(&run, before);
	shorten(&run, 0);
	if (err)
		return err == -ESRCH ? err : 0;
	return count;
}
