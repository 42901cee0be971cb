/* SPDX-License-Identifier: Apache-2.0
 *
 * A device context seen from its client. On a GPU it is in this process (gpu.c). Else: a process (gmem-context.c), a socket
 * to it, and a thread that reads what it says and watches the clock. Launches wait in a list; the first SENT_MAX of them are with the process already, so that it goes
 * from one kernel to the next without us, and the socket never fills up.
 */
#ifndef GMEM_CLIENT_CONTEXT_H
#define GMEM_CLIENT_CONTEXT_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "fence.h"
#include "launch.h"
#include "session.h"
#include "spawn.h"

struct gmem_launch {
	struct gmem_launch *next;
	struct gmem_fence *fence;
	uint64_t timeout_ns;  /* 0: none */
	uint64_t deadline_ns; /* once it has started, if it has a timeout */
	size_t held_count;    /* ranges held on the device for it */
	struct gmem_range *held;
	struct gmem_launch_run run;
};

/* A range that is held, and the name by which it is let go of: under that once, however often a gmemd is killed and asked
 * again. */
struct gmem_held {
	struct gmem_held *next;
	struct gmem_range range;
	uint64_t hold;
	uint32_t index;
};

struct gmem_context {
	struct gmem *session;
	struct gmem_device_info device;
	uint64_t id;      /* as gmemd counts contexts */
	pid_t owner;
	struct gmem_child child;
	int channel;
	pthread_t reader;
	pthread_mutex_t lock; /* guards what follows */
	pthread_cond_t progress;
	struct gmem_launch *first, *last; /* not complete, oldest first */
	size_t sent;                      /* so many of them, from the first */
	uint64_t last_id;
	uint64_t completed;
	struct gmem_held *held;
	struct gmem_context *next; /* session->lock; of all that are open */
	struct gmem_cuda *gpu;     /* (C) one on a GPU, in this process: no child, no channel, no reader; NULL: it is none */
	struct gmem_link *gpu_link; /* (C) */
	_Atomic uint64_t last_ticket, done_ticket; /* (A) of what was let go of with a stream; how many are known to be done */
	int ended;            /* 0, or -errno: why nothing can be launched any more */
	char message[384];
};

/* ---- context.c ---- */

int gmem_context_hold(struct gmem_context *context, const struct gmem_range *ranges, size_t count, bool write);
int gmem_context_let_go(struct gmem_context *context, const struct gmem_range *ranges, size_t count);
/* -EINVAL naming what, of ranges that can't be. */
int gmem_check_ranges(const struct gmem_range *ranges, size_t count, const char *what);

/* Every open context maps what is to be adopted; the caller holds session->mapping to write. -EEXIST naming the range: one
 * can't, and none does then. Waits for the kernels that run. */
int gmem_contexts_map(struct gmem *session, uint64_t va, uint64_t bytes, uint64_t offset);

/* Every open context maps the pool at va over its window, or with bytes the window there again; the caller holds
 * session->mapping to write. Waits for the kernels that run. A context that can't has ended. */
int gmem_contexts_cover(struct gmem *session, uint64_t va, uint64_t bytes);

/* A range that is let go of elsewhere. */
void gmem_context_forget(struct gmem_context *context, const struct gmem_range *range);

/* gmemd's number of the newest context of that process on the device, as numbers only rise; 0: there is none. */
int gmem_context_newest(const struct gmem_context *context, pid_t pid, uint64_t *ret);
/* The same of this one, which that process has just opened. -EOWNERDEAD: there is none newer than before. */
int gmem_context_find_id(struct gmem_context *context, pid_t pid, uint64_t before);

/* ---- gpu.c ---- */

int gmem_gpu_open(struct gmem_context *context);
void gmem_gpu_close(struct gmem_context *context);
int gmem_gpu_acquire(struct gmem_context *context, const struct gmem_range *ranges, size_t count, bool write);

/* ---- launch.c ---- */

/* Has the process do something between two kernels; *ret_value: what it says. */
int gmem_context_ask(struct gmem_context *context, enum gmem_launch_kind kind, const uint64_t args[3], int *ret_value);

/* The reader thread's function; its argument is the context. */
void *gmem_launch_read(void *context);

#endif
