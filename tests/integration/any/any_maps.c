/* SPDX-License-Identifier: Apache-2.0
 *
 * mmap(2) and its kin on private anonymous memory, page by page of the kernel's; descriptors of gmem's are not the
 * program's.
 */
#include "any.h"

#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/syscall.h>

#define PAGE 4096ul

static sigjmp_buf back;

static void on_fault(int number)
{
	siglongjmp(back, number);
}

/* The signal that a read of it raises. */
static int reads(volatile char *at)
{
	int number = sigsetjmp(back, 1);

	if (!number)
		(void)*at;
	return number;
}

static int writes(volatile char *at)
{
	int number = sigsetjmp(back, 1);

	if (!number)
		*at = 1;
	return number;
}

static void kinds(void)
{
	char *small = map(8 * PAGE, PROT_READ | PROT_WRITE), *large = map(2 * MIB, PROT_READ | PROT_WRITE);
	char *shared = mmap(NULL, 2 * MIB, PROT_READ, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	char *low = mmap((void *)0x20000000, 2 * MIB, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char *code = map(2 * MIB, PROT_READ | PROT_EXEC);
	char *populated = mmap(NULL, 2 * MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

	CHECK(is_managed(large) && is_managed(populated));
	CHECK(!is_managed(small) && !is_managed(shared) && !is_managed(low) && !is_managed(code));
	CHECK(all(large, 2 * MIB, 0) && all(populated, 2 * MIB, 0));
	CHECK(!munmap(small, 8 * PAGE) && !munmap(large, 2 * MIB) && !munmap(shared, 2 * MIB) && !munmap(low, 2 * MIB));
	CHECK(!munmap(code, 2 * MIB) && !munmap(populated, 2 * MIB));
	CHECK(reads(large) == SIGSEGV);
}

static void parts(void)
{
	char *at = map(4 * MIB, PROT_READ | PROT_WRITE);

	memset(at, 1, 4 * MIB);
	CHECK(!munmap(at + 3 * PAGE, PAGE) && !munmap(at + MIB, MIB));
	CHECK(reads(at + 3 * PAGE) == SIGSEGV && reads(at + MIB) == SIGSEGV && reads(at + 2 * MIB - 1) == SIGSEGV);
	CHECK(all(at, 3 * PAGE, 1) && all(at + 4 * PAGE, MIB - 4 * PAGE, 1) && all(at + 2 * MIB, 2 * MIB, 1));
	CHECK(!mprotect(at + 5 * PAGE, PAGE, PROT_READ));
	CHECK(writes(at + 5 * PAGE) == SIGSEGV && !reads(at + 5 * PAGE) && !writes(at + 6 * PAGE) && !writes(at + 4 * PAGE));
	CHECK(!mprotect(at + 5 * PAGE, PAGE, PROT_READ | PROT_WRITE) && !writes(at + 5 * PAGE));
	CHECK(mprotect(at, 4 * MIB, PROT_READ) && errno == ENOMEM); /* a hole */
	CHECK(!munmap(at, 4 * MIB));                                /* holes and all */
	CHECK(reads(at) == SIGSEGV);
}

static void reserved(void)
{
	char *at = map(64 * MIB, PROT_NONE);

	CHECK(is_managed(at) && reads(at) == SIGSEGV);
	CHECK(!mprotect(at + 7 * PAGE, 3 * PAGE, PROT_READ | PROT_WRITE));
	CHECK(!writes(at + 7 * PAGE) && !writes(at + 9 * PAGE) && reads(at + 10 * PAGE) == SIGSEGV);
	/* as a virtual machine commits its heap */
	CHECK(mmap(at + MIB, MIB, PROT_READ | PROT_WRITE, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == at + MIB);
	memset(at + MIB, 3, MIB);
	CHECK(mmap(at + MIB, PAGE, PROT_READ | PROT_WRITE, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == at + MIB);
	CHECK(all(at + MIB, PAGE, 0) && all(at + MIB + PAGE, MIB - PAGE, 3));
	CHECK(!munmap(at, 64 * MIB));
}

static void over_it(void)
{
	char *at = map(2 * MIB, PROT_READ | PROT_WRITE);
	int fd = open("/proc/self/exe", O_RDONLY);

	memset(at, 5, 2 * MIB);
	CHECK(mmap(at + 16 * PAGE, PAGE, PROT_READ, MAP_FIXED | MAP_PRIVATE, fd, 0) == at + 16 * PAGE);
	CHECK(!memcmp(at + 16 * PAGE, "\177ELF", 4));
	CHECK(all(at, 16 * PAGE, 5) && all(at + 17 * PAGE, 2 * MIB - 17 * PAGE, 5));
	CHECK(!munmap(at, 2 * MIB));
	close(fd);
}

static void advice(void)
{
	char *at = map(2 * MIB, PROT_READ | PROT_WRITE), *heap = malloc(300000);

	memset(at, 1, 2 * MIB);
	CHECK(!madvise(at + PAGE, 2 * PAGE, MADV_DONTNEED));
	CHECK(all(at, PAGE, 1) && all(at + PAGE, 2 * PAGE, 0) && all(at + 3 * PAGE, 2 * MIB - 3 * PAGE, 1));
	CHECK(!madvise(at + MIB, MIB, MADV_FREE));
	CHECK(all(at + MIB, MIB, 0) || all(at + MIB, MIB, 1));
	memset(at + MIB, 2, MIB); /* a write cancels it */
	CHECK(all(at + MIB, MIB, 2));
	CHECK(!madvise(at, 2 * MIB, MADV_WILLNEED) && !madvise(at, 2 * MIB, MADV_NOHUGEPAGE));
	CHECK(!madvise(at, 2 * MIB, MADV_COLD) && !posix_madvise(at, 2 * MIB, POSIX_MADV_SEQUENTIAL));
	CHECK(!munmap(at, 2 * MIB) && madvise(at, PAGE, MADV_DONTNEED) && errno == ENOMEM);
	memset(heap, 1, 300000);
	at = (char *)(((uintptr_t)heap + PAGE - 1) & ~(PAGE - 1));
	CHECK(is_managed(at) && !madvise(at, 40 * PAGE, MADV_DONTNEED));
	CHECK(all(at, 40 * PAGE, 0) && all(at + 40 * PAGE, PAGE, 1) && all(heap, (size_t)(at - heap), 1));
	free(heap);
}

static void moves(void)
{
	char *at = map(2 * MIB, PROT_READ | PROT_WRITE), *to;

	memset(at, 1, 2 * MIB);
	to = mremap(at, 2 * MIB, 6 * MIB, MREMAP_MAYMOVE);
	CHECK(to != MAP_FAILED && is_managed(to) && all(to, 2 * MIB, 1) && all(to + 2 * MIB, 4 * MIB, 0));
	CHECK(to == at || reads(at) == SIGSEGV);
	CHECK(mremap(to, 6 * MIB, 3 * PAGE, 0) == to && all(to, 3 * PAGE, 1) && reads(to + 3 * PAGE) == SIGSEGV);
	at = map(16 * PAGE, PROT_READ | PROT_WRITE);
	CHECK(mremap(to, 3 * PAGE, 4 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, at) == at);
	CHECK(all(at, 3 * PAGE, 1) && all(at + 3 * PAGE, PAGE, 0) && reads(to) == SIGSEGV);
	CHECK(!munmap(at, 16 * PAGE));
}

static void system_calls(void)
{
	char *at = map(4 * MIB, PROT_READ | PROT_WRITE), *heap = malloc(3 * MIB);
	int ends[2], fd = open("/dev/zero", O_RDONLY);

	CHECK(read(fd, at, 2 * MIB) == 2 * MIB); /* nobody has touched it */
	CHECK(read(fd, heap, 3 * MIB) == 3 * MIB);
	CHECK(!pipe(ends) && write(ends[1], at + 3 * MIB, 5000) == 5000 && read(ends[0], heap + MIB, 5000) == 5000);
	close(fd);
	CHECK(!munmap(at, 4 * MIB));
	free(heap);
}

/* As daemons begin. */
static void descriptors(void)
{
	char *heap = malloc(3 * MIB);

	for (int fd = 3; fd < 1100; fd++)
		close(fd);
	CHECK(!close_range(3, ~0u, 0));
	closefrom(3);
	memset(heap, 4, 3 * MIB);
	for (int fd = 3; fd < 1024; fd++)
		CHECK(dup2(2, fd) == fd);
	CHECK(all(heap, 3 * MIB, 4));
	free(heap);
	heap = map(MIB, PROT_READ | PROT_WRITE);
	if (is_managed(heap))
		memset(heap, 1, MIB);
	for (int fd = 3; fd < 1024; fd++)
		CHECK(!close(fd));
}

int main(void)
{
	struct sigaction action = { .sa_handler = on_fault };

	CHECK(!sigaction(SIGSEGV, &action, NULL) && !sigaction(SIGBUS, &action, NULL));
	kinds();
	parts();
	reserved();
	over_it();
	advice();
	moves();
	system_calls();
	descriptors();
	system_calls();
	puts("ok");
	return 0;
}
