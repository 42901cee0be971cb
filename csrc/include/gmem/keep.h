/* SPDX-License-Identifier: Apache-2.0
 *
 * Keep: what outlives this process, so that a successor can go on. Descriptors are held by whoever started the daemon
 * (systemd, or `gmemd run --supervised`: sd_notify's FDSTORE), each under a name. Everything else that can't be found out
 * from them is in records of a fixed size in a memfd that is held too. What a page's content is and where, only the
 * logical page table says (lpt.h).
 *
 * A record is valid from the store of its kind on, and changed by writing a new one that names the one it replaces: a
 * reader that comes at any instant finds the one or the other.
 *
 * Names of descriptors: state, lpt; file.SESSION.HNID.CLASS; uffd.SESSION.CONTEXT, pid.SESSION.CONTEXT,
 * agent.SESSION.CONTEXT (context 0: the process itself), or chan.SESSION.CONTEXT; ring.SESSION, bell.SESSION, jobs.SESSION; driver.HNID.NAME.
 */
#ifndef GMEM_KEEP_H
#define GMEM_KEEP_H

#include <sys/types.h>

#include <gmem/lockrank.h>
#include <gmem/memfd.h>
#include <gmem/types.h>

#define GMEM_KEEP_NAME 64
#define GMEM_STATE_MAGIC 0x45544154534d4547ull /* "GEMSTATE" */
#define GMEM_STATE_VERSION 4                   /* of this file, and of the words of lpt.h */

enum gmem_record_kind {
	GMEM_RECORD_FREE,
	GMEM_RECORD_ACCOUNT,
	GMEM_RECORD_SESSION,
	GMEM_RECORD_OBJECT,
	GMEM_RECORD_REGION,
	GMEM_RECORD_CONTEXT,
	GMEM_RECORD_HINT,
	GMEM_RECORD_HOLD,
	GMEM_RECORD_POOL,
	GMEM_RECORD_OVERLAY,
	GMEM_RECORD_KINDS,
};

/* Flags of an object's record. */
#define GMEM_OBJECT_POOLED 1
#define GMEM_OBJECT_SEALED 2
#define GMEM_OBJECT_SUCCEEDED 4

enum gmem_record_source { GMEM_RECORD_NO_SOURCE, GMEM_RECORD_FILE, GMEM_RECORD_FILE_WRITE, GMEM_RECORD_FILE_PRIVATE,
			  GMEM_RECORD_REMOTE };

struct gmem_record {
	_Atomic uint32_t kind;
	uint32_t replaces; /* number of a record, 0: none */
	uint64_t id;       /* of the session, account, context or pool; OBJECT, REGION: first page number (pn); HINT: session; OVERLAY: context */
	union {
		struct {
			uint64_t parent; /* 0: none */
			uint32_t uid;
		} account;
		struct {
			uint64_t parent;
			uint32_t uid;
			int32_t pid;
			uint8_t stored, bound;
		} session;
		struct {
			uint64_t account, files, offset, bytes; /* files: the account whose they are */
			uint64_t successor; /* one more than the first page number of the object that its pages are copies of; 0: none */
			uint64_t source_offset;
			uint32_t source_tail; /* so much less than bytes is the file's */
			uint8_t shift, class_, flags, source; /* enum gmem_record_source */
		} object;
		struct {
			uint64_t session, va, bytes, offset, asked;
			uint8_t fork, committed, read_only;
		} region;
		struct {
			uint64_t session;
			int32_t hnid, pid;
		} context;
		struct {
			uint64_t va, end;
			int8_t preferred;
			uint8_t read_mostly;
			uint16_t accessed_by;
		} hint;
		struct {
			uint64_t va, bytes, asked;
			uint32_t index;
		} hold;
		struct {
			uint64_t object, other; /* first page number; other: one more than that of the one that is to take its place, or, when
						 * published, of the one whose place it has taken; 0: none */
			uint8_t published;
		} pool;
		struct {
			uint64_t va, bytes, object;
		} overlay;
	};
};

struct gmem_state_header {
	uint64_t magic;
	uint32_t version, record_bytes;
	uint64_t window_base, window_bytes, lpt_pages;
	_Atomic uint64_t next_id; /* of sessions and contexts: below are used */
};

struct gmem_kept_fd {
	char name[GMEM_KEEP_NAME];
	int fd;
};

struct gmem_keep {
	int socket;                     /* (C) where descriptors are sent to; -1: nothing is kept */
	uint32_t max_fds;               /* (C) how many may be held */
	struct gmem_file *file;         /* (C) */
	struct gmem_state_header *header; /* (C) */
	struct gmem_record *records;    /* (C) [0] is unused */
	struct gmem_mutex lock;
	uint32_t bumped, free_count, free_capacity; /* lock */
	uint32_t *free;                 /* lock */
	uint32_t held_fds;              /* lock */
	struct gmem_kept_fd *left;      /* lock; of the predecessor, and not taken yet */
	size_t left_count;              /* lock */
};

#define GMEM_DRIVER_NAME 16

/* What one driver has held. */
struct gmem_driver_keep {
	struct gmem_keep *keep; /* (C) */
	int hnid;               /* (C) */
	bool takes_over;        /* (C) a predecessor's state is being taken over: settle will come */
	struct gmem_mutex lock;
	bool restored;          /* lock; it has got its predecessor's */
	size_t count, capacity; /* lock */
	char (*names)[GMEM_DRIVER_NAME]; /* lock */
};

void gmem_driver_keep_init(struct gmem_driver_keep *driver, struct gmem_keep *keep, int hnid);
void gmem_driver_keep_deinit(struct gmem_driver_keep *keep); /* NULL is allowed */
/* Has all of it given up; NULL is allowed. */
void gmem_driver_forget(struct gmem_driver_keep *keep);

static inline bool gmem_keeps(const struct gmem_keep *keep) { return keep->socket >= 0; }

/* socket: a connected datagram socket that is taken over, -1: nothing is kept. left: what a predecessor left; the
 * descriptors are taken over. -EPROTO: its state is of another version, or damaged: nothing was touched. */
int gmem_keep_init(struct gmem_keep *keep, int socket, uint32_t max_fds, const struct gmem_kept_fd *left,
		   size_t left_count);
void gmem_keep_deinit(struct gmem_keep *keep);
/* A predecessor's records are there. */
bool gmem_keep_recovers(const struct gmem_keep *keep);

/* Has a descriptor held; it stays the caller's. -ENFILE: as many as may be are. */
__attribute__((format(printf, 3, 4))) int gmem_keep_fd(struct gmem_keep *keep, int fd, const char *format, ...);
__attribute__((format(printf, 2, 3))) void gmem_keep_forget(struct gmem_keep *keep, const char *format, ...);
/* The descriptor that the predecessor left under this name, now the caller's; -1: none. */
__attribute__((format(printf, 2, 3))) int gmem_keep_take(struct gmem_keep *keep, const char *format, ...);
/* What nobody has taken is given up. */
void gmem_keep_drop_left(struct gmem_keep *keep);
/* All that is held is given up: the core has ended in order. */
void gmem_keep_end(struct gmem_keep *keep);

/* Writes a record, in place of *number if that is not 0, and sets *number. -ENOSPC. Does nothing if nothing is kept. */
int gmem_record_put(struct gmem_keep *keep, const struct gmem_record *record, uint32_t *number);
void gmem_record_drop(struct gmem_keep *keep, uint32_t *number);
/* The next valid record of that kind behind number; 0: none. For recovery, before anything is put. */
uint32_t gmem_record_next(struct gmem_keep *keep, enum gmem_record_kind kind, uint32_t number,
			  struct gmem_record *ret);
/* A number that no session or context of a predecessor had. */
uint64_t gmem_keep_next_id(struct gmem_keep *keep, _Atomic uint64_t *next);

#endif
