/* SPDX-License-Identifier: Apache-2.0
 *
 * Evict: moving pages off an hnode to the next tier.
 */
#ifndef GMEM_EVICT_H
#define GMEM_EVICT_H

#include <gmem/migrate.h>

#define GMEM_EVICT_BATCH 32

/* Takes count locked pages of any objects off the hnode, as many as it can, and unlocks all. forced: also pinned ones. 0;
 * or why one could not go: -EBUSY: held; -EPERM: pinned; -ENOMEM: there is nowhere to put it; -EAGAIN, -EIO... */
int gmem_evict(struct gmem_hnode *hnode, struct gmem_page *pages, size_t count, bool forced);
/* One page that is not locked; -EBUSY also if someone else has it. */
int gmem_evict_page(struct gmem_hnode *hnode, struct gmem_object *object, uint64_t index, bool forced);

#endif
