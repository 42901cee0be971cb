/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include <gmem/policy.h>
#include <gmem/replay.h>

#define DIRTY 1 /* of a page's marks */
#define CAME 2  /* it has been here */

/* How much of a page's first stay is copied depends on whether it had content. */
static void count_in(const struct gmem_accesses *accesses, struct gmem_replay *counts, uint32_t id, uint8_t *marks)
{
	counts->misses++;
	if (!accesses->empty[id] || (*marks & CAME))
		counts->in_units += accesses->weights[id];
	*marks |= CAME;
}

static void count_evicted(const struct gmem_accesses *accesses, struct gmem_replay *counts, uint32_t id, uint8_t *marks)
{
	if (*marks & DIRTY) {
		counts->evicted_dirty++;
		counts->out_units += accesses->weights[id];
	} else {
		counts->evicted_clean++;
		counts->dropped_units += accesses->weights[id];
	}
	*marks &= ~DIRTY;
}

/* It leaves for other reasons than room. */
static void count_ended(const struct gmem_accesses *accesses, struct gmem_replay *counts, size_t i, uint8_t *marks)
{
	if ((*marks & DIRTY) && accesses->ops[i] == GMEM_OP_TAKEN)
		counts->out_units += accesses->weights[accesses->ids[i]];
	*marks &= ~DIRTY;
}

static bool is_use(const struct gmem_accesses *accesses, size_t i)
{
	return accesses->ops[i] <= GMEM_OP_WRITE;
}

static void mark(const struct gmem_accesses *accesses, size_t i, uint8_t *marks)
{
	if (accesses->ops[i] == GMEM_OP_WRITE)
		*marks |= DIRTY;
}

/* ---- a policy ---- */

struct player {
	struct gmem_policy policy;
	uint32_t *frame_of; /* by id */
	uint32_t *id_of;    /* by frame */
	uint32_t *free;     /* frames that were used, and are not now */
	uint8_t *marks;     /* by id */
	uint64_t capacity, used;
	uint32_t free_count, bumped;
	struct gmem_replay counts;
};

static uint32_t next_random(uint64_t *state)
{
	*state ^= *state << 13; /* xorshift64 (Marsaglia 2003) */
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return (uint32_t)(*state >> 16 & 0xffff);
}

static void leave(struct player *player, const struct gmem_accesses *accesses, uint32_t frame, enum gmem_leave why)
{
	uint32_t id = player->id_of[frame];

	gmem_policy_remove(&player->policy, frame, accesses->keys[id], why);
	player->frame_of[id] = GMEM_FRAME_NONE;
	player->used -= accesses->weights[id];
	player->free[player->free_count++] = frame;
}

/* What is larger than all there is comes and goes at once. */
static void pass(struct player *player, const struct gmem_accesses *accesses, size_t i)
{
	uint32_t id = accesses->ids[i];

	mark(accesses, i, &player->marks[id]);
	count_evicted(accesses, &player->counts, id, &player->marks[id]);
}

static void miss(struct player *player, const struct gmem_accesses *accesses, size_t i)
{
	uint32_t id = accesses->ids[i], weight = accesses->weights[id], frame;

	count_in(accesses, &player->counts, id, &player->marks[id]);
	if (weight > player->capacity) {
		pass(player, accesses, i);
		return;
	}
	while (player->used + weight > player->capacity) {
		uint32_t out = gmem_policy_next(&player->policy);

		count_evicted(accesses, &player->counts, player->id_of[out], &player->marks[player->id_of[out]]);
		leave(player, accesses, out, GMEM_LEAVE_EVICTED);
	}
	frame = player->free_count ? player->free[--player->free_count] : ++player->bumped;
	gmem_policy_insert(&player->policy, frame, accesses->keys[id]);
	player->frame_of[id] = frame;
	player->id_of[frame] = id;
	player->used += weight;
}

static void play(struct player *player, const struct gmem_accesses *accesses, uint32_t visible, uint64_t seed)
{
	uint64_t random = seed | 1;

	for (size_t i = 0; i < accesses->count; i++) {
		uint32_t id = accesses->ids[i], frame = player->frame_of[id];

		if (!is_use(accesses, i)) {
			count_ended(accesses, &player->counts, i, &player->marks[id]);
			if (frame)
				leave(player, accesses, frame, GMEM_LEAVE_FREED);
			continue;
		}
		if (!frame)
			miss(player, accesses, i);
		else if (visible && (visible >= GMEM_VISIBLE_ALL || next_random(&random) < visible))
			gmem_policy_touch(&player->policy, frame);
		if (player->frame_of[id])
			mark(accesses, i, &player->marks[id]);
	}
}

int gmem_replay(const struct gmem_accesses *accesses, const char *name, uint64_t capacity, uint32_t visible,
		uint64_t seed, struct gmem_replay *ret)
{
	const struct gmem_policy_ops *ops = gmem_policy_find(name);
	struct player player = { .capacity = capacity };
	uint32_t frames = capacity < accesses->distinct ? (uint32_t)capacity : accesses->distinct;
	int err;

	if (!ops || !capacity)
		return -EINVAL;
	err = gmem_policy_init(&player.policy, ops, frames + 1);
	if (err)
		return err;
	player.frame_of = calloc((size_t)accesses->distinct + 1, sizeof(*player.frame_of));
	player.id_of = calloc((size_t)frames + 2, sizeof(*player.id_of));
	player.free = calloc((size_t)frames + 2, sizeof(*player.free));
	player.marks = calloc((size_t)accesses->distinct + 1, 1);
	if (player.frame_of && player.id_of && player.free && player.marks) {
		play(&player, accesses, visible, seed);
		*ret = player.counts;
	} else {
		err = -ENOMEM;
	}
	free(player.frame_of);
	free(player.id_of);
	free(player.free);
	free(player.marks);
	gmem_policy_deinit(&player.policy);
	return err;
}

/* ---- OPT ---- */

/* A binary heap of resident pages, the one used last (or never) again on top; equal ones by id. */
struct heap {
	uint32_t *ids, *at; /* at: place of each id, 1-based; 0: not in */
	uint32_t *next;     /* by id: index of its next access */
	uint32_t count;
	uint64_t capacity, left; /* units */
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

static void sink(struct heap *heap, uint32_t place)
{
	uint32_t id = heap->ids[place];

	for (uint32_t child; (child = 2 * place) <= heap->count; place = child) {
		if (child < heap->count && before(heap, heap->ids[child + 1], heap->ids[child]))
			child++;
		if (!before(heap, heap->ids[child], id))
			break;
		put(heap, place, heap->ids[child]);
	}
	put(heap, place, id);
}

static void take(struct heap *heap, uint32_t id)
{
	uint32_t place = heap->at[id], last = heap->ids[heap->count--];

	heap->at[id] = 0;
	if (last == id)
		return;
	put(heap, place, last);
	rise(heap, place);
	sink(heap, heap->at[last]);
}

/* For each use the index of the next one in the same stay. */
static void find_next(const struct gmem_accesses *accesses, uint32_t *next, uint32_t *last)
{
	memset(last, 0xff, accesses->distinct * sizeof(*last));
	for (size_t i = accesses->count; i-- > 0;) {
		if (!is_use(accesses, i))
			continue;
		next[i] = last[accesses->ids[i]];
		last[accesses->ids[i]] = (uint32_t)i;
	}
}

static void miss_opt(const struct gmem_accesses *accesses, size_t i, struct heap *heap, uint8_t *marks,
		     struct gmem_replay *counts)
{
	uint32_t id = accesses->ids[i], weight = accesses->weights[id];

	count_in(accesses, counts, id, &marks[id]);
	if (weight > heap->capacity) {
		mark(accesses, i, &marks[id]);
		count_evicted(accesses, counts, id, &marks[id]);
		return;
	}
	while (heap->left < weight) {
		uint32_t out = heap->ids[1];

		take(heap, out);
		count_evicted(accesses, counts, out, &marks[out]);
		heap->left += accesses->weights[out];
	}
	heap->left -= weight;
	heap->next[id] = UINT32_MAX;
	put(heap, ++heap->count, id);
}

static void play_opt(const struct gmem_accesses *accesses, const uint32_t *next, uint8_t *marks, struct heap *heap,
		     struct gmem_replay *counts)
{
	for (size_t i = 0; i < accesses->count; i++) {
		uint32_t id = accesses->ids[i];

		if (!is_use(accesses, i)) {
			count_ended(accesses, counts, i, &marks[id]);
			if (heap->at[id]) {
				heap->left += accesses->weights[id];
				take(heap, id);
			}
			continue;
		}
		if (!heap->at[id])
			miss_opt(accesses, i, heap, marks, counts);
		if (!heap->at[id])
			continue;
		heap->next[id] = next[i];
		rise(heap, heap->at[id]);
		sink(heap, heap->at[id]);
		mark(accesses, i, &marks[id]);
	}
}

int gmem_replay_opt(const struct gmem_accesses *accesses, uint64_t capacity, struct gmem_replay *ret)
{
	size_t pages = (size_t)accesses->distinct + 2;
	uint32_t *next = malloc((accesses->count + 1) * sizeof(*next));
	struct heap heap = { .ids = malloc(pages * sizeof(uint32_t)), .at = calloc(pages, sizeof(uint32_t)),
			     .next = malloc(pages * sizeof(uint32_t)), .capacity = capacity, .left = capacity };
	uint8_t *marks = calloc(pages, 1);
	int err = !capacity ? -EINVAL : -ENOMEM;

	if (capacity && next && heap.ids && heap.at && heap.next && marks) {
		struct gmem_replay counts = { 0 };

		find_next(accesses, next, heap.next);
		play_opt(accesses, next, marks, &heap, &counts);
		*ret = counts;
		err = 0;
	}
	free(next);
	free(heap.ids);
	free(heap.at);
	free(heap.next);
	free(marks);
	return err;
}

/* ---- static frequencies ---- */

struct tally {
	uint64_t uses;
	uint32_t weight, id;
};

/* By uses for what it takes. */
static int more_used(const void *a, const void *b)
{
	const struct tally *x = a, *y = b;
	unsigned __int128 left = (unsigned __int128)x->uses * y->weight, right = (unsigned __int128)y->uses * x->weight;

	if (left != right)
		return left < right ? 1 : -1;
	return x->id < y->id ? -1 : 1;
}

static void choose(const struct gmem_accesses *accesses, struct tally *tallies, uint8_t *kept, uint64_t capacity)
{
	for (uint32_t id = 0; id < accesses->distinct; id++)
		tallies[id] = (struct tally){ 0, accesses->weights[id], id };
	for (size_t i = 0; i < accesses->count; i++)
		tallies[accesses->ids[i]].uses += is_use(accesses, i);
	qsort(tallies, accesses->distinct, sizeof(*tallies), more_used);
	for (uint32_t i = 0; i < accesses->distinct && capacity; i++) {
		if (tallies[i].weight > capacity)
			continue;
		kept[tallies[i].id] = 1;
		capacity -= tallies[i].weight;
	}
}

/* Each miss passes through one frame beside the others: it comes, and leaves as clean or dirty as it was used. */
static void play_static(const struct gmem_accesses *accesses, const uint8_t *kept, uint8_t *marks,
			struct gmem_replay *counts)
{
	for (size_t i = 0; i < accesses->count; i++) {
		uint32_t id = accesses->ids[i];
		bool there = kept[id] && (marks[id] & CAME);

		if (!is_use(accesses, i)) {
			count_ended(accesses, counts, i, &marks[id]);
			continue;
		}
		if (!there)
			count_in(accesses, counts, id, &marks[id]);
		mark(accesses, i, &marks[id]);
		if (!kept[id])
			count_evicted(accesses, counts, id, &marks[id]);
	}
}

int gmem_replay_static(const struct gmem_accesses *accesses, uint64_t capacity, struct gmem_replay *ret)
{
	struct tally *tallies = calloc((size_t)accesses->distinct + 1, sizeof(*tallies));
	uint8_t *kept = calloc((size_t)accesses->distinct + 1, 1);
	uint8_t *marks = calloc((size_t)accesses->distinct + 1, 1);
	int err = !capacity ? -EINVAL : -ENOMEM;

	if (capacity && tallies && kept && marks) {
		struct gmem_replay counts = { 0 };

		choose(accesses, tallies, kept, capacity);
		play_static(accesses, kept, marks, &counts);
		*ret = counts;
		err = 0;
	}
	free(tallies);
	free(kept);
	free(marks);
	return err;
}
