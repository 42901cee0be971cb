/* SPDX-License-Identifier: Apache-2.0
 *
 * Children of libgmem: by posix_spawn, because fork would run the handlers that make a child a session of its own.
 */
#ifndef GMEM_CLIENT_SPAWN_H
#define GMEM_CLIENT_SPAWN_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

#define GMEM_SPAWN_FIRST_FD 3

struct gmem_child {
	pid_t pid;
	int pidfd;
};

/* program: a path, or a name to be found in PATH. fds become 3, 4, ... of the child and are all that it inherits beside
 * 0, 1 and 2; they must be from gmem_fd_high(). It gets a session of its own, so that the terminal's signals pass it. */
int gmem_child_spawn(const char *program, char *const argv[], const int *fds, size_t fd_count,
		     struct gmem_child *ret);
/* Ends it if kill, and waits for its end: 0, or -ETIMEDOUT. ret: as of waitpid, -1 if somebody else has taken it. */
int gmem_child_wait(struct gmem_child *child, bool kill, int timeout_ms, int *ret);

/* Moves a descriptor above those of a child's fds; closes the old one. -errno on failure, with it closed. */
int gmem_fd_high(int fd);

#endif
