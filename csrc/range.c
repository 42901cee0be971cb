/* SPDX-License-Identifier: Apache-2.0 */
#include <assert.h>
#include <stdbool.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include <gmem/range.h>

int gmem_range_init(struct gmem_range_allocator *ranges, uint64_t start, uint64_t end)
{
	struct gmem_range_piece *pieces = malloc(16 * sizeof(*pieces));

	if (!pieces)
		return -ENOMEM;
	*ranges = (struct gmem_range_allocator){ .pieces = pieces, .capacity = 16, .start = start, .end = end };
	gmem_mutex_init(&ranges->lock, GMEM_RANK_RANGE);
	if (end > start) {
		pieces[0] = (struct gmem_range_piece){ start, end };
		ranges->count = 1;
		ranges->free_bytes = end - start;
	}
	return 0;
}

void gmem_range_deinit(struct gmem_range_allocator *ranges)
{
	free(ranges->pieces);
	ranges->pieces = NULL;
	gmem_mutex_deinit(&ranges->lock);
}


static int reserve_slots(struct gmem_range_allocator *ranges, size_t count)
{
	struct gmem_range_piece *grown;
	size_t capacity = ranges->capacity * 2;

	if (count <= ranges->capacity)
		return 0;
	grown = realloc(ranges->pieces, capacity * sizeof(*grown));
	if (!grown)
		return -ENOMEM;
	ranges->pieces = grown;
	ranges->capacity = capacity;
	return 0;
}

static void remove_piece(struct gmem_range_allocator *ranges, size_t i)
{
	memmove(&ranges->pieces[i], &ranges->pieces[i + 1], (ranges->count - i - 1) * sizeof(*ranges->pieces));
	ranges->count--;
}

static void insert_piece(struct gmem_range_allocator *ranges, size_t i, uint64_t start, uint64_t end)
{
	memmove(&ranges->pieces[i + 1], &ranges->pieces[i], (ranges->count - i) * sizeof(*ranges->pieces));
	ranges->pieces[i] = (struct gmem_range_piece){ start, end };
	ranges->count++;
}

/* Takes [at, at + bytes) out of piece i. */
static void carve(struct gmem_range_allocator *ranges, size_t i, uint64_t at, uint64_t bytes)
{
	struct gmem_range_piece *piece = &ranges->pieces[i];
	uint64_t end = piece->end;

	ranges->free_bytes -= bytes;
	if (at == piece->start && at + bytes == end) {
		remove_piece(ranges, i);
	} else if (at == piece->start) {
		piece->start = at + bytes;
	} else {
		piece->end = at;
		if (at + bytes < end)
			insert_piece(ranges, i + 1, at + bytes, end);
	}
}

static int alloc_locked(struct gmem_range_allocator *ranges, uint64_t above, uint64_t bytes, uint64_t align,
			uint64_t *ret_start)
{
	/* A split needs one slot now, and the free that undoes it must find one without allocating. */
	if (reserve_slots(ranges, ranges->count + 2))
		return -ENOMEM;
	for (size_t n = 0; n < ranges->count; n++) {
		size_t i = (ranges->cursor + n) % ranges->count;
		uint64_t start = ranges->pieces[i].start > above ? ranges->pieces[i].start : above;
		uint64_t at = (start + align - 1) & ~(align - 1);

		if (at < start || at > ranges->pieces[i].end || ranges->pieces[i].end - at < bytes)
			continue;
		carve(ranges, i, at, bytes);
		ranges->cursor = i;
		*ret_start = at;
		return 0;
	}
	return -ENOMEM;
}

int gmem_range_alloc_above(struct gmem_range_allocator *ranges, uint64_t above, uint64_t bytes, uint64_t align,
			   uint64_t *ret_start)
{
	int err;

	if (!bytes || !align || (align & (align - 1)))
		return -EINVAL;
	gmem_mutex_lock(&ranges->lock);
	err = alloc_locked(ranges, above, bytes, align, ret_start);
	if (err && above)
		err = alloc_locked(ranges, 0, bytes, align, ret_start);
	gmem_mutex_unlock(&ranges->lock);
	return err;
}

int gmem_range_alloc(struct gmem_range_allocator *ranges, uint64_t bytes, uint64_t align, uint64_t *ret_start)
{
	return gmem_range_alloc_above(ranges, 0, bytes, align, ret_start);
}

int gmem_range_take(struct gmem_range_allocator *ranges, uint64_t start, uint64_t bytes)
{
	int err = -EEXIST;

	gmem_mutex_lock(&ranges->lock);
	if (reserve_slots(ranges, ranges->count + 2))
		err = -ENOMEM;
	for (size_t i = 0; err == -EEXIST && i < ranges->count; i++)
		if (ranges->pieces[i].start <= start && start < ranges->pieces[i].end &&
		    ranges->pieces[i].end - start >= bytes) {
			carve(ranges, i, start, bytes);
			err = 0;
		}
	gmem_mutex_unlock(&ranges->lock);
	return err;
}

void gmem_range_free(struct gmem_range_allocator *ranges, uint64_t start, uint64_t bytes)
{
	size_t low = 0, high;
	bool joins_left, joins_right;

	gmem_mutex_lock(&ranges->lock);
	high = ranges->count;
	while (low < high) {
		size_t mid = (low + high) / 2;

		if (ranges->pieces[mid].start < start)
			low = mid + 1;
		else
			high = mid;
	}
	assert(low == ranges->count || start + bytes <= ranges->pieces[low].start);
	assert(low == 0 || ranges->pieces[low - 1].end <= start);
	joins_left = low > 0 && ranges->pieces[low - 1].end == start;
	joins_right = low < ranges->count && ranges->pieces[low].start == start + bytes;
	ranges->free_bytes += bytes;
	if (joins_left && joins_right) {
		ranges->pieces[low - 1].end = ranges->pieces[low].end;
		remove_piece(ranges, low);
	} else if (joins_left) {
		ranges->pieces[low - 1].end = start + bytes;
	} else if (joins_right) {
		ranges->pieces[low].start = start;
	} else if (!reserve_slots(ranges, ranges->count + 1)) {
		insert_piece(ranges, low, start, start + bytes);
	} else {
		ranges->free_bytes -= bytes; /* out of memory: the range is leaked, never handed out twice */
	}
	gmem_mutex_unlock(&ranges->lock);
}

uint64_t gmem_range_free_bytes(struct gmem_range_allocator *ranges)
{
	uint64_t bytes;

	gmem_mutex_lock(&ranges->lock);
	bytes = ranges->free_bytes;
	gmem_mutex_unlock(&ranges->lock);
	return bytes;
}
