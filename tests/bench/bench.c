/* SPDX-License-Identifier: Apache-2.0
 *
 * gmem's core beside its floors, in one run. usage: bench [ID-PREFIX]...
 * One JSON line for each row on stdout. Exit status 1 if a group of rows failed.
 */
#define _GNU_SOURCE
#include "bench.h"

#include <errno.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define HUGE_PAGES 640
#define WARM_BYTES (768 * MIB)

bool huge_pages;

static const struct {
	const char *prefixes[3];
	void (*run)(void);
	bool any_memory; /* it does not matter to these whether memory is warm */
} groups[] = {
	{ { "fault_isolated", "fault_stream", "fault_storm" }, faults_host, false },
	{ { "device_fault" }, faults_device, false },
	{ { "concurrent" }, faults_concurrent, false },
	{ { "thrash" }, thrash, true },
	{ { "density" }, density, false },
	{ { "first_touch" }, first_touch, false },
	{ { "d2h", "h2d", "elsewhere" }, migrations, false },
	{ { "prefetch" }, prefetches, false },
	{ { "evict_clean" }, evictions, false },
	{ { "mmap" }, mappings, true },
	{ { "lpt" }, page_table, true },
	{ { "ring" }, ring_requests, true },
	{ { "file" }, file_tier, true },
	{ { "zstd", "lz4" }, compressed_tier, true },
	{ { "remote" }, remote_tier, true },
	{ { "trace" }, trace_rows, true },
	{ { "bare" }, primitives, false },
};

void nap_us(unsigned us)
{
	struct timespec pause = { 0, us * 1000l };

	nanosleep(&pause, NULL);
}

static void on_signal(int sig)
{
	(void)sig;
	exit(130); /* runs what restores the machine's settings */
}

/* The first touch of memory in a virtual machine is slow for reasons outside it. */
static void warm_memory(void)
{
	static bool warm;

	if (warm)
		return;
	warm = true;
	for (int huge = 0; huge <= huge_pages; huge++) {
		int fd = -1;
		uint8_t *at = warm_map(WARM_BYTES, huge, &fd);

		if (at)
			warm_unmap(at, WARM_BYTES, fd);
	}
}

/* In a process of its own: what one group leaves behind is nothing to the next. */
static int run_group(void (*run)(void))
{
	pid_t pid;
	int status;

	fflush(NULL);
	pid = fork();
	CHECK(pid >= 0);
	if (!pid) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		signal(SIGTERM, SIG_DFL);
		signal(SIGINT, SIG_DFL);
		run();
		fflush(NULL);
		_exit(0);
	}
	while (waitpid(pid, &status, 0) < 0)
		CHECK(errno == EINTR);
	if (status)
		fprintf(stderr, "bench: a group ended with status %#x\n", (unsigned)status);
	return status;
}

int main(int argc, char **argv)
{
	int failed = 0;

	signal(SIGTERM, on_signal);
	signal(SIGINT, on_signal);
	signal(SIGPIPE, on_signal);
	row_select(argv + 1, argc - 1);
	huge_pages = hugepages_reserve(HUGE_PAGES);
	prctl(PR_SET_TIMERSLACK, 1000); /* naps as short as asked for */
	for (size_t g = 0; g < sizeof(groups) / sizeof(groups[0]); g++) {
		bool wanted = false;

		for (int p = 0; p < 3 && groups[g].prefixes[p]; p++)
			wanted = wanted || row_wanted(groups[g].prefixes[p]);
		if (!wanted)
			continue;
		if (!groups[g].any_memory)
			warm_memory();
		failed |= run_group(groups[g].run);
	}
	return failed ? 1 : 0;
}
