/* SPDX-License-Identifier: Apache-2.0
 *
 * Density: how much of a page's neighbourhood an hnode has. Where it has most of it, the rest is likely to be wanted, too,
 * in whatever order: the tree-based prefetcher of NVIDIA's UVM (Ganguly et al., "Interplay between hardware prefetcher and
 * page eviction policy in CPU-GPU unified virtual memory", ISCA 2019). A block of 2 MiB is a binary tree, whose leaves are
 * 64 KiB, or four pages where those are larger. What has no content counts for nothing: there is nothing to fetch.
 */
#ifndef GMEM_DENSITY_H
#define GMEM_DENSITY_H

#include <gmem/as.h>

struct gmem_core;

#define GMEM_BLOCK_BYTES (2ull << 20)

/* The largest subtree with this page of whose content more than half is at hnid (own: is writable there), and not all. As
 * pages of the object, within the region. False: there is none. */
bool gmem_density_around(struct gmem_core *core, const struct gmem_place *place, int hnid, bool own, uint64_t *ret_index,
			 uint64_t *ret_count);
/* Of the count pages from index on, the first ones in a row that have content, but not (so) at hnid, and that nobody is at
 * work on. False: there are none. */
bool gmem_density_missing(struct gmem_core *core, const struct gmem_object *object, uint64_t index, uint64_t count, int hnid,
			  bool own, uint64_t *ret_index, uint64_t *ret_count);

#endif
