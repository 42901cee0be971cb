/* SPDX-License-Identifier: Apache-2.0
 *
 * A private gmemd for a process tree: started on demand. It holds the other end of a pipe of ours, which forked children
 * inherit, and ends when that pipe and its last session have ended.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "atfork.h"
#include "error.h"
#include "session.h"
#include "spawn.h"

#define START_MS 60000
#define END_MS 10000
#define FIXED_ARGS 8

struct gmem_embedded {
	struct gmem_child child;
	pid_t owner;  /* whose child it is */
	int alive;    /* our end of the pipe */
	size_t users;
	char directory[GMEM_WIRE_PATH_BYTES];
	char socket[GMEM_WIRE_PATH_BYTES + 16];
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* guards what follows, and every users */
static struct gmem_embedded *current;                    /* for whoever asks for no devices */

static void hold(void)
{
	pthread_mutex_lock(&lock);
}

static void let_go(void)
{
	pthread_mutex_unlock(&lock);
}

static void install_handlers(void)
{
	gmem_atfork(hold, let_go, let_go);
}

/* Short, because paths of sockets are: in the user's runtime directory if there is one. */
static int make_directory(char *ret, size_t capacity)
{
	const char *base = secure_getenv("XDG_RUNTIME_DIR");
	uint32_t chance;

	if (base && strlen(base) < 60 && !access(base, W_OK | X_OK)) {
		if (getrandom(&chance, sizeof(chance), 0) != sizeof(chance))
			return -EIO;
		snprintf(ret, capacity, "%s/gmem-%d-%08x", base, getpid(), chance);
		return mkdir(ret, 0700) ? -errno : 0;
	}
	snprintf(ret, capacity, "/tmp/gmem-%u-XXXXXX", getuid());
	return mkdtemp(ret) ? 0 : -errno;
}

static void remove_directory(const char *directory)
{
	static const char *const names[] = { "gmemd.sock", "control.sock", "events.sock" };
	char path[GMEM_WIRE_PATH_BYTES + 16];

	for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
		snprintf(path, sizeof(path), "%s/%s", directory, names[i]);
		unlink(path);
	}
	rmdir(directory);
}

static int make_pipe(int ret[2])
{
	int fds[2];

	if (pipe2(fds, O_CLOEXEC))
		return -errno;
	ret[0] = gmem_fd_high(fds[0]);
	ret[1] = gmem_fd_high(fds[1]);
	if (ret[0] >= 0 && ret[1] >= 0)
		return 0;
	if (ret[0] >= 0)
		close(ret[0]);
	if (ret[1] >= 0)
		close(ret[1]);
	return -EMFILE;
}

static int spawn(struct gmem_embedded *embedded, const char *const *devices, size_t device_count, int ready,
		 int parent)
{
	const char *const fixed[FIXED_ARGS] = { "gmemd", "run", "--embedded", "--runtime-dir", embedded->directory,
						"--ready-fd=3", "--parent-fd=4" };
	const char **argv = calloc(FIXED_ARGS + 2 * device_count + 1, sizeof(*argv));
	int fds[] = { ready, parent };
	size_t n = 0;
	int err;

	if (!argv)
		return -ENOMEM;
	for (; fixed[n]; n++)
		argv[n] = fixed[n];
	for (size_t i = 0; i < device_count; i++) {
		argv[n++] = "--device";
		argv[n++] = devices[i];
	}
	err = gmem_child_spawn("gmemd", (char *const *)argv, fds, 2, &embedded->child);
	free(argv);
	return err;
}

static int64_t now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* Until it says READY=1; why not, if not. */
static int wait_ready(int fd)
{
	int64_t until = now_ms() + START_MS;
	char said[512] = "";
	size_t used = 0;

	while (!strstr(said, "READY=1")) {
		struct pollfd readable = { .fd = fd, .events = POLLIN };
		int64_t left = until - now_ms();
		ssize_t n;

		if (left <= 0)
			return gmem_fail(-ETIMEDOUT, "the private gmemd was not ready within %d s", START_MS / 1000);
		if (poll(&readable, 1, (int)left) <= 0)
			continue;
		n = read(fd, said + used, sizeof(said) - 1 - used);
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0) {
			said[strcspn(said, "\n")] = '\0';
			return gmem_fail(-ECONNREFUSED, "the private gmemd did not start: %s",
					 !strncmp(said, "ERROR=", 6) ? said + 6 : "it said nothing");
		}
		used += (size_t)n;
		said[used] = '\0';
	}
	return 0;
}

static int start(struct gmem_embedded *embedded, const char *const *devices, size_t device_count)
{
	int ready[2], alive[2], status;
	int err = make_pipe(ready);

	if (err)
		return gmem_fail(err, "pipe: %s", strerror(-err));
	err = make_pipe(alive);
	if (err) {
		close(ready[0]);
		close(ready[1]);
		return gmem_fail(err, "pipe: %s", strerror(-err));
	}
	err = spawn(embedded, devices, device_count, ready[1], alive[0]);
	close(ready[1]);
	close(alive[0]);
	if (err == -ENOENT)
		gmem_fail(err, "no gmemd is running here, and the program `gmemd` is not in PATH");
	else if (err)
		gmem_fail(err, "gmemd can't be started: %s", strerror(-err));
	else if ((err = wait_ready(ready[0])))
		gmem_child_wait(&embedded->child, true, -1, &status);
	close(ready[0]);
	if (err)
		close(alive[1]);
	else
		embedded->alive = alive[1];
	return err;
}

static int create(const char *const *devices, size_t device_count, struct gmem_embedded **ret)
{
	struct gmem_embedded *embedded = calloc(1, sizeof(*embedded));
	int err;

	if (!embedded)
		return gmem_fail(-ENOMEM, "out of memory");
	err = make_directory(embedded->directory, sizeof(embedded->directory));
	if (err) {
		gmem_fail(err, "%s: %s", embedded->directory, strerror(-err));
	} else {
		snprintf(embedded->socket, sizeof(embedded->socket), "%s/gmemd.sock", embedded->directory);
		err = start(embedded, devices, device_count);
		if (err)
			remove_directory(embedded->directory);
	}
	if (err) {
		free(embedded);
		return err;
	}
	embedded->owner = getpid();
	embedded->users = 1;
	*ret = embedded;
	return 0;
}

int gmem_embedded_get(const char *const *devices, size_t device_count, struct gmem_embedded **ret)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;
	int err = 0;

	pthread_once(&once, install_handlers);
	pthread_mutex_lock(&lock);
	if (!device_count && current) {
		current->users++;
		*ret = current;
	} else {
		err = create(devices, device_count, ret);
		if (!err && !device_count)
			current = *ret;
	}
	pthread_mutex_unlock(&lock);
	return err;
}

void gmem_embedded_put(struct gmem_embedded *embedded)
{
	bool last;
	int status;

	pthread_mutex_lock(&lock);
	last = !--embedded->users;
	if (last && current == embedded)
		current = NULL;
	pthread_mutex_unlock(&lock);
	if (!last)
		return;
	close(embedded->alive);
	/* Not ended in time: a forked child still uses it, and it removes its sockets itself. */
	if (embedded->owner == getpid() && !gmem_child_wait(&embedded->child, false, END_MS, &status))
		remove_directory(embedded->directory);
	else
		close(embedded->child.pidfd);
	free(embedded);
}

const char *gmem_embedded_socket(const struct gmem_embedded *embedded)
{
	return embedded->socket;
}
