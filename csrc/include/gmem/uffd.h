/* SPDX-License-Identifier: Apache-2.0
 *
 * userfaultfd, the other door to the OS. Errors are sorted here once:
 *   0          done
 *   -EAGAIN    a fork or unmap event of that mm is pending: undo, let the event be read, try again
 *   -EEXIST    something is mapped there already
 *   -ESRCH     the process or that mapping is gone: no error for anyone
 *   other      unexpected
 */
#ifndef GMEM_UFFD_H
#define GMEM_UFFD_H

#include <gmem/types.h>
#include <gmem/uapi.h>

/* What the kernel offers (ioctl UFFDIO_API on a throw-away uffd). */
int gmem_uffd_probe(int device_fd, uint64_t *ret_features);
/* Whether CONTINUE can map write-protected (6.4): tried on a page of our own. */
bool gmem_uffd_probe_continue_wp(int device_fd);
int gmem_uffd_open_device(void); /* fd or -errno */
int gmem_uffd_new(int device_fd); /* fd or -errno; device_fd -1: UFFD_USER_MODE_ONLY */
/* -EINVAL unless fd is a non-blocking userfaultfd. */
int gmem_uffd_check(int fd);
int gmem_uffd_api(int fd, uint64_t features);

int gmem_uffd_register(int fd, uint64_t va, uint64_t bytes);
/* For a mapping of this process itself: only absent pages, and touching one is SIGBUS. */
int gmem_uffd_register_missing(int fd, uint64_t va, uint64_t bytes);
int gmem_uffd_unregister(int fd, uint64_t va, uint64_t bytes);
int gmem_uffd_wake(int fd, uint64_t va, uint64_t bytes);
/* Copies into absent pages and maps them read-only (write-protected). *ret_done: bytes mapped, also on failure. */
int gmem_uffd_copy_wp(int fd, uint64_t va, const void *src, uint64_t bytes, bool wake, uint64_t *ret_done);
/* The same, mapped writable and with nobody to wake; all or nothing for a single page. */
int gmem_uffd_copy(int fd, uint64_t va, const void *src, uint64_t bytes);
/* Maps pages that are present in the file; parts mapped already are left as they are (and -EEXIST returned). */
int gmem_uffd_continue(int fd, uint64_t va, uint64_t bytes, bool write_protect, bool wake);
int gmem_uffd_protect(int fd, uint64_t va, uint64_t bytes, bool write_protect, bool wake);
/* -ESRCH if the process has ended; changes nothing. */
int gmem_uffd_alive(int fd);
int gmem_uffd_poison(int fd, uint64_t va, uint64_t bytes);

#endif
