/* SPDX-License-Identifier: Apache-2.0
 *
 * Regions that a forked child gets a copy of (GMEM_RING_COPY): what was private memory stays so. A child first shares them
 * as it shares others; its fork handler puts a copy in place of each before fork() returns, while the parent's are frozen.
 * gmemd knows which there are: the program may have unmapped or moved them.
 */
#ifndef GMEM_CLIENT_COPIES_H
#define GMEM_CLIENT_COPIES_H

#include <stdbool.h>
#include <stdint.h>

struct gmem_link;

/* In the parent, around a fork: between the two nobody writes to them. -errno: nothing is frozen. */
int gmem_copies_freeze(struct gmem_link *link);
void gmem_copies_thaw(struct gmem_link *link);
/* In the child, once it has joined. What can't be copied is unmapped there, and said on stderr. */
void gmem_copies_take(struct gmem_link *link);
/* Unmaps, or keeps from children, what is mapped of the session's files beside the window. */
void gmem_copies_unmap(struct gmem_link *link);
void gmem_copies_withhold(struct gmem_link *link);
/* Drops the content of what is mapped of them in a range beside the window; zeroed: every byte of it reads zero. */
int gmem_copies_drop(struct gmem_link *link, uint64_t va, uint64_t bytes, bool zeroed);
/* Whether all of a range beside the window is mapped from them. */
bool gmem_copies_cover(struct gmem_link *link, uint64_t va, uint64_t bytes);

#endif
