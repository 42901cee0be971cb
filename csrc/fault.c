/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <gmem/freeze.h>
#include <gmem/internal.h>
#include <gmem/migrate.h>
#include <gmem/overlay.h>
#include <gmem/pmap.h>
#include <gmem/prefetch.h>
#include <gmem/source.h>
#include <gmem/thrash.h>
#include <gmem/tier.h>
#include <gmem/uffd.h>

/* What is poisoned in a page table stays so for as long as the range is mapped: nothing else may be put there. */
static void mark(struct gmem_view *view, uint64_t va)
{
	struct gmem_place place;

	if (view->hnid != GMEM_HOST)
		return;
	if (gmem_as_lookup(view->as, va, &place)) {
		gmem_kept_spoil(view->session->account, va);
		return;
	}
	atomic_store(&place.object->marked, true);
	gmem_object_unref(place.object);
}

void gmem_fault_poison(struct gmem_core *core, struct gmem_view *view, struct gmem_range range, int error)
{
	int err = core->features.poison ? gmem_uffd_pmap_poison(gmem_view_pmap(view), range) : -EOPNOTSUPP;

	/* Before 6.6 the access stays blocked: never a silent zero. The event tells the client why. */
	if (err == -ESRCH)
		return;
	mark(view, range.va);
	gmem_count(&core->stats.poisoned_pages, 1);
	gmem_core_post(core, GMEM_EVENT_POISONED, view->session_id, range.va, 0, view->hnid, error);
}

/* No region: munmap is under way (the thread gets its SIGSEGV when it is done), or the mapping was grown by mremap
 * beyond what gmem gave, which is an error of the client's. */
static void touch_outside(struct gmem_core *core, struct gmem_view *view, uint64_t va)
{
	struct gmem_range small = { va & ~4095ull, 4096 };
	struct gmem_range huge = { va & ~(GMEM_HUGE_BYTES - 1), GMEM_HUGE_BYTES };
	int err;

	gmem_count(&core->stats.outside_faults, 1);
	if (view->hnid != GMEM_HOST && gmem_devfault_refuse(core, view, va, false))
		return;
	if (!core->features.poison) {
		gmem_uffd_pmap_wake(gmem_view_pmap(view), small);
		return;
	}
	mark(view, va);
	err = gmem_uffd_pmap_poison(gmem_view_pmap(view), small);
	if (err == -EINVAL)
		err = gmem_uffd_pmap_poison(gmem_view_pmap(view), huge);
	if (err)
		gmem_uffd_pmap_wake(gmem_view_pmap(view), huge);
}

static bool is_write(const struct gmem_fault *fault)
{
	return fault->flags & (GMEM_UFFD_FAULT_WRITE | GMEM_UFFD_FAULT_WP);
}

static bool is_slow(struct gmem_core *core, int hnid, uint64_t bytes)
{
	struct gmem_hnode *hnode = gmem_core_hnode(core, hnid);

	return hnode && gmem_hnode_slow(hnode, bytes);
}

/* Room must be made first, across a slow link. */
static bool slow_to_make_room(struct gmem_core *core, int hnid, uint64_t bytes)
{
	struct gmem_hnode *hnode = gmem_core_hnode(core, hnid);
	int next;

	if (!hnode || gmem_hnode_free_bytes(hnode) >= bytes)
		return false;
	next = gmem_tier_next(hnode, bytes, 0);
	return next > GMEM_HOST && is_slow(core, next, bytes);
}

bool gmem_fault_is_slow(struct gmem_core *core, const struct gmem_place *place, int hnid)
{
	gmem_word_t word = atomic_load_explicit(&core->lpt.words[place->object->pn + place->index],
						memory_order_relaxed);
	struct gmem_source *source = atomic_load(&place->object->source);
	uint64_t bytes = 1ull << place->object->shift;
	uint32_t valid = gmem_word_valid(word);

	if (valid >> hnid & 1)
		return false;
	if (!valid && source && source->slow)
		return true;
	if (is_slow(core, hnid, bytes) || slow_to_make_room(core, hnid, bytes))
		return true;
	for (int h = 0; valid >> h; h++)
		if ((valid >> h & 1) && !is_slow(core, h, bytes))
			return false;
	return valid != 0;
}

/* The content of a page that is recorded here is missing: the client punched it, and reads zero, or what its source has. Of
 * what is sealed without a source nobody could punch it: it is lost here. */
static int heal(struct gmem_page *page, int hnid)
{
	struct gmem_file *file;
	int err;

	if (gmem_object_sealed(page->object) && !atomic_load(&page->object->source)) {
		gmem_page_lose(page, gmem_core_hnode(page->core, hnid));
		return gmem_word_valid(page->word) ? 0 : -EIO;
	}
	err = gmem_object_file(page->object, hnid, &file);
	if (!err)
		err = gmem_file_populate(file, page->object->offset + page->offset, page->bytes);
	return err || !gmem_object_sealed(page->object) ? err : gmem_page_pull(page, hnid);
}

/* Or it has come since the fault, which another process's has brought: then it can be mapped. Of what may be written to, a
 * page that is there is left as it is anyhow. */
static bool has_come(struct gmem_page *page, struct gmem_view *view, struct gmem_range range)
{
	return gmem_object_sealed(page->object) &&
	       gmem_view_enter(view, range, page->object, page->offset, GMEM_PROT_READ) != -EFAULT;
}

/* Whether a page that is not written to may become the hnode's alone, to save the second fault of read-then-write. */
static bool may_own(struct gmem_page *page, uint32_t here)
{
	if (page->private_view || gmem_object_sealed(page->object))
		return false;
	if (!page->core->features.continue_wp)
		return true;
	return gmem_word_valid(page->word) == here && !(gmem_word_flags(page->word) & GMEM_PAGE_READ_MOSTLY) &&
	       !gmem_object_frozen(page->object) && !gmem_object_tracks(page->object);
}

static int resolve_locked(struct gmem_page *page, struct gmem_view *view, struct gmem_range range, uint32_t flags)
{
	bool write = !page->private_view && flags & (GMEM_UFFD_FAULT_WRITE | GMEM_UFFD_FAULT_WP), mapped = false, come = false;
	bool missing = !(flags & (GMEM_UFFD_FAULT_MINOR | GMEM_UFFD_FAULT_WP));
	enum gmem_why why = view->hnid == GMEM_HOST ? GMEM_WHY_HOST_FAULT : GMEM_WHY_DEVICE_FAULT;
	uint32_t here = 1u << view->hnid;
	int err = 0;

	if (missing && (gmem_word_valid(page->word) & here)) {
		come = has_come(page, view, range);
		err = come ? 0 : heal(page, view->hnid);
	}
	/* A small page that will be written is filled unmapped and then mapped once: lifting a write-protection costs more
	 * than copying 4 KiB. */
	if (!err)
		err = gmem_page_fetch(page, view->hnid, write && page->bytes == 4096 ? NULL : view, range, why, &mapped);
	if (err)
		return err;
	if (write || may_own(page, here))
		err = gmem_page_own(page, view->hnid);
	if (!err)
		err = gmem_page_map(page, view, range, mapped || come || (flags & GMEM_UFFD_FAULT_WP));
	return err;
}

static void count_fault(struct gmem_core *core, const struct gmem_fault *fault, struct gmem_object *object)
{
	struct gmem_hnode *hnode = gmem_core_hnode(core, fault->view->hnid);
	bool host = fault->view->hnid == GMEM_HOST;

	gmem_count(host ? &core->stats.host_faults : &core->stats.device_faults, 1);
	gmem_count(host ? &object->account->host_faults : &object->account->device_faults, 1);
	if (fault->flags & GMEM_UFFD_FAULT_WP)
		gmem_count(&core->stats.write_protect_faults, 1);
	if (hnode)
		gmem_count(&hnode->faults, 1);
	gmem_count(&fault->view->faults, 1);
}

static int serve_locked(struct gmem_core *core, struct gmem_page *page, const struct gmem_fault *fault,
			const struct gmem_place *place)
{
	bool takes = gmem_thrash_takes(page, fault->view->hnid, is_write(fault));
	int err;

	count_fault(core, fault, page->object);
	page->private_view = place->read_only;
	page->awaited = is_write(fault) ? 0 : fault->va;
	err = resolve_locked(page, fault->view, place->range, fault->flags);
	if (!err && takes)
		gmem_thrash_note(page, gmem_now_ns());
	return err;
}

/* For a filler, at once or at a time. */
static bool defer(struct gmem_core *core, const struct gmem_fault *fault, uint64_t not_before_ns)
{
	struct gmem_work work = { .fault = *fault, .not_before_ns = not_before_ns };

	gmem_view_ref(fault->view);
	if (!gmem_work_post(core, &work))
		return true;
	gmem_view_unref(fault->view);
	return false;
}

static void trace_fault(const struct gmem_page *page, const struct gmem_fault *fault, const struct gmem_place *place,
			gmem_word_t before)
{
	const struct gmem_use use = { GMEM_ACCESS_FAULT, fault->view->hnid, fault->view->session_id, place->range.va, before,
				      is_write(fault) };

	gmem_page_trace(page, &use);
}

/* The page bounces: whoever has it may use it for a while, and the faulting thread waits. */
static bool stays(struct gmem_core *core, struct gmem_page *page, const struct gmem_fault *fault, uint64_t now)
{
	uint64_t until = gmem_thrash_until(page, fault->view->hnid, is_write(fault), now);

	if (!until || !defer(core, fault, until))
		return false;
	gmem_count(&core->stats.throttled_faults, 1);
	return true;
}

/* before: the page's word as it was found. */
static void settle(struct gmem_core *core, struct gmem_page *page, const struct gmem_fault *fault,
		   const struct gmem_place *place, gmem_word_t before, int err)
{
	struct gmem_hnode *hnode = gmem_core_hnode(core, fault->view->hnid);
	uint64_t frozen_by = atomic_load(&page->object->frozen_by);
	bool came = gmem_word_valid(before) & ~(1u << fault->view->hnid);

	if (!err && hnode)
		gmem_hnode_touch(hnode, page->object, page->index);
	if (!err && gmem_core_traces(core))
		trace_fault(page, fault, place, before);
	/* What is mapped there is its parent's memory, and can't be taken from it alone. */
	if (err == -EBUSY && frozen_by && frozen_by != fault->view->session_id)
		gmem_core_post(core, GMEM_EVENT_ERROR, fault->view->session_id, fault->va, 0, fault->view->hnid, err);
	gmem_page_unlock(page);
	switch (err) {
	case 0:
		gmem_stream_fault(core, fault->view, place, is_write(fault), came);
		return;
	case -ESRCH: /* the process is gone */
		return;
	case -EBUSY: /* held by an acquire, or frozen: the release wakes it */
		gmem_count(&core->stats.parked_faults, 1);
		return;
	case -EAGAIN: /* the thread faults again, behind whatever is pending */
		gmem_count(&core->stats.retries, 1);
		gmem_uffd_pmap_wake(gmem_view_pmap(fault->view), place->range);
		return;
	default:
		if (hnode)
			gmem_count(&hnode->errors, 1);
		gmem_fault_poison(core, fault->view, place->range, err);
	}
}

/* What the kernel does to a thread that writes to a page which is mapped read-only. The thread is waiting, so it is there;
 * one that catches the signal and goes on finds the page as it was. False: it can't be told. */
static bool refuse_write(struct gmem_core *core, const struct gmem_fault *fault)
{
	struct gmem_view *view = fault->view;
	pid_t pid;

	if (view->hnid != GMEM_HOST)
		return gmem_devfault_refuse(core, view, fault->va, false);
	gmem_core_post(core, GMEM_EVENT_SEGV, view->session_id, fault->va, 0, view->hnid, 0);
	if (view->pidfd >= 0)
		return !syscall(SYS_pidfd_send_signal, view->pidfd, SIGSEGV, NULL, 0) || errno == ESRCH;
	pid = atomic_load(&view->session->pid);
	/* as long as there is its mm, its number is no other's */
	return pid && fault->thread && !gmem_uffd_alive(view->uffd) && !syscall(SYS_tgkill, pid, fault->thread, SIGSEGV);
}

void gmem_fault_resolve(struct gmem_core *core, const struct gmem_fault *fault, bool may_defer)
{
	struct gmem_view *view = fault->view;
	uint64_t start = gmem_now_ns();
	struct gmem_place place;
	struct gmem_page page;

	if (gmem_as_lookup(view->as, fault->va, &place)) {
		touch_outside(core, view, fault->va);
		return;
	}
	if (view->hnid != GMEM_HOST && !view->replayable && gmem_devfault_refuse(core, view, fault->va, true))
		goto out;
	if (is_write(fault) && !place.read_only && gmem_object_sealed(place.object) && refuse_write(core, fault))
		goto out;
	if (!gmem_overlay_maps(view, &place) && gmem_devfault_refuse(core, view, fault->va, false))
		goto out;
	if (may_defer && gmem_fault_is_slow(core, &place, view->hnid) && defer(core, fault, 0))
		goto out;
	if (gmem_page_trylock(place.object, place.index, true, &page)) {
		gmem_count(&core->stats.parked_faults, 1);
		gmem_stream_parked(core, view, &place, is_write(fault));
		goto out;
	}
	if (gmem_page_poisoned(&page)) {
		gmem_page_unlock(&page);
		gmem_fault_poison(core, view, place.range, -EIO);
	} else if (may_defer && stays(core, &page, fault, start)) {
		gmem_page_unlock(&page);
	} else {
		gmem_word_t before = page.word;

		gmem_page_hint(&page, place.hint);
		settle(core, &page, fault, &place, before, serve_locked(core, &page, fault, &place));
	}
	gmem_count(&core->stats.fault_ns, gmem_now_ns() - start);
out:
	gmem_object_unref(place.object);
}
