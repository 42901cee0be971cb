/* SPDX-License-Identifier: Apache-2.0
 *
 * libc's functions for mappings and for processes that share nothing. Calls go on to the next library where nothing
 * managed is concerned; before the constructor has found it, to the kernel.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <stdarg.h>
#include <string.h>

#include "any.h"
#include "interpose.h"
#include "syscalls.h"

#define RESERVE_MOST (64ul << 30) /* of addresses alone: PROT_NONE */
#define HINT_LEAST (1ul << 32)    /* who wants memory below needs it there */

#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif

static struct {
	void *(*mmap)(void *at, size_t bytes, int prot, int flags, int fd, off_t offset);
	int (*munmap)(void *at, size_t bytes);
	void *(*mremap)(void *at, size_t bytes, size_t new_bytes, int flags, void *to);
	int (*mprotect)(void *at, size_t bytes, int prot);
	int (*madvise)(void *at, size_t bytes, int advice);
	int (*clone)(int (*fn)(void *), void *stack, int flags, void *arg, ...);
	pid_t (*fork)(void);
} next = { gmem_sys_mmap, gmem_sys_munmap, gmem_sys_mremap, gmem_sys_mprotect, gmem_sys_madvise, NULL, NULL };

__attribute__((constructor(101))) static void find_next(void)
{
	gmem_find_next("mmap", &next.mmap);
	gmem_find_next("munmap", &next.munmap);
	gmem_find_next("mremap", &next.mremap);
	gmem_find_next("mprotect", &next.mprotect);
	gmem_find_next("madvise", &next.madvise);
	gmem_find_next("clone", &next.clone);
	gmem_find_next("_Fork", &next.fork);
}

/* True if it was served; then *ret is what libc's function returns. */
static bool served(int err, int *ret)
{
	if (err == GMEM_NOT_MANAGED)
		return false;
	if (err)
		errno = -err;
	*ret = err ? -1 : 0;
	return true;
}

static bool concerns_us(const void *at, size_t bytes)
{
	return LIKELY_NOT(gmem_any_is_managed() && gmem_any_in_window(at, bytes)) && !gmem_inside;
}

/* ---- mmap and its kin ---- */

static bool is_wanted(const void *at, size_t bytes, int prot, int flags)
{
	const int unwanted = MAP_FIXED | MAP_FIXED_NOREPLACE | MAP_GROWSDOWN | MAP_STACK | MAP_HUGETLB | MAP_LOCKED |
			     MAP_32BIT;

	if ((flags & MAP_TYPE) != MAP_PRIVATE || !(flags & MAP_ANONYMOUS) || flags & unwanted || prot & PROT_EXEC)
		return false;
	if (prot == PROT_NONE && bytes > RESERVE_MOST)
		return false;
	return (!at || (uintptr_t)at >= HINT_LEAST) && gmem_any_is_managed() && bytes >= gmem_any.mmap_bytes;
}

/* What can't be had managed is plain: it may be more than gmemd could ever hold, and never be touched. */
__attribute__((noinline)) static void *map_managed(void *at, size_t bytes, int prot, int flags)
{
	struct gmem_visit visit;
	void *managed = NULL;
	int err;

	if (gmem_enter(&visit)) {
		err = gmem_any_mmap(bytes, prot, flags & MAP_POPULATE, &managed);
		gmem_leave(&visit);
		if (!err)
			return managed;
	}
	return next.mmap(at, bytes, prot, flags, -1, 0);
}

__attribute__((noinline)) static bool map_over(void *at, size_t bytes, int prot, int flags, int *ret)
{
	bool anonymous = (flags & MAP_TYPE) == MAP_PRIVATE && flags & MAP_ANONYMOUS && !(flags & MAP_HUGETLB);
	struct gmem_visit visit;
	bool done;
	int err;

	if (!gmem_enter(&visit))
		return false;
	if (anonymous) {
		done = served(gmem_any_mmap_over((uintptr_t)at, bytes, prot), ret);
	} else {
		err = gmem_any_munmap((uintptr_t)at, bytes);
		done = err && served(err, ret);
	}
	gmem_leave(&visit);
	return done;
}

void *in_mmap(void *at, size_t bytes, int prot, int flags, int fd, off_t offset) IN_PLACE_OF("mmap");
void *in_mmap(void *at, size_t bytes, int prot, int flags, int fd, off_t offset)
{
	int result;

	if (is_wanted(at, bytes, prot, flags) && !gmem_inside)
		return map_managed(at, bytes, prot, flags);
	if (LIKELY_NOT(flags & MAP_FIXED) && concerns_us(at, bytes) && map_over(at, bytes, prot, flags, &result))
		return result ? MAP_FAILED : at;
	return next.mmap(at, bytes, prot, flags, fd, offset);
}

void *in_mmap64(void *at, size_t bytes, int prot, int flags, int fd, off_t offset) IN_PLACE_OF("mmap64");
void *in_mmap64(void *at, size_t bytes, int prot, int flags, int fd, off_t offset)
{
	return in_mmap(at, bytes, prot, flags, fd, offset);
}

int in_munmap(void *at, size_t bytes) IN_PLACE_OF("munmap");
int in_munmap(void *at, size_t bytes)
{
	struct gmem_visit visit;
	int result;
	bool done;

	if (!concerns_us(at, bytes) || !gmem_enter(&visit))
		return next.munmap(at, bytes);
	done = served(gmem_any_munmap((uintptr_t)at, bytes), &result);
	gmem_leave(&visit);
	return done ? result : next.munmap(at, bytes);
}

void *in_mremap(void *at, size_t bytes, size_t new_bytes, int flags, ...) IN_PLACE_OF("mremap");
void *in_mremap(void *at, size_t bytes, size_t new_bytes, int flags, ...)
{
	struct gmem_visit visit;
	void *to = NULL, *moved;
	int result;
	bool done;

	if (flags & MREMAP_FIXED) {
		va_list args;

		va_start(args, flags);
		to = va_arg(args, void *);
		va_end(args);
	}
	if (concerns_us(at, bytes) && gmem_enter(&visit)) {
		done = served(gmem_any_mremap((uintptr_t)at, bytes, new_bytes, flags, to, &moved), &result);
		gmem_leave(&visit);
		if (done)
			return result ? MAP_FAILED : moved;
	} else if (flags & MREMAP_FIXED && concerns_us(to, new_bytes) && in_munmap(to, new_bytes)) {
		return MAP_FAILED;
	}
	return next.mremap(at, bytes, new_bytes, flags, to);
}

int in_mprotect(void *at, size_t bytes, int prot) IN_PLACE_OF("mprotect");
int in_mprotect(void *at, size_t bytes, int prot)
{
	struct gmem_visit visit;
	int result;
	bool done;

	if (!concerns_us(at, bytes) || !gmem_enter(&visit))
		return next.mprotect(at, bytes, prot);
	done = served(gmem_any_mprotect((uintptr_t)at, bytes, prot), &result);
	gmem_leave(&visit);
	return done ? result : next.mprotect(at, bytes, prot);
}

int in_madvise(void *at, size_t bytes, int advice) IN_PLACE_OF("madvise");
int in_madvise(void *at, size_t bytes, int advice)
{
	struct gmem_visit visit;
	int result;
	bool done;

	if (!concerns_us(at, bytes) || !gmem_enter(&visit))
		return next.madvise(at, bytes, advice);
	done = served(gmem_any_madvise((uintptr_t)at, bytes, advice), &result);
	gmem_leave(&visit);
	return done ? result : next.madvise(at, bytes, advice);
}

/* ---- processes made past fork(): the handlers have to run all the same ---- */

pid_t in_Fork(void) IN_PLACE_OF("_Fork");
pid_t in_Fork(void)
{
	pid_t pid;

	if (!gmem_any_is_managed() || gmem_inside)
		return next.fork();
	gmem_fork_prepare();
	pid = next.fork();
	if (pid)
		gmem_fork_parent();
	else
		gmem_fork_child();
	return pid;
}

struct cloned {
	int (*fn)(void *);
	void *arg;
};

static int run_cloned(void *arg)
{
	const struct cloned *cloned = arg; /* on the parent's stack, of which the child has a copy */

	gmem_fork_child();
	return cloned->fn(cloned->arg);
}

int in_clone(int (*fn)(void *), void *stack, int flags, void *arg, ...) IN_PLACE_OF("clone");
int in_clone(int (*fn)(void *), void *stack, int flags, void *arg, ...)
{
	struct cloned cloned = { fn, arg };
	pid_t *parent, *child;
	va_list args;
	void *tls;
	int pid;

	va_start(args, arg);
	parent = va_arg(args, pid_t *);
	tls = va_arg(args, void *);
	child = va_arg(args, pid_t *);
	va_end(args);
	if (flags & CLONE_VM || !gmem_any_is_managed() || gmem_inside)
		return next.clone(fn, stack, flags, arg, parent, tls, child);
	gmem_fork_prepare();
	pid = next.clone(run_cloned, stack, flags, &cloned, parent, tls, child);
	gmem_fork_parent();
	return pid;
}
