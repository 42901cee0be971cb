/* SPDX-License-Identifier: Apache-2.0
 *
 * Maps: which parts of the files that hold a session's memory its process has mapped, and where, by the kernel's word
 * (/proc/PID/maps).
 */
#ifndef GMEM_MAPS_H
#define GMEM_MAPS_H

#include <sys/types.h>

#include <gmem/types.h>

struct gmem_file;
struct gmem_session;

struct gmem_mapped {
	uint64_t va, end, offset;
	struct gmem_file *file; /* of the session, of one that it was forked from, or of a pool that it has a region of */
	bool private_;
};

struct gmem_maps {
	struct gmem_mapped *pieces; /* by va */
	size_t count;
};

/* -ESRCH: the process is gone; -EACCES: it can't be looked at. */
int gmem_maps_read(struct gmem_session *session, pid_t pid, int pidfd, struct gmem_maps *ret);
void gmem_maps_free(struct gmem_maps *maps);
/* Whether va maps this offset of the file; *ret_end: how far that answer goes, untouched if it is so for ever. */
bool gmem_maps_at(const struct gmem_maps *maps, uint64_t va, uint64_t offset, const struct gmem_file *file,
		  uint64_t *ret_end);

#endif
