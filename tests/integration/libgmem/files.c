/* SPDX-License-Identifier: Apache-2.0
 *
 * files DEVICE KERNELS.SO: a file's bytes as memory.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include "check.h"

#define PAGE 4096ul
#define PAGES 64ul
#define PATIENCE_NS 60000000000ull

static struct gmem *session;

static int make_file(void)
{
	char path[] = "/tmp/gmem-files-XXXXXX";
	uint64_t words[PAGE / 8];
	int fd = mkstemp(path);

	CHECK(fd >= 0 && !unlink(path));
	for (size_t page = 0; page < PAGES; page++) {
		for (size_t i = 0; i < PAGE / 8; i++)
			words[i] = page * 1000 + i;
		CHECK(write(fd, words, PAGE) == (ssize_t)PAGE);
	}
	return fd;
}

static uint64_t word_of_file(int fd, size_t page, size_t i)
{
	uint64_t word;

	CHECK(pread(fd, &word, 8, (off_t)(page * PAGE + i * 8)) == 8);
	return word;
}

static uint64_t *map(int fd, size_t offset, size_t bytes, uint32_t flags)
{
	struct gmem_map_file_options options = { .size = sizeof(options), .page_bytes = PAGE, .flags = flags };
	void *at;

	OK(gmem_map_file(session, fd, offset, bytes, &options, &at));
	return at;
}

static void test_read_and_write(const char *device, const char *library)
{
	int fd = make_file(), copy = dup(fd);
	uint64_t *words = map(copy, PAGE, 40 * PAGE, GMEM_MAP_FILE_WRITE);
	uint64_t *private = map(fd, 0, PAGES * PAGE, GMEM_MAP_FILE_PRIVATE);
	void *args[3] = { words + 10 * PAGE / 8, (void *)(PAGE / 8), (void *)5 };
	struct gmem_context *context;
	struct gmem_fence *fence;
	struct gmem_page page;
	size_t count;
	int value;

	close(copy); /* gmemd has one of its own */
	OK(gmem_query(session, words, PAGE, &page, 1, &count));
	CHECK(page.state == GMEM_PAGE_NOMAP);
	CHECK(words[0] == 1000 && words[39 * PAGE / 8 + 1] == 40001);
	OK(gmem_context_open(session, device, NULL, &context));
	OK(gmem_context_launch(context, library, "add", args, 3, NULL, &fence));
	OK(gmem_fence_wait(fence, PATIENCE_NS, &value));
	gmem_fence_free(fence);
	CHECK(value == 0 && words[10 * PAGE / 8 + 2] == 11007);
	words[3] = 7;
	private[0] = 8;
	CHECK(word_of_file(fd, 1, 3) == 1003 && word_of_file(fd, 11, 2) == 11002);
	OK(gmem_flush(session, words, 40 * PAGE));
	OK(gmem_flush(session, private, PAGES * PAGE));
	CHECK(word_of_file(fd, 1, 3) == 7 && word_of_file(fd, 11, 2) == 11007 && word_of_file(fd, 0, 0) == 0);
	CHECK(word_of_file(fd, 12, 0) == 12000 && private[0] == 8);
	OK(gmem_context_close(context));
	/* dropped and read again, unless it was changed */
	OK(gmem_discard(session, words, PAGE));
	CHECK(words[3] == 7);
	OK(gmem_munmap(session, words, 40 * PAGE));
	OK(gmem_munmap(session, private, PAGES * PAGE));
	close(fd);
}

static void test_end_of_file(void)
{
	int fd = make_file(), status;
	uint64_t *words = map(fd, 0, 3 * PAGE + 16, 0);
	pid_t child;

	CHECK(words[3 * PAGE / 8 + 1] == 3001 && words[3 * PAGE / 8 + 2] == 0); /* what lies behind is not there */
	CHECK(!ftruncate(fd, (off_t)PAGE));
	child = fork();
	if (!child) {
		signal(SIGBUS, SIG_DFL);
		_exit((int)words[2 * PAGE / 8]);
	}
	CHECK(waitpid(child, &status, 0) == child && WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS);
	CHECK(words[1] == 1);
	child = fork();
	if (!child) {
		*(volatile uint64_t *)words = 1; /* mapped to be read */
		_exit(0);
	}
	CHECK(waitpid(child, &status, 0) == child && WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV);
	OK(gmem_munmap(session, words, 4 * PAGE));
	close(fd);
}

static void test_refusals(void)
{
	struct gmem_map_file_options both = { .size = sizeof(both), .flags = GMEM_MAP_FILE_WRITE | GMEM_MAP_FILE_PRIVATE };
	struct gmem_map_file_options write = { .size = sizeof(write), .flags = GMEM_MAP_FILE_WRITE };
	int fd = make_file(), ends[2], only = open("/proc/self/exe", O_RDONLY);
	void *at = NULL;

	CHECK(!pipe(ends));
	REFUSED(gmem_map_file(session, fd, 1, PAGE, NULL, &at), EINVAL, "offset: ");
	REFUSED(gmem_map_file(session, fd, 0, 0, NULL, &at), EINVAL, "bytes: ");
	REFUSED(gmem_map_file(session, fd, 0, PAGES * PAGE + 1, NULL, &at), EINVAL, "fd: it ends before");
	REFUSED(gmem_map_file(session, fd, 0, PAGE, &both, &at), EINVAL, "options: ");
	REFUSED(gmem_map_file(session, fd, 0, PAGE, NULL, NULL), EINVAL, "ret: ");
	REFUSED(gmem_map_file(session, ends[0], 0, PAGE, NULL, &at), EOPNOTSUPP, "fd: ");
	REFUSED(gmem_map_file(session, only, 0, PAGE, &write, &at), EBADF, "fd: it is not open for writing");
	REFUSED(gmem_map_file(session, 1000, 0, PAGE, NULL, &at), EBADF, "");
	CHECK(!at);
	close(ends[0]);
	close(ends[1]);
	close(only);
	close(fd);
}

int main(int argc, char **argv)
{
	CHECK(argc == 3);
	OK(gmem_open(NULL, NULL, &session));
	test_read_and_write(argv[1], argv[2]);
	test_end_of_file();
	test_refusals();
	OK(gmem_close(session));
	printf("files: ok\n");
	return 0;
}
