/* SPDX-License-Identifier: Apache-2.0
 *
 * openEuler's libgmem: its functions with its semantics, for programs that were written to it. New programs use gmem.h.
 *
 *	data = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_PEER_SHARED, -1, 0);
 *	gmemPrefetch((unsigned long)data, bytes, gmemGetNumaId(), NULL);
 *	gmemFreeEager((unsigned long)data, bytes, NULL);
 *	munmap(data, bytes);
 *
 * It is libgmem-preload.so (LD_PRELOAD) that makes mmap(2) know MAP_PEER_SHARED; without it the kernel ignores the flag
 * and the memory is ordinary. docs/user.md lists what is done differently here, and why.
 *
 * A page is 2 MiB. stream: NULL waits for the end; any other value names a queue: calls with the same value are done in
 * order, others meanwhile, and gmemStreamSynchronize() says what became of them. Everything is thread-safe.
 */
#ifndef LIBGMEM_H
#define LIBGMEM_H

#include <stddef.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifdef __cplusplus
extern "C" {
#endif

#define GMEM_API __attribute__((visibility("default")))

#ifndef MAP_PEER_SHARED
#define MAP_PEER_SHARED 0x8000000
#endif

/* Behaviours of hmadvise(), beside MADV_DONTNEED (4). */
#ifndef MADV_PREFETCH
#define MADV_PREFETCH 0x1000
#endif
#ifndef MADV_PINNED
#define MADV_PINNED 0x1001
#endif
#ifndef MADV_UNPINNED
#define MADV_UNPINNED 0x1002
#endif

/* Through syscall(2), with libgmem-preload.so. Kernels without GMEM use this number, and 453, for something else. */
#ifndef SYS_hmadvise
#define SYS_hmadvise 441
#endif

/* ioctl(2) on /dev/gmem, with libgmem-preload.so. */
struct gmem_hnuma_id_arg {
	int *hnuma_id;
};

struct gmem_hmadvise_arg {
	int hnid;
	unsigned long start;
	size_t len_in;
	int behavior;
};

#define GMEM_MAGIC 0x55
#define GMEM_GET_HNUMA_ID _IOW(GMEM_MAGIC, 1, struct gmem_hnuma_id_arg)
#define GMEM_MADVISE _IOW(GMEM_MAGIC, 2, struct gmem_hmadvise_arg)

/* ---- functions that return 0 or -errno (with errno set as well) ---- */

/* Drops the content of the whole pages in [addr, addr + size): they read zero next. None: 0. What is no peer-shared
 * memory in the range is passed over. -EINVAL: the range ends beyond the address space. */
GMEM_API int gmemFreeEager(unsigned long addr, size_t size, void *stream);
/* Moves each page that [addr, addr + len) touches to hnid (0: the host), which does not fault there afterwards; what is
 * there already counts as used now. -EINVAL: no such hnid, or not all of it is peer-shared memory; -ENOMEM: what is
 * on hnid is pinned or in use. */
GMEM_API int gmemPrefetch(unsigned long addr, size_t len, int hnid, void *stream);
/* Hnid of the first device that is attached; -ENODEV: none, -ENOTCONN: no gmemd is running. */
GMEM_API int gmemGetNumaId(void);
/* Waits for all calls that were made with this stream. 0, or -errno of the first of them that failed since this was last
 * asked. NULL: 0, there is nothing to wait for. */
GMEM_API int gmemStreamSynchronize(void *stream);

/* ---- functions that return 0, or -1 with errno, as system calls do ---- */

/* MADV_PREFETCH and MADV_PINNED move the pages that the range touches to hnid, MADV_UNPINNED lets them leave, and
 * MADV_DONTNEED is gmemFreeEager(), with hnid -1 or any. EINVAL: as above, or behaviour is none of these. */
GMEM_API int hmadvise(int hnid, unsigned long start, size_t len, int behaviour);
/* Copies at any alignment; dst is on hnid afterwards, -1: on the host. EINVAL: no such hnid; the ranges are not both
 * inside peer-shared memory, or overlap; dst is not writable. */
GMEM_API int hmemcpy(int hnid, unsigned long dst, unsigned long src, size_t size);

#ifdef __cplusplus
}
#endif

#endif
