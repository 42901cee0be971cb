/* SPDX-License-Identifier: Apache-2.0
 *
 * Access: one use of a page that the core has seen, as it stands in a trace. docs/maintainer.md has the file that holds them;
 * gmemd/trace.py reads and writes it.
 */
#ifndef GMEM_ACCESS_H
#define GMEM_ACCESS_H

#include <assert.h>
#include <stdint.h>

enum gmem_access_kind {
	GMEM_ACCESS_FAULT = 1, /* a thread touched a page that it did not map, or not writable */
	GMEM_ACCESS_ACQUIRE,   /* it was acquired */
	GMEM_ACCESS_PREFETCH,  /* somebody asked for it to be there */
	GMEM_ACCESS_AHEAD,     /* mapped ahead of a stream of faults: a guess, and the stream's next uses are unseen */
	GMEM_ACCESS_GONE,      /* va pages from page on lost their content: unmapped, or discarded */
	GMEM_ACCESS_KINDS,
};

#define GMEM_ACCESS_WRITE 0x01    /* it writes */
#define GMEM_ACCESS_RESIDENT 0x02 /* there was a copy on the hnode */
#define GMEM_ACCESS_EMPTY 0x04    /* it had no content anywhere: nothing was copied */
#define GMEM_ACCESS_OWNED 0x08    /* it is writable there from now on, so later writes are unseen */
#define GMEM_ACCESS_FLAGS 0x10    /* of which there are no others */

#define GMEM_ACCESS_NOWHERE 0xff /* hnid of GONE */

struct gmem_access {
	uint64_t time_ns; /* since the recording began */
	uint64_t page;    /* logical page number: what policies know it by. Used again once it is gone */
	uint64_t va;      /* where the page begins; GONE: how many pages */
	uint32_t session; /* whose access; the low half of its id */
	uint8_t hnid;     /* where it was used */
	uint8_t kind;     /* enum gmem_access_kind */
	uint8_t shift;    /* log2 of the page size */
	uint8_t flags;    /* GMEM_ACCESS_* */
};
static_assert(sizeof(struct gmem_access) == 32, "it is a file format");

/* Whether it leaves no copy on any other hnode, wherever there was one. */
static inline int gmem_access_takes(const struct gmem_access *access)
{
	return (access->flags & GMEM_ACCESS_WRITE) ||
	       (access->kind == GMEM_ACCESS_PREFETCH && (access->flags & GMEM_ACCESS_OWNED));
}

#endif
