/* SPDX-License-Identifier: Apache-2.0
 *
 * The service of views: fault threads read their uffds, have faults answered (fault.h), and honour events.
 */
#ifndef GMEM_SERVICE_H
#define GMEM_SERVICE_H

#include <gmem/affinity.h>
#include <gmem/fault.h>
#include <gmem/lockrank.h>

#define GMEM_VIEWS_MAX 8192

struct gmem_core;

/* epoll hands out a slot and its generation, never a pointer: a view can be closed while a thread is about to read it. */
struct gmem_slot {
	struct gmem_view *view;
	uint32_t generation;
	uint32_t next_free;
};

/* What one fault thread is doing: which view it serves, and how many times it has finished. What is (T) is its own. */
struct gmem_service {
	struct gmem_core *core;  /* (C) */
	_Atomic uintptr_t view;  /* (A) */
	_Atomic uint64_t turns;  /* (A) */
	cpu_set_t cpus;          /* (T) where it may run */
	bool can_stay;           /* (T) cpus is known */
	int cpu;                 /* (T) where it stays, beside the thread it serves; -1: anywhere */
	int home;                /* (T) where it stayed before it left for a while, to fetch ahead; -1: nowhere */
	pid_t client;            /* (T) the thread that faulted last; 0: the kernel does not tell */
	uint32_t pause, to_look; /* (T) faults from one look where the client runs to the next; those that are left */
	uint32_t shy;            /* (T) looks for which it keeps away from a CPU that others wanted; doubles */
	uint32_t skip;           /* (T) of these, how many are left */
	struct gmem_waits waits; /* (T) at the last look */
};

struct gmem_faults {
	int epoll_fd; /* (C) */
	int stop_fd;  /* (C) */
	_Atomic int spare_fd; /* (A) given up for the userfaultfd of a child when there are no more descriptors; -1: it was */
	struct gmem_mutex slots_lock;
	struct gmem_slot slots[GMEM_VIEWS_MAX]; /* slots_lock */
	uint32_t slots_used, slots_free;        /* slots_lock; index + 1 of the first free one, 0: none */
	_Atomic uint32_t thread_count; /* (A) it only grows while the core runs */
	bool linger; /* (C) there is a CPU to spin on while a client runs on another */
	pthread_t threads[GMEM_THREADS_MAX];
	struct gmem_service services[GMEM_THREADS_MAX];
};

int gmem_faults_start(struct gmem_core *core, uint32_t threads);
void gmem_faults_stop(struct gmem_core *core);
/* One thread more of a kind, if there may be one: all that there are have been held up. For the watching thread. */
void gmem_faults_grow(struct gmem_core *core, bool fault, bool filler);
/* -ENFILE: too many views. */
int gmem_faults_watch(struct gmem_core *core, struct gmem_view *view);
/* Waits until every message of the view that has been read by now has been handled: munmap(2) returns when its event was
 * read, and what it says must not be done to a region that takes its place. Not for fault threads. */
void gmem_faults_quiesce(struct gmem_core *core, struct gmem_view *view);
void gmem_faults_unwatch(struct gmem_core *core, struct gmem_view *view);

#endif
