/* SPDX-License-Identifier: Apache-2.0
 *
 * The kernel interfaces the core uses, as the kernel documents them (Documentation/admin-guide/mm/userfaultfd.rst):
 * the headers of the distributions we support are older than the kernels they run.
 */
#ifndef GMEM_UAPI_H
#define GMEM_UAPI_H

#include <stdint.h>
#include <sys/ioctl.h>

#define GMEM_UFFD_API 0xAAull
#define GMEM_UFFD_DEVICE "/dev/userfaultfd"

#define GMEM_UFFD_EVENT_PAGEFAULT 0x12
#define GMEM_UFFD_EVENT_FORK 0x13
#define GMEM_UFFD_EVENT_REMAP 0x14
#define GMEM_UFFD_EVENT_REMOVE 0x15
#define GMEM_UFFD_EVENT_UNMAP 0x16

#define GMEM_UFFD_FAULT_WRITE (1u << 0)
#define GMEM_UFFD_FAULT_WP (1u << 1)
#define GMEM_UFFD_FAULT_MINOR (1u << 2)

/* Since: EVENT_* 4.11, THREAD_ID 4.14, MINOR_HUGETLBFS 5.13, MINOR_SHMEM 5.14, EXACT_ADDRESS 5.18,
 * WP_HUGETLBFS_SHMEM 5.19, POISON 6.6. */
#define GMEM_UFFD_FEAT_EVENT_FORK (1ull << 1)
#define GMEM_UFFD_FEAT_EVENT_REMAP (1ull << 2)
#define GMEM_UFFD_FEAT_MISSING_HUGETLBFS (1ull << 4)
#define GMEM_UFFD_FEAT_MISSING_SHMEM (1ull << 5)
#define GMEM_UFFD_FEAT_EVENT_UNMAP (1ull << 6)
#define GMEM_UFFD_FEAT_SIGBUS (1ull << 7)
#define GMEM_UFFD_FEAT_THREAD_ID (1ull << 8)
#define GMEM_UFFD_FEAT_MINOR_HUGETLBFS (1ull << 9)
#define GMEM_UFFD_FEAT_MINOR_SHMEM (1ull << 10)
#define GMEM_UFFD_FEAT_EXACT_ADDRESS (1ull << 11)
#define GMEM_UFFD_FEAT_WP_HUGETLBFS_SHMEM (1ull << 12)
#define GMEM_UFFD_FEAT_WP_UNPOPULATED (1ull << 13)
#define GMEM_UFFD_FEAT_POISON (1ull << 14)

#define GMEM_UFFD_REGISTER_MISSING (1ull << 0)
#define GMEM_UFFD_REGISTER_WP (1ull << 1)
#define GMEM_UFFD_REGISTER_MINOR (1ull << 2)

#define GMEM_UFFD_COPY_DONTWAKE (1ull << 0)
#define GMEM_UFFD_COPY_WP (1ull << 1)
#define GMEM_UFFD_WRITEPROTECT_WP (1ull << 0)
#define GMEM_UFFD_WRITEPROTECT_DONTWAKE (1ull << 1)
#define GMEM_UFFD_CONTINUE_DONTWAKE (1ull << 0)
#define GMEM_UFFD_CONTINUE_WP (1ull << 1) /* 6.4 */

#define GMEM_UFFD_USER_MODE_ONLY 1

struct gmem_uffd_range {
	uint64_t start, len;
};

struct gmem_uffd_msg {
	uint8_t event;
	uint8_t reserved1;
	uint16_t reserved2;
	uint32_t reserved3;
	union {
		struct {
			uint64_t flags;
			uint64_t address;
			uint32_t ptid;
		} pagefault;
		struct {
			uint32_t ufd;
		} fork;
		struct {
			uint64_t from, to, len;
		} remap;
		struct {
			uint64_t start, end;
		} remove;
		uint64_t reserved[3];
	} arg;
} __attribute__((packed));

struct gmem_uffd_api {
	uint64_t api, features, ioctls;
};
struct gmem_uffd_register {
	struct gmem_uffd_range range;
	uint64_t mode, ioctls;
};
struct gmem_uffd_copy {
	uint64_t dst, src, len, mode;
	int64_t copy;
};
struct gmem_uffd_writeprotect {
	struct gmem_uffd_range range;
	uint64_t mode;
};
struct gmem_uffd_continue {
	struct gmem_uffd_range range;
	uint64_t mode;
	int64_t mapped;
};
struct gmem_uffd_poison {
	struct gmem_uffd_range range;
	uint64_t mode;
	int64_t updated;
};

#define GMEM_UFFDIO_REGISTER _IOWR(0xAA, 0x00, struct gmem_uffd_register)
#define GMEM_UFFDIO_UNREGISTER _IOR(0xAA, 0x01, struct gmem_uffd_range)
#define GMEM_UFFDIO_WAKE _IOR(0xAA, 0x02, struct gmem_uffd_range)
#define GMEM_UFFDIO_COPY _IOWR(0xAA, 0x03, struct gmem_uffd_copy)
#define GMEM_UFFDIO_WRITEPROTECT _IOWR(0xAA, 0x06, struct gmem_uffd_writeprotect)
#define GMEM_UFFDIO_CONTINUE _IOWR(0xAA, 0x07, struct gmem_uffd_continue)
#define GMEM_UFFDIO_POISON _IOWR(0xAA, 0x08, struct gmem_uffd_poison)
#define GMEM_UFFDIO_API _IOWR(0xAA, 0x3F, struct gmem_uffd_api)
#define GMEM_USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)

#endif
