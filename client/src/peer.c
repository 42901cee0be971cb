/* SPDX-License-Identifier: Apache-2.0
 *
 * The table of this process's peer-shared memory, and what mmap(2) and its kin do there. The table's lock is held over a
 * fork and never over a request: a piece is in the table only while it is mapped, taken out before it goes and put in
 * once it is there.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <libgmem.h>

#include "atfork.h"
#include "error.h"
#include "forkpipe.h"
#include "peer.h"
#include "session.h"
#include "syscalls.h"

#define PAGE_MASK (GMEM_PEER_PAGE - 1)
#define SMALL_MASK 4095ul
#define COPY_PAGES 512
#define HNODES_MAX 32

struct peer {
	uintptr_t va, end;
	uintptr_t asked_end; /* what lies behind it is there only because pages are that large */
	int prot;
	bool withheld; /* MADV_DONTFORK */
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* guards what follows; held over a fork */
static struct peer *peers; /* by address */
static size_t peer_count, peer_capacity;
static struct gmem_fork_pipe copied = GMEM_NO_FORK_PIPE;
static int torn; /* over a fork: why its child can't get copies; 0: it can */

static pthread_mutex_t session_lock = PTHREAD_MUTEX_INITIALIZER; /* of opening it */
static struct gmem *_Atomic default_session;

/* ---- table ---- */

/* Index of the first piece that ends behind va. */
static size_t find_locked(uintptr_t va)
{
	size_t low = 0, high = peer_count;

	while (low < high) {
		size_t mid = (low + high) / 2;

		if (peers[mid].end <= va)
			low = mid + 1;
		else
			high = mid;
	}
	return low;
}

static int insert_locked(const struct peer *peer)
{
	size_t at = find_locked(peer->va);

	if (peer_count == peer_capacity) {
		size_t capacity = peer_capacity ? peer_capacity * 2 : 16;
		struct peer *grown = realloc(peers, capacity * sizeof(*grown));

		if (!grown)
			return -ENOMEM;
		peers = grown;
		peer_capacity = capacity;
	}
	memmove(&peers[at + 1], &peers[at], (peer_count - at) * sizeof(*peers));
	peers[at] = *peer;
	peer_count++;
	return 0;
}

static void remove_locked(size_t at)
{
	memmove(&peers[at], &peers[at + 1], (peer_count - at - 1) * sizeof(*peers));
	peer_count--;
}

/* No piece lies on both sides of va afterwards. */
static int split_locked(uintptr_t va)
{
	size_t at = find_locked(va);
	struct peer upper;
	int err;

	if (at == peer_count || peers[at].va >= va)
		return 0;
	upper = peers[at];
	upper.va = va;
	peers[at].end = va;
	err = insert_locked(&upper);
	if (err)
		peers[at].end = upper.end;
	return err;
}

/* Takes out one piece of [at, end). */
static int take_out(uintptr_t at, uintptr_t end, struct peer *ret)
{
	size_t index;
	int err;

	pthread_mutex_lock(&lock);
	err = split_locked(at);
	if (!err)
		err = split_locked(end);
	index = find_locked(at);
	if (!err && (index == peer_count || peers[index].va >= end))
		err = GMEM_NOT_PEER;
	if (!err) {
		*ret = peers[index];
		remove_locked(index);
	}
	pthread_mutex_unlock(&lock);
	return err;
}

static int put_in(const struct peer *peer)
{
	int err;

	pthread_mutex_lock(&lock);
	err = insert_locked(peer);
	pthread_mutex_unlock(&lock);
	return err;
}

static bool peer_at(uintptr_t va, struct peer *ret)
{
	size_t at;
	bool found;

	pthread_mutex_lock(&lock);
	at = find_locked(va);
	found = at < peer_count && peers[at].va <= va;
	if (found)
		*ret = peers[at];
	pthread_mutex_unlock(&lock);
	return found;
}

bool gmem_peer_next(uintptr_t at, uintptr_t end, int prot, struct gmem_range *ret)
{
	bool found;
	size_t i;

	pthread_mutex_lock(&lock);
	i = find_locked(at);
	while (i < peer_count && (peers[i].prot & prot) != prot)
		i++;
	found = at < end && i < peer_count && peers[i].va < end;
	if (found) {
		uintptr_t start = peers[i].va > at ? peers[i].va : at, stop = peers[i].end < end ? peers[i].end : end;

		*ret = (struct gmem_range){ (void *)start, stop - start };
	}
	pthread_mutex_unlock(&lock);
	return found;
}

bool gmem_peer_covers(uintptr_t at, uintptr_t end, int prot)
{
	struct gmem_range piece;

	while (at < end && gmem_peer_next(at, end, prot, &piece) && (uintptr_t)piece.va == at)
		at += piece.bytes;
	return at >= end;
}

static bool is_peer(uintptr_t at, uintptr_t end)
{
	struct gmem_range piece;

	return gmem_peer_next(at, end, PROT_NONE, &piece);
}

/* ---- copies ---- */

/* dst reads zero before. What nobody has touched is not copied. */
static int copy_pages(struct gmem *session, uintptr_t dst, uintptr_t src, size_t bytes)
{
	struct gmem_page pages[COPY_PAGES];
	int err = 0;

	for (size_t done = 0, piece, count; !err && done < bytes; done += piece) {
		piece = bytes - done < COPY_PAGES * GMEM_PEER_PAGE ? bytes - done : COPY_PAGES * GMEM_PEER_PAGE;
		err = gmem_query(session, (void *)(src + done), piece, pages, COPY_PAGES, &count);
		for (size_t i = 0; !err && i < count; i++) {
			size_t at = done + i * GMEM_PEER_PAGE;

			if (pages[i].state != GMEM_PAGE_NOMAP)
				err = gmem_hmemcpy(session, GMEM_NO_HNID, (void *)(dst + at), (void *)(src + at),
						   GMEM_PEER_PAGE);
		}
	}
	return err;
}

/* The same for memory of several regions. */
static int copy_peers(struct gmem *session, uintptr_t dst, uintptr_t src, size_t bytes)
{
	uintptr_t at = src, end = src + bytes;
	struct gmem_range piece;
	int err = 0;

	while (!err && gmem_peer_next(at, end, PROT_NONE, &piece)) {
		at = (uintptr_t)piece.va;
		err = copy_pages(session, dst + (at - src), at, piece.bytes);
		at += piece.bytes;
	}
	return err;
}

static int map_fresh(struct gmem *session, size_t bytes, uintptr_t *ret)
{
	const struct gmem_mmap_options options = { .size = sizeof(options), .page_bytes = GMEM_PEER_PAGE };
	void *at;
	int err = gmem_mmap(session, bytes, &options, &at);

	if (!err)
		*ret = (uintptr_t)at;
	return err;
}

/* ---- fork: the child's memory is a copy, made before fork() returns in the parent ---- */

static int set_frozen(int advice)
{
	int err = 0;

	for (size_t i = 0; i < peer_count; i++) {
		size_t bytes = peers[i].end - peers[i].va;
		int here = peers[i].withheld ? 0 :
					       gmem_hmadvise(default_session, GMEM_NO_HNID, (void *)peers[i].va, bytes, advice);

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
	pthread_mutex_lock(&lock);
	torn = peer_count ? gmem_fork_pipe_open(&copied) : 0;
	if (torn)
		gmem_fail(torn, "%s", strerror(-torn));
	else
		torn = freeze();
}

static void after_fork_parent(void)
{
	gmem_fork_pipe_wait(&copied, -1);
	set_frozen(GMEM_PEER_THAW);
	pthread_mutex_unlock(&lock);
}

/* Gives a forked child a copy of its own, at the same address. What it had there was the parent's. */
static int replace(struct gmem *session, const struct peer *peer)
{
	size_t bytes = peer->end - peer->va;
	uintptr_t fresh;
	int err = map_fresh(session, bytes, &fresh);

	if (err)
		return err;
	err = copy_pages(session, fresh, peer->va, bytes);
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

/* Past stdio, which a forked child shares with its parent. */
static void say(const char *what)
{
	dprintf(STDERR_FILENO, "libgmem: %s: %s\n", what, gmem_last_error());
}

static void take_copies(struct gmem *session)
{
	for (size_t i = 0; i < peer_count;) {
		struct peer *peer = &peers[i];

		if (!peer->withheld && !torn && !replace(session, peer)) {
			i++;
			continue;
		}
		if (!peer->withheld)
			say("memory could not be copied for a forked child, and is not mapped there");
		gmem_session_munmap(session, (void *)peer->va, peer->end - peer->va, false);
		remove_locked(i);
	}
}

static void after_fork_child(void)
{
	struct gmem *session = default_session;

	if (!session || gmem_session_check(session)) { /* it could not join, and has no regions */
		peer_count = 0;
		default_session = NULL;
	} else {
		take_copies(session);
	}
	gmem_streams_forget();
	gmem_fork_pipe_end(&copied);
	pthread_mutex_unlock(&lock);
}

/* Another thread of the parent may have been opening a session, which the child then does not have. */
static void forget_opening(void)
{
	pthread_mutex_init(&session_lock, NULL);
}

static void install_first(void)
{
	gmem_atfork(NULL, NULL, forget_opening);
}

/* Once the session is open, whose own handlers have to run before these in the child. */
static void install_handlers(void)
{
	gmem_atfork(before_fork, after_fork_parent, after_fork_child);
}

/* ---- session ---- */

static void warn_once(const char *what)
{
	static atomic_flag said = ATOMIC_FLAG_INIT;

	if (!atomic_flag_test_and_set(&said))
		say(what);
}

struct gmem *gmem_peer_session_if_open(void)
{
	return default_session;
}

/* No private gmemd is started: it would have no devices. */
int gmem_peer_session(struct gmem **ret)
{
	static pthread_once_t first = PTHREAD_ONCE_INIT, handlers = PTHREAD_ONCE_INIT;
	const char *path = gmem_session_chosen_socket();
	int err = 0;

	pthread_once(&first, install_first);
	pthread_mutex_lock(&session_lock);
	if (!default_session) {
		struct gmem *session;

		err = gmem_open(path ? path : GMEM_SYSTEM_SOCKET, NULL, &session);
		if (!err) {
			pthread_once(&handlers, install_handlers);
			default_session = session;
		}
	}
	pthread_mutex_unlock(&session_lock);
	if (err) {
		warn_once("no gmemd");
		return gmem_fail(-ENOTCONN, "no gmemd: %s", gmem_strerror(err));
	}
	*ret = default_session;
	return 0;
}

static int list_devices(struct gmem_device_info *ret, size_t *ret_count)
{
	struct gmem *session;
	int err = gmem_peer_session(&session);

	if (!err)
		err = gmem_devices(session, ret, sizeof(*ret), HNODES_MAX, ret_count);
	if (!err && *ret_count > HNODES_MAX)
		*ret_count = HNODES_MAX;
	return err;
}

int gmem_peer_device(void)
{
	struct gmem_device_info devices[HNODES_MAX];
	size_t count;
	int err = list_devices(devices, &count), first = -1;

	for (size_t i = 0; !err && i < count; i++)
		if ((devices[i].caps & GMEM_CAP_COMPUTE) && (first < 0 || devices[i].hnid < first))
			first = devices[i].hnid;
	if (!err && first < 0)
		err = gmem_fail(-ENODEV, "no device is attached");
	return err ? err : first;
}

int gmem_peer_check_hnid(int hnid)
{
	struct gmem_device_info devices[HNODES_MAX];
	size_t count;

	if (!list_devices(devices, &count))
		for (size_t i = 0; i < count; i++)
			if (devices[i].hnid == hnid)
				return 0;
	return gmem_fail(-EINVAL, "hnid: there is no hnode %d", hnid);
}

/* ---- mmap and its kin ---- */

static int map(size_t bytes, int prot, struct peer *ret)
{
	struct gmem *session;
	int err = gmem_peer_session(&session);

	if (!err && gmem_peer_device() < 0) {
		err = -ENODEV;
		warn_once("mmap(MAP_PEER_SHARED)");
	}
	if (bytes > SIZE_MAX / 2)
		err = -ENOMEM;
	*ret = (struct peer){ .prot = prot };
	if (!err)
		err = map_fresh(session, (bytes + PAGE_MASK) & ~PAGE_MASK, &ret->va);
	if (err)
		return -ENOMEM;
	ret->end = ret->va + ((bytes + PAGE_MASK) & ~PAGE_MASK);
	ret->asked_end = ret->va + bytes;
	if (prot != (PROT_READ | PROT_WRITE) && gmem_sys_mprotect((void *)ret->va, ret->end - ret->va, prot))
		err = -errno;
	if (!err)
		err = put_in(ret);
	if (err)
		gmem_session_munmap(session, (void *)ret->va, ret->end - ret->va, false);
	return err;
}

static int peer_mmap(size_t bytes, int prot, bool populate, void **ret)
{
	struct peer peer;
	int err = bytes ? map(bytes, prot, &peer) : -EINVAL;

	if (err)
		return err;
	if (populate) /* as in the kernel, no matter how far it gets */
		gmem_prefetch(default_session, GMEM_HOST, (void *)peer.va, peer.end - peer.va);
	*ret = (void *)peer.va;
	return 0;
}

/* Of the pieces that lie in the range; what is between them is left. */
static int unmap_peers(uintptr_t at, uintptr_t end)
{
	struct peer peer;
	int err;

	while (!(err = take_out(at, end, &peer))) {
		err = gmem_session_munmap(default_session, (void *)peer.va, peer.end - peer.va, false);
		if (err) {
			put_in(&peer);
			return err;
		}
	}
	return err == GMEM_NOT_PEER ? 0 : err;
}

static int unmap_rest(uintptr_t at, uintptr_t end)
{
	struct gmem_range piece;
	int err = 0;

	while (!err && at < end) {
		uintptr_t stop = end, next = end;

		if (gmem_peer_next(at, end, PROT_NONE, &piece)) {
			stop = (uintptr_t)piece.va;
			next = stop + piece.bytes;
		}
		if (stop > at && gmem_sys_munmap((void *)at, stop - at))
			err = -errno;
		at = next;
	}
	return err;
}

static int peer_munmap(uintptr_t va, size_t bytes)
{
	uintptr_t end, last;
	struct peer peer;
	int err;

	if (__builtin_add_overflow(va, bytes, &end) || end > UINTPTR_MAX - PAGE_MASK || !bytes || !is_peer(va, end))
		return GMEM_NOT_PEER; /* the kernel knows what to say */
	last = end - 1;
	if (va & (peer_at(va, &peer) ? PAGE_MASK : SMALL_MASK))
		return -EINVAL;
	end = peer_at(last, &peer) ? (end + PAGE_MASK) & ~PAGE_MASK : (end + SMALL_MASK) & ~SMALL_MASK;
	err = unmap_rest(va, end);
	return err ? err : unmap_peers(va, end);
}

static int shrink(uintptr_t end, uintptr_t new_end, uintptr_t asked_end)
{
	int err = end > new_end ? unmap_peers(new_end, end) : 0;
	size_t at;

	pthread_mutex_lock(&lock);
	at = find_locked(new_end - 1);
	if (!err && at < peer_count && peers[at].va < new_end && peers[at].end == new_end)
		peers[at].asked_end = asked_end;
	pthread_mutex_unlock(&lock);
	return err;
}

/* Protections go along; what is new gets that of the last piece. */
static int protect_like(uintptr_t to, uintptr_t from, size_t bytes, size_t new_bytes);

static int grow(uintptr_t va, size_t bytes, size_t new_bytes, void **ret)
{
	struct peer larger;
	int err = map(new_bytes, PROT_READ | PROT_WRITE, &larger);

	if (err)
		return err;
	err = copy_peers(default_session, larger.va, va, bytes);
	if (!err)
		err = protect_like(larger.va, va, bytes, larger.end - larger.va);
	if (!err)
		err = unmap_peers(va, va + bytes);
	if (err) {
		unmap_peers(larger.va, larger.end);
		return -ENOMEM;
	}
	*ret = (void *)larger.va;
	return 0;
}

static int peer_mremap(uintptr_t va, size_t bytes, size_t new_bytes, int flags, void **ret)
{
	size_t whole, new_whole;
	struct peer peer;

	if (!peer_at(va, &peer))
		return GMEM_NOT_PEER;
	if (va & PAGE_MASK || !bytes || !new_bytes || flags & ~MREMAP_MAYMOVE)
		return -EINVAL;
	if (bytes > SIZE_MAX / 2 || new_bytes > SIZE_MAX / 2)
		return -ENOMEM;
	whole = (bytes + PAGE_MASK) & ~PAGE_MASK;
	new_whole = (new_bytes + PAGE_MASK) & ~PAGE_MASK;
	if (!gmem_peer_covers(va, va + whole, PROT_NONE))
		return -EFAULT;
	if (new_whole > whole)
		return flags & MREMAP_MAYMOVE ? grow(va, whole, new_bytes, ret) : -ENOMEM;
	*ret = (void *)va;
	return shrink(va + whole, va + new_whole, va + new_bytes);
}

static int set_prot(uintptr_t at, uintptr_t end, int prot)
{
	int err;

	if (gmem_sys_mprotect((void *)at, end - at, prot))
		return -errno;
	pthread_mutex_lock(&lock);
	err = split_locked(at);
	if (!err)
		err = split_locked(end);
	for (size_t i = find_locked(at); !err && i < peer_count && peers[i].va < end; i++)
		peers[i].prot = prot;
	pthread_mutex_unlock(&lock);
	return err;
}

static int protect_like(uintptr_t to, uintptr_t from, size_t bytes, size_t new_bytes)
{
	uintptr_t at = from, end = from + bytes;
	struct peer peer;
	int err = 0;

	while (!err && at < end && peer_at(at, &peer)) {
		uintptr_t stop = peer.end < end ? to + (peer.end - from) : to + new_bytes;

		if (peer.prot != (PROT_READ | PROT_WRITE))
			err = set_prot(to + (at - from), stop, peer.prot);
		at = peer.end;
	}
	return err;
}

/* Whole pages: what a program asked for ends before its last page does, and stands for all of it. */
static int peer_mprotect(uintptr_t va, size_t bytes, int prot)
{
	uintptr_t end, whole;
	struct peer last;

	if (__builtin_add_overflow(va, bytes, &end) || end > UINTPTR_MAX - PAGE_MASK || !is_peer(va, end))
		return GMEM_NOT_PEER;
	end = (end + SMALL_MASK) & ~SMALL_MASK;
	whole = (end + PAGE_MASK) & ~PAGE_MASK;
	if (va & PAGE_MASK || (end != whole && peer_at(end, &last) && end < last.asked_end))
		return -EINVAL;
	if (!gmem_peer_covers(va, whole, PROT_NONE))
		return -ENOMEM;
	return set_prot(va, whole, prot);
}

/* ---- madvise ---- */

/* Part of a page reads zero afterwards. */
static int zero(uintptr_t at, uintptr_t end)
{
	struct gmem_page page;
	size_t count;
	int err;

	if (at >= end)
		return 0;
	err = gmem_query(default_session, (void *)at, end - at, &page, 1, &count);
	if (err || page.state == GMEM_PAGE_NOMAP)
		return err;
	if (!gmem_peer_covers(at, end, PROT_READ | PROT_WRITE))
		return -EINVAL;
	memset((void *)at, 0, end - at);
	return 0;
}

/* MADV_DONTNEED of private memory: it reads zero. MADV_FREE allows the old content, so parts of pages keep it. */
static int drop(uintptr_t at, uintptr_t end, bool parts)
{
	uintptr_t first = (at + PAGE_MASK) & ~PAGE_MASK, last = end & ~PAGE_MASK;
	struct gmem_range piece;
	int err = 0;

	if (parts && first > last)
		return zero(at, end);
	if (parts)
		err = zero(at, first);
	if (!err && parts)
		err = zero(last, end);
	while (!err && gmem_peer_next(first, last, PROT_NONE, &piece)) {
		err = gmem_discard(default_session, piece.va, piece.bytes);
		first = (uintptr_t)piece.va + piece.bytes;
	}
	return err;
}

/* The child's handler leaves it out; the kernel is not told, as it would undo what gmem decides for forks. */
static int withhold(uintptr_t at, uintptr_t end, bool withheld)
{
	int err;

	if ((at | end) & PAGE_MASK)
		return -EINVAL;
	pthread_mutex_lock(&lock);
	err = split_locked(at);
	if (!err)
		err = split_locked(end);
	for (size_t i = find_locked(at); !err && i < peer_count && peers[i].va < end; i++)
		peers[i].withheld = withheld;
	pthread_mutex_unlock(&lock);
	return err;
}

static int hint(uintptr_t at, uintptr_t end, int advice)
{
	int err = gmem_hmadvise(default_session, GMEM_HOST, (void *)at, end - at, advice);

	return err == -ENOMEM || err == -ENOSPC ? 0 : err; /* it was a hint */
}

static int peer_madvise(uintptr_t va, size_t bytes, int advice)
{
	uintptr_t end;

	if (__builtin_add_overflow(va, bytes, &end) || end > UINTPTR_MAX - SMALL_MASK || !is_peer(va, end) ||
	    va & SMALL_MASK)
		return GMEM_NOT_PEER;
	end = (end + SMALL_MASK) & ~SMALL_MASK;
	if (!gmem_peer_covers(va, end, PROT_NONE))
		return -ENOMEM;
	switch (advice) {
	case MADV_DONTNEED:
	case MADV_FREE:
		return drop(va, end, advice == MADV_DONTNEED);
	case MADV_WILLNEED:
		return hint(va, end, GMEM_ADVISE_PREFETCH);
	case MADV_COLD:
	case MADV_PAGEOUT:
		return hint(va, end, GMEM_ADVISE_COLD);
	case MADV_DONTFORK:
	case MADV_DOFORK:
		return withhold(va, (end + PAGE_MASK) & ~PAGE_MASK, advice == MADV_DONTFORK);
	case MADV_NORMAL:
	case MADV_RANDOM:
	case MADV_SEQUENTIAL:
	case MADV_HUGEPAGE:
	case MADV_NOHUGEPAGE:
	case MADV_DODUMP:
		return 0;
	case MADV_REMOVE: /* of files */
	case MADV_MERGEABLE:
		return -EINVAL;
	default:
		return GMEM_NOT_PEER;
	}
}

/* ---- for libgmem-preload.so ---- */

static int peer_window(uintptr_t *ret_base, size_t *ret_bytes)
{
	struct gmem *session = default_session;

	if (!session)
		return -ENOTCONN;
	*ret_base = gmem_link_window_base(session->link);
	*ret_bytes = gmem_link_window_bytes(session->link);
	return 0;
}

static int peer_moved(uint64_t *ret_to_device, uint64_t *ret_to_host)
{
	struct gmem_device_info devices[HNODES_MAX];
	uint64_t in = 0, out = 0;
	size_t count;
	int err = list_devices(devices, &count);

	for (size_t i = 0; !err && i < count; i++) {
		if (devices[i].caps & GMEM_CAP_COMPUTE) {
			in += devices[i].in_bytes;
			out += devices[i].out_bytes;
		}
	}
	if (!err) {
		*ret_to_device = in / GMEM_PEER_PAGE;
		*ret_to_host = out / GMEM_PEER_PAGE;
	}
	return err;
}

const struct gmem_peer_calls *gmem_peer_calls(void)
{
	static const struct gmem_peer_calls calls = {
		.size = sizeof(calls), .mmap = peer_mmap, .munmap = peer_munmap, .mremap = peer_mremap,
		.mprotect = peer_mprotect, .madvise = peer_madvise, .window = peer_window, .hmadvise = hmadvise,
		.device = gmem_peer_device, .moved = peer_moved,
	};

	return &calls;
}
