/* SPDX-License-Identifier: Apache-2.0
 *
 * Watch: what each thread that serves clients is doing, and a thread that looks whether it goes on doing the same.
 *
 * A thread writes its own duty with relaxed stores, and its number last: a duty with the same number a while later is the
 * same one. It has no clock; how long it has been at it is what the watching thread has seen. A torn look costs a wrong
 * word in a log.
 *
 * The watching thread does three things: it reports who has been at the same duty for long; it starts another thread where
 * all of a kind are held up, so that what one client or driver does holds up nobody else; and it interrupts a read that
 * sleeps. That one can only be a client's doing: O_NONBLOCK of a userfaultfd belongs to the description, which it shares.
 */
#ifndef GMEM_WATCH_H
#define GMEM_WATCH_H

#include <pthread.h>
#include <sys/types.h>

#include <gmem/core.h>
#include <gmem/lockrank.h>

#define GMEM_DUTIES_MAX 64

struct gmem_core;

enum gmem_doing {
	GMEM_DOING_NOTHING, /* waits for work */
	GMEM_DOING_READ,    /* reads a userfaultfd */
	GMEM_DOING_FAULT,
	GMEM_DOING_EVENT,   /* a fork, an unmap or a remap */
	GMEM_DOING_AHEAD,   /* fetches ahead, or frees what was unmapped */
	GMEM_DOING_REQUESTS, /* a turn of a ring */
	GMEM_DOING_RECLAIM,
};

enum gmem_role { GMEM_ROLE_FAULT, GMEM_ROLE_FILL, GMEM_ROLE_RING, GMEM_ROLE_RECLAIM, GMEM_ROLE_COUNT };

struct gmem_duty {
	_Atomic uint64_t number;          /* (A) grows with each; 0: nobody has this place */
	_Atomic uint64_t session, va;     /* (A) 0: unknown */
	_Atomic uint32_t doing;           /* (A) */
	_Atomic int32_t hnid;             /* (A) whose driver it is in; -1: none */
	_Atomic(const char *) op;         /* (A) of that driver; constant text */
	atomic_bool poked;                /* (A) its read was interrupted */
	enum gmem_role role;              /* watch->lock */
	pthread_t thread;                 /* watch->lock */
	pid_t tid;                        /* watch->lock */
	bool taken;                       /* watch->lock */
	/* what the watching thread has seen; watch->lock */
	uint64_t seen, seen_ns;           /* number, and since when */
	uint32_t looks;                   /* how often in a row */
	bool told;
};

struct gmem_watch {
	struct gmem_mutex lock;
	pthread_cond_t ends;
	bool stop;                                /* lock */
	bool running;                             /* (C) */
	uint64_t stuck_ns;                        /* (C) what is reported */
	pthread_t thread;
	struct gmem_duty duties[GMEM_DUTIES_MAX];
};

/* Before any thread enlists. */
void gmem_watch_init(struct gmem_watch *watch, uint64_t stuck_ns);
void gmem_watch_deinit(struct gmem_watch *watch);
int gmem_watch_start(struct gmem_core *core);
void gmem_watch_stop(struct gmem_core *core);

/* The calling thread's: at its start and end. Also blocks signals, which are for threads that expect them. */
void gmem_duty_enlist(struct gmem_core *core, enum gmem_role role);
void gmem_duty_leave(struct gmem_core *core);
void gmem_duty_begin(enum gmem_doing doing, uint64_t session, uint64_t va);
void gmem_duty_end(void);
/* In a driver's op from now on; NULL: not any more. For threads that have not enlisted, nothing. */
void gmem_duty_driver(int hnid, const char *op);
/* Whether the read that has just failed with EINTR was interrupted because it slept. */
bool gmem_duty_poked(void);

#endif
