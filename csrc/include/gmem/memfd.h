/* SPDX-License-Identifier: Apache-2.0
 *
 * Files: sparse memfds that are the physical memory of one (session, page class) on one hnode, or of the LPT. One of
 * the two doors to the OS. Content is reached through aliases, mappings in the daemon; whoever holds the memfd can
 * punch it, so every copy from or to an alias goes through gmem_copy(), which turns SIGBUS into -EFAULT.
 */
#ifndef GMEM_MEMFD_H
#define GMEM_MEMFD_H

#include <gmem/types.h>

struct gmem_hnode;
struct gmem_mem;

struct gmem_file {
	atomic_uint refs;       /* (A) */
	int fd;                 /* (C) */
	enum gmem_class class_; /* (C) */
	uint64_t bytes;         /* (C) */
	uint64_t owner;         /* (C) session id, to tell own files from a parent's */
	struct gmem_mem *mem;   /* (C) device memory instead of a memfd (devmem.h); NULL: a memfd */
	struct gmem_hnode *hnode; /* (C) the device's; NULL: a memfd */
	struct gmem_file *next; /* account->lock; of a device that is gone */
	atomic_bool zeroing;    /* (A) a thread makes pages that read zero */
	_Atomic int lent[2];    /* (A) descriptors to be passed on: to read and write, to read only; -1: not made yet */
};

/* Sealed against shrink and grow. hugetlb reserves nothing. */
int gmem_file_create(const char *name, enum gmem_class class_, uint64_t bytes, uint64_t owner, struct gmem_file **ret);
/* One that a predecessor made; takes the descriptor over on success. */
int gmem_file_adopt(int fd, enum gmem_class class_, uint64_t bytes, uint64_t owner, struct gmem_file **ret);
struct gmem_file *gmem_file_ref(struct gmem_file *file);
/* A descriptor with a file description of its own, to be passed to processes that are not to touch ours: borrowed, made at
 * the first call. One that is read only can't be made another: the file is its owner's alone (mode 0600), so that of other
 * users nobody can open it again by /proc/self/fd; and it can be mapped privately only. */
int gmem_file_lend(struct gmem_file *file, bool read_only, int *ret_fd);
void gmem_file_unref(struct gmem_file *file); /* NULL is allowed */

/* Allocates zeroed pages where there are none. -ENOSPC, -ENOMEM. */
int gmem_file_populate(struct gmem_file *file, uint64_t offset, uint64_t bytes);
/* The same by way of an alias: huge pages of one file can be made by several threads at once, where fallocate(2) holds the
 * file's lock while it zeroes. */
int gmem_file_zero(struct gmem_file *file, uint64_t offset, uint8_t *alias, uint64_t bytes);
/* As gmem_file_populate(), for pages that are about to be written whole: a device need not make them zero. */
int gmem_file_reserve(struct gmem_file *file, uint64_t offset, uint64_t bytes);
/* Frees pages, and so removes them from every mapping in every process. */
int gmem_file_punch(struct gmem_file *file, uint64_t offset, uint64_t bytes);
/* Allocates pages and fills them from src in one pass where the file type can. -EFAULT if src has gone. */
int gmem_file_fill(struct gmem_file *file, uint64_t offset, uint8_t *alias, const void *src, uint64_t bytes);
/* For files without an alias: what they hold can be had with no fault, and too little memory is -ENOSPC or -ENOMEM. */
int gmem_file_write(struct gmem_file *file, uint64_t offset, const void *src, uint64_t bytes);
int gmem_file_read(struct gmem_file *file, uint64_t offset, void *dst, uint64_t bytes);

int gmem_alias_map(struct gmem_file *file, uint64_t offset, uint64_t bytes, uint8_t **ret);
void gmem_alias_unmap(uint8_t *alias, uint64_t bytes);

/* Maps pages that are present into the alias. The kernel copies from user memory with faults disabled first, and twice
 * when the source is not mapped: UFFDIO_COPY of a huge page from a cold alias takes twice its time. */
int gmem_alias_touch(const uint8_t *alias, uint64_t bytes);
/* memcpy between aliases; -EFAULT instead of SIGBUS. */
int gmem_copy(void *dst, const void *src, size_t bytes);
/* Has a function look at an alias; -EFAULT instead of SIGBUS. It holds no lock and makes no system call. */
int gmem_look(uint32_t (*function)(uint32_t, const void *, size_t), uint32_t first, const void *src, size_t bytes,
	      uint32_t *ret);
/* Fills whole pages of an alias, and makes those that are not there, in one pass: of huge pages alone. -EFAULT: they have to
 * be made first; -ENOMEM. */
int gmem_alias_fill(void *alias, const void *src, size_t bytes);
/* Installs the SIGBUS handler once for the process; keeps and calls the previous one for faults not ours. */
int gmem_copy_guard_init(void);

/* Pages that the machine has or could make (its pool and what it lends beyond), and those that nobody has now; 0 without
 * hugetlb. */
void gmem_hugepages(uint64_t *ret_bytes, uint64_t *ret_free_bytes);

#endif
