/* SPDX-License-Identifier: Apache-2.0
 *
 * A userfaultfd that this process uses on itself, to hold up whoever writes to a range, or touches what is not there.
 */
#ifndef GMEM_CLIENT_UFFD_H
#define GMEM_CLIENT_UFFD_H

#include <stdint.h>

/* The handshake of a fresh one; -EINVAL: the kernel can't write-protect (before 5.7). */
int gmem_uffd_begin(int fd);
/* The same, for shared memory. */
int gmem_uffd_begin_shared(int fd);
/* From here on writers wait. Anonymous memory; -EBUSY: another userfaultfd watches it. */
int gmem_uffd_watch(int fd, uint64_t va, uint64_t bytes);
/* The next write to each page is a fault. -ENOENT: not all of it is watched. */
int gmem_uffd_protect(int fd, uint64_t va, uint64_t bytes);
/* Everybody goes on, on what was there. */
void gmem_uffd_unwatch(int fd, uint64_t va, uint64_t bytes);
/* Everybody goes on, on what is there now. */
void gmem_uffd_wake(int fd, uint64_t va, uint64_t bytes);

#endif
