/* SPDX-License-Identifier: Apache-2.0
 *
 * Pools that several machines share, against a server that misbehaves: what is exported, that it comes back once for all
 * processes, and what those see that touch a page that can't be had. One core is both machines.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <unistd.h>

#include <gmem/driver.h>

#include "fakeserver.h"
#include "harness.h"

#define PAGES 40 /* of 4 KiB: two values of 16 and one of 8 */
#define STAMP 0x700000001ull
#define CLIENTS 3

enum order { IDLE, JOIN, MAP, WRITE, READ, READ_ALL, LEAVE };

/* What a client is told to do, and what it says; in memory that is older than all of them. */
struct puppet {
	_Atomic int order;
	int fd; /* of the daemon */
	pid_t daemon;
	struct gmem_region_info region;
	uint64_t page, result;
	struct client *client; /* daemon side */
};

static sigjmp_buf escape;

static void on_signal(int sig)
{
	siglongjmp(escape, sig);
}

/* One of these has never been written to, nor have all of a value. */
static bool is_written(uint64_t page)
{
	return page != 5 && page / 16 != 1;
}

static uint64_t expected(uint64_t page)
{
	return is_written(page) ? page * 1000 + 7 : 0;
}

static volatile uint64_t *word(const struct puppet *puppet, uint64_t page)
{
	return (volatile uint64_t *)(uintptr_t)(puppet->region.va + page * puppet->region.page_bytes + puppet->region.page_bytes / 2);
}

static void map_it(struct puppet *puppet)
{
	bool read_only = puppet->region.read_only;
	char path[64];

	snprintf(path, sizeof(path), "/proc/%d/fd/%d", puppet->daemon, puppet->fd);
	puppet->fd = open(path, read_only ? O_RDONLY : O_RDWR);
	CHECK(puppet->fd >= 0);
	CHECK(mmap((void *)(uintptr_t)puppet->region.va, puppet->region.bytes, PROT_READ | (read_only ? 0 : PROT_WRITE),
		   (read_only ? MAP_PRIVATE : MAP_SHARED) | MAP_NORESERVE | MAP_FIXED_NOREPLACE, puppet->fd,
		   (off_t)puppet->region.offset) == (void *)(uintptr_t)puppet->region.va);
}

/* The word, or one less than nothing for SIGBUS. */
static uint64_t read_page(const struct puppet *puppet, uint64_t page)
{
	return sigsetjmp(escape, 1) ? UINT64_MAX : *word(puppet, page);
}

static int play(struct client *client, void *arg)
{
	struct puppet *puppet = arg;

	(void)client;
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
				if (is_written(i))
					*word(puppet, i) = expected(i);
			break;
		case READ:
			puppet->result = read_page(puppet, puppet->page);
			break;
		case READ_ALL: /* from the end, so that it is no stream */
			puppet->result = 0;
			for (uint64_t i = PAGES; i-- > 0;)
				puppet->result += read_page(puppet, i * 7 % PAGES) == expected(i * 7 % PAGES);
			break;
		default:
			return 0;
		}
		atomic_store(&puppet->order, IDLE);
	}
}

static void ask(struct puppet *puppet, enum order order, uint64_t page)
{
	puppet->page = page;
	atomic_store(&puppet->order, order);
}

static uint64_t wait_idle(struct puppet *puppet)
{
	while (atomic_load(&puppet->order) != IDLE)
		sleep_ms(1);
	return puppet->result;
}

static uint64_t tell(struct puppet *puppet, enum order order, uint64_t page)
{
	ask(puppet, order, page);
	return wait_idle(puppet);
}

static void start(struct gmem_core *core, struct puppet *puppet)
{
	memset(puppet, 0, sizeof(*puppet));
	puppet->client = client_start(core, play, puppet);
	tell(puppet, JOIN, 0);
}

static void leave(struct puppet *puppet)
{
	atomic_store(&puppet->order, LEAVE);
	CHECK_EQ(client_wait(puppet->client), 0);
	puppet->client = NULL;
}

static void open_pool(struct gmem_core *core, struct puppet *puppet, uint64_t pool, bool write)
{
	struct gmem_region_info file;

	CHECK_EQ(gmem_pool_open(core, puppet->client->session, pool, write, &puppet->region), 0);
	CHECK_EQ(gmem_region_file(core, puppet->client->session, puppet->region.va, GMEM_HOST, &file), 0);
	puppet->daemon = getpid();
	puppet->fd = file.fd;
	tell(puppet, MAP, 0);
	close(file.fd);
	CHECK_EQ(gmem_mmap_commit(core, puppet->client->session, puppet->region.va), 0);
}

/* ---- a world: a server, a core with it, and a pool that is published ---- */

struct world {
	struct fake_server *server;
	struct gmem_core *core;
	struct puppet *puppets;
	int hnid;
	uint64_t pool, imported, page_bytes;
	uint64_t present[(PAGES + 63) / 64];
	uint32_t checks[PAGES];
	struct gmem_pool_version version;
};

static void begin(struct world *world, struct puppet *puppets, uint64_t page_bytes, uint64_t host_pages, const char *options)
{
	struct gmem_core_config config = { .feature_mask = ~0ull, .host_limit_bytes = host_pages * page_bytes,
					   .no_fault_ahead = true };
	struct gmem_pool_args args = { .memory = { .bytes = PAGES * page_bytes, .page_bytes = page_bytes }, .persistent = true };
	char text[128];

	*world = (struct world){ .puppets = puppets, .page_bytes = page_bytes, .core = core_start(config) };
	for (int i = 0; i < CLIENTS; i++) /* forked before the server has threads, with what they have locked */
		start(world->core, &puppets[i]);
	world->server = fake_start();
	atomic_store(&world->server->replicas, 1);
	snprintf(text, sizeof(text), "address=%s capacity=64M timeout_ms=400 replicas=1%s", world->server->address, options);
	world->hnid = attach_builtin(world->core, "remote", "far", text);
	CHECK(world->hnid > 0);
	CHECK_EQ(gmem_pool_create(world->core, puppets[0].client->session, &args, &world->pool), 0);
	open_pool(world->core, &puppets[0], world->pool, true);
	tell(&puppets[0], WRITE, 0);
	world->version = (struct gmem_pool_version){
		.name = "table", .stamp = STAMP, .pages = PAGES, .shift = (uint8_t)__builtin_ctzll(page_bytes),
		.present = world->present, .checks = world->checks,
	};
	CHECK_EQ(gmem_pool_present(world->core, world->pool, world->present), -EBUSY);
	CHECK_EQ(gmem_pool_export(world->core, world->pool, world->hnid, &world->version, 0, PAGES), -EBUSY);
	CHECK_EQ(gmem_pool_publish(world->core, world->pool), 0);
	CHECK_EQ(gmem_pool_present(world->core, world->pool, world->present), 0);
	for (uint64_t i = 0; i < PAGES; i++)
		CHECK_EQ(world->present[0] >> i & 1, is_written(i));
}

static int export(struct world *world)
{
	return gmem_pool_export(world->core, world->pool, world->hnid, &world->version, 0, PAGES);
}

static uint64_t import(struct world *world)
{
	CHECK_EQ(gmem_pool_import(world->core, world->puppets[1].client->session, world->hnid, &world->version,
				  &world->imported), 0);
	return world->imported;
}

static void end(struct world *world)
{
	for (int i = 0; i < CLIENTS; i++)
		if (world->puppets[i].client)
			leave(&world->puppets[i]);
	gmem_pool_unlink(world->core, world->pool);
	gmem_pool_unlink(world->core, world->imported);
	core_settle(world->core);
	gmem_core_destroy(world->core);
	fake_stop(world->server);
}

static uint64_t fetched(struct world *world, uint64_t pool)
{
	struct gmem_pool_info info;

	CHECK_EQ(gmem_pool_info(world->core, pool, &info), 0);
	return info.fetched_bytes;
}

static unsigned reads(struct world *world)
{
	return atomic_load(&world->server->gets) + atomic_load(&world->server->ranges);
}

/* ---- tests ---- */

static void test_once_for_all(struct puppet *puppets, uint64_t page_bytes)
{
	unsigned written = 0, values, before, drops;
	struct gmem_pool_info info;
	struct gmem_region_info region;
	struct world world;
	uint64_t pool;

	begin(&world, puppets, page_bytes, 2 * PAGES + 8, "");
	for (uint64_t i = 0; i < PAGES; i++)
		written += is_written(i);
	values = page_bytes == 4096 ? 2 : written;
	CHECK_EQ(export(&world), 0);
	CHECK_EQ(fake_count(world.server), values);
	CHECK(atomic_load(&world.server->waits) > 0);
	CHECK_EQ(export(&world), 0); /* once more: the same values */
	CHECK_EQ(fake_count(world.server), values);
	pool = import(&world);
	for (int i = 1; i < CLIENTS; i++)
		open_pool(world.core, &puppets[i], pool, false);
	CHECK_EQ(gmem_pool_open(world.core, puppets[0].client->session, pool, true, &region), -EPERM);
	CHECK_EQ(fetched(&world, pool), 0);
	before = reads(&world);
	for (int i = 1; i < CLIENTS; i++) /* at the same time */
		ask(&puppets[i], READ_ALL, 0);
	for (int i = 1; i < CLIENTS; i++)
		CHECK_EQ(wait_idle(&puppets[i]), PAGES);
	CHECK_EQ(fetched(&world, pool), written * page_bytes);
	CHECK(reads(&world) - before <= written);
	CHECK_EQ(gmem_pool_info(world.core, pool, &info), 0);
	CHECK_EQ(info.readers, CLIENTS - 1);
	CHECK_EQ(info.sealed, true);
	before = reads(&world);
	for (int i = 1; i < CLIENTS; i++)
		CHECK_EQ(tell(&puppets[i], READ_ALL, 0), PAGES);
	CHECK_EQ(reads(&world), before);
	CHECK_EQ(gmem_device_detach(world.core, world.hnid, false), -EBUSY);
	drops = atomic_load(&world.server->drops);
	CHECK_EQ(gmem_pool_erase(world.core, world.hnid, &world.version, 0, PAGES), 0);
	CHECK(atomic_load(&world.server->drops) > drops);
	CHECK_EQ(fake_count(world.server), 0);
	CHECK_EQ(gmem_pool_erase(world.core, world.hnid, &world.version, 1, PAGES), -EINVAL);
	CHECK_EQ(gmem_pool_unlink(world.core, pool), 0);
	CHECK_EQ(tell(&puppets[1], READ_ALL, 0), PAGES); /* who has it open keeps what is here */
	CHECK_EQ(gmem_pool_unlink(world.core, world.pool), 0);
	end(&world);
}

/* The same of a pool that was published here, part of which is always in the tier: who comes second finds what has come. */
static void test_at_the_same_time(struct puppet *puppets)
{
	struct gmem_core_stats stats;
	struct world world;

	begin(&world, puppets, 65536, 32, "");
	for (int i = 1; i < CLIENTS; i++)
		open_pool(world.core, &puppets[i], world.pool, false);
	for (int round = 0; round < 20; round++) {
		for (int i = 1; i < CLIENTS; i++)
			ask(&puppets[i], READ_ALL, 0);
		for (int i = 1; i < CLIENTS; i++)
			CHECK_EQ(wait_idle(&puppets[i]), PAGES);
	}
	gmem_core_stats(world.core, &stats);
	CHECK_EQ(stats.poisoned_pages, 0);
	end(&world);
}

/* Little room: pages are dropped, not pushed anywhere, and come again. */
static void test_little_room(struct puppet *puppets)
{
	unsigned pushed;
	struct world world;
	uint64_t pool;

	begin(&world, puppets, 65536, 32, "");
	CHECK_EQ(export(&world), 0);
	CHECK_EQ(gmem_pool_unlink(world.core, world.pool), 0);
	leave(&puppets[0]);
	pool = import(&world);
	open_pool(world.core, &puppets[1], pool, false);
	pushed = atomic_load(&world.server->sets);
	for (int i = 0; i < 3; i++)
		CHECK_EQ(tell(&puppets[1], READ_ALL, 0), PAGES);
	CHECK_EQ(atomic_load(&world.server->sets), pushed);
	CHECK(fetched(&world, pool) >= 24 * 65536);
	end(&world);
}

/* What is damaged, gone, or behind a server that says nothing is SIGBUS for whoever touches it, and nobody else's loss. */
static void test_what_can_not_be_had(struct puppet *puppets)
{
	struct world world;
	uint64_t pool;

	begin(&world, puppets, 4096, 2 * PAGES + 8, "");
	CHECK_EQ(export(&world), 0);
	pool = import(&world);
	for (int i = 1; i < CLIENTS; i++)
		open_pool(world.core, &puppets[i], pool, false);
	fake_damage(world.server); /* a byte in the middle of each value: of page 8, as 5 is not there, and of 36 */
	CHECK_EQ(tell(&puppets[1], READ, 8), UINT64_MAX);
	CHECK_EQ(tell(&puppets[1], READ, 36), UINT64_MAX);
	CHECK_EQ(tell(&puppets[1], READ, 0), expected(0));
	CHECK_EQ(tell(&puppets[1], READ, 5), 0);
	CHECK_EQ(tell(&puppets[1], READ, 20), 0);
	fake_damage(world.server);
	CHECK_EQ(tell(&puppets[2], READ, 8), expected(8));
	CHECK_EQ(gmem_prefetch(world.core, puppets[1].client->session, GMEM_HOST, puppets[1].region.va, 40 * 4096), 0);
	CHECK_EQ(tell(&puppets[1], READ, 36), expected(36)); /* repaired: asked for, it comes */
	end(&world);

	begin(&world, puppets, 65536, 2 * PAGES + 8, "");
	CHECK_EQ(export(&world), 0);
	pool = import(&world);
	for (int i = 1; i < CLIENTS; i++)
		open_pool(world.core, &puppets[i], pool, false);
	fake_answer(world.server, "GET", "-LOADING soon\r\n", -1);
	CHECK_EQ(tell(&puppets[1], READ, 0), UINT64_MAX);
	fake_answer(world.server, "GET", "-LOADING soon\r\n", 3);
	CHECK_EQ(tell(&puppets[1], READ, 7), expected(7));
	fake_answer(world.server, "GET", "", 0);
	CHECK_EQ(tell(&puppets[2], READ, 0), expected(0));
	fake_forget(world.server);
	CHECK_EQ(tell(&puppets[2], READ, 9), UINT64_MAX);
	CHECK_EQ(tell(&puppets[2], READ, 0), expected(0));
	CHECK_EQ(gmem_device_detach(world.core, world.hnid, true), 0); /* forced: nothing more comes */
	CHECK_EQ(tell(&puppets[2], READ, 10), UINT64_MAX);
	CHECK_EQ(tell(&puppets[2], READ, 7), expected(7));
	end(&world);
}

static void test_exports_that_fail(struct puppet *puppets)
{
	struct world world;
	int simgpu;

	begin(&world, puppets, 65536, 2 * PAGES + 8, "");
	fake_answer(world.server, "SET", "-OOM command not allowed\r\n", -1);
	CHECK_EQ(export(&world), -ENOSPC);
	fake_answer(world.server, "SET", "-NOPERM no\r\n", -1);
	CHECK_EQ(export(&world), -EACCES);
	fake_answer(world.server, "SET", "-CLUSTERDOWN down\r\n", -1);
	CHECK_EQ(export(&world), -ETIMEDOUT);
	fake_answer(world.server, "SET", "", 0);
	atomic_store(&world.server->replicas, 0);
	CHECK_EQ(export(&world), -ENODATA);
	atomic_store(&world.server->replicas, 1);
	atomic_store(&world.server->hang, 1);
	CHECK_EQ(export(&world), 0);
	world.version.pages++;
	CHECK_EQ(export(&world), -EINVAL);
	world.version.pages--;
	CHECK_EQ(gmem_pool_export(world.core, world.pool, world.hnid, &world.version, 1, 2), -EINVAL);
	simgpu = attach_simgpu(world.core, "simgpu0", "capacity=8M");
	CHECK_EQ(gmem_pool_export(world.core, world.pool, simgpu, &world.version, 0, PAGES), -EOPNOTSUPP);
	CHECK_EQ(gmem_pool_import(world.core, puppets[0].client->session, simgpu, &world.version, &world.pool), -EOPNOTSUPP);
	CHECK_EQ(gmem_pool_import(world.core, puppets[0].client->session, 15, &world.version, &world.pool), -ENODEV);
	end(&world);
}

int main(void)
{
	struct puppet *puppets = shared_bytes(CLIENTS * sizeof(*puppets));

	test_at_the_same_time(puppets);
	test_once_for_all(puppets, 4096);
	test_once_for_all(puppets, 65536);
	if (hugepages_reserve(4 * PAGES))
		test_once_for_all(puppets, 2 << 20);
	test_little_room(puppets);
	test_what_can_not_be_had(puppets);
	test_exports_that_fail(puppets);
	printf("shared pools: ok\n");
	return 0;
}
