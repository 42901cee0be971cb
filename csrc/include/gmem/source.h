/* SPDX-License-Identifier: Apache-2.0
 *
 * Source: where the content of an object's pages comes from that are nowhere here (NOMAP). Without one such a page reads
 * zero. With one, the first touch pulls it, and what was pulled and not written since leaves again by being dropped. A
 * pool's pages may so come from another object of this daemon (pool.h), or from another machine.
 *
 * A source is set before anybody can map the object, or with the object sealed, and stays for the object's life.
 */
#ifndef GMEM_SOURCE_H
#define GMEM_SOURCE_H

#include <stdatomic.h>

#include <gmem/driver.h>
#include <gmem/types.h>

struct gmem_core;
struct gmem_object;
struct gmem_record;
struct gmem_source;

struct gmem_source_ops {
	/* Fills io[i].memory with page io[i].key (its index in the object) and sets io[i].result: 0; -ENODATA: nobody has
	 * ever written to it, it is zeros (memory may be left as it was: it has been zeroed); -EAGAIN: not now, the access is
	 * tried again; any other -errno: it can't be had, the access gets SIGBUS. On any thread, several at a time; the pages
	 * are BUSY, no lock is held. It must not wait for another page of this daemon. */
	void (*pull)(struct gmem_source *source, struct gmem_peer_io *io, size_t count);
	/* The other way, NULL: what was changed is kept like other memory. */
	int (*push)(struct gmem_source *source, uint64_t index, const uint8_t *memory, uint64_t bytes);
	/* What was pushed is to survive the machine's end; NULL: it does. */
	int (*sync)(struct gmem_source *source);
	/* The object is gone. */
	void (*release)(struct gmem_source *source);
	/* What a successor needs to make it again: fields source and source_* of an object's record, whose bytes are known, and a
	 * descriptor (-1: it is lost), which stays the source's. NULL: the record of its object says all. */
	void (*describe)(const struct gmem_source *source, struct gmem_record *record, int *ret_fd);
};

struct gmem_source {
	const struct gmem_source_ops *ops;
	bool tracks; /* (C) pages may be written to: GMEM_PAGE_CHANGED says that one is not what the source has */
	bool slow; /* (C) for fillers, who may wait, and never for fault threads */
};

/* Once, before anybody can map the object or with it sealed; takes the source over. */
void gmem_source_set(struct gmem_object *object, struct gmem_source *source);
void gmem_source_release(struct gmem_source *source); /* NULL is allowed */
/* Pages [index, index + count) to memory; the first failure. -ENODATA is none. */
int gmem_source_pull(struct gmem_object *object, uint64_t index, size_t count, uint8_t *memory);

/* Whose pages are copies of another object's at the same offsets. References it. */
int gmem_source_of_object(struct gmem_object *from, struct gmem_source **ret);

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

/* ---- versions of pools that other machines have published (remotesource.c) ---- */

struct gmem_manifest {
	struct gmem_pool_version version; /* name and arrays are copied */
	int hnid;                         /* of the device whose servers have it */
};

/* -EOPNOTSUPP: that device has no such pools. */
int gmem_remotesource_create(struct gmem_core *core, const struct gmem_manifest *manifest, struct gmem_source **ret);
/* One that a predecessor had described by fd, which is taken over; -1, or no such thing: one whose reads fail. */
int gmem_remotesource_adopt(struct gmem_core *core, int fd, struct gmem_source **ret);
/* NULL: it is no such source. */
const struct gmem_pool_version *gmem_remotesource_version(const struct gmem_source *source);
/* Bytes that have come from servers since this daemon began; 0 for other sources. */
uint64_t gmem_remotesource_fetched(const struct gmem_source *source);

#endif
