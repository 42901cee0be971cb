/* SPDX-License-Identifier: Apache-2.0
 *
 * LFU with a window, in the manner of W-TinyLFU (Einziger, Friedman, Manes, "TinyLFU: A Highly Efficient Cache Admission
 * Policy", ACM Transactions on Storage 13(4), 2017): new pages pass through a short LRU window; the one that leaves it
 * enters the main part only if it was used more often than what it would displace. All counts are halved now and then.
 * Theirs lie in a sketch; here they are exact for resident pages, in lists by count, and noted with the ghosts of others.
 */
#include <errno.h>
#include <stdlib.h>

#include <gmem/policies.h>

#define COUNT_MAX 63
/* What is used just now passes through the window together: however few frames there are, it must have room for the pages
 * of a loop over several arrays, or they displace each other. */
#define TOGETHER 8
/* Counts are halved when what leaves has reached so much: the line between staying and leaving is then drawn among
 * counts that say something. At the earliest and at the latest after so many uses of each frame, on average. */
#define HALVE_AT 31
#define HALVE_EARLIEST 16ull
#define HALVE_LATEST 1024ull

/* Lists with a head among the spare nodes, so that one can be moved whole without a look at its nodes. */
enum { WINDOW_LIST = COUNT_MAX + 1, OFFERED_LIST, COLD_LIST, LISTS };
enum { IN_MAIN, IN_WINDOW, IN_NEITHER };

struct lfu {
	uint64_t filled;  /* bit c: the list of count c is not empty */
	uint64_t uses;    /* since counts were halved */
	uint32_t window;  /* frames in it */
	uint8_t epoch;    /* how often counts were halved; nodes and ghosts have the one of their count */
};

static uint32_t list(const struct gmem_policy *policy, uint32_t number)
{
	return policy->frames + number;
}

static uint32_t window_frames(uint32_t frames)
{
	return frames / 128 + 1 + (frames / 3 < TOGETHER ? frames / 3 : TOGETHER);
}

static bool is_empty(const struct gmem_policy *policy, uint32_t number)
{
	return policy->nodes[list(policy, number)].next == list(policy, number);
}

static uint32_t oldest(const struct gmem_policy *policy, uint32_t number)
{
	return policy->nodes[list(policy, number)].prev;
}

static void link_between(struct gmem_policy *policy, uint32_t frame, uint32_t prev, uint32_t next)
{
	policy->nodes[frame].prev = prev;
	policy->nodes[frame].next = next;
	policy->nodes[prev].next = frame;
	policy->nodes[next].prev = frame;
}

static void push(struct gmem_policy *policy, uint32_t number, uint32_t frame)
{
	link_between(policy, frame, list(policy, number), policy->nodes[list(policy, number)].next);
}

/* What a count of an earlier epoch is worth. After 256 epochs an old one looks new, which does no harm. */
static uint8_t count_of(const struct gmem_policy *policy, uint8_t count, uint8_t epoch)
{
	uint8_t passed = (uint8_t)(((struct lfu *)policy->state)->epoch - epoch);

	return passed > 7 ? 0 : (uint8_t)(count >> passed);
}

static uint8_t count_at(const struct gmem_policy *policy, uint32_t frame)
{
	return count_of(policy, gmem_node_used(policy, frame), policy->nodes[frame].spare);
}

static void set_count(struct gmem_policy *policy, uint32_t frame, uint32_t count)
{
	gmem_node_set_used(policy, frame, (uint8_t)(count < COUNT_MAX ? count : COUNT_MAX));
	policy->nodes[frame].spare = ((struct lfu *)policy->state)->epoch;
}

static void unlink_frame(struct gmem_policy *policy, uint32_t frame)
{
	struct gmem_node *node = &policy->nodes[frame];
	struct lfu *lfu = policy->state;

	policy->nodes[node->prev].next = node->next;
	policy->nodes[node->next].prev = node->prev;
	if (node->queue == IN_WINDOW)
		lfu->window--;
	else if (node->prev == node->next && node->prev >= policy->frames && node->prev <= list(policy, COUNT_MAX))
		lfu->filled &= ~(1ull << (node->prev - policy->frames));
}

static void push_window(struct gmem_policy *policy, uint32_t frame)
{
	policy->nodes[frame].queue = IN_WINDOW;
	push(policy, WINDOW_LIST, frame);
	((struct lfu *)policy->state)->window++;
}

static void push_main(struct gmem_policy *policy, uint32_t frame)
{
	uint8_t count = count_at(policy, frame);

	policy->nodes[frame].queue = IN_MAIN;
	push(policy, count, frame);
	((struct lfu *)policy->state)->filled |= 1ull << count;
}

/* Appends all of `from` to the younger end of `to`. */
static void splice(struct gmem_policy *policy, uint32_t from, uint32_t to)
{
	struct gmem_node *nodes = policy->nodes, *head = &nodes[list(policy, from)];
	uint32_t first = head->next, last = head->prev, next = nodes[list(policy, to)].next;

	if (is_empty(policy, from))
		return;
	nodes[first].prev = list(policy, to);
	nodes[list(policy, to)].next = first;
	nodes[last].next = next;
	nodes[next].prev = last;
	head->next = head->prev = list(policy, from);
}

static int least_count(const struct lfu *lfu)
{
	return lfu->filled ? __builtin_ctzll(lfu->filled) : -1;
}

static void count_use(struct gmem_policy *policy)
{
	struct lfu *lfu = policy->state;

	if (++lfu->uses < HALVE_EARLIEST * policy->count)
		return;
	if (lfu->uses < HALVE_LATEST * policy->count && least_count(lfu) < HALVE_AT)
		return;
	lfu->uses = 0;
	lfu->epoch++;
	lfu->filled = 0;
	for (uint32_t count = 1; count <= COUNT_MAX; count++)
		splice(policy, count, count / 2);
	for (uint32_t count = 0; count <= COUNT_MAX; count++)
		lfu->filled |= (uint64_t)!is_empty(policy, count) << count;
}

static int init(struct gmem_policy *policy)
{
	policy->state = calloc(1, sizeof(struct lfu));
	for (uint32_t number = 0; number < LISTS; number++)
		policy->nodes[list(policy, number)].next = policy->nodes[list(policy, number)].prev =
			list(policy, number);
	return policy->state ? 0 : -ENOMEM;
}

static void deinit(struct gmem_policy *policy)
{
	free(policy->state);
}

static void insert(struct gmem_policy *policy, uint32_t frame, uint64_t key)
{
	struct lfu *lfu = policy->state;
	uint16_t note = 0;
	uint32_t count = 1;

	if (gmem_ghosts_take(&policy->ghosts, key, UINT32_MAX, &note))
		count += count_of(policy, (uint8_t)note, (uint8_t)(note >> 8));
	set_count(policy, frame, count);
	push_window(policy, frame);
	if (lfu->window > window_frames(policy->count) + 1) {
		uint32_t old = oldest(policy, WINDOW_LIST);

		unlink_frame(policy, old);
		push_main(policy, old);
	}
	/* What was offered and stayed was in use: back to the others. */
	for (int i = 0; i < 2 && !is_empty(policy, OFFERED_LIST); i++) {
		uint32_t old = oldest(policy, OFFERED_LIST);

		unlink_frame(policy, old);
		push_main(policy, old);
	}
	count_use(policy);
}

static void remove_frame(struct gmem_policy *policy, uint32_t frame, uint64_t key, enum gmem_leave leave)
{
	struct lfu *lfu = policy->state;

	if (leave == GMEM_LEAVE_EVICTED)
		gmem_ghosts_add(&policy->ghosts, key, (uint16_t)(lfu->epoch << 8 | count_at(policy, frame)),
				policy->count);
	unlink_frame(policy, frame);
}

static void touch(struct gmem_policy *policy, uint32_t frame)
{
	bool in_window = policy->nodes[frame].queue == IN_WINDOW;

	unlink_frame(policy, frame);
	set_count(policy, frame, count_at(policy, frame) + 1u);
	if (in_window)
		push_window(policy, frame);
	else
		push_main(policy, frame);
	count_use(policy);
}

static uint32_t offer(struct gmem_policy *policy, uint32_t frame)
{
	unlink_frame(policy, frame);
	policy->nodes[frame].queue = IN_NEITHER;
	push(policy, OFFERED_LIST, frame);
	return frame;
}

static uint32_t next(struct gmem_policy *policy)
{
	struct lfu *lfu = policy->state;
	uint32_t least, late;

	if (!lfu->filled && !lfu->window && is_empty(policy, COLD_LIST))
		splice(policy, OFFERED_LIST, COLD_LIST); /* all have been offered: once more */
	if (!is_empty(policy, COLD_LIST))
		return offer(policy, oldest(policy, COLD_LIST));
	late = oldest(policy, WINDOW_LIST);
	if (!lfu->filled)
		return offer(policy, late);
	least = oldest(policy, (uint32_t)least_count(lfu));
	if (lfu->window <= window_frames(policy->count))
		return offer(policy, least);
	if (count_at(policy, late) <= count_at(policy, least))
		return offer(policy, late);
	unlink_frame(policy, late);
	push_main(policy, late);
	return offer(policy, least);
}

static void cool(struct gmem_policy *policy, uint32_t frame)
{
	unlink_frame(policy, frame);
	set_count(policy, frame, 0);
	policy->nodes[frame].queue = IN_NEITHER;
	push(policy, COLD_LIST, frame);
}

const struct gmem_policy_ops gmem_policy_lfu = {
	.name = "lfu", .touch_locks = true, .ghosts = true, .init = init, .deinit = deinit, .insert = insert,
	.remove = remove_frame, .touch = touch, .next = next, .cool = cool,
};
