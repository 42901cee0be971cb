/* SPDX-License-Identifier: Apache-2.0
 *
 * A forked child has a copy of everything, made before fork() returns in the parent: the parent's memory is frozen
 * meanwhile, so its other threads read and do not write. Until the copy is there the child's mapping is its parent's
 * memory, which it must not write to. What runs in it before is the C library, whose own allocations are plain memory, and
 * code here, on a plain stack.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <unistd.h>

#include "any.h"
#include "extents.h"
#include "forkpipe.h"
#include "heap.h"
#include "interpose.h"
#include "peer.h"
#include "session.h"
#include "syscalls.h"

#define USUAL (PROT_READ | PROT_WRITE)

/* What has the same fate and lies side by side. */
struct run {
	uintptr_t va, end;
	bool withheld, wiped;
	bool heap;
};

static struct gmem_fork_pipe copied = GMEM_NO_FORK_PIPE; /* of the fork under way */
static int torn; /* of the fork under way: its child can't get a copy of one moment; 0: it can */
static struct gmem_fork_pipe spare = GMEM_NO_FORK_PIPE;  /* for the next one: there may be no descriptors to be had then */

static bool next_run(uintptr_t va, struct run *ret)
{
	struct gmem_any_piece piece;

	if (!gmem_any_next_locked(va, &piece))
		return false;
	*ret = (struct run){ piece.va, piece.end, piece.withheld, piece.wiped, piece.heap };
	while (gmem_any_next_locked(ret->end, &piece) && piece.va == ret->end && piece.withheld == ret->withheld &&
	       piece.wiped == ret->wiped && piece.heap == ret->heap)
		ret->end = piece.end;
	return true;
}

static int set_frozen(int advice)
{
	struct run run;
	int err = 0;

	for (uintptr_t va = 0; next_run(va, &run); va = run.end)
		if (!run.withheld && !run.wiped &&
		    gmem_hmadvise(gmem_any.session, GMEM_NO_HNID, (void *)run.va, run.end - run.va, advice))
			err = -EAGAIN;
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

static void reserve(void)
{
	if (spare.fds[0] < 0)
		gmem_fork_pipe_open(&spare);
}

static void renew(void)
{
	reserve();
	gmem_any_hide_fds();
}

int *gmem_any_fork_fd(int i)
{
	return i < 2 ? &spare.fds[i] : NULL;
}

static void before_fork(void)
{
	int here;

	gmem_any_heap_lock();
	gmem_any_map_lock();
	gmem_any_lock_fds();
	/* A child would write to this stack before it has one of its own, and wait for ever. */
	if (gmem_any_in_window(&here, sizeof(here)))
		gmem_any_die("a program can't fork while it runs on a stack in managed memory");
	reserve();
	copied = spare;
	spare = (struct gmem_fork_pipe)GMEM_NO_FORK_PIPE;
	if (copied.fds[0] < 0)
		gmem_any_die("a program can't fork: no descriptors are left");
	torn = freeze();
}

static void after_fork_parent(void)
{
	gmem_fork_pipe_wait(&copied, -1);
	set_frozen(GMEM_PEER_THAW);
	gmem_any_unlock_fds();
	renew();
	gmem_any_map_unlock();
	gmem_any_heap_unlock();
}

/* ---- the child's ---- */

static int protect(uintptr_t va, uintptr_t end)
{
	struct gmem_any_piece piece;

	for (; gmem_any_next_locked(va, &piece) && piece.va < end; va = piece.end)
		if (piece.prot != USUAL && gmem_sys_mprotect((void *)piece.va, piece.end - piece.va, piece.prot))
			return -errno;
	return 0;
}

/* Puts a copy, or with wiped nothing, where the parent's memory was. */
static int replace(const struct run *run)
{
	struct gmem *session = gmem_any.session;
	size_t bytes = run->end - run->va;
	const struct gmem_mmap_options options = { .size = sizeof(options), .flags = GMEM_MMAP_SMALL,
						   .page_bytes = run->heap ? gmem_any.page_bytes : 4096 };
	struct gmem_ring_sqe sqe = { .op = GMEM_RING_HMEMCPY, .flags = GMEM_RING_TOUCHED, .hnid = -1, .bytes = bytes,
				     .arg = run->va };
	void *fresh, *want = (void *)run->va;
	int err = gmem_mmap(session, bytes, &options, &fresh);

	if (err)
		return err;
	sqe.va = (uintptr_t)fresh;
	if (!run->wiped)
		err = gmem_session_call(session, &sqe, NULL);
	if (!err && gmem_sys_mremap(fresh, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, want) == MAP_FAILED)
		err = -errno;
	if (err)
		return err;
	gmem_link_forget(session->link, (uintptr_t)fresh, bytes);
	/* nothing is there any more: it returns when gmemd has heard of the move */
	gmem_session_munmap(session, fresh, bytes, false);
	return protect(run->va, run->end);
}

static void after_fork_child(void)
{
	int err = torn ? torn : gmem_session_check(gmem_any.session);
	struct run run;

	for (uintptr_t va = 0; !err && next_run(va, &run); va = run.end) {
		if (run.withheld) {
			gmem_session_munmap(gmem_any.session, (void *)run.va, run.end - run.va, false);
			gmem_any_remove_locked(run.va, run.end);
		} else {
			err = replace(&run);
		}
	}
	gmem_any_forget_pins();
	if (err)
		gmem_any_die("a forked child could not get a copy of its memory: %s", gmem_last_error());
	gmem_fork_pipe_end(&copied);
	gmem_any_unlock_fds();
	renew();
	gmem_any_map_unlock();
	gmem_any_heap_unlock();
}

/* ---- order ---- */

static void notes_parent(void)
{
	gmem_notes_unlock();
	gmem_allocator_fork.parent();
}

static void notes_child(void)
{
	gmem_notes_unlock();
	gmem_allocator_fork.child();
}

int gmem_any_fork_first(void)
{
	return gmem_atfork(gmem_notes_lock, notes_parent, notes_child);
}

static void before_plain_fork(void)
{
	gmem_any_heap_lock();
}

int gmem_any_fork_last(void)
{
	if (!gmem_any.session)
		return gmem_atfork(before_plain_fork, gmem_any_heap_unlock, gmem_any_heap_unlock);
	reserve();
	return gmem_atfork(before_fork, after_fork_parent, after_fork_child);
}
