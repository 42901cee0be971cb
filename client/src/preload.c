/* SPDX-License-Identifier: Apache-2.0
 *
 * libgmem-preload.so, for LD_PRELOAD: makes mmap(2) and its kin know MAP_PEER_SHARED, and has /dev/gmem, /proc/gmemstat
 * and the hmadvise system calls, for programs that were built for openEuler's kernel. Everything else goes on to the next
 * library. It needs libc only; libgmem.so, beside it, is loaded at the first use.
 *
 * Any of these functions may be called before the constructor here has run, from an allocator too: until then calls go to
 * the kernel. While gmem works for a thread, that thread's calls go there as well (interpose.h).
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include <libgmem.h>

#include "interpose.h"
#include "peer.h"
#include "syscalls.h"

#define LIBRARY "libgmem.so.0"
#define DEVICE "/dev/gmem"
#define STATISTICS "/proc/gmemstat"
#define DEVICE_FILE "gmem-device"
#define DEVICE_LINK "/memfd:" DEVICE_FILE
#define HMADVISE_441 441 /* epoll_pwait2 elsewhere */
#define HMADVISE_453 453 /* map_shadow_stack elsewhere */
#define MMAP_MIN_ADDR 65536ul
#define HNIDS_MAX 1024

#ifndef MFD_CLOEXEC
#define MFD_CLOEXEC 1u
#endif

/* ---- what comes next: the kernel, until the constructor has found the libraries ---- */

static int kernel_openat(int directory, const char *path, int flags, mode_t mode)
{
	return (int)gmem_sys(SYS_openat, directory, (long)path, flags, mode, 0, 0);
}

static int kernel_open(const char *path, int flags, mode_t mode)
{
	return kernel_openat(AT_FDCWD, path, flags, mode);
}

static int kernel_ioctl(int fd, unsigned long request, void *arg)
{
	return (int)gmem_sys(SYS_ioctl, fd, (long)request, (long)arg, 0, 0, 0);
}

static struct {
	void *(*mmap)(void *at, size_t bytes, int prot, int flags, int fd, off_t offset);
	int (*munmap)(void *at, size_t bytes);
	void *(*mremap)(void *at, size_t bytes, size_t new_bytes, int flags, void *to);
	int (*mprotect)(void *at, size_t bytes, int prot);
	int (*madvise)(void *at, size_t bytes, int advice);
	int (*open)(const char *path, int flags, mode_t mode);
	int (*openat)(int directory, const char *path, int flags, mode_t mode);
	int (*ioctl)(int fd, unsigned long request, void *arg);
	FILE *(*fopen)(const char *path, const char *mode); /* NULL: not looked for yet */
	FILE *(*fopen64)(const char *path, const char *mode);
} next = { gmem_sys_mmap, gmem_sys_munmap, gmem_sys_mremap, gmem_sys_mprotect, gmem_sys_madvise, kernel_open,
	   kernel_openat, kernel_ioctl, NULL, NULL };

__attribute__((constructor)) static void find_next(void)
{
	gmem_find_next("mmap", &next.mmap);
	gmem_find_next("munmap", &next.munmap);
	gmem_find_next("mremap", &next.mremap);
	gmem_find_next("mprotect", &next.mprotect);
	gmem_find_next("madvise", &next.madvise);
	gmem_find_next("open", &next.open);
	gmem_find_next("openat", &next.openat);
	gmem_find_next("ioctl", &next.ioctl);
	gmem_find_next("fopen", &next.fopen);
	gmem_find_next("fopen64", &next.fopen64);
}

/* ---- libgmem ---- */

static const struct gmem_peer_calls *_Atomic loaded;
/* All peer-shared memory is between them; there is none at first. */
static _Atomic uintptr_t lowest = UINTPTR_MAX, highest;

static const struct gmem_peer_calls *load(void)
{
	static atomic_flag said = ATOMIC_FLAG_INIT;
	const struct gmem_peer_calls *calls = atomic_load(&loaded), *(*get)(void);
	void *library = dlopen(LIBRARY, RTLD_NOW | RTLD_LOCAL), *found;

	found = library ? dlsym(library, "gmem_peer_calls") : NULL;
	if (found) {
		memcpy(&get, &found, sizeof(get));
		calls = get();
	}
	if (!found || calls->size != sizeof(*calls)) {
		if (!atomic_flag_test_and_set(&said))
			dprintf(STDERR_FILENO, "libgmem-preload: %s can't be used: %s\n", LIBRARY,
				found ? "it is of another version" : dlerror());
		return NULL;
	}
	atomic_store(&loaded, calls);
	return calls;
}

static const struct gmem_peer_calls *gmem(void)
{
	const struct gmem_peer_calls *calls = atomic_load_explicit(&loaded, memory_order_acquire);

	return calls ? calls : load();
}

static bool may_be_peer(const void *at, size_t bytes)
{
	uintptr_t start = (uintptr_t)at;

	return start < atomic_load_explicit(&highest, memory_order_relaxed) &&
	       start + bytes > atomic_load_explicit(&lowest, memory_order_relaxed);
}

/* 0 or an error of gmem's calls, as libc's functions say it; false: it was none of theirs. */
static bool served(int err, int *ret)
{
	if (err == GMEM_NOT_PEER)
		return false;
	if (err)
		errno = -err;
	*ret = err ? -1 : 0;
	return true;
}

/* ---- mmap and its kin ---- */

static void note_window(const struct gmem_peer_calls *calls)
{
	uintptr_t base;
	size_t bytes;

	if (!calls->window(&base, &bytes)) {
		atomic_store(&highest, base + bytes);
		atomic_store(&lowest, base);
	}
}

static int check_peer(int flags, off_t offset)
{
	const int unwanted = MAP_FIXED | MAP_FIXED_NOREPLACE | MAP_GROWSDOWN;

	if ((flags & MAP_TYPE) != MAP_PRIVATE || !(flags & MAP_ANONYMOUS) || flags & unwanted || offset & 4095)
		return -EINVAL;
	return 0;
}

__attribute__((noinline)) static void *map_peer(size_t bytes, int prot, int flags, off_t offset)
{
	const struct gmem_peer_calls *calls;
	void *at = MAP_FAILED;
	struct gmem_visit visit;
	int err = check_peer(flags, offset);

	if (!err && !gmem_enter(&visit)) /* an allocator that libgmem itself allocates from */
		return gmem_sys_mmap(NULL, bytes, prot, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (!err) {
		calls = gmem();
		err = calls ? calls->mmap(bytes, prot, flags & MAP_POPULATE, &at) : -ENOMEM;
		if (!err)
			note_window(calls);
		gmem_leave(&visit);
	}
	if (err) {
		errno = -err;
		return MAP_FAILED;
	}
	return at;
}

__attribute__((noinline)) static bool unmap_peer(void *at, size_t bytes, int *ret)
{
	struct gmem_visit visit;
	bool done;

	if (!gmem_enter(&visit))
		return false;
	done = served(gmem()->munmap((uintptr_t)at, bytes), ret);
	gmem_leave(&visit);
	return done;
}

void *in_mmap(void *at, size_t bytes, int prot, int flags, int fd, off_t offset) IN_PLACE_OF("mmap");
void *in_mmap(void *at, size_t bytes, int prot, int flags, int fd, off_t offset)
{
	int result;

	/* with MAP_HUGETLB the bit is part of a page size */
	if (LIKELY_NOT(flags & MAP_PEER_SHARED) && !(flags & MAP_HUGETLB))
		return map_peer(bytes, prot, flags, offset);
	if (LIKELY_NOT(flags & MAP_FIXED) && may_be_peer(at, bytes) && unmap_peer(at, bytes, &result) && result)
		return MAP_FAILED;
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
	int result;

	if (LIKELY_NOT(may_be_peer(at, bytes)) && unmap_peer(at, bytes, &result))
		return result;
	return next.munmap(at, bytes);
}

static bool remap_peer(void *at, size_t bytes, size_t new_bytes, int flags, void **ret)
{
	struct gmem_visit visit;
	int result;
	bool done;

	if (!gmem_enter(&visit))
		return false;
	done = served(gmem()->mremap((uintptr_t)at, bytes, new_bytes, flags, ret), &result);
	if (done && result)
		*ret = MAP_FAILED;
	gmem_leave(&visit);
	return done;
}

void *in_mremap(void *at, size_t bytes, size_t new_bytes, int flags, void *to) IN_PLACE_OF("mremap");
void *in_mremap(void *at, size_t bytes, size_t new_bytes, int flags, void *to)
{
	void *moved;
	int result;

	if (LIKELY_NOT(may_be_peer(at, bytes)) && remap_peer(at, bytes, new_bytes, flags, &moved))
		return moved;
	if (LIKELY_NOT(flags & MREMAP_FIXED) && may_be_peer(to, new_bytes) && unmap_peer(to, new_bytes, &result) && result)
		return MAP_FAILED;
	return next.mremap(at, bytes, new_bytes, flags, to);
}

static bool protect_peer(void *at, size_t bytes, int prot, int *ret)
{
	struct gmem_visit visit;
	bool done;

	if (!gmem_enter(&visit))
		return false;
	done = served(gmem()->mprotect((uintptr_t)at, bytes, prot), ret);
	gmem_leave(&visit);
	return done;
}

int in_mprotect(void *at, size_t bytes, int prot) IN_PLACE_OF("mprotect");
int in_mprotect(void *at, size_t bytes, int prot)
{
	int result;

	if (LIKELY_NOT(may_be_peer(at, bytes)) && protect_peer(at, bytes, prot, &result))
		return result;
	return next.mprotect(at, bytes, prot);
}

static bool advise_peer(void *at, size_t bytes, int advice, int *ret)
{
	struct gmem_visit visit;
	bool done;

	if (!gmem_enter(&visit))
		return false;
	done = served(gmem()->madvise((uintptr_t)at, bytes, advice), ret);
	gmem_leave(&visit);
	return done;
}

int in_madvise(void *at, size_t bytes, int advice) IN_PLACE_OF("madvise");
int in_madvise(void *at, size_t bytes, int advice)
{
	int result;

	if (LIKELY_NOT(may_be_peer(at, bytes)) && advise_peer(at, bytes, advice, &result))
		return result;
	return next.madvise(at, bytes, advice);
}

/* ---- /dev/gmem and /proc/gmemstat: memory files ---- */

static int make_file(const char *name, int flags)
{
	unsigned cloexec = flags & O_CLOEXEC ? MFD_CLOEXEC : 0;

	return (int)gmem_sys(SYS_memfd_create, (long)name, cloexec, 0, 0, 0, 0);
}

static int open_statistics(const struct gmem_peer_calls *calls, int flags)
{
	uint64_t to_device, to_host;
	char text[128];
	int fd, length;

	if ((flags & O_ACCMODE) != O_RDONLY) {
		errno = EACCES;
		return -1;
	}
	if (calls->moved(&to_device, &to_host)) {
		errno = ENOENT;
		return -1;
	}
	length = snprintf(text, sizeof(text), "migrating H2D     : %llu\nmigrating D2H     : %llu\n",
			  (unsigned long long)to_device, (unsigned long long)to_host);
	fd = make_file("gmemstat", flags);
	if (fd >= 0 && pwrite(fd, text, (size_t)length, 0) != length) {
		close(fd);
		errno = EIO;
		return -1;
	}
	return fd;
}

static int open_device(const struct gmem_peer_calls *calls, int flags)
{
	uint64_t ignored;

	if (calls->moved(&ignored, &ignored)) { /* no gmemd: the kernel has no such device either */
		errno = ENOENT;
		return -1;
	}
	return make_file(DEVICE_FILE, flags);
}

static bool is_ours(const char *path)
{
	if ((uintptr_t)path < MMAP_MIN_ADDR || path[0] != '/' || (path[1] != 'd' && path[1] != 'p'))
		return false;
	return !strcmp(path, DEVICE) || !strcmp(path, STATISTICS);
}

__attribute__((noinline)) static int open_ours(const char *path, int flags)
{
	const struct gmem_peer_calls *calls;
	struct gmem_visit visit;
	int fd = -1;

	errno = ENOENT;
	if (!gmem_enter(&visit))
		return -1;
	calls = gmem();
	if (!calls)
		errno = ENOENT;
	else
		fd = strcmp(path, DEVICE) ? open_statistics(calls, flags) : open_device(calls, flags);
	gmem_leave(&visit);
	return fd;
}

int in_open(const char *path, int flags, mode_t mode) IN_PLACE_OF("open");
int in_open(const char *path, int flags, mode_t mode)
{
	return LIKELY_NOT(is_ours(path)) ? open_ours(path, flags) : next.open(path, flags, mode);
}

int in_openat(int directory, const char *path, int flags, mode_t mode) IN_PLACE_OF("openat");
int in_openat(int directory, const char *path, int flags, mode_t mode)
{
	return LIKELY_NOT(is_ours(path)) ? open_ours(path, flags) : next.openat(directory, path, flags, mode);
}

/* The other names of the two: for large files, and fortified. */
int in_open64(const char *path, int flags, mode_t mode) IN_PLACE_OF("open64");
int in_open64(const char *path, int flags, mode_t mode)
{
	return in_open(path, flags | O_LARGEFILE, mode);
}

int in_open_2(const char *path, int flags) IN_PLACE_OF("__open_2");
int in_open_2(const char *path, int flags)
{
	return in_open(path, flags, 0);
}

int in_open64_2(const char *path, int flags) IN_PLACE_OF("__open64_2");
int in_open64_2(const char *path, int flags)
{
	return in_open64(path, flags, 0);
}

int in_openat64(int directory, const char *path, int flags, mode_t mode) IN_PLACE_OF("openat64");
int in_openat64(int directory, const char *path, int flags, mode_t mode)
{
	return in_openat(directory, path, flags | O_LARGEFILE, mode);
}

int in_openat_2(int directory, const char *path, int flags) IN_PLACE_OF("__openat_2");
int in_openat_2(int directory, const char *path, int flags)
{
	return in_openat(directory, path, flags, 0);
}

int in_openat64_2(int directory, const char *path, int flags) IN_PLACE_OF("__openat64_2");
int in_openat64_2(int directory, const char *path, int flags)
{
	return in_openat64(directory, path, flags, 0);
}

static FILE *fopen_ours(const char *path, const char *mode)
{
	int flags = strchr(mode, 'e') ? O_CLOEXEC : 0, fd;
	FILE *file;

	flags |= mode[0] == 'r' && !strchr(mode, '+') ? O_RDONLY : O_RDWR;
	fd = open_ours(path, flags);
	if (fd < 0)
		return NULL;
	file = fdopen(fd, mode);
	if (!file)
		close(fd);
	return file;
}

FILE *in_fopen(const char *path, const char *mode) IN_PLACE_OF("fopen");
FILE *in_fopen(const char *path, const char *mode)
{
	if (LIKELY_NOT(is_ours(path)))
		return fopen_ours(path, mode);
	if (LIKELY_NOT(!next.fopen))
		gmem_find_next("fopen", &next.fopen);
	return next.fopen(path, mode);
}

FILE *in_fopen64(const char *path, const char *mode) IN_PLACE_OF("fopen64");
FILE *in_fopen64(const char *path, const char *mode)
{
	if (LIKELY_NOT(is_ours(path)))
		return fopen_ours(path, mode);
	if (LIKELY_NOT(!next.fopen64))
		gmem_find_next("fopen64", &next.fopen64);
	return next.fopen64(path, mode);
}

/* By its name, so that copies of the descriptor are known, inherited ones too. */
static bool is_device(int fd)
{
	char link[32], target[sizeof(DEVICE_LINK)];
	long length;

	snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
	length = gmem_sys(SYS_readlinkat, AT_FDCWD, (long)link, (long)target, sizeof(target) - 1, 0, 0);
	return length == sizeof(DEVICE_LINK) - 1 && !memcmp(target, DEVICE_LINK, sizeof(DEVICE_LINK) - 1);
}

static int device_request(const struct gmem_peer_calls *calls, unsigned long request, void *arg)
{
	struct gmem_hmadvise_arg *advice = arg;
	struct gmem_hnuma_id_arg *id = arg;
	int hnid;

	if (request != GMEM_GET_HNUMA_ID && request != GMEM_MADVISE)
		return -EINVAL;
	if (!arg || (request == GMEM_GET_HNUMA_ID && !id->hnuma_id))
		return -EFAULT;
	if (!calls)
		return -ENODEV;
	if (request == GMEM_MADVISE)
		return calls->hmadvise(advice->hnid, advice->start, advice->len_in, advice->behavior) ? -errno : 0;
	hnid = calls->device();
	if (hnid < 0)
		return -ENODEV;
	*id->hnuma_id = hnid;
	return 0;
}

__attribute__((noinline)) static bool ask_device(int fd, unsigned long request, void *arg, int *ret)
{
	int before = errno;
	struct gmem_visit visit;

	if (!is_device(fd) || !gmem_enter(&visit)) {
		errno = before;
		return false;
	}
	served(device_request(gmem(), request, arg), ret);
	gmem_leave(&visit);
	return true;
}

int in_ioctl(int fd, unsigned long request, void *arg) IN_PLACE_OF("ioctl");
int in_ioctl(int fd, unsigned long request, void *arg)
{
	int result;

	if (LIKELY_NOT(_IOC_TYPE(request) == GMEM_MAGIC) && ask_device(fd, request, arg, &result))
		return result;
	return next.ioctl(fd, request, arg);
}

/* ---- syscall ---- */

/* Whether it is hmadvise(hnid, start, length, behaviour) or what this number means to the kernel that runs:
 * epoll_pwait2(fd, events, count, timeout, ...), whose fourth argument is a pointer; map_shadow_stack(at, length, flags),
 * whose first one is 0 or an address, and which has no fourth. */
static bool is_hmadvise(long number, long hnid, long start, long behaviour)
{
	bool plausible = (int)hnid >= -1 && (int)hnid < HNIDS_MAX && behaviour &&
			 (unsigned long)behaviour < MMAP_MIN_ADDR;

	return plausible && (number == HMADVISE_441 || (int)hnid == -1 || may_be_peer((void *)start, 1));
}

static long hmadvise_by_number(int hnid, unsigned long start, size_t bytes, int behaviour)
{
	const struct gmem_peer_calls *calls;
	struct gmem_visit visit;
	long result = -1;

	errno = EINVAL;
	if (!gmem_enter(&visit))
		return -1;
	calls = gmem();
	if (calls)
		result = calls->hmadvise(hnid, start, bytes, behaviour);
	else
		errno = EINVAL;
	gmem_leave(&visit);
	return result;
}

long in_syscall(long number, long a, long b, long c, long d, long e, long f) IN_PLACE_OF("syscall");
long in_syscall(long number, long a, long b, long c, long d, long e, long f)
{
	switch (number) {
	case SYS_mmap:
		return (long)in_mmap((void *)a, (size_t)b, (int)c, (int)d, (int)e, f);
	case SYS_munmap:
		return in_munmap((void *)a, (size_t)b);
	case SYS_mremap:
		return (long)in_mremap((void *)a, (size_t)b, (size_t)c, (int)d, (void *)e);
	case SYS_mprotect:
		return in_mprotect((void *)a, (size_t)b, (int)c);
	case SYS_madvise:
		return in_madvise((void *)a, (size_t)b, (int)c);
#ifdef SYS_open
	case SYS_open:
		return in_open((const char *)a, (int)b, (mode_t)c);
#endif
	case SYS_openat:
		return in_openat((int)a, (const char *)b, (int)c, (mode_t)d);
	case SYS_ioctl:
		return in_ioctl((int)a, (unsigned long)b, (void *)c);
	case HMADVISE_441:
	case HMADVISE_453:
		if (is_hmadvise(number, a, b, d))
			return hmadvise_by_number((int)a, (unsigned long)b, (size_t)c, (int)d);
		break;
	}
	return gmem_sys(number, a, b, c, d, e, f);
}
