/* SPDX-License-Identifier: Apache-2.0
 *
 * Source: where the content of an object's pages comes from that nobody has touched yet; without one they are zero. A page
 * that was not changed since (GMEM_PAGE_CHANGED) need not be kept anywhere: reclaim drops it, and it is read again.
 *
 * A source is read and written with the page's BUSY held, from fillers and the control plane only, never from fault threads:
 * it may block. What it gives for the same bytes must be the same until the object is gone, or whoever dropped a page
 * sees another one. A failed read is SIGBUS at the touch, and is tried again at the next.
 */
#ifndef GMEM_SOURCE_H
#define GMEM_SOURCE_H

#include <gmem/types.h>

struct gmem_source;

struct gmem_source_ops {
	const char *name;
	/* All of [offset, offset + bytes), in the object's offsets, into memory that is the daemon's alias: 0 or -errno. */
	int (*read)(struct gmem_source *source, uint64_t offset, uint8_t *dst, uint64_t bytes);
	/* The other way; NULL: what was changed is never written back. */
	int (*write)(struct gmem_source *source, uint64_t offset, const uint8_t *src, uint64_t bytes);
	/* What was written is to survive. NULL: it does. */
	int (*sync)(struct gmem_source *source);
	void (*destroy)(struct gmem_source *source);
};

/* The first member of a source's own struct. Belongs to one object. */
struct gmem_source {
	const struct gmem_source_ops *ops; /* (C) */
};

/* Reads into fresh pages of to's file. */
struct gmem_object;
int gmem_source_fill(struct gmem_object *object, int hnid, uint64_t offset, uint64_t bytes);

/* ---- files (filesource.c) ---- */

struct gmem_file_args {
	uint64_t offset, bytes; /* of the file: what is mapped; offset is a multiple of 4096 */
	bool write;             /* gmem_flush() writes back, and so does reclaim */
	bool private_;          /* may be changed, and is kept as other memory then: room for all of it is promised */
};

/* -EBADF: not a descriptor that can be read (and written); -EINVAL: not a regular file, or one opened with O_APPEND or O_DIRECT, or
 * it ends before; -EOPNOTSUPP: not a local file system. *ret_why says which, for people. */
int gmem_file_check(int fd, const struct gmem_file_args *args, const char **ret_why);
/* Takes fd over on success; -1: one that is lost, and whose reads fail. */
int gmem_filesource_create(int fd, const struct gmem_file_args *args, struct gmem_source **ret);
/* NULL, or which file it is. */
const struct gmem_file_args *gmem_filesource_args(const struct gmem_source *source, int *ret_fd);

#endif
