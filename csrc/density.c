/* SPDX-License-Identifier: Apache-2.0 */
#include <gmem/density.h>
#include <gmem/internal.h>

#define LEAF_BYTES (64ull << 10)
#define LEAF_PAGES 4

struct tally {
	uint64_t here, content;
};

static gmem_word_t word_at(struct gmem_core *core, const struct gmem_object *object, uint64_t index)
{
	return atomic_load_explicit(&core->lpt.words[object->pn + index], memory_order_relaxed);
}

static bool is_here(gmem_word_t word, int hnid, bool own)
{
	return own ? gmem_word_writer(word) == hnid : gmem_word_valid(word) >> hnid & 1;
}

static void count(struct gmem_core *core, const struct gmem_object *object, uint64_t from, uint64_t to, int hnid, bool own,
		  struct tally *tally)
{
	for (uint64_t index = from; index < to; index++) {
		gmem_word_t word = word_at(core, object, index);

		tally->content += gmem_word_valid(word) != 0;
		tally->here += is_here(word, hnid, own);
	}
}

static uint64_t leaf_pages(unsigned shift)
{
	uint64_t pages = LEAF_BYTES >> shift;

	return pages > LEAF_PAGES ? pages : LEAF_PAGES;
}

bool gmem_density_around(struct gmem_core *core, const struct gmem_place *place, int hnid, bool own, uint64_t *ret_index,
			 uint64_t *ret_count)
{
	const struct gmem_object *object = place->object;
	uint64_t page_bytes = 1ull << object->shift, first, last, low = place->index, high = place->index;
	struct tally tally = { 0, 0 };
	bool found = false;

	/* what the region has of the object, in whole pages */
	first = (place->region_offset + page_bytes - 1) >> object->shift;
	last = (place->region_offset + place->region_bytes) >> object->shift;
	for (uint64_t pages = leaf_pages(object->shift); pages * page_bytes <= GMEM_BLOCK_BYTES; pages *= 2) {
		uint64_t begin = place->index & ~(pages - 1), end = begin + pages;

		begin = begin > first ? begin : first;
		end = end < last ? end : last;
		if (begin > low || end < high)
			return false; /* the page itself is cut */
		count(core, object, begin, low, hnid, own, &tally);
		count(core, object, high, end, hnid, own, &tally);
		low = begin;
		high = end;
		if (2 * tally.here <= tally.content || tally.here == tally.content)
			continue;
		*ret_index = low;
		*ret_count = high - low;
		found = true;
	}
	return found;
}

bool gmem_density_missing(struct gmem_core *core, const struct gmem_object *object, uint64_t index, uint64_t count, int hnid,
			  bool own, uint64_t *ret_index, uint64_t *ret_count)
{
	uint64_t end = index + count, found = 0;

	for (; index < end; index++) {
		gmem_word_t word = word_at(core, object, index);

		if (gmem_word_state(word) == GMEM_RESIDENT && !is_here(word, hnid, own))
			found++;
		else if (found)
			break;
	}
	*ret_index = index - found;
	*ret_count = found;
	return found;
}
