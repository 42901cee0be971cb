/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include <gmem/accesses.h>

#define ACCESSES_MAX (1ull << 31)
#define HNIDS 16
#define SHIFT_MIN 12
#define SHIFT_MAX 30
#define PAGES_MAX (1ull << 40)

/* Pages by key, while the sequence is read: an open table of the last stay of each, + 1. */
struct numbering {
	struct gmem_accesses *accesses;
	uint32_t *table;
	uint64_t mask;
	uint8_t *ended;  /* by id */
	uint8_t *shifts; /* by id */
	size_t room;     /* ids that the arrays have room for */
	uint64_t here;   /* bytes that are there now */
	uint64_t most;
};

static uint64_t hash(uint64_t key)
{
	key *= 0x9e3779b97f4a7c15ull;
	return key ^ key >> 32;
}

static uint64_t place_of(const struct numbering *n, uint64_t key)
{
	uint64_t at = hash(key) & n->mask;

	while (n->table[at] && n->accesses->keys[n->table[at] - 1] != key)
		at = (at + 1) & n->mask;
	return at;
}

static int grow(void **array, size_t bytes)
{
	void *grown = realloc(*array, bytes);

	if (!grown)
		return -ENOMEM;
	*array = grown;
	return 0;
}

/* Twice the ids, and a table that half of which stays empty. */
static int make_room(struct numbering *n)
{
	struct gmem_accesses *a = n->accesses;
	size_t room = n->room ? n->room * 2 : 512;
	uint32_t *table;

	if (grow((void **)&a->keys, room * sizeof(*a->keys)) || grow((void **)&a->empty, room) ||
	    grow((void **)&n->ended, room) || grow((void **)&n->shifts, room))
		return -ENOMEM;
	table = calloc(2 * room, sizeof(*table));
	if (!table)
		return -ENOMEM;
	free(n->table);
	n->table = table;
	n->mask = 2 * room - 1;
	n->room = room;
	for (uint32_t id = 0; id < a->distinct; id++)
		n->table[place_of(n, a->keys[id])] = id + 1;
	return 0;
}

static void put(struct gmem_accesses *a, uint32_t id, enum gmem_op op)
{
	a->ids[a->count] = id;
	a->ops[a->count++] = (uint8_t)op;
}

static void end(struct numbering *n, uint32_t id, enum gmem_op op)
{
	if (n->ended[id])
		return;
	n->ended[id] = 1;
	n->here -= 1ull << n->shifts[id];
	put(n->accesses, id, op);
}

static uint32_t new_stay(struct numbering *n, uint64_t key, uint8_t shift, bool empty)
{
	struct gmem_accesses *a = n->accesses;
	uint32_t id = a->distinct++;

	a->keys[id] = key;
	a->empty[id] = empty;
	n->ended[id] = 0;
	n->shifts[id] = shift;
	n->here += 1ull << shift;
	n->most = n->here > n->most ? n->here : n->most;
	return id;
}

static int use(struct numbering *n, uint64_t key, uint8_t shift, bool empty, bool write)
{
	struct gmem_accesses *a = n->accesses;
	uint64_t at;
	uint32_t id;

	if (a->distinct == n->room && make_room(n))
		return -ENOMEM;
	at = place_of(n, key);
	id = n->table[at] - 1;
	/* what tells of its end may have been lost */
	if (n->table[at] && (empty || n->shifts[id] != shift))
		end(n, id, GMEM_OP_GONE);
	if (!n->table[at] || n->ended[id]) {
		a->pages += !n->table[at];
		id = new_stay(n, key, shift, empty);
		n->table[at] = id + 1;
	}
	put(a, id, write ? GMEM_OP_WRITE : GMEM_OP_READ);
	a->uses++;
	return 0;
}

static void end_page(struct numbering *n, uint64_t key, enum gmem_op op)
{
	uint32_t id = n->room ? n->table[place_of(n, key)] : 0;

	if (id)
		end(n, id - 1, op);
}

/* Most of a large object was never used. */
static void end_pages(struct numbering *n, uint64_t first, uint64_t count)
{
	const struct gmem_accesses *a = n->accesses;

	if (count > a->distinct) {
		for (uint32_t id = 0; id < a->distinct; id++)
			if (a->keys[id] - first < count)
				end(n, id, GMEM_OP_GONE);
		return;
	}
	for (uint64_t key = first; key < first + count; key++)
		end_page(n, key, GMEM_OP_GONE);
}

static int weigh(struct numbering *n)
{
	struct gmem_accesses *a = n->accesses;
	uint8_t least = UINT8_MAX;

	for (uint32_t id = 0; id < a->distinct; id++)
		least = n->shifts[id] < least ? n->shifts[id] : least;
	a->weights = malloc(((size_t)a->distinct + 1) * sizeof(*a->weights));
	if (!a->weights)
		return -ENOMEM;
	for (uint32_t id = 0; id < a->distinct; id++)
		a->weights[id] = 1u << (n->shifts[id] - least);
	a->unit_shift = a->distinct ? least : 0;
	a->peak = n->most >> a->unit_shift;
	return 0;
}

static int begin(struct numbering *n, struct gmem_accesses *accesses, size_t count)
{
	*accesses = (struct gmem_accesses){ 0 };
	*n = (struct numbering){ .accesses = accesses };
	if (count > ACCESSES_MAX)
		return -EFBIG;
	/* each stay ends once at most */
	accesses->ids = malloc((2 * count + 1) * sizeof(*accesses->ids));
	accesses->ops = malloc(2 * count + 1);
	return accesses->ids && accesses->ops ? 0 : -ENOMEM;
}

static int finish(struct numbering *n, int err)
{
	if (!err)
		err = weigh(n);
	if (err)
		gmem_accesses_deinit(n->accesses);
	free(n->table);
	free(n->ended);
	free(n->shifts);
	return err;
}

int gmem_accesses_init(struct gmem_accesses *accesses, const uint64_t *pages, const uint8_t *writes, size_t count)
{
	struct numbering n;
	int err = begin(&n, accesses, count);

	for (size_t i = 0; !err && i < count; i++)
		err = use(&n, pages[i], 0, false, writes && writes[i]);
	return finish(&n, err);
}

size_t gmem_access_check(const struct gmem_access *trace, size_t count)
{
	for (size_t i = 0; i < count; i++) {
		const struct gmem_access *t = &trace[i];
		bool gone = t->kind == GMEM_ACCESS_GONE;

		if (t->kind < GMEM_ACCESS_FAULT || t->kind >= GMEM_ACCESS_KINDS || t->shift < SHIFT_MIN ||
		    t->shift > SHIFT_MAX || t->page >= PAGES_MAX || (gone ? t->hnid != GMEM_ACCESS_NOWHERE : t->hnid >= HNIDS) ||
		    (gone && t->va > PAGES_MAX) || t->flags >= GMEM_ACCESS_FLAGS)
			return i;
	}
	return count;
}

static int load_one(struct numbering *n, const struct gmem_access *t, const struct gmem_accesses_filter *filter)
{
	const uint8_t dirties = GMEM_ACCESS_WRITE | GMEM_ACCESS_OWNED;

	if (t->kind == GMEM_ACCESS_GONE) {
		end_pages(n, t->page, t->va);
		return 0;
	}
	if (t->hnid != filter->hnid) {
		if (gmem_access_takes(t))
			end_page(n, t->page, GMEM_OP_TAKEN);
		return 0;
	}
	if (!(filter->kinds >> t->kind & 1) || (filter->session && filter->session != t->session))
		return 0;
	n->accesses->absent += !(t->flags & GMEM_ACCESS_RESIDENT);
	return use(n, t->page, t->shift, t->flags & GMEM_ACCESS_EMPTY, t->flags & dirties);
}

int gmem_accesses_load(struct gmem_accesses *accesses, const struct gmem_access *trace, size_t count,
		       const struct gmem_accesses_filter *filter)
{
	struct numbering n;
	int err = begin(&n, accesses, count);

	if (!err && gmem_access_check(trace, count) != count)
		err = -EINVAL;
	for (size_t i = 0; !err && i < count; i++)
		err = load_one(&n, &trace[i], filter);
	return finish(&n, err);
}

void gmem_accesses_deinit(struct gmem_accesses *accesses)
{
	free(accesses->ids);
	free(accesses->ops);
	free(accesses->keys);
	free(accesses->weights);
	free(accesses->empty);
	*accesses = (struct gmem_accesses){ 0 };
}
