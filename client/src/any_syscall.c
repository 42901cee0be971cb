/* SPDX-License-Identifier: Apache-2.0
 *
 * libc's syscall(): the calls that the other files know by their names.
 */
#define _GNU_SOURCE
#include <linux/sched.h>
#include <sched.h>
#include <sys/uio.h>

#include "any.h"
#include "interpose.h"
#include "syscalls.h"

#define REGISTER_BUFFERS 0 /* of io_uring_register(2) */

/* A child that goes on here, with a copy of this stack. */
static long fork_by(long number, long a, long b, long c, long d, long e)
{
	long pid;

	if (!gmem_any_is_managed() || gmem_inside)
		return gmem_sys(number, a, b, c, d, e, 0);
	gmem_fork_prepare();
	pid = gmem_sys(number, a, b, c, d, e, 0);
	if (pid)
		gmem_fork_parent();
	else
		gmem_fork_child();
	return pid;
}

static bool is_fork3(const struct clone_args *args, unsigned long bytes)
{
	return bytes >= CLONE_ARGS_SIZE_VER0 && !(args->flags & CLONE_VM) && !args->stack;
}

/* Those of the program's own io_uring: for good, as nobody tells when they are free. */
static long register_buffers(long fd, long opcode, long vectors, long count)
{
	int err = opcode == REGISTER_BUFFERS ? gmem_any_pin(NULL, (const struct iovec *)vectors, (unsigned)count) : 0;

	if (!err)
		return gmem_sys(SYS_io_uring_register, fd, opcode, vectors, count, 0, 0);
	errno = -err;
	return -1;
}

long in_syscall(long number, long a, long b, long c, long d, long e, long f) IN_PLACE_OF("syscall");
long in_syscall(long number, long a, long b, long c, long d, long e, long f)
{
	switch (number) {
	case SYS_mmap:
		return (long)mmap((void *)a, (size_t)b, (int)c, (int)d, (int)e, f);
	case SYS_munmap:
		return munmap((void *)a, (size_t)b);
	case SYS_mremap:
		return (long)mremap((void *)a, (size_t)b, (size_t)c, (int)d, (void *)e);
	case SYS_mprotect:
		return mprotect((void *)a, (size_t)b, (int)c);
	case SYS_madvise:
		return madvise((void *)a, (size_t)b, (int)c);
	case SYS_close:
		return close((int)a);
	case SYS_close_range:
		return gmem_any_close_range((unsigned)a, (unsigned)b, (int)c);
	case SYS_dup3:
		return dup3((int)a, (int)b, (int)c);
#ifdef SYS_dup2
	case SYS_dup2:
		return dup2((int)a, (int)b);
#endif
#ifdef SYS_fork
	case SYS_fork:
		return fork_by(number, 0, 0, 0, 0, 0);
#endif
	case SYS_clone:
		if (!(a & CLONE_VM) && !b)
			return fork_by(number, a, b, c, d, e);
		break;
	case SYS_clone3:
		if (is_fork3((const struct clone_args *)a, (unsigned long)b))
			return fork_by(number, a, b, 0, 0, 0);
		break;
	case SYS_io_uring_register:
		return register_buffers(a, b, c, d);
	}
	return gmem_sys(number, a, b, c, d, e, f);
}
