/* SPDX-License-Identifier: Apache-2.0
 *
 * What the files of libgmem know of each other's sessions.
 */
#ifndef GMEM_CLIENT_SESSION_H
#define GMEM_CLIENT_SESSION_H

#include <gmem.h>
#include <pthread.h>
#include <sys/types.h>

#include "heap.h"
#include "link.h"
#include "ring.h"
#include "rpc.h"

struct gmem_embedded;

struct gmem {
	struct gmem_link *link;
	struct gmem_rpc *rpc;
	struct gmem_embedded *embedded; /* the private gmemd it is connected to; NULL: a running one */
	/* Read-held over a whole mmap, write-held over a whole munmap and over a fork. gmemd may hand a range out again as
	 * soon as munmap(2) is done, before our request and our table say so: no mmap may get it in between. And a child
	 * must not inherit a mapping that is not registered yet: it would read silent zeros. */
	pthread_rwlock_t mapping;
	pthread_mutex_t lock;           /* guards what follows */
	size_t context_count;           /* open ones of process context_pid */
	pid_t context_pid;
	struct gmem_context *contexts;  /* open ones */
	/* gmem_contexts_cover(), once there has been a pool: what has no pools has no contexts either. */
	int (*cover)(struct gmem *session, uint64_t va, uint64_t bytes);
	struct gmem_heap_slot heap;
	struct gmem *next;              /* all of this process */
};

#define GMEM_SYSTEM_SOCKET "/run/gmem/gmemd.sock"

/* ---- session.c ---- */

/* $GMEM_SOCKET, or NULL. */
const char *gmem_session_chosen_socket(void);

int gmem_check_bytes(size_t bytes);
/* -EINVAL naming "options" if size is not that of a version of the struct that we know. */
int gmem_check_options(size_t size, size_t least, const char *what);
/* -ECONNRESET if gmemd is gone. */
int gmem_session_check(const struct gmem *session);
/* fn for each session that is open, and stays so meanwhile, until it gives something other than 0. -EAGAIN: a fork is under
 * way, or a session begins or ends. */
int gmem_session_each(int (*fn)(struct gmem *session, void *arg), void *arg);
/* The region at va has been mapped: gmemd registers it. */
int gmem_session_commit(struct gmem *session, uint64_t va);
/* As gmem_munmap(); may_keep: the addresses may stay mapped (GMEM_RING_KEEP). A program's own munmap(2) leaves none. */
int gmem_session_munmap(struct gmem *session, void *va, size_t bytes, bool may_keep);
/* Counts an open context, or with -1 a closed one. */
void gmem_session_count_contexts(struct gmem *session, int change);

/* ---- request.c ---- */

/* A request over the session's ring, waited for. A failure has its words, argument first. */
int gmem_session_call(struct gmem *session, struct gmem_ring_sqe *sqe, struct gmem_ring_cqe *ret);
/* Any hnid in an entry's 16 bits; what does not fit is none. */
int16_t gmem_ring_hnid(int hnid);

/* ---- embedded.c ---- */

/* Starts a private gmemd, or shares the one this process has if it asks for no devices. */
int gmem_embedded_get(const char *const *devices, size_t device_count, struct gmem_embedded **ret);
/* Lets it end with its last session, if this was its last user. */
void gmem_embedded_put(struct gmem_embedded *embedded);
const char *gmem_embedded_socket(const struct gmem_embedded *embedded);

#endif
