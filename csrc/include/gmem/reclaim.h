/* SPDX-License-Identifier: Apache-2.0
 *
 * Reclaim: choosing victims on a full hnode and moving them to the next tier. The choice is SIEVE (Zhang et al., "SIEVE
 * is Simpler than LRU", NSDI 2024): one list, new pages at its head; a hand walks from tail to head, clears the visited
 * mark of pages used since it last came by, and evicts the first page without one. It needs no work on a use but one
 * relaxed store, which is what the fault path can pay.
 */
#ifndef GMEM_RECLAIM_H
#define GMEM_RECLAIM_H

#include <gmem/hnode.h>

/* The list; all under the hnode lock. */
void gmem_sieve_insert(struct gmem_hnode *hnode, uint32_t frame);
void gmem_sieve_remove(struct gmem_hnode *hnode, uint32_t frame);
/* The next candidate, moving the hand on; GMEM_FRAME_NONE if the list is empty. */
uint32_t gmem_sieve_next(struct gmem_hnode *hnode);
/* Puts the hand there. */
void gmem_sieve_next_is(struct gmem_hnode *hnode, uint32_t frame);

/* Frees at least bytes on the hnode. 0; -EAGAIN: candidates were busy, worth another try; -ENOMEM: all that is left is
 * pinned or held, or there is nowhere to put it. Never waits for a page. */
int gmem_reclaim(struct gmem_hnode *hnode, uint64_t bytes);
/* The same for an account's quota, from its own pages; also -EDQUOT: so much can't be had. */
int gmem_reclaim_own(struct gmem_hnode *hnode, struct gmem_account *account, uint64_t bytes);
/* Moves everything off a draining hnode, waiting for pages that are in use. 0, or why one can't be moved. */
int gmem_reclaim_drain(struct gmem_hnode *hnode);
int gmem_reclaimer_start(struct gmem_hnode *hnode);
void gmem_reclaimer_stop(struct gmem_hnode *hnode);

#endif
