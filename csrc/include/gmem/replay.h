/* SPDX-License-Identifier: Apache-2.0
 *
 * Replay: what a policy would have made of a sequence of accesses, on an hnode of some number of pages. Pure: no core, no
 * I/O, the same counts each time.
 */
#ifndef GMEM_REPLAY_H
#define GMEM_REPLAY_H

#include <gmem/accesses.h>

/* A page is dirty from a write until it leaves; it leaves dirty or clean. What is still there at the end has not left.
 * Units are those of weights. */
struct gmem_replay {
	uint64_t misses;         /* pages in */
	uint64_t evicted_dirty;  /* pages out */
	uint64_t evicted_clean;
	uint64_t in_units;       /* copied here: nothing for a page that had no content yet */
	uint64_t out_units;      /* copied away, also because somebody else wrote them */
	uint64_t dropped_units;  /* evicted clean */
};

/* What of the hits the policy is shown: on a live hnode a hit on a mapped page is invisible. */
#define GMEM_VISIBLE_ALL 65536u
#define GMEM_VISIBLE_FAULTS 0u

/* capacity in units; a page that is larger is a miss each time. visible: of 65536 hits so many are shown to the policy,
 * chosen by seed. -EINVAL: no such policy, or no capacity. */
int gmem_replay(const struct gmem_accesses *accesses, const char *policy, uint64_t capacity, uint32_t visible,
		uint64_t seed, struct gmem_replay *ret);
/* OPT: the page whose next use is furthest away leaves (Belady 1966; Mattson et al. 1970). No policy has fewer misses,
 * if all pages are of one size; with several it is a rule like others, and mostly the best. */
int gmem_replay_opt(const struct gmem_accesses *accesses, uint64_t capacity, struct gmem_replay *ret);
/* The pages that are used most often stay for ever, each other access is a miss: the best that knowing frequencies alone
 * can do. */
int gmem_replay_static(const struct gmem_accesses *accesses, uint64_t capacity, struct gmem_replay *ret);

#endif
