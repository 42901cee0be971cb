/* SPDX-License-Identifier: Apache-2.0
 *
 * Words of the core (docs/maintainer.md has the long form):
 *
 *   hnode        heterogeneous NUMA node: the host (hnid 0) or the memory of one device
 *   as           address space: one client's view of memory: its regions, its process, its device contexts
 *   region       one mapped VA range; points into an object
 *   object       the backing of one or more regions; owns an extent of the logical page table (LPT)
 *   file         a memfd: the physical memory of one (session, page class) on one hnode
 *   view         one process's mapping of an as on one hnode: its mm, its uffd, its pidfd
 *   logical page the unit of residency: 4 KiB, 64 KiB or 2 MiB, fixed per region
 *   frame        a page-sized piece of one hnode's memory, and the descriptor that reclaim keeps of it
 *
 * Letters in field comments: (C) constant after creation, (A) atomic, (S) session lock, (R) as lock, (O) object
 * lock, (P) owner of the page's BUSY state, (H) hnode lock.
 */
#ifndef GMEM_TYPES_H
#define GMEM_TYPES_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define GMEM_HNODE_MAX 16
#define GMEM_HOST 0
#define GMEM_NAME_MAX 32
#define GMEM_MESSAGE_MAX 160

#define GMEM_SHIFT_4K 12
#define GMEM_SHIFT_64K 16
#define GMEM_SHIFT_2M 21
#define GMEM_HUGE_BYTES (1ul << GMEM_SHIFT_2M)

/* Page classes: which kind of file backs a region. */
enum gmem_class {
	GMEM_CLASS_SMALL = 0, /* shmem, 4 KiB kernel pages, any logical page size */
	GMEM_CLASS_HUGE = 1,  /* hugetlb 2 MiB */
	GMEM_CLASS_COUNT = 2,
};

enum gmem_prot { GMEM_PROT_READ = 1, GMEM_PROT_WRITE = 3 };

struct gmem_range {
	uint64_t va;
	uint64_t bytes;
};

/* What a forked child gets of a region. COPY: it shares it until its own fork handler has put a copy in its place. */
enum gmem_fork { GMEM_FORK_SHARE = 0, GMEM_FORK_NONE = 1, GMEM_FORK_COPY = 2 };

/* Advice of hmadvise; values of openEuler where it has them. */
enum gmem_advice {
	GMEM_ADVISE_DISCARD = 4,          /* MADV_DONTNEED of hmadvise: drop content, next touch reads zero */
	GMEM_ADVISE_PREFETCH = 0x1000,
	GMEM_ADVISE_PINNED = 0x1001,      /* reclaim skips it */
	GMEM_ADVISE_UNPINNED = 0x1002,
	GMEM_ADVISE_READ_MOSTLY = 0x1010,
	GMEM_ADVISE_NO_READ_MOSTLY = 0x1011,
	GMEM_ADVISE_PREFERRED = 0x1012,   /* preferred location: hnid; -1 clears */
	GMEM_ADVISE_COLD = 0x1013,        /* first victim on the hnode where it is */
	GMEM_ADVISE_ACCESSED_BY = 0x1014, /* hnid will use all of it: fetch far ahead from the first fault on */
	GMEM_ADVISE_NOT_ACCESSED_BY = 0x1015,
	GMEM_ADVISE_FREEZE = 0x1020,      /* see freeze.h */
	GMEM_ADVISE_THAW = 0x1021,
	GMEM_ADVISE_ZERO = 0x1022,        /* every byte reads zero: whole pages are discarded, parts of pages written */
};

/* Which of a context's holds on a range is meant, over the daemon's death too. */
struct gmem_hold_name {
	uint32_t record; /* its record's number; 0: nothing is recorded, or whichever */
	uint32_t index;  /* which of that request's ranges; of no account where record is known */
	uint64_t asked;  /* number of the request that has acquired it */
};

/* State of a logical page as a query reports it: 8 bytes a page. */
struct gmem_page_info {
	uint8_t state;      /* enum gmem_state */
	int8_t writer;      /* hnid that may write, -1 if none */
	uint16_t valid;     /* bit h: hnode h holds a valid copy */
	uint8_t flags;      /* GMEM_PAGE_* */
	uint8_t page_shift;
	uint16_t why;       /* enum gmem_why: what moved it last */
};

enum gmem_state { GMEM_NOMAP = 0, GMEM_RESIDENT = 1, GMEM_BUSY = 2, GMEM_POISONED = 3 };

#define GMEM_PAGE_DIRTY 0x01
#define GMEM_PAGE_PINNED 0x02
#define GMEM_PAGE_WILLNEED 0x04
#define GMEM_PAGE_READ_MOSTLY 0x08
#define GMEM_PAGE_REFERENCED 0x10
#define GMEM_PAGE_CHANGED 0x20 /* not what its source has (source.h) */

enum gmem_why {
	GMEM_WHY_NONE = 0, GMEM_WHY_FIRST_TOUCH, GMEM_WHY_HOST_FAULT, GMEM_WHY_DEVICE_FAULT, GMEM_WHY_PREFETCH,
	GMEM_WHY_EVICTED, GMEM_WHY_HMEMCPY, GMEM_WHY_ACQUIRE, GMEM_WHY_DETACH, GMEM_WHY_ADVICE, GMEM_WHY_LOST,
};

#endif
