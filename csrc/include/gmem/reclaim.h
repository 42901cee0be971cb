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
/* Moves one page off the hnode. forced: also a pinned one (the device is going). 0; -EBUSY: it is someone else's just
 * now, or held; -EPERM: pinned; -ENOMEM, -EIO... */
int gmem_reclaim_evict(struct gmem_hnode *hnode, struct gmem_object *object, uint64_t index, bool forced);
/* Moves everything off a draining hnode, waiting for pages that are in use. 0, or why one can't be moved. */
int gmem_reclaim_drain(struct gmem_hnode *hnode);
int gmem_reclaimer_start(struct gmem_hnode *hnode);
void gmem_reclaimer_stop(struct gmem_hnode *hnode);

#endif
