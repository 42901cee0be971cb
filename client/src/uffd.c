/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "link.h"

/* of the kernel's userfaultfd interface; distributions' headers are older than their kernels */
#define IOC_NEW _IO(0xAA, 0x00)
#define USER_MODE_ONLY 1

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
