/* SPDX-License-Identifier: Apache-2.0
 *
 * Requests on ranges: checking a range, and doing something to each page of it under the page's BUSY state.
 */
#ifndef GMEM_PAGES_H
#define GMEM_PAGES_H

#include <gmem/migrate.h>
#include <gmem/session.h>

struct gmem_request {
	struct gmem_core *core;
	struct gmem_session *session;
	struct gmem_view *view; /* where the pages are to be mapped, or NULL; and whether it has mapped the region at hand */
	bool maps;
	int hnid;
	enum gmem_advice advice;
	struct gmem_hint hint; /* of the page at hand */
	bool read_only; /* so is the region of the page at hand */
	bool write;
	bool poisoned; /* is no error */
	int tries; /* of a page that is busy; 0: the usual number */
};

typedef int (*gmem_page_fn)(struct gmem_request *request, struct gmem_page *page, struct gmem_range range);

/* -EINVAL unless every byte of the range is in a region. */
int gmem_range_check(struct gmem_session *session, uint64_t va, uint64_t bytes);
/* -EACCES: some of it is mapped read-only; -EPERM: or is sealed. */
int gmem_range_check_write(struct gmem_session *session, uint64_t va, uint64_t bytes);
int gmem_request_init(struct gmem_core *core, uint64_t session, int hnid, uint64_t va, uint64_t bytes,
		      struct gmem_request *ret);
void gmem_request_deinit(struct gmem_request *request);
/* What follows is about a page of that place. */
void gmem_request_at(struct gmem_request *request, const struct gmem_place *place);
/* The view to map it in, if it can be mapped there. */
static inline struct gmem_view *gmem_request_view(struct gmem_request *request)
{
	return request->maps ? request->view : NULL;
}
/* fn on one page, again while it says -EAGAIN. */
int gmem_one_page(struct gmem_request *request, struct gmem_object *object, uint64_t index, struct gmem_range range,
		  gmem_page_fn fn);
/* Calls fn for each page that overlaps the range (outward), or lies in it whole (inward). touched: skips pages that were
 * never used. Stops at the first error. */
int gmem_for_pages(struct gmem_request *request, uint64_t va, uint64_t bytes, bool inward, bool touched,
		   gmem_page_fn fn);

/* As many pages from va on, where place is, as are fetched and mapped in one go, at most up to end; room is made for them. 0
 * leaves the first one to be fetched alone. (advise.c) */
int gmem_request_run(struct gmem_request *request, const struct gmem_place *place, uint64_t va, uint64_t end, bool own,
		     enum gmem_why why);
/* Advice that is about one hnode, and so needs one. (advise.c) */
bool gmem_advice_is_local(uint64_t advice);
/* gmem_acquire() of a range on a context of this session; -EAGAIN soon if it is busy. again: a predecessor may have done it
 * for the request of that number. (acquire.c) */
int gmem_session_acquire(struct gmem_session *session, uint64_t context, struct gmem_range range, bool write, uint64_t asked,
			 bool again);
/* gmem_release() in two steps, so that a successor can tell whether it was done. Both: -EINVAL: there is none. (acquire.c) */
int gmem_session_find_hold(struct gmem_session *session, uint64_t context, struct gmem_range range,
			   struct gmem_hold_name *ret);
int gmem_session_release(struct gmem_session *session, uint64_t context, struct gmem_range range,
			 const struct gmem_hold_name *name);
/* gmem_release_named() of one. */
int gmem_session_release_named(struct gmem_session *session, uint64_t context, const struct gmem_hold_name *name);
/* Releases everything a context holds: it has ended. (acquire.c) */
void gmem_release_all(struct gmem_view *view);
/* A predecessor's hold on a range whose pages have their frames again. */
int gmem_hold_adopt(struct gmem_view *view, struct gmem_range range, struct gmem_hold_name name);

#endif
