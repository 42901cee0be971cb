/* SPDX-License-Identifier: Apache-2.0
 *
 * System calls on peer-shared memory, by libc's functions and by number; /dev/gmem and /proc/gmemstat.
 */
#include "compat.h"

#include <fcntl.h>
#include <sys/epoll.h>

#define FLAGS (MAP_PRIVATE | MAP_ANONYMOUS | MAP_PEER_SHARED)
#define RW (PROT_READ | PROT_WRITE)

static int hnid;

static int is_readable(const void *at)
{
	int pipe_ends[2], fine;

	CHECK(!pipe(pipe_ends));
	fine = write(pipe_ends[1], at, 1) == 1;
	close(pipe_ends[0]);
	close(pipe_ends[1]);
	return fine;
}

static int is_writable(void *at)
{
	int file = open("/dev/zero", O_RDONLY), fine;

	fine = read(file, at, 1) == 1;
	close(file);
	return fine;
}

static void remap(void)
{
	uint8_t *data = peer_memory(2 * PAGE), *larger;

	memset(data, 1, PAGE);
	memset(data + PAGE, 2, PAGE);
	CHECK(!gmemPrefetch(number(data), PAGE, hnid, NULL));
	REFUSED(mremap(data, 2 * PAGE, 3 * PAGE, 0), ENOMEM);
	REFUSED(mremap(data + 4096, PAGE, 2 * PAGE, MREMAP_MAYMOVE), EINVAL);
	REFUSED(mremap(data, 3 * PAGE, 4 * PAGE, MREMAP_MAYMOVE), EFAULT);
	REFUSED(mremap(data, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, (void *)0x20000000), EINVAL);
	CHECK(mremap(data, 2 * PAGE, 2 * PAGE - 5, 0) == data);
	larger = mremap(data, 2 * PAGE, 4 * PAGE, MREMAP_MAYMOVE);
	CHECK(larger != MAP_FAILED && larger != data && number(larger) % PAGE == 0);
	CHECK(all(larger, PAGE, 1) && all(larger + PAGE, PAGE, 2) && all(larger + 2 * PAGE, 2 * PAGE, 0));
	GIVES(gmemPrefetch(number(data), PAGE, hnid, NULL), EINVAL); /* gone */
	CHECK(!gmemPrefetch(number(larger), 4 * PAGE, hnid, NULL));
	CHECK(all(larger, PAGE, 1));
	CHECK(mremap(larger, 4 * PAGE, PAGE, 0) == larger);
	GIVES(gmemPrefetch(number(larger), PAGE + 1, hnid, NULL), EINVAL);
	CHECK(all(larger, PAGE, 1));
	CHECK(!munmap(larger, PAGE));
}

static void protect(void)
{
	uint8_t *data = mmap(NULL, 3 * PAGE, PROT_READ, FLAGS, -1, 0), *moved_to;

	CHECK(data != MAP_FAILED);
	CHECK(is_readable(data) && !is_writable(data));
	CHECK(!mprotect(data, 3 * PAGE - 100, RW)); /* what was asked for ends in the last page */
	CHECK(is_writable(data + 3 * PAGE - 1));
	memset(data, 6, 3 * PAGE);
	CHECK(!mprotect(data + PAGE, PAGE, PROT_NONE));
	CHECK(is_writable(data) && !is_readable(data + PAGE) && is_writable(data + 2 * PAGE));
	REFUSED(mprotect(data + 4096, PAGE, RW), EINVAL);
	REFUSED(mprotect(data, 4096, PROT_READ), EINVAL); /* a page is 2 MiB */
	REFUSED(mprotect(data + PAGE, 3 * PAGE, RW), ENOMEM);
	CHECK(!gmemPrefetch(number(data), 3 * PAGE, hnid, NULL));
	moved_to = mremap(data, 3 * PAGE, 4 * PAGE, MREMAP_MAYMOVE);
	CHECK(moved_to != MAP_FAILED);
	CHECK(is_writable(moved_to) && !is_readable(moved_to + PAGE) && is_writable(moved_to + 3 * PAGE));
	CHECK(!mprotect(moved_to, 4 * PAGE, PROT_READ));
	CHECK(moved_to[PAGE] == 6 && moved_to[3 * PAGE] == 0);
	CHECK(!munmap(moved_to, 4 * PAGE));
}

static void advise(void)
{
	uint8_t *data = peer_memory(3 * PAGE);

	memset(data, 4, 3 * PAGE);
	CHECK(!madvise(data + PAGE, PAGE, MADV_DONTNEED) && all(data + PAGE, PAGE, 0));
	memset(data + PAGE, 4, PAGE);
	CHECK(!gmemPrefetch(number(data), 3 * PAGE, hnid, NULL));
	CHECK(!madvise(data + PAGE - 8192, PAGE + 3 * 4096, MADV_DONTNEED)); /* parts of pages as well */
	CHECK(all(data, PAGE - 8192, 4) && all(data + PAGE - 8192, PAGE + 3 * 4096, 0));
	CHECK(all(data + 2 * PAGE + 4096, PAGE - 4096, 4));
	CHECK(!madvise(data + 4096, 1, MADV_DONTNEED)); /* within one, rounded up to 4 KiB */
	CHECK(data[4095] == 4 && all(data + 4096, 4096, 0) && data[8192] == 4);
	CHECK(!madvise(data + 4096, PAGE, MADV_FREE) && data[0] == 4);
	CHECK(!madvise(data, 3 * PAGE, MADV_WILLNEED));
	CHECK(!madvise(data, 3 * PAGE, MADV_HUGEPAGE));
	CHECK(!madvise(data, 3 * PAGE, MADV_COLD) && data[0] == 4);
	REFUSED(madvise(data + 1, 4096, MADV_DONTNEED), EINVAL);
	REFUSED(madvise(data, 4 * PAGE, MADV_DONTNEED), ENOMEM);
	REFUSED(madvise(data, PAGE, 12345), EINVAL);
	CHECK(!mprotect(data, 3 * PAGE, PROT_READ));
	CHECK(!madvise(data, PAGE, MADV_DONTNEED) && all(data, PAGE, 0));
	CHECK(!munmap(data, 3 * PAGE));
}

static void by_number(void)
{
	struct epoll_event event;
	uint8_t *data;
	int epoll;

	data = (uint8_t *)syscall(SYS_mmap, NULL, PAGE, RW, FLAGS, -1, 0);
	CHECK(data != MAP_FAILED && number(data) % PAGE == 0);
	data[0] = 1;
	CHECK(!syscall(441, hnid, data, PAGE, MADV_PREFETCH));
	CHECK(!syscall(SYS_hmadvise, -1, data, PAGE, MADV_DONTNEED) && data[0] == 0);
	data[0] = 1;
	CHECK(!syscall(453, hnid, data, PAGE, MADV_PREFETCH));
	CHECK(!syscall(453, -1, data, PAGE, MADV_DONTNEED) && data[0] == 0);
	REFUSED(syscall(441, 99, data, PAGE, MADV_PREFETCH), EINVAL);
	REFUSED(syscall(441, hnid, data, PAGE, 0x1003), EINVAL);
	REFUSED(syscall(SYS_mprotect, data, 4096, PROT_READ), EINVAL);
	CHECK(!syscall(SYS_madvise, data, PAGE, MADV_DONTNEED));
	data = (uint8_t *)syscall(SYS_mremap, data, PAGE, 2 * PAGE, MREMAP_MAYMOVE, NULL);
	CHECK(data != MAP_FAILED && !data[2 * PAGE - 1]);
	REFUSED(syscall(SYS_munmap, data + 4096, PAGE), EINVAL);
	CHECK(!syscall(SYS_munmap, data, 2 * PAGE));
	/* what 441 is to the kernel that runs here */
	epoll = epoll_create1(0);
	CHECK(epoll >= 0);
	CHECK(syscall(441, epoll, &event, 1, (long[]){ 0, 0 }, NULL, 8) == 0 || errno == ENOSYS);
	close(epoll);
	CHECK(syscall(SYS_getpid) == getpid());
}

static void device_file(void)
{
	uint8_t *data = peer_memory(PAGE);
	struct gmem_hmadvise_arg advice = { hnid, number(data), PAGE, MADV_PREFETCH };
	int id = -5, file = open("/dev/gmem", O_RDWR | O_CLOEXEC), copy, zero;
	struct gmem_hnuma_id_arg where = { &id };

	CHECK(file >= 0);
	CHECK(!ioctl(file, GMEM_GET_HNUMA_ID, &where) && id == hnid);
	copy = dup(file);
	data[7] = 7;
	CHECK(!ioctl(copy, GMEM_MADVISE, &advice) && data[7] == 7);
	advice = (struct gmem_hmadvise_arg){ -1, number(data), PAGE, MADV_DONTNEED };
	CHECK(!ioctl(copy, GMEM_MADVISE, &advice) && data[7] == 0);
	advice.hnid = 90;
	REFUSED(ioctl(file, GMEM_MADVISE, &advice), EINVAL);
	REFUSED(ioctl(file, _IOW(GMEM_MAGIC, 3, int), &id), EINVAL);
	REFUSED(ioctl(file, GMEM_MADVISE, NULL), EFAULT);
	close(file);
	zero = open("/dev/zero", O_RDONLY); /* with that number now */
	CHECK(zero == file);
	REFUSED(ioctl(zero, GMEM_GET_HNUMA_ID, &where), ENOTTY);
	CHECK(!ioctl(copy, GMEM_GET_HNUMA_ID, &where));
	close(zero);
	close(copy);
	CHECK(!munmap(data, PAGE));
}

static void statistics(void)
{
	char text[200], again[200];
	int file = openat(AT_FDCWD, "/proc/gmemstat", O_RDONLY), other;
	ssize_t length;

	CHECK(file >= 0);
	length = read(file, text, sizeof(text));
	CHECK(length > 0 && !strncmp(text, "migrating H2D     : ", 20) && text[length - 1] == '\n');
	CHECK(read(file, text, 1) == 0);
	close(file);
	other = (int)syscall(SYS_openat, AT_FDCWD, "/proc/gmemstat", O_RDONLY);
	CHECK(other >= 0 && read(other, again, sizeof(again)) == length && !memcmp(text + 1, again + 1, (size_t)length - 1));
	close(other);
	REFUSED(open("/proc/gmemstat", O_WRONLY), EACCES);
	CHECK(!fopen("/proc/gmemstat", "w") && errno == EACCES);
	REFUSED(open("/proc/gmemstats", O_RDONLY), ENOENT);
	REFUSED(syscall(SYS_openat, AT_FDCWD, NULL, O_RDONLY), EFAULT);
}

int main(void)
{
	hnid = gmemGetNumaId();
	CHECK(hnid > 0);
	remap();
	protect();
	advise();
	by_number();
	device_file();
	statistics();
	return 0;
}
