/* SPDX-License-Identifier: Apache-2.0
 *
 * What each step of the page protocol leaves behind, for each page size and backing: states, copies, content.
 */
#define _GNU_SOURCE
#include "harness.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

struct shared {
	volatile int step;
	volatile uint64_t va;
	uint64_t page_bytes;
	int gpu;
};

static struct shared *shared;

static void wait_step(int step)
{
	while (shared->step != step)
		sleep_ms(1);
}

static void expect(struct client *client, const void *at, int state, int valid, int writer)
{
	struct gmem_page_info info = client_query(client, at);

	/* the faulting thread is woken a moment before the page is committed */
	while (info.state == GMEM_BUSY)
		info = client_query(client, at);
	CHECK_EQ(info.state, state);
	CHECK_EQ(info.valid, valid);
	CHECK_EQ(info.writer, writer);
}

static int device_side(struct client *client, void *arg)
{
	volatile uint64_t *p;

	(void)client;
	(void)arg;
	wait_step(1);
	p = (volatile uint64_t *)shared->va;
	CHECK_EQ(p[0], 11); /* read: duplicates */
	shared->step = 2;
	wait_step(3);
	p[1] = 22; /* write: the host's copy goes */
	shared->step = 4;
	wait_step(5);
	CHECK_EQ(p[2], 33);
	CHECK_EQ(p[shared->page_bytes / 8], 0); /* first touch by the device reads zero */
	p[shared->page_bytes / 8] = 44;
	shared->step = 6;
	wait_step(7);
	return 0;
}

static bool is_mapped(const void *at)
{
	int fd = open("/proc/self/pagemap", O_RDONLY);
	uint64_t word;

	CHECK_EQ(pread(fd, &word, 8, (off_t)((uintptr_t)at / 4096 * 8)), 8);
	close(fd);
	return word >> 63;
}

/* A page that nobody has touched gets another's content in one step, and is mapped; what reads as zero is not copied. */
static void copy_into_fresh(struct client *client, const char *from, char *to, uint64_t page)
{
	CHECK_EQ(client_discard(client, to, 2 * page), 0); /* it may have been fetched ahead */
	expect(client, to, GMEM_NOMAP, 0, -1);
	CHECK_EQ(client_hmemcpy(client, 0, to, from, page), 0);
	CHECK(is_mapped(to) && is_mapped(to + page - 1));
	expect(client, to, GMEM_RESIDENT, 1, 0);
	CHECK(!memcmp(from, to, page));
	to[5] ^= 1;
	CHECK(from[5] != to[5]);
	CHECK_EQ(client_discard(client, to, 2 * page), 0);
	CHECK_EQ(client_hmemcpy(client, 0, to, to + page, page), 0); /* neither has been touched */
	expect(client, to, GMEM_NOMAP, 0, -1);
}

/* Every byte of a range, wherever it begins and ends and its pages are. */
static void zero(struct client *client, char *at, uint64_t page, int gpu)
{
	const uint64_t ranges[][2] = { { 1, 2 }, { 0, page }, { 7, page }, { page - 3, page + 5 }, { 100, 2 * page + 100 },
				       { page, 3 * page }, { page / 2, 3 * page - 1 } };

	for (size_t i = 0; i < sizeof(ranges) / sizeof(ranges[0]); i++) {
		uint64_t from = ranges[i][0], to = ranges[i][1];

		memset(at, 0x55, 3 * page);
		CHECK_EQ(client_prefetch(client, i % 2 ? gpu : 0, at, 2 * page), 0);
		CHECK_EQ(client_advise(client, -1, at + from, to - from, GMEM_ADVISE_ZERO), 0);
		for (uint64_t k = 0; k < 3 * page; k++)
			CHECK_EQ(at[k], k >= from && k < to ? 0 : 0x55);
	}
	CHECK_EQ(client_discard(client, at, 3 * page), 0);
	CHECK_EQ(client_advise(client, -1, at + 5, 3 * page - 9, GMEM_ADVISE_ZERO), 0);
	expect(client, at, GMEM_NOMAP, 0, -1); /* it read zero before */
}

static int host_side(struct client *client, void *arg)
{
	uint64_t page = shared->page_bytes, bytes = 8 * page;
	volatile uint64_t *p = client_mmap(client, bytes, page, GMEM_FORK_SHARE);
	int gpu = shared->gpu, dev = 1 << gpu;
	char buffer[4096];
	ssize_t got;
	int fd;

	(void)arg;
	expect(client, (void *)p, GMEM_NOMAP, 0, -1);
	p[0] = 11;
	expect(client, (void *)p, GMEM_RESIDENT, 1, 0);
	shared->va = (uint64_t)p;
	shared->step = 1;
	wait_step(2);
	expect(client, (void *)p, GMEM_RESIDENT, 1 | dev, -1);
	CHECK_EQ(p[0], 11);
	shared->step = 3;
	wait_step(4);
	expect(client, (void *)p, GMEM_RESIDENT, dev, gpu);
	CHECK_EQ(p[1], 22); /* host read: duplicates again, and the device may not write any more */
	expect(client, (void *)p, GMEM_RESIDENT, 1 | dev, -1);
	p[2] = 33;
	expect(client, (void *)p, GMEM_RESIDENT, 1, 0);
	shared->step = 5;
	wait_step(6);
	CHECK_EQ(p[page / 8], 44);
	CHECK_EQ(client_prefetch(client, gpu, (void *)p, 4 * page), 0);
	expect(client, (char *)p + page, GMEM_RESIDENT, dev, gpu);
	expect(client, (char *)p + 3 * page, GMEM_RESIDENT, dev, gpu);
	CHECK_EQ(client_prefetch(client, 0, (void *)p, 4 * page), 0);
	expect(client, (char *)p + page, GMEM_RESIDENT, 1, 0);
	CHECK_EQ(p[page / 8], 44);
	/* system calls fault too, if the process may have such an uffd */
	fd = open("/dev/zero", O_RDONLY);
	got = read(fd, (char *)p + 5 * page, 4096);
	CHECK(got == 4096 || (client->user_mode_only && got < 0 && errno == EFAULT));
	p[5 * page / 8] = 7;
	CHECK_EQ(client_prefetch(client, gpu, (char *)p + 5 * page, page), 0);
	close(fd);
	fd = memfd_create("t", 0);
	if (client->user_mode_only)
		CHECK_EQ(p[5 * page / 8], 7);
	CHECK_EQ(write(fd, (char *)p + 5 * page, 4096), 4096);
	CHECK_EQ(pread(fd, buffer, 4096, 0), 4096);
	CHECK_EQ(*(uint64_t *)buffer, 7);
	/* discard reads zero */
	CHECK_EQ(client_discard(client, (void *)p, page), 0);
	expect(client, (void *)p, GMEM_NOMAP, 0, -1);
	CHECK_EQ(p[0], 0);
	/* DONTNEED keeps the content, a punch of its own reads zero */
	p[0] = 5;
	CHECK(!madvise((void *)p, page, MADV_DONTNEED));
	CHECK_EQ(p[0], 5);
	CHECK(!madvise((void *)p, page, MADV_REMOVE));
	CHECK_EQ(p[0], 0);
	/* copies, unaligned, over page borders, on either side */
	for (int i = 0; i < 64; i++)
		p[i] = 1000 + i;
	CHECK_EQ(client_hmemcpy(client, gpu, (char *)p + 3 * page - 40, (char *)p + 8, 400), 0);
	expect(client, (char *)p + 3 * page - 40, GMEM_RESIDENT, dev, gpu);
	for (int i = 0; i < 50; i++)
		CHECK_EQ(*(uint64_t *)((char *)p + 3 * page - 40 + 8 * i), 1001 + i);
	CHECK_EQ(client_hmemcpy(client, 9, (void *)p, (char *)p + page, 8), -19);
	CHECK_EQ(client_hmemcpy(client, 0, (void *)p, (char *)p + 4, 8), -22);
	copy_into_fresh(client, (char *)p, (char *)p + 6 * page, page);
	copy_into_fresh(client, (char *)p + 5 * page, (char *)p + 6 * page, page);
	zero(client, (char *)p + 2 * page, page, gpu);
	/* advice */
	CHECK_EQ(client_advise(client, gpu, (char *)p + page, page, GMEM_ADVISE_PINNED), 0);
	CHECK(client_query(client, (char *)p + page).flags & GMEM_PAGE_PINNED);
	CHECK_EQ(client_advise(client, gpu, (char *)p + page, page, GMEM_ADVISE_UNPINNED), 0);
	CHECK(!(client_query(client, (char *)p + page).flags & GMEM_PAGE_PINNED));
	CHECK_EQ(client_advise(client, 0, (char *)p + bytes, page, GMEM_ADVISE_COLD), -22);
	CHECK_EQ(client_prefetch(client, 14, (void *)p, page), -19);
	/* half of it unmapped by a plain munmap, honoured by event */
	CHECK(!munmap((char *)p + 6 * page, 2 * page));
	CHECK_EQ(p[5 * page / 8], 7);
	CHECK_EQ(client_munmap(client, (void *)p, 6 * page), 0);
	shared->step = 7;
	return 0;
}

static void run(uint64_t page_bytes, bool hugepages)
{
	struct gmem_core *core = core_start((struct gmem_core_config){ .hugepages = hugepages, .event_fork = true });
	struct client *client, *context;
	struct gmem_hnode_stats hnodes[GMEM_HNODE_MAX];
	struct gmem_core_stats stats;
	size_t count;

	shared->step = 0;
	shared->page_bytes = page_bytes;
	shared->gpu = attach_simgpu(core, "simgpu0", "capacity=32M");
	CHECK_EQ(shared->gpu, 1);
	CHECK_EQ(attach_simgpu(core, "simgpu0", "capacity=32M"), -17);
	client = client_start(core, host_side, NULL);
	context = context_start(client, shared->gpu, device_side, NULL);
	CHECK_EQ(client_wait(context), 0);
	CHECK_EQ(client_wait(client), 0);
	core_settle(core);
	gmem_core_stats(core, &stats);
	CHECK_EQ(stats.sessions, 0);
	CHECK_EQ(stats.contexts, 0);
	CHECK_EQ(stats.regions, 0);
	CHECK_EQ(stats.objects, 0);
	CHECK_EQ(stats.poisoned_pages, 0);
	gmem_hnodes(core, hnodes, &count);
	CHECK_EQ(count, 2);
	for (size_t i = 0; i < count; i++) {
		CHECK_EQ(hnodes[i].used_bytes, 0);
		CHECK_EQ(hnodes[i].pinned_bytes, 0);
	}
	CHECK_EQ(gmem_device_detach(core, shared->gpu, false), 0);
	gmem_core_destroy(core);
	printf("%lu KiB pages, %s: ok\n", page_bytes >> 10, hugepages ? "hugetlb" : "shmem");
}

int main(void)
{
	shared = shared_bytes(sizeof(*shared));
	run(4096, false);
	run(65536, false);
	run(2 << 20, false);
	if (hugepages_reserve(96))
		run(2 << 20, true);
	else
		printf("hugetlb: not run, no permission\n");
	return 0;
}
