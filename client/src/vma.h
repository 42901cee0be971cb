/* SPDX-License-Identifier: Apache-2.0
 *
 * What this process has mapped, by the kernel's word.
 */
#ifndef GMEM_CLIENT_VMA_H
#define GMEM_CLIENT_VMA_H

#include <stdbool.h>
#include <stdint.h>

#define GMEM_VMA_NAME_BYTES 80

struct gmem_vma {
	uint64_t va, end;
	uint64_t offset;
	uint64_t inode; /* 0: anonymous */
	char prot[5];   /* "rw-p" */
	char name[GMEM_VMA_NAME_BYTES]; /* cut to fit */
};

/* Calls fn for each mapping that overlaps [va, end), by address, until it gives something other than 0, which is
 * returned. -errno: the list can't be read. */
typedef int (*gmem_vma_fn)(const struct gmem_vma *vma, void *arg);
int gmem_vma_each(uint64_t va, uint64_t end, gmem_vma_fn fn, void *arg);
/* Whether some of the range is locked into memory. */
bool gmem_vma_is_locked(uint64_t va, uint64_t end);

#endif
