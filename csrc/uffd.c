/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <gmem/uffd.h>

int gmem_uffd_open_device(void)
{
	int fd = open(GMEM_UFFD_DEVICE, O_RDWR | O_CLOEXEC);

	return fd < 0 ? -errno : fd;
}

int gmem_uffd_new(int device_fd)
{
	int fd;

	if (device_fd >= 0)
		fd = ioctl(device_fd, GMEM_USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
	else
		fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | GMEM_UFFD_USER_MODE_ONLY);
	return fd < 0 ? -errno : fd;
}

int gmem_uffd_probe(int device_fd, uint64_t *ret_features)
{
	struct gmem_uffd_api api = { .api = GMEM_UFFD_API };
	int fd = gmem_uffd_new(device_fd), err;

	if (fd < 0)
		return fd;
	err = ioctl(fd, GMEM_UFFDIO_API, &api) ? -errno : 0;
	close(fd);
	if (!err)
		*ret_features = api.features;
	return err;
}

int gmem_uffd_check(int fd)
{
	char path[64], target[64];
	ssize_t n;
	int flags = fcntl(fd, F_GETFL);

	if (flags < 0)
		return -EBADF;
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	n = readlink(path, target, sizeof(target) - 1);
	if (n < 0)
		return -errno;
	target[n] = '\0';
	if (strcmp(target, "anon_inode:[userfaultfd]"))
		return -EINVAL;
	return flags & O_NONBLOCK ? 0 : -EINVAL; /* a blocking one polls POLLERR */
}

static int sorted(int err)
{
	if (err == -ENOENT || err == -ESRCH)
		return -ESRCH;
	return err;
}

int gmem_uffd_api(int fd, uint64_t features)
{
	struct gmem_uffd_api api = { .api = GMEM_UFFD_API, .features = features };

	return ioctl(fd, GMEM_UFFDIO_API, &api) ? -errno : 0;
}

static int register_for(int fd, uint64_t va, uint64_t bytes, uint64_t mode)
{
	struct gmem_uffd_register args = { .range = { va, bytes }, .mode = mode };

	return ioctl(fd, GMEM_UFFDIO_REGISTER, &args) ? -errno : 0;
}

int gmem_uffd_register(int fd, uint64_t va, uint64_t bytes)
{
	return register_for(fd, va, bytes,
			    GMEM_UFFD_REGISTER_MISSING | GMEM_UFFD_REGISTER_MINOR | GMEM_UFFD_REGISTER_WP);
}

int gmem_uffd_register_missing(int fd, uint64_t va, uint64_t bytes)
{
	return register_for(fd, va, bytes, GMEM_UFFD_REGISTER_MISSING);
}

int gmem_uffd_unregister(int fd, uint64_t va, uint64_t bytes)
{
	struct gmem_uffd_range args = { va, bytes };

	return ioctl(fd, GMEM_UFFDIO_UNREGISTER, &args) ? sorted(-errno) : 0;
}

int gmem_uffd_wake(int fd, uint64_t va, uint64_t bytes)
{
	struct gmem_uffd_range args = { va, bytes };

	return ioctl(fd, GMEM_UFFDIO_WAKE, &args) ? sorted(-errno) : 0;
}

static int copy(int fd, uint64_t va, const void *src, uint64_t bytes, uint64_t mode, uint64_t *ret_done)
{
	*ret_done = 0;
	while (*ret_done < bytes) {
		struct gmem_uffd_copy args = {
			.dst = va + *ret_done,
			.src = (uint64_t)(uintptr_t)src + *ret_done,
			.len = bytes - *ret_done,
			.mode = mode,
		};

		if (!ioctl(fd, GMEM_UFFDIO_COPY, &args)) {
			*ret_done = bytes;
			break;
		}
		/* a part was done: go on behind it; the next call says what stopped this one */
		if (args.copy <= 0)
			return sorted(args.copy < 0 ? (int)args.copy : -errno);
		*ret_done += (uint64_t)args.copy;
	}
	return 0;
}

int gmem_uffd_copy_wp(int fd, uint64_t va, const void *src, uint64_t bytes, bool wake, uint64_t *ret_done)
{
	return copy(fd, va, src, bytes, GMEM_UFFD_COPY_WP | (wake ? 0 : GMEM_UFFD_COPY_DONTWAKE), ret_done);
}

int gmem_uffd_copy(int fd, uint64_t va, const void *src, uint64_t bytes)
{
	uint64_t done;

	return copy(fd, va, src, bytes, GMEM_UFFD_COPY_DONTWAKE, &done);
}

int gmem_uffd_continue(int fd, uint64_t va, uint64_t bytes, bool write_protect, bool wake)
{
	uint64_t done = 0;
	int existed = 0;

	while (done < bytes) {
		struct gmem_uffd_continue args = {
			.range = { va + done, bytes - done },
			.mode = (write_protect ? GMEM_UFFD_CONTINUE_WP : 0) | (wake ? 0 : GMEM_UFFD_CONTINUE_DONTWAKE),
		};
		int err;

		if (!ioctl(fd, GMEM_UFFDIO_CONTINUE, &args))
			break;
		if (args.mapped > 0) {
			done += (uint64_t)args.mapped;
			continue;
		}
		err = args.mapped < 0 ? (int)args.mapped : -errno;
		/* step over the small page that is there; inside a huge page that is there, the next step is invalid */
		if (err == -EINVAL && existed)
			break;
		if (err != -EEXIST)
			return sorted(err);
		existed = -EEXIST;
		done += 4096;
	}
	return existed;
}

int gmem_uffd_protect(int fd, uint64_t va, uint64_t bytes, bool write_protect, bool wake)
{
	struct gmem_uffd_writeprotect args = {
		.range = { va, bytes },
		.mode = write_protect ? GMEM_UFFD_WRITEPROTECT_WP : (wake ? 0 : GMEM_UFFD_WRITEPROTECT_DONTWAKE),
	};

	return ioctl(fd, GMEM_UFFDIO_WRITEPROTECT, &args) ? sorted(-errno) : 0;
}

int gmem_uffd_poison(int fd, uint64_t va, uint64_t bytes)
{
	struct gmem_uffd_poison args = { .range = { va, bytes } };

	if (!ioctl(fd, GMEM_UFFDIO_POISON, &args))
		return 0;
	return sorted(args.updated < 0 ? (int)args.updated : -errno);
}

int gmem_uffd_alive(int fd)
{
	/* A valid request on a range where nothing is registered: ENOENT while there is an mm, ESRCH after. */
	struct gmem_uffd_writeprotect args = { .range = { 4096, 4096 }, .mode = GMEM_UFFD_WRITEPROTECT_DONTWAKE };

	return ioctl(fd, GMEM_UFFDIO_WRITEPROTECT, &args) && errno == ESRCH ? -ESRCH : 0;
}

bool gmem_uffd_probe_continue_wp(int device_fd)
{
	int memfd = memfd_create("gmem-probe", MFD_CLOEXEC), fd = gmem_uffd_new(device_fd), err = -EIO;
	void *at = MAP_FAILED;

	if (memfd >= 0 && fd >= 0 && !ftruncate(memfd, 4096) && pwrite(memfd, "x", 1, 0) == 1)
		at = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
	if (at != MAP_FAILED) {
		err = gmem_uffd_api(fd, GMEM_UFFD_FEAT_MINOR_SHMEM | GMEM_UFFD_FEAT_WP_HUGETLBFS_SHMEM);
		if (!err)
			err = gmem_uffd_register(fd, (uint64_t)(uintptr_t)at, 4096);
		if (!err)
			err = gmem_uffd_continue(fd, (uint64_t)(uintptr_t)at, 4096, true, false);
		munmap(at, 4096);
	}
	if (memfd >= 0)
		close(memfd);
	if (fd >= 0)
		close(fd);
	return !err;
}
