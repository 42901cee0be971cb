/* SPDX-License-Identifier: Apache-2.0
 *
 * Ghosts: keys of pages that were evicted a short while ago, as fingerprints in a fixed table of four ways, with the time
 * of eviction, counted in evictions (Yang et al., SOSP 2023, section 4.2, keep theirs the same way). A key may be
 * forgotten early, and one of some million unknown ones is taken for known: both cost a worse guess, nothing else.
 */
#ifndef GMEM_GHOST_H
#define GMEM_GHOST_H

#include <stdbool.h>
#include <stdint.h>

struct gmem_ghost {
	uint32_t tag;   /* hash; 0: empty */
	uint32_t stamp; /* the clock when it was added */
	uint16_t note;  /* the policy's */
};

struct gmem_ghosts {
	struct gmem_ghost *table; /* sparse; only as much of it as frames were ever in use is touched */
	uint64_t slots;           /* a power of two */
	uint64_t mask;            /* of those in use, grows */
	uint32_t clock;           /* entries added */
};

uint64_t gmem_hash(uint64_t key);

int gmem_ghosts_init(struct gmem_ghosts *ghosts, uint64_t frames);
void gmem_ghosts_deinit(struct gmem_ghosts *ghosts);
/* resident: how many frames are in use, for the size. */
void gmem_ghosts_add(struct gmem_ghosts *ghosts, uint64_t key, uint16_t note, uint32_t resident);
/* Whether the key is among the latest `newest` that were added. Forgets it; ret_note: what was noted. */
bool gmem_ghosts_take(struct gmem_ghosts *ghosts, uint64_t key, uint32_t newest, uint16_t *ret_note);

#endif
