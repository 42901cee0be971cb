/* SPDX-License-Identifier: Apache-2.0
 *
 * The index of a tier: 16 bytes for each key, in a sparse memfd. A frame of it (256 keys) exists, and is charged, while
 * one of its keys is stored.
 */
#ifndef GMEM_PEERINDEX_H
#define GMEM_PEERINDEX_H

#include <gmem/types.h>

#include "quota.h"

/* word is 0 if nothing is stored; else what the driver makes of it. check may be anything. */
struct gmem_entry {
	uint64_t word, check;
};

struct gmem_index;

int gmem_index_create(const char *name, uint64_t key_count, struct gmem_quota *quota, struct gmem_index **ret);
void gmem_index_destroy(struct gmem_index *index);

/* A word of 0 costs nothing to find. */
struct gmem_entry gmem_index_get(struct gmem_index *index, uint64_t key);
/* Room for an entry, for one gmem_index_put(), or to be given back by gmem_index_release(). -ENOSPC: over quota. */
int gmem_index_reserve(struct gmem_index *index, uint64_t key);
void gmem_index_release(struct gmem_index *index, uint64_t key);
/* Publishes an entry; returns the word that it replaces, which is the caller's to dispose of. */
uint64_t gmem_index_put(struct gmem_index *index, uint64_t key, struct gmem_entry entry);
/* Removes an entry; returns its word. */
uint64_t gmem_index_take(struct gmem_index *index, uint64_t key);
/* Exchanges the word, if it is still `from`. For callers that do not own the key. */
bool gmem_index_move(struct gmem_index *index, uint64_t key, uint64_t from, uint64_t to);

#endif
