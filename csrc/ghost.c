/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <stddef.h>

#include <gmem/ghost.h>
#include <gmem/sparse.h>

#define WAYS 4
#define SLOTS_MIN 1024

/* splitmix64's finalizer (Steele, Lea, Flood 2014). */
uint64_t gmem_hash(uint64_t x)
{
	x += 0x9e3779b97f4a7c15ull;
	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
	x = (x ^ x >> 27) * 0x94d049bb133111ebull;
	return x ^ x >> 31;
}

int gmem_ghosts_init(struct gmem_ghosts *ghosts, uint64_t frames)
{
	*ghosts = (struct gmem_ghosts){ .slots = SLOTS_MIN, .mask = SLOTS_MIN / WAYS - 1 };
	while (ghosts->slots < 4 * frames)
		ghosts->slots *= 2;
	ghosts->table = gmem_sparse_map(ghosts->slots * sizeof(*ghosts->table));
	return ghosts->table ? 0 : -ENOMEM;
}

void gmem_ghosts_deinit(struct gmem_ghosts *ghosts)
{
	gmem_sparse_unmap(ghosts->table, ghosts->slots * sizeof(*ghosts->table));
	ghosts->table = NULL;
}

static struct gmem_ghost *bucket(struct gmem_ghosts *ghosts, uint64_t hash)
{
	return &ghosts->table[(hash & ghosts->mask) * WAYS];
}

static uint32_t tag_of(uint64_t hash)
{
	return (uint32_t)(hash >> 32) | 1;
}

void gmem_ghosts_add(struct gmem_ghosts *ghosts, uint64_t key, uint16_t note, uint32_t resident)
{
	uint64_t hash = gmem_hash(key);
	struct gmem_ghost *at, *best;

	/* Entries that a larger mask looks for elsewhere are lost, half of them: it happens a few times in a life. */
	while ((ghosts->mask + 1) * WAYS < 4ull * resident && (ghosts->mask + 1) * WAYS < ghosts->slots)
		ghosts->mask = ghosts->mask * 2 + 1;
	at = best = bucket(ghosts, hash);
	for (int i = 0; i < WAYS && best->tag && best->tag != tag_of(hash); i++)
		if (!at[i].tag || at[i].tag == tag_of(hash) || ghosts->clock - at[i].stamp > ghosts->clock - best->stamp)
			best = &at[i];
	*best = (struct gmem_ghost){ .tag = tag_of(hash), .stamp = ++ghosts->clock, .note = note };
}

bool gmem_ghosts_take(struct gmem_ghosts *ghosts, uint64_t key, uint32_t newest, uint16_t *ret_note)
{
	uint64_t hash = gmem_hash(key);
	struct gmem_ghost *at = bucket(ghosts, hash);

	for (int i = 0; i < WAYS; i++) {
		if (at[i].tag != tag_of(hash))
			continue;
		at[i].tag = 0;
		*ret_note = at[i].note;
		return ghosts->clock - at[i].stamp < newest;
	}
	return false;
}
