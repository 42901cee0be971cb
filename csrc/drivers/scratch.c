/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "scratch.h"

#define MAGIC "gmem scratch 1\n"
#define HEADER_BYTES 4096
#define DEFAULT_BYTES (1ull << 30)

/* The first page of a file; not of one that has no name. */
struct header {
	char magic[16];
	char text[112]; /* for whoever looks into it */
	uint8_t made;   /* by gmem, which so may unlink it */
};

static int refuse(char *message, int err, const char *format, ...) __attribute__((format(printf, 3, 4)));

static int refuse(char *message, int err, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	vsnprintf(message, GMEM_MESSAGE_MAX, format, args);
	va_end(args);
	return err;
}

static double mib(uint64_t bytes)
{
	return (double)bytes / (1 << 20);
}

/* ---- opening, by kind ---- */

static int open_in_directory(const char *path, char *message, struct gmem_scratch *ret)
{
	char *name;

	ret->fd = open(path, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
	if (ret->fd >= 0)
		return 0;
	if (errno != EOPNOTSUPP && errno != EISDIR && errno != ENOENT)
		return refuse(message, -errno, "path: no file can be made in %.64s: %s", path, strerror(errno));
	/* some network filesystems */
	if (asprintf(&name, "%s/gmem-XXXXXX", path) < 0)
		return -ENOMEM;
	ret->fd = mkostemp(name, O_CLOEXEC);
	if (ret->fd < 0) {
		int err = -errno;

		free(name);
		return refuse(message, err, "path: no file can be made in %.64s: %s", path, strerror(-err));
	}
	unlink(name);
	free(name);
	return 0;
}

static int open_device(const struct gmem_scratch_config *config, char *message, struct gmem_scratch *ret)
{
	uint64_t bytes = 0;
	int err;

	if (!config->erase)
		return refuse(message, -EPERM, "erase: %.64s is a block device; erase=on says that it may be overwritten",
			      config->path);
	ret->fd = open(config->path, O_RDWR | O_EXCL | O_CLOEXEC); /* O_EXCL: not mounted, and nobody else's */
	if (ret->fd < 0)
		return refuse(message, -errno, "path: %.64s: %s", config->path, strerror(errno));
	if (ioctl(ret->fd, BLKGETSIZE64, &bytes)) {
		err = -errno;
		close(ret->fd);
		return refuse(message, err, "path: %.64s does not tell its size", config->path);
	}
	bytes = bytes > GMEM_SCRATCH_DATA ? bytes - GMEM_SCRATCH_DATA : 0;
	if (!ret->capacity)
		ret->capacity = bytes & ~(GMEM_HUGE_BYTES - 1);
	if (!ret->capacity || ret->capacity > bytes) {
		close(ret->fd);
		return refuse(message, -ENOSPC, "capacity: %.64s has room for %.1f MiB only", config->path, mib(bytes));
	}
	return 0;
}

/* 0: it may be overwritten. */
static int check_file(const char *path, int fd, char *message, struct header *ret_header)
{
	struct stat st;
	ssize_t n;

	if (fstat(fd, &st))
		return refuse(message, -errno, "path: %.64s: %s", path, strerror(errno));
	if (!S_ISREG(st.st_mode))
		return refuse(message, -EINVAL, "path: %.64s is neither a directory, a file nor a block device", path);
	if (!st.st_size)
		return 0;
	n = pread(fd, ret_header, sizeof(*ret_header), 0);
	if (n != sizeof(*ret_header) || memcmp(ret_header->magic, MAGIC, sizeof(MAGIC)))
		return refuse(message, -EEXIST, "path: %.64s has content that is not gmem's; it is left alone", path);
	return 0;
}

static int write_header(struct gmem_scratch *scratch)
{
	char *page = aligned_alloc(HEADER_BYTES, HEADER_BYTES);
	struct header *header = (struct header *)page;
	int err = 0;

	if (!page)
		return -ENOMEM;
	memset(page, 0, HEADER_BYTES);
	*header = (struct header){ .magic = MAGIC, .made = scratch->made != NULL };
	snprintf(header->text, sizeof(header->text), "%s",
		 "Pages of a gmemd that had this file attached. Worthless when none has.\n");
	errno = 0;
	if (pwrite(scratch->fd, page, HEADER_BYTES, 0) != HEADER_BYTES)
		err = errno ? -errno : -EIO;
	free(page);
	return err;
}

/* Ours, locked and still under its name; -EAGAIN: its last user unlinked it meanwhile. */
static int open_file_once(const char *path, char *message, struct gmem_scratch *ret)
{
	struct header header = { .made = false };
	bool made = true;
	struct stat st;
	int err;

	ret->fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	if (ret->fd < 0 && errno == EEXIST) {
		made = false;
		ret->fd = open(path, O_RDWR | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
	}
	if (ret->fd < 0)
		return errno == ENOENT && !made ? -EAGAIN :
			refuse(message, -errno, "path: %.64s: %s", path, strerror(errno));
	err = flock(ret->fd, LOCK_EX | LOCK_NB) ? -errno : 0;
	if (err)
		refuse(message, err = -EBUSY, "path: %.64s is in use", path);
	else if (fstat(ret->fd, &st) || !st.st_nlink)
		err = -EAGAIN;
	else
		err = check_file(path, ret->fd, message, &header);
	if (!err && (made || header.made)) {
		ret->made = strdup(path);
		err = ret->made ? 0 : -ENOMEM;
	}
	if (err)
		close(ret->fd);
	return err;
}

static int open_file(const char *path, char *message, struct gmem_scratch *ret)
{
	int err = -EAGAIN;

	for (int tries = 0; err == -EAGAIN && tries < 8; tries++)
		err = open_file_once(path, message, ret);
	return err == -EAGAIN ? refuse(message, -EBUSY, "path: %.64s comes and goes", path) : err;
}

/* ---- what is asked of it ---- */

static int no_room(int fd, uint64_t capacity, char *message)
{
	struct statvfs vfs = { 0 };

	fstatvfs(fd, &vfs);
	return refuse(message, -ENOSPC, "capacity: %.1f MiB, but the filesystem has %.1f MiB free", mib(capacity),
		      mib((uint64_t)vfs.f_bavail * vfs.f_frsize));
}

static int set_size(struct gmem_scratch *scratch, enum gmem_choice preallocate, char *message)
{
	uint64_t bytes = GMEM_SCRATCH_DATA + scratch->capacity;
	struct stat st;
	int err;

	if (fstat(scratch->fd, &st))
		return -errno;
	if ((uint64_t)st.st_size < bytes && ftruncate(scratch->fd, (off_t)bytes))
		return refuse(message, -errno, "capacity: a file of %.1f MiB can't be made: %s", mib(bytes), strerror(errno));
	err = preallocate == GMEM_OFF ? -EOPNOTSUPP : 0;
	while (!err && fallocate(scratch->fd, 0, (off_t)GMEM_SCRATCH_DATA, (off_t)scratch->capacity))
		err = errno == EINTR ? 0 : -errno;
	scratch->preallocated = !err;
	if (!err || preallocate == GMEM_OFF)
		return 0;
	if (ftruncate(scratch->fd, st.st_size)) /* what it got before it failed */
		scratch->preallocated = false;
	if (err == -ENOSPC || err == -EDQUOT || err == -EFBIG)
		return no_room(scratch->fd, scratch->capacity, message);
	if (err != -EOPNOTSUPP || preallocate == GMEM_ON)
		return refuse(message, err, "preallocate: %s", strerror(-err));
	snprintf(scratch->note, sizeof(scratch->note), "the filesystem can't preallocate: it may run full later");
	return ftruncate(scratch->fd, (off_t)bytes) ? -errno : 0;
}

/* That the flag can be set does not mean that I/O of 4 KiB goes through. */
static int try_direct(int fd)
{
	void *page = aligned_alloc(4096, 4096);
	int flags = fcntl(fd, F_GETFL), err = 0;

	if (!page)
		return -ENOMEM;
	if (flags < 0 || fcntl(fd, F_SETFL, flags | O_DIRECT) || pread(fd, page, 4096, (off_t)GMEM_SCRATCH_DATA) < 0)
		err = -errno;
	if (err && flags >= 0)
		fcntl(fd, F_SETFL, flags);
	free(page);
	return err;
}

static int set_direct(struct gmem_scratch *scratch, enum gmem_choice direct, char *message)
{
	int err = direct == GMEM_OFF ? 0 : try_direct(scratch->fd);

	scratch->direct = direct != GMEM_OFF && !err;
	if (err && direct == GMEM_ON)
		return refuse(message, err, "direct: refused by the filesystem: %s", strerror(-err));
	if (err)
		snprintf(scratch->note, sizeof(scratch->note), "the filesystem refuses O_DIRECT: pages go through its cache");
	return 0;
}

static int open_any(const struct gmem_scratch_config *config, char *message, bool *ret_device, struct gmem_scratch *ret)
{
	struct stat st = { 0 }; /* nothing there: a file will be */

	if (!config->path || config->path[0] != '/')
		return refuse(message, -EINVAL, "path: needed, and absolute: a directory, a file or a block device");
	if (config->capacity && config->capacity < GMEM_HUGE_BYTES)
		return refuse(message, -EINVAL, "capacity: smaller than one chunk of 2 MiB");
	if (config->capacity > INT64_MAX - GMEM_SCRATCH_DATA)
		return refuse(message, -EINVAL, "capacity: larger than any file");
	ret->capacity = config->capacity & ~(GMEM_HUGE_BYTES - 1);
	if (stat(config->path, &st) && errno != ENOENT)
		return refuse(message, -errno, "path: %.64s: %s", config->path, strerror(errno));
	if (S_ISBLK(st.st_mode)) {
		*ret_device = true;
		return open_device(config, message, ret);
	}
	if (!ret->capacity)
		ret->capacity = DEFAULT_BYTES;
	return S_ISDIR(st.st_mode) ? open_in_directory(config->path, message, ret) :
				     open_file(config->path, message, ret);
}

int gmem_scratch_open(const struct gmem_scratch_config *config, char *message, struct gmem_scratch *ret)
{
	struct gmem_scratch scratch = { .fd = -1 };
	bool device = false;
	int err = open_any(config, message, &device, &scratch);

	if (err)
		return err;
	if (device)
		scratch.preallocated = true;
	else
		err = set_size(&scratch, config->preallocate, message);
	if (!err && !device) {
		err = write_header(&scratch);
		if (err)
			refuse(message, err, "path: %.64s can't be written: %s", config->path, strerror(-err));
	}
	if (!err)
		err = set_direct(&scratch, config->direct, message);
	if (err)
		gmem_scratch_close(&scratch);
	else
		*ret = scratch;
	return err;
}

int gmem_scratch_adopt(const struct gmem_scratch_config *config, int fd, uint64_t capacity, struct gmem_scratch *ret)
{
	struct header *header = aligned_alloc(HEADER_BYTES, HEADER_BYTES); /* the file may be open with O_DIRECT */
	struct stat ours, named;
	int err = header ? 0 : -ENOMEM;

	if (!err && (fstat(fd, &ours) || (S_ISREG(ours.st_mode) &&
					   (uint64_t)ours.st_size < GMEM_SCRATCH_DATA + capacity)))
		err = -EPROTO;
	*ret = (struct gmem_scratch){ .fd = fd, .capacity = capacity, .direct = fcntl(fd, F_GETFL) & O_DIRECT,
				      .preallocated = config->preallocate != GMEM_OFF };
	/* it is to be removed if it still is what that path names, and gmem has made it */
	if (!err && S_ISREG(ours.st_mode) && !stat(config->path, &named) && named.st_ino == ours.st_ino &&
	    named.st_dev == ours.st_dev && pread(fd, header, HEADER_BYTES, 0) == HEADER_BYTES && header->made) {
		ret->made = strdup(config->path);
		err = ret->made ? 0 : -ENOMEM;
	}
	free(header);
	return err;
}

void gmem_scratch_leave(struct gmem_scratch *scratch)
{
	free(scratch->made);
	close(scratch->fd);
}

void gmem_scratch_close(struct gmem_scratch *scratch)
{
	if (scratch->made)
		unlink(scratch->made); /* before the lock goes with the descriptor: whoever is next makes a new one */
	free(scratch->made);
	flock(scratch->fd, LOCK_UN); /* a child that is being forked may have the descriptor for a moment longer */
	close(scratch->fd);
}
