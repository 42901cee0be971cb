/* SPDX-License-Identifier: Apache-2.0
 *
 * Hints: where an address space would like its memory to be, by range. They are kept beside the regions, not in pages: they
 * hold for what is touched later, and stay when a part of their range is unmapped and mapped again. A hint goes when a
 * munmap covers all of its range.
 */
#ifndef GMEM_HINTS_H
#define GMEM_HINTS_H

#include <gmem/keep.h>
#include <gmem/types.h>

#define GMEM_HINTS_MAX 65536 /* ranges of one address space */

struct gmem_hint {
	int8_t preferred;     /* hnid, -1: none */
	bool read_mostly;
	uint16_t accessed_by; /* bit h: hnode h will use it all */
};

#define GMEM_NO_HINT ((struct gmem_hint){ .preferred = -1 })

struct gmem_hinted {
	uint64_t va, end;
	struct gmem_hint hint;
	uint32_t record; /* keep.h */
};

/* Sorted, not overlapping, no two neighbours alike, none without a hint. The owner's lock guards it. */
struct gmem_hints {
	struct gmem_hinted *ranges;
	size_t count;
	struct gmem_keep *keep; /* (C) */
	uint64_t session_id;    /* (C) */
};

void gmem_hints_init(struct gmem_hints *hints, struct gmem_keep *keep, uint64_t session_id);
void gmem_hints_deinit(struct gmem_hints *hints);
struct gmem_hint gmem_hints_at(const struct gmem_hints *hints, uint64_t va);
/* Placement advice (PREFERRED, READ_MOSTLY, ACCESSED_BY and their opposites) for [va, end). -EINVAL: other advice;
 * -ENOMEM: too many ranges, and nothing has changed. */
int gmem_hints_set(struct gmem_hints *hints, uint64_t va, uint64_t end, enum gmem_advice advice, int hnid);
void gmem_hints_unmapped(struct gmem_hints *hints, uint64_t va, uint64_t end);
/* to: has none yet. */
int gmem_hints_copy(const struct gmem_hints *from, struct gmem_hints *to);
/* What a predecessor had recorded. -EEXIST: it is recorded otherwise, too, as a change was cut short. */
int gmem_hints_adopt(struct gmem_hints *hints, const struct gmem_record *record, uint32_t number);

#endif
