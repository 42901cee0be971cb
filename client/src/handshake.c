/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "agent.h"
#include "beside.h"
#include "cuda.h"
#include "link.h"
#include "ring.h"

#define FDS_MAX 8
#define TRIES_MAX 50
#define AGAIN_NS 50000000
#define ANSWER_S 30 /* a daemon that is silent for so long is not one */

bool gmem_link_may_start_agent = true;

static struct gmem_wire_header header(enum gmem_wire_type type)
{
	return (struct gmem_wire_header){ GMEM_WIRE_MAGIC, GMEM_WIRE_VERSION, (uint16_t)type };
}

static int failed(struct gmem_link *link, int err, const char *what)
{
	if (!link->message[0])
		snprintf(link->message, sizeof(link->message), "%s: %s", what, strerror(-err));
	return err;
}

static int dial(struct gmem_link *link)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	const struct timeval patience = { .tv_sec = ANSWER_S };

	if (strlen(link->path) >= sizeof(address.sun_path))
		return failed(link, -ENAMETOOLONG, "path");
	strcpy(address.sun_path, link->path);
	link->sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	if (link->sock < 0)
		return failed(link, -errno, "socket");
	setsockopt(link->sock, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
	setsockopt(link->sock, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience));
	if (connect(link->sock, (struct sockaddr *)&address, sizeof(address)))
		return failed(link, -errno, link->path);
	return 0;
}

static int put(struct gmem_link *link, const void *data, size_t bytes, int fd)
{
	char control[CMSG_SPACE(sizeof(int))] = { 0 };
	struct iovec iov = { (void *)data, bytes };
	struct msghdr message = { .msg_iov = &iov, .msg_iovlen = 1 };

	if (fd >= 0) {
		struct cmsghdr *c;

		message.msg_control = control;
		message.msg_controllen = sizeof(control);
		c = CMSG_FIRSTHDR(&message);
		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(c), &fd, sizeof(int));
	}
	while (sendmsg(link->sock, &message, MSG_NOSIGNAL) < 0)
		if (errno != EINTR)
			return failed(link, -errno, "gmemd");
	return 0;
}

/* Exactly one message of that type and size, and its descriptors. */
static int get(struct gmem_link *link, enum gmem_wire_type type, void *data, size_t bytes, int *ret_fds,
	       size_t *ret_count)
{
	char control[CMSG_SPACE(FDS_MAX * sizeof(int))] = { 0 };
	struct iovec iov = { data, bytes };
	struct msghdr message = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control,
				  .msg_controllen = sizeof(control) };
	const struct gmem_wire_header *got = data;
	struct cmsghdr *c;
	ssize_t n;

	do {
		n = recvmsg(link->sock, &message, MSG_CMSG_CLOEXEC);
	} while (n < 0 && errno == EINTR);
	*ret_count = 0;
	if (n < 0)
		return failed(link, errno == EAGAIN ? -ETIMEDOUT : -errno, "gmemd");
	c = CMSG_FIRSTHDR(&message);
	if (c && c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS) {
		*ret_count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
		memcpy(ret_fds, CMSG_DATA(c), *ret_count * sizeof(int));
	}
	if (n == 0)
		return failed(link, -ECONNRESET, "gmemd closed the connection");
	if ((size_t)n != bytes || got->magic != GMEM_WIRE_MAGIC || got->version != GMEM_WIRE_VERSION ||
	    got->type != type) {
		while (*ret_count)
			close(ret_fds[--*ret_count]);
		return failed(link, -EPROTO, "gmemd speaks another protocol");
	}
	return 0;
}

static int get_welcome(struct gmem_link *link)
{
	int fds[FDS_MAX], err;
	size_t count, used = 0;

	err = get(link, GMEM_WIRE_WELCOME, &link->hello, sizeof(link->hello), fds, &count);
	if (err)
		return err;
	if (!link->hello.status) {
		if (used < count && (link->hello.flags & GMEM_WIRE_HAS_UFFD_DEV))
			link->uffd_dev = fds[used++];
		if (used < count && (link->hello.flags & GMEM_WIRE_HAS_HUGE))
			link->files[1] = fds[used++];
		if (used < count && (link->hello.flags & GMEM_WIRE_HAS_SMALL))
			link->files[0] = fds[used++];
		for (int i = 0; i < GMEM_FILES; i++) {
			struct stat st;

			link->inodes[i] = link->files[i] >= 0 && !fstat(link->files[i], &st) ? st.st_ino : 0;
		}
		if (used + 1 < count && (link->hello.flags & GMEM_WIRE_HAS_RING)) {
			err = gmem_ring_create(link, fds[used], fds[used + 1], &link->ring);
			used += 2;
		}
		if (used < count && (link->hello.flags & GMEM_WIRE_HAS_CHANNEL))
			link->channel = fds[used++];
	}
	while (used < count)
		close(fds[used++]);
	if (err)
		return failed(link, err, "ring");
	if (link->hello.status) {
		link->hello.message[sizeof(link->hello.message) - 1] = '\0';
		snprintf(link->message, sizeof(link->message), "%s", link->hello.message);
	}
	return link->hello.status;
}

static int get_regions(struct gmem_link *link, bool inherit)
{
	int err = 0;

	for (uint32_t i = 0; !err && i < link->hello.region_count; i++) {
		struct gmem_wire_region region;
		int fds[FDS_MAX];
		size_t count;

		err = get(link, GMEM_WIRE_REGION, &region, sizeof(region), fds, &count);
		if (!err && count != 1) {
			while (count)
				close(fds[--count]);
			err = failed(link, -EPROTO, "region without its file");
		}
		if (!err)
			err = gmem_link_map_region(link, &region, fds[0], inherit);
		if (err)
			failed(link, err, "mapping a shared region");
	}
	return err;
}

static int give_uffd(struct gmem_link *link)
{
	struct gmem_wire_uffd message = { .header = header(GMEM_WIRE_UFFD), .user_mode_only = link->uffd_dev < 0 };

	link->uffd = gmem_link_new_uffd(link);
	if (link->uffd < 0)
		return failed(link, link->uffd, "userfaultfd");
	return put(link, &message, sizeof(message), link->uffd);
}

static int get_ready(struct gmem_link *link)
{
	struct gmem_wire_ready ready;
	int fds[FDS_MAX], err;
	size_t count;

	err = get(link, GMEM_WIRE_READY, &ready, sizeof(ready), fds, &count);
	if (!err && !ready.status && count && (ready.flags & GMEM_WIRE_HAS_AGENT)) {
		err = gmem_agent_start(fds[--count], link->hello.window_base, link->hello.window_bytes, gmem_beside_age,
				       link, &link->agent);
		if (err)
			failed(link, err, "agent");
	}
	/* To a forked child whose uffd came by event: everybody has a descriptor of his own (see struct gmem_link). */
	if (!err && !ready.status && count && link->uffd < 0)
		link->uffd = fds[--count];
	while (count)
		close(fds[--count]);
	if (!err && ready.status) {
		ready.message[sizeof(ready.message) - 1] = '\0';
		snprintf(link->message, sizeof(link->message), "%s", ready.message);
		err = ready.status;
	}
	return err;
}

/* GMEM_RING=0: every request goes over the control plane. GMEM_AGENT=0: translations stay. */
static bool wanted(const char *variable)
{
	const char *chosen = secure_getenv(variable);

	return !chosen || strcmp(chosen, "0") != 0;
}

static int attempt(struct gmem_link *link, uint32_t kind, const uint8_t *token, const char *device)
{
	struct gmem_wire_hello hello = { .header = header(GMEM_WIRE_HELLO), .kind = kind };
	bool stored, channel;
	int err;

	link->sock = link->files_sock = link->uffd = link->uffd_dev = link->files[0] = link->files[1] = link->channel = -1;
	link->message[0] = '\0';
	link->ring = NULL;
	link->agent = NULL;
	if (gmem_link_may_start_agent && wanted("GMEM_AGENT"))
		hello.flags |= GMEM_WIRE_WANT_AGENT;
	if (kind != GMEM_WIRE_CONTEXT && wanted("GMEM_RING"))
		hello.flags |= GMEM_WIRE_WANT_RING;
	if (token)
		memcpy(hello.token, token, sizeof(hello.token));
	if (device && strlen(device) >= sizeof(hello.device))
		return failed(link, -EINVAL, "device");
	if (device) {
		strcpy(hello.device, device);
		strcpy(link->device, device);
	}
	err = dial(link);
	if (!err)
		err = put(link, &hello, sizeof(hello), -1);
	if (!err || err == -EPIPE) /* a refusal may be there before HELLO could be sent */
		err = get_welcome(link);
	stored = !err && (link->hello.flags & GMEM_WIRE_FORK_STORED);
	channel = link->channel >= 0;
	if (!err && kind == GMEM_WIRE_CLIENT && (link->hello.flags & GMEM_WIRE_HAS_CUDA))
		gmem_cuda_reserve(link->hello.window_base, link->hello.window_bytes);
	if (!err && kind == GMEM_WIRE_CONTEXT && !channel) {
		err = gmem_link_map_window(link);
		if (err)
			failed(link, err, "mapping the address window");
	}
	if (!err)
		err = get_regions(link, kind == GMEM_WIRE_FORK_CHILD && (link->hello.flags & GMEM_WIRE_EVENT_FORK));
	if (!err && !stored && !channel)
		err = give_uffd(link);
	if (!err)
		err = get_ready(link);
	if (err && kind == GMEM_WIRE_CONTEXT && !channel)
		gmem_link_unmap_window(link);
	if (err)
		gmem_link_hang_up(link);
	return err;
}

/* gmemd closes a connection without a word only if it is killed. One that is started again takes the next one. */
int gmem_link_handshake(struct gmem_link *link, uint32_t kind, const uint8_t *token, const char *device)
{
	const struct timespec pause = { 0, AGAIN_NS };
	uint8_t kept[GMEM_WIRE_TOKEN_BYTES];
	int err = -ECONNRESET;

	if (token) /* perhaps that of the WELCOME which is about to be replaced */
		token = memcpy(kept, token, sizeof(kept));
	for (int tries = 0; (err == -ECONNRESET || err == -EPIPE) && tries < TRIES_MAX; tries++) {
		if (tries)
			nanosleep(&pause, NULL);
		err = attempt(link, kind, token, device);
	}
	return err;
}

void gmem_link_hang_up(struct gmem_link *link)
{
	int *const fds[] = { &link->sock, &link->files_sock, &link->uffd, &link->uffd_dev, &link->files[0], &link->files[1],
			     &link->channel };

	if (link->ring)
		gmem_ring_destroy(link->ring);
	link->ring = NULL;
	gmem_link_stop_agent(link);
	for (size_t i = 0; i < sizeof(fds) / sizeof(fds[0]); i++) {
		if (*fds[i] >= 0)
			close(*fds[i]);
		*fds[i] = -1;
	}
}

/* ---- files ---- */

static int hand_over(struct gmem_link *link, const uint8_t *token, const struct gmem_wire_file *file, int fd,
		     struct gmem_wire_region *ret)
{
	struct gmem_wire_hello hello = { .header = header(GMEM_WIRE_HELLO), .kind = GMEM_WIRE_MAP_FILE };
	struct gmem_wire_ready ready;
	int fds[FDS_MAX], err;
	size_t count;

	memcpy(hello.token, token, sizeof(hello.token));
	err = dial(link);
	if (!err)
		err = put(link, &hello, sizeof(hello), -1);
	if (!err || err == -EPIPE)
		err = get_welcome(link);
	if (!err)
		err = put(link, file, sizeof(*file), fd);
	if (!err)
		err = get(link, GMEM_WIRE_READY, &ready, sizeof(ready), fds, &count);
	if (!err && ready.status) {
		snprintf(link->message, sizeof(link->message), "%.*s", (int)sizeof(ready.message) - 1, ready.message);
		err = ready.status;
	}
	if (!err)
		err = get(link, GMEM_WIRE_REGION, ret, sizeof(*ret), fds, &count);
	return err;
}

int gmem_link_give_file(const struct gmem_link *link, int fd, uint64_t offset, uint64_t bytes, uint32_t page_bytes,
			uint32_t flags, struct gmem_wire_region *ret, char *message)
{
	const struct gmem_wire_file file = { header(GMEM_WIRE_FILE), offset, bytes, page_bytes, flags };
	const struct timespec pause = { 0, AGAIN_NS };
	struct gmem_link other = { .sock = -1 };
	int err = -ECONNRESET;

	strcpy(other.path, link->path);
	for (int tries = 0; (err == -ECONNRESET || err == -EPIPE) && tries < TRIES_MAX; tries++) {
		if (tries)
			nanosleep(&pause, NULL);
		other.message[0] = '\0';
		other.sock = other.files_sock = other.uffd = other.uffd_dev = other.files[0] = other.files[1] = other.channel = -1;
		err = hand_over(&other, link->hello.token, &file, fd, ret);
		gmem_link_hang_up(&other);
	}
	if (err)
		snprintf(message, GMEM_WIRE_MESSAGE_BYTES, "%s", other.message);
	return err;
}
