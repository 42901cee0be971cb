/* SPDX-License-Identifier: Apache-2.0
 *
 * A tier for tests: keeps pages on the heap, and fails when it is told to.
 */
#ifndef SHELF_H
#define SHELF_H

#include <pthread.h>

#include <gmem/core.h>
#include <gmem/driver.h>

struct shelf {
	uint64_t capacity, assured;       /* as its info says */
	_Atomic uint64_t physical;        /* bytes it really takes; -ENOSPC above */
	bool batches;                     /* has the ops for several pages */
	uint32_t caps;                    /* beside PEER */
	_Atomic bool hold;                /* pushes wait while it is set */
	_Atomic uint64_t held_key, held;  /* the key of one that waits; how often it has waited */
	_Atomic bool hold_pulls;          /* pulls wait while it is set */
	_Atomic uint64_t held_pulls;      /* how many have waited */
	_Atomic int pull_error;           /* what every pull returns; 0: the page */
	_Atomic uint64_t stored, pages;   /* bytes, pages it holds now */
	_Atomic uint64_t pushes, pulls, calls, largest; /* largest: pages in one batch */
	struct gmem_driver_ops ops;
	struct book **books;              /* by key, sparse */
	uint64_t key_count;
	pthread_mutex_t lock;
};

/* hnid or -errno. The shelf must outlive the device. */
int shelf_attach(struct gmem_core *core, struct shelf *shelf, const char *name);

#endif
