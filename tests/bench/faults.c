/* SPDX-License-Identifier: Apache-2.0
 *
 * Faults on pages that are present: the cost of being told, of deciding, of one CONTINUE and of the wake-up. The
 * client drops its translations (MADV_DONTNEED of a shared mapping keeps the pages) and touches again.
 */
#define _GNU_SOURCE
#include "bench.h"

#include <sys/mman.h>

#define REPETITIONS 7
#define ISOLATED 300   /* samples in a repetition: enough for a p99 */
#define STREAM 512
#define PAUSE_US 100   /* longer than a handler needs to fall asleep */

struct job {
	struct size size;
	struct floor *floor;
	const char *prefix;
	uint64_t *va; /* shared: where the client's region is, for the context */
	atomic_int *step;
};

static uint64_t pages_of(uint64_t page_bytes)
{
	return page_bytes == HUGE_BYTES ? 32 : 256;
}

static uint64_t touch(volatile uint8_t *at)
{
	uint64_t start = now_ns();

	*at = 1;
	return now_ns() - start;
}

static void drop(uint8_t *at, uint64_t bytes)
{
	CHECK(!madvise(at, bytes, MADV_DONTNEED));
}

/* Both in turn, page by page, in an order that no stream detector follows. */
static void isolated(uint8_t *at, struct floor_range *floor, struct times *ours, struct times *bare)
{
	uint32_t pages = (uint32_t)(floor->bytes / floor->page_bytes), *order = random_order(pages);

	for (unsigned i = 0; i < ISOLATED; i++) {
		uint64_t page = order[i % pages];

		if (i % pages == 0) {
			drop(at, floor->bytes);
			drop(floor->at, floor->bytes);
		}
		for (int turn = 0; turn < 2; turn++) {
			bool mine = turn == (int)(i & 1);

			nap_us(PAUSE_US);
			times_add(mine ? ours : bare, touch((mine ? at : floor->at) + page * floor->page_bytes));
		}
	}
	free(order);
}

/* All pages back to back. One behind the other (order NULL) it is a stream, whose pages may come several at once, so that
 * only the mean says what one costs; in an order that nobody can guess it is a storm. */
static void burst(uint8_t *at, struct floor_range *shape, const uint32_t *order, struct times *times)
{
	uint64_t pages = shape->bytes / shape->page_bytes, start = now_ns();

	drop(at, shape->bytes);
	for (uint64_t i = 0; order && i < pages; i++)
		times_add(times, touch(at + order[i] * shape->page_bytes));
	for (uint64_t i = 0; !order && i < pages; i++)
		touch(at + i * shape->page_bytes);
	for (uint64_t i = 0, mean = (now_ns() - start) / pages; !order && i < pages; i++)
		times_add(times, mean);
}

enum stream { OURS, SPINNING, SLEEPING, STREAMS };

static void stream(uint8_t *at, struct floor_range *range, struct floor *floor, const uint32_t *order,
		   struct times times[STREAMS])
{
	while (times[OURS].count < STREAM) {
		atomic_store(floor->spin, true);
		drop(range->at, range->page_bytes);
		touch(range->at); /* from here on the bare handler spins */
		burst(range->at, range, order, &times[SPINNING]);
		atomic_store(floor->spin, false);
		drop(range->at, range->page_bytes);
		touch(range->at); /* and now it sleeps again */
		burst(range->at, range, order, &times[SLEEPING]);
		burst(at, range, order, &times[OURS]);
	}
}

/* Beside the better of the two bare handlers. */
static void stream_pair(uint8_t *at, struct floor_range *range, struct floor *floor, const uint32_t *order,
			struct pairs *pairs)
{
	struct times times[STREAMS] = { 0 };
	double us[STREAMS];

	stream(at, range, floor, order, times);
	for (int s = 0; s < STREAMS; s++) {
		us[s] = times_percentile(&times[s], 50) / 1e3;
		times_free(&times[s]);
	}
	pairs_add(pairs, us[OURS], us[SPINNING] < us[SLEEPING] ? us[SPINNING] : us[SLEEPING]);
}

static void print(const struct job *job, const char *kind, const char *target, const struct pairs *pairs)
{
	char id[64];
	bool isolated = *kind == 'p';
	struct row row = { id, "us", target, isolated ? "bare handler, blocking, on the faulting CPU" :
							"bare handler, spinning or on the faulting CPU" };

	if (isolated)
		snprintf(id, sizeof(id), "%s_isolated_%s_%s", job->prefix, job->size.name, kind);
	else
		snprintf(id, sizeof(id), "%s_%s_%s", job->prefix, kind, job->size.name);
	row_print(&row, pairs, pairs ? NULL : "no huge pages");
}

static void measure(const struct job *job, uint8_t *at, struct floor_range *range)
{
	struct pairs p50 = { 0 }, p99 = { 0 }, streamed = { 0 }, stormed = { 0 };
	uint32_t *order = random_order((uint32_t)(range->bytes / range->page_bytes));
	struct times ours = { 0 }, bare = { 0 };

	floor_cpu_enter();
	for (int r = 0; r < REPETITIONS; r++) {
		times_clear(&ours);
		times_clear(&bare);
		isolated(at, range, &ours, &bare);
		pairs_add(&p50, times_percentile(&ours, 50) / 1e3, times_percentile(&bare, 50) / 1e3);
		pairs_add(&p99, times_percentile(&ours, 99) / 1e3, times_percentile(&bare, 99) / 1e3);
		stream_pair(at, range, job->floor, NULL, &streamed);
		stream_pair(at, range, job->floor, order, &stormed);
	}
	print(job, "p50", "ratio <= 1.15", &p50);
	print(job, "p99", "ratio <= 1.5", &p99);
	print(job, "stream", "ratio <= 1.2", &streamed);
	print(job, "storm", "ratio <= 1.2", &stormed);
	free(order);
	times_free(&ours);
	times_free(&bare);
}

/* The client's region, written once. */
static uint8_t *region(struct client *client, const struct job *job, uint64_t bytes)
{
	uint8_t *at = client_mmap(client, bytes, job->size.page_bytes, GMEM_FORK_NONE);

	for (uint64_t i = 0; i < bytes; i += 4096)
		at[i] = 1;
	return at;
}

static int host_client(struct client *client, void *arg)
{
	struct job *job = arg;
	uint64_t bytes = pages_of(job->size.page_bytes) * job->size.page_bytes;
	struct floor_range range;

	CHECK(floor_attach(job->floor, bytes, job->size.page_bytes, &range));
	measure(job, region(client, job, bytes), &range);
	return 0;
}

static bool unmeasurable(const struct job *job)
{
	if (job->size.page_bytes != HUGE_BYTES || huge_pages)
		return false;
	print(job, "p50", "ratio <= 1.15", NULL);
	print(job, "p99", "ratio <= 1.5", NULL);
	print(job, "stream", "ratio <= 1.2", NULL);
	print(job, "storm", "ratio <= 1.2", NULL);
	return true;
}

void faults_host(void)
{
	const struct size sizes[] = SIZES;
	struct gmem_core *core = core_start((struct gmem_core_config){ .hugepages = true });

	for (int s = 0; s < 3; s++) {
		const char *const stems[] = { "fault_isolated", "fault_stream", "fault_storm", NULL };
		struct job job = { sizes[s], NULL, "fault", NULL, NULL };

		if (!rows_wanted(stems, sizes[s].name) || unmeasurable(&job))
			continue;
		job.floor = floor_create(true);
		CHECK_EQ(client_wait(client_start(core, host_client, &job)), 0);
	}
	gmem_core_destroy(core);
}

/* ---- the same in a device context ---- */

static int owning_client(struct client *client, void *arg)
{
	struct job *job = arg;
	uint64_t bytes = pages_of(job->size.page_bytes) * job->size.page_bytes;
	uint8_t *at = region(client, job, bytes);

	*job->va = (uint64_t)at;
	atomic_store(job->step, 1);
	while (atomic_load(job->step) != 2)
		sleep_ms(1);
	return 0;
}

static int device_context(struct client *context, void *arg)
{
	struct job *job = arg;
	uint64_t bytes = pages_of(job->size.page_bytes) * job->size.page_bytes;
	struct floor_range range;

	(void)context;
	CHECK(floor_attach(job->floor, bytes, job->size.page_bytes, &range));
	for (uint64_t i = 0; i < bytes; i += 4096)
		((volatile uint8_t *)*job->va)[i]++; /* brings the pages here */
	measure(job, (uint8_t *)*job->va, &range);
	return 0;
}

void faults_device(void)
{
	const struct size sizes[] = SIZES;
	struct gmem_core *core = core_start((struct gmem_core_config){ .hugepages = true });
	int hnid = attach_simgpu(core, "simgpu0", "capacity=128M");

	CHECK(hnid > 0);
	for (int s = 0; s < 3; s++) {
		const char *const stems[] = { "device_fault_isolated", "device_fault_stream", "device_fault_storm", NULL };
		struct job job = { sizes[s], NULL, "device_fault", shared_bytes(8), shared_bytes(4) };
		struct client *client, *context;

		if (!rows_wanted(stems, sizes[s].name) || unmeasurable(&job))
			continue;
		job.floor = floor_create(true);
		client = client_start(core, owning_client, &job);
		while (!atomic_load(job.step))
			sleep_ms(1);
		context = context_start(client, hnid, device_context, &job);
		CHECK_EQ(client_wait(context), 0);
		atomic_store(job.step, 2);
		CHECK_EQ(client_wait(client), 0);
	}
	gmem_core_destroy(core);
}
