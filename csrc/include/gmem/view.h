/* SPDX-License-Identifier: Apache-2.0
 *
 * View: one process's mapping of an address space on one hnode. A view is found by the fault threads through epoll, and
 * by movers through its as; both hold a reference while they use it. It is closed (out of epoll, marked dead) before it
 * is released; the uffd itself is closed with the last reference, so a thread that still uses it gets ESRCH at worst.
 */
#ifndef GMEM_VIEW_H
#define GMEM_VIEW_H

#include <sys/types.h>

#include <gmem/types.h>

struct gmem_agent;
struct gmem_object;
struct gmem_pmap;
struct gmem_as;
struct gmem_hnode;
struct gmem_session;

struct gmem_hold {
	struct gmem_range range;
	uint32_t record;
	uint64_t asked; /* number of the request that has acquired it, 0: none */
	uint32_t index; /* which of its ranges */
	struct gmem_hold *next;
};

/* A range that a context's process maps from a pool's file, over its window. */
struct gmem_overlay {
	struct gmem_range range;
	uint64_t pn; /* the object's first page */
	uint32_t record;
	struct gmem_overlay *next;
};

#define GMEM_STREAMS 4
#define GMEM_RECENT 16
#define GMEM_BLOCKS 2

/* A sequence of faults, each a stride behind the one before. What begins at begin continues up to end; from next to end is
 * still to be fetched ahead. Relaxed: a race costs a guess. */
struct gmem_stream {
	_Atomic int64_t stride;  /* bytes, whole pages, backwards if negative; 0: none, stored first and last */
	_Atomic uint64_t begin, next, end;
	_Atomic uint64_t window; /* pages; 0: seen once */
	atomic_bool write;
	_Atomic uint32_t hand;   /* recent_hand when it last went on */
	_Atomic bool quick;      /* who reads it is there before its pages are */
	_Atomic bool maps;       /* its next page is here, as far as is known: it takes a moment */
};

struct gmem_view {
	atomic_uint refs;             /* (A) */
	atomic_bool dead;             /* (A) */
	uint64_t id;                  /* (C) context id; 0 for the process itself */
	int hnid;                     /* (C) */
	int uffd;                     /* (C) -1: contexts in the client's process */
	struct gmem_hnode *hnode;     /* (C) of these, the device's */
	struct gmem_pmap *pmap;       /* (C) of these, the driver's; NULL: the uffd's (pmap.h) */
	int pidfd;                    /* (C) -1 if unknown */
	pid_t pid;                    /* (C) 0 if unknown */
	bool events;                  /* (C) unmap and remap events are on */
	bool replayable;              /* (C) device contexts: a fault may be answered */
	uint64_t session_id;          /* (C) */
	struct gmem_as *as;           /* (C) holds a reference of the session that owns the as */
	struct gmem_session *session; /* (C) */
	_Atomic uint64_t faults;      /* (A) */
	atomic_bool reading;          /* (A) a thread reads messages, or handles an event among them (service.c) */
	atomic_bool rearm;            /* (A) it is to arm the uffd: another thread left it to it */
	uint32_t slot;                /* (C) once watched */
	uint64_t token;               /* (C) once watched; what epoll hands out */
	_Atomic uint64_t served_ns;   /* (A) when a fault was last answered */
	_Atomic uint32_t close_faults; /* (A) how many in a row followed closely */
	struct gmem_stream streams[GMEM_STREAMS]; /* (A) */
	_Atomic uint32_t stream_hand; /* (A) which to forget next */
	_Atomic uint64_t recent[GMEM_RECENT]; /* (A) pages with a fault that continued no stream */
	_Atomic uint32_t recent_hand; /* (A) */
	_Atomic uint64_t blocks[GMEM_BLOCKS]; /* (A) what is to come because most around it is here: prefetch.c */
	atomic_bool helped;           /* (A) a filler fetches ahead too */
	_Atomic uint32_t strikes;     /* (A) signals sent for touching what it may not */
	_Atomic(struct gmem_agent *) agent; /* (A) set once; NULL: translations stay */
	uint32_t record;              /* (C) contexts: its number */
	struct gmem_hold *holds;      /* as->views_lock; what the context has acquired */
	struct gmem_overlay *overlays; /* as->views_lock */
	_Atomic uint32_t overlay_count; /* (A) */
	struct gmem_view *next;       /* as->views_lock */
};

struct gmem_view *gmem_view_ref(struct gmem_view *view);
void gmem_view_unref(struct gmem_view *view);

/* ---- its translations, whoever makes them. What a driver does may be queued until gmem_view_flush() ---- */

/* Pages of the object from that offset on, at the range. */
int gmem_view_enter(struct gmem_view *view, struct gmem_range range, struct gmem_object *object, uint64_t offset,
		    enum gmem_prot prot);
/* Those that are there; one whose driver makes them may lose them altogether for GMEM_PROT_READ, and then has to enter
 * them again. */
int gmem_view_protect(struct gmem_view *view, struct gmem_range range, enum gmem_prot prot);
/* Removes translations that a driver makes; nothing of a uffd's, which go with the page. */
int gmem_view_release(struct gmem_view *view, struct gmem_range range);
int gmem_view_flush(struct gmem_view *view);
void gmem_view_wake(struct gmem_view *view, struct gmem_range range);

#endif
