/* SPDX-License-Identifier: Apache-2.0
 *
 * Floors: what the kernel and the memory bus need, without gmem. The fault floor is a bare handler: a thread in the
 * daemon's process that answers every fault of a client's range with one UFFDIO_CONTINUE of the whole page.
 */
#ifndef BENCH_FLOOR_H
#define BENCH_FLOOR_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

/* Both sides, before and after the fork that makes the client. */
struct floor {
	int socks[2];
	pthread_t thread;
	atomic_bool *spin; /* shared: the handler reads without sleeping while it is set */
	bool placed;
};

struct floor_range {
	uint8_t *at;
	uint64_t bytes, page_bytes;
	int fd; /* the memfd behind it */
};

/* Daemon: before the client is started. placed: the wake-up of another CPU costs as much as the rest of a fault, and
 * the scheduler picks now one CPU, now the other, so the handler sleeps on the floor's CPU and spins on any other. */
struct floor *floor_create(bool placed);
/* The calling thread runs on the floor's CPU from here on. */
void floor_cpu_enter(void);
/* Client: populated pages of its own, handled by the bare handler. False: no huge pages. */
bool floor_attach(struct floor *floor, uint64_t bytes, uint64_t page_bytes, struct floor_range *ret);
/* Populated pages that need no faults from then on, for copies; NULL: no huge pages. */
uint8_t *warm_map(uint64_t bytes, bool huge, int *ret_fd);
void warm_unmap(uint8_t *at, uint64_t bytes, int fd);

#endif
