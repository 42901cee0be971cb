/* SPDX-License-Identifier: Apache-2.0
 *
 * Kept ranges: what a client has given back and still has mapped and registered, so that its next region of that size
 * needs neither mmap(2) nor munmap(2), which waits for its event to be read. A range is kept for the account whose files
 * back it, and for nobody else. Nothing is stored in it; who touches it gets SIGBUS, and it is not given out again, as the
 * mark of that stays behind.
 */
#ifndef GMEM_KEPT_H
#define GMEM_KEPT_H

#include <gmem/lockrank.h>
#include <gmem/types.h>

#define GMEM_KEPT_MAX 16
#define GMEM_KEPT_SHARE 4 /* all of them together: at most that part of the window */

struct gmem_account;
struct gmem_core;
struct gmem_object;

enum gmem_kept_state {
	GMEM_KEPT_NONE = 0,
	GMEM_KEPT_LEAVING, /* its object is not gone yet */
	GMEM_KEPT_READY,
};

struct gmem_kept_range {
	uint64_t va, bytes;
	enum gmem_class class_;
	enum gmem_fork fork;
	enum gmem_kept_state state;
	bool spoilt; /* touched */
	bool gone;   /* left for good: gmem_kept_ready() lets go of it */
};

struct gmem_kept {
	struct gmem_mutex lock;
	struct gmem_kept_range ranges[GMEM_KEPT_MAX]; /* lock */
	bool ended;                                   /* lock */
};

void gmem_kept_init(struct gmem_kept *kept);
void gmem_kept_deinit(struct gmem_kept *kept);

/* va's range, which object backs alone, is to be kept once the object is gone. -EAGAIN: there are too many already. */
int gmem_kept_leave(struct gmem_object *object, uint64_t va, enum gmem_fork fork);
/* The object is gone, and its range is not: false if it is not to be kept, and the caller frees it. */
bool gmem_kept_ready(struct gmem_account *account, uint64_t va);
/* One of that size that is ready; -ENOENT. */
int gmem_kept_take(struct gmem_account *account, enum gmem_class class_, uint64_t bytes, uint64_t align,
		   enum gmem_fork fork, uint64_t *ret_va);
/* The process has touched it. */
void gmem_kept_spoil(struct gmem_account *account, uint64_t va);
/* The process has unmapped some of it, or all. */
void gmem_kept_forget(struct gmem_account *account, uint64_t va, uint64_t bytes);
/* The session has ended. */
void gmem_kept_end(struct gmem_account *account);

#endif
