/* SPDX-License-Identifier: Apache-2.0
 *
 * Files that do not come with the handshake: a connection of its own, made at the first question and then kept, on which
 * gmemd answers which file is to be mapped where.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "link.h"
#include "syscalls.h"

#define TRIES_MAX 50
#define AGAIN_NS 50000000
#define ANSWER_S 30

static struct gmem_wire_header header(enum gmem_wire_type type)
{
	return (struct gmem_wire_header){ GMEM_WIRE_MAGIC, GMEM_WIRE_VERSION, (uint16_t)type };
}

static int put(int sock, const void *data, size_t bytes)
{
	ssize_t n;

	do {
		n = send(sock, data, bytes, MSG_NOSIGNAL);
	} while (n < 0 && errno == EINTR);
	return n < 0 ? -errno : 0;
}

/* One message of that type and size, and its descriptor if it has one. */
static int get(int sock, enum gmem_wire_type type, void *data, size_t bytes, int *ret_fd)
{
	char control[CMSG_SPACE(sizeof(int))] = { 0 };
	struct iovec iov = { data, bytes };
	struct msghdr message = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control,
				  .msg_controllen = sizeof(control) };
	const struct gmem_wire_header *got = data;
	struct cmsghdr *c;
	ssize_t n;

	*ret_fd = -1;
	do {
		n = recvmsg(sock, &message, MSG_CMSG_CLOEXEC);
	} while (n < 0 && errno == EINTR);
	if (n < 0)
		return errno == EAGAIN ? -ETIMEDOUT : -errno;
	c = CMSG_FIRSTHDR(&message);
	if (c && c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS)
		memcpy(ret_fd, CMSG_DATA(c), sizeof(int));
	if (n == 0)
		return -ECONNRESET;
	if ((size_t)n == bytes && got->magic == GMEM_WIRE_MAGIC && got->version == GMEM_WIRE_VERSION && got->type == type)
		return 0;
	if (*ret_fd >= 0)
		close(*ret_fd);
	return -EPROTO;
}

void gmem_link_close_files(struct gmem_link *link)
{
	if (link->files_sock >= 0)
		close(link->files_sock);
	link->files_sock = -1;
}

static int dial(struct gmem_link *link)
{
	struct gmem_wire_hello hello = { .header = header(GMEM_WIRE_HELLO), .kind = GMEM_WIRE_FILES };
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	const struct timeval patience = { .tv_sec = ANSWER_S };
	struct gmem_wire_welcome welcome;
	int fd, err;

	strcpy(address.sun_path, link->path);
	memcpy(hello.token, link->hello.token, sizeof(hello.token));
	memcpy(hello.device, link->device, sizeof(hello.device));
	link->files_sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	if (link->files_sock < 0)
		return -errno;
	setsockopt(link->files_sock, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
	setsockopt(link->files_sock, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience));
	err = connect(link->files_sock, (struct sockaddr *)&address, sizeof(address)) ? -errno :
	      put(link->files_sock, &hello, sizeof(hello));
	if (!err || err == -EPIPE)
		err = get(link->files_sock, GMEM_WIRE_WELCOME, &welcome, sizeof(welcome), &fd);
	if (!err)
		err = welcome.status;
	if (err)
		gmem_link_close_files(link);
	return err;
}

/* A gmemd that is started again takes the next connection. */
static int ask_locked(struct gmem_link *link, enum gmem_wire_ask_what what, uint64_t va, uint64_t bytes,
		      struct gmem_wire_answer *ret, int *ret_fd)
{
	const struct gmem_wire_ask ask = { .header = header(GMEM_WIRE_ASK), .what = what, .va = va, .bytes = bytes };
	const struct timespec pause = { 0, AGAIN_NS };
	int err = -ECONNRESET;

	for (int tries = 0; (err == -ECONNRESET || err == -EPIPE) && tries < TRIES_MAX; tries++) {
		if (tries > 1)
			nanosleep(&pause, NULL);
		err = link->files_sock < 0 ? dial(link) : 0;
		if (!err)
			err = put(link->files_sock, &ask, sizeof(ask));
		if (!err)
			err = get(link->files_sock, GMEM_WIRE_ANSWER, ret, sizeof(*ret), ret_fd);
		if (err)
			gmem_link_close_files(link);
	}
	if (!err && ret->status && *ret_fd >= 0)
		close(*ret_fd);
	return err ? err : ret->status;
}

static int ask(struct gmem_link *link, enum gmem_wire_ask_what what, uint64_t va, uint64_t bytes,
	       struct gmem_wire_answer *ret, int *ret_fd)
{
	int err;

	pthread_mutex_lock(&link->lock);
	err = ask_locked(link, what, va, bytes, ret, ret_fd);
	pthread_mutex_unlock(&link->lock);
	if (!err && what == GMEM_WIRE_ASK_FILE && *ret_fd < 0)
		err = -EPROTO;
	return err;
}

/* gmemd's word is taken for where; but never over what is there already. */
static bool in_window(const struct gmem_link *link, uint64_t va, uint64_t bytes)
{
	uint64_t offset = va - link->hello.window_base;

	return va >= link->hello.window_base && offset < link->hello.window_bytes && bytes <= link->hello.window_bytes - offset;
}

static void mark_pooled(struct gmem_link *link, uint64_t va)
{
	pthread_mutex_lock(&link->lock);
	for (size_t i = 0; i < link->region_count; i++)
		if (link->regions[i].va == va)
			link->regions[i].pooled = true;
	pthread_mutex_unlock(&link->lock);
}

bool gmem_link_is_pooled(struct gmem_link *link, uint64_t va, uint64_t bytes)
{
	bool pooled = false;

	pthread_mutex_lock(&link->lock);
	for (size_t i = 0; i < link->region_count; i++) {
		const struct gmem_link_region *region = &link->regions[i];

		pooled |= region->pooled && region->va < va + bytes && va < region->va + region->bytes;
	}
	pthread_mutex_unlock(&link->lock);
	return pooled;
}

int gmem_link_map_file(struct gmem_link *link, uint64_t va, bool inherit)
{
	struct gmem_wire_answer answer;
	int fd, err = ask(link, GMEM_WIRE_ASK_FILE, va, 0, &answer, &fd);

	if (err)
		return err;
	err = in_window(link, answer.va, answer.bytes) && answer.va == va ? 0 : -EPROTO;
	if (!err)
		err = gmem_link_map_fd(link, va, answer.bytes, fd, answer.offset, answer.flags & GMEM_WIRE_REGION_READ_ONLY,
				       inherit);
	close(fd);
	if (!err)
		mark_pooled(link, va);
	return err;
}

/* A stray thread of a kernel's that touches it meanwhile gets SIGSEGV, and never what is not gmemd's answer. */
static int cover(struct gmem_link *link, uint64_t va, uint64_t bytes, int fd, uint64_t offset, bool read_only,
		 enum gmem_wire_ask_what what)
{
	int how = (read_only ? MAP_PRIVATE : MAP_SHARED) | MAP_NORESERVE | MAP_FIXED, none;
	void *at = (void *)(uintptr_t)va;
	struct gmem_wire_answer answer;
	int err;

	if (gmem_sys_mmap(at, bytes, PROT_NONE, how, fd, (off_t)offset) == MAP_FAILED)
		return -errno;
	gmem_sys_madvise(at, bytes, MADV_DONTDUMP);
	err = ask(link, what, va, bytes, &answer, &none);
	if (!err && mprotect(at, bytes, PROT_READ | (read_only ? 0 : PROT_WRITE)))
		err = -errno;
	return err;
}

int gmem_link_overlay(struct gmem_link *link, uint64_t va)
{
	struct gmem_wire_answer answer;
	int fd, err = ask(link, GMEM_WIRE_ASK_FILE, va, 0, &answer, &fd);

	if (err)
		return err;
	err = in_window(link, answer.va, answer.bytes) ? 0 : -EPROTO;
	if (!err)
		err = cover(link, answer.va, answer.bytes, fd, answer.offset, answer.flags & GMEM_WIRE_REGION_READ_ONLY,
			    GMEM_WIRE_ASK_MAPPED);
	close(fd);
	return err;
}

int gmem_link_uncover(struct gmem_link *link, uint64_t va, uint64_t bytes)
{
	bool huge = va - link->hello.huge_base < link->hello.huge_bytes;

	if (!in_window(link, va, bytes) || link->files[huge] < 0)
		return -EINVAL;
	return cover(link, va, bytes, link->files[huge], va - link->hello.window_base, false, GMEM_WIRE_ASK_RESTORED);
}
