/* SPDX-License-Identifier: Apache-2.0
 *
 * Ageing: a page that is mapped is used without anybody noticing. While an hnode is under pressure, a hand goes round its
 * frames, some steps for each page that is evicted: a page that nobody was seen to use since the hand last passed loses its
 * translations (not its place), so that the next use is a fault, and seen. The two-handed clock of 4.3BSD, with the
 * processes' agents in the place of reference bits.
 */
#ifndef GMEM_AGE_H
#define GMEM_AGE_H

#include <gmem/hnode.h>

/* A frame is passed four times while all others are evicted once: at the first its mark goes, at the second it is asked,
 * and there is as much time again to answer. */
#define GMEM_AGE_PACE 4

/* So many pages have been evicted from it. */
void gmem_age(struct gmem_hnode *hnode, uint64_t evicted);

#endif
