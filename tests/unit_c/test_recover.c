/* SPDX-License-Identifier: Apache-2.0
 *
 * A daemon that is killed at each crash point, and its successors: what CPU and device wrote is there, they never notice
 * more than a pause, and at the end nothing is left over. A successor of another version touches nothing, and leaves all
 * of it to one that is right. The test is the manager that holds the descriptors.
 */
#define _GNU_SOURCE
#include "harness.h"

#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <gmem/crash.h>
#include <gmem/keep.h>

#include "fdstore.h"

#define PAGES 24
#define WRITERS 2 /* the CPU, the device */
#define LIVES 4
#define LIFE_MS 120 /* then it is killed wherever it is */
#define PATIENCE_MS 20000

struct shared {
	uint64_t page_bytes;
	volatile uint64_t va;
	atomic_bool stop, told;
	atomic_int gone;
	_Atomic uint64_t steps[WRITERS], bad;
	uint64_t last[WRITERS][PAGES];
};

struct parties {
	pid_t pids[WRITERS];
	int ours[WRITERS], theirs[WRITERS]; /* sockets: the daemon's ends, the parties' */
};

static struct shared *shared;

/* ---- those who write ---- */

static void write_words(int me)
{
	uint64_t page = (uint64_t)me;

	while (!shared->stop) {
		volatile uint64_t *word = (volatile uint64_t *)(shared->va + page * shared->page_bytes) + 1 + me;

		if (*word != shared->last[me][page]) {
			fprintf(stderr, "party %d, page %lu: %lu, wrote %lu\n", me, page, *word, shared->last[me][page]);
			atomic_fetch_add(&shared->bad, 1);
		}
		*word = ++shared->last[me][page];
		atomic_fetch_add(&shared->steps[me], 1);
		page = (page + (me ? 7 : 1)) % PAGES;
	}
}

static int cpu_side(struct client *client, void *arg)
{
	uint64_t wrong = 0;

	(void)arg;
	shared->va = (uint64_t)client_mmap(client, PAGES * shared->page_bytes, shared->page_bytes, GMEM_FORK_SHARE);
	write_words(0);
	while (!shared->gone)
		sleep_ms(1);
	for (int me = 0; me < WRITERS; me++)
		for (uint64_t page = 0; page < PAGES; page++)
			wrong += ((uint64_t *)(shared->va + page * shared->page_bytes))[1 + me] != shared->last[me][page];
	atomic_fetch_add(&shared->bad, wrong);
	atomic_fetch_add(&shared->gone, 1);
	return 0;
}

static int device_side(struct client *client, void *arg)
{
	(void)client, (void)arg;
	while (!shared->va)
		sleep_ms(1);
	write_words(1);
	atomic_fetch_add(&shared->gone, 1);
	return 0;
}

static void start_parties(struct parties *parties)
{
	for (int i = 0; i < WRITERS; i++) {
		int pair[2];

		CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair));
		parties->ours[i] = pair[0];
		parties->theirs[i] = pair[1];
		fflush(NULL);
		parties->pids[i] = fork();
		if (!parties->pids[i])
			_exit(client_join(pair[1], i ? device_side : cpu_side, NULL));
	}
}

/* ---- the daemon's lives ---- */

static void attach(struct gmem_core *core, int hnid, const char *driver, const char *key, const char *value)
{
	char message[GMEM_MESSAGE_MAX] = "";
	struct gmem_driver_config config = { .name = driver, .keys = &key, .values = &value, .count = 1,
					     .message = message };
	int err = gmem_device_attach_at(core, gmem_driver_builtin(driver), &config, hnid);

	if (err) {
		fprintf(stderr, "%s: %s (%d)\n", driver, message, err);
		exit(1);
	}
}

static void first_life(struct gmem_core *core, const struct parties *parties)
{
	struct client *client = client_admit(core, parties->ours[0], parties->pids[0], NULL, GMEM_HOST);

	client_admit(core, parties->ours[1], parties->pids[1], client, 1);
	while (!shared->steps[0] || !shared->steps[1]) /* who has not come that far can't be served by a successor */
		sleep_ms(1);
	shared->told = true;
	while (shared->told)
		sleep_ms(1);
	gmem_crash_init();
}

/* In order, with everything that they had. */
static void end_sessions(struct gmem_core *core)
{
	struct gmem_hnode_stats hnodes[GMEM_HNODE_MAX];
	struct gmem_core_stats stats;
	uint64_t ids[8];
	size_t count;

	gmem_session_ids(core, ids, 8, &count);
	CHECK_EQ(count, 1);
	CHECK_EQ(gmem_session_destroy(core, ids[0]), 0);
	core_settle(core);
	gmem_core_stats(core, &stats);
	CHECK_EQ(stats.sessions + stats.contexts + stats.regions + stats.objects + stats.poisoned_pages, 0);
	gmem_hnodes(core, hnodes, &count);
	for (size_t i = 0; i < count; i++)
		CHECK_EQ(hnodes[i].used_bytes, 0);
}

static _Noreturn void live(int number, const struct parties *parties, struct fdstore *store)
{
	char capacity[32];
	struct gmem_core *core;

	for (int i = 0; i < WRITERS; i++)
		close(parties->theirs[i]);
	close(store->ours);
	core = core_start((struct gmem_core_config){
		.host_limit_bytes = shared->page_bytes < 65536 ? 2 << 20 : PAGES / 2 * shared->page_bytes,
		.event_fork = true, .keep_socket = store->daemons, .keep_max_fds = FDSTORE_MAX, .kept = store->kept,
		.kept_count = store->count });
	CHECK_EQ(gmem_core_recovers(core), number > 1);
	snprintf(capacity, sizeof(capacity), "%lu", shared->page_bytes * PAGES / 4);
	attach(core, 1, "simgpu", "capacity", capacity);
	attach(core, 2, "zstd", "capacity", "256M");
	CHECK_EQ(gmem_core_resume(core), 0);
	if (number == 1)
		first_life(core, parties);
	while (!shared->stop)
		sleep_ms(1);
	while (shared->gone < WRITERS) /* they have faults to the very end */
		sleep_ms(1);
	end_sessions(core);
	gmem_core_destroy(core);
	exit(0);
}

/* ---- the manager ---- */

/* Until it has ended, by itself or after some time; true: it died at the point that it was told. first: which, once it has
 * come far enough. */
static bool outlive(pid_t daemon, struct fdstore *store, const char *first, int passes, bool until_served)
{
	uint64_t before[WRITERS] = { shared->steps[0], shared->steps[1] }, start = now_ns();
	bool killed = false;
	int status;

	while (first && !shared->told)
		if (!fdstore_take(store))
			usleep(200);
	if (first) {
		crash_at(first, passes);
		start = now_ns();
		shared->told = false;
	}

	for (;;) {
		uint64_t ms = (now_ns() - start) / 1000000;

		while (fdstore_take(store))
			;
		if (waitpid(daemon, &status, WNOHANG) == daemon)
			break;
		if (until_served && shared->steps[0] > before[0] + PAGES && shared->steps[1] > before[1] + PAGES)
			shared->stop = true;
		if (ms > (until_served ? PATIENCE_MS : LIFE_MS) && !killed) {
			CHECK(!until_served); /* or somebody waits for ever */
			killed = !kill(daemon, SIGKILL);
		}
		usleep(200);
	}
	while (fdstore_take(store))
		;
	CHECK(until_served ? !status : WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
	return !killed && !until_served;
}

static void open_store(struct fdstore *store, struct parties *parties, uint64_t page_bytes)
{
	fdstore_open(store);
	memset(shared, 0, sizeof(*shared));
	shared->page_bytes = page_bytes;
	start_parties(parties);
}

static void close_store(struct fdstore *store, struct parties *parties)
{
	for (int i = 0, status; i < WRITERS; i++) {
		CHECK(waitpid(parties->pids[i], &status, 0) == parties->pids[i] || errno == ECHILD);
		close(parties->ours[i]);
		close(parties->theirs[i]);
	}
	CHECK_EQ(shared->bad, 0);
	CHECK_EQ(store->count, 0); /* it has ended in order, and had everything given up */
	fdstore_close(store);
}

static pid_t start_life(int number, const struct parties *parties, struct fdstore *store)
{
	pid_t daemon;

	fflush(NULL);
	daemon = fork();
	CHECK(daemon >= 0);
	if (!daemon)
		live(number, parties, store);
	return daemon;
}

/* Killed at the point, and once more while its successor takes over; then to the end. */
static bool kill_at(const char *point, int passes, uint64_t page_bytes)
{
	struct parties parties;
	struct fdstore store;
	bool died = false;

	open_store(&store, &parties, page_bytes);
	for (int life = 1; life <= LIVES; life++) {
		crash_at(life == 1 || life == LIVES ? NULL : point, 1 + passes % 3);
		died |= outlive(start_life(life, &parties, &store), &store, life == 1 ? point : NULL, passes, life == LIVES);
	}
	close_store(&store, &parties);
	return died;
}

/* ---- another version ---- */

static int kept(const struct fdstore *store, const char *name)
{
	int fd = fdstore_find(store, name);

	CHECK(fd >= 0);
	return fd;
}

/* Of all that is in a sparse file. */
static uint64_t sum_of(int fd)
{
	uint64_t sum = 14695981039346656037ull;
	off_t end = 0, at;

	while ((at = lseek(fd, end, SEEK_DATA)) >= 0) {
		uint64_t word;

		end = lseek(fd, at, SEEK_HOLE);
		for (sum ^= (uint64_t)at; at < end; at += sizeof(word)) {
			CHECK(pread(fd, &word, sizeof(word), at) == sizeof(word));
			sum = (sum ^ word) * 1099511628211ull;
		}
	}
	return sum;
}

/* A daemon of other code, as far as it can see: with that, it refuses, and all is as it was. Its clients wait. */
static void check_refusal(struct fdstore *store)
{
	int state = kept(store, "state"), lpt = kept(store, "lpt"), status;
	uint64_t state_sum = sum_of(state), lpt_sum = sum_of(lpt);
	size_t count = store->count;
	pid_t daemon;

	fflush(NULL);
	daemon = fork();
	CHECK(daemon >= 0);
	if (!daemon) {
		struct gmem_core_config config = { .feature_mask = ~0ull, .event_fork = true, .keep_socket = store->daemons,
						   .keep_max_fds = FDSTORE_MAX, .kept = store->kept, .kept_count = store->count };
		struct gmem_core *core = NULL;

		CHECK_EQ(gmem_core_create(&config, &core), -EPROTO);
		CHECK(!core);
		exit(0);
	}
	CHECK(waitpid(daemon, &status, 0) == daemon);
	CHECK_EQ(status, 0);
	CHECK(!fdstore_take(store)); /* nothing was given up, and nothing added */
	CHECK_EQ(store->count, count);
	CHECK(sum_of(state) == state_sum && sum_of(lpt) == lpt_sum);
}

/* The value of a field of the header is another one for one life. */
static void refuse_with(struct fdstore *store, off_t offset, uint64_t value, size_t bytes)
{
	int state = kept(store, "state");
	uint64_t was = 0;

	CHECK(pread(state, &was, bytes, offset) == (ssize_t)bytes && was != value);
	CHECK(pwrite(state, &value, bytes, offset) == (ssize_t)bytes);
	check_refusal(store);
	CHECK(pwrite(state, &was, bytes, offset) == (ssize_t)bytes);
}

#define REFUSE_WITH(store, field, value)                                                                               \
	refuse_with(store, offsetof(struct gmem_state_header, field), value, sizeof(((struct gmem_state_header *)0)->field))

static void refuse_other_versions(void)
{
	uint64_t steps[WRITERS];
	struct parties parties;
	struct fdstore store;

	open_store(&store, &parties, 4096);
	crash_at(NULL, 0);
	outlive(start_life(1, &parties, &store), &store, gmem_crash_name(1), 40, false);
	REFUSE_WITH(&store, version, GMEM_STATE_VERSION + 1);
	REFUSE_WITH(&store, version, GMEM_STATE_VERSION - 1);
	REFUSE_WITH(&store, version, 0);
	REFUSE_WITH(&store, record_bytes, sizeof(struct gmem_record) + 8);
	REFUSE_WITH(&store, magic, GMEM_STATE_MAGIC + 1);
	REFUSE_WITH(&store, lpt_pages, 1ull << 32);
	/* both writers wait, or write what they have */
	for (int i = 0; i < WRITERS; i++)
		steps[i] = shared->steps[i];
	crash_at(NULL, 0);
	outlive(start_life(LIVES, &parties, &store), &store, NULL, 0, true);
	for (int i = 0; i < WRITERS; i++)
		CHECK(shared->steps[i] > steps[i]);
	close_store(&store, &parties);
}

int main(void)
{
	static const uint64_t sizes[] = { 4096, 65536, 2 << 20 };
	const char *name;
	int died = 0;

	crash_open();
	shared = shared_bytes(sizeof(*shared));
	refuse_other_versions();
	for (unsigned point = 1; point < GMEM_CRASH_NEAR_COUNT && (name = gmem_crash_name(point)); point++)
		died += kill_at(name, 1 + (int)(point * 7 % 40), sizes[point % 3]);
	crash_close();
	printf("recover: killed at %d of %d points, nothing lost\n", died, GMEM_CRASH_NEAR_COUNT - 1);
	CHECK(died >= 12);
	return 0;
}
