/* SPDX-License-Identifier: Apache-2.0
 *
 * Agent: gmemd's end of the file through which it asks a process to drop translations (gmem_wire.h). What the process
 * writes there is only ever a hint of how far it is.
 */
#ifndef GMEM_AGENT_H
#define GMEM_AGENT_H

#include <gmem/lockrank.h>
#include <gmem/memfd.h>
#include <gmem/types.h>

struct gmem_agent_shared;

struct gmem_agent {
	struct gmem_file *file;           /* (C) */
	struct gmem_agent_shared *shared; /* (C) */
	struct gmem_mutex lock;
	uint32_t head;                    /* lock; entries written */
	struct gmem_range last;           /* lock; not written yet: the next range may extend it */
};

/* fd: a predecessor's, taken over in any case; -1: a new one. */
int gmem_agent_create(int fd, struct gmem_agent **ret);
void gmem_agent_destroy(struct gmem_agent *agent);
/* Asks for a range, now or with the next ones; what finds no room is dropped. */
void gmem_agent_put(struct gmem_agent *agent, struct gmem_range range);
/* Now. */
void gmem_agent_flush(struct gmem_agent *agent);

#endif
