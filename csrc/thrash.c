/* SPDX-License-Identifier: Apache-2.0 */
#include <gmem/internal.h>
#include <gmem/thrash.h>

#define TICK_SHIFT 16 /* of the stamp: 65 us, and it goes round in 268 ms */
#define MANY 3
#define QUICK_NS 250000

/* Moving a large page takes long, there and back: what is quick, and what a hold is worth, grows with it. */
static uint64_t quick_ns(const struct gmem_page *page)
{
	return QUICK_NS + page->bytes / 4;
}

static uint64_t hold_ns(const struct gmem_page *page)
{
	return page->core->hold_ns + page->bytes / 2;
}

static uint64_t age_ns(gmem_word_t word, uint64_t now_ns)
{
	return (((now_ns >> TICK_SHIFT) - gmem_word_taken(word)) & GMEM_WORD_TAKEN_MAX) << TICK_SHIFT;
}

bool gmem_thrash_takes(const struct gmem_page *page, int hnid, bool write)
{
	uint32_t others = gmem_word_valid(page->word) & ~(1u << hnid);
	int writer = gmem_word_writer(page->word);

	if (!write)
		return writer >= 0 && writer != hnid;
	for (int h = 0; others >> h; h++) {
		struct gmem_hnode *hnode = others >> h & 1 ? gmem_core_hnode(page->core, h) : NULL;

		if (hnode && !gmem_hnode_is_peer(hnode))
			return true;
	}
	return false;
}

void gmem_thrash_note(struct gmem_page *page, uint64_t now_ns)
{
	uint64_t age = age_ns(page->word, now_ns);
	unsigned count = gmem_word_takings(page->word);

	if (age <= quick_ns(page))
		count += count < GMEM_WORD_TAKINGS_MAX;
	else if (count < MANY || age > 2 * hold_ns(page)) /* a hold makes it slow, not calm */
		count = 0;
	page->word = gmem_word_set_taken(page->word, count, now_ns >> TICK_SHIFT);
}

bool gmem_thrash_bounces(const struct gmem_page *page, uint64_t now_ns)
{
	return page->core->hold_ns && gmem_word_takings(page->word) >= MANY &&
	       age_ns(page->word, now_ns) <= 2 * hold_ns(page);
}

uint64_t gmem_thrash_until(const struct gmem_page *page, int hnid, bool write, uint64_t now_ns)
{
	uint64_t age = age_ns(page->word, now_ns), hold = hold_ns(page);

	if (!gmem_thrash_bounces(page, now_ns) || age >= hold || !gmem_thrash_takes(page, hnid, write))
		return 0;
	return now_ns + hold - age;
}
