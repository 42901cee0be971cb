/* SPDX-License-Identifier: Apache-2.0
 *
 * A shadow: what a policy would have kept, without any memory behind it. Of a large hnode it follows a sample of the pages
 * on a share of the frames, which has nearly the same miss ratio (Waldspurger et al., "Cache Modeling and Optimization
 * using Miniature Simulations", USENIX ATC 2017).
 */
#ifndef GMEM_SHADOW_H
#define GMEM_SHADOW_H

#include <gmem/policy.h>

#define GMEM_SHADOW_FRAMES 4096u /* at most */

struct gmem_shadow {
	struct gmem_policy policy;
	uint64_t *keys;      /* by frame */
	uint32_t *chain;     /* by frame: the next one of the same bucket, or the next free one */
	uint32_t *buckets;
	uint32_t used, bumped, free;
};

int gmem_shadow_init(struct gmem_shadow *shadow, const struct gmem_policy_ops *ops);
void gmem_shadow_deinit(struct gmem_shadow *shadow);
/* Whether the page was there, with room for so many (at most GMEM_SHADOW_FRAMES); now it is. */
bool gmem_shadow_access(struct gmem_shadow *shadow, uint64_t key, uint32_t capacity);
/* The page is no more. */
void gmem_shadow_forget(struct gmem_shadow *shadow, uint64_t key);

#endif
