/* SPDX-License-Identifier: Apache-2.0
 *
 * Run: consecutive logical pages of one object in the same state, moved by one system call for each step of the page
 * protocol instead of one for each page. What is out of the ordinary (held, poisoned, damaged, no frame free) ends a run
 * before it, and is left to the functions of migrate.h.
 */
#ifndef GMEM_RUN_H
#define GMEM_RUN_H

#include <gmem/migrate.h>

#define GMEM_RUN_PAGES 32

struct gmem_run_args {
	struct gmem_object *object;
	uint64_t index, count; /* at most GMEM_RUN_PAGES of these are moved */
	int hnid;
	struct gmem_view *view; /* where to map them; NULL: nowhere */
	uint64_t va;            /* of the first page in the view */
	bool own;               /* the only copy, writable; not of what is sealed */
	bool private_view;      /* the view maps them privately (as.h: read_only) */
	enum gmem_why why;
	struct gmem_hint hint;
	bool wanted;            /* no guess: it counts as used */
	bool cool;              /* what comes is reclaim's next candidate */
};

/* How many pages, from the first, are at hnid and mapped now; 0 if the first one is not for a run. Never reclaims.
 * Negative: -ESRCH, the view is gone. */
int gmem_run_move(const struct gmem_run_args *args);

#endif
