/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "adopt.h"
#include "beside.h"
#include "copies.h"
#include "link.h"
#include "ring.h"
#include "syscalls.h"
#include "uffd.h"
#include "vma.h"

#define PAGE 4096ull
#define PIECE_BYTES (2ull << 20) /* writers wait for as long as copying it takes: less than a millisecond */
#define BUSY_RANGES_MAX 16
#define POPULATE_WRITE 23
#define ADVISE_PINNED 0x1001 /* of gmemd's enum gmem_advice */
#define WORD_POPULATED (3ull << 62) /* of /proc/PID/pagemap: in memory, or in swap */

static int fail(char *message, int err, const char *format, ...) __attribute__((format(printf, 3, 4)));
static int fail(char *message, int err, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	vsnprintf(message, GMEM_WIRE_MESSAGE_BYTES, format, args);
	va_end(args);
	return err;
}

static int call(struct gmem_link *link, struct gmem_ring_sqe sqe, struct gmem_ring_cqe *ret, char *message)
{
	struct gmem_ring_cqe cqe;
	int err = gmem_ring_call(link, &sqe, &cqe);

	if (err)
		return fail(message, err, "gmemd has gone, or has ended this session");
	if (cqe.result)
		gmem_ring_words(sqe.op, &cqe, message, GMEM_WIRE_MESSAGE_BYTES);
	if (ret)
		*ret = cqe;
	return cqe.result;
}

/* ---- what may be adopted ---- */

struct look {
	struct gmem_link *link;
	uint64_t at, end;
	char *message;
};

#define PIECE(vma, look) \
	(unsigned long long)((vma)->va > (look)->at ? (vma)->va : (look)->at), \
	(unsigned long long)((vma)->end < (look)->end ? (vma)->end : (look)->end)

static int refuse(const struct gmem_vma *vma, const struct look *look, int err, const char *what)
{
	return fail(look->message, err, "va: [0x%llx, 0x%llx) %s", PIECE(vma, look), what);
}

static int check_vma(const struct gmem_vma *vma, void *arg)
{
	struct look *look = arg;
	const char *name = vma->name;

	if (vma->va > look->at)
		return fail(look->message, -ENOMEM, "va: [0x%llx, 0x%llx) is not mapped", (unsigned long long)look->at,
			    (unsigned long long)vma->va);
	for (int i = 0; i < GMEM_FILES; i++)
		if (vma->inode && vma->inode == look->link->inodes[i])
			return refuse(vma, look, -EEXIST, "is managed by gmem already");
	if (vma->prot[3] != 'p')
		return refuse(vma, look, -EOPNOTSUPP, "is shared memory");
	if (vma->inode)
		return refuse(vma, look, -EOPNOTSUPP, "is mapped from a file, or of huge pages");
	if (!strncmp(name, "[stack", 6))
		return refuse(vma, look, -EBUSY, "is a stack");
	if (*name && strcmp(name, "[heap]") && strncmp(name, "[anon:", 6))
		return refuse(vma, look, -EOPNOTSUPP, "is the kernel's");
	if (memcmp(vma->prot, "rw-", 3))
		return refuse(vma, look, -EACCES, vma->prot[2] == 'x' ? "is executable" : "can't be read and written");
	look->at = vma->end;
	return 0;
}

/* A thread's list of robust mutexes begins in its control block, which lies on its stack. Without this, the kernel itself
 * writes there when it can't wait. */
static int check_threads(const struct gmem_adoption *adoption, char *message)
{
	uintptr_t here = (uintptr_t)__builtin_frame_address(0);
	DIR *tasks = opendir("/proc/self/task");
	struct dirent *entry;
	int err = tasks ? 0 : -errno;

	if (err)
		return fail(message, err, "/proc/self/task: %s", strerror(-err));
	if (here - adoption->va < adoption->bytes)
		err = fail(message, -EBUSY, "va: the range is this thread's stack");
	while (!err && (entry = readdir(tasks))) {
		long tid = strtol(entry->d_name, NULL, 10);
		uintptr_t head = 0;
		size_t bytes;

		if (tid > 0 && !syscall(SYS_get_robust_list, tid, &head, &bytes) && head - adoption->va < adoption->bytes)
			err = fail(message, -EBUSY, "va: the stack of thread %ld is in the range", tid);
	}
	closedir(tasks);
	return err;
}

static int check_range(struct gmem_link *link, const struct gmem_adoption *adoption, char *message)
{
	uint64_t end = adoption->va + adoption->bytes;
	uint64_t base = link->hello.window_base, window_end = base + link->hello.window_bytes;
	struct look look = { link, adoption->va, end, message };
	int err;

	if (adoption->va < window_end && end > base)
		return fail(message, -EEXIST, "va: 0x%llx is managed by gmem already", (unsigned long long)adoption->va);
	err = gmem_vma_each(adoption->va, end, check_vma, &look);
	if (err)
		return message[0] ? err : fail(message, err, "/proc/self/maps: %s", strerror(-err));
	if (look.at < end)
		return fail(message, -ENOMEM, "va: [0x%llx, 0x%llx) is not mapped", (unsigned long long)look.at,
			    (unsigned long long)end);
	if (gmem_vma_is_locked(adoption->va, end))
		return fail(message, -EBUSY, "va: some of the range is locked into memory");
	return check_threads(adoption, message);
}

/* ---- begin, cancel ---- */

static int set_range(uint64_t va, uint64_t bytes, bool outward, struct gmem_adoption *ret, char *message)
{
	uint64_t end, first, last;

	if (!bytes || __builtin_add_overflow(va, bytes, &end) || end > UINT64_MAX - PAGE)
		return fail(message, -EINVAL, "bytes: %llu is out of range, or ends beyond the address space",
			    (unsigned long long)bytes);
	first = (outward ? va : va + PAGE - 1) & ~(PAGE - 1);
	last = (outward ? end + PAGE - 1 : end) & ~(PAGE - 1);
	*ret = (struct gmem_adoption){ .va = first, .bytes = last > first ? last - first : 0, .uffd = -1, .pagemap = -1 };
	return 0;
}

static int open_fds(struct gmem_link *link, struct gmem_adoption *adoption, char *message)
{
	int err;

	adoption->uffd = gmem_link_new_uffd(link);
	if (adoption->uffd < 0)
		return fail(message, adoption->uffd, "userfaultfd: %s", strerror(-adoption->uffd));
	err = gmem_uffd_begin(adoption->uffd);
	if (err)
		return fail(message, err, "userfaultfd: this kernel can't write-protect: %s", strerror(-err));
	adoption->pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	if (adoption->pagemap < 0 && errno != ENOENT) /* without it every page is copied */
		return fail(message, -errno, "/proc/self/pagemap: %s", strerror(errno));
	return 0;
}

static void close_fds(struct gmem_adoption *adoption)
{
	if (adoption->uffd >= 0)
		close(adoption->uffd);
	if (adoption->pagemap >= 0)
		close(adoption->pagemap);
	adoption->uffd = adoption->pagemap = -1;
}

static void give_back(struct gmem_link *link, uint64_t va, uint64_t bytes)
{
	struct gmem_ring_sqe sqe = { .op = GMEM_RING_MUNMAP, .va = va, .bytes = bytes };
	char ignored[GMEM_WIRE_MESSAGE_BYTES];

	if (bytes)
		call(link, sqe, NULL, ignored);
}

/* Ranges of the window that are in use in this process are given back after all tries, so that they do not come again. */
static int reserve(struct gmem_link *link, struct gmem_adoption *adoption, uint64_t page_bytes, char *message)
{
	struct gmem_ring_sqe sqe = { .op = GMEM_RING_ADOPT, .flags = GMEM_RING_COPY, .va = adoption->va,
				     .bytes = adoption->bytes, .arg = page_bytes };
	uint64_t busy[BUSY_RANGES_MAX], busy_bytes = 0;
	struct gmem_ring_cqe cqe = { 0 };
	size_t count = 0;
	int err;

	do {
		err = call(link, sqe, &cqe, message);
		if (err)
			break;
		adoption->staging = cqe.values[GMEM_RING_VA];
		adoption->staging_bytes = cqe.values[GMEM_RING_LENGTH];
		adoption->offset = cqe.values[GMEM_RING_OFFSET];
		err = gmem_link_map(link, adoption->staging, adoption->staging_bytes, adoption->offset, false, true);
		if (!err)
			break;
		fail(message, err, "bytes: %llu bytes can't be mapped at 0x%llx: %s",
		     (unsigned long long)adoption->staging_bytes, (unsigned long long)adoption->staging, strerror(-err));
		give_back(link, adoption->va, adoption->bytes);
		busy[count++] = adoption->staging;
		busy_bytes = adoption->staging_bytes;
	} while (err == -EEXIST && count < BUSY_RANGES_MAX);
	for (size_t i = 0; i < count; i++)
		give_back(link, busy[i], busy_bytes);
	return err;
}

static int commit(struct gmem_link *link, uint64_t va, char *message)
{
	struct gmem_ring_sqe sqe = { .op = GMEM_RING_MMAP_COMMIT, .va = va };

	return call(link, sqe, NULL, message);
}

int gmem_link_adopt_begin(struct gmem_link *link, uint64_t va, uint64_t bytes, uint64_t page_bytes, bool outward,
			  struct gmem_adoption *ret, char *message)
{
	struct gmem_adoption adoption = { .uffd = -1, .pagemap = -1 };
	int err = set_range(va, bytes, outward, &adoption, message);

	message[0] = err ? message[0] : '\0';
	if (err)
		return err;
	if (!adoption.bytes) {
		*ret = adoption;
		return 0;
	}
	if (!link->ring)
		return fail(message, -EOPNOTSUPP, "adopt: needs the session's ring (GMEM_RING=0 turns it off)");
	err = check_range(link, &adoption, message);
	if (!err)
		err = open_fds(link, &adoption, message);
	if (!err)
		err = reserve(link, &adoption, page_bytes, message);
	if (err) {
		close_fds(&adoption);
		return err;
	}
	err = commit(link, adoption.staging, message);
	if (err) {
		gmem_link_adopt_cancel(link, &adoption);
		return err;
	}
	*ret = adoption;
	return 0;
}

/* The staging region, and what was announced and has not come. */
static void clean_up(struct gmem_link *link, struct gmem_adoption *adoption)
{
	close_fds(adoption);
	gmem_link_forget(link, adoption->staging, adoption->done);
	if (adoption->staging_bytes > adoption->done)
		gmem_link_unmap(link, adoption->staging + adoption->done, adoption->staging_bytes - adoption->done);
	give_back(link, adoption->staging, adoption->staging_bytes);
	give_back(link, adoption->va + adoption->done, adoption->bytes - adoption->done);
}

void gmem_link_adopt_cancel(struct gmem_link *link, struct gmem_adoption *adoption)
{
	if (adoption->bytes)
		clean_up(link, adoption);
}

/* ---- taking over ----
 *
 * While a piece is protected, no lock may be taken that another thread could hold while it waits for that piece, and no
 * memory used that may lie in it: system calls and this stack only. */

static bool is_populated(const uint64_t *words, uint64_t page)
{
	return words[page] & WORD_POPULATED;
}

/* What the kernel has for each page of a piece; if it does not say, there is something everywhere. */
static void look_up(const struct gmem_adoption *adoption, uint64_t va, uint64_t pages, uint64_t *words)
{
	ssize_t want = (ssize_t)(pages * sizeof(*words)), n = -1;

	if (adoption->pagemap >= 0)
		n = gmem_sys(SYS_pread64, adoption->pagemap, (long)(uintptr_t)words, want,
			     (long)(va / PAGE * sizeof(*words)), 0, 0);
	if (n != want)
		memset(words, 0xff, (size_t)want);
}

typedef int (*run_fn)(uint64_t to, uint64_t from, uint64_t bytes);

/* fn for each run of pages that have content. */
static int for_populated(const struct gmem_adoption *adoption, uint64_t at, uint64_t bytes, run_fn fn)
{
	uint64_t words[PIECE_BYTES / PAGE], pages = bytes / PAGE;
	int err = 0;

	look_up(adoption, adoption->va + at, pages, words);
	for (uint64_t i = 0, n; !err && i < pages; i += n) {
		bool populated = is_populated(words, i);

		for (n = 1; i + n < pages && is_populated(words, i + n) == populated; n++)
			;
		if (populated)
			err = fn(adoption->staging + at + i * PAGE, adoption->va + at + i * PAGE, n * PAGE);
	}
	return err;
}

/* Ahead of the copy, when nobody waits yet, and an error is only an error. */
static int populate(uint64_t to, uint64_t from, uint64_t bytes)
{
	(void)from;
	while (gmem_sys_madvise((void *)(uintptr_t)to, bytes, POPULATE_WRITE)) {
		if (errno == EINVAL) /* before 5.14: the copy does it */
			return 0;
		if (errno != EINTR && errno != EAGAIN)
			return -ENOMEM;
	}
	return 0;
}

/* By the kernel, so that memory which can't be had is an error and no SIGBUS. The new memory is its local side, which it
 * touches as the program would; the other side it pins, and that does not move. */
static int copy(uint64_t to, uint64_t from, uint64_t bytes)
{
	while (bytes) {
		struct iovec local = { (void *)(uintptr_t)to, bytes }, remote = { (void *)(uintptr_t)from, bytes };
		ssize_t n = gmem_sys(SYS_process_vm_readv, getpid(), (long)(uintptr_t)&local, 1, (long)(uintptr_t)&remote,
				     1, 0);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n < 0 && errno != EFAULT ? -errno : -ENOMEM;
		to += (uint64_t)n;
		from += (uint64_t)n;
		bytes -= (uint64_t)n;
	}
	return 0;
}

static int move(uint64_t to, uint64_t from, uint64_t bytes)
{
	void *at = gmem_sys_mremap((void *)(uintptr_t)from, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED,
				   (void *)(uintptr_t)to);

	return at == MAP_FAILED ? -errno : 0;
}

static int take_over_piece(struct gmem_adoption *adoption, uint64_t bytes)
{
	uint64_t at = adoption->done, va = adoption->va + at;
	int err = for_populated(adoption, at, bytes, populate);

	if (err)
		return err;
	err = gmem_uffd_watch(adoption->uffd, va, bytes);
	if (err)
		return err;
	err = for_populated(adoption, at, bytes, copy);
	if (!err)
		err = move(va, adoption->staging + at, bytes);
	if (err)
		gmem_uffd_unwatch(adoption->uffd, va, bytes);
	else
		gmem_uffd_wake(adoption->uffd, va, bytes);
	return err;
}

/* Pieces end where huge pages do, so that none of those has to be split. */
static int take_over(struct gmem_adoption *adoption)
{
	int err = 0;

	while (!err && adoption->done < adoption->bytes) {
		uint64_t piece = PIECE_BYTES - (adoption->va + adoption->done) % PIECE_BYTES;

		if (piece > adoption->bytes - adoption->done)
			piece = adoption->bytes - adoption->done;
		err = take_over_piece(adoption, piece);
		if (!err)
			adoption->done += piece;
	}
	return err;
}

int gmem_link_adopt_finish(struct gmem_link *link, struct gmem_adoption *adoption, char *message)
{
	sigset_t all, before;
	int err, committed;

	if (!adoption->bytes)
		return 0;
	/* A handler could write to a piece, and wait for this thread; a child could get half of one. */
	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, &before);
	pthread_mutex_lock(&link->lock);
	err = take_over(adoption);
	link->copies = link->copies || adoption->done;
	pthread_mutex_unlock(&link->lock);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (err)
		fail(message, err, "bytes: after %llu of %llu: %s", (unsigned long long)adoption->done,
		     (unsigned long long)adoption->bytes, err == -ENOMEM ? "there is no room for more" : strerror(-err));
	clean_up(link, adoption);
	if (adoption->done) {
		char ignored[GMEM_WIRE_MESSAGE_BYTES];

		committed = commit(link, adoption->va, err ? ignored : message);
		err = err ? err : committed;
	}
	return err;
}

/* ---- and back: pinned to the host, taken from gmemd's watch, and replaced in the same way ---- */

struct piece {
	uint64_t va, bytes, offset;
	int file;
};

/* What the file has of a piece; the rest of the new memory stays untouched. */
static int copy_back(const struct piece *piece, uint64_t to)
{
	uint64_t at = piece->offset, end = piece->offset + piece->bytes;
	int err = 0;

	while (!err && at < end) {
		long data = gmem_sys(SYS_lseek, piece->file, (long)at, SEEK_DATA, 0, 0, 0), hole;

		if (data < 0 || (uint64_t)data >= end)
			return 0;
		hole = gmem_sys(SYS_lseek, piece->file, data, SEEK_HOLE, 0, 0, 0);
		if (hole < 0 || (uint64_t)hole > end)
			hole = (long)end;
		at = (uint64_t)data & ~(PAGE - 1);
		err = copy(to + (at - piece->offset), piece->va + (at - piece->offset), (uint64_t)hole - at);
		at = (uint64_t)hole;
	}
	return err;
}

static int give_back_piece(struct gmem_link *link, int uffd, const struct piece *piece)
{
	struct gmem_ring_sqe pin = { .op = GMEM_RING_ADVISE, .va = piece->va, .bytes = piece->bytes, .arg = ADVISE_PINNED };
	char ignored[GMEM_WIRE_MESSAGE_BYTES];
	sigset_t all, before;
	void *fresh;
	int err = call(link, pin, NULL, ignored);

	if (err)
		return err;
	fresh = gmem_sys_mmap(NULL, piece->bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (fresh == MAP_FAILED)
		return -errno;
	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, &before);
	gmem_uffd_unwatch(link->uffd, piece->va, piece->bytes); /* all there is of it is here: it is plain shared memory now */
	err = gmem_uffd_watch(uffd, piece->va, piece->bytes);
	if (!err) {
		err = copy_back(piece, (uintptr_t)fresh);
		if (!err)
			err = move(piece->va, (uintptr_t)fresh, piece->bytes);
		gmem_uffd_wake(uffd, piece->va, piece->bytes);
	}
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (err)
		gmem_sys_munmap(fresh, piece->bytes);
	else
		give_back(link, piece->va, piece->bytes);
	return err;
}

struct back {
	struct gmem_link *link;
	int uffd;
	uint64_t va, end;        /* of one range only */
	uint64_t dead, dead_end; /* there nobody wants the content any more */
};

/* False: what lies there is none of ours. */
static bool is_adopted(const struct gmem_link *link, const struct gmem_vma *vma, int *ret_file)
{
	uint64_t base = link->hello.window_base;

	*ret_file = -1;
	for (int i = 0; i < GMEM_FILES; i++)
		if (vma->inode && vma->inode == link->inodes[i])
			*ret_file = link->files[i];
	return *ret_file >= 0 && (vma->va >= base + link->hello.window_bytes || vma->end <= base);
}

static int give_back_vma(const struct gmem_vma *vma, void *arg)
{
	const struct back *back = arg;
	struct piece piece = { vma->va, 0, vma->offset, -1 };
	int err = 0;

	if (!is_adopted(back->link, vma, &piece.file))
		return 0;
	for (; !err && piece.va < vma->end; piece.va += piece.bytes, piece.offset += piece.bytes) {
		piece.bytes = PIECE_BYTES - piece.va % PIECE_BYTES;
		if (piece.bytes > vma->end - piece.va)
			piece.bytes = vma->end - piece.va;
		err = give_back_piece(back->link, back->uffd, &piece);
	}
	return err ? err : 1; /* the list has changed */
}

void gmem_link_give_back(struct gmem_link *link)
{
	struct back back = { .link = link, .uffd = -1 };
	int err;

	if (!link->copies)
		return;
	gmem_beside_remove(link->beside, 0, UINT64_MAX);
	back.uffd = link->ring && !gmem_link_is_lost(link) ? gmem_link_new_uffd(link) : -ENOTCONN;
	err = back.uffd < 0 ? back.uffd : gmem_uffd_begin_shared(back.uffd);
	while (!err && (err = gmem_vma_each(0, UINT64_MAX, give_back_vma, &back)) > 0)
		err = 0;
	if (back.uffd >= 0)
		close(back.uffd);
	if (err < 0)
		gmem_copies_unmap(link);
	link->copies = false;
}

/* ---- what its owner frees ---- */

int gmem_link_stays(struct gmem_link *link, uint64_t va, uint64_t bytes)
{
	return gmem_beside_add(link->beside, va, bytes);
}

/* To the kernel this is munmap(2) and mmap(2) in one step. */
static int renew(uint64_t va, uint64_t end)
{
	void *at = gmem_sys_mmap((void *)(uintptr_t)va, end - va, PROT_READ | PROT_WRITE,
				 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);

	return at == MAP_FAILED ? -errno : 1;
}

static int disown_vma(const struct gmem_vma *vma, void *arg)
{
	const struct back *back = arg;
	uint64_t va = vma->va > back->va ? vma->va : back->va, end = vma->end < back->end ? vma->end : back->end;
	struct piece piece = { va, 0, vma->offset + (va - vma->va), -1 };
	int err;

	if (!is_adopted(back->link, vma, &piece.file))
		return 0;
	if (va < back->dead_end && end > back->dead)
		return renew(va > back->dead ? va : back->dead, end < back->dead_end ? end : back->dead_end);
	piece.bytes = end - va; /* an edge: less than a page is dead, and the rest somebody else's */
	err = back->uffd < 0 ? back->uffd : give_back_piece(back->link, back->uffd, &piece);
	return err ? err : 1;
}

void gmem_link_disown(struct gmem_link *link, uint64_t va, uint64_t bytes, uint64_t dead, uint64_t dead_end)
{
	struct back back = { link, -1, va, va + bytes, (dead + PAGE - 1) & ~(PAGE - 1), dead_end & ~(PAGE - 1) };
	int err = 0;

	gmem_beside_remove(link->beside, va, bytes);
	if (link->status || !link->ring || gmem_link_is_lost(link))
		return;
	pthread_mutex_lock(&link->lock); /* a child must not get half of an edge */
	if (back.dead > va || back.dead_end < va + bytes)
		back.uffd = gmem_link_new_uffd(link);
	if (back.uffd >= 0 && gmem_uffd_begin_shared(back.uffd)) {
		close(back.uffd);
		back.uffd = -1;
	}
	do {
		err = gmem_vma_each(va, va + bytes, disown_vma, &back);
	} while (err > 0);
	if (back.uffd >= 0)
		close(back.uffd);
	pthread_mutex_unlock(&link->lock);
}
