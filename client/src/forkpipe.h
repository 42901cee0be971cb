/* SPDX-License-Identifier: Apache-2.0
 *
 * A pipe over a fork: its end says to the parent that the child has what it needs, or is dead.
 */
#ifndef GMEM_CLIENT_FORKPIPE_H
#define GMEM_CLIENT_FORKPIPE_H

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

struct gmem_fork_pipe {
	int fds[2]; /* -1: there is none */
};

#define GMEM_NO_FORK_PIPE { { -1, -1 } }

/* -EMFILE, -ENFILE: nobody can be waited for. */
static inline int gmem_fork_pipe_open(struct gmem_fork_pipe *pipe)
{
	if (!pipe2(pipe->fds, O_CLOEXEC))
		return 0;
	pipe->fds[0] = pipe->fds[1] = -1;
	return -errno;
}

/* In the child, once it is ready. */
static inline void gmem_fork_pipe_end(struct gmem_fork_pipe *pipe)
{
	for (int i = 0; i < 2; i++) {
		if (pipe->fds[i] >= 0)
			close(pipe->fds[i]);
		pipe->fds[i] = -1;
	}
}

/* In the parent; timeout_ms as poll's. */
static inline void gmem_fork_pipe_wait(struct gmem_fork_pipe *pipe, int timeout_ms)
{
	struct pollfd end = { .fd = pipe->fds[0], .events = POLLIN };

	if (pipe->fds[0] < 0)
		return;
	close(pipe->fds[1]);
	pipe->fds[1] = -1;
	while (poll(&end, 1, timeout_ms) < 0 && errno == EINTR)
		;
	gmem_fork_pipe_end(pipe);
}

#endif
