/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>

#include <gmem/internal.h>
#include <gmem/tier.h>

/* Devices, the host, then the tiers by rank. */
static uint64_t depth(const struct gmem_hnode *hnode)
{
	if (hnode->hnid == GMEM_HOST)
		return 1;
	if (!gmem_hnode_is_tier(hnode))
		return 0;
	return 2 + ((uint64_t)atomic_load_explicit(&hnode->rank, memory_order_relaxed) << 8) + (unsigned)hnode->hnid;
}

/* The nearest one below, whether it has room or not. */
static struct gmem_hnode *below(struct gmem_core *core, uint64_t deeper_than, uint32_t not_these)
{
	struct gmem_hnode *best = NULL;

	for (int h = 0; h < GMEM_HNODE_MAX; h++) {
		struct gmem_hnode *hnode = not_these >> h & 1 ? NULL : gmem_core_hnode(core, h);

		if (hnode && depth(hnode) > deeper_than && (!best || depth(hnode) < depth(best)))
			best = hnode;
	}
	return best;
}

int gmem_tier_next(struct gmem_hnode *hnode, uint64_t bytes, uint32_t not_these)
{
	struct gmem_hnode *next = hnode;

	not_these |= 1u << hnode->hnid;
	/* the host makes room when it is asked for a frame */
	while ((next = below(hnode->core, depth(next), not_these)))
		if (next->hnid == GMEM_HOST || gmem_hnode_room(next, bytes))
			return next->hnid;
	/* one that is being detached and has nothing below gives back what it has */
	if (gmem_hnode_is_tier(hnode) && atomic_load(&hnode->draining) && !(not_these & 1u << GMEM_HOST))
		return GMEM_HOST;
	return -ENOMEM;
}

/* What it has free only: a device that made room would send pages here. */
struct gmem_hnode *gmem_tier_overflow(struct gmem_hnode *hnode, uint64_t bytes)
{
	for (int h = 0; hnode->hnid == GMEM_HOST && h < GMEM_HNODE_MAX; h++) {
		struct gmem_hnode *device = gmem_core_hnode(hnode->core, h);

		if (device && gmem_hnode_takes_overflow(device) && !atomic_load(&device->draining) &&
		    gmem_hnode_free_bytes(device) >= bytes)
			return device;
	}
	return NULL;
}

int gmem_tier_rank(struct gmem_core *core, int hnid, uint32_t rank)
{
	struct gmem_hnode *hnode = gmem_core_hnode(core, hnid);

	if (!hnode)
		return -ENODEV;
	if (!gmem_hnode_is_tier(hnode))
		return -EINVAL;
	atomic_store_explicit(&hnode->rank, rank, memory_order_relaxed);
	return 0;
}

/* That a tier is full, or that the memory beside it has gone, is no failure of its own. */
static void count_failures(struct gmem_hnode *peer, const struct gmem_peer_io *io, size_t count)
{
	for (size_t i = 0; i < count; i++)
		gmem_count(&peer->errors, io[i].result && io[i].result != -ENOSPC && io[i].result != -EFAULT);
}

void gmem_tier_push(struct gmem_hnode *peer, struct gmem_peer_io *io, size_t count)
{
	int err;

	gmem_duty_driver(peer->hnid, "peer_map");
	err = peer->ops->peer_map_batch ? peer->ops->peer_map_batch(peer->device, io, count) : 0;
	for (size_t i = 0; i < count; i++) {
		if (err)
			io[i].result = err;
		else if (!peer->ops->peer_map_batch)
			io[i].result = peer->ops->peer_map(peer->device, io[i].key, io[i].memory, io[i].bytes);
		if (io[i].result == -ENOSPC)
			gmem_hnode_full(peer, io[i].bytes);
	}
	count_failures(peer, io, count);
	gmem_duty_driver(peer->hnid, NULL);
}

void gmem_tier_pull(struct gmem_hnode *peer, struct gmem_peer_io *io, size_t count)
{
	int err;

	gmem_duty_driver(peer->hnid, "peer_unmap");
	err = peer->ops->peer_unmap_batch ? peer->ops->peer_unmap_batch(peer->device, io, count) : 0;
	for (size_t i = 0; i < count; i++) {
		if (err)
			io[i].result = err;
		else if (!peer->ops->peer_unmap_batch)
			io[i].result = peer->ops->peer_unmap(peer->device, io[i].key, io[i].memory, io[i].bytes);
	}
	count_failures(peer, io, count);
	gmem_duty_driver(peer->hnid, NULL);
}

int gmem_tier_free(struct gmem_hnode *peer, uint64_t key, uint64_t bytes)
{
	int err;

	if (!peer->ops->peer_free)
		return 0;
	gmem_duty_driver(peer->hnid, "peer_free");
	err = peer->ops->peer_free(peer->device, key, bytes);
	gmem_duty_driver(peer->hnid, NULL);
	return err;
}
