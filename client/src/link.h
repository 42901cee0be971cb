/* SPDX-License-Identifier: Apache-2.0
 *
 * The part of the client that libgmem and the Python package share: handshake, mappings, userfaultfd, fork. Requests are
 * not here: Python sends them with pyzmq, libgmem with libzmq.
 *
 * A link is this process's connection to one gmemd: as a client, or (in a device context's process) as a context. All
 * functions return 0 or -errno and are thread-safe.
 */
#ifndef GMEM_CLIENT_LINK_H
#define GMEM_CLIENT_LINK_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include <gmem_wire.h>

#define GMEM_FILES 2 /* small, huge */
#define GMEM_LINK_KEPT 12 /* fewer than gmemd allows, so that it need not refuse */

struct gmem_agent;
struct gmem_beside;
struct gmem_ring;

struct gmem_link_region {
	uint64_t va, bytes;
	bool inherit; /* a forked child shares it */
	bool pooled;  /* contexts have it over their window */
};

struct gmem_link {
	int sock;
	int files_sock;                 /* lock; -1: none yet */
	int uffd_dev;                   /* an open /dev/userfaultfd, -1: user mode only */
	int uffd;                       /* our dup: while it is open, a lost daemon leaves us blocked, not reading zeros */
	int files[GMEM_FILES];          /* -1 where there is none */
	uint64_t inodes[GMEM_FILES];    /* of files; 0 where there is none */
	bool copies;                    /* it has had regions that forked children get a copy of */
	int torn;                       /* over a fork: why its child can't get them; 0: it can */
	int channel;                    /* a context in this process (cuda.h); -1: it is no such */
	struct gmem_ring *ring;         /* NULL: requests go over the control plane only */
	struct gmem_agent *agent;       /* NULL: gmemd has not asked for one */
	struct gmem_beside *beside;     /* what of adopted memory stays mapped */
	struct gmem_wire_welcome hello; /* what the daemon said */
	char path[GMEM_WIRE_PATH_BYTES];
	char message[GMEM_WIRE_MESSAGE_BYTES]; /* why the last handshake failed */
	int status;                     /* 0; after a fork whose child could not join: -errno */
	pid_t pid;
	bool context;
	char device[GMEM_WIRE_NAME_BYTES]; /* contexts: on which */
	pthread_mutex_t lock;           /* guards regions and kept */
	struct gmem_link_region *regions;
	size_t region_count, region_capacity;
	struct gmem_link_region kept[GMEM_LINK_KEPT]; /* ranges given back and still mapped (GMEM_RING_KEEP); oldest first */
	size_t kept_count;
	struct gmem_link *next;         /* all links of the process, for fork */
};

/* ---- link.c ---- */

/* Connects as a client. message: GMEM_WIRE_MESSAGE_BYTES, filled on failure. */
int gmem_link_open(const char *path, struct gmem_link **ret, char *message);
/* Connects this process as a device context of the session whose token is given, and maps the whole window; unless gmemd
 * gives it a channel, for a context in the client's own process. */
int gmem_link_open_context(const char *path, const uint8_t token[GMEM_WIRE_TOKEN_BYTES], const char *device,
			   struct gmem_link **ret, char *message);
/* Unmaps what is still mapped and ends the session. */
void gmem_link_close(struct gmem_link *link);

/* Before its userfaultfd is closed, which it uses. */
void gmem_link_stop_agent(struct gmem_link *link);

/* Accessors, for callers that do not know the struct (cffi). */
const uint8_t *gmem_link_token(const struct gmem_link *link);
const char *gmem_link_control(const struct gmem_link *link);
const char *gmem_link_events(const struct gmem_link *link);
uint64_t gmem_link_session(const struct gmem_link *link);
uint32_t gmem_link_flags(const struct gmem_link *link);
uint64_t gmem_link_window_base(const struct gmem_link *link);
uint64_t gmem_link_window_bytes(const struct gmem_link *link);
int gmem_link_hnid(const struct gmem_link *link);
/* Readable at its end when the daemon is gone. */
int gmem_link_socket(const struct gmem_link *link);
/* gmemd is gone, or has ended this session: nobody reads the events that munmap(2) and fork() wait for. */
bool gmem_link_is_lost(const struct gmem_link *link);
/* Whether any link of this process has mapped any of it. */
bool gmem_link_any_maps(uint64_t va, uint64_t bytes);
int gmem_link_status(const struct gmem_link *link);
const char *gmem_link_message(const struct gmem_link *link);

/* ---- files.c ---- */

/* Maps the region that gmemd has reserved at va from the file that it gives, which is not one of the session's own; the
 * caller then commits it. -EEXIST: that range is in use here. */
int gmem_link_map_file(struct gmem_link *link, uint64_t va, bool inherit);
/* In a context's process, with no kernel running: maps the region at va over the window, or the window there again. */
int gmem_link_overlay(struct gmem_link *link, uint64_t va);
int gmem_link_uncover(struct gmem_link *link, uint64_t va, uint64_t bytes);
void gmem_link_close_files(struct gmem_link *link);
/* Whether any of it was mapped by gmem_link_map_file(). */
bool gmem_link_is_pooled(struct gmem_link *link, uint64_t va, uint64_t bytes);

/* ---- map.c ---- */

/* Maps a region that the daemon has reserved; the caller then commits it. -EEXIST: that range is in use here. */
int gmem_link_map(struct gmem_link *link, uint64_t va, uint64_t bytes, uint64_t offset, bool huge, bool inherit);
/* The same from a descriptor, which stays the caller's. */
int gmem_link_map_fd(struct gmem_link *link, uint64_t va, uint64_t bytes, int fd, uint64_t offset, bool read_only,
		     bool inherit);
int gmem_link_unmap(struct gmem_link *link, uint64_t va, uint64_t bytes);
/* Whether the range is one region of the table, which gmemd may be asked to leave mapped; makes room for it. The caller
 * keeps every mmap and munmap of this link out from before this call until gmem_link_kept(). */
bool gmem_link_may_keep(struct gmem_link *link, uint64_t va, uint64_t bytes);
/* gmemd has said yes. */
void gmem_link_kept(struct gmem_link *link, uint64_t va, uint64_t bytes);
/* gmemd has given a kept range out again: a region, and mapped. -EEXIST: it is not kept here. */
int gmem_link_reuse(struct gmem_link *link, uint64_t va, uint64_t bytes);
/* Drops a range from the table: it has been moved away, over a range that is in the table already. */
int gmem_link_forget(struct gmem_link *link, uint64_t va, uint64_t bytes);
/* Keeps the regions from children that are forked later. */
void gmem_link_withhold_locked(struct gmem_link *link);
/* Forgets or unmaps everything in the table. */
void gmem_link_unmap_all(struct gmem_link *link);
/* Maps a REGION message's file over its range (context overlays, regions of a forked child). Closes fd. */
int gmem_link_map_region(struct gmem_link *link, const struct gmem_wire_region *region, int fd, bool inherit);
/* In a context's process: memory that its client has adopted, at its address. -EEXIST: something is mapped there. */
int gmem_link_map_beside(struct gmem_link *link, uint64_t va, uint64_t bytes, uint64_t offset);
/* Both parts of the window, whole, in a context's process. */
int gmem_link_map_window(struct gmem_link *link);
void gmem_link_unmap_window(struct gmem_link *link);

/* ---- uffd.c ---- */

/* A fresh non-blocking userfaultfd: from the passed device, or user mode only. fd or -errno. */
int gmem_link_new_uffd(struct gmem_link *link);
/* Touches every 4 KiB of a range from user mode, so that system calls find it mapped (user mode only: see
 * gmem_wire.h). write: makes it writable too, without changing it. */
void gmem_link_touch(uint64_t va, uint64_t bytes, bool write);

/* ---- handshake.c ---- */

/* False: no thread is to be started in this process. */
extern bool gmem_link_may_start_agent;

/* The whole handshake on a fresh connection to link->path. token and device: NULL where the kind has none. */
int gmem_link_handshake(struct gmem_link *link, uint32_t kind, const uint8_t *token, const char *device);
/* Has gmemd make a region over a file of ours, to be mapped and committed as any other; nothing is opened there. fd stays
 * ours. flags: GMEM_WIRE_FILE_*. message: GMEM_WIRE_MESSAGE_BYTES, filled on failure, argument first. */
int gmem_link_give_file(const struct gmem_link *link, int fd, uint64_t offset, uint64_t bytes, uint32_t page_bytes,
			uint32_t flags, struct gmem_wire_region *ret, char *message);
/* Closes the handshake's descriptors. */
void gmem_link_hang_up(struct gmem_link *link);

#endif
