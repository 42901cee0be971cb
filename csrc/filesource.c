/* SPDX-License-Identifier: Apache-2.0
 *
 * A client's file as the source of an object. The descriptor came from the client, which may truncate the file, or take
 * its disk away, at any time: that is an error of the read, for that client. File systems that a client could make hang (FUSE, the
 * network's) are refused.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <gmem/internal.h>
#include <gmem/source.h>

struct filesource {
	struct gmem_source source;
	int fd; /* (C) -1: lost */
	struct gmem_file_args args; /* (C) */
};

static int read_all(const struct filesource *file, uint64_t offset, uint8_t *dst, uint64_t bytes)
{
	uint64_t end = offset + bytes < file->args.bytes ? offset + bytes : file->args.bytes;

	if (file->fd < 0)
		return -EIO;
	while (offset < end) {
		ssize_t n = pread(file->fd, dst, end - offset, (off_t)(file->args.offset + offset));

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0) /* the end: it was longer when it was mapped */
			return n < 0 ? -errno : -EIO;
		offset += (uint64_t)n;
		dst += n;
	}
	return 0;
}

static void pull(struct gmem_source *source, struct gmem_peer_io *io, size_t count)
{
	for (size_t i = 0; i < count; i++)
		io[i].result = read_all((struct filesource *)source, io[i].key * io[i].bytes, io[i].memory, io[i].bytes);
}

static int push(struct gmem_source *source, uint64_t index, const uint8_t *src, uint64_t bytes)
{
	struct filesource *file = (struct filesource *)source;
	uint64_t offset = index * bytes;
	uint64_t end = offset + bytes < file->args.bytes ? offset + bytes : file->args.bytes;
	struct stat st;

	if (file->fd < 0 || fstat(file->fd, &st))
		return -EIO;
	if ((uint64_t)st.st_size < file->args.offset + end) /* cut short by somebody; not to be grown behind his back */
		return -EIO;
	while (offset < end) {
		ssize_t n = pwrite(file->fd, src, end - offset, (off_t)(file->args.offset + offset));

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n < 0 ? -errno : -EIO;
		offset += (uint64_t)n;
		src += n;
	}
	return 0;
}

static int sync_file(struct gmem_source *source)
{
	struct filesource *file = (struct filesource *)source;

	return file->fd < 0 || fdatasync(file->fd) ? -EIO : 0;
}

static void release(struct gmem_source *source)
{
	struct filesource *file = (struct filesource *)source;

	if (file->fd >= 0)
		close(file->fd);
	free(file);
}

static void describe(const struct gmem_source *source, struct gmem_record *record, int *ret_fd)
{
	const struct filesource *file = (const struct filesource *)source;

	record->object.source = file->args.write ? GMEM_RECORD_FILE_WRITE :
				file->args.private_ ? GMEM_RECORD_FILE_PRIVATE : GMEM_RECORD_FILE;
	record->object.source_offset = file->args.offset;
	record->object.source_tail = (uint32_t)(record->object.bytes - file->args.bytes);
	*ret_fd = file->fd;
}

static const struct gmem_source_ops read_only = { .pull = pull, .release = release, .describe = describe };
static const struct gmem_source_ops read_write = { .pull = pull, .push = push, .sync = sync_file, .release = release,
						   .describe = describe };

int gmem_filesource_create(int fd, const struct gmem_file_args *args, struct gmem_source **ret)
{
	struct filesource *file = calloc(1, sizeof(*file));

	if (!file)
		return -ENOMEM;
	*file = (struct filesource){ { args->write ? &read_write : &read_only, .tracks = true, .slow = true }, fd, *args };
	*ret = &file->source;
	return 0;
}

static int refuse(int err, const char *why, const char **ret_why)
{
	*ret_why = why;
	return err;
}

static bool is_local(uint64_t type)
{
	static const uint32_t local[] = {
		0xef53 /* ext */, 0x58465342 /* xfs */, 0x9123683e /* btrfs */, 0x01021994 /* tmpfs */, 0x794c7630 /* overlay */,
		0xf2f52010 /* f2fs */, 0x2fc12fc1 /* zfs */, 0xca451a4e /* bcachefs */, 0x73717368 /* squashfs */,
		0xe0f5e1e2 /* erofs */, 0x4d44 /* fat */, 0x2011bab0 /* exfat */, 0x9660 /* iso */,
	};

	for (size_t i = 0; i < sizeof(local) / sizeof(local[0]); i++)
		if ((uint32_t)type == local[i])
			return true;
	return false;
}

int gmem_file_check(int fd, const struct gmem_file_args *args, const char **ret_why)
{
	int flags = fcntl(fd, F_GETFL);
	struct statfs fs;
	struct stat st;

	if (flags < 0 || flags & O_PATH)
		return refuse(-EBADF, "it is only a path", ret_why);
	if ((flags & O_ACCMODE) == O_WRONLY)
		return refuse(-EBADF, "it is open for writing only", ret_why);
	if (args->write && (flags & O_ACCMODE) != O_RDWR)
		return refuse(-EBADF, "it is not open for writing", ret_why);
	if (flags & (O_APPEND | O_DIRECT))
		return refuse(-EINVAL, "it is opened with O_APPEND or O_DIRECT", ret_why);
	if (fstatfs(fd, &fs))
		return refuse(-errno, "its file system can't be told", ret_why);
	if (!is_local((uint64_t)fs.f_type))
		return refuse(-EOPNOTSUPP, "it is not on a file system of this machine's own", ret_why);
	if (fstat(fd, &st) || !S_ISREG(st.st_mode))
		return refuse(-EINVAL, "it is not a regular file", ret_why);
	if (args->offset & 4095 || !args->bytes || args->offset + args->bytes < args->bytes ||
	    (uint64_t)st.st_size < args->offset + args->bytes)
		return refuse(-EINVAL, "it ends before the end of the range", ret_why);
	return 0;
}
