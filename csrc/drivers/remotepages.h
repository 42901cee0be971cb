/* SPDX-License-Identifier: Apache-2.0
 *
 * The pages of a remote tier: pushed, pulled and forgotten by key. The order that keeps a page: its value is recorded,
 * written under a name that nothing had before, confirmed by as many replicas as are asked for, and only then do the
 * entries of its pages name it. Values that nobody names any more are dropped later.
 */
#ifndef GMEM_DRIVERS_REMOTEPAGES_H
#define GMEM_DRIVERS_REMOTEPAGES_H

#include <gmem/driver.h>

#include "entries.h"
#include "exchange.h"
#include "values.h"

#define GMEM_TENANT_MAX 32

/* An entry's word: bit 0 set, page size 1..2, slot 3..6, value from 8 on. Its check: the page's checksum. */
struct gmem_device {
	char tenant[GMEM_TENANT_MAX + 1];          /* (C) */
	char object[17];                      /* (C) names this tier's values among those of others: values.header's, in hex */
	unsigned replicas;                    /* (C) */
	uint64_t timeout_ns, capacity, key_count; /* (C) */
	uint64_t bandwidth, latency_ns;       /* (C) */
	struct gmem_tls *tls;                 /* (C) of nodes; NULL: none */
	int guard;                            /* (C) whoever watches it ends the server when nobody has it any more */
	struct gmem_quota quota;              /* of the entries; not limited */
	struct gmem_entries *entries;         /* (C) */
	struct gmem_values values;
	struct gmem_nodes nodes;
	pthread_t keeper;
	bool keeper_runs;                     /* (C) */
	int bell;                             /* (C) eventfd that wakes the keeper */
	atomic_bool stop;
	_Atomic uint64_t pages, page_bytes;
	_Atomic bool lost;                    /* nothing could be stored in the time that there is */
	_Atomic uint64_t tried_ns;            /* when a lost one was last tried */
	atomic_flag squeezing;                /* one thread at a time; it has what follows */
	uint32_t squeezed_to;
	uint8_t *squeezed;                    /* a value */
};

/* Of a key's entry; 0: nothing is stored. */
uint64_t gmem_remote_page_bytes(uint64_t word);
uint32_t gmem_remote_value(uint64_t word);
unsigned gmem_remote_slot(uint64_t word);

/* Of a page: extents are 2 MiB, 4 MiB and 8 MiB, large enough for a batch, small enough to spread an array over all nodes. */
uint64_t gmem_remote_extent(uint64_t key, uint32_t page_bytes);

/* Set the result of each io. */
void gmem_remote_push(struct gmem_device *tier, struct gmem_peer_io *io, size_t count);
void gmem_remote_pull(struct gmem_device *tier, struct gmem_peer_io *io, size_t count);
/* Never waits for a server. -ENOENT. */
int gmem_remote_free(struct gmem_device *tier, uint64_t key);

void gmem_remote_exchange(struct gmem_device *tier, struct gmem_request *requests, unsigned count, uint64_t ns);
/* Drops some values that nobody names; false if there was none, or the servers can't be had. */
bool gmem_remote_sweep(struct gmem_device *tier, uint64_t ns);
/* Brings the pages of some values that are at most half full into one; true: there is less now, once it is swept. */
bool gmem_remote_squeeze(struct gmem_device *tier);
/* Pools of several machines (remotepools.c): the ops of driver.h. */
void gmem_remote_pool_put(struct gmem_device *tier, const struct gmem_pool_version *version, struct gmem_peer_io *io,
			  size_t count);
void gmem_remote_pool_get(struct gmem_device *tier, const struct gmem_pool_version *version, struct gmem_peer_io *io,
			  size_t count);
int gmem_remote_pool_drop(struct gmem_device *tier, const struct gmem_pool_version *version, uint64_t first, uint64_t count);
/* Wakes the thread that does both. */
void gmem_remote_ring(struct gmem_device *tier);

#endif
