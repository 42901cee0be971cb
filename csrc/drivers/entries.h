/* SPDX-License-Identifier: Apache-2.0
 *
 * The index of a tier: 16 bytes for each key, in a sparse memfd. A frame of it (256 keys) exists, and is charged, while
 * one of its keys is stored.
 */
#ifndef GMEM_ENTRIES_H
#define GMEM_ENTRIES_H

#include <gmem/types.h>

#include "quota.h"

/* word is 0 if nothing is stored; else what the driver makes of it. check may be anything. */
struct gmem_entry {
	uint64_t word, check;
};

struct gmem_entries;

/* fd: a predecessor's, taken over on success; -1: a new one. -EPROTO: it is none, or of another size. */
int gmem_entries_create(const char *name, uint64_t key_count, struct gmem_quota *quota, int fd,
			struct gmem_entries **ret);
int gmem_entries_fd(const struct gmem_entries *entries);
/* The next key at or behind *key that is stored; -ENOENT: none. */
int gmem_entries_next(struct gmem_entries *entries, uint64_t *key);
void gmem_entries_destroy(struct gmem_entries *index);

/* A word of 0 costs nothing to find. */
struct gmem_entry gmem_entries_get(struct gmem_entries *index, uint64_t key);
/* Room for an entry, for one gmem_entries_put(), or to be given back by gmem_entries_release(). -ENOSPC: over quota. */
int gmem_entries_reserve(struct gmem_entries *index, uint64_t key);
void gmem_entries_release(struct gmem_entries *index, uint64_t key);
/* Publishes an entry, at whatever instant one looks the old one, none, or the new one; returns the word that it replaces, which is the caller's to dispose of. */
uint64_t gmem_entries_put(struct gmem_entries *index, uint64_t key, struct gmem_entry entry);
/* Removes an entry; returns its word. */
uint64_t gmem_entries_take(struct gmem_entries *index, uint64_t key);
/* Exchanges the word, if it is still `from`. For callers that do not own the key. */
bool gmem_entries_move(struct gmem_entries *index, uint64_t key, uint64_t from, uint64_t to);

#endif
