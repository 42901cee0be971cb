/* SPDX-License-Identifier: Apache-2.0
 *
 * Reclaim: moving pages off a full hnode to the next tier. Its policy (policy.h) says which.
 */
#ifndef GMEM_RECLAIM_H
#define GMEM_RECLAIM_H

#include <gmem/hnode.h>

/* Frees at least bytes on the hnode. 0; -EAGAIN: candidates were busy, worth another try; -ENOMEM: all that is left is
 * pinned or held, or there is nowhere to put it. Never waits for a page. */
int gmem_reclaim(struct gmem_hnode *hnode, uint64_t bytes);
/* The same for an account's quota, from its own pages; also -EDQUOT: so much can't be had. */
int gmem_reclaim_own(struct gmem_hnode *hnode, struct gmem_account *account, uint64_t bytes);
/* For the control plane: the one or (no account) the other, again and again while it is -EAGAIN, for some tenths of a second. */
int gmem_reclaim_patiently(struct gmem_hnode *hnode, struct gmem_account *account, uint64_t bytes);
/* Moves everything off a draining hnode, waiting for pages that are in use. 0, or why one can't be moved. */
int gmem_reclaim_drain(struct gmem_hnode *hnode);
int gmem_reclaimer_start(struct gmem_hnode *hnode);
void gmem_reclaimer_stop(struct gmem_hnode *hnode);

#endif
