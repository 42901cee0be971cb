/* SPDX-License-Identifier: Apache-2.0
 *
 * Peer-shared memory: what a program got by mmap(MAP_PEER_SHARED). It is private memory to the program: a forked child
 * gets a copy. The functions are for libgmem-preload.so, which finds them through gmem_peer_calls(); they return 0, -errno,
 * or GMEM_NOT_PEER if nothing in the range is peer-shared, and block no signals themselves.
 */
#ifndef GMEM_CLIENT_PEER_H
#define GMEM_CLIENT_PEER_H

#include <gmem.h>

#include "pieces.h"

#define GMEM_PEER_PAGE (2ul << 20)
#define GMEM_NOT_PEER GMEM_NO_PIECE

/* Advice of gmem_hmadvise(). For a fork: what is frozen is not written to until it is thawed. ZERO: every byte reads zero. */
enum { GMEM_PEER_FREEZE = 0x1020, GMEM_PEER_THAW = 0x1021, GMEM_PEER_ZERO = 0x1022 };

struct gmem_peer_calls {
	size_t size; /* of this struct: libraries of two versions do not work together */
	int (*mmap)(size_t bytes, int prot, bool populate, void **ret);
	int (*munmap)(uintptr_t va, size_t bytes);
	int (*mremap)(uintptr_t va, size_t bytes, size_t new_bytes, int flags, void **ret);
	int (*mprotect)(uintptr_t va, size_t bytes, int prot);
	int (*madvise)(uintptr_t va, size_t bytes, int advice);
	/* All peer-shared memory lies in it. -ENOTCONN: there is none yet. */
	int (*window)(uintptr_t *ret_base, size_t *ret_bytes);
	int (*hmadvise)(int hnid, unsigned long start, size_t bytes, int behaviour);
	/* Hnid of the first device, or -errno. */
	int (*device)(void);
	/* Pages moved from the host to devices, and back. */
	int (*moved)(uint64_t *ret_to_device, uint64_t *ret_to_host);
};

GMEM_API const struct gmem_peer_calls *gmem_peer_calls(void);

/* ---- peer_session.c ---- */

/* The session over which this interface works: one for each process, opened when it is first needed. */
int gmem_peer_session(struct gmem **ret);
/* The same if it is open already, else NULL. */
struct gmem *gmem_peer_session_if_open(void);

/* A forked child that could not join has none. */
void gmem_peer_session_forget(void);

/* Past stdio, which a forked child shares with its parent; with gmem_last_error(). */
void gmem_peer_say(const char *what);
void gmem_peer_warn_once(const char *what);

/* Hnid of the first device, or -errno. */
int gmem_peer_device(void);
int gmem_peer_moved(uint64_t *ret_to_device, uint64_t *ret_to_host);
/* 0, or -EINVAL if there is no such hnode. */
int gmem_peer_check_hnid(int hnid);

/* ---- peer.c ---- */

extern struct gmem_pieces gmem_peers;

/* Pages of 2 MiB that are in no table yet. */
int gmem_peer_map_fresh(struct gmem *session, size_t bytes, uintptr_t *ret);
/* dst reads zero before. What nobody has touched is not copied. */
int gmem_peer_copy(struct gmem *session, uintptr_t dst, uintptr_t src, size_t bytes);
/* The first piece of peer-shared memory in [at, end) with all of these protections; false: there is none. */
bool gmem_peer_next(uintptr_t at, uintptr_t end, int prot, struct gmem_range *ret);
/* Whether the whole range is such memory. */
bool gmem_peer_covers(uintptr_t at, uintptr_t end, int prot);

/* ---- peer_fork.c ---- */

/* Once the session is open, whose own handlers have to run before these in the child. */
void gmem_peer_install_handlers(void);

/* ---- stream.c ---- */

struct gmem_ring_sqe;

/* Queues a request behind those of the same stream. What becomes of it is gmemStreamSynchronize()'s to say. */
int gmem_stream_add(struct gmem *session, void *stream, struct gmem_ring_sqe *sqe);
/* In a forked child: the parent's are not its own. */
void gmem_streams_forget(void);

#endif
