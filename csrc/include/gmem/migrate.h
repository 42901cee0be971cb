/* SPDX-License-Identifier: Apache-2.0
 *
 * The page protocol: locking a logical page (BUSY), bringing copies to an hnode, giving write access, dropping copies.
 * Order and crash rules are those of lpt.h. Functions that take a struct gmem_page need it locked by this thread; none
 * waits for another page.
 */
#ifndef GMEM_MIGRATE_H
#define GMEM_MIGRATE_H

#include <gmem/hints.h>
#include <gmem/hnode.h>

struct gmem_page {
	struct gmem_core *core;
	struct gmem_object *object;
	uint64_t index, pn;
	uint64_t offset, bytes; /* in the object */
	gmem_word_t word;       /* as it will be stored on unlock, WAITERS aside; state is derived from valid */
	uint64_t awaited;       /* where a thread waits to read, in the view of gmem_page_fetch(); 0: nowhere */
	bool private_view;      /* who maps it does so privately (as.h: read_only): never through the view, never protected */
	bool park;              /* keep WAITERS on unlock: who faulted waits for a release */
};

/* -EBUSY: someone else owns it (wait_flag: WAITERS is set, so its owner wakes all views at the end). */
int gmem_page_trylock(struct gmem_object *object, uint64_t index, bool wait_flag, struct gmem_page *ret);
/* Waits. Only for threads that own no page and serve no faults. */
void gmem_page_lock(struct gmem_object *object, uint64_t index, struct gmem_page *ret);
void gmem_page_unlock(struct gmem_page *page);
/* What its range was advised. */
void gmem_page_hint(struct gmem_page *page, struct gmem_hint hint);
bool gmem_page_poisoned(const struct gmem_page *page);

/* Makes valid contain hnid, reclaiming there as needed. view: if not NULL and the content is copied, it may be mapped
 * there on the way, read-only; *ret_mapped says so. -EBUSY: a copy is held and can't be downgraded (page->park is set);
 * -ENOMEM; -EAGAIN. */
int gmem_page_fetch(struct gmem_page *page, int hnid, struct gmem_view *view, struct gmem_range range,
		    enum gmem_why why, bool *ret_mapped);
/* The only copy, and its views may write. hnid must be valid. -EBUSY as above; -EPERM: the object is sealed. */
int gmem_page_own(struct gmem_page *page, int hnid);
/* Drops the copy on hnid, which must not be the only one. */
int gmem_page_drop(struct gmem_page *page, int hnid);
/* Takes the write access of every view, if there is a writer. */
int gmem_page_downgrade(struct gmem_page *page);
/* The same of neighbours that have the same writer, in one go for each view. */
int gmem_pages_downgrade(struct gmem_page *pages, size_t count);
/* NOMAP: drops every copy. -EPERM: the object is sealed. */
int gmem_page_discard(struct gmem_page *page);
/* The same of a sealed object's page: its source has it. */
int gmem_page_give_back(struct gmem_page *page);
/* Its copy there is damaged. Another one may do; if there is none, nobody shall ever see this one: it is poisoned. */
void gmem_page_lose(struct gmem_page *page, struct gmem_hnode *from);
/* Fills the page, which is allocated there and mapped nowhere, from its object's source, if it has one. */
int gmem_page_pull(struct gmem_page *page, int hnid);
/* A page that has no content anywhere gets all of it on the host, which owns it then, in one step: nobody zeroes it first. view: the
 * host's that asks for it, where it is mapped at range on the way; NULL: nowhere. */
int gmem_page_fill(struct gmem_page *page, struct gmem_view *view, struct gmem_range range, const uint8_t *src);
/* Maps it in one view as the state allows: writable for the writer, else read-only. was_protected: the fault said that it was write-protected. */
int gmem_page_map(struct gmem_page *page, struct gmem_view *view, struct gmem_range range, bool was_protected);
void gmem_page_wake(struct gmem_page *page);

/* ---- steps, for run.h and evict.h ---- */

/* Publishes what is being done, for recovery; others may have set WAITERS meanwhile. */
void gmem_page_mark(struct gmem_page *page, enum gmem_dir dir, int target);
/* Tells the driver of every context that its mapping goes. */
void gmem_page_notify(struct gmem_page *page, struct gmem_hnode *hnode, enum gmem_cause cause);
/* The hnode to copy from, NULL if there is no content yet. */
struct gmem_hnode *gmem_page_source(struct gmem_page *page);
/* Records the copy that has been made on to; from NULL: its first content. */
void gmem_page_arrived(struct gmem_page *page, struct gmem_hnode *from, struct gmem_hnode *to, enum gmem_why why);
/* Bytes that have gone from one hnode to another. */
void gmem_count_moved(struct gmem_core *core, struct gmem_hnode *from, struct gmem_hnode *to, uint64_t bytes);
/* Gives back the frame on to and what was filled of it. */
void gmem_page_forget(struct gmem_page *page, struct gmem_hnode *to);

#endif
