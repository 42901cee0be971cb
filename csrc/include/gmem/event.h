/* SPDX-License-Identifier: Apache-2.0
 *
 * Events from the core's threads to the daemon: a bounded ring, and an eventfd that is readable while it is not empty.
 * When nobody reads, new events are dropped and counted: the fault path never waits for the control plane.
 */
#ifndef GMEM_EVENT_H
#define GMEM_EVENT_H

#include <gmem/core.h>
#include <gmem/lockrank.h>

#define GMEM_EVENT_RING 1024

struct gmem_events {
	struct gmem_mutex lock;
	struct gmem_event ring[GMEM_EVENT_RING]; /* (lock) */
	size_t head, count;                      /* (lock) */
	uint64_t lost;                           /* (lock) */
	int fd;                                  /* (C) */
};

int gmem_events_init(struct gmem_events *events);
void gmem_events_deinit(struct gmem_events *events);
void gmem_events_post(struct gmem_events *events, const struct gmem_event *event);
size_t gmem_events_read(struct gmem_events *events, struct gmem_event *ret, size_t capacity);

#endif
