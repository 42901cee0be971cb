/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <gmem/devmem.h>
#include <gmem/memfd.h>
#include <gmem/uffd.h>

#define HUGEPAGES "/sys/kernel/mm/hugepages/hugepages-2048kB/"
#define TOUCH_BYTES 65536 /* a read fault maps its neighbours too, in windows of this size */

#ifndef FALLOC_FL_KEEP_SIZE
#define FALLOC_FL_KEEP_SIZE 1
#define FALLOC_FL_PUNCH_HOLE 2
#endif

int gmem_file_create(const char *name, enum gmem_class class_, uint64_t bytes, uint64_t owner, struct gmem_file **ret)
{
	unsigned flags = MFD_CLOEXEC | MFD_ALLOW_SEALING | (class_ == GMEM_CLASS_HUGE ? MFD_HUGETLB : 0);
	struct gmem_file *file = malloc(sizeof(*file));
	int fd, err;

	if (!file)
		return -ENOMEM;
	fd = memfd_create(name, flags);
	if (fd < 0 || fchmod(fd, 0600) || ftruncate(fd, (off_t)bytes) ||
	    fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)) {
		err = -errno;
		if (fd >= 0)
			close(fd);
		free(file);
		return err;
	}
	*file = (struct gmem_file){ .refs = 1, .fd = fd, .class_ = class_, .bytes = bytes, .owner = owner,
				    .lent = { -1, -1 } };
	*ret = file;
	return 0;
}

int gmem_file_adopt(int fd, enum gmem_class class_, uint64_t bytes, uint64_t owner, struct gmem_file **ret)
{
	struct gmem_file *file = malloc(sizeof(*file));

	if (!file)
		return -ENOMEM;
	*file = (struct gmem_file){ .refs = 1, .fd = fd, .class_ = class_, .bytes = bytes, .owner = owner,
				    .lent = { -1, -1 } };
	*ret = file;
	return 0;
}

struct gmem_file *gmem_file_ref(struct gmem_file *file)
{
	atomic_fetch_add(&file->refs, 1);
	return file;
}

void gmem_file_unref(struct gmem_file *file)
{
	if (!file || atomic_fetch_sub(&file->refs, 1) != 1)
		return;
	for (int i = 0; i < 2; i++)
		if (atomic_load(&file->lent[i]) >= 0)
			close(atomic_load(&file->lent[i]));
	if (file->mem)
		gmem_devmem_deinit(file);
	else
		close(file->fd);
	free(file);
}

int gmem_file_lend(struct gmem_file *file, bool read_only, int *ret_fd)
{
	int fd = atomic_load(&file->lent[read_only]), none = -1;
	char path[32];

	if (fd < 0) {
		snprintf(path, sizeof(path), "/proc/self/fd/%d", file->fd);
		fd = open(path, (read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC);
		if (fd < 0)
			return -errno;
		if (!atomic_compare_exchange_strong(&file->lent[read_only], &none, fd)) {
			close(fd);
			fd = none;
		}
	}
	*ret_fd = fd;
	return 0;
}

static int file_fallocate(struct gmem_file *file, int mode, uint64_t offset, uint64_t bytes)
{
	while (fallocate(file->fd, mode, (off_t)offset, (off_t)bytes)) {
		if (errno != EINTR)
			return -errno;
	}
	return 0;
}

int gmem_file_populate(struct gmem_file *file, uint64_t offset, uint64_t bytes)
{
	return file->mem ? gmem_devmem_alloc(file, offset, bytes, true) : file_fallocate(file, 0, offset, bytes);
}

int gmem_file_reserve(struct gmem_file *file, uint64_t offset, uint64_t bytes)
{
	return file->mem ? gmem_devmem_alloc(file, offset, bytes, false) : file_fallocate(file, 0, offset, bytes);
}

int gmem_file_punch(struct gmem_file *file, uint64_t offset, uint64_t bytes)
{
	if (file->mem)
		return gmem_devmem_free(file, offset, bytes);
	return file_fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, bytes);
}

/* An uffd of our own, for aliases of huge pages: UFFDIO_COPY is the only way to fill one that does not zero it first.
 * -1: there is none. */
static int own_uffd = -1;
/* As much as a huge page, and all of it the kernel's one page of zeros. */
static const void *zeros = MAP_FAILED;

static void open_own_uffd(void)
{
	int device = gmem_uffd_open_device();

	own_uffd = gmem_uffd_new(device);
	if (own_uffd >= 0 && gmem_uffd_api(own_uffd, GMEM_UFFD_FEAT_SIGBUS | GMEM_UFFD_FEAT_MISSING_HUGETLBFS)) {
		close(own_uffd);
		own_uffd = -1;
	}
	if (device >= 0)
		close(device);
	zeros = mmap(NULL, GMEM_HUGE_BYTES, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (zeros != MAP_FAILED)
		gmem_alias_touch(zeros, GMEM_HUGE_BYTES);
}

static void watch_alias(uint8_t *alias, uint64_t bytes)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;

	pthread_once(&once, open_own_uffd);
	if (own_uffd >= 0)
		gmem_uffd_register_missing(own_uffd, (uint64_t)(uintptr_t)alias, bytes); /* without: fill_huge() zeroes */
}

static int fill_huge(struct gmem_file *file, uint64_t offset, uint8_t *alias, const void *src, uint64_t bytes)
{
	int err = -ENOENT;

	if (own_uffd >= 0)
		err = gmem_alias_touch(src, bytes);
	if (!err)
		err = gmem_uffd_copy(own_uffd, (uint64_t)(uintptr_t)alias, src, bytes);
	if (!err || err == -EFAULT || err == -ENOMEM)
		return err;
	err = gmem_file_populate(file, offset, bytes);
	return err ? err : gmem_copy(alias, src, bytes);
}

/* fallocate(2) zeroes a page in three quarters of the time that UFFDIO_COPY of zeros takes, but holds the file's lock. */
int gmem_file_zero(struct gmem_file *file, uint64_t offset, uint8_t *alias, uint64_t bytes)
{
	bool alone = !atomic_exchange(&file->zeroing, true);
	int err = !alone && file->class_ == GMEM_CLASS_HUGE && own_uffd >= 0 && zeros != MAP_FAILED ? 0 : -ENOENT;

	for (uint64_t done = 0; !err && done < bytes; done += GMEM_HUGE_BYTES)
		err = gmem_uffd_copy(own_uffd, (uint64_t)(uintptr_t)alias + done, zeros, GMEM_HUGE_BYTES);
	if (err && err != -ENOMEM)
		err = gmem_file_populate(file, offset, bytes);
	if (alone)
		atomic_store(&file->zeroing, false);
	return err;
}

int gmem_file_write(struct gmem_file *file, uint64_t offset, const void *src, uint64_t bytes)
{
	uint64_t done = 0;

	while (done < bytes) {
		ssize_t n = pwrite(file->fd, (const uint8_t *)src + done, bytes - done, (off_t)(offset + done));

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n < 0 ? -errno : -EIO;
		done += (uint64_t)n;
	}
	return 0;
}

int gmem_file_read(struct gmem_file *file, uint64_t offset, void *dst, uint64_t bytes)
{
	uint64_t done = 0;

	while (done < bytes) {
		ssize_t n = pread(file->fd, (uint8_t *)dst + done, bytes - done, (off_t)(offset + done));

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n < 0 ? -errno : -EIO;
		done += (uint64_t)n;
	}
	return 0;
}

int gmem_file_fill(struct gmem_file *file, uint64_t offset, uint8_t *alias, const void *src, uint64_t bytes)
{
	if (file->class_ == GMEM_CLASS_HUGE) /* hugetlbfs has no write(2) */
		return fill_huge(file, offset, alias, src, bytes);
	/* write(2) into a hole allocates without zeroing and without a fault in a cold mapping */
	return gmem_file_write(file, offset, src, bytes);
}

/* Aliases are aligned to 2 MiB at the same phase as the offset, so that huge mappings are possible. */
int gmem_alias_map(struct gmem_file *file, uint64_t offset, uint64_t bytes, uint8_t **ret)
{
	uint64_t phase = offset & (GMEM_HUGE_BYTES - 1), span = bytes + phase + 2 * GMEM_HUGE_BYTES;
	uint8_t *hole = mmap(NULL, span, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0), *at;
	uint64_t head, tail;

	if (hole == MAP_FAILED)
		return -errno;
	at = (uint8_t *)(((uintptr_t)hole + GMEM_HUGE_BYTES - 1) & ~(GMEM_HUGE_BYTES - 1)) + phase;
	head = (uint64_t)(at - hole) & ~4095ull;
	tail = span - head - bytes;
	if (mmap(at, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED | MAP_NORESERVE, file->fd, (off_t)offset) ==
	    MAP_FAILED) {
		int err = -errno;

		munmap(hole, span);
		return err;
	}
	if (head)
		munmap(hole, head);
	if (tail)
		munmap(at + bytes, tail);
	madvise(at, bytes, MADV_DONTDUMP);
	madvise(at, bytes, MADV_DONTFORK);
	if (file->class_ == GMEM_CLASS_HUGE)
		watch_alias(at, bytes);
	*ret = at;
	return 0;
}

void gmem_alias_unmap(uint8_t *alias, uint64_t bytes)
{
	if (alias)
		munmap(alias, bytes);
}

static _Thread_local sigjmp_buf copy_escape;
static _Thread_local volatile sig_atomic_t copy_guarded;
static struct sigaction previous_action;

static void on_sigbus(int sig, siginfo_t *info, void *context)
{
	if (copy_guarded)
		siglongjmp(copy_escape, 1);
	if (previous_action.sa_flags & SA_SIGINFO) {
		previous_action.sa_sigaction(sig, info, context);
	} else if (previous_action.sa_handler != SIG_DFL && previous_action.sa_handler != SIG_IGN) {
		previous_action.sa_handler(sig);
	} else {
		signal(sig, SIG_DFL);
		raise(sig);
	}
}

static int guard_err;

static void install_guard(void)
{
	struct sigaction action = { .sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_NODEFER };

	sigemptyset(&action.sa_mask);
	guard_err = sigaction(SIGBUS, &action, &previous_action) ? -errno : 0;
}

int gmem_copy_guard_init(void)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;

	pthread_once(&once, install_guard);
	return guard_err;
}

int gmem_copy(void *dst, const void *src, size_t bytes)
{
	if (sigsetjmp(copy_escape, 0)) {
		copy_guarded = 0;
		return -EFAULT;
	}
	copy_guarded = 1;
	atomic_signal_fence(memory_order_seq_cst);
	memcpy(dst, src, bytes);
	atomic_signal_fence(memory_order_seq_cst);
	copy_guarded = 0;
	return 0;
}

int gmem_look(uint32_t (*function)(uint32_t, const void *, size_t), uint32_t first, const void *src, size_t bytes,
	      uint32_t *ret)
{
	uint32_t made;

	if (sigsetjmp(copy_escape, 0)) {
		copy_guarded = 0;
		return -EFAULT;
	}
	copy_guarded = 1;
	atomic_signal_fence(memory_order_seq_cst);
	made = function(first, src, bytes);
	atomic_signal_fence(memory_order_seq_cst);
	copy_guarded = 0;
	*ret = made;
	return 0;
}

int gmem_alias_fill(void *alias, const void *src, size_t bytes)
{
	int err = -ENOENT;

	if (own_uffd >= 0 && !(((uintptr_t)alias | bytes) & (GMEM_HUGE_BYTES - 1)))
		err = gmem_uffd_copy(own_uffd, (uint64_t)(uintptr_t)alias, src, bytes);
	return !err || err == -ENOMEM ? err : gmem_copy(alias, src, bytes);
}

/* Of a file that stays open: a request for memory asks each time. */
static uint64_t read_number(int fd)
{
	char text[32];
	ssize_t n = fd < 0 ? -1 : pread(fd, text, sizeof(text) - 1, 0);

	if (n <= 0)
		return 0;
	text[n] = '\0';
	return strtoull(text, NULL, 10);
}

enum { POOL, SURPLUS, OVERCOMMIT, FREE, RESERVED, NUMBERS };
static int hugepage_fds[NUMBERS];

static void open_hugepage_files(void)
{
	static const char *const names[NUMBERS] = {
		HUGEPAGES "nr_hugepages", HUGEPAGES "surplus_hugepages", HUGEPAGES "nr_overcommit_hugepages",
		HUGEPAGES "free_hugepages", HUGEPAGES "resv_hugepages",
	};

	for (int i = 0; i < NUMBERS; i++)
		hugepage_fds[i] = open(names[i], O_RDONLY | O_CLOEXEC);
}

static uint64_t difference(uint64_t a, uint64_t b)
{
	return a > b ? a - b : 0;
}

void gmem_hugepages(uint64_t *ret_bytes, uint64_t *ret_free_bytes)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;
	uint64_t n[NUMBERS];

	pthread_once(&once, open_hugepage_files);
	for (int i = 0; i < NUMBERS; i++)
		n[i] = read_number(hugepage_fds[i]);
	/* The kernel counts those it lends beyond its pool as the pool's while they are in use. */
	*ret_bytes = GMEM_HUGE_BYTES * (difference(n[POOL], n[SURPLUS]) + n[OVERCOMMIT]);
	*ret_free_bytes = GMEM_HUGE_BYTES * (difference(n[FREE], n[RESERVED]) + difference(n[OVERCOMMIT], n[SURPLUS]));
}

int gmem_alias_touch(const uint8_t *alias, uint64_t bytes)
{
	for (uint64_t done = 0; done < bytes; done += TOUCH_BYTES) {
		uint8_t byte;
		int err = gmem_copy(&byte, alias + done, 1);

		if (err)
			return err;
	}
	return 0;
}
