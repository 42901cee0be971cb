/* SPDX-License-Identifier: Apache-2.0
 *
 * Links and their life, fork included. Forks of one process are serialised, parent until child has joined, so that the
 * daemon can tell which child a fork event belongs to; the child joins (a session of its own, the shared regions served)
 * before fork() returns in it. If it can't, its regions are unmapped: a touch is SIGSEGV, never a silent zero.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <string.h>
#include <unistd.h>

#include "agent.h"
#include "atfork.h"
#include "beside.h"
#include "copies.h"
#include "cuda.h"
#include "forkpipe.h"
#include "link.h"
#include "ring.h"

#define CHILD_MS 30000

static pthread_mutex_t links_lock = PTHREAD_MUTEX_INITIALIZER;
static struct gmem_link *links; /* links_lock, which is held over a fork */
static struct gmem_fork_pipe joined = GMEM_NO_FORK_PIPE;

static void before_fork(void)
{
	int err = 0;

	pthread_mutex_lock(&links_lock);
	if (links)
		err = gmem_fork_pipe_open(&joined);
	for (struct gmem_link *link = links; link; link = link->next) {
		/* a child that nobody waits for can't take a copy: it would be of no one moment */
		link->torn = err ? err : gmem_copies_freeze(link);
		pthread_mutex_lock(&link->lock);
		gmem_beside_lock(link->beside);
		if (link->ring)
			gmem_ring_lock(link->ring);
		/* fork() waits until gmemd has read its event for each mapping that the child gets. */
		if (gmem_link_is_lost(link)) {
			gmem_link_withhold_locked(link);
			gmem_copies_withhold(link);
		}
	}
}

static bool any_copies(void)
{
	bool any = false;

	for (struct gmem_link *link = links; link; link = link->next)
		any = any || link->copies;
	return any;
}

static void unlock_links(void)
{
	for (struct gmem_link *link = links; link; link = link->next) {
		gmem_beside_unlock(link->beside);
		pthread_mutex_unlock(&link->lock);
	}
}

static void after_fork_parent(void)
{
	/* while it copies, nothing may be written here */
	gmem_fork_pipe_wait(&joined, any_copies() ? -1 : CHILD_MS);
	for (struct gmem_link *link = links; link; link = link->next)
		if (link->ring)
			gmem_ring_unlock(link->ring);
	unlock_links();
	for (struct gmem_link *link = links; link; link = link->next)
		gmem_copies_thaw(link);
	pthread_mutex_unlock(&links_lock);
}

/* In the child, single-threaded: what the parent left is closed, and the child becomes a session of its own. */
static void rejoin(struct gmem_link *link)
{
	uint8_t token[GMEM_WIRE_TOKEN_BYTES];
	bool context = link->context;

	memcpy(token, link->hello.token, sizeof(token));
	if (link->ring)
		gmem_ring_abandon(link->ring);
	link->ring = NULL;
	if (link->agent)
		gmem_agent_abandon(link->agent);
	link->agent = NULL;
	gmem_link_hang_up(link);
	link->pid = getpid();
	if (context) { /* a context's child has none of its memory */
		link->status = -ENOTCONN;
		return;
	}
	link->kept_count = 0; /* what of it is mapped here is out of use: gmemd keeps it for the parent only */
	for (size_t i = 0; i < link->region_count;) {
		if (link->regions[i].inherit)
			i++;
		else
			link->regions[i] = link->regions[--link->region_count];
	}
	link->status = gmem_link_handshake(link, GMEM_WIRE_FORK_CHILD, token, NULL);
	gmem_beside_unlock(link->beside);
	pthread_mutex_unlock(&link->lock);
	if (link->status) {
		gmem_link_unmap_all(link);
		gmem_copies_unmap(link);
	} else {
		gmem_copies_take(link);
	}
	pthread_mutex_lock(&link->lock);
	gmem_beside_lock(link->beside);
}

static void after_fork_child(void)
{
	gmem_cuda_forked();
	for (struct gmem_link *link = links; link; link = link->next)
		rejoin(link);
	gmem_fork_pipe_end(&joined);
	unlock_links();
	pthread_mutex_unlock(&links_lock);
}

static void install_handlers(void)
{
	gmem_atfork(before_fork, after_fork_parent, after_fork_child);
}

static int open_link(const char *path, uint32_t kind, const uint8_t *token, const char *device,
		     struct gmem_link **ret, char *message)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;
	struct gmem_link *link = calloc(1, sizeof(*link));
	int err;

	if (!link)
		return -ENOMEM;
	if (strlen(path) >= sizeof(link->path)) {
		free(link);
		snprintf(message, GMEM_WIRE_MESSAGE_BYTES, "path: longer than %d bytes", GMEM_WIRE_PATH_BYTES - 1);
		return -ENAMETOOLONG;
	}
	strcpy(link->path, path);
	pthread_mutex_init(&link->lock, NULL);
	link->pid = getpid();
	link->context = kind == GMEM_WIRE_CONTEXT;
	err = gmem_beside_create(&link->beside);
	if (err) {
		free(link);
		return err;
	}
	pthread_once(&once, install_handlers);
	/* A fork in the middle of the handshake waits for its end. */
	pthread_mutex_lock(&links_lock);
	err = gmem_link_handshake(link, kind, token, device);
	if (!err) {
		link->next = links;
		links = link;
	}
	pthread_mutex_unlock(&links_lock);
	if (err) {
		snprintf(message, GMEM_WIRE_MESSAGE_BYTES, "%s", link->message);
		gmem_beside_destroy(link->beside);
		pthread_mutex_destroy(&link->lock);
		free(link);
		return err;
	}
	*ret = link;
	return 0;
}

int gmem_link_open(const char *path, struct gmem_link **ret, char *message)
{
	return open_link(path, GMEM_WIRE_CLIENT, NULL, NULL, ret, message);
}

int gmem_link_open_context(const char *path, const uint8_t token[GMEM_WIRE_TOKEN_BYTES], const char *device,
			   struct gmem_link **ret, char *message)
{
	return open_link(path, GMEM_WIRE_CONTEXT, token, device, ret, message);
}

void gmem_link_stop_agent(struct gmem_link *link)
{
	if (link->agent)
		gmem_agent_stop(link->agent);
	link->agent = NULL;
}

void gmem_link_close(struct gmem_link *link)
{
	struct gmem_link **at;

	pthread_mutex_lock(&links_lock);
	for (at = &links; *at && *at != link; at = &(*at)->next)
		;
	if (*at)
		*at = link->next;
	pthread_mutex_unlock(&links_lock);
	if (link->ring)
		gmem_ring_destroy(link->ring);
	link->ring = NULL;
	gmem_link_stop_agent(link);
	/* If gmemd is gone, ours is the last: munmap would wait for it to read an event. */
	if (link->uffd >= 0)
		close(link->uffd);
	link->uffd = -1;
	gmem_link_unmap_all(link);
	gmem_link_hang_up(link);
	pthread_mutex_destroy(&link->lock);
	gmem_beside_destroy(link->beside);
	free(link->regions);
	free(link);
}

const uint8_t *gmem_link_token(const struct gmem_link *link)
{
	return link->hello.token;
}

const char *gmem_link_control(const struct gmem_link *link)
{
	return link->hello.control;
}

const char *gmem_link_events(const struct gmem_link *link)
{
	return link->hello.events;
}

uint64_t gmem_link_session(const struct gmem_link *link)
{
	return link->hello.session;
}

uint32_t gmem_link_flags(const struct gmem_link *link)
{
	return link->hello.flags;
}

uint64_t gmem_link_window_base(const struct gmem_link *link)
{
	return link->hello.window_base;
}

uint64_t gmem_link_window_bytes(const struct gmem_link *link)
{
	return link->hello.window_bytes;
}

int gmem_link_hnid(const struct gmem_link *link)
{
	return link->hello.hnid;
}

int gmem_link_socket(const struct gmem_link *link)
{
	return link->sock;
}

/* After READY gmemd says nothing, but that a successor, which can't know whether it was said, says it again. */
bool gmem_link_is_lost(const struct gmem_link *link)
{
	struct gmem_wire_ready again;
	ssize_t n = -1;

	if (link->sock < 0)
		return true;
	do {
		n = recv(link->sock, &again, sizeof(again), MSG_DONTWAIT);
	} while (n > 0 || (n < 0 && errno == EINTR));
	return n == 0 || (errno != EAGAIN && errno != EWOULDBLOCK);
}

static bool any_in(const struct gmem_link_region *regions, size_t count, uint64_t va, uint64_t bytes)
{
	for (size_t i = 0; i < count; i++)
		if (va < regions[i].va + regions[i].bytes && regions[i].va < va + bytes)
			return true;
	return false;
}

/* What was left mapped for the next region counts: a gmemd that has taken over knows nothing of that, offers the range again,
 * and would take the end of the old mapping for the new one's. */
bool gmem_link_any_maps(uint64_t va, uint64_t bytes)
{
	bool found = false;

	pthread_mutex_lock(&links_lock);
	for (struct gmem_link *link = links; link && !found; link = link->next) {
		pthread_mutex_lock(&link->lock);
		found = any_in(link->regions, link->region_count, va, bytes) || any_in(link->kept, link->kept_count, va, bytes);
		pthread_mutex_unlock(&link->lock);
	}
	pthread_mutex_unlock(&links_lock);
	return found;
}

int gmem_link_status(const struct gmem_link *link)
{
	return link->status;
}

const char *gmem_link_message(const struct gmem_link *link)
{
	return link->message;
}
