/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "link.h"
#include "uffd.h"

/* of the kernel's userfaultfd interface; distributions' headers are older than their kernels */
#define IOC_NEW _IO(0xAA, 0x00)
#define USER_MODE_ONLY 1
#define API 0xAAull
#define FEATURE_PAGEFAULT_FLAG_WP (1ull << 0)
#define FEATURE_MISSING_SHMEM (1ull << 5)
#define FEATURE_WP_SHMEM (1ull << 12)
#define REGISTER_MISSING (1ull << 0)
#define REGISTER_WP (1ull << 1)
#define WRITEPROTECT_WP (1ull << 0)

struct range {
	uint64_t start, len;
};
struct api {
	uint64_t api, features, ioctls;
};
struct registration {
	struct range range;
	uint64_t mode, ioctls;
};
struct protection {
	struct range range;
	uint64_t mode;
};

#define IOC_API _IOWR(0xAA, 0x3F, struct api)
#define IOC_REGISTER _IOWR(0xAA, 0x00, struct registration)
#define IOC_UNREGISTER _IOR(0xAA, 0x01, struct range)
#define IOC_WAKE _IOR(0xAA, 0x02, struct range)
#define IOC_WRITEPROTECT _IOWR(0xAA, 0x06, struct protection)

int gmem_link_new_uffd(struct gmem_link *link)
{
	int fd;

	if (link->uffd_dev >= 0)
		fd = ioctl(link->uffd_dev, IOC_NEW, O_CLOEXEC | O_NONBLOCK);
	else
		fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | USER_MODE_ONLY);
	return fd < 0 ? -errno : fd;
}

void gmem_link_touch(uint64_t va, uint64_t bytes, bool write)
{
	uint64_t end = va + bytes;

	for (uint64_t at = va; at < end; at = (at & ~4095ull) + 4096) {
		_Atomic uint8_t *byte = (_Atomic uint8_t *)(uintptr_t)at;

		if (write)
			atomic_fetch_or_explicit(byte, 0, memory_order_relaxed);
		else
			(void)atomic_load_explicit(byte, memory_order_relaxed);
	}
}

/* ---- on this process itself ---- */

int gmem_uffd_begin(int fd)
{
	struct api api = { .api = API, .features = FEATURE_PAGEFAULT_FLAG_WP };

	return ioctl(fd, IOC_API, &api) ? -errno : 0;
}

int gmem_uffd_begin_shared(int fd)
{
	struct api api = { .api = API, .features = FEATURE_PAGEFAULT_FLAG_WP | FEATURE_MISSING_SHMEM | FEATURE_WP_SHMEM };

	return ioctl(fd, IOC_API, &api) ? -errno : 0;
}

int gmem_uffd_protect(int fd, uint64_t va, uint64_t bytes)
{
	struct protection protection = { .range = { va, bytes }, .mode = WRITEPROTECT_WP };

	return ioctl(fd, IOC_WRITEPROTECT, &protection) ? -errno : 0;
}

int gmem_uffd_watch(int fd, uint64_t va, uint64_t bytes)
{
	struct registration registration = { .range = { va, bytes }, .mode = REGISTER_MISSING | REGISTER_WP };
	int err;

	if (ioctl(fd, IOC_REGISTER, &registration))
		return -errno;
	err = gmem_uffd_protect(fd, va, bytes);
	if (err)
		gmem_uffd_unwatch(fd, va, bytes);
	return err;
}

void gmem_uffd_unwatch(int fd, uint64_t va, uint64_t bytes)
{
	struct protection protection = { .range = { va, bytes } };
	struct range range = { va, bytes };

	ioctl(fd, IOC_WRITEPROTECT, &protection); /* older kernels do not lift it with the registration */
	ioctl(fd, IOC_UNREGISTER, &range);
	gmem_uffd_wake(fd, va, bytes);
}

void gmem_uffd_wake(int fd, uint64_t va, uint64_t bytes)
{
	struct range range = { va, bytes };

	ioctl(fd, IOC_WAKE, &range);
}
