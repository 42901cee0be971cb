/* SPDX-License-Identifier: Apache-2.0
 *
 * The handshake between a client process and gmemd: fixed-size messages on a SOCK_SEQPACKET Unix socket, with
 * descriptors in SCM_RIGHTS. This header is the leaf of the project: the daemon, the C library and the Python
 * client all read it, and it includes nothing of ours.
 *
 *   client                                   daemon
 *     HELLO ───────────────────────────────►   authenticates by SO_PEERCRED (and by token, see kinds)
 *                ◄─────────────────────────── WELCOME  + fds: [userfaultfd device] [huge file] [small file]
 *                ◄─────────────────────────── REGION × welcome.region_count, each + 1 fd
 *     (maps the regions)
 *     UFFD + fd ───────────────────────────►   checks the fd, UFFDIO_API, UFFDIO_REGISTER
 *                ◄─────────────────────────── READY
 *
 * The connection stays open for as long as the session (or context) lives; its end is the session's end.
 * All integers are in host byte order: both ends are on one machine. Reserved fields are zero.
 */
#ifndef GMEM_WIRE_H
#define GMEM_WIRE_H

#include <stdint.h>

#define GMEM_WIRE_MAGIC 0x4d454d47u /* "GMEM" */
#define GMEM_WIRE_VERSION 1
#define GMEM_WIRE_TOKEN_BYTES 32
#define GMEM_WIRE_PATH_BYTES 108
#define GMEM_WIRE_NAME_BYTES 32
#define GMEM_WIRE_MESSAGE_BYTES 160

enum gmem_wire_type {
	GMEM_WIRE_HELLO = 1,
	GMEM_WIRE_WELCOME = 2,
	GMEM_WIRE_REGION = 3,
	GMEM_WIRE_UFFD = 4,
	GMEM_WIRE_READY = 5,
};

enum gmem_wire_kind {
	GMEM_WIRE_CLIENT = 1,     /* a new session; token ignored */
	GMEM_WIRE_FORK_CHILD = 2, /* child of the session whose token is sent; becomes a session of its own */
	GMEM_WIRE_CONTEXT = 3,    /* device context process of the session whose token is sent */
	GMEM_WIRE_ADMIN = 4,      /* a token for requests only: no memory, no uffd, ends after WELCOME */
};

/* welcome.flags */
#define GMEM_WIRE_HAS_UFFD_DEV (1u << 0)   /* an open /dev/userfaultfd is passed: ioctl(fd, USERFAULTFD_IOC_NEW) */
#define GMEM_WIRE_HAS_HUGE (1u << 1)       /* the hugetlb file is passed */
#define GMEM_WIRE_HAS_SMALL (1u << 2)      /* the shmem file is passed */
#define GMEM_WIRE_EVENT_FORK (1u << 3)     /* forks arrive as uffd events: leave regions inheritable */
#define GMEM_WIRE_FORK_STORED (1u << 4)    /* FORK_CHILD: the child's uffd is stored already; only READY follows */
/* Without HAS_UFFD_DEV a client makes its uffd by userfaultfd(UFFD_USER_MODE_ONLY): system calls on memory that is
 * not mapped yet then fail with EFAULT, so it touches the range itself first. */

/* region.flags */
#define GMEM_WIRE_REGION_HUGE (1u << 0)  /* backed by hugetlb pages */

struct gmem_wire_header {
	uint32_t magic;
	uint16_t version;
	uint16_t type;
};

struct gmem_wire_hello {
	struct gmem_wire_header header;
	uint32_t kind;
	uint32_t reserved;
	uint8_t token[GMEM_WIRE_TOKEN_BYTES];
	char device[GMEM_WIRE_NAME_BYTES]; /* CONTEXT: which device, NUL-terminated */
};

struct gmem_wire_welcome {
	struct gmem_wire_header header;
	int32_t status;                         /* 0 or -errno; then only message is valid and the connection ends */
	uint32_t flags;
	uint64_t session;
	uint64_t window_base, window_bytes;     /* file offset of a region = its first VA - window_base */
	uint64_t huge_base, huge_bytes;         /* part of the window whose regions are hugetlb-backed */
	uint64_t small_base, small_bytes;       /* part of the window whose regions are shmem-backed */
	uint32_t region_count;                  /* REGION messages that follow */
	int32_t hnid;                           /* CONTEXT: the device's hnid; else 0 */
	uint8_t token[GMEM_WIRE_TOKEN_BYTES];   /* goes into every request */
	char control[GMEM_WIRE_PATH_BYTES];     /* ZeroMQ endpoint of the ROUTER */
	char events[GMEM_WIRE_PATH_BYTES];      /* ZeroMQ endpoint of the PUB */
	char message[GMEM_WIRE_MESSAGE_BYTES];  /* what went wrong, for people */
};

struct gmem_wire_region { /* + 1 fd: the file to map */
	struct gmem_wire_header header;
	uint64_t va, bytes, offset;
	uint32_t flags;
	uint32_t page_bytes;
};

struct gmem_wire_uffd { /* + 1 fd: O_NONBLOCK userfaultfd, no ioctl done on it yet */
	struct gmem_wire_header header;
	uint32_t user_mode_only; /* 1 if made with UFFD_USER_MODE_ONLY */
	uint32_t reserved;
};

struct gmem_wire_ready {
	struct gmem_wire_header header;
	int32_t status;
	uint32_t reserved;
	char message[GMEM_WIRE_MESSAGE_BYTES];
};

#endif
