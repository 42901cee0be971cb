/* SPDX-License-Identifier: Apache-2.0 */
#include <assert.h>
#include <errno.h>
#include <sys/mman.h>

#include "slots.h"

#define PAGE_BYTES 4096ull
#define GROUP_BYTES 65536ull
#define GROUP_FULL 0xffffu
#define ALL_GROUPS UINT32_MAX

int gmem_slots_init(struct gmem_slots *slots, uint64_t bytes)
{
	uint64_t count = bytes / GMEM_SLOTS_CHUNK;
	void *chunks;

	if (!count || count >= UINT32_MAX)
		return -EINVAL;
	/* 88 bytes for 2 MiB, taken as chunks come into use */
	chunks = mmap(NULL, count * sizeof(*slots->chunks), PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (chunks == MAP_FAILED)
		return -errno;
	*slots = (struct gmem_slots){ .chunks = chunks, .count = (uint32_t)count };
	gmem_mutex_init(&slots->lock, GMEM_RANK_DRIVER);
	return 0;
}

void gmem_slots_deinit(struct gmem_slots *slots)
{
	munmap(slots->chunks, slots->count * sizeof(*slots->chunks));
	gmem_mutex_deinit(&slots->lock);
}

static void list_remove_locked(struct gmem_slots *slots, uint32_t number)
{
	struct gmem_slots_chunk *chunk = &slots->chunks[number];

	if (chunk->list == GMEM_SLOTS_NO_LIST)
		return;
	if (chunk->prev)
		slots->chunks[chunk->prev - 1].next = chunk->next;
	else
		slots->heads[chunk->list] = chunk->next;
	if (chunk->next)
		slots->chunks[chunk->next - 1].prev = chunk->prev;
	chunk->list = GMEM_SLOTS_NO_LIST;
}

/* At the head: a chunk that was full a moment ago is filled again before sparser ones, which so become empty. */
static void list_insert_locked(struct gmem_slots *slots, uint32_t number, enum gmem_slots_list list)
{
	struct gmem_slots_chunk *chunk = &slots->chunks[number];

	chunk->list = (uint8_t)list;
	if (list == GMEM_SLOTS_NO_LIST)
		return;
	chunk->prev = 0;
	chunk->next = slots->heads[list];
	if (chunk->next)
		slots->chunks[chunk->next - 1].prev = number + 1;
	slots->heads[list] = number + 1;
}

static enum gmem_slots_list list_of(const struct gmem_slots_chunk *chunk)
{
	if (chunk->free_groups == ALL_GROUPS)
		return GMEM_SLOTS_EMPTY;
	if (chunk->full_groups == ALL_GROUPS)
		return GMEM_SLOTS_NO_LIST;
	if (chunk->free_groups)
		return chunk->for_64k ? GMEM_SLOTS_GROUPS_OF_64K : GMEM_SLOTS_GROUPS_OF_4K;
	return chunk->for_64k ? GMEM_SLOTS_SINGLES_OF_64K : GMEM_SLOTS_SINGLES;
}

static void relist_locked(struct gmem_slots *slots, uint32_t number)
{
	enum gmem_slots_list list = list_of(&slots->chunks[number]);

	if (list == slots->chunks[number].list)
		return;
	list_remove_locked(slots, number);
	list_insert_locked(slots, number, list);
}

static void set_group(struct gmem_slots_chunk *chunk, unsigned group, uint16_t used)
{
	uint32_t bit = 1u << group;

	chunk->used[group] = used;
	chunk->free_groups = used ? chunk->free_groups & ~bit : chunk->free_groups | bit;
	chunk->full_groups = used == GROUP_FULL ? chunk->full_groups | bit : chunk->full_groups & ~bit;
}

/* The first chunk of the lists, in their order; ends with GMEM_SLOTS_NO_LIST. */
static int find_locked(struct gmem_slots *slots, const uint8_t *lists, uint32_t *ret)
{
	for (; *lists != GMEM_SLOTS_NO_LIST; lists++) {
		if (slots->heads[*lists]) {
			*ret = slots->heads[*lists] - 1;
			return 0;
		}
		if (*lists == GMEM_SLOTS_EMPTY && slots->fresh < slots->count) {
			*ret = slots->fresh++;
			slots->chunks[*ret].free_groups = ALL_GROUPS;
			slots->chunks[*ret].list = GMEM_SLOTS_NO_LIST;
			return 0;
		}
	}
	return -ENOSPC;
}

static uint64_t take_page(struct gmem_slots_chunk *chunk)
{
	uint32_t begun = ~(chunk->free_groups | chunk->full_groups);
	unsigned group = (unsigned)__builtin_ctz(begun ? begun : chunk->free_groups);
	unsigned page = (unsigned)__builtin_ctz(~(unsigned)chunk->used[group]);

	set_group(chunk, group, (uint16_t)(chunk->used[group] | 1u << page));
	return group * GROUP_BYTES + page * PAGE_BYTES;
}

static uint64_t take_group(struct gmem_slots_chunk *chunk)
{
	unsigned group = (unsigned)__builtin_ctz(chunk->free_groups);

	set_group(chunk, group, GROUP_FULL);
	return group * GROUP_BYTES;
}

static uint64_t take_chunk(struct gmem_slots_chunk *chunk)
{
	chunk->free_groups = 0;
	chunk->full_groups = ALL_GROUPS;
	return 0;
}

static int alloc_locked(struct gmem_slots *slots, uint64_t bytes, uint64_t *ret_offset)
{
	static const uint8_t for_4k[] = { GMEM_SLOTS_SINGLES, GMEM_SLOTS_GROUPS_OF_4K, GMEM_SLOTS_EMPTY,
					  GMEM_SLOTS_SINGLES_OF_64K, GMEM_SLOTS_GROUPS_OF_64K, GMEM_SLOTS_NO_LIST };
	static const uint8_t for_64k[] = { GMEM_SLOTS_GROUPS_OF_64K, GMEM_SLOTS_EMPTY, GMEM_SLOTS_GROUPS_OF_4K,
					   GMEM_SLOTS_NO_LIST };
	static const uint8_t for_2m[] = { GMEM_SLOTS_EMPTY, GMEM_SLOTS_NO_LIST };
	struct gmem_slots_chunk *chunk;
	uint32_t number;
	uint64_t at;
	int err = find_locked(slots, bytes == PAGE_BYTES ? for_4k : bytes == GROUP_BYTES ? for_64k : for_2m, &number);

	if (err)
		return err;
	chunk = &slots->chunks[number];
	if (chunk->free_groups == ALL_GROUPS)
		chunk->for_64k = bytes == GROUP_BYTES;
	at = bytes == PAGE_BYTES ? take_page(chunk) : bytes == GROUP_BYTES ? take_group(chunk) : take_chunk(chunk);
	relist_locked(slots, number);
	slots->used_bytes += bytes;
	*ret_offset = number * GMEM_SLOTS_CHUNK + at;
	return 0;
}

int gmem_slots_alloc(struct gmem_slots *slots, uint64_t bytes, uint64_t *ret_offset)
{
	int err;

	gmem_mutex_lock(&slots->lock);
	err = alloc_locked(slots, bytes, ret_offset);
	gmem_mutex_unlock(&slots->lock);
	return err;
}

/* Chunks up to this one come into use. */
static void open_chunks_locked(struct gmem_slots *slots, uint32_t number)
{
	for (; slots->fresh <= number; slots->fresh++) {
		slots->chunks[slots->fresh].free_groups = ALL_GROUPS;
		slots->chunks[slots->fresh].list = GMEM_SLOTS_NO_LIST;
		relist_locked(slots, slots->fresh);
	}
}

static int take_locked(struct gmem_slots *slots, uint32_t number, uint64_t at, uint64_t bytes)
{
	unsigned group = (unsigned)(at / GROUP_BYTES), page = (unsigned)(at % GROUP_BYTES / PAGE_BYTES);
	struct gmem_slots_chunk *chunk = &slots->chunks[number];
	bool is_free = bytes == PAGE_BYTES  ? !(chunk->used[group] >> page & 1) && !(chunk->full_groups >> group & 1) :
		       bytes == GROUP_BYTES ? chunk->free_groups >> group & 1 : chunk->free_groups == ALL_GROUPS;

	if (!is_free)
		return -EINVAL;
	if (chunk->free_groups == ALL_GROUPS)
		chunk->for_64k = bytes == GROUP_BYTES;
	if (bytes == PAGE_BYTES)
		set_group(chunk, group, (uint16_t)(chunk->used[group] | 1u << page));
	else if (bytes == GROUP_BYTES)
		set_group(chunk, group, GROUP_FULL);
	else
		take_chunk(chunk);
	relist_locked(slots, number);
	slots->used_bytes += bytes;
	return 0;
}

int gmem_slots_take(struct gmem_slots *slots, uint64_t offset, uint64_t bytes)
{
	uint64_t number = offset / GMEM_SLOTS_CHUNK;
	int err;

	if ((bytes != PAGE_BYTES && bytes != GROUP_BYTES && bytes != GMEM_SLOTS_CHUNK) || offset % bytes ||
	    number >= slots->count)
		return -EINVAL;
	gmem_mutex_lock(&slots->lock);
	open_chunks_locked(slots, (uint32_t)number);
	err = take_locked(slots, (uint32_t)number, offset % GMEM_SLOTS_CHUNK, bytes);
	gmem_mutex_unlock(&slots->lock);
	return err;
}

void gmem_slots_free(struct gmem_slots *slots, uint64_t offset, uint64_t bytes)
{
	uint32_t number = (uint32_t)(offset / GMEM_SLOTS_CHUNK);
	unsigned group = (unsigned)(offset % GMEM_SLOTS_CHUNK / GROUP_BYTES);
	unsigned page = (unsigned)(offset % GROUP_BYTES / PAGE_BYTES);
	struct gmem_slots_chunk *chunk = &slots->chunks[number];

	assert(number < slots->count && offset % bytes == 0);
	gmem_mutex_lock(&slots->lock);
	if (bytes == PAGE_BYTES) {
		assert(chunk->used[group] >> page & 1);
		set_group(chunk, group, (uint16_t)(chunk->used[group] & ~(1u << page)));
	} else if (bytes == GROUP_BYTES) {
		assert(chunk->used[group] == GROUP_FULL);
		set_group(chunk, group, 0);
	} else {
		chunk->full_groups = 0;
		chunk->free_groups = ALL_GROUPS;
	}
	relist_locked(slots, number);
	slots->used_bytes -= bytes;
	gmem_mutex_unlock(&slots->lock);
}

uint64_t gmem_slots_used(struct gmem_slots *slots)
{
	uint64_t bytes;

	gmem_mutex_lock(&slots->lock);
	bytes = slots->used_bytes;
	gmem_mutex_unlock(&slots->lock);
	return bytes;
}
