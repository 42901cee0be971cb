/* SPDX-License-Identifier: Apache-2.0
 *
 * Accesses: a sequence of uses of pages on one hnode, in the form that replays want. Pages are numbered by stays: a page
 * that lost its content, or whose copy here was taken away by a write elsewhere, is another one when it comes back. So no
 * policy is charged for what it could not have kept, and OPT knows what is not worth keeping.
 */
#ifndef GMEM_ACCESSES_H
#define GMEM_ACCESSES_H

#include <stddef.h>
#include <stdint.h>

#include <gmem/access.h>

enum gmem_op {
	GMEM_OP_READ,
	GMEM_OP_WRITE, /* dirty from now on */
	GMEM_OP_GONE,  /* lost its content: leaves, and nothing is copied */
	GMEM_OP_TAKEN, /* its content is elsewhere: leaves, and is copied if it was dirty */
};

struct gmem_accesses {
	uint32_t *ids;     /* [count] */
	uint8_t *ops;      /* [count] enum gmem_op */
	uint64_t *keys;    /* [distinct] the page's number */
	uint32_t *weights; /* [distinct] its size, in units */
	uint8_t *empty;    /* [distinct] 1: there was nothing to copy when it was used first */
	size_t count;      /* uses, and ends of stays */
	size_t uses;
	size_t absent;     /* uses for which there was no copy when they were recorded */
	uint32_t distinct; /* stays */
	uint32_t pages;    /* different ones */
	uint64_t peak;     /* the most units that were there at a time, if none is ever evicted */
	uint8_t unit_shift; /* log2 of the smallest page's size; 0: unknown */
};

/* Pages of one size. writes: 0 or 1 for each; NULL: all are reads. -ENOMEM; -EFBIG beyond 2^31 accesses. */
int gmem_accesses_init(struct gmem_accesses *accesses, const uint64_t *pages, const uint8_t *writes, size_t count);

struct gmem_accesses_filter {
	int hnid;       /* where */
	uint32_t kinds; /* bit k: enum gmem_access_kind k counts as a use; ends of stays always count */
	uint32_t session; /* whose; 0: everybody's */
};
/* From a trace. A use that left the page writable counts as a write: what came later was unseen. Errors as above; -EINVAL:
 * something in it is no access. */
int gmem_accesses_load(struct gmem_accesses *accesses, const struct gmem_access *trace, size_t count,
		       const struct gmem_accesses_filter *filter);
void gmem_accesses_deinit(struct gmem_accesses *accesses);

/* The first one of them that can't be one; count if all can. */
size_t gmem_access_check(const struct gmem_access *trace, size_t count);

#endif
