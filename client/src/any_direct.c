/* SPDX-License-Identifier: Apache-2.0
 *
 * Devices that write to memory past the page tables. The kernel tells nobody that it has pinned a page for them: if the
 * page moves meanwhile, what the device writes is lost. So files are read through the page cache (O_DIRECT is left out, for
 * calls that wait as for those that do not), and buffers that are registered with an io_uring are pinned here too for as
 * long as they are.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>

#include "any.h"
#include "interpose.h"
#include "syscalls.h"

#define PINS_MAX 4096 /* an io_uring takes 16384 buffers at most, and few programs more than some */

static struct {
	int (*open)(const char *path, int flags, ...);
	int (*openat)(int directory, const char *path, int flags, ...);
	int (*fcntl)(int fd, int command, ...);
	int (*register_buffers)(struct io_uring *ring, const struct iovec *vectors, unsigned count);
	int (*unregister_buffers)(struct io_uring *ring);
	void (*queue_exit)(struct io_uring *ring);
} next;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct {
	const struct io_uring *ring;
	uintptr_t va;
	size_t bytes;
} pins[PINS_MAX]; /* lock */
static int pin_count;

__attribute__((constructor(101))) static void find_next(void)
{
	gmem_find_next("open", &next.open);
	gmem_find_next("openat", &next.openat);
	gmem_find_next("fcntl", &next.fcntl);
}

/* ---- O_DIRECT ---- */

static int cached(int flags)
{
	return gmem_any_is_managed() ? flags & ~O_DIRECT : flags;
}

static int open_at(int directory, const char *path, int flags, mode_t mode)
{
	if (next.openat)
		return next.openat(directory, path, cached(flags), mode);
	return (int)gmem_sys(SYS_openat, directory, (long)path, flags, mode, 0, 0);
}

int in_open(const char *path, int flags, mode_t mode) IN_PLACE_OF("open");
int in_open(const char *path, int flags, mode_t mode)
{
	if (next.open)
		return next.open(path, cached(flags), mode);
	return open_at(AT_FDCWD, path, flags, mode);
}

int in_openat(int directory, const char *path, int flags, mode_t mode) IN_PLACE_OF("openat");
int in_openat(int directory, const char *path, int flags, mode_t mode)
{
	return open_at(directory, path, flags, mode);
}

/* The other names of the two: for large files, and fortified. */
int in_open64(const char *path, int flags, mode_t mode) IN_PLACE_OF("open64");
int in_open64(const char *path, int flags, mode_t mode)
{
	return in_open(path, flags | O_LARGEFILE, mode);
}

int in_openat64(int directory, const char *path, int flags, mode_t mode) IN_PLACE_OF("openat64");
int in_openat64(int directory, const char *path, int flags, mode_t mode)
{
	return open_at(directory, path, flags | O_LARGEFILE, mode);
}

int in_open_2(const char *path, int flags) IN_PLACE_OF("__open_2");
int in_open_2(const char *path, int flags)
{
	return in_open(path, flags, 0);
}

int in_open64_2(const char *path, int flags) IN_PLACE_OF("__open64_2");
int in_open64_2(const char *path, int flags)
{
	return in_open64(path, flags, 0);
}

int in_openat_2(int directory, const char *path, int flags) IN_PLACE_OF("__openat_2");
int in_openat_2(int directory, const char *path, int flags)
{
	return open_at(directory, path, flags, 0);
}

int in_openat64_2(int directory, const char *path, int flags) IN_PLACE_OF("__openat64_2");
int in_openat64_2(int directory, const char *path, int flags)
{
	return in_openat64(directory, path, flags, 0);
}

/* Of pipes the flag means something else. */
static bool is_file(int fd)
{
	struct stat status;
	int before = errno;
	bool is = !fstat(fd, &status) && (S_ISREG(status.st_mode) || S_ISBLK(status.st_mode));

	errno = before;
	return is;
}

static int control(int fd, int command, void *arg)
{
	if (command == F_SETFL && (long)arg & O_DIRECT && gmem_any_is_managed() && is_file(fd))
		arg = (void *)((long)arg & ~(long)O_DIRECT);
	return next.fcntl ? next.fcntl(fd, command, arg) : (int)gmem_sys(SYS_fcntl, fd, command, (long)arg, 0, 0, 0);
}

int in_fcntl(int fd, int command, void *arg) IN_PLACE_OF("fcntl");
int in_fcntl(int fd, int command, void *arg)
{
	return control(fd, command, arg);
}

int in_fcntl64(int fd, int command, void *arg) IN_PLACE_OF("fcntl64");
int in_fcntl64(int fd, int command, void *arg)
{
	return control(fd, command, arg);
}

/* ---- buffers of an io_uring: of liburing, if the program has it as a shared library ---- */

static int advise(uintptr_t va, size_t bytes, int advice)
{
	size_t mask = gmem_any.page_bytes - 1;
	uintptr_t first = va & ~mask, end = (va + bytes + mask) & ~mask;

	return gmem_hmadvise(gmem_any.session, GMEM_HOST, (void *)first, end - first, advice);
}

/* What others have pinned in these pages stays so. */
static void unpin_locked(const struct io_uring *ring)
{
	for (int i = 0; i < pin_count;) {
		if (pins[i].ring != ring) {
			i++;
			continue;
		}
		advise(pins[i].va, pins[i].bytes, GMEM_ADVISE_UNPINNED);
		pins[i] = pins[--pin_count];
	}
	for (int i = 0; i < pin_count; i++)
		advise(pins[i].va, pins[i].bytes, GMEM_ADVISE_PINNED);
}

static int pin_locked(const struct io_uring *ring, const struct iovec *vectors, unsigned count)
{
	int err = 0;

	for (unsigned i = 0; !err && i < count; i++) {
		if (!vectors[i].iov_len || !gmem_any_owns(vectors[i].iov_base))
			continue;
		if (pin_count == PINS_MAX)
			return -ENOMEM;
		pins[pin_count].ring = ring;
		pins[pin_count].va = (uintptr_t)vectors[i].iov_base;
		pins[pin_count].bytes = vectors[i].iov_len;
		err = advise(pins[pin_count].va, pins[pin_count].bytes, GMEM_ADVISE_PINNED);
		pin_count += !err;
	}
	return err ? -ENOMEM : 0;
}

int gmem_any_pin(const struct io_uring *ring, const struct iovec *vectors, unsigned count)
{
	struct gmem_visit visit;
	int err;

	if (!gmem_any_is_managed() || !gmem_enter(&visit))
		return 0;
	pthread_mutex_lock(&lock);
	err = pin_locked(ring, vectors, count);
	if (err)
		unpin_locked(ring);
	pthread_mutex_unlock(&lock);
	gmem_leave(&visit);
	return err;
}

static void unpin(const struct io_uring *ring)
{
	struct gmem_visit visit;

	if (!gmem_any_is_managed() || !gmem_enter(&visit))
		return;
	pthread_mutex_lock(&lock);
	unpin_locked(ring);
	pthread_mutex_unlock(&lock);
	gmem_leave(&visit);
}

void gmem_any_forget_pins(void)
{
	pthread_mutex_init(&lock, NULL); /* another thread of the parent may have had it */
	pin_count = 0;
}

int in_register_buffers(struct io_uring *ring, const struct iovec *vectors, unsigned count)
	IN_PLACE_OF("io_uring_register_buffers");
int in_register_buffers(struct io_uring *ring, const struct iovec *vectors, unsigned count)
{
	int err;

	if (!next.register_buffers)
		gmem_find_next("io_uring_register_buffers", &next.register_buffers);
	if (!next.register_buffers)
		return -ENOSYS;
	err = gmem_any_pin(ring, vectors, count);
	if (!err)
		err = next.register_buffers(ring, vectors, count);
	if (err)
		unpin(ring);
	return err;
}

int in_unregister_buffers(struct io_uring *ring) IN_PLACE_OF("io_uring_unregister_buffers");
int in_unregister_buffers(struct io_uring *ring)
{
	int err;

	if (!next.unregister_buffers)
		gmem_find_next("io_uring_unregister_buffers", &next.unregister_buffers);
	err = next.unregister_buffers ? next.unregister_buffers(ring) : -ENOSYS;
	if (!err)
		unpin(ring);
	return err;
}

void in_queue_exit(struct io_uring *ring) IN_PLACE_OF("io_uring_queue_exit");
void in_queue_exit(struct io_uring *ring)
{
	if (!next.queue_exit)
		gmem_find_next("io_uring_queue_exit", &next.queue_exit);
	if (next.queue_exit)
		next.queue_exit(ring);
	unpin(ring);
}
