/* SPDX-License-Identifier: Apache-2.0
 *
 * Objects whose fresh pages come from a source: what is read, when, and what becomes of it; a source that fails; files that
 * will not do. The source is a file that the daemon's side makes.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <gmem/source.h>

#include "harness.h"

#define PAGES 64
#define DEVICE 1

static int file_fd; /* older than every process */
static uint64_t page_bytes;

static uint64_t expected(uint64_t page, uint64_t i)
{
	return page * 100000 + i;
}

static void write_file(uint64_t bytes)
{
	uint64_t *words = malloc(page_bytes);

	CHECK(!ftruncate(file_fd, 0));
	for (uint64_t page = 0; page * page_bytes < bytes; page++) {
		for (uint64_t i = 0; i < page_bytes / 8; i++)
			words[i] = expected(page, i);
		CHECK(pwrite(file_fd, words, page_bytes, (off_t)(page * page_bytes)) == (ssize_t)page_bytes);
	}
	CHECK(!ftruncate(file_fd, (off_t)bytes));
	free(words);
}

static uint64_t file_word(uint64_t page, uint64_t i)
{
	uint64_t word;

	CHECK(pread(file_fd, &word, 8, (off_t)(page * page_bytes + i * 8)) == 8);
	return word;
}

static void *page_at(void *at, uint64_t page, uint64_t i)
{
	return (uint8_t *)at + page * page_bytes + i * 8;
}

static volatile uint64_t *word(void *at, uint64_t page, uint64_t i)
{
	return page_at(at, page, i);
}

static sigjmp_buf escape;

static void on_sigbus(int number)
{
	(void)number;
	siglongjmp(escape, 1);
}

static bool is_sigbus(volatile uint64_t *at)
{
	bool was = true;

	signal(SIGBUS, on_sigbus);
	if (!sigsetjmp(escape, 1)) {
		(void)*at;
		was = false;
	}
	signal(SIGBUS, SIG_DFL);
	return was;
}

/* As it is while it is there: with so little room it may be gone the next moment. */
static struct gmem_page_info touched(struct client *client, void *at, uint64_t page)
{
	struct gmem_page_info info = { 0 };

	for (int tries = 0; !info.valid && tries < 1000; tries++) {
		(void)*word(at, page, 0);
		info = client_query(client, page_at(at, page, 0));
	}
	return info;
}

/* Twice as much as the host may hold, and no tier: all of it is read, again and again. */
static void read_all(struct client *client, void *at)
{
	struct gmem_page_info info;

	for (int round = 0; round < 2; round++)
		for (uint64_t page = 0; page < PAGES; page++)
			CHECK_EQ(*word(at, page, 5), expected(page, 5));
	info = touched(client, at, PAGES - 1);
	CHECK_EQ(info.valid, 1);
	CHECK(!(info.flags & GMEM_PAGE_CHANGED));
	CHECK_EQ(info.writer, -1); /* or a write would not be noticed */
}

static void write_some(struct client *client, void *at)
{
	for (uint64_t page = 0; page < PAGES; page += 3)
		*word(at, page, 1) = page;
	for (uint64_t page = 0; page < PAGES; page++)
		CHECK_EQ(*word(at, page, 1), page % 3 ? expected(page, 1) : page);
	CHECK_EQ(client_prefetch(client, DEVICE, at, 4 * page_bytes), 0); /* as many as fit there */
	CHECK(client_query(client, at).valid & 1 << DEVICE);
	*word(at, 5, 3) = 5;
	CHECK(!client_query(client, page_at(at, 5, 0)).valid || client_query(client, page_at(at, 5, 0)).flags & GMEM_PAGE_CHANGED);
	for (uint64_t page = 0; page < PAGES; page++)
		CHECK_EQ(*word(at, page, 1), page % 3 ? expected(page, 1) : page);
}

static int use(struct client *client, void *arg)
{
	void *at = client_mmap_file(client, file_fd, PAGES * page_bytes - 24, page_bytes, true);
	uint64_t *copy = client_mmap(client, page_bytes, page_bytes, GMEM_FORK_SHARE);

	(void)arg;
	CHECK(at != MAP_FAILED);
	CHECK_EQ(client_query(client, at).state, GMEM_NOMAP);
	CHECK_EQ(client_hmemcpy(client, 0, copy, page_at(at, 9, 0), page_bytes), 0); /* from pages that nobody has touched */
	CHECK_EQ(copy[7], expected(9, 7));
	read_all(client, at);
	CHECK_EQ(*word(at, PAGES - 1, page_bytes / 8 - 4), expected(PAGES - 1, page_bytes / 8 - 4));
	CHECK_EQ(*word(at, PAGES - 1, page_bytes / 8 - 1), 0); /* behind what was mapped */
	write_some(client, at);
	CHECK_EQ(client_flush(client, at, PAGES * page_bytes), 0);
	for (uint64_t page = 0; page < PAGES; page++)
		CHECK_EQ(file_word(page, 1), page % 3 ? expected(page, 1) : page);
	CHECK(!(client_query(client, at).flags & GMEM_PAGE_CHANGED));
	*word(at, 0, 2) = 77; /* noticed again */
	CHECK_EQ(client_flush(client, at, page_bytes), 0);
	CHECK_EQ(file_word(0, 2), 77);
	*word(at, 1, 2) = 78;
	CHECK_EQ(client_discard(client, at, PAGES * page_bytes), 0);
	CHECK_EQ(*word(at, 1, 2), expected(1, 2)); /* what the file has */

	CHECK(!ftruncate(file_fd, (off_t)(8 * page_bytes)));
	CHECK(is_sigbus(word(at, 40, 0)));
	CHECK_EQ(client_query(client, page_at(at, 40, 0)).state, GMEM_NOMAP);
	CHECK_EQ(client_prefetch(client, 0, page_at(at, 41, 0), page_bytes), -EIO);
	CHECK_EQ(*word(at, 2, 0), expected(2, 0));
	*word(at, 3, 2) = 79;
	CHECK(!ftruncate(file_fd, (off_t)page_bytes));
	CHECK_EQ(client_flush(client, at, PAGES * page_bytes), -EIO);
	CHECK_EQ(*word(at, 3, 2), 79); /* still there */
	CHECK_EQ(lseek(file_fd, 0, SEEK_END), page_bytes);
	return 0;
}

static void check_files(void)
{
	struct gmem_file_args read_only = { .bytes = 4096 }, write = { .bytes = 4096, .write = true };
	char path[64];
	const char *why;
	int fds[2], fd;

	snprintf(path, sizeof(path), "/proc/self/fd/%d", file_fd);
	CHECK_EQ(gmem_file_check(file_fd, &write, &why), 0);
	CHECK_EQ(gmem_file_check(-1, &read_only, &why), -EBADF);
	fd = open(path, O_RDONLY);
	CHECK(fd >= 0);
	CHECK_EQ(gmem_file_check(fd, &read_only, &why), 0);
	CHECK_EQ(gmem_file_check(fd, &write, &why), -EBADF);
	read_only.offset = 1ull << 40;
	CHECK_EQ(gmem_file_check(fd, &read_only, &why), -EINVAL);
	read_only = (struct gmem_file_args){ .bytes = 4096, .offset = 8 };
	CHECK_EQ(gmem_file_check(fd, &read_only, &why), -EINVAL);
	read_only = (struct gmem_file_args){ .bytes = UINT64_MAX, .offset = 4096 };
	CHECK_EQ(gmem_file_check(fd, &read_only, &why), -EINVAL);
	close(fd);
	read_only = (struct gmem_file_args){ .bytes = 4096 };
	CHECK(!pipe(fds));
	CHECK_EQ(gmem_file_check(fds[0], &read_only, &why), -EOPNOTSUPP);
	close(fds[0]);
	close(fds[1]);
	fd = open("/tmp", O_RDONLY);
	CHECK_EQ(gmem_file_check(fd, &read_only, &why), -EINVAL);
	close(fd);
	fd = open(path, O_PATH);
	CHECK_EQ(gmem_file_check(fd, &read_only, &why), -EBADF);
	close(fd);
	fd = open(path, O_RDWR | O_APPEND);
	CHECK_EQ(gmem_file_check(fd, &write, &why), -EINVAL);
	close(fd);
}

int main(void)
{
	static const uint64_t sizes[] = { 4096, 65536 };

	file_fd = memfd_create("source", MFD_CLOEXEC);
	CHECK(file_fd >= 0);
	for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
		struct gmem_core *core;
		char capacity[64];

		page_bytes = sizes[i];
		write_file(PAGES * page_bytes);
		check_files();
		core = core_start((struct gmem_core_config){ .event_fork = true,
							     .host_limit_bytes = PAGES / 2 * page_bytes });
		snprintf(capacity, sizeof(capacity), "capacity=%llu", (unsigned long long)(8 * page_bytes));
		CHECK_EQ(attach_simgpu(core, "simgpu0", capacity), DEVICE);
		CHECK_EQ(client_wait(client_start(core, use, NULL)), 0);
		core_settle(core);
		gmem_core_destroy(core);
	}
	printf("source: ok\n");
	return 0;
}
