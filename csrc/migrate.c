/* SPDX-License-Identifier: Apache-2.0 */
#include <assert.h>
#include <errno.h>
#include <sched.h>
#include <time.h>

#include <gmem/copy.h>
#include <gmem/crash.h>
#include <gmem/freeze.h>
#include <gmem/internal.h>
#include <gmem/migrate.h>
#include <gmem/pmap.h>
#include <gmem/reclaim.h>
#include <gmem/source.h>
#include <gmem/tier.h>
#include <gmem/uffd.h>

#define RECLAIM_TRIES 64
#define COMMIT_SPINS 64 /* a few microseconds */

static _Atomic gmem_word_t *word_of(const struct gmem_page *page)
{
	return &page->core->lpt.words[page->pn];
}

static void init_page(struct gmem_object *object, uint64_t index, gmem_word_t word, struct gmem_page *ret)
{
	*ret = (struct gmem_page){
		.core = object->core, .object = object, .index = index, .pn = object->pn + index,
		.offset = index << object->shift, .bytes = 1ull << object->shift,
		.word = word & ~GMEM_WORD_WAITERS,
	};
}

int gmem_page_trylock(struct gmem_object *object, uint64_t index, bool wait_flag, struct gmem_page *ret)
{
	_Atomic gmem_word_t *at = &object->core->lpt.words[object->pn + index];
	gmem_word_t word = atomic_load_explicit(at, memory_order_acquire);

	for (int spins = 0;;) {
		if (gmem_word_state(word) == GMEM_BUSY) {
			if (!wait_flag)
				return -EBUSY;
			/* A thread is woken a moment before its page is committed, and may be back at once. */
			if (gmem_word_dir(word) != GMEM_DIR_COPY && spins++ < COMMIT_SPINS) {
				gmem_cpu_relax();
				word = atomic_load_explicit(at, memory_order_acquire);
				continue;
			}
			if (word & GMEM_WORD_WAITERS)
				return -EBUSY;
			if (atomic_compare_exchange_weak(at, &word, word | GMEM_WORD_WAITERS))
				return -EBUSY;
			continue;
		}
		if (atomic_compare_exchange_weak(at, &word, gmem_word_set_busy(word, GMEM_DIR_MAP, 0))) {
			init_page(object, index, word, ret);
			return 0;
		}
	}
}

void gmem_page_lock(struct gmem_object *object, uint64_t index, struct gmem_page *ret)
{
	for (unsigned tries = 0; gmem_page_trylock(object, index, false, ret); tries++) {
		if (tries < 16) {
			sched_yield();
		} else {
			struct timespec pause = { 0, tries < 100 ? 20000 : 500000 };

			nanosleep(&pause, NULL);
		}
	}
}

void gmem_page_hint(struct gmem_page *page, struct gmem_hint hint)
{
	page->word = gmem_word_set_preferred(page->word, hint.preferred);
	if (hint.read_mostly)
		page->word |= GMEM_WORD_FLAG(GMEM_PAGE_READ_MOSTLY);
}

bool gmem_page_poisoned(const struct gmem_page *page)
{
	return gmem_word_state(page->word) == GMEM_POISONED;
}

static int wake_view(struct gmem_view *view, struct gmem_range range, void *arg)
{
	(void)arg;
	gmem_view_wake(view, range);
	return 0;
}

void gmem_page_wake(struct gmem_page *page)
{
	gmem_object_for_views(page->object, -1, page->offset, page->bytes, wake_view, NULL);
}

static gmem_word_t settled(const struct gmem_page *page)
{
	gmem_word_t word = page->word & ~GMEM_WORD_WAITERS;

	if (gmem_word_state(word) != GMEM_POISONED)
		word = gmem_word_set_state(word, gmem_word_valid(word) ? GMEM_RESIDENT : GMEM_NOMAP);
	word = gmem_word_set(gmem_word_set(word, 2, 15, 0), 6, 15, 0);
	assert(gmem_word_is_valid(word));
	return word;
}

/* Commit. Whoever set WAITERS while the page was BUSY is woken and faults again; one that waits for a release is woken
 * too, finds the page held again, and parks again. */
void gmem_page_unlock(struct gmem_page *page)
{
	gmem_word_t word = settled(page) | (page->park ? GMEM_WORD_WAITERS : 0), old;

	gmem_crash(GMEM_CRASH_COMMIT);
	old = atomic_exchange_explicit(word_of(page), word, memory_order_acq_rel);
	gmem_crash(GMEM_CRASH_COMMITTED);
	if (old & GMEM_WORD_WAITERS)
		gmem_page_wake(page);
}

void gmem_page_mark(struct gmem_page *page, enum gmem_dir dir, int target)
{
	gmem_word_t busy = gmem_word_set_busy(page->word, dir, target);
	gmem_word_t old = atomic_load_explicit(word_of(page), memory_order_relaxed);

	while (!atomic_compare_exchange_weak(word_of(page), &old, busy | (old & GMEM_WORD_WAITERS)))
		;
	gmem_crash(GMEM_CRASH_MARK);
}

struct notice {
	struct gmem_hnode *hnode;
	enum gmem_cause cause;
};

static int notify_view(struct gmem_view *view, struct gmem_range range, void *arg)
{
	struct notice *notice = arg;
	struct gmem_hnode *hnode = notice->hnode;

	gmem_duty_driver(hnode->hnid, "invalidate");
	hnode->ops->invalidate(hnode->device, view->session_id, range, notice->cause,
			       atomic_fetch_add(&hnode->sequence, 1) + 1);
	gmem_duty_driver(hnode->hnid, NULL);
	return 0;
}

void gmem_page_notify(struct gmem_page *page, struct gmem_hnode *hnode, enum gmem_cause cause)
{
	struct notice notice = { hnode, cause };

	if (hnode->ops && hnode->ops->invalidate)
		gmem_object_for_views(page->object, hnode->hnid, page->offset, page->bytes, notify_view, &notice);
}

static int protect_view(struct gmem_view *view, struct gmem_range range, void *arg)
{
	int err = gmem_view_protect(view, range, GMEM_PROT_READ);

	(void)arg;
	return err == -ESRCH || err == -EOWNERDEAD ? 0 : err; /* the process is gone, and so is its write access */
}

static bool held(struct gmem_page *page, struct gmem_hnode *hnode)
{
	struct gmem_frame *frame = gmem_hnode_frame(hnode, page->object, page->index);

	if (!frame || !frame->holds)
		return false;
	page->park = true;
	return true;
}

int gmem_pages_downgrade(struct gmem_page *pages, size_t count)
{
	struct gmem_page *first = &pages[0];
	int writer = gmem_word_writer(first->word), err;
	struct gmem_hnode *hnode = gmem_core_hnode(first->core, writer);

	if (!hnode)
		return 0;
	for (size_t i = 0; i < count; i++)
		if (held(&pages[i], hnode))
			return -EBUSY;
	for (size_t i = 0; i < count; i++)
		gmem_page_notify(&pages[i], hnode, GMEM_CAUSE_PROTECT);
	err = gmem_object_for_views(first->object, writer, first->offset, count * first->bytes, protect_view, NULL);
	gmem_crash(GMEM_CRASH_DOWNGRADE);
	for (size_t i = 0; !err && i < count; i++)
		pages[i].word = gmem_word_set_writer(pages[i].word, -1);
	return err; /* views protected before the failure fault on their next write and get it back */
}

int gmem_page_downgrade(struct gmem_page *page)
{
	return gmem_pages_downgrade(page, 1);
}

/* Frees the memory of a copy that valid no longer names. */
static void release_copy(struct gmem_page *page, struct gmem_hnode *hnode, enum gmem_cause cause)
{
	struct gmem_file *file;
	int err = 0;

	gmem_page_notify(page, hnode, cause);
	if (gmem_hnode_is_peer(hnode)) {
		err = gmem_tier_free(hnode, page->pn, page->bytes);
	} else {
		/* a hole in the file takes the page out of every view at once */
		err = gmem_object_file(page->object, hnode->hnid, &file);
		if (!err)
			err = gmem_file_punch(file, page->object->offset + page->offset, page->bytes);
	}
	gmem_crash(GMEM_CRASH_RELEASE);
	if (gmem_word_flags(page->word) & GMEM_PAGE_PINNED)
		gmem_hnode_pinned(hnode, -(int64_t)page->bytes);
	gmem_hnode_frame_free(hnode, page->object, page->index);
	if (err)
		gmem_core_post(page->core, GMEM_EVENT_ERROR, page->object->account->session_id, page->offset, 0,
			       hnode->hnid, err);
}

static int drop_all_but(struct gmem_page *page, uint32_t keep, enum gmem_dir dir, int target)
{
	uint32_t gone = gmem_word_valid(page->word) & ~keep;

	for (int h = 0; h < GMEM_HNODE_MAX; h++) {
		struct gmem_hnode *hnode = gone >> h & 1 ? gmem_core_hnode(page->core, h) : NULL;

		if (hnode && held(page, hnode))
			return -EBUSY;
	}
	page->word = gmem_word_set_valid(page->word, gmem_word_valid(page->word) & keep);
	if (gmem_word_writer(page->word) >= 0 && !(keep >> gmem_word_writer(page->word) & 1))
		page->word = gmem_word_set_writer(page->word, -1);
	gmem_page_mark(page, dir, target);
	for (int h = 0; h < GMEM_HNODE_MAX; h++) {
		struct gmem_hnode *hnode = gone >> h & 1 ? gmem_core_hnode(page->core, h) : NULL;

		if (hnode)
			release_copy(page, hnode, keep ? GMEM_CAUSE_MIGRATE : GMEM_CAUSE_DISCARD);
	}
	return 0;
}

int gmem_page_own(struct gmem_page *page, int hnid)
{
	uint32_t mine = 1u << hnid;
	gmem_word_t before;
	int err;

	if (gmem_word_writer(page->word) == hnid)
		return 0;
	if (gmem_object_sealed(page->object))
		return -EPERM;
	if (gmem_object_frozen(page->object)) {
		page->park = true;
		return -EBUSY;
	}
	if (gmem_word_valid(page->word) != mine) {
		err = drop_all_but(page, mine, GMEM_DIR_UPGRADE, hnid);
		if (err)
			return err;
		gmem_count(&page->core->stats.invalidations, 1);
	}
	page->word = gmem_word_set_writer(page->word, hnid) | GMEM_WORD_FLAG(GMEM_PAGE_DIRTY);
	if (gmem_object_tracks(page->object))
		page->word |= GMEM_WORD_FLAG(GMEM_PAGE_CHANGED);
	before = atomic_load_explicit(word_of(page), memory_order_relaxed);
	/* What was filled just now is nothing to a successor before the word says that it is valid; and once it is mapped
	 * writable, it is all there is. */
	if (gmem_word_valid(before) != mine)
		gmem_page_mark(page, GMEM_DIR_UPGRADE, hnid);
	else if ((before ^ page->word) & GMEM_WORD_FLAG(GMEM_PAGE_CHANGED)) /* nor may he drop it for one not changed */
		gmem_page_mark(page, GMEM_DIR_MAP, 0);
	gmem_crash(GMEM_CRASH_OWN);
	return 0;
}

int gmem_page_drop(struct gmem_page *page, int hnid)
{
	uint32_t valid = gmem_word_valid(page->word), rest = valid & ~(1u << hnid);

	if (!(valid >> hnid & 1))
		return 0;
	if (!rest)
		return -EINVAL;
	return drop_all_but(page, rest, GMEM_DIR_UPGRADE, __builtin_ctz(rest));
}

int gmem_page_discard(struct gmem_page *page)
{
	return gmem_object_sealed(page->object) ? -EPERM : gmem_page_give_back(page);
}

int gmem_page_give_back(struct gmem_page *page)
{
	bool had_content = gmem_word_valid(page->word);
	int err = -EAGAIN;

	if (!gmem_object_frozen(page->object))
		err = drop_all_but(page, 0, GMEM_DIR_DISCARD, 0);
	if (err)
		return err;
	page->word = 0; /* state, flags and reason go with the content */
	if (had_content && gmem_core_traces(page->core))
		gmem_object_trace_gone(page->object, page->index, 1);
	return 0;
}

/* A frame on hnode, making room if it is full. */
static int get_frame(struct gmem_page *page, struct gmem_hnode *hnode)
{
	int err = gmem_hnode_frame_alloc(hnode, page->object, page->index);

	for (int tries = 0; (err == -ENOMEM || err == -EDQUOT) && tries < RECLAIM_TRIES; tries++) {
		int reclaimed = err == -ENOMEM ? gmem_reclaim(hnode, page->bytes) :
						 gmem_reclaim_own(hnode, page->object->account, page->bytes);

		if (reclaimed)
			return reclaimed;
		err = gmem_hnode_frame_alloc(hnode, page->object, page->index);
	}
	return err == -ENOMEM || err == -EDQUOT ? -EAGAIN : err; /* others were quicker every time: come back */
}

/* The 4 KiB that a thread waits to read come first, and it goes on while the rest is copied. */
static int copy_awaited(struct gmem_page *page, const uint8_t *src, struct gmem_view *view, struct gmem_range range)
{
	uint64_t at = (page->awaited & ~4095ull) - range.va, behind = at + 4096, done;
	int err = gmem_uffd_copy_wp(view->uffd, range.va + at, src + at, 4096, true, &done);

	gmem_crash(GMEM_CRASH_COPY_FIRST);
	if (!err && at)
		err = gmem_uffd_copy_wp(view->uffd, range.va, src, at, false, &done);
	if (!err && behind < range.bytes)
		err = gmem_uffd_copy_wp(view->uffd, range.va + behind, src + behind, range.bytes - behind, false, &done);
	return err;
}

/* COPY: allocates, fills and maps read-only in one go. -ESRCH: not possible in this view. */
static int copy_into_view(struct gmem_page *page, struct gmem_hnode *from, struct gmem_hnode *to, struct gmem_view *view,
			  struct gmem_range range)
{
	uint64_t done;
	uint8_t *src;
	int err = gmem_object_alias(page->object, from->hnid, &src);

	if (!err)
		err = gmem_alias_touch(src + page->offset, page->bytes);
	if (err)
		return err;
	gmem_page_mark(page, GMEM_DIR_COPY, to->hnid);
	if (page->awaited && page->object->class_ == GMEM_CLASS_SMALL)
		return copy_awaited(page, src + page->offset, view, range);
	/* The faulting thread is woken by the last step, not here: it may still need write access. */
	return gmem_uffd_copy_wp(view->uffd, range.va, src + page->offset, range.bytes, false, &done);
}

void gmem_page_forget(struct gmem_page *page, struct gmem_hnode *to)
{
	struct gmem_file *file;

	if (!gmem_hnode_is_peer(to) && !gmem_object_file(page->object, to->hnid, &file))
		gmem_file_punch(file, page->object->offset + page->offset, page->bytes);
	gmem_crash(GMEM_CRASH_FORGET);
	gmem_hnode_frame_free(to, page->object, page->index);
	gmem_page_mark(page, GMEM_DIR_MAP, 0);
}

/* What it takes to read a copy there. */
static int effort(const struct gmem_hnode *hnode)
{
	return gmem_hnode_is_peer(hnode) ? 2 : gmem_hnode_own_frames(hnode) ? 1 : 0;
}

struct gmem_hnode *gmem_page_source(struct gmem_page *page)
{
	uint32_t valid = gmem_word_valid(page->word);
	struct gmem_hnode *best = NULL;

	for (int h = 0; h < GMEM_HNODE_MAX; h++) {
		struct gmem_hnode *hnode = valid >> h & 1 ? gmem_core_hnode(page->core, h) : NULL;

		if (hnode && (!best || effort(hnode) < effort(best)))
			best = hnode;
	}
	return best;
}

static void count_copy(struct gmem_page *page, struct gmem_hnode *from, struct gmem_hnode *to)
{
	struct gmem_stats *stats = &page->core->stats;

	gmem_count(&from->out_bytes, page->bytes);
	gmem_count(&to->in_bytes, page->bytes);
	if (to->hnid == GMEM_HOST)
		gmem_count(&stats->d2h_bytes, page->bytes);
	else if (from->hnid == GMEM_HOST)
		gmem_count(&stats->h2d_bytes, page->bytes);
	else
		gmem_count(&stats->d2d_bytes, page->bytes);
	gmem_count(&stats->duplicates, 1);
}

void gmem_page_arrived(struct gmem_page *page, struct gmem_hnode *from, struct gmem_hnode *to, enum gmem_why why)
{
	page->word = gmem_word_set_valid(page->word, gmem_word_valid(page->word) | 1u << to->hnid);
	page->word = gmem_word_set_why(page->word, from ? why : GMEM_WHY_FIRST_TOUCH);
	if (gmem_word_flags(page->word) & GMEM_PAGE_PINNED)
		gmem_hnode_pinned(to, (int64_t)page->bytes);
	if (!from)
		return;
	page->word &= ~GMEM_WORD_FLAG(GMEM_PAGE_DIRTY);
	count_copy(page, from, to);
}

static int transfer(struct gmem_page *page, struct gmem_hnode *from, struct gmem_hnode *to, struct gmem_view *view,
		    struct gmem_range range, bool *ret_mapped)
{
	bool direct = view && !page->private_view && page->core->features.continue_wp && range.bytes == page->bytes &&
		      !gmem_hnode_is_peer(from) && !gmem_copy_engine(from, to);
	int err = -ESRCH;

	*ret_mapped = false;
	if (direct) {
		err = copy_into_view(page, from, to, view, range);
		if (err == -EEXIST) { /* left over from a client that wrote past its mapping: not the content */
			struct gmem_file *file;

			gmem_count(&page->core->stats.leftovers, 1);
			if (!gmem_object_file(page->object, to->hnid, &file))
				gmem_file_punch(file, page->object->offset + page->offset, page->bytes);
			err = -ESRCH; /* the client may write there again: the other way does not mind */
		}
		*ret_mapped = !err;
		gmem_crash(GMEM_CRASH_COPY);
	}
	if (err == -ESRCH)
		err = gmem_copy_fill(page, from, to);
	gmem_crash(GMEM_CRASH_FILL);
	return err;
}

int gmem_page_pull(struct gmem_page *page, int hnid)
{
	uint8_t *alias;
	int err;

	if (!atomic_load(&page->object->source))
		return 0;
	err = gmem_object_alias(page->object, hnid, &alias);
	return err ? err : gmem_source_pull(page->object, page->index, 1, alias + page->offset);
}

static int first_touch(struct gmem_page *page, struct gmem_hnode *to)
{
	int err;

	if (gmem_hnode_is_peer(to))
		return -EOPNOTSUPP; /* there is nothing to store yet */
	gmem_page_mark(page, GMEM_DIR_FILL, to->hnid);
	err = gmem_object_zero(page->object, to->hnid, page->offset, page->bytes);
	if (!err)
		err = gmem_page_pull(page, to->hnid);
	gmem_count(&page->core->stats.first_touches, !err);
	return err;
}

void gmem_page_lose(struct gmem_page *page, struct gmem_hnode *from)
{
	uint32_t rest = gmem_word_valid(page->word) & ~(1u << from->hnid);

	gmem_count(&from->errors, !gmem_hnode_is_peer(from)); /* a peer's pull has been counted */
	if (!rest)
		page->word = gmem_word_set_why(page->word, GMEM_WHY_LOST); /* a successor, too, must not make it zeros */
	if (drop_all_but(page, rest, rest ? GMEM_DIR_UPGRADE : GMEM_DIR_DISCARD, rest ? __builtin_ctz(rest) : 0) || rest)
		return;
	page->word = gmem_word_set_state(gmem_word_set_why(0, GMEM_WHY_LOST), GMEM_POISONED);
	gmem_core_post(page->core, GMEM_EVENT_POISONED, page->object->account->session_id, page->offset, 0,
		       from->hnid, -EBADMSG);
}

int gmem_page_fetch(struct gmem_page *page, int hnid, struct gmem_view *view, struct gmem_range range,
		    enum gmem_why why, bool *ret_mapped)
{
	struct gmem_hnode *to = gmem_core_hnode(page->core, hnid), *from;
	uint64_t start = gmem_now_ns();
	int err;

	*ret_mapped = false;
	if (gmem_page_poisoned(page))
		return -EIO;
	if (gmem_word_valid(page->word) >> hnid & 1)
		return 0;
	if (!to)
		return -ENODEV;
	if (!gmem_hnode_takes(to, page->object))
		return -EOPNOTSUPP;
	from = gmem_page_source(page);
	err = gmem_page_downgrade(page);
	if (!err)
		err = get_frame(page, to);
	if (err)
		return err;
	gmem_crash(GMEM_CRASH_FRAME);
	err = from ? transfer(page, from, to, view, range, ret_mapped) : first_touch(page, to);
	if (err) {
		gmem_page_forget(page, to);
		if (err == -EBADMSG)
			gmem_page_lose(page, from);
		if (err == -EBADMSG && gmem_word_valid(page->word))
			return -EAGAIN;
		if (err == -ENOSPC && gmem_hnode_own_frames(to)) {
			gmem_hnode_full(to, 0); /* others have taken it: what is there has to do */
			return -EAGAIN;
		}
		return err == -ENOSPC ? -ENOMEM : err;
	}
	gmem_page_arrived(page, from, to, why);
	gmem_crash(GMEM_CRASH_ARRIVED);
	gmem_count(&page->core->stats.migration_ns, gmem_now_ns() - start);
	return 0;
}

int gmem_page_map(struct gmem_page *page, struct gmem_view *view, struct gmem_range range, bool was_protected)
{
	bool writable = gmem_word_writer(page->word) == view->hnid || page->private_view;
	struct gmem_pmap *pmap = gmem_view_pmap(view);
	int err;

	gmem_crash(GMEM_CRASH_MAP);
	if (view->pmap && range.bytes != page->bytes)
		err = -EOPNOTSUPP; /* a part of one was unmapped */
	else if (view->pmap)
		err = gmem_view_enter(view, range, page->object, page->offset,
				      writable ? GMEM_PROT_WRITE : GMEM_PROT_READ);
	else if (was_protected && writable)
		err = gmem_uffd_pmap_protect(pmap, range, GMEM_PROT_WRITE);
	else if (was_protected)
		err = gmem_uffd_pmap_wake(pmap, range);
	else
		err = gmem_uffd_pmap_enter(pmap, range, 0, writable ? GMEM_PROT_WRITE : GMEM_PROT_READ);
	gmem_crash(GMEM_CRASH_MAPPED);
	return err;
}
