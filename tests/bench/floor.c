/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "floor.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <gmem/uapi.h>
#include <gmem/uffd.h>

#include "../unit_c/harness.h"

#define HUGE (2ul << 20)

struct hello {
	uint64_t va, bytes, page_bytes;
};

static void send_hello(int sock, const struct hello *hello, int fd)
{
	char control[CMSG_SPACE(sizeof(int))] = { 0 };
	struct iovec iov = { (void *)hello, sizeof(*hello) };
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control,
			      .msg_controllen = sizeof(control) };
	struct cmsghdr *c = CMSG_FIRSTHDR(&msg);

	c->cmsg_level = SOL_SOCKET;
	c->cmsg_type = SCM_RIGHTS;
	c->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(c), &fd, sizeof(int));
	CHECK(sendmsg(sock, &msg, MSG_NOSIGNAL) == sizeof(*hello));
}

static bool receive_hello(int sock, struct hello *hello, int *ret_fd)
{
	char control[CMSG_SPACE(sizeof(int))] = { 0 };
	struct iovec iov = { hello, sizeof(*hello) };
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control,
			      .msg_controllen = sizeof(control) };

	if (recvmsg(sock, &msg, MSG_CMSG_CLOEXEC) != sizeof(*hello))
		return false;
	CHECK(CMSG_FIRSTHDR(&msg));
	memcpy(ret_fd, CMSG_DATA(CMSG_FIRSTHDR(&msg)), sizeof(int));
	return true;
}

/* The last of the CPUs that this process may use: devices interrupt the first. */
static int floor_cpu(cpu_set_t *ret_allowed)
{
	int cpu = CPU_SETSIZE - 1;

	CHECK(!sched_getaffinity(getpid(), sizeof(*ret_allowed), ret_allowed));
	while (!CPU_ISSET(cpu, ret_allowed))
		cpu--;
	return cpu;
}

static void run_on_floor_cpu(bool there)
{
	cpu_set_t allowed, only;
	int cpu = floor_cpu(&allowed);

	CPU_ZERO(&only);
	CPU_SET(cpu, &only);
	if (!there && CPU_COUNT(&allowed) > 1)
		CPU_XOR(&only, &only, &allowed);
	CHECK(!sched_setaffinity(0, sizeof(only), &only));
}

void floor_cpu_enter(void)
{
	run_on_floor_cpu(true);
}

struct handler {
	int uffd;
	uint64_t page_bytes;
	const struct floor *floor;
};

/* The handler's loop, as bare as it can be: wait, read, CONTINUE. */
static void answer_faults(int uffd, uint64_t page_bytes, const struct floor *floor)
{
	struct pollfd poll_fd = { uffd, POLLIN, 0 };
	struct gmem_uffd_msg msg;
	bool spinning = true;

	for (;;) {
		ssize_t n;

		if (spinning != atomic_load_explicit(floor->spin, memory_order_relaxed)) {
			spinning = !spinning;
			if (floor->placed)
				run_on_floor_cpu(!spinning);
		}
		if (!spinning) {
			poll(&poll_fd, 1, -1);
			if (poll_fd.revents & (POLLERR | POLLHUP))
				return;
		}
		n = read(uffd, &msg, sizeof(msg));
		if (n == sizeof(msg)) {
			struct gmem_uffd_continue args = {
				.range = { msg.arg.pagefault.address & ~(page_bytes - 1), page_bytes },
			};

			CHECK(!ioctl(uffd, GMEM_UFFDIO_CONTINUE, &args) || errno == EEXIST || errno == ESRCH);
		} else if (n >= 0 || errno != EAGAIN) {
			return;
		}
	}
}

static void *handler_thread(void *arg)
{
	struct handler *handler = arg;

	answer_faults(handler->uffd, handler->page_bytes, handler->floor);
	close(handler->uffd);
	free(handler);
	return NULL;
}

/* Takes ranges from the client, and gives each a handler thread. */
static void *floor_thread(void *arg)
{
	struct floor *floor = arg;
	struct hello hello;
	pthread_t thread;
	int uffd;

	while (receive_hello(floor->socks[0], &hello, &uffd)) {
		struct handler *handler = malloc(sizeof(*handler));

		CHECK_EQ(gmem_uffd_api(uffd, GMEM_UFFD_FEAT_MISSING_SHMEM | GMEM_UFFD_FEAT_MINOR_SHMEM |
						     GMEM_UFFD_FEAT_WP_HUGETLBFS_SHMEM |
						     GMEM_UFFD_FEAT_MISSING_HUGETLBFS |
						     GMEM_UFFD_FEAT_MINOR_HUGETLBFS), 0);
		CHECK_EQ(gmem_uffd_register(uffd, hello.va, hello.bytes), 0);
		*handler = (struct handler){ uffd, hello.page_bytes, floor };
		CHECK(!pthread_create(&thread, NULL, handler_thread, handler));
		pthread_detach(thread);
		CHECK(send(floor->socks[0], "", 1, MSG_NOSIGNAL) == 1);
	}
	return NULL;
}

struct floor *floor_create(bool placed)
{
	struct floor *floor = calloc(1, sizeof(*floor));

	CHECK(floor && !socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, floor->socks));
	floor->placed = placed;
	floor->spin = shared_bytes(sizeof(*floor->spin));
	CHECK(!pthread_create(&floor->thread, NULL, floor_thread, floor));
	return floor;
}

static uint8_t *aligned_map(uint64_t bytes, int fd)
{
	uint8_t *hole = mmap(NULL, bytes + HUGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	uint8_t *at = (uint8_t *)(((uintptr_t)hole + HUGE - 1) & ~(HUGE - 1));

	CHECK(hole != MAP_FAILED);
	CHECK(mmap(at, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED | MAP_NORESERVE, fd, 0) == at);
	return at;
}

static int populated_file(uint64_t bytes, bool huge)
{
	int fd = memfd_create("bench-floor", MFD_CLOEXEC | (huge ? MFD_HUGETLB : 0));

	CHECK(fd >= 0 && !ftruncate(fd, (off_t)bytes));
	if (!fallocate(fd, 0, 0, (off_t)bytes))
		return fd;
	close(fd);
	return -1;
}

bool floor_attach(struct floor *floor, uint64_t bytes, uint64_t page_bytes, struct floor_range *ret)
{
	int device = gmem_uffd_open_device(), uffd = gmem_uffd_new(device), fd = populated_file(bytes, page_bytes == HUGE);
	struct hello hello;
	char done;

	CHECK(uffd >= 0);
	if (fd < 0)
		return false;
	*ret = (struct floor_range){ aligned_map(bytes, fd), bytes, page_bytes, fd };
	hello = (struct hello){ (uint64_t)ret->at, bytes, page_bytes };
	send_hello(floor->socks[1], &hello, uffd);
	CHECK(recv(floor->socks[1], &done, 1, 0) == 1);
	return true; /* the uffd stays open: it ends with the process, and so does its handler */
}

uint8_t *warm_map(uint64_t bytes, bool huge, int *ret_fd)
{
	int fd = populated_file(bytes, huge);
	uint8_t *at;

	if (fd < 0)
		return NULL;
	at = aligned_map(bytes, fd);
	for (uint64_t i = 0; i < bytes; i += 4096)
		at[i] = 1;
	*ret_fd = fd;
	return at;
}

void warm_unmap(uint8_t *at, uint64_t bytes, int fd)
{
	munmap(at, bytes);
	close(fd);
}
