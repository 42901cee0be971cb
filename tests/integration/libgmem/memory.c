/* SPDX-License-Identifier: Apache-2.0
 *
 * memory DEVICE: mapping, placement, queries, threads, fork, and bad arguments.
 */
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

#define MB ((size_t)1 << 20)

static struct gmem *session;
static const char *device;

static void *map(size_t bytes, size_t page_bytes, uint32_t flags)
{
	struct gmem_mmap_options options = { .size = sizeof(options), .page_bytes = page_bytes, .flags = flags };
	void *at;

	OK(gmem_mmap(session, bytes, &options, &at));
	return at;
}

/* A query as gmem_query(), when no page is on its way: a touch returns a moment before its page's move is over. */
static size_t settled(const void *va, size_t bytes, struct gmem_page *pages, size_t capacity)
{
	for (int tries = 0; tries < 1000; tries++) {
		size_t count, busy = 0;

		OK(gmem_query(session, va, bytes, pages, capacity, &count));
		for (size_t i = 0; i < count && i < capacity; i++)
			busy += pages[i].state == GMEM_PAGE_BUSY;
		if (!busy)
			return count;
		usleep(1000);
	}
	FAILED("pages stay busy");
}

static size_t pages_at(const void *va, size_t bytes, int hnid)
{
	struct gmem_page pages[4096];
	size_t count = settled(va, bytes, pages, 4096), found = 0;

	CHECK(count <= 4096);
	for (size_t i = 0; i < count; i++)
		found += pages[i].state == GMEM_PAGE_RESIDENT && pages[i].valid >> hnid & 1;
	return found;
}

static void test_sizes(void)
{
	static const size_t sizes[] = { 1, 4096, 4097, 65536, 1000000, 2 * MB, 2 * MB + 1, 5 * MB };
	static const size_t pages[] = { 0, 4096, 65536, 2 * MB };

	for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
		for (size_t j = 0; j < 4; j++) {
			struct gmem_page page;
			size_t count;
			char *at = map(sizes[i], pages[j], i & 1 ? GMEM_MMAP_SMALL : 0);

			CHECK(at[0] == 0 && at[sizes[i] - 1] == 0);
			at[0] = 1;
			at[sizes[i] - 1] = 2;
			CHECK(settled(at, 1, &page, 1) == 1);
			CHECK( page.state == GMEM_PAGE_RESIDENT);
			CHECK(!pages[j] || (size_t)1 << page.page_shift == pages[j]);
			/* The size that was asked for frees all of it. */
			OK(gmem_munmap(session, at, sizes[i]));
			REFUSED(gmem_query(session, at, 1, &page, 1, &count), EINVAL, "va");
		}
	}
}

static void test_placement(void)
{
	int hnid = hnid_of(session, device);
	unsigned char *a = map(MB, 65536, 0), *b = map(MB, 4096, 0);

	for (size_t i = 0; i < MB; i++)
		a[i] = (unsigned char)(i * 7);
	OK(gmem_prefetch(session, hnid, a, MB));
	CHECK(pages_at(a, MB, hnid) == 16 && pages_at(a, MB, GMEM_HOST) == 0);
	OK(gmem_hmemcpy(session, hnid, b + 5, a + 3, MB - 5));
	CHECK(pages_at(b, MB, hnid) == 256);
	CHECK(!memcmp(b + 5, a + 3, MB - 5));
	OK(gmem_prefetch(session, GMEM_HOST, a, MB));
	CHECK(pages_at(a, MB, GMEM_HOST) == 16);
	OK(gmem_hmadvise(session, hnid, a, 65536, GMEM_ADVISE_PINNED));
	CHECK(device_of(session, device).pinned_bytes == 65536);
	OK(gmem_hmadvise(session, hnid, a, 65536, GMEM_ADVISE_UNPINNED));
	CHECK(device_of(session, device).pinned_bytes == 0);
	OK(gmem_hmadvise(session, hnid, a, MB, GMEM_ADVISE_PREFETCH));
	CHECK(pages_at(a, MB, hnid) == 16);
	OK(gmem_discard(session, a, MB));
	CHECK(pages_at(a, MB, hnid) == 0);
	for (size_t i = 0; i < MB; i++)
		CHECK(a[i] == 0);
	OK(gmem_munmap(session, a, MB));
	OK(gmem_munmap(session, b, MB));
}

/* More pages than one request tells of. */
static void test_long_query(void)
{
	size_t bytes = 300 * MB, count, wanted = bytes / 4096;
	struct gmem_page *pages = calloc(wanted, sizeof(*pages));
	char *at = map(bytes, 4096, 0);

	CHECK(pages);
	at[0] = at[bytes - 1] = at[bytes / 2] = 1;
	CHECK(settled(at, bytes, pages, wanted) == wanted);
	for (size_t i = 0; i < wanted; i++)
		CHECK((pages[i].state == GMEM_PAGE_RESIDENT) ==
		      (i == 0 || i == wanted - 1 || i == bytes / 2 / 4096));
	OK(gmem_query(session, at + 100, bytes - 200, NULL, 0, &count));
	CHECK(count == wanted);
	memset(pages, 0xee, wanted * sizeof(*pages));
	OK(gmem_query(session, at, bytes, pages, 3, &count));
	CHECK(count == wanted && pages[0].state == GMEM_PAGE_RESIDENT && pages[3].state == 0xee);
	OK(gmem_munmap(session, at, bytes));
	free(pages);
}

static void test_partial_munmap(void)
{
	char *at = map(16 * 4096, 4096, 0);
	size_t count;

	memset(at, 5, 16 * 4096);
	OK(gmem_munmap(session, at + 4 * 4096, 4 * 4096));
	CHECK(at[0] == 5 && at[8 * 4096] == 5);
	REFUSED(gmem_query(session, at + 4 * 4096, 4096, NULL, 0, &count), EINVAL, "va");
	OK(gmem_munmap(session, at, 4 * 4096));
	OK(gmem_munmap(session, at + 8 * 4096, 8 * 4096));
}

static void test_system_calls(void)
{
	char *at = map(MB, 0, 0), back[4096];
	int zero = open("/dev/zero", O_RDONLY), pipes[2];

	CHECK(zero >= 0 && !pipe(pipes));
	if (kernel_faults())
		CHECK(read(zero, at, MB) == (ssize_t)MB);
	else
		CHECK(read(zero, at, MB) < 0 && errno == EFAULT);
	memset(at, 'x', 4096);
	OK(gmem_prefetch(session, hnid_of(session, device), at, MB));
	if (!kernel_faults())
		(void)*(volatile char *)at;
	CHECK(write(pipes[1], at, 4096) == 4096 && read(pipes[0], back, 4096) == 4096);
	CHECK(back[0] == 'x' && back[4095] == 'x');
	close(zero);
	close(pipes[0]);
	close(pipes[1]);
	OK(gmem_munmap(session, at, MB));
}

static void *work(void *arg)
{
	int hnid = hnid_of(session, device), seed = (int)(intptr_t)arg;

	for (int round = 0; round < 20; round++) {
		unsigned char *at = map(256 * 1024, 65536, 0);

		memset(at, seed + round, 256 * 1024);
		OK(gmem_prefetch(session, round & 1 ? GMEM_HOST : hnid, at, 256 * 1024));
		for (size_t i = 0; i < 256 * 1024; i += 999)
			CHECK(at[i] == (unsigned char)(seed + round));
		REFUSED(gmem_prefetch(session, 15, at, 4096), EINVAL, "hnid");
		OK(gmem_munmap(session, at, 256 * 1024));
	}
	return NULL;
}

static void test_threads(void)
{
	pthread_t threads[8];

	for (intptr_t i = 0; i < 8; i++)
		CHECK(!pthread_create(&threads[i], NULL, work, (void *)(i * 31)));
	for (int i = 0; i < 8; i++)
		pthread_join(threads[i], NULL);
}

static void in_child(unsigned char *shared, unsigned char *alone)
{
	unsigned char *own;
	struct gmem_page page;
	size_t count;

	CHECK(shared[100] == 1);
	shared[100] = 2;
	OK(gmem_prefetch(session, hnid_of(session, device), shared, MB));
	CHECK(shared[100] == 2);
	own = map(MB, 0, 0);
	own[0] = 9;
	/* What is not inherited is not there at all. */
	REFUSED(gmem_query(session, alone, 1, &page, 1, &count), EINVAL, "va");
	CHECK(signal(SIGSEGV, SIG_DFL) != SIG_ERR);
	OK(gmem_munmap(session, own, MB));
}

static void test_fork(void)
{
	unsigned char *shared = map(MB, 65536, 0), *alone = map(MB, 65536, GMEM_MMAP_NO_INHERIT);
	int status;
	pid_t pid;

	shared[100] = 1;
	alone[100] = 1;
	pid = fork();
	if (pid == 0) {
		in_child(shared, alone);
		OK(gmem_close(session));
		_exit(0);
	}
	CHECK(waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 0);
	CHECK(shared[100] == 2 && alone[100] == 1);
	pid = fork();
	if (pid == 0) {
		alone[100] = 3;
		_exit(0);
	}
	CHECK(waitpid(pid, &status, 0) == pid && WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV);
	CHECK(alone[100] == 1);
	OK(gmem_munmap(session, shared, MB));
	OK(gmem_munmap(session, alone, MB));
}

static void test_bad_memory_arguments(void)
{
	struct gmem_mmap_options odd = { .size = sizeof(odd), .page_bytes = 8192 };
	char *at = map(MB, 4096, 0), local[4096];
	void *out = (void *)1;
	size_t count = 77;

	REFUSED(gmem_mmap(session, 0, NULL, &out), EINVAL, "bytes");
	REFUSED(gmem_mmap(session, (size_t)-4096, NULL, &out), EINVAL, "bytes");
	REFUSED(gmem_mmap(session, (size_t)1 << 63, NULL, &out), EINVAL, "bytes");
	REFUSED(gmem_mmap(session, (size_t)1 << 60, NULL, &out), ENOMEM, "bytes");
	REFUSED(gmem_mmap(session, MB, &odd, &out), EINVAL, "page_bytes");
	odd = (struct gmem_mmap_options){ .size = sizeof(odd), .flags = 0x80 };
	REFUSED(gmem_mmap(session, MB, &odd, &out), EINVAL, "options");
	odd = (struct gmem_mmap_options){ .size = 1 };
	REFUSED(gmem_mmap(session, MB, &odd, &out), EINVAL, "options");
	REFUSED(gmem_mmap(session, MB, NULL, NULL), EINVAL, "ret");
	REFUSED(gmem_mmap(NULL, MB, NULL, &out), EINVAL, "session");
	CHECK(out == (void *)1);
	REFUSED(gmem_munmap(session, at + 1, 4096), EINVAL, "va");
	REFUSED(gmem_munmap(session, local, 4096), EINVAL, "va");
	REFUSED(gmem_munmap(session, at, 0), EINVAL, "bytes");
	REFUSED(gmem_munmap(session, at, (size_t)1 << 62), EINVAL, "va");
	REFUSED(gmem_query(session, at, 0, NULL, 0, &count), EINVAL, "bytes");
	REFUSED(gmem_query(session, local, 1, NULL, 0, &count), EINVAL, "va");
	REFUSED(gmem_query(session, at, 2 * MB, NULL, 0, &count), EINVAL, "va");
	REFUSED(gmem_query(session, at, MB, NULL, 5, &count), EINVAL, "pages");
	CHECK(count == 77);
	at[0] = 4;
	CHECK(at[0] == 4);
	OK(gmem_munmap(session, at, MB));
}

static void test_bad_placement_arguments(void)
{
	int hnid = hnid_of(session, device);
	char *at = map(MB, 4096, 0), local[4096];

	REFUSED(gmem_prefetch(session, 9, at, MB), EINVAL, "hnid");
	REFUSED(gmem_prefetch(session, 99, at, MB), EINVAL, "hnid");
	REFUSED(gmem_prefetch(session, -1, at, MB), EINVAL, "hnid");
	REFUSED(gmem_prefetch(session, hnid, at, 0), EINVAL, "bytes");
	REFUSED(gmem_prefetch(session, hnid, local, 4096), EINVAL, "va");
	REFUSED(gmem_hmadvise(session, hnid, at, MB, 0x7777), EINVAL, "advice");
	REFUSED(gmem_hmadvise(session, -1, at, MB, GMEM_ADVISE_PINNED), EINVAL, "hnid");
	REFUSED(gmem_hmemcpy(session, 0, at, local, 10), EINVAL, "src");
	REFUSED(gmem_hmemcpy(session, 0, local, at, 10), EINVAL, "dst");
	REFUSED(gmem_hmemcpy(session, 0, at, at + 5, 10), EINVAL, "overlap");
	REFUSED(gmem_discard(session, local, 4096), EINVAL, "va");
	OK(gmem_munmap(session, at, MB));
}

static void test_bad_open(void)
{
	const char *const devices[] = { "x", NULL };
	struct gmem_open_options options = { .size = sizeof(options), .devices = devices, .device_count = 2 };
	struct gmem *none = NULL;
	size_t count;

	REFUSED(gmem_open("/nowhere/gmemd.sock", NULL, &none), ENOENT, "/nowhere/gmemd.sock");
	REFUSED(gmem_open("/dev/null", NULL, &none), ECONNREFUSED, "/dev/null");
	REFUSED(gmem_open("", NULL, &none), EINVAL, "path");
	REFUSED(gmem_open(NULL, &options, &none), EINVAL, "devices[1]");
	options.device_count = 1;
	REFUSED(gmem_open("/x", &options, &none), EINVAL, "options");
	REFUSED(gmem_open(NULL, NULL, NULL), EINVAL, "ret");
	CHECK(!none);
	REFUSED(gmem_devices(session, NULL, sizeof(struct gmem_device_info), 1, &count), EINVAL, "devices");
	REFUSED(gmem_devices(session, NULL, 8000, 1, &count), EINVAL, "device_bytes");
	OK(gmem_devices(session, NULL, 0, 0, &count));
	CHECK(count >= 2);
}

static void test_many_sessions(void)
{
	for (int i = 0; i < 20; i++) {
		struct gmem *other;
		char *at;

		OK(gmem_open(NULL, NULL, &other));
		OK(gmem_mmap(other, MB, NULL, (void **)&at));
		at[0] = 1;
		OK(gmem_close(other)); /* with the region in place */
	}
}

int main(int argc, char **argv)
{
	CHECK(argc >= 2);
	device = argv[1];
	OK(gmem_open(NULL, NULL, &session));
	test_sizes();
	test_placement();
	test_long_query();
	test_partial_munmap();
	test_system_calls();
	test_threads();
	test_fork();
	test_bad_memory_arguments();
	test_bad_placement_arguments();
	test_bad_open();
	test_many_sessions();
	CHECK(device_of(session, device).used_bytes == 0);
	OK(gmem_close(session));
	return 0;
}
