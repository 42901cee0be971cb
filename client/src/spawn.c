/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "spawn.h"

#define HIGH_FD 16 /* above GMEM_SPAWN_FIRST_FD + any fd_count */

extern char **environ;

int gmem_fd_high(int fd)
{
	int high = fcntl(fd, F_DUPFD_CLOEXEC, HIGH_FD);
	int err = high < 0 ? -errno : 0;

	close(fd);
	return err ? err : high;
}

static int set_attributes(posix_spawnattr_t *attributes)
{
	sigset_t none, all;
	int err;

	sigemptyset(&none);
	sigfillset(&all);
	err = posix_spawnattr_setsigmask(attributes, &none);
	if (!err)
		err = posix_spawnattr_setsigdefault(attributes, &all);
	if (!err)
		err = posix_spawnattr_setflags(attributes, POSIX_SPAWN_SETSID | POSIX_SPAWN_SETSIGMASK |
								   POSIX_SPAWN_SETSIGDEF);
	return err;
}

static int set_fds(posix_spawn_file_actions_t *actions, const int *fds, size_t count)
{
	int err = 0;

	for (size_t i = 0; !err && i < count; i++)
		err = posix_spawn_file_actions_adddup2(actions, fds[i], GMEM_SPAWN_FIRST_FD + (int)i);
	if (!err)
		err = posix_spawn_file_actions_addclosefrom_np(actions, GMEM_SPAWN_FIRST_FD + (int)count);
	return err;
}

int gmem_child_spawn(const char *program, char *const argv[], const int *fds, size_t fd_count,
		     struct gmem_child *ret)
{
	posix_spawn_file_actions_t actions;
	posix_spawnattr_t attributes;
	pid_t pid = -1;
	int err;

	if (posix_spawn_file_actions_init(&actions))
		return -ENOMEM;
	if (posix_spawnattr_init(&attributes)) {
		posix_spawn_file_actions_destroy(&actions);
		return -ENOMEM;
	}
	err = set_attributes(&attributes);
	if (!err)
		err = set_fds(&actions, fds, fd_count);
	if (!err)
		err = posix_spawnp(&pid, program, &actions, &attributes, argv, environ);
	posix_spawnattr_destroy(&attributes);
	posix_spawn_file_actions_destroy(&actions);
	if (err)
		return -err;
	ret->pid = pid;
	ret->pidfd = (int)syscall(SYS_pidfd_open, pid, 0);
	if (ret->pidfd < 0) {
		err = -errno;
		kill(pid, SIGKILL);
		waitpid(pid, NULL, 0);
		return err;
	}
	return 0;
}

int gmem_child_wait(struct gmem_child *child, bool kill, int timeout_ms, int *ret)
{
	struct pollfd end = { .fd = child->pidfd, .events = POLLIN };
	int n;

	if (kill)
		syscall(SYS_pidfd_send_signal, child->pidfd, SIGKILL, NULL, 0);
	do {
		n = poll(&end, 1, timeout_ms);
	} while (n < 0 && errno == EINTR);
	if (n == 0)
		return -ETIMEDOUT;
	*ret = -1;
	while (waitpid(child->pid, ret, 0) < 0) {
		if (errno != EINTR) {
			*ret = -1;
			break;
		}
	}
	close(child->pidfd);
	child->pidfd = -1;
	return 0;
}
