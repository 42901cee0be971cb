/* SPDX-License-Identifier: Apache-2.0
 *
 * The process of a CUDA context, played by a thread: the other end of a channel (gmem_wire.h). It imports, maps and takes
 * away what it is asked to, and ends the test if it is asked for what makes no sense. Frames are memfds, as the double of
 * libcuda makes them, so the test can look at what the context would see.
 */
#ifndef MAPPER_H
#define MAPPER_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include <gmem_wire.h>

#define MAPPER_FRAMES 1024

enum mapper_mood {
	MAPPER_OBEYS,
	MAPPER_SILENT,   /* reads, and does not answer */
	MAPPER_FAILS,    /* says that it could not */
	MAPPER_CONFUSED, /* answers something else */
	MAPPER_CURT,     /* answers too little */
	MAPPER_LEAVES,   /* hangs up */
	MAPPER_LIES,     /* says that it has mapped what it has not */
};

struct mapper_counts {
	unsigned batches, imports, forgets, maps, unmaps, protects, lists;
};

struct mapper {
	int fd;
	pthread_t thread;
	struct gmem_channel_hello hello;
	pthread_mutex_t lock;
	enum mapper_mood mood;       /* lock */
	bool ended;                  /* lock; the channel's other end has gone */
	struct mapper_counts counts; /* lock */
	struct {
		uint8_t *memory;
		uint64_t va;
		bool writable;
	} frames[MAPPER_FRAMES]; /* lock */
};

/* Takes the descriptor over. */
void mapper_start(struct mapper *mapper, int fd);
void mapper_set_mood(struct mapper *mapper, enum mapper_mood mood);
/* What a kernel finds at that address; NULL: a fault, of writing if write is set. */
uint8_t *mapper_at(struct mapper *mapper, uint64_t va, bool write);
struct mapper_counts mapper_counts(struct mapper *mapper);
/* Frames that are imported. */
unsigned mapper_holds(struct mapper *mapper);
bool mapper_has_ended(struct mapper *mapper);
/* Hangs up, if the other end has not, and frees what it holds. */
void mapper_end(struct mapper *mapper);

#endif
