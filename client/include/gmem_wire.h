/* SPDX-License-Identifier: Apache-2.0
 *
 * The handshake between a client process and gmemd: fixed-size messages on a SOCK_SEQPACKET Unix socket, with
 * descriptors in SCM_RIGHTS. This header is the leaf of the project: the daemon, the C library and the Python
 * client all read it, and it includes nothing of ours.
 *
 *   client                                   daemon
 *     HELLO ───────────────────────────────►   authenticates by SO_PEERCRED (and by token, see kinds)
 *                ◄─────────────────────────── WELCOME  + fds: [userfaultfd device] [huge file] [small file]
 *                                                             [ring, its doorbell] [channel]
 *                ◄─────────────────────────── REGION × welcome.region_count, each + 1 fd
 *     (maps the regions)
 *     UFFD + fd ───────────────────────────►   checks the fd, UFFDIO_API, UFFDIO_REGISTER
 *                ◄─────────────────────────── READY    + fds: [agent]
 *
 *   FILE, on a connection of its own:
 *     HELLO ───────────────────────────────►
 *                ◄─────────────────────────── WELCOME
 *     FILE + fd ───────────────────────────►   checks the fd, makes a region over it
 *                ◄─────────────────────────── READY, REGION (without a fd: it is in the session's small file)
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
	GMEM_WIRE_FILE = 8,
	GMEM_WIRE_ASK = 6,
	GMEM_WIRE_ANSWER = 7,
};

enum gmem_wire_kind {
	GMEM_WIRE_CLIENT = 1,     /* a new session; token ignored */
	GMEM_WIRE_FORK_CHILD = 2, /* child of the session whose token is sent; becomes a session of its own */
	GMEM_WIRE_CONTEXT = 3,    /* device context process of the session whose token is sent */
	GMEM_WIRE_MAP_FILE = 6,   /* hands over a file for the session whose token is sent, and ends then */
	GMEM_WIRE_FILES = 5,      /* for files of the session whose token is sent: WELCOME, then ASK and ANSWER in turn; device:
				   * empty, or that of the context which the process is */
	GMEM_WIRE_ADMIN = 4,      /* a token for requests only: no memory, no uffd, ends after WELCOME */
};

/* hello.flags */
#define GMEM_WIRE_WANT_RING (1u << 0)      /* the client can take two more descriptors with WELCOME */
#define GMEM_WIRE_WANT_AGENT (1u << 1)     /* it has an agent: the file of struct gmem_agent_shared may come with READY */

/* welcome.flags */
#define GMEM_WIRE_HAS_UFFD_DEV (1u << 0)   /* an open /dev/userfaultfd is passed: ioctl(fd, USERFAULTFD_IOC_NEW) */
#define GMEM_WIRE_HAS_HUGE (1u << 1)       /* the hugetlb file is passed */
#define GMEM_WIRE_HAS_SMALL (1u << 2)      /* the shmem file is passed */
#define GMEM_WIRE_EVENT_FORK (1u << 3)     /* forks arrive as uffd events: leave regions inheritable */
#define GMEM_WIRE_FORK_STORED (1u << 4)    /* FORK_CHILD: the child's uffd is stored already; only READY follows */
#define GMEM_WIRE_HAS_RING (1u << 5)       /* two descriptors: struct gmem_ring_shared to map, and its eventfd */
#define GMEM_WIRE_HAS_CHANNEL (1u << 6)    /* CONTEXT: this process is the context itself; only READY follows */
#define GMEM_WIRE_HAS_CUDA (1u << 7)       /* contexts on CUDA devices need the window reserved before anything is in it */
/* Without HAS_UFFD_DEV a client makes its uffd by userfaultfd(UFFD_USER_MODE_ONLY): system calls on memory that is
 * not mapped yet then fail with EFAULT, so it touches the range itself first. */

/* region.flags */
#define GMEM_WIRE_REGION_HUGE (1u << 0)  /* backed by hugetlb pages */
#define GMEM_WIRE_REGION_READ_ONLY (1u << 1) /* to be mapped PROT_READ and MAP_PRIVATE; the descriptor can't write */

struct gmem_wire_header {
	uint32_t magic;
	uint16_t version;
	uint16_t type;
};

struct gmem_wire_hello {
	struct gmem_wire_header header;
	uint32_t kind;
	uint32_t flags;
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

/* file.flags */
#define GMEM_WIRE_FILE_WRITE (1u << 0)      /* `flush` writes back what was changed */
#define GMEM_WIRE_FILE_NO_INHERIT (1u << 1) /* a forked child gets nothing of the region */
#define GMEM_WIRE_FILE_PRIVATE (1u << 2)    /* it may be changed and the file not: not with WRITE */

struct gmem_wire_file { /* + 1 fd: a regular file, open for reading, with WRITE for both */
	struct gmem_wire_header header;
	uint64_t offset, bytes; /* of the file; offset is a multiple of 4096 */
	uint32_t page_bytes;    /* as of mmap */
	uint32_t flags;
};

enum gmem_wire_ask_what {
	GMEM_WIRE_ASK_FILE = 1,     /* the file of the region that begins at va */
	GMEM_WIRE_ASK_MAPPED = 2,   /* contexts: [va, va + bytes) has been mapped from such files, over the window */
	GMEM_WIRE_ASK_RESTORED = 3, /* contexts: it is the window again */
};

struct gmem_wire_ask {
	struct gmem_wire_header header;
	uint32_t what;
	uint32_t reserved;
	uint64_t va, bytes; /* FILE: bytes is 0 */
};

struct gmem_wire_answer { /* FILE: + 1 fd */
	struct gmem_wire_header header;
	int32_t status;     /* 0 or -errno; then only message is valid */
	uint32_t flags;     /* of a region */
	uint64_t va, bytes, offset;
	uint32_t page_bytes;
	uint32_t reserved;
	char message[GMEM_WIRE_MESSAGE_BYTES];
};

/* ready.flags */
#define GMEM_WIRE_HAS_AGENT (1u << 0)      /* one descriptor: struct gmem_agent_shared to map */

struct gmem_wire_ready { /* + [agent] */
	struct gmem_wire_header header;
	int32_t status;
	uint32_t flags;
	char message[GMEM_WIRE_MESSAGE_BYTES];
};

/* ---- the ring: requests of one session through shared memory ----
 *
 * A file of GMEM_RING_BYTES: struct gmem_ring_shared, then sq_entries of struct gmem_ring_sqe at sq_offset, then
 * cq_entries of struct gmem_ring_cqe at cq_offset. Heads and tails count up for ever; entry i is at i & (entries - 1).
 *
 * Submitting: write the entry, store sq_tail (release), full fence; if server_flags has GMEM_RING_SLEEPS, write to the
 * eventfd. Never more than sq_entries ahead of sq_head. Waiting: store 1 to client_waits, full fence, look at cq_tail
 * again, FUTEX_WAIT on it (shared), store 0. Having read entries: store cq_head (release), full fence; if server_flags
 * has GMEM_RING_FULL, write to the eventfd. A sq_tail or cq_head out of bounds breaks the ring for good.
 *
 * Entries of one stream are done in order, those of several at the same time; completions come in any order.
 */
#define GMEM_RING_MAGIC 0x474e4952u /* "RING" */
#define GMEM_RING_VERSION 1
#define GMEM_RING_SQ_ENTRIES 256u
#define GMEM_RING_CQ_ENTRIES 512u
#define GMEM_RING_SQ_OFFSET 4096u
#define GMEM_RING_CQ_OFFSET (GMEM_RING_SQ_OFFSET + GMEM_RING_SQ_ENTRIES * 64u)
#define GMEM_RING_BYTES (GMEM_RING_CQ_OFFSET + GMEM_RING_CQ_ENTRIES * 64u)

/* server_flags */
#define GMEM_RING_SLEEPS (1u << 0) /* gmemd looks again when the eventfd is written */
#define GMEM_RING_FULL (1u << 1)   /* it waits for room in the completion queue */
#define GMEM_RING_BROKEN (1u << 2) /* the client has written nonsense: not served any more */
#define GMEM_RING_CLOSED (1u << 3) /* the session has ended */

enum gmem_ring_op {
	GMEM_RING_NOP = 0,
	GMEM_RING_ADVISE,      /* hnid, va, bytes; arg: enum gmem_advice */
	GMEM_RING_PREFETCH,    /* hnid, va, bytes */
	GMEM_RING_DISCARD,     /* va, bytes */
	GMEM_RING_HMEMCPY,     /* hnid, va: destination, bytes; arg: source */
	GMEM_RING_MMAP,        /* bytes; arg: page_bytes; va: not below; flags. Completion: values[] by enum gmem_ring_value */
	GMEM_RING_MMAP_COMMIT, /* va */
	GMEM_RING_MUNMAP,      /* va, bytes */
	GMEM_RING_ACQUIRE,     /* va, bytes; arg: context; flags. Completion: values[GMEM_RING_HOLD] is its name */
	GMEM_RING_RELEASE,     /* va, bytes; arg: context; hold, index */
	GMEM_RING_REGION,      /* va; flags. Completion: values[] of the region that it lies in */
	GMEM_RING_ADOPT,       /* va: where the memory is, bytes; arg: page_bytes; flags. Completion: as of MMAP */
	GMEM_RING_OP_COUNT,
};

/* sqe.flags */
#define GMEM_RING_NO_INHERIT (1u << 0) /* MMAP, ADOPT: a forked child gets nothing of it */
#define GMEM_RING_SMALL (1u << 1)      /* MMAP */
#define GMEM_RING_WRITE (1u << 2)      /* ACQUIRE */
#define GMEM_RING_TOUCHED (1u << 3)    /* HMEMCPY: pages of the source that nobody has touched leave dst as it is */
#define GMEM_RING_NEXT (1u << 4)       /* REGION: or the next one behind va */
#define GMEM_RING_COPY (1u << 5)       /* MMAP, ADOPT: a forked child puts a copy in its place */
#define GMEM_RING_KEEP (1u << 6)       /* MMAP, MUNMAP: see below */

/* Which argument a failure is about. */
enum gmem_ring_blame {
	GMEM_RING_BLAME_NONE = 0,
	GMEM_RING_BLAME_OP,
	GMEM_RING_BLAME_FLAGS,
	GMEM_RING_BLAME_HNID,
	GMEM_RING_BLAME_VA,
	GMEM_RING_BLAME_BYTES,
	GMEM_RING_BLAME_ADVICE,
	GMEM_RING_BLAME_DST,
	GMEM_RING_BLAME_SRC,
	GMEM_RING_BLAME_PAGE_BYTES,
	GMEM_RING_BLAME_CONTEXT,
	GMEM_RING_BLAME_RANGES,
	GMEM_RING_BLAME_COUNT,
};

enum gmem_ring_value {
	GMEM_RING_VA = 0,
	GMEM_RING_HOLD = 0,
	GMEM_RING_LENGTH,
	GMEM_RING_OFFSET,
	GMEM_RING_PAGE_BYTES,
	GMEM_RING_HUGE,
	GMEM_RING_KEPT, /* MMAP: the range is one that the client keeps: it is mapped, and needs no commit */
	GMEM_RING_COPIED = GMEM_RING_KEPT, /* REGION: a forked child puts a copy in its place */
	GMEM_RING_VALUES,
};

/* MUNMAP with KEEP: of a whole region that is still mapped. It stays so, for a later region of its size, and nobody may touch
 * it; its content goes. -EAGAIN: not this one, nothing has changed, unmap it. MMAP with KEEP: such a range will do. What
 * is kept is the client's to unmap at any time; who has a successor of gmemd should, as that does not know of it. */

struct gmem_ring_sqe {
	uint64_t user_data; /* comes back with the completion */
	uint16_t op;
	uint16_t flags;
	uint16_t stream;
	int16_t hnid;
	uint64_t va, bytes, arg;
	uint64_t hold;  /* RELEASE: what the acquire was given as its name; 0: any hold of that range */
	uint32_t index; /* RELEASE: which of that acquire's ranges */
	uint32_t reserved[3];
};

struct gmem_ring_cqe {
	uint64_t user_data;
	int32_t result; /* 0 or -errno */
	uint32_t blame; /* enum gmem_ring_blame */
	uint64_t values[6];
};

/* Words that change have a cache line of their own; all are accessed atomically. */
struct gmem_ring_shared {
	uint32_t magic;
	uint32_t version;
	uint32_t sq_entries, cq_entries;
	uint32_t sq_offset, cq_offset;
	uint32_t reserved[10];
	uint32_t sq_tail, pad0[15];      /* client */
	uint32_t sq_head, pad1[15];      /* gmemd */
	uint32_t cq_tail, pad2[15];      /* gmemd; the client's futex */
	uint32_t cq_head, pad3[15];      /* client */
	uint32_t server_flags, pad4[15]; /* gmemd */
	uint32_t client_waits, pad5[15]; /* client: gmemd is to wake its futex */
};

/* ---- the agent: ageing without access bits ----
 *
 * A thread of the client's that drops translations when gmemd asks: madvise(MADV_DONTNEED) of a shared mapping keeps its
 * pages, and the next touch of each is a cheap fault that says it is in use. What is not touched leaves first.
 *
 * gmemd writes entries, then head (release), and wakes head (FUTEX_WAKE, shared); the client stores tail (release) behind
 * what it has done. Heads and tails count up for ever; entry i is at i % GMEM_AGENT_ENTRIES. A range outside the window is
 * ignored.
 */
#define GMEM_AGENT_MAGIC 0x544e4741u /* "AGNT" */
#define GMEM_AGENT_ENTRIES 240u
#define GMEM_AGENT_BYTES 4096u

struct gmem_agent_entry {
	uint64_t va, bytes;
};

struct gmem_agent_shared {
	uint32_t magic, pad0[15];
	uint32_t head, pad1[15]; /* gmemd; the client's futex */
	uint32_t tail, pad2[15]; /* client */
	struct gmem_agent_entry entries[GMEM_AGENT_ENTRIES];
};

/* ---- the channel: what the driver of a device that makes its own frames asks of a context's process ----
 *
 * A SEQPACKET socket pair. gmemd says struct gmem_channel_hello once, then sends batches of steps, which are done in
 * order; each batch is answered by struct gmem_channel_done, in order. A batch carries one descriptor for each of its
 * IMPORT steps. Whoever does not answer in time loses the context; when the socket ends, the process removes every
 * translation that it has made.
 *
 * A gmemd that has taken over from one that was killed has the same socket, but not what was said on it. Its first batch is
 * one step, LIST, with a number that no other batch has: the process says what it has imported and mapped in any number of
 * struct gmem_channel_list, each with that number and at least one frame, and then answers as always. What is in the socket
 * before that is answers to the predecessor's batches. Numbers begin with 1 again.
 */
#define GMEM_CHANNEL_MAGIC 0x4e414843u /* "CHAN" */
#define GMEM_CHANNEL_VERSION 2u
#define GMEM_CHANNEL_STEPS 64u

enum gmem_channel_op {
	GMEM_CHANNEL_IMPORT = 1, /* frame: a number for what the descriptor stands for */
	GMEM_CHANNEL_FORGET,     /* frame: it is mapped nowhere; let go of it */
	GMEM_CHANNEL_MAP,        /* frame, va, writable */
	GMEM_CHANNEL_UNMAP,      /* frame, va */
	GMEM_CHANNEL_PROTECT,    /* frame, va, writable */
	GMEM_CHANNEL_LIST,       /* alone in its batch: what is there? */
};

struct gmem_channel_hello {
	uint32_t magic, version;
	uint8_t uuid[16];      /* which device */
	uint32_t frame_count;  /* numbers are below */
	uint32_t frame_bytes;
};

struct gmem_channel_step {
	uint32_t op, frame;
	uint64_t va;
	uint32_t writable, reserved;
};

struct gmem_channel_batch { /* as many steps as it says */
	uint64_t sequence; /* 1, 2, ... */
	uint32_t count, reserved;
	struct gmem_channel_step steps[GMEM_CHANNEL_STEPS];
};

struct gmem_channel_done {
	uint64_t sequence;
	int32_t status; /* 0 or -errno */
	int32_t error;  /* the device's own word for it */
};

struct gmem_channel_frame {
	uint32_t frame, writable;
	uint64_t va; /* 0: it is not mapped */
};

struct gmem_channel_list { /* as many frames as it says */
	uint64_t sequence;
	uint32_t count, reserved;
	struct gmem_channel_frame frames[GMEM_CHANNEL_STEPS];
};

#endif
