/* SPDX-License-Identifier: Apache-2.0
 *
 * Index: where the page of a key is, and the checksum of its content. A sparse array of 16 bytes a key in a memfd, with
 * a header and no pointers, so that a later daemon can adopt it; everything else of a tier can be rebuilt from it.
 *
 * An entry has room for two checksums, and its place says which of them counts: so the place, one 64-bit word, flips
 * both at once, and whoever reads the array at any moment (after a crash, too) finds the old page or the new one.
 */
#ifndef GMEM_DRIVERS_INDEX_H
#define GMEM_DRIVERS_INDEX_H

#include <gmem/types.h>

#define GMEM_INDEX_MAGIC 0x7865646e696d6567ull /* "gemindex" */
#define GMEM_INDEX_VERSION 1

/* The first page of the memfd. */
struct gmem_index_header {
	uint64_t magic;
	uint32_t version, entry_bytes;
	uint64_t entries_offset;
	uint64_t key_count;
	uint64_t capacity_bytes; /* of what the places are in */
	uint64_t bandwidth, latency_ns; /* of that, as it was measured */
};

/* Bits of a place: 0 to 4 the page's shift, 5 which checksum counts, 12 and up the offset. 0: nothing is stored. */
#define GMEM_PLACE_SHIFT 0x1full
#define GMEM_PLACE_SECOND 0x20ull
#define GMEM_PLACE_OFFSET (~0xfffull)

struct gmem_index_entry {
	_Atomic uint64_t place;  /* (P): written by whoever owns the page; (A) for those who look */
	_Atomic uint32_t crc[2]; /* (P) */
};

struct gmem_index {
	int fd;                            /* (C) */
	uint64_t key_count, bytes;         /* (C) */
	struct gmem_index_header *header;  /* (C) */
	struct gmem_index_entry *entries;  /* (C) pointer */
};

static inline uint64_t gmem_place_offset(uint64_t place)
{
	return place & GMEM_PLACE_OFFSET;
}

static inline uint64_t gmem_place_bytes(uint64_t place)
{
	return place ? 1ull << (place & GMEM_PLACE_SHIFT) : 0;
}

int gmem_index_init(struct gmem_index *index, uint64_t key_count, uint64_t capacity_bytes);
/* A predecessor's, taken over on success. -EPROTO: it is none; -EPROTONOSUPPORT: of another version. */
int gmem_index_adopt(struct gmem_index *index, uint64_t key_count, int fd);
/* The next key at or behind key that has a place; -ENOENT: none. */
int gmem_index_next(struct gmem_index *index, uint64_t *key);
void gmem_index_deinit(struct gmem_index *index);
/* The place, 0 if nothing is stored. key is below key_count. */
uint64_t gmem_index_get(struct gmem_index *index, uint64_t key, uint32_t *ret_crc);
/* Returns the place that the key had, for the caller to free. */
uint64_t gmem_index_set(struct gmem_index *index, uint64_t key, uint64_t offset, uint64_t bytes, uint32_t crc);
uint64_t gmem_index_clear(struct gmem_index *index, uint64_t key);

#endif
