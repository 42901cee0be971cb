/* SPDX-License-Identifier: Apache-2.0
 *
 * Tiers: peers that only store pages, as a chain below the host. What leaves a device goes to the host, what leaves the
 * host to the first tier with room, what leaves a tier to one further down.
 */
#ifndef GMEM_TIER_H
#define GMEM_TIER_H

#include <gmem/hnode.h>

#define GMEM_RANK_LAST UINT32_MAX

static inline bool gmem_hnode_is_tier(const struct gmem_hnode *hnode)
{
	return gmem_hnode_is_peer(hnode) && !(hnode->info.caps & GMEM_CAP_COMPUTE);
}

/* The hnid to which bytes that leave hnode shall go, skipping those in the mask not_these; -ENOMEM if there is none. Tiers
 * that have no room are told that they are under pressure. */
int gmem_tier_next(struct gmem_hnode *hnode, uint64_t bytes, uint32_t not_these);
/* A device whose free memory takes bytes that leave the host when no tier does; NULL: none, or it is not the host's. */
struct gmem_hnode *gmem_tier_overflow(struct gmem_hnode *hnode, uint64_t bytes);
/* Whether the host's pages can go there without a tier. */
static inline bool gmem_hnode_takes_overflow(const struct gmem_hnode *hnode)
{
	return hnode->hnid != GMEM_HOST && !gmem_hnode_is_peer(hnode) && !gmem_hnode_own_frames(hnode);
}

/* Pages to and from a peer, in one call if its driver can do that; each io has its own result. */
void gmem_tier_push(struct gmem_hnode *peer, struct gmem_peer_io *io, size_t count);
void gmem_tier_pull(struct gmem_hnode *peer, struct gmem_peer_io *io, size_t count);
/* What a peer has under a key is not needed any more; 0 also if it does not want to know. */
int gmem_tier_free(struct gmem_hnode *peer, uint64_t key, uint64_t bytes);

#endif
