/* SPDX-License-Identifier: Apache-2.0
 *
 * Ageing of memory beside the window, which is adopted memory. The agent drops translations of the window by MADV_DONTNEED: there
 * is nothing but files there. Beside it the program may have unmapped the range a moment ago, and mapped private memory, which
 * would lose its content. So this is done only in ranges of which it is known that they stay mapped, and which are taken out of
 * this table before they go. All others are write-protected, by the kernel's word only where gmemd watches them: there reclaim
 * sees who writes, but not who reads.
 */
#ifndef GMEM_CLIENT_BESIDE_H
#define GMEM_CLIENT_BESIDE_H

#include <stdint.h>

struct gmem_beside;

int gmem_beside_create(struct gmem_beside **ret);
void gmem_beside_destroy(struct gmem_beside *beside);
/* Over a fork: by the parent; the child, which has no agent, unlocks it as well. */
void gmem_beside_lock(struct gmem_beside *beside);
void gmem_beside_unlock(struct gmem_beside *beside);
/* The range stays mapped until it is removed, or a part of it. */
int gmem_beside_add(struct gmem_beside *beside, uint64_t va, uint64_t bytes);
void gmem_beside_remove(struct gmem_beside *beside, uint64_t va, uint64_t bytes);
/* For the agent; of a struct gmem_link. */
void gmem_beside_age(void *link, uint64_t va, uint64_t bytes);

#endif
