/* SPDX-License-Identifier: Apache-2.0
 *
 * Range allocator: hands out aligned, disjoint pieces of one interval (the VA window's parts, the LPT's extents).
 * Free pieces stand in an array sorted by start; allocation is next-fit, so that a freed range is not handed out again
 * at once; neighbours are merged. Thread-safe.
 */
#ifndef GMEM_RANGE_H
#define GMEM_RANGE_H

#include <stddef.h>
#include <stdint.h>

#include <gmem/lockrank.h>

struct gmem_range_piece {
	uint64_t start, end;
};

struct gmem_range_allocator {
	struct gmem_mutex lock;
	struct gmem_range_piece *pieces; /* (lock) sorted, disjoint, never adjacent */
	size_t count, capacity;          /* (lock) */
	size_t cursor;                   /* (lock) where the next search starts */
	uint64_t free_bytes;             /* (lock) */
	uint64_t start, end;             /* (C) */
};

int gmem_range_init(struct gmem_range_allocator *ranges, uint64_t start, uint64_t end);
void gmem_range_deinit(struct gmem_range_allocator *ranges);
/* align is a power of two. -ENOMEM if no piece is large enough. */
int gmem_range_alloc(struct gmem_range_allocator *ranges, uint64_t bytes, uint64_t align, uint64_t *ret_start);
/* The same, not below that address; where there is no such piece, wherever there is one. */
int gmem_range_alloc_above(struct gmem_range_allocator *ranges, uint64_t above, uint64_t bytes, uint64_t align,
			   uint64_t *ret_start);
/* This very range. -EEXIST: some of it has been handed out. */
int gmem_range_take(struct gmem_range_allocator *ranges, uint64_t start, uint64_t bytes);
/* [start, start + bytes) must have been handed out. */
void gmem_range_free(struct gmem_range_allocator *ranges, uint64_t start, uint64_t bytes);
uint64_t gmem_range_free_bytes(struct gmem_range_allocator *ranges);

#endif
