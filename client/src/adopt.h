/* SPDX-License-Identifier: Apache-2.0
 *
 * Bringing memory that a program has already under gmem's management, at its own address, while its threads use it.
 *
 * gmemd makes a region of the same size in the window (the staging region) and knows the program's range as a second
 * region on the same pages. Piece by piece, writers are held up by a userfaultfd of this process's own that write-protects
 * the old memory; what is there is copied to the staging region; and mremap(2) moves that piece of the staging region over
 * the old one, in one step for all threads. Who waited goes on, and faults in the new mapping if need be. So a write is
 * either before the copy, and in it, or after the move; and there is no instant at which nothing is mapped.
 */
#ifndef GMEM_CLIENT_ADOPT_H
#define GMEM_CLIENT_ADOPT_H

#include <stdbool.h>
#include <stdint.h>

struct gmem_link;

struct gmem_adoption {
	uint64_t va, bytes;                      /* what comes under management: whole pages of 4 KiB */
	uint64_t done;                           /* how much of it has */
	uint64_t staging, staging_bytes, offset; /* the staging region; its offset is in the session's small file */
	int uffd, pagemap;
};

/* Checks the range and makes everything ready; nothing changes for the program yet. outward: the pages at its edges
 * belong to it, with whatever else lies there; else they are left out. ret->bytes is 0 if no page is left. message:
 * GMEM_WIRE_MESSAGE_BYTES, filled on failure, argument first. */
int gmem_link_adopt_begin(struct gmem_link *link, uint64_t va, uint64_t bytes, uint64_t page_bytes, bool outward,
			  struct gmem_adoption *ret, char *message);
/* Takes it over. On failure adoption->done bytes from va on are managed, and stay so; the rest is as it was. */
int gmem_link_adopt_finish(struct gmem_link *link, struct gmem_adoption *adoption, char *message);
/* Instead of that: nothing has changed. */
void gmem_link_adopt_cancel(struct gmem_link *link, struct gmem_adoption *adoption);
/* All that was adopted becomes private memory again, as the session is about to end and no contexts are open any more. What
 * can't be had any more is unmapped: it must not read zero. */
void gmem_link_give_back(struct gmem_link *link);
/* The range stays mapped until it is disowned, and nobody else unmaps or moves any of it: so it can be aged like the window
 * (beside.h). 0 or -ENOMEM. */
int gmem_link_stays(struct gmem_link *link, uint64_t va, uint64_t bytes);
/* Before its owner frees it: whole pages in [dead, dead_end) become fresh private memory, that beside them private memory with
 * its content. What can't be had stays managed. */
void gmem_link_disown(struct gmem_link *link, uint64_t va, uint64_t bytes, uint64_t dead, uint64_t dead_end);

#endif
