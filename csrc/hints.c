/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include <gmem/hints.h>

void gmem_hints_init(struct gmem_hints *hints, struct gmem_keep *keep, uint64_t session_id)
{
	*hints = (struct gmem_hints){ .keep = keep, .session_id = session_id };
}

static void drop_records(struct gmem_keep *keep, struct gmem_hinted *ranges, size_t count)
{
	for (size_t i = 0; i < count; i++)
		gmem_record_drop(keep, &ranges[i].record);
}

void gmem_hints_deinit(struct gmem_hints *hints)
{
	drop_records(hints->keep, hints->ranges, hints->count);
	free(hints->ranges);
	hints->ranges = NULL;
	hints->count = 0;
}

static int put_record(const struct gmem_hints *hints, struct gmem_hinted *range)
{
	struct gmem_record record = { .kind = GMEM_RECORD_HINT, .id = hints->session_id };

	record.hint.va = range->va;
	record.hint.end = range->end;
	record.hint.preferred = range->hint.preferred;
	record.hint.read_mostly = range->hint.read_mostly;
	record.hint.accessed_by = range->hint.accessed_by;
	return gmem_record_put(hints->keep, &record, &range->record);
}

/* The first range that ends behind va. */
static size_t find(const struct gmem_hints *hints, uint64_t va)
{
	size_t low = 0, high = hints->count;

	while (low < high) {
		size_t mid = (low + high) / 2;

		if (hints->ranges[mid].end <= va)
			low = mid + 1;
		else
			high = mid;
	}
	return low;
}

struct gmem_hint gmem_hints_at(const struct gmem_hints *hints, uint64_t va)
{
	size_t at = find(hints, va);

	return at < hints->count && hints->ranges[at].va <= va ? hints->ranges[at].hint : GMEM_NO_HINT;
}

static bool alike(struct gmem_hint a, struct gmem_hint b)
{
	return a.preferred == b.preferred && a.read_mostly == b.read_mostly && a.accessed_by == b.accessed_by;
}

static int change(struct gmem_hint *hint, enum gmem_advice advice, int hnid)
{
	switch (advice) {
	case GMEM_ADVISE_PREFERRED:
		hint->preferred = (int8_t)hnid;
		return 0;
	case GMEM_ADVISE_READ_MOSTLY:
	case GMEM_ADVISE_NO_READ_MOSTLY:
		hint->read_mostly = advice == GMEM_ADVISE_READ_MOSTLY;
		return 0;
	case GMEM_ADVISE_ACCESSED_BY:
		hint->accessed_by |= (uint16_t)(1u << hnid);
		return 0;
	case GMEM_ADVISE_NOT_ACCESSED_BY:
		hint->accessed_by &= (uint16_t)~(1u << hnid);
		return 0;
	default:
		return -EINVAL;
	}
}

/* Appends, if it says anything; a neighbour that says the same grows instead. */
static void append(struct gmem_hints *to, uint64_t va, uint64_t end, struct gmem_hint hint)
{
	struct gmem_hinted *last = to->count ? &to->ranges[to->count - 1] : NULL;

	if (va >= end || alike(hint, GMEM_NO_HINT))
		return;
	if (last && last->end == va && alike(last->hint, hint))
		last->end = end;
	else
		to->ranges[to->count++] = (struct gmem_hinted){ .va = va, .end = end, .hint = hint };
}

/* What says the same as before keeps its record; the records of the others go once the new ones are there. */
static int record_changes(struct gmem_hints *hints, struct gmem_hints *made)
{
	size_t old = 0;
	int err = 0;

	for (size_t i = 0; !err && i < made->count; i++) {
		struct gmem_hinted *range = &made->ranges[i];

		while (old < hints->count && hints->ranges[old].va < range->va)
			old++;
		if (old < hints->count && hints->ranges[old].va == range->va && hints->ranges[old].end == range->end &&
		    alike(hints->ranges[old].hint, range->hint))
			range->record = hints->ranges[old].record;
		else
			err = put_record(hints, range);
	}
	return err;
}

/* Of the one list, what the other one has not taken over. Both are sorted. */
static void drop_others(struct gmem_keep *keep, struct gmem_hints *from, const struct gmem_hints *but)
{
	size_t at = 0;

	for (size_t i = 0; i < from->count; i++) {
		while (at < but->count && but->ranges[at].va < from->ranges[i].va)
			at++;
		if (at == but->count || but->ranges[at].record != from->ranges[i].record)
			gmem_record_drop(keep, &from->ranges[i].record);
	}
}

int gmem_hints_set(struct gmem_hints *hints, uint64_t va, uint64_t end, enum gmem_advice advice, int hnid)
{
	struct gmem_hints made = { .ranges = malloc((2 * hints->count + 3) * sizeof(*made.ranges)) };
	struct gmem_hint fresh = GMEM_NO_HINT;
	uint64_t at = va; /* up to where [va, end) is done */
	int err = made.ranges ? change(&fresh, advice, hnid) : -ENOMEM;

	for (size_t i = 0; !err && i < hints->count; i++) {
		struct gmem_hinted old = hints->ranges[i];
		uint64_t from = old.va > va ? old.va : va, upto = old.end < end ? old.end : end;

		if (old.va >= end) {
			append(&made, at, end, fresh);
			at = end;
		}
		if (from >= upto) {
			append(&made, old.va, old.end, old.hint);
			continue;
		}
		append(&made, old.va, from, old.hint);
		append(&made, at, from, fresh);
		at = upto;
		change(&old.hint, advice, hnid);
		append(&made, from, upto, old.hint);
		append(&made, upto, old.end, hints->ranges[i].hint);
	}
	if (!err)
		append(&made, at, end, fresh);
	if (!err && made.count > GMEM_HINTS_MAX)
		err = -ENOMEM;
	if (!err) {
		err = record_changes(hints, &made);
		drop_others(hints->keep, err ? &made : hints, err ? hints : &made);
	}
	if (err) {
		free(made.ranges);
		return err;
	}
	free(hints->ranges);
	hints->ranges = made.ranges;
	hints->count = made.count;
	return 0;
}

void gmem_hints_unmapped(struct gmem_hints *hints, uint64_t va, uint64_t end)
{
	size_t first = find(hints, va), last;

	if (first < hints->count && hints->ranges[first].va < va)
		first++;
	for (last = first; last < hints->count && hints->ranges[last].end <= end; last++)
		;
	if (first == last)
		return;
	drop_records(hints->keep, &hints->ranges[first], last - first);
	memmove(&hints->ranges[first], &hints->ranges[last], (hints->count - last) * sizeof(*hints->ranges));
	hints->count -= last - first;
}

int gmem_hints_copy(const struct gmem_hints *from, struct gmem_hints *to)
{
	if (!from->count)
		return 0;
	to->ranges = malloc(from->count * sizeof(*to->ranges));
	if (!to->ranges)
		return -ENOMEM;
	for (size_t i = 0; i < from->count; i++) {
		to->ranges[i] = from->ranges[i];
		to->ranges[i].record = 0;
		if (put_record(to, &to->ranges[i]))
			return -ENOSPC;
		to->count++;
	}
	return 0;
}

int gmem_hints_adopt(struct gmem_hints *hints, const struct gmem_record *record, uint32_t number)
{
	size_t at = find(hints, record->hint.va);
	struct gmem_hinted *grown;

	if (record->hint.va >= record->hint.end || record->hint.preferred >= GMEM_HNODE_MAX || record->hint.preferred < -1)
		return -EPROTO;
	if (at < hints->count && hints->ranges[at].va < record->hint.end)
		return -EEXIST;
	grown = realloc(hints->ranges, (hints->count + 1) * sizeof(*grown));
	if (!grown)
		return -ENOMEM;
	memmove(&grown[at + 1], &grown[at], (hints->count - at) * sizeof(*grown));
	grown[at] = (struct gmem_hinted){
		.va = record->hint.va, .end = record->hint.end, .record = number,
		.hint = { record->hint.preferred, record->hint.read_mostly, record->hint.accessed_by },
	};
	hints->ranges = grown;
	hints->count++;
	return 0;
}
