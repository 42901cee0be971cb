/* SPDX-License-Identifier: Apache-2.0
 *
 * Pools: one copy for several sessions, to read and write or to read only, while pages move; publishing under a writer,
 * and what somebody who keeps the old descriptor can do then.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <unistd.h>

#include "harness.h"

#define PAGES 24
#define DEVICE 1

enum order { IDLE, JOIN, MAP, WRITE, SUM, WRITE_REFUSED, READ_REFUSED, SPOIL, COUNT, FREE_WRITE, LEAVE };

/* What a client is told to do, and what it says; in memory that is older than all of them. */
struct puppet {
	_Atomic int order;
	int fd; /* of the daemon */
	pid_t daemon;
	struct gmem_region_info region;
	uint64_t page_bytes, value, result;
	_Atomic bool stop;
	struct client *client; /* daemon side */
};

static sigjmp_buf escape;

static void on_signal(int sig)
{
	siglongjmp(escape, sig);
}

static volatile uint64_t *word(const struct puppet *puppet, uint64_t page)
{
	return (volatile uint64_t *)(uintptr_t)(puppet->region.va + page * puppet->page_bytes + 8);
}

static void map_it(struct puppet *puppet)
{
	bool read_only = puppet->region.read_only;
	char path[64];
	void *at;

	snprintf(path, sizeof(path), "/proc/%d/fd/%d", puppet->daemon, puppet->fd);
	puppet->fd = open(path, read_only ? O_RDONLY : O_RDWR);
	CHECK(puppet->fd >= 0);
	at = mmap((void *)(uintptr_t)puppet->region.va, puppet->region.bytes, PROT_READ | (read_only ? 0 : PROT_WRITE),
		  (read_only ? MAP_PRIVATE : MAP_SHARED) | MAP_NORESERVE | MAP_FIXED_NOREPLACE, puppet->fd,
		  (off_t)puppet->region.offset);
	CHECK((uintptr_t)at == puppet->region.va);
}

/* Which signal a write gets; 0: none. */
static int try_write(struct puppet *puppet)
{
	int sig = sigsetjmp(escape, 1);

	if (!sig)
		*word(puppet, 0) = 666;
	return sig;
}

static int try_read(const struct puppet *puppet)
{
	int sig = sigsetjmp(escape, 1);

	if (!sig)
		(void)*word(puppet, puppet->value);
	return sig;
}

static uint64_t sum(const struct puppet *puppet)
{
	uint64_t total = 0;

	for (uint64_t i = 0; i < PAGES; i++)
		total += *word(puppet, i);
	return total;
}

/* Counts up in all pages, until that is refused. */
static void count_up(struct puppet *puppet)
{
	volatile uint64_t n = 0;

	if (!sigsetjmp(escape, 1))
		for (;; n++)
			for (uint64_t i = 0; i < PAGES; i++)
				*word(puppet, i) = n;
	puppet->result = n;
}

static int play(struct client *client, void *arg)
{
	struct puppet *puppet = arg;

	(void)client;
	signal(SIGSEGV, on_signal);
	signal(SIGBUS, on_signal);
	for (;;) {
		switch (atomic_load(&puppet->order)) {
		case IDLE:
			sleep_ms(1);
			continue;
		case JOIN: /* it is attached */
			break;
		case MAP:
			map_it(puppet);
			break;
		case WRITE:
			for (uint64_t i = 0; i < PAGES; i++)
				*word(puppet, i) = puppet->value + i;
			break;
		case SUM:
			puppet->result = sum(puppet);
			break;
		case WRITE_REFUSED:
			puppet->result = (uint64_t)try_write(puppet);
			break;
		case READ_REFUSED:
			puppet->result = (uint64_t)try_read(puppet);
			break;
		case SPOIL:
			puppet->result = (uint64_t)pwrite(puppet->fd, "spoiled!", 8, (off_t)puppet->region.offset + 8) == 8 ?
					 0 : (uint64_t)errno;
			break;
		case COUNT:
			count_up(puppet);
			break;
		case FREE_WRITE: /* of a private mapping, which is nobody else's business */
			CHECK(!mprotect((void *)(uintptr_t)puppet->region.va, puppet->page_bytes, PROT_READ | PROT_WRITE));
			puppet->result = (uint64_t)try_write(puppet);
			break;
		default:
			return 0;
		}
		atomic_store(&puppet->order, IDLE);
	}
}

static void wait_idle(struct puppet *puppet)
{
	while (atomic_load(&puppet->order) != IDLE)
		sleep_ms(1);
}

static uint64_t tell(struct puppet *puppet, enum order order, uint64_t value)
{
	puppet->value = value;
	atomic_store(&puppet->order, order);
	wait_idle(puppet);
	return puppet->result;
}

static void leave(struct puppet *puppet)
{
	atomic_store(&puppet->order, LEAVE);
	CHECK_EQ(client_wait(puppet->client), 0);
}

static void open_pool(struct gmem_core *core, struct puppet *puppet, uint64_t pool, bool write)
{
	struct gmem_region_info file;

	CHECK_EQ(gmem_pool_open(core, puppet->client->session, pool, write, &puppet->region), 0);
	CHECK_EQ(puppet->region.read_only, !write);
	CHECK_EQ(gmem_region_file(core, puppet->client->session, puppet->region.va, GMEM_HOST, &file), 0);
	CHECK_EQ(fcntl(file.fd, F_GETFL) & O_ACCMODE, write ? O_RDWR : O_RDONLY);
	CHECK_EQ(file.offset, puppet->region.offset);
	puppet->page_bytes = puppet->region.page_bytes;
	puppet->daemon = getpid();
	puppet->fd = file.fd;
	tell(puppet, MAP, 0);
	close(file.fd);
	CHECK_EQ(gmem_mmap_commit(core, puppet->client->session, puppet->region.va), 0);
}

static uint64_t expected(uint64_t value)
{
	return value * PAGES + PAGES * (PAGES - 1) / 2;
}

static void start(struct gmem_core *core, struct puppet *puppet)
{
	memset(puppet, 0, sizeof(*puppet));
	puppet->client = client_start(core, play, puppet);
	tell(puppet, JOIN, 0);
}

static struct gmem_pool_info info(struct gmem_core *core, uint64_t pool)
{
	struct gmem_pool_info got;

	CHECK_EQ(gmem_pool_info(core, pool, &got), 0);
	return got;
}

/* Moves all pages to the device, as a request of that session; the readers get copies of them. */
static void move(struct gmem_core *core, struct puppet *puppet, int hnid)
{
	CHECK_EQ(gmem_prefetch(core, puppet->client->session, hnid, puppet->region.va, puppet->region.bytes), 0);
}

static void check_refusals(struct gmem_core *core, struct puppet *reader)
{
	uint64_t session = reader->client->session, va = reader->region.va, bytes = reader->region.bytes;

	CHECK_EQ(gmem_discard(core, session, va, bytes), -EACCES);
	CHECK_EQ(gmem_hmemcpy(core, session, GMEM_HOST, va, va + bytes / 2, 64, false), -EACCES);
	CHECK_EQ(gmem_advise(core, session, GMEM_HOST, va, bytes, GMEM_ADVISE_PINNED), -EACCES);
	CHECK_EQ(gmem_advise(core, session, -1, va, bytes, GMEM_ADVISE_FREEZE), -EOPNOTSUPP);
}

/* A hole where a sealed pool's content is recorded: another copy is taken, and without one it is lost, not zero. */
static void check_holes(struct gmem_core *core, struct puppet *reader, uint64_t sum)
{
	uint64_t session = reader->client->session, va = reader->region.va, bytes = reader->page_bytes;
	struct gmem_page_info page;
	struct gmem_region_info file;
	char path[64];
	size_t count;
	int fd;

	CHECK_EQ(gmem_region_file(core, session, va, GMEM_HOST, &file), 0);
	snprintf(path, sizeof(path), "/proc/self/fd/%d", file.fd);
	fd = open(path, O_RDWR);
	CHECK(fd >= 0);
	CHECK_EQ(gmem_prefetch(core, session, DEVICE, va + bytes, bytes), 0);
	CHECK_EQ(gmem_query(core, session, va + bytes, bytes, &page, 1, &count), 0);
	CHECK_EQ(page.valid, 1 << GMEM_HOST | 1 << DEVICE);
	CHECK(!fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(file.offset + bytes), (off_t)bytes));
	CHECK_EQ(tell(reader, SUM, 0), sum);
	CHECK_EQ(gmem_device_detach(core, DEVICE, false), 0);
	CHECK(!fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)file.offset, (off_t)bytes));
	CHECK_EQ(tell(reader, READ_REFUSED, 0), SIGBUS);
	CHECK_EQ(gmem_query(core, session, va, bytes, &page, 1, &count), 0);
	CHECK_EQ(page.state, GMEM_POISONED);
	CHECK_EQ(tell(reader, READ_REFUSED, 1), 0);
	close(fd);
	close(file.fd);
}

static void run(struct puppet *writer, struct puppet *reader, struct puppet *late, uint64_t page_bytes)
{
	struct gmem_core *core = core_start((struct gmem_core_config){ .feature_mask = ~0ull, .event_fork = true });
	struct gmem_pool_args args = { .memory = { .bytes = PAGES * page_bytes, .page_bytes = page_bytes } };
	struct gmem_core_features features;
	struct gmem_region_info region;
	uint64_t pool, counted = 0;

	gmem_core_features(core, &features);
	CHECK_EQ(attach_simgpu(core, "simgpu0", "capacity=128M"), DEVICE);
	start(core, writer);
	start(core, reader);
	start(core, late);
	CHECK_EQ(gmem_pool_create(core, writer->client->session, &args, &pool), 0);
	open_pool(core, writer, pool, true);
	open_pool(core, reader, pool, false);
	CHECK_EQ(reader->region.va, writer->region.va);
	CHECK(!reader->region.sealed);
	CHECK_EQ(info(core, pool).writers, 1);
	CHECK_EQ(info(core, pool).readers, 1);
	CHECK_EQ(gmem_pool_open(core, reader->client->session, pool, true, &region), -EBUSY);

	for (uint64_t round = 1; round < 4; round++) {
		tell(writer, WRITE, 100 * round);
		CHECK_EQ(tell(reader, SUM, 0), expected(100 * round));
		move(core, round & 1 ? writer : reader, DEVICE);
		CHECK_EQ(tell(reader, SUM, 0), expected(100 * round));
		move(core, writer, GMEM_HOST);
		CHECK_EQ(tell(writer, SUM, 0), expected(100 * round));
	}
	CHECK_EQ(tell(reader, WRITE_REFUSED, 0), SIGSEGV);
	CHECK_EQ(tell(reader, SPOIL, 0), EBADF);
	check_refusals(core, reader);
	CHECK_EQ(tell(reader, FREE_WRITE, 0), 0);
	CHECK_EQ(tell(writer, SUM, 0), expected(300));
	if (!features.continue_wp) {
		CHECK_EQ(gmem_pool_publish(core, pool), -EOPNOTSUPP);
	} else {
		/* some pages on the device, some in both places, and a writer at work */
		atomic_store(&writer->order, COUNT);
		sleep_ms(20);
		CHECK_EQ(gmem_prefetch(core, late->client->session, DEVICE, writer->region.va, page_bytes), -EINVAL);
		CHECK_EQ(gmem_pool_publish(core, pool), 0);
		wait_idle(writer);
		counted = writer->result;
		CHECK(info(core, pool).sealed);
		CHECK_EQ(gmem_pool_publish(core, pool), 0);
		CHECK_EQ(gmem_pool_open(core, late->client->session, pool, true, &region), -EPERM);
		open_pool(core, late, pool, false);
		CHECK(late->region.sealed);
		/* it was stopped in the middle of one round: each page has that round's number or the one before */
		CHECK(tell(late, SUM, 0) >= (counted ? counted - 1 : 0) * PAGES && late->result <= (counted + 1) * PAGES);
		counted = late->result;
		CHECK_EQ(tell(writer, SUM, 0), counted);
		CHECK_EQ(tell(writer, WRITE_REFUSED, 0), SIGSEGV);
		CHECK_EQ(gmem_discard(core, writer->client->session, writer->region.va, writer->region.bytes), -EPERM);
		move(core, late, DEVICE);
		if (writer->region.class_ == GMEM_CLASS_SMALL)
			CHECK_EQ(tell(writer, SPOIL, 0), 0); /* into files that nobody who comes now reads */
		move(core, late, GMEM_HOST);
		CHECK_EQ(tell(late, SUM, 0), counted);
		leave(writer);
		CHECK_EQ(tell(late, SUM, 0), counted);
	}
	CHECK_EQ(gmem_pool_unlink(core, pool), 0);
	CHECK_EQ(gmem_pool_unlink(core, pool), -ENOENT);
	if (features.continue_wp) {
		CHECK_EQ(tell(late, SUM, 0), counted);
		check_holes(core, late, counted);
	} else {
		leave(writer);
	}
	leave(reader);
	leave(late);
	core_settle(core);
	gmem_core_destroy(core);
}

/* Content stays while nobody has it open, and all goes with the name. */
static void run_empty(struct puppet *first, struct puppet *second)
{
	struct gmem_core *core = core_start((struct gmem_core_config){ .feature_mask = ~0ull });
	struct gmem_pool_args args = { .memory = { .bytes = PAGES * 4096, .page_bytes = 4096 }, .persistent = true };
	struct gmem_core_stats stats;
	uint64_t pool;

	start(core, first);
	CHECK_EQ(gmem_pool_create(core, first->client->session, &args, &pool), 0);
	open_pool(core, first, pool, true);
	tell(first, WRITE, 5);
	leave(first);
	start(core, second);
	open_pool(core, second, pool, false);
	CHECK_EQ(tell(second, SUM, 0), expected(5));
	CHECK_EQ(info(core, pool).resident_bytes[GMEM_HOST], PAGES * 4096);
	leave(second);
	CHECK_EQ(gmem_pool_unlink(core, pool), 0);
	core_settle(core);
	gmem_core_stats(core, &stats);
	CHECK_EQ(stats.objects, 0);
	gmem_core_destroy(core);
}

int main(void)
{
	struct puppet *puppets = shared_bytes(3 * sizeof(*puppets));

	run(&puppets[0], &puppets[1], &puppets[2], 4096);
	run(&puppets[0], &puppets[1], &puppets[2], 65536);
	if (hugepages_reserve(3 * PAGES))
		run(&puppets[0], &puppets[1], &puppets[2], 2 << 20);
	run_empty(&puppets[0], &puppets[1]);
	printf("pool: ok\n");
	return 0;
}
