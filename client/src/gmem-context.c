/* SPDX-License-Identifier: Apache-2.0
 *
 * The process of a device context: maps its session's addresses from the device's memory, and then runs the kernels that
 * its client names, one after the other. The client is of the same user, so this is no boundary of trust.
 *
 * Signals keep their default actions: gmemd ends a kernel that touches what is not there by SIGSEGV, and a handler would
 * keep a thread that waits in a system call for that memory from dying of it.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "launch.h"
#include "link.h"

/* A kernel may never end; but when the client does, so do we. */
static void *end_with_client(void *arg)
{
	struct pollfd ends[] = { { .fd = GMEM_LAUNCH_FD, .events = POLLRDHUP }, { .fd = *(int *)arg, .events = POLLIN } };

	while (poll(ends, 2, -1) < 0 && errno == EINTR)
		;
	_exit(0);
}

static int watch_client(pid_t parent)
{
	static int pidfd;
	sigset_t all, before;
	pthread_t thread;
	int err;

	pidfd = (int)syscall(SYS_pidfd_open, parent, 0);
	if (pidfd < 0)
		return -errno;
	if (getppid() != parent)
		return -ESRCH;
	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, &before);
	err = pthread_create(&thread, NULL, end_with_client, &pidfd);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	return -err;
}

static ssize_t get(void *message, size_t bytes)
{
	ssize_t n;

	do {
		n = recv(GMEM_LAUNCH_FD, message, bytes, 0);
	} while (n < 0 && errno == EINTR);
	return n;
}

static void put(const void *message, size_t bytes)
{
	while (send(GMEM_LAUNCH_FD, message, bytes, MSG_NOSIGNAL) < 0)
		if (errno != EINTR)
			_exit(0); /* the client is gone */
}

static int join(const struct gmem_launch_hello *hello, struct gmem_link **ret)
{
	struct gmem_launch_ready ready = { 0 };
	char message[GMEM_WIRE_MESSAGE_BYTES] = "";

	ready.status = watch_client(hello->parent);
	if (!ready.status)
		ready.status = gmem_link_open_context(hello->socket, hello->token, hello->device, ret, message);
	if (ready.status)
		snprintf(ready.message, sizeof(ready.message), "%s", message[0] ? message : strerror(-ready.status));
	put(&ready, sizeof(ready));
	return ready.status;
}

static gmem_kernel *find(const struct gmem_launch_run *run, struct gmem_launch_said *said)
{
	void *library = dlopen(run->library, RTLD_NOW | RTLD_LOCAL);
	gmem_kernel *kernel;

	if (!library) {
		said->what = GMEM_LAUNCH_NO_LIBRARY;
		snprintf(said->message, sizeof(said->message), "library: %s", dlerror());
		return NULL;
	}
	dlerror();
	*(void **)&kernel = dlsym(library, run->symbol);
	if (!kernel) {
		const char *why = dlerror();

		said->what = GMEM_LAUNCH_NO_SYMBOL;
		snprintf(said->message, sizeof(said->message), "symbol: %s", why ? why : "is NULL");
	}
	return kernel;
}

/* What the client adopts, at its address. */
static void map(struct gmem_link *link, const struct gmem_launch_run *run)
{
	struct gmem_launch_said said = { .id = run->id, .what = GMEM_LAUNCH_DONE };

	if (run->kind == GMEM_LAUNCH_MAP)
		said.value = gmem_link_map_beside(link, run->args[0], run->args[1], run->args[2]);
	else if (run->kind == GMEM_LAUNCH_COVER)
		said.value = run->args[1] ? gmem_link_uncover(link, run->args[0], run->args[1]) :
					    gmem_link_overlay(link, run->args[0]);
	else
		gmem_link_unmap(link, run->args[0], run->args[1]);
	put(&said, sizeof(said));
}

static void serve(const struct gmem_launch_run *run)
{
	struct gmem_launch_said said = { .id = run->id, .what = GMEM_LAUNCH_STARTED };
	void *args[GMEM_ARGS_MAX];
	gmem_kernel *kernel;

	/* Started before the library is loaded: its constructors count against the kernel's time too. */
	put(&said, sizeof(said));
	kernel = find(run, &said);
	if (kernel) {
		for (uint64_t i = 0; i < run->arg_count; i++)
			args[i] = (void *)(uintptr_t)run->args[i];
		said.value = kernel(args, run->arg_count);
		said.what = GMEM_LAUNCH_DONE;
		fflush(NULL); /* what it printed is seen before its completion */
	}
	put(&said, sizeof(said));
}

int main(void)
{
	static struct gmem_launch_run run;
	struct gmem_launch_hello hello;
	struct gmem_link *link;
	ssize_t n;

	prctl(PR_SET_NAME, "gmem-context");
	signal(SIGINT, SIG_IGN); /* the terminal's Ctrl-C is the client's to handle */
	n = get(&hello, sizeof(hello));
	if (n != sizeof(hello)) {
		fprintf(stderr, "gmem-context is started by libgmem\n");
		return 2;
	}
	hello.socket[sizeof(hello.socket) - 1] = '\0';
	hello.device[sizeof(hello.device) - 1] = '\0';
	if (join(&hello, &link))
		return 1;
	while (get(&run, sizeof(run)) == (ssize_t)sizeof(run)) {
		run.library[sizeof(run.library) - 1] = '\0';
		run.symbol[sizeof(run.symbol) - 1] = '\0';
		if (run.arg_count > GMEM_ARGS_MAX)
			return 2;
		if (run.kind == GMEM_LAUNCH_RUN)
			serve(&run);
		else
			map(link, &run);
	}
	_exit(0); /* no destructors: they might touch memory that is going */
}
