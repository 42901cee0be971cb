/* SPDX-License-Identifier: Apache-2.0
 *
 * Logical page table: the single source of truth on where each logical page is. One 64-bit word for each page, in one
 * sparse memfd that outlives the process; an object owns a dense extent of it, so a look-up is one load, and untouched
 * pages cost nothing. A page's number in this array (pn) is unique over all objects.
 *
 *   bit  0-1   state (enum gmem_state)
 *   bit  2-5   direction, while BUSY (enum gmem_dir)
 *   bit  6-9   target hnid, while BUSY
 *   bit 10-25  valid: hnodes that hold a valid copy
 *   bit 26-30  writer + 1, or 0: the hnode whose views may map it writable; then valid is that hnode alone
 *   bit 31     WAITERS: someone faulted while the page was BUSY or held, and must be woken when that ends
 *   bit 32-39  flags (GMEM_PAGE_*)
 *   bit 40-43  why (enum gmem_why)
 *   bit 44-48  preferred + 1, or 0: the hnode it is best kept on
 *   bit 49-51  takings, bit 52-63 when the last one was: thrash.h; a lost or torn one costs some microseconds
 *
 * BUSY is the page's lock: one thread owns it and alone changes the word, except that anyone may set WAITERS.
 * NOMAP is valid == 0. What recovery does with a BUSY word is decided by its direction alone:
 *   MAP                 contents untouched: drop BUSY
 *   COPY target         the target's page may be mapped and newer: repeat the copy, EEXIST means it had landed
 *   FILL target         nobody has mapped the target: refill, or punch it and drop BUSY
 *   UPGRADE target      committed: punch every copy that is not in valid, then drop BUSY
 *   DISCARD             punch every copy; POISONED if why is LOST
 */
#ifndef GMEM_LPT_H
#define GMEM_LPT_H

#include <gmem/memfd.h>
#include <gmem/range.h>
#include <gmem/types.h>

enum gmem_dir { GMEM_DIR_NONE, GMEM_DIR_MAP, GMEM_DIR_COPY, GMEM_DIR_FILL, GMEM_DIR_UPGRADE, GMEM_DIR_DISCARD };

typedef uint64_t gmem_word_t;

#define GMEM_WORD_WAITERS (1ull << 31)
#define GMEM_WORD_FLAG(f) ((uint64_t)(f) << 32)

static inline enum gmem_state gmem_word_state(gmem_word_t w) { return (enum gmem_state)(w & 3); }
static inline enum gmem_dir gmem_word_dir(gmem_word_t w) { return (enum gmem_dir)(w >> 2 & 15); }
static inline int gmem_word_target(gmem_word_t w) { return (int)(w >> 6 & 15); }
static inline uint32_t gmem_word_valid(gmem_word_t w) { return (uint32_t)(w >> 10 & 0xffff); }
static inline int gmem_word_writer(gmem_word_t w) { return (int)(w >> 26 & 31) - 1; }
static inline uint8_t gmem_word_flags(gmem_word_t w) { return (uint8_t)(w >> 32); }
static inline enum gmem_why gmem_word_why(gmem_word_t w) { return (enum gmem_why)(w >> 40 & 15); }

static inline int gmem_word_preferred(gmem_word_t w) { return (int)(w >> 44 & 31) - 1; }

static inline gmem_word_t gmem_word_set(gmem_word_t w, int shift, uint64_t mask, uint64_t value)
{
	return (w & ~(mask << shift)) | (value & mask) << shift;
}
static inline gmem_word_t gmem_word_set_state(gmem_word_t w, enum gmem_state s) { return gmem_word_set(w, 0, 3, s); }
static inline gmem_word_t gmem_word_set_busy(gmem_word_t w, enum gmem_dir dir, int target)
{
	return gmem_word_set(gmem_word_set(gmem_word_set_state(w, GMEM_BUSY), 2, 15, dir), 6, 15, (uint64_t)target);
}
static inline gmem_word_t gmem_word_set_valid(gmem_word_t w, uint32_t v) { return gmem_word_set(w, 10, 0xffff, v); }
static inline gmem_word_t gmem_word_set_writer(gmem_word_t w, int hnid)
{
	return gmem_word_set(w, 26, 31, (uint64_t)(hnid + 1));
}
static inline gmem_word_t gmem_word_set_why(gmem_word_t w, enum gmem_why y) { return gmem_word_set(w, 40, 15, y); }

static inline gmem_word_t gmem_word_set_preferred(gmem_word_t w, int hnid)
{
	return gmem_word_set(w, 44, 31, (uint64_t)(hnid + 1));
}

#define GMEM_WORD_TAKINGS_MAX 7
#define GMEM_WORD_TAKEN_MAX 0xfffull

static inline unsigned gmem_word_takings(gmem_word_t w) { return (unsigned)(w >> 49 & GMEM_WORD_TAKINGS_MAX); }
static inline uint64_t gmem_word_taken(gmem_word_t w) { return w >> 52; }
static inline gmem_word_t gmem_word_set_taken(gmem_word_t w, unsigned takings, uint64_t when)
{
	return gmem_word_set(gmem_word_set(w, 49, GMEM_WORD_TAKINGS_MAX, takings), 52, GMEM_WORD_TAKEN_MAX, when);
}

struct gmem_lpt {
	struct gmem_file *file;             /* (C) */
	_Atomic gmem_word_t *words;         /* (C) the whole table, mapped once */
	uint64_t pages;                     /* (C) how many words there are */
	struct gmem_range_allocator extents; /* in bytes of the file */
};

/* fd: the table of a predecessor, taken over; -1: a new one. */
int gmem_lpt_init(struct gmem_lpt *lpt, uint64_t pages, int fd);
void gmem_lpt_deinit(struct gmem_lpt *lpt);
/* pages consecutive words, all NOMAP. */
int gmem_lpt_extent_alloc(struct gmem_lpt *lpt, uint64_t pages, uint64_t *ret_pn);
void gmem_lpt_extent_free(struct gmem_lpt *lpt, uint64_t pn, uint64_t pages);
/* The extent of an object of a predecessor. */
int gmem_lpt_extent_take(struct gmem_lpt *lpt, uint64_t pn, uint64_t pages);
/* The next run [*pn, *ret_end) at or after *pn and before end in which words may be other than NOMAP; -ENOENT if none. */
int gmem_lpt_next_touched(struct gmem_lpt *lpt, uint64_t *pn, uint64_t end, uint64_t *ret_end);
uint64_t gmem_lpt_bytes(struct gmem_lpt *lpt);
/* Internal consistency of one word; for debug builds and tests. */
bool gmem_word_is_valid(gmem_word_t w);

#endif
