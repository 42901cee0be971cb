/* SPDX-License-Identifier: Apache-2.0
 *
 * Pages that move: by a touch on either side, by request, and by eviction, each beside a plain copy of pages of the
 * same kind between two mappings of the same process, or beside a bare punch.
 */
#define _GNU_SOURCE
#include "bench.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include <gmem/internal.h>
#include <gmem/evict.h>

#define REPETITIONS 5 /* of each mode */
#define PAUSE_US 100
#define NOTE_NO_HUGE "no huge pages"

/* A store moves a page in one fault; an increment is a load and a store, and so a copy and then an upgrade. */
enum step { CONTEXT_MOVES, CLIENT_READS, CONTEXT_OWNS, CLIENT_MOVES, CONTEXT_MOVES_BACK, CLIENT_INCREMENTS, STEPS };
enum access { LOAD, STORE, INCREMENT };
enum mode { ISOLATED, STREAM, MODES };
static const char *const mode_names[MODES] = { "isolated", "stream" };

struct moves {
	struct size size;
	uint64_t pages;
	struct shared {
		atomic_int turn; /* counts steps: even ones are the context's, odd ones the client's */
		uint64_t va;
	} *shared;
	uint8_t *src, *dst; /* of the plain copy */
	uint64_t sink;
};

static uint64_t page_count(uint64_t page_bytes)
{
	return page_bytes == HUGE_BYTES ? 24 : 256;
}

static uint64_t plain_copy(struct moves *moves, uint64_t page)
{
	uint64_t start = now_ns(), at = page * moves->size.page_bytes;

	memcpy(moves->dst + at, moves->src + at, moves->size.page_bytes);
	return now_ns() - start;
}

static enum access access_of(enum step step)
{
	return step == CLIENT_READS ? LOAD : step == CLIENT_INCREMENTS ? INCREMENT : STORE;
}

static uint64_t touch_page(struct moves *moves, uint64_t page, enum access access)
{
	volatile uint8_t *at = (volatile uint8_t *)moves->shared->va + page * moves->size.page_bytes;
	uint64_t start = now_ns();

	if (access != STORE)
		moves->sink += *at;
	if (access != LOAD)
		*at = (uint8_t)moves->sink;
	return now_ns() - start;
}

static void isolated_step(struct moves *moves, enum access access, struct times *ours, struct times *bare)
{
	uint32_t *order = random_order((uint32_t)moves->pages);

	for (uint64_t i = 0; i < moves->pages; i++) {
		uint64_t page = order[i];

		nap_us(PAUSE_US);
		times_add(ours, touch_page(moves, page, access));
		nap_us(PAUSE_US);
		times_add(bare, plain_copy(moves, page));
	}
	free(order);
}

static void stream_step(struct moves *moves, enum access access, struct times *ours, struct times *bare)
{
	uint64_t start = now_ns(), middle;

	for (uint64_t i = 0; i < moves->pages; i++)
		touch_page(moves, i, access);
	middle = now_ns();
	for (uint64_t i = 0; i < moves->pages; i++)
		plain_copy(moves, i);
	times_add(ours, (middle - start) / moves->pages);
	times_add(bare, (now_ns() - middle) / moves->pages);
}

struct result {
	struct pairs bandwidth[MODES]; /* GB/s */
	struct pairs latency;          /* us, isolated */
};

static void run_step(struct moves *moves, enum mode mode, enum access access, struct result *result)
{
	struct times ours = { 0 }, bare = { 0 };
	double bytes = (double)moves->size.page_bytes, value, floor;

	(mode == ISOLATED ? isolated_step : stream_step)(moves, access, &ours, &bare);
	value = times_percentile(&ours, 50);
	floor = times_percentile(&bare, 50);
	pairs_add(&result->bandwidth[mode], bytes / value, bytes / floor);
	if (mode == ISOLATED)
		pairs_add(&result->latency, value / 1e3, 0);
	times_free(&ours);
	times_free(&bare);
}

static void wait_turn(struct moves *moves, int turn)
{
	while (atomic_load(&moves->shared->turn) < turn)
		nap_us(200);
}

static void map_copies(struct moves *moves)
{
	uint64_t bytes = moves->pages * moves->size.page_bytes;
	bool huge = moves->size.page_bytes == HUGE_BYTES;
	int fd;

	moves->src = warm_map(bytes, huge, &fd);
	moves->dst = warm_map(bytes, huge, &fd);
	CHECK(moves->src && moves->dst);
}

/* Runs this side's steps of all cycles; results by step. */
static void run_side(struct moves *moves, int parity, struct result results[STEPS])
{
	for (int turn = parity; turn < STEPS * MODES * (REPETITIONS + 1); turn += 2) {
		enum step step = (enum step)(turn % STEPS);
		enum mode mode = (enum mode)(turn / STEPS % MODES);
		struct result warm_up = { 0 };
		bool cold = turn < STEPS * MODES;

		wait_turn(moves, turn);
		run_step(moves, mode, access_of(step), cold ? &warm_up : &results[step]);
		atomic_store(&moves->shared->turn, turn + 1);
	}
}

static void print_moves(const char *what, struct size size, const char *const targets[MODES],
			const struct result *result)
{
	for (int mode = 0; mode < MODES; mode++) {
		char id[64];
		struct row row = { id, "GB/s", targets[mode], "memcpy" };

		snprintf(id, sizeof(id), "%s_%s_%s", what, mode_names[mode], size.name);
		row_print(&row, result ? &result->bandwidth[mode] : NULL, result ? NULL : NOTE_NO_HUGE);
	}
}

/* Rows that the plan compares with another pager: only gmem's side is measured here. */
static void print_elsewhere(struct size size, const struct result *result)
{
	const char *why = result ? "the pager to compare with is built aside, not here" : NOTE_NO_HUGE;
	const char *faster = size.page_bytes == HUGE_BYTES ? "ratio >= 4" : size.page_bytes == 4 * KIB ? "ratio >= 12" :
												       "ratio >= 3";
	const char *sooner = size.page_bytes == HUGE_BYTES ? "ratio <= 0.2" :
			     size.page_bytes == 4 * KIB	   ? "ratio <= 0.5" :
							     "ratio <= 0.6";
	struct pairs bandwidth = { 0 };
	char id[64];
	struct row sequential = { id, "GB/s", faster, "UMap" }, random = { id, "us", sooner, "UMap" };

	for (size_t i = 0; result && i < result->bandwidth[STREAM].count; i++)
		pairs_add(&bandwidth, result->bandwidth[STREAM].value[i], 0);
	snprintf(id, sizeof(id), "elsewhere_sequential_read_%s", size.name);
	row_print(&sequential, result ? &bandwidth : NULL, why);
	snprintf(id, sizeof(id), "elsewhere_random_touch_%s_p50", size.name);
	row_print(&random, result ? &result->latency : NULL, why);
}

static const char *const none[MODES] = { NULL, NULL };
static const char *const d2h_targets[MODES] = { "ratio >= 0.75", "ratio >= 0.95" };
static const char *const h2d_targets[MODES] = { "ratio >= 0.85", "ratio >= 0.85" };

static const char *const *targets_of(struct size size, const char *const targets[MODES])
{
	return size.page_bytes == HUGE_BYTES ? targets : none;
}

static int moving_client(struct client *client, void *arg)
{
	struct moves *moves = arg;
	uint64_t bytes = moves->pages * moves->size.page_bytes;
	uint8_t *at = client_mmap(client, bytes, moves->size.page_bytes, GMEM_FORK_NONE);
	struct result results[STEPS] = { 0 };

	for (uint64_t i = 0; i < bytes; i += 4096)
		at[i] = 1;
	map_copies(moves);
	moves->shared->va = (uint64_t)at;
	run_side(moves, 1, results);
	print_moves("d2h", moves->size, targets_of(moves->size, d2h_targets), &results[CLIENT_MOVES]);
	print_moves("d2h_duplicate", moves->size, none, &results[CLIENT_READS]);
	print_moves("d2h_increment", moves->size, none, &results[CLIENT_INCREMENTS]);
	print_elsewhere(moves->size, &results[CLIENT_READS]);
	return 0;
}

static int moving_context(struct client *context, void *arg)
{
	struct moves *moves = arg;
	struct result results[STEPS] = { 0 };

	(void)context;
	map_copies(moves);
	run_side(moves, 0, results);
	print_moves("h2d", moves->size, targets_of(moves->size, h2d_targets), &results[CONTEXT_MOVES]);
	return 0;
}

void migrations(void)
{
	static const char *const stems[] = {
		"d2h_isolated", "d2h_stream", "d2h_duplicate_isolated", "d2h_duplicate_stream", "d2h_increment_isolated",
		"d2h_increment_stream", "h2d_isolated", "h2d_stream", "elsewhere_sequential_read", "elsewhere_random_touch", NULL,
	};
	const struct size sizes[] = SIZES;
	struct gmem_core *core = core_start((struct gmem_core_config){ .hugepages = true });
	int hnid = attach_simgpu(core, "simgpu0", "capacity=128M");

	CHECK(hnid > 0);
	for (int s = 0; s < 3; s++) {
		struct moves moves = { .size = sizes[s], .pages = page_count(sizes[s].page_bytes) };
		struct client *client, *context;

		if (!rows_wanted(stems, sizes[s].name))
			continue;
		if (sizes[s].page_bytes == HUGE_BYTES && !huge_pages) {
			print_moves("d2h", sizes[s], d2h_targets, NULL);
			print_moves("d2h_duplicate", sizes[s], none, NULL);
			print_moves("d2h_increment", sizes[s], none, NULL);
			print_moves("h2d", sizes[s], h2d_targets, NULL);
			print_elsewhere(sizes[s], NULL);
			continue;
		}
		moves.shared = shared_bytes(sizeof(*moves.shared));
		client = client_start(core, moving_client, &moves);
		while (!*(volatile uint64_t *)&moves.shared->va)
			sleep_ms(1);
		context = context_start(client, hnid, moving_context, &moves);
		CHECK_EQ(client_wait(context), 0);
		CHECK_EQ(client_wait(client), 0);
	}
	gmem_core_destroy(core);
}

/* ---- one request for many pages ---- */

#define PREFETCH_BYTES (256 * MIB)

static int prefetching_client(struct client *client, void *arg)
{
	struct pairs ways[2] = { 0 };
	uint8_t *at = client_mmap(client, PREFETCH_BYTES, HUGE_BYTES, GMEM_FORK_NONE), *src, *dst;
	int fd;

	(void)arg;
	for (uint64_t i = 0; i < PREFETCH_BYTES; i += 4096)
		at[i] = 1;
	src = warm_map(PREFETCH_BYTES / 4, true, &fd);
	dst = warm_map(PREFETCH_BYTES / 4, true, &fd);
	CHECK(src && dst);
	for (int r = -1; r < REPETITIONS; r++)
		for (int way = 0; way < 2; way++) {
			uint64_t start = now_ns(), middle;

			CHECK_EQ(client_prefetch(client, way ? GMEM_HOST : 1, at, PREFETCH_BYTES), 0);
			middle = now_ns();
			for (int part = 0; part < 4; part++)
				memcpy(dst, src, PREFETCH_BYTES / 4);
			if (r >= 0)
				pairs_add(&ways[way], (double)PREFETCH_BYTES / (double)(middle - start),
					  (double)PREFETCH_BYTES / (double)(now_ns() - middle));
		}
	row_print(&(struct row){ "prefetch_h2d_256m", "GB/s", "ratio >= 0.95", "memcpy, one thread" }, &ways[0], NULL);
	row_print(&(struct row){ "prefetch_d2h_256m", "GB/s", "ratio >= 0.95", "memcpy, one thread" }, &ways[1], NULL);
	return 0;
}

void prefetches(void)
{
	struct gmem_core *core;

	if (!huge_pages) {
		row_print(&(struct row){ "prefetch_h2d_256m", "GB/s", "ratio >= 0.95", "memcpy, one thread" }, NULL,
			  NOTE_NO_HUGE);
		row_print(&(struct row){ "prefetch_d2h_256m", "GB/s", "ratio >= 0.95", "memcpy, one thread" }, NULL,
			  NOTE_NO_HUGE);
		return;
	}
	core = core_start((struct gmem_core_config){ .hugepages = true });
	CHECK_EQ(attach_simgpu(core, "simgpu0", "capacity=256M"), 1);
	CHECK_EQ(client_wait(client_start(core, prefetching_client, NULL)), 0);
	gmem_core_destroy(core);
}

/* ---- eviction of pages that have a valid copy below ---- */

static int duplicating_client(struct client *client, void *arg)
{
	struct moves *moves = arg;
	uint64_t bytes = moves->pages * moves->size.page_bytes;
	uint8_t *at = client_mmap(client, bytes, moves->size.page_bytes, GMEM_FORK_NONE);

	for (uint64_t i = 0; i < bytes; i += 4096)
		at[i] = 1;
	moves->shared->va = (uint64_t)at;
	for (int turn = 0; turn < 2 * (REPETITIONS + 1); turn += 2) {
		CHECK_EQ(client_prefetch(client, 1, at, bytes), 0);
		for (uint64_t page = 0; page < moves->pages; page++)
			touch_page(moves, page, LOAD);
		atomic_store(&moves->shared->turn, turn + 1);
		wait_turn(moves, turn + 2);
	}
	return 0;
}

/* Evicts and punches page by page in turn; the punched file gets its pages back afterwards. */
static void evict_all(struct gmem_core *core, struct client *client, struct moves *moves, int fd, struct pairs *pairs)
{
	struct gmem_session *session = gmem_session_get(core, client->session);
	struct gmem_hnode *device = gmem_core_hnode(core, 1);
	struct times ours = { 0 }, bare = { 0 };
	uint64_t bytes = moves->size.page_bytes;

	CHECK(session && device);
	for (uint64_t page = 0; page < moves->pages; page++) {
		struct gmem_place place;
		uint64_t start, middle;
		int err;

		CHECK_EQ(gmem_as_lookup(&session->as, moves->shared->va + page * bytes, &place), 0);
		do { /* a fault thread may still be on its way out of the page */
			start = now_ns();
			err = gmem_evict_page(device, place.object, place.index, false);
			middle = now_ns();
		} while (err == -EBUSY);
		CHECK_EQ(err, 0);
		CHECK(!fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(page * bytes), (off_t)bytes));
		times_add(&bare, now_ns() - middle);
		times_add(&ours, middle - start);
		gmem_object_unref(place.object);
	}
	gmem_session_unref(session);
	if (pairs)
		pairs_add(pairs, times_percentile(&ours, 50) / 1e3, times_percentile(&bare, 50) / 1e3);
	CHECK(!fallocate(fd, 0, 0, (off_t)(moves->pages * bytes)));
	for (uint64_t i = 0; i < moves->pages * bytes; i += 4096)
		moves->dst[i] = 1;
	times_free(&ours);
	times_free(&bare);
}

void evictions(void)
{
	const struct size sizes[] = SIZES;
	struct gmem_core *core = core_start((struct gmem_core_config){ .hugepages = true });
	struct gmem_core_stats stats;

	CHECK_EQ(attach_simgpu(core, "simgpu0", "capacity=128M"), 1);
	for (int s = 0; s < 3; s++) {
		struct moves moves = { .size = sizes[s], .pages = page_count(sizes[s].page_bytes) };
		struct pairs pairs = { 0 };
		struct client *client;
		char id[64];
		struct row row = { id, "us", "ratio <= 1.5", "punch hole" };
		int fd;

		snprintf(id, sizeof(id), "evict_clean_%s", sizes[s].name);
		if (!row_wanted(id))
			continue;
		if (sizes[s].page_bytes == HUGE_BYTES && !huge_pages) {
			row_print(&row, NULL, NOTE_NO_HUGE);
			continue;
		}
		moves.shared = shared_bytes(sizeof(*moves.shared));
		moves.dst = warm_map(moves.pages * moves.size.page_bytes, sizes[s].page_bytes == HUGE_BYTES, &fd);
		CHECK(moves.dst);
		client = client_start(core, duplicating_client, &moves);
		for (int turn = 1; turn < 2 * (REPETITIONS + 1); turn += 2) {
			wait_turn(&moves, turn);
			evict_all(core, client, &moves, fd, turn == 1 ? NULL : &pairs);
			atomic_store(&moves.shared->turn, turn + 1);
		}
		CHECK_EQ(client_wait(client), 0);
		warm_unmap(moves.dst, moves.pages * moves.size.page_bytes, fd);
		gmem_core_stats(core, &stats);
		CHECK_EQ(stats.evictions, stats.evicted_clean);
		row_print(&row, &pairs, NULL);
	}
	gmem_core_destroy(core);
}
