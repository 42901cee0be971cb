/* SPDX-License-Identifier: Apache-2.0
 *
 * Maps: which parts of a session's files its process has mapped, and where, by the kernel's word (/proc/PID/maps).
 */
#ifndef GMEM_MAPS_H
#define GMEM_MAPS_H

#include <sys/types.h>

#include <gmem/types.h>

struct gmem_account;
struct gmem_file;

struct gmem_mapped {
	uint64_t va, end, offset;
	struct gmem_file *file; /* of the account, or of one that it was forked from */
};

struct gmem_maps {
	struct gmem_mapped *pieces; /* by va */
	size_t count;
};

/* -ESRCH: the process is gone; -EACCES: it can't be looked at. */
int gmem_maps_read(struct gmem_account *account, pid_t pid, int pidfd, struct gmem_maps *ret);
void gmem_maps_free(struct gmem_maps *maps);
/* Whether va maps this offset of one of the files; *ret_end: how far that answer goes, untouched if it is so for ever. */
bool gmem_maps_at(const struct gmem_maps *maps, uint64_t va, uint64_t offset, uint64_t *ret_end);

#endif
