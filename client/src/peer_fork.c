/* SPDX-License-Identifier: Apache-2.0
 *
 * A forked child's peer-shared memory is a copy, made before fork() returns in the parent.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>

#include "atfork.h"
#include "error.h"
#include "forkpipe.h"
#include "peer.h"
#include "session.h"
#include "syscalls.h"

static struct gmem_fork_pipe copied = GMEM_NO_FORK_PIPE;
static int torn; /* over a fork: why its child can't get copies; 0: it can */

static int set_frozen(int advice)
{
	struct gmem *session = gmem_peer_session_if_open();
	struct gmem_piece piece;
	int err = 0;

	for (uintptr_t va = 0; gmem_pieces_next_locked(&gmem_peers, va, &piece); va = piece.end) {
		int here = piece.withheld ? 0 : gmem_hmadvise(session, GMEM_NO_HNID, (void *)piece.va, piece.end - piece.va, advice);

		err = err ? err : here;
	}
	return err;
}

/* Of nothing, if not of all. */
static int freeze(void)
{
	int err = set_frozen(GMEM_PEER_FREEZE);

	if (err)
		set_frozen(GMEM_PEER_THAW);
	return err;
}

/* A child that nobody waits for can't take a copy: it would be of no one moment. */
static void before_fork(void)
{
	pthread_mutex_lock(&gmem_peers.lock);
	torn = gmem_peers.count ? gmem_fork_pipe_open(&copied) : 0;
	if (torn)
		gmem_fail(torn, "%s", strerror(-torn));
	else
		torn = freeze();
}

static void after_fork_parent(void)
{
	gmem_fork_pipe_wait(&copied, -1);
	set_frozen(GMEM_PEER_THAW);
	pthread_mutex_unlock(&gmem_peers.lock);
}

/* Gives a forked child a copy of its own, at the same address. What it had there was the parent's. */
static int replace(struct gmem *session, const struct gmem_piece *peer)
{
	size_t bytes = peer->end - peer->va;
	uintptr_t fresh;
	int err = gmem_peer_map_fresh(session, bytes, &fresh);

	if (err)
		return err;
	err = gmem_peer_copy(session, fresh, peer->va, bytes);
	if (!err && gmem_sys_mremap((void *)fresh, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, (void *)peer->va) ==
			    MAP_FAILED)
		err = gmem_fail(-errno, "mremap: %s", strerror(errno));
	if (err) {
		gmem_session_munmap(session, (void *)fresh, bytes, false);
		return err;
	}
	gmem_link_forget(session->link, fresh, bytes);
	/* nothing is there any more: it returns when gmemd has heard of the move */
	gmem_session_munmap(session, (void *)fresh, bytes, false);
	if (peer->prot != (PROT_READ | PROT_WRITE) && gmem_sys_mprotect((void *)peer->va, bytes, peer->prot))
		err = -errno;
	return err;
}

static void take_copies(struct gmem *session)
{
	struct gmem_piece piece;

	for (uintptr_t va = 0; gmem_pieces_next_locked(&gmem_peers, va, &piece); va = piece.end) {
		if (!piece.withheld && !torn && !replace(session, &piece))
			continue;
		if (!piece.withheld)
			gmem_peer_say("memory could not be copied for a forked child, and is not mapped there");
		gmem_session_munmap(session, (void *)piece.va, piece.end - piece.va, false);
		gmem_pieces_remove_locked(&gmem_peers, piece.va, piece.end);
	}
}

static void after_fork_child(void)
{
	struct gmem *session = gmem_peer_session_if_open();

	if (!session || gmem_session_check(session)) { /* it could not join, and has no regions */
		gmem_pieces_remove_locked(&gmem_peers, 0, UINTPTR_MAX);
		gmem_peer_session_forget();
	} else {
		take_copies(session);
	}
	gmem_streams_forget();
	gmem_fork_pipe_end(&copied);
	pthread_mutex_unlock(&gmem_peers.lock);
}

/* Once the session is open, whose own handlers have to run before these in the child. */
void gmem_peer_install_handlers(void)
{
	gmem_atfork(before_fork, after_fork_parent, after_fork_child);
}
