/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include <gmem/policy.h>
#include <gmem/replay.h>

#define ACCESSES_MAX (1ull << 31)

static uint64_t hash(uint64_t key)
{
	key *= 0x9e3779b97f4a7c15ull;
	return key ^ key >> 32;
}

/* The place of key in an open table of ids + 1. */
static uint64_t place_of(const uint32_t *table, uint64_t mask, const uint64_t *keys, uint64_t key)
{
	uint64_t at = hash(key) & mask;

	while (table[at] && keys[table[at] - 1] != key)
		at = (at + 1) & mask;
	return at;
}

static int number_pages(struct gmem_accesses *accesses, const uint64_t *pages)
{
	uint64_t mask = 1023;
	uint32_t *table;

	while (mask < 2 * accesses->count)
		mask = mask * 2 + 1;
	table = calloc(mask + 1, sizeof(*table));
	if (!table)
		return -ENOMEM;
	for (size_t i = 0; i < accesses->count; i++) {
		uint64_t at = place_of(table, mask, accesses->keys, pages[i]);

		if (!table[at]) {
			accesses->keys[accesses->distinct] = pages[i];
			table[at] = ++accesses->distinct;
		}
		accesses->ids[i] = table[at] - 1;
	}
	free(table);
	return 0;
}

int gmem_accesses_init(struct gmem_accesses *accesses, const uint64_t *pages, const uint8_t *writes, size_t count)
{
	int err = -ENOMEM;

	*accesses = (struct gmem_accesses){ .writes = writes, .count = count };
	if (count > ACCESSES_MAX)
		return -EFBIG;
	accesses->ids = malloc((count + 1) * sizeof(*accesses->ids));
	accesses->keys = malloc((count + 1) * sizeof(*accesses->keys));
	if (accesses->ids && accesses->keys)
		err = number_pages(accesses, pages);
	if (err)
		gmem_accesses_deinit(accesses);
	return err;
}

void gmem_accesses_deinit(struct gmem_accesses *accesses)
{
	free(accesses->ids);
	free(accesses->keys);
	accesses->ids = NULL;
	accesses->keys = NULL;
}

static bool is_write(const struct gmem_accesses *accesses, size_t i)
{
	return accesses->writes && accesses->writes[i];
}

static void count_leave(struct gmem_replay *counts, uint8_t *dirty)
{
	if (*dirty)
		counts->evicted_dirty++;
	else
		counts->evicted_clean++;
	*dirty = 0;
}

/* ---- a policy ---- */

struct player {
	struct gmem_policy policy;
	uint32_t *frame_of; /* by id */
	uint32_t *id_of;    /* by frame */
	uint8_t *dirty;     /* by id */
	uint32_t capacity, used;
	struct gmem_replay counts;
};

static uint32_t next_random(uint64_t *state)
{
	*state ^= *state << 13; /* xorshift64 (Marsaglia 2003) */
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return (uint32_t)(*state >> 16 & 0xffff);
}

static void miss(struct player *player, const struct gmem_accesses *accesses, uint32_t id)
{
	uint32_t frame = player->used + 1;

	player->counts.misses++;
	if (player->used < player->capacity) {
		player->used++;
	} else {
		uint32_t out;

		frame = gmem_policy_next(&player->policy);
		out = player->id_of[frame];
		gmem_policy_remove(&player->policy, frame, accesses->keys[out], GMEM_LEAVE_EVICTED);
		count_leave(&player->counts, &player->dirty[out]);
		player->frame_of[out] = GMEM_FRAME_NONE;
	}
	gmem_policy_insert(&player->policy, frame, accesses->keys[id]);
	player->frame_of[id] = frame;
	player->id_of[frame] = id;
}

static void play(struct player *player, const struct gmem_accesses *accesses, uint32_t visible, uint64_t seed)
{
	uint64_t random = seed | 1;

	for (size_t i = 0; i < accesses->count; i++) {
		uint32_t id = accesses->ids[i];

		if (!player->frame_of[id])
			miss(player, accesses, id);
		else if (visible && (visible >= GMEM_VISIBLE_ALL || next_random(&random) < visible))
			gmem_policy_touch(&player->policy, player->frame_of[id]);
		player->dirty[id] |= is_write(accesses, i);
	}
}

int gmem_replay(const struct gmem_accesses *accesses, const char *name, uint32_t capacity, uint32_t visible,
		uint64_t seed, struct gmem_replay *ret)
{
	const struct gmem_policy_ops *ops = gmem_policy_find(name);
	struct player player = { .capacity = capacity };
	int err;

	if (!ops || !capacity || capacity > UINT32_MAX - 2)
		return -EINVAL;
	if (player.capacity > accesses->distinct)
		player.capacity = accesses->distinct;
	err = gmem_policy_init(&player.policy, ops, player.capacity + 1);
	if (err)
		return err;
	player.frame_of = calloc(accesses->distinct + 1, sizeof(*player.frame_of));
	player.id_of = calloc(player.capacity + 2, sizeof(*player.id_of));
	player.dirty = calloc(accesses->distinct + 1, 1);
	if (player.frame_of && player.id_of && player.dirty) {
		play(&player, accesses, visible, seed);
		*ret = player.counts;
	} else {
		err = -ENOMEM;
	}
	free(player.frame_of);
	free(player.id_of);
	free(player.dirty);
	gmem_policy_deinit(&player.policy);
	return err;
}

/* ---- OPT ---- */

/* A binary heap of resident pages, the one used last (or never) again on top; equal ones by id. */
struct heap {
	uint32_t *ids, *at; /* at: place of each id, 1-based; 0: not in */
	uint32_t *next;     /* by id: index of its next access */
	uint32_t count;
};

static bool before(const struct heap *heap, uint32_t a, uint32_t b)
{
	return heap->next[a] > heap->next[b] || (heap->next[a] == heap->next[b] && a > b);
}

static void put(struct heap *heap, uint32_t place, uint32_t id)
{
	heap->ids[place] = id;
	heap->at[id] = place;
}

static void rise(struct heap *heap, uint32_t place)
{
	uint32_t id = heap->ids[place];

	for (; place > 1 && before(heap, id, heap->ids[place / 2]); place /= 2)
		put(heap, place, heap->ids[place / 2]);
	put(heap, place, id);
}

static uint32_t pop(struct heap *heap)
{
	uint32_t top = heap->ids[1], id = heap->ids[heap->count--], place = 1;

	heap->at[top] = 0;
	for (uint32_t child; (child = 2 * place) <= heap->count; place = child) {
		if (child < heap->count && before(heap, heap->ids[child + 1], heap->ids[child]))
			child++;
		if (!before(heap, heap->ids[child], id))
			break;
		put(heap, place, heap->ids[child]);
	}
	if (heap->count)
		put(heap, place, id);
	return top;
}

/* For each access the index of the next one to the same page. */
static void find_next(const struct gmem_accesses *accesses, uint32_t *next, uint32_t *last)
{
	memset(last, 0xff, accesses->distinct * sizeof(*last));
	for (size_t i = accesses->count; i-- > 0;) {
		next[i] = last[accesses->ids[i]];
		last[accesses->ids[i]] = (uint32_t)i;
	}
}

static void play_opt(const struct gmem_accesses *accesses, const uint32_t *next, uint8_t *dirty, uint32_t capacity,
		     struct heap *heap, struct gmem_replay *counts)
{
	for (size_t i = 0; i < accesses->count; i++) {
		uint32_t id = accesses->ids[i];

		if (!heap->at[id]) {
			counts->misses++;
			if (heap->count == capacity)
				count_leave(counts, &dirty[pop(heap)]);
			heap->next[id] = next[i];
			put(heap, ++heap->count, id);
		}
		heap->next[id] = next[i]; /* further away than before, so it can only rise */
		rise(heap, heap->at[id]);
		dirty[id] |= is_write(accesses, i);
	}
}

int gmem_replay_opt(const struct gmem_accesses *accesses, uint32_t capacity, struct gmem_replay *ret)
{
	size_t pages = (size_t)accesses->distinct + 2;
	uint32_t *next = malloc((accesses->count + 1) * sizeof(*next));
	struct heap heap = { .ids = malloc(pages * sizeof(uint32_t)), .at = calloc(pages, sizeof(uint32_t)),
			     .next = malloc(pages * sizeof(uint32_t)) };
	uint8_t *dirty = calloc(pages, 1);
	int err = !capacity ? -EINVAL : -ENOMEM;

	if (capacity && next && heap.ids && heap.at && heap.next && dirty) {
		struct gmem_replay counts = { 0 };

		find_next(accesses, next, heap.next);
		play_opt(accesses, next, dirty, capacity, &heap, &counts);
		*ret = counts;
		err = 0;
	}
	free(next);
	free(heap.ids);
	free(heap.at);
	free(heap.next);
	free(dirty);
	return err;
}

/* ---- static frequencies ---- */

struct tally {
	uint64_t uses;
	uint32_t id;
};

static int more_used(const void *a, const void *b)
{
	const struct tally *x = a, *y = b;

	if (x->uses != y->uses)
		return x->uses < y->uses ? 1 : -1;
	return x->id < y->id ? -1 : 1;
}

/* Each miss passes through one frame beside the others: it comes, and leaves as clean or dirty as it was used. */
static void play_static(const struct gmem_accesses *accesses, struct tally *tallies, uint8_t *kept, uint32_t capacity,
			struct gmem_replay *counts)
{
	for (uint32_t id = 0; id < accesses->distinct; id++)
		tallies[id].id = id;
	for (size_t i = 0; i < accesses->count; i++)
		tallies[accesses->ids[i]].uses++;
	qsort(tallies, accesses->distinct, sizeof(*tallies), more_used);
	for (uint32_t i = 0; i < accesses->distinct && i < capacity; i++)
		kept[tallies[i].id] = 1;
	for (size_t i = 0; i < accesses->count; i++) {
		uint8_t dirty = is_write(accesses, i);

		if (kept[accesses->ids[i]] == 2)
			continue;
		counts->misses++;
		if (kept[accesses->ids[i]])
			kept[accesses->ids[i]] = 2; /* from now on */
		else
			count_leave(counts, &dirty);
	}
}

int gmem_replay_static(const struct gmem_accesses *accesses, uint32_t capacity, struct gmem_replay *ret)
{
	struct tally *tallies = calloc((size_t)accesses->distinct + 1, sizeof(*tallies));
	uint8_t *kept = calloc((size_t)accesses->distinct + 1, 1);
	int err = !capacity ? -EINVAL : -ENOMEM;

	if (capacity && tallies && kept) {
		struct gmem_replay counts = { 0 };

		play_static(accesses, tallies, kept, capacity, &counts);
		*ret = counts;
		err = 0;
	}
	free(tallies);
	free(kept);
	return err;
}
