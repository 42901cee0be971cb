/* SPDX-License-Identifier: Apache-2.0
 *
 * Bare primitives that gmem is built of, for rows that have nothing of gmem beside them yet: the memory bus with one and
 * two threads, each system call of a fault and a migration, and a word passed to and fro between two processes.
 */
#define _GNU_SOURCE
#include "bench.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <gmem/memfd.h>
#include <gmem/uffd.h>

#define REPETITIONS 7
#define COPY_BYTES (64 * MIB)
#define NO_HUGE "no huge pages"

/* ---- memcpy of 2 MiB pages ---- */

struct half {
	uint8_t *dst, *src;
	uint64_t bytes;
};

static void *copy_half(void *arg)
{
	struct half *half = arg;

	for (uint64_t at = 0; at < half->bytes; at += HUGE_BYTES)
		memcpy(half->dst + at, half->src + at, HUGE_BYTES);
	return NULL;
}

static double copy_gb_per_s(uint8_t *dst, uint8_t *src, unsigned threads)
{
	struct half first = { dst, src, COPY_BYTES / threads };
	struct half second = { dst + first.bytes, src + first.bytes, COPY_BYTES - first.bytes };
	uint64_t start = now_ns();
	pthread_t thread;

	if (threads > 1)
		CHECK(!pthread_create(&thread, NULL, copy_half, &second));
	copy_half(&first);
	if (threads > 1)
		CHECK(!pthread_join(thread, NULL));
	return (double)COPY_BYTES / (double)(now_ns() - start);
}

static void memcpy_rows(void)
{
	static const struct row rows[] = {
		{ "bare_memcpy_2m_1_thread", "GB/s", NULL, NULL }, { "bare_memcpy_2m_2_threads", "GB/s", NULL, NULL },
	};
	struct pairs pairs[2] = { 0 };
	int fds[2];
	uint8_t *src = huge_pages ? warm_map(COPY_BYTES, true, &fds[0]) : NULL;
	uint8_t *dst = src ? warm_map(COPY_BYTES, true, &fds[1]) : NULL;

	for (int r = 0; dst && r < REPETITIONS; r++)
		for (unsigned threads = 1; threads <= 2; threads++)
			pairs_add(&pairs[threads - 1], copy_gb_per_s(dst, src, threads), 0);
	for (int i = 0; i < 2; i++)
		row_print(&rows[i], dst ? &pairs[i] : NULL, dst ? NULL : NO_HUGE);
	if (dst)
		warm_unmap(dst, COPY_BYTES, fds[1]);
	if (src)
		warm_unmap(src, COPY_BYTES, fds[0]);
}

/* ---- the steps of a fault and of a migration, each alone, with nobody waiting ---- */

enum step { RUN, COPY, UNPROTECT, PROTECT, CONTINUE, PUNCH, FILL, STEPS };

struct stage {
	int uffd, fd;
	uint8_t *dst; /* watched; a mapping of fd from its start */
	uint8_t *alias, *src;
	uint64_t page_bytes;
	struct gmem_file file;
};

static void step_once(struct stage *stage, enum step step, uint64_t at)
{
	uint64_t va = (uint64_t)stage->dst + at, bytes = stage->page_bytes, done;

	switch (step) {
	case COPY:
		CHECK_EQ(gmem_uffd_copy_wp(stage->uffd, va, stage->src + at, bytes, true, &done), 0);
		return;
	case UNPROTECT:
		CHECK_EQ(gmem_uffd_protect(stage->uffd, va, bytes, false, true), 0);
		return;
	case PROTECT:
		CHECK_EQ(gmem_uffd_protect(stage->uffd, va, bytes, true, true), 0);
		return;
	case CONTINUE:
		CHECK_EQ(gmem_uffd_continue(stage->uffd, va, bytes, false, true), 0);
		return;
	case PUNCH:
		CHECK_EQ(gmem_file_punch(&stage->file, at, bytes), 0);
		return;
	default:
		CHECK_EQ(gmem_file_fill(&stage->file, at, stage->alias + at, stage->src + at, bytes), 0);
	}
}

/* Of a page, where one system call copies them all: what a stream can't be quicker than. */
static double run_us(struct stage *stage, uint64_t pages)
{
	uint64_t bytes = pages * stage->page_bytes, start = now_ns(), done, took;

	CHECK_EQ(gmem_uffd_copy_wp(stage->uffd, (uint64_t)stage->dst, stage->src, bytes, true, &done), 0);
	took = now_ns() - start;
	CHECK(!madvise(stage->dst, bytes, MADV_REMOVE));
	return (double)took / 1e3 / (double)pages;
}

static double step_us(struct stage *stage, enum step step, uint64_t pages)
{
	struct times times = { 0 };
	double median;

	if (step == RUN)
		return run_us(stage, pages);
	if (step == CONTINUE) /* the page stays, the translation goes */
		CHECK(!madvise(stage->dst, pages * stage->page_bytes, MADV_DONTNEED));
	for (uint64_t i = 0; i < pages; i++) {
		uint64_t start = now_ns();

		step_once(stage, step, i * stage->page_bytes);
		times_add(&times, now_ns() - start);
	}
	median = times_percentile(&times, 50) / 1e3;
	times_free(&times);
	return median;
}

static void stage_open(struct stage *stage, struct size size, uint64_t bytes)
{
	bool huge = size.page_bytes == HUGE_BYTES;

	stage->page_bytes = size.page_bytes;
	stage->uffd = gmem_uffd_new(gmem_uffd_open_device());
	CHECK(stage->uffd >= 0);
	CHECK_EQ(gmem_uffd_api(stage->uffd, GMEM_UFFD_FEAT_MISSING_SHMEM | GMEM_UFFD_FEAT_MINOR_SHMEM |
						    GMEM_UFFD_FEAT_WP_HUGETLBFS_SHMEM | GMEM_UFFD_FEAT_MISSING_HUGETLBFS |
						    GMEM_UFFD_FEAT_MINOR_HUGETLBFS), 0);
	stage->dst = warm_map(bytes, huge, &stage->fd);
	CHECK(stage->dst);
	stage->alias = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, stage->fd, 0);
	CHECK(stage->alias != MAP_FAILED);
	stage->file = (struct gmem_file){ .refs = 1, .fd = stage->fd, .bytes = bytes,
					  .class_ = huge ? GMEM_CLASS_HUGE : GMEM_CLASS_SMALL };
	CHECK_EQ(gmem_uffd_register(stage->uffd, (uint64_t)stage->dst, bytes), 0);
}

static void step_rows(struct size size)
{
	static const char *const names[STEPS] = { "copy_run", "copy", "unprotect", "protect", "continue", "punch", "fill" };
	bool huge = size.page_bytes == HUGE_BYTES;
	uint64_t pages = huge ? 16 : 128, bytes = pages * size.page_bytes;
	struct pairs pairs[STEPS] = { 0 };
	struct stage stage = { 0 };
	int src_fd;

	stage.src = huge && !huge_pages ? NULL : warm_map(bytes, huge, &src_fd);
	if (stage.src)
		stage_open(&stage, size, bytes);
	for (int r = -1; stage.src && r < REPETITIONS; r++) {
		CHECK(!madvise(stage.dst, bytes, MADV_REMOVE)); /* a hole again; what was freed is what is taken next */
		for (int s = 0; s < STEPS; s++) {
			double us = step_us(&stage, (enum step)s, pages);

			if (r >= 0)
				pairs_add(&pairs[s], us, 0);
		}
	}
	for (int s = 0; s < STEPS; s++) {
		char id[64];

		snprintf(id, sizeof(id), "bare_%s_%s", names[s], size.name);
		row_print(&(struct row){ id, "us", NULL, NULL }, stage.src ? &pairs[s] : NULL, stage.src ? NULL : NO_HUGE);
	}
	if (!stage.src)
		return;
	close(stage.uffd);
	munmap(stage.alias, bytes);
	warm_unmap(stage.dst, bytes, stage.fd);
	warm_unmap(stage.src, bytes, src_fd);
}

/* ---- a word to and fro ---- */

#define TURNS 4000u

/* Turns count up; even ones are the parent's, odd ones the child's. */
static void pass(atomic_uint *turn, unsigned mine, bool sleeps)
{
	unsigned now;

	while ((now = atomic_load_explicit(turn, memory_order_acquire)) != mine)
		if (sleeps)
			syscall(SYS_futex, turn, FUTEX_WAIT, now, NULL, NULL, 0);
	atomic_store_explicit(turn, mine + 1, memory_order_release);
	if (sleeps)
		syscall(SYS_futex, turn, FUTEX_WAKE, 1, NULL, NULL, 0);
}

static double round_trip_us(bool sleeps)
{
	atomic_uint *turn = shared_bytes(4096);
	uint64_t start;
	pid_t pid = fork();

	CHECK(pid >= 0);
	if (!pid) {
		for (unsigned i = 1; i < 2 * TURNS; i += 2)
			pass(turn, i, sleeps);
		_exit(0);
	}
	start = now_ns();
	for (unsigned i = 0; i < 2 * TURNS; i += 2)
		pass(turn, i, sleeps);
	CHECK(waitpid(pid, NULL, 0) == pid);
	start = now_ns() - start;
	munmap(turn, 4096);
	return (double)start / TURNS / 1e3;
}

static void ping_pong_row(const char *id, bool sleeps)
{
	struct row row = { id, "us", NULL, NULL };
	struct pairs pairs = { 0 };
	cpu_set_t allowed;

	CHECK(!sched_getaffinity(0, sizeof(allowed), &allowed));
	if (!row_wanted(id))
		return;
	if (!sleeps && CPU_COUNT(&allowed) < 2) {
		row_print(&row, NULL, "spinning needs two CPUs");
		return;
	}
	for (int r = 0; r < REPETITIONS; r++)
		pairs_add(&pairs, round_trip_us(sleeps), 0);
	row_print(&row, &pairs, NULL);
}

void primitives(void)
{
	const struct size sizes[] = SIZES;

	if (row_wanted("bare_memcpy_2m"))
		memcpy_rows();
	for (int s = 0; s < 3; s++) {
		const char *const stems[] = { "bare_uffd_copy", NULL };

		if (rows_wanted(stems, sizes[s].name))
			step_rows(sizes[s]);
	}
	ping_pong_row("bare_ping_pong_spinning", false);
	ping_pong_row("bare_ping_pong_futex", true);
}
