/* SPDX-License-Identifier: Apache-2.0
 *
 * Slots: places of 4 KiB, 64 KiB and 2 MiB in one span of bytes. The span is cut into chunks of 2 MiB. A chunk is
 * empty, or one slot of 2 MiB, or holds small slots: 32 groups of 16 pages, where a group is one slot of 64 KiB or up to
 * 16 of 4 KiB. Slots of 4 KiB and of 64 KiB go to chunks of their own as long as there are empty chunks, and into
 * each other's before the span is called full; a chunk is empty again as soon as its last slot is freed.
 *
 * Only numbers: what the span is (a file, a buffer) is the caller's. All calls take the one lock for a few dozen
 * instructions; none searches.
 */
#ifndef GMEM_DRIVERS_SLOTS_H
#define GMEM_DRIVERS_SLOTS_H

#include <gmem/lockrank.h>
#include <gmem/types.h>

#define GMEM_SLOTS_CHUNK GMEM_HUGE_BYTES
#define GMEM_SLOTS_GROUPS 32

/* Lists of chunks. Chunks that are full or one big slot are on none. */
enum gmem_slots_list {
	GMEM_SLOTS_EMPTY = 0,
	GMEM_SLOTS_SINGLES,      /* for 4 KiB; free pages, no free group */
	GMEM_SLOTS_GROUPS_OF_4K, /* for 4 KiB; a free group at least */
	GMEM_SLOTS_SINGLES_OF_64K,
	GMEM_SLOTS_GROUPS_OF_64K,
	GMEM_SLOTS_LISTS,
	GMEM_SLOTS_NO_LIST = GMEM_SLOTS_LISTS,
};

struct gmem_slots_chunk {
	uint16_t used[GMEM_SLOTS_GROUPS]; /* bit p: page p of the group is taken */
	uint32_t free_groups;             /* bit g: nothing of group g is taken */
	uint32_t full_groups;
	uint32_t next, prev;              /* on its list; chunk number + 1, 0: none */
	uint8_t list;
	bool for_64k;
};

/* All fields but the constants: the lock. */
struct gmem_slots {
	struct gmem_mutex lock;
	struct gmem_slots_chunk *chunks; /* (C) pointer */
	uint32_t count;                  /* (C) */
	uint32_t heads[GMEM_SLOTS_LISTS];
	uint32_t fresh;                  /* chunks from here on were never used: their descriptors are untouched memory */
	uint64_t used_bytes;
};

/* bytes: a multiple of the chunk. */
int gmem_slots_init(struct gmem_slots *slots, uint64_t bytes);
void gmem_slots_deinit(struct gmem_slots *slots);
/* bytes: 4 KiB, 64 KiB or 2 MiB. -ENOSPC. */
int gmem_slots_alloc(struct gmem_slots *slots, uint64_t bytes, uint64_t *ret_offset);
/* Before anything is allocated: a place that a predecessor had given out. -EINVAL: it is none, or it is taken. */
int gmem_slots_take(struct gmem_slots *slots, uint64_t offset, uint64_t bytes);
void gmem_slots_free(struct gmem_slots *slots, uint64_t offset, uint64_t bytes);
uint64_t gmem_slots_used(struct gmem_slots *slots);

#endif
