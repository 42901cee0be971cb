/* SPDX-License-Identifier: Apache-2.0
 *
 * Replay: what a policy would have made of a sequence of accesses, on an hnode of some number of pages. Pure: no core, no
 * I/O, the same counts each time.
 */
#ifndef GMEM_REPLAY_H
#define GMEM_REPLAY_H

#include <stddef.h>
#include <stdint.h>

/* A sequence of accesses, with pages numbered in order of first use. */
struct gmem_accesses {
	uint32_t *ids;          /* [count] */
	const uint8_t *writes;  /* [count], borrowed; NULL: all are reads */
	uint64_t *keys;         /* [distinct] */
	size_t count;
	uint32_t distinct;
};

/* Borrows writes. -ENOMEM; -EFBIG beyond 2^31 accesses. */
int gmem_accesses_init(struct gmem_accesses *accesses, const uint64_t *pages, const uint8_t *writes, size_t count);
void gmem_accesses_deinit(struct gmem_accesses *accesses);

/* A page is dirty from a write until it leaves; it leaves dirty or clean. What is still there at the end has not left. */
struct gmem_replay {
	uint64_t misses;         /* pages in */
	uint64_t evicted_dirty;  /* pages out */
	uint64_t evicted_clean;
};

/* What of the hits the policy is shown: on a live hnode a hit on a mapped page is invisible. */
#define GMEM_VISIBLE_ALL 65536u
#define GMEM_VISIBLE_FAULTS 0u

/* visible: of 65536 hits so many are shown to the policy, chosen by seed. -EINVAL: no such policy, or no capacity. */
int gmem_replay(const struct gmem_accesses *accesses, const char *policy, uint32_t capacity, uint32_t visible,
		uint64_t seed, struct gmem_replay *ret);
/* OPT: the page whose next use is furthest away leaves (Belady 1966; Mattson et al. 1970). No policy has fewer misses. */
int gmem_replay_opt(const struct gmem_accesses *accesses, uint32_t capacity, struct gmem_replay *ret);
/* The pages that are used most often stay for ever, each other access is a miss: the best that knowing frequencies alone
 * can do. */
int gmem_replay_static(const struct gmem_accesses *accesses, uint32_t capacity, struct gmem_replay *ret);

#endif
