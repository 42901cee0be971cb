/* SPDX-License-Identifier: Apache-2.0
 *
 * Trace: a ring of accesses, written by whichever thread sees one and read by the daemon.
 *
 * The ring is bounded, made when a recording begins, and takes no lock (D. Vyukov's bounded queue, with one reader): a
 * writer claims the next position if the slot there is free, fills the slot, and says so by the slot's turn. A full ring
 * drops what comes and counts it. A writer that is interrupted between the two holds up the reader, not other writers.
 * While nothing is recorded an access costs one relaxed load.
 *
 * Accesses of one page are in order, as their writers own its BUSY; others are within what their threads were apart.
 */
#ifndef GMEM_TRACE_H
#define GMEM_TRACE_H

#include <gmem/access.h>
#include <gmem/core.h>
#include <gmem/lockrank.h>

struct gmem_trace_slot {
	_Atomic uint64_t turn;     /* (A) position: free for it; position + 1: filled by it */
	struct gmem_access access; /* whose turn it is */
};

struct gmem_trace {
	atomic_bool on;                /* (A) */
	struct gmem_mutex lock;        /* starting, reading, ending */
	uint64_t session;              /* changed while off and without writers: whose accesses; 0: everybody's */
	int hnid;                      /* the same: where; -1: everywhere */
	uint64_t start_ns;             /* the same */
	struct gmem_trace_slot *slots; /* the same; NULL: there is no recording */
	uint64_t size;                 /* the same; a power of two */
	uint64_t read;                 /* lock; position */
	char pad[64];                  /* what follows changes with each access */
	_Atomic uint64_t next;         /* (A) position that is claimed next */
	_Atomic uint64_t lost;         /* (A) of this recording */
	_Atomic uint32_t writers;      /* (A) threads that are at it */
};

void gmem_trace_init(struct gmem_trace *trace);
void gmem_trace_deinit(struct gmem_trace *trace);
int gmem_trace_begin(struct gmem_trace *trace, const struct gmem_trace_config *config);
void gmem_trace_end(struct gmem_trace *trace);
void gmem_trace_free(struct gmem_trace *trace);
size_t gmem_trace_take(struct gmem_trace *trace, struct gmem_access *accesses, size_t capacity, uint64_t *ret_lost);

struct gmem_object;
struct gmem_page;

/* What the core's files say of a page that they own, at va, once what was asked for is done. before: its word as it was
 * found. */
struct gmem_use {
	enum gmem_access_kind kind;
	int hnid;
	uint64_t session, va, before;
	bool write;
};
void gmem_page_trace(const struct gmem_page *page, const struct gmem_use *use);
/* Pages of an object have lost their content. */
void gmem_object_trace_gone(const struct gmem_object *object, uint64_t index, uint64_t pages);

/* session: the whole id; access.session and .time_ns are filled in here. */
void gmem_trace_add(struct gmem_trace *trace, uint64_t session, struct gmem_access access);

static inline bool gmem_trace_is_on(const struct gmem_trace *trace)
{
	return __builtin_expect(atomic_load_explicit(&trace->on, memory_order_relaxed), false);
}

#endif
