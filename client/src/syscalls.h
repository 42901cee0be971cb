/* SPDX-License-Identifier: Apache-2.0
 *
 * System calls past libc: what gmem itself does to managed memory must not arrive at libgmem-preload.so, which would take
 * it for the program's. The results are those of libc's functions, errno included.
 */
#ifndef GMEM_CLIENT_SYSCALLS_H
#define GMEM_CLIENT_SYSCALLS_H

#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

/* 0 or more, or -errno */
static inline long gmem_sys_raw(long number, long a, long b, long c, long d, long e, long f)
{
#if defined(__x86_64__)
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	register long r9 __asm__("r9") = f;
	long result;

	__asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return result;
#elif defined(__aarch64__)
	register long x8 __asm__("x8") = number;
	register long x0 __asm__("x0") = a;
	register long x1 __asm__("x1") = b;
	register long x2 __asm__("x2") = c;
	register long x3 __asm__("x3") = d;
	register long x4 __asm__("x4") = e;
	register long x5 __asm__("x5") = f;

	__asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5) : "memory");
	return x0;
#else
	long result = syscall(number, a, b, c, d, e, f); /* the preload library is not made for this architecture */

	return result < 0 ? -errno : result;
#endif
}

static inline long gmem_sys(long number, long a, long b, long c, long d, long e, long f)
{
	long result = gmem_sys_raw(number, a, b, c, d, e, f);

	if ((unsigned long)result < -4095ul)
		return result;
	errno = (int)-result;
	return -1;
}

static inline void *gmem_sys_mmap(void *at, size_t bytes, int prot, int flags, int fd, off_t offset)
{
	return (void *)gmem_sys(SYS_mmap, (long)at, (long)bytes, prot, flags, fd, offset);
}

static inline int gmem_sys_munmap(void *at, size_t bytes)
{
	return (int)gmem_sys(SYS_munmap, (long)at, (long)bytes, 0, 0, 0, 0);
}

static inline int gmem_sys_mprotect(void *at, size_t bytes, int prot)
{
	return (int)gmem_sys(SYS_mprotect, (long)at, (long)bytes, prot, 0, 0, 0);
}

static inline int gmem_sys_madvise(void *at, size_t bytes, int advice)
{
	return (int)gmem_sys(SYS_madvise, (long)at, (long)bytes, advice, 0, 0, 0);
}

/* Returns the new address, MAP_FAILED if none. */
static inline void *gmem_sys_mremap(void *at, size_t bytes, size_t new_bytes, int flags, void *to)
{
	return (void *)gmem_sys(SYS_mremap, (long)at, (long)bytes, (long)new_bytes, flags, (long)to, 0);
}

#endif
