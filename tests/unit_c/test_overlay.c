/* SPDX-License-Identifier: Apache-2.0
 *
 * What contexts map beside or over their window: pools that are opened while they are there, and regions that have moved.
 * A page is put nowhere but where a context has said that it has mapped it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "harness.h"

#define PAGES 8
#define DEVICE 1
#define BYTES (PAGES * puppet->page_bytes)

enum order { IDLE, MAP, RESTORE, WRITE, SUM, REGION, MOVE, LEAVE };

/* What a process is told to do. Memory of all of them. */
struct puppet {
	_Atomic int order;
	pid_t daemon;
	struct gmem_region_info map; /* MAP: fd is the daemon's */
	uint64_t page_bytes, va, value, result;
	struct client *client; /* daemon side */
};

static struct puppet *puppets;

static volatile uint64_t *word(const struct puppet *puppet, uint64_t page)
{
	return (volatile uint64_t *)(uintptr_t)(puppet->va + page * puppet->page_bytes + 16);
}

static void map_it(struct puppet *puppet, const struct client *client)
{
	const struct gmem_region_info *map = &puppet->map;
	int how = (map->read_only ? MAP_PRIVATE : MAP_SHARED) | MAP_NORESERVE | (client->hnid ? MAP_FIXED : MAP_FIXED_NOREPLACE);
	char path[64];
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/fd/%d", puppet->daemon, map->fd);
	fd = open(path, map->read_only ? O_RDONLY : O_RDWR);
	CHECK(fd >= 0);
	CHECK(mmap((void *)(uintptr_t)map->va, map->bytes, PROT_READ | (map->read_only ? 0 : PROT_WRITE), how, fd,
		   (off_t)map->offset) == (void *)(uintptr_t)map->va);
	close(fd);
}

static void restore_window(const struct puppet *puppet, const struct client *client)
{
	CHECK(mmap((void *)(uintptr_t)puppet->map.va, puppet->map.bytes, PROT_READ | PROT_WRITE,
		   MAP_SHARED | MAP_NORESERVE | MAP_FIXED, client->fds[puppet->map.class_],
		   (off_t)(puppet->map.va - client->window.base)) != MAP_FAILED);
}

static uint64_t sum(const struct puppet *puppet)
{
	uint64_t total = 0;

	for (uint64_t page = 0; page < PAGES; page++)
		total += *word(puppet, page);
	return total;
}

static int play(struct client *client, void *arg)
{
	struct puppet *puppet = arg;

	for (;;) {
		switch (atomic_load(&puppet->order)) {
		case IDLE:
			sleep_ms(1);
			continue;
		case MAP:
			map_it(puppet, client);
			break;
		case RESTORE:
			restore_window(puppet, client);
			break;
		case WRITE:
			for (uint64_t page = 0; page < PAGES; page++)
				*word(puppet, page) = puppet->value + page;
			break;
		case SUM:
			puppet->result = sum(puppet);
			break;
		case REGION:
			puppet->va = (uint64_t)client_mmap(client, BYTES, puppet->page_bytes, GMEM_FORK_SHARE);
			break;
		case MOVE: {
			void *at = mremap((void *)(uintptr_t)puppet->va, BYTES, BYTES, MREMAP_MAYMOVE | MREMAP_FIXED,
					  (void *)(uintptr_t)puppet->value);

			CHECK(at == (void *)(uintptr_t)puppet->value);
			puppet->va = puppet->value;
			break;
		}
		default:
			return 0;
		}
		atomic_store(&puppet->order, IDLE);
	}
}

static uint64_t tell(struct puppet *puppet, enum order order, uint64_t value)
{
	puppet->value = value;
	atomic_store(&puppet->order, order);
	while (atomic_load(&puppet->order) != IDLE)
		sleep_ms(1);
	return puppet->result;
}

static struct puppet *start(struct gmem_core *core, int number, struct puppet *of, uint64_t page_bytes)
{
	struct puppet *puppet = &puppets[number];

	memset(puppet, 0, sizeof(*puppet));
	puppet->page_bytes = page_bytes;
	puppet->daemon = getpid();
	puppet->client = of ? context_start(of->client, DEVICE, play, puppet) : client_start(core, play, puppet);
	while (of && !puppet->client->context)
		sleep_ms(1);
	return puppet;
}

static void leave(struct puppet *puppet)
{
	atomic_store(&puppet->order, LEAVE);
	CHECK_EQ(client_wait(puppet->client), 0);
}

static uint64_t expected(uint64_t value)
{
	return value * PAGES + PAGES * (PAGES - 1) / 2;
}

/* What a context of that session has to map, of which there is one. */
static struct gmem_region_info overlay_of(struct gmem_core *core, const struct puppet *client)
{
	struct gmem_region_info regions[2];
	size_t count = 0;

	CHECK_EQ(gmem_context_overlays(core, client->client->session, DEVICE, regions, 2, &count), 0);
	CHECK_EQ(count, 1);
	return regions[0];
}

static size_t overlay_count(struct gmem_core *core, const struct puppet *client)
{
	size_t count = 99;

	CHECK_EQ(gmem_context_overlays(core, client->client->session, DEVICE, NULL, 0, &count), 0);
	return count;
}

static void open_pool(struct gmem_core *core, struct puppet *puppet, uint64_t pool, bool write)
{
	struct gmem_region_info region;

	CHECK_EQ(gmem_pool_open(core, puppet->client->session, pool, write, &region), 0);
	CHECK_EQ(gmem_region_file(core, puppet->client->session, region.va, GMEM_HOST, &puppet->map), 0);
	puppet->va = region.va;
	tell(puppet, MAP, 0);
	close(puppet->map.fd);
	CHECK_EQ(gmem_mmap_commit(core, puppet->client->session, region.va), 0);
}

static int acquire(struct gmem_core *core, const struct puppet *context, uint64_t first, uint64_t count, bool write)
{
	struct gmem_range range = { context->va + first * context->page_bytes, count * context->page_bytes };
	int err = gmem_acquire(core, context->client->context, &range, 1, write, 0);

	if (!err)
		CHECK_EQ(gmem_release(core, context->client->context, &range, 1), 0);
	return err;
}

/* The context maps what it is told to, and says so. */
static void cover(struct gmem_core *core, struct puppet *client, struct puppet *context)
{
	context->map = overlay_of(core, client);
	context->va = client->va;
	CHECK_EQ(context->map.va, client->va);
	tell(context, MAP, 0);
	CHECK_EQ(gmem_context_overlay(core, context->client->context, context->map.va, context->map.bytes), 0);
}

static void run_pool(uint64_t page_bytes)
{
	struct gmem_core *core = core_start((struct gmem_core_config){ .event_fork = true });
	struct gmem_pool_args args = { .memory = { .bytes = PAGES * page_bytes, .page_bytes = page_bytes } };
	struct puppet *client, *reader, *context, *other;
	uint64_t pool, va, id, half = PAGES / 2 * page_bytes;

	CHECK_EQ(attach_simgpu(core, "simgpu0", "capacity=64M"), DEVICE);
	client = start(core, 0, NULL, page_bytes);
	reader = start(core, 1, NULL, page_bytes);
	tell(client, REGION, 0);
	context = start(core, 2, client, page_bytes);
	CHECK_EQ(overlay_count(core, client), 0); /* what is in the session's own files is in the window */
	CHECK_EQ(gmem_pool_create(core, client->client->session, &args, &pool), 0);
	open_pool(core, client, pool, true);
	tell(client, WRITE, 100);
	id = context->client->context;
	va = context->va = client->va;

	/* nothing is put there before it says that it has it mapped */
	CHECK_EQ(acquire(core, context, 0, PAGES, true), -EBUSY);
	CHECK_EQ(gmem_prefetch(core, client->client->session, DEVICE, va, half), 0);
	CHECK_EQ(gmem_context_overlay(core, id, va + 1, page_bytes), -EINVAL);
	CHECK_EQ(gmem_context_overlay(core, id, va, 0), -EINVAL);
	CHECK_EQ(gmem_context_overlay(core, id, va, 2 * PAGES * page_bytes), -EINVAL); /* beyond the region */
	CHECK_EQ(gmem_context_overlay(core, 12345, va, page_bytes), -ENOENT);
	context->map = overlay_of(core, client);
	CHECK_EQ(context->map.bytes, PAGES * page_bytes);
	CHECK(!context->map.read_only);
	tell(context, MAP, 0);
	CHECK_EQ(gmem_context_overlay(core, id, va, half), 0);
	CHECK_EQ(acquire(core, context, 0, PAGES / 2, true), 0);
	CHECK_EQ(acquire(core, context, PAGES / 2, 1, true), -EBUSY);
	CHECK_EQ(gmem_context_overlay(core, id, va, PAGES * page_bytes), 0); /* takes the place of the half */
	CHECK_EQ(acquire(core, context, 0, PAGES, true), 0);
	CHECK_EQ(tell(context, SUM, 0), expected(100));
	tell(context, WRITE, 200);
	CHECK_EQ(tell(client, SUM, 0), expected(200));

	/* another context that comes later, and one of a session that may only read */
	other = start(core, 3, client, page_bytes);
	cover(core, client, other);
	CHECK_EQ(tell(other, SUM, 0), expected(200));
	leave(other);
	open_pool(core, reader, pool, false);
	CHECK_EQ(overlay_of(core, reader).read_only, true);
	other = start(core, 3, reader, page_bytes);
	cover(core, reader, other);
	CHECK_EQ(tell(other, SUM, 0), expected(200));
	CHECK_EQ(acquire(core, other, 0, 1, true), -EACCES);

	/* the window again: what is mapped there now is another file */
	CHECK_EQ(gmem_context_uncover(core, id, va + 1, page_bytes), -EINVAL);
	CHECK_EQ(gmem_context_uncover(core, id, 4096, page_bytes), -EINVAL);
	CHECK_EQ(gmem_context_uncover(core, id, va, 1ull << 50), -EINVAL);
	CHECK_EQ(gmem_context_uncover(core, 12345, va, page_bytes), -ENOENT);
	tell(context, RESTORE, 0);
	CHECK_EQ(gmem_context_uncover(core, id, va, PAGES * page_bytes), 0);
	CHECK_EQ(acquire(core, context, 0, 1, true), -EBUSY);
	tell(client, WRITE, 300);
	CHECK_EQ(tell(other, SUM, 0), expected(300));
	leave(other);
	leave(context);
	leave(reader);
	leave(client);
	core_settle(core);
	gmem_core_destroy(core);
}

static bool heard(struct gmem_core *core, uint32_t type, uint64_t va, uint64_t value)
{
	struct gmem_event events[64];
	size_t count = gmem_event_read(core, events, 64);

	for (size_t i = 0; i < count; i++)
		if (events[i].type == type && events[i].va == va && events[i].value == value)
			return true;
	return false;
}

/* A context that touches a pool which it has not mapped finds the window there: that is not the pool, and it is ended. */
static void run_unmapped(void)
{
	struct gmem_core *core = core_start((struct gmem_core_config){ .event_fork = true });
	struct gmem_pool_args args = { .memory = { .bytes = PAGES * 4096, .page_bytes = 4096 } };
	struct puppet *client, *context;
	uint64_t pool, id;
	int status;

	CHECK_EQ(attach_simgpu(core, "simgpu0", "capacity=64M"), DEVICE);
	client = start(core, 0, NULL, 4096);
	context = start(core, 1, client, 4096);
	CHECK_EQ(gmem_pool_create(core, client->client->session, &args, &pool), 0);
	open_pool(core, client, pool, true);
	tell(client, WRITE, 7);
	context->va = client->va;
	id = context->client->context;
	atomic_store(&context->order, SUM);
	status = client_wait(context->client);
	CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV);
	CHECK(heard(core, GMEM_EVENT_SEGV, client->va, id));
	CHECK_EQ(tell(client, SUM, 0), expected(7));
	leave(client);
	gmem_core_destroy(core);
}

/* A region that the program has moved out of the window, and one context that maps it there. */
static void run_moved(void)
{
	struct gmem_core *core = core_start((struct gmem_core_config){ .event_fork = true });
	struct puppet *client, *context;
	struct gmem_window window;
	uint64_t target;

	CHECK_EQ(attach_simgpu(core, "simgpu0", "capacity=64M"), DEVICE);
	gmem_core_window(core, &window);
	client = start(core, 0, NULL, 4096);
	context = start(core, 1, client, 4096);
	tell(client, REGION, 0);
	tell(client, WRITE, 40);
	target = window.base - (1ull << 30);
	tell(client, MOVE, target);
	CHECK_EQ(tell(client, SUM, 0), expected(40)); /* whose fault is behind the event */
	CHECK_EQ(overlay_of(core, client).va, target);
	CHECK(overlay_of(core, client).offset != target - window.base);
	cover(core, client, context);
	CHECK_EQ(tell(context, SUM, 0), expected(40));
	tell(context, WRITE, 50);
	CHECK_EQ(tell(client, SUM, 0), expected(50));
	leave(context);
	leave(client);
	gmem_core_destroy(core);
}

int main(void)
{
	puppets = shared_bytes(4 * sizeof(*puppets));
	run_pool(4096);
	run_pool(65536);
	run_unmapped();
	run_moved();
	printf("overlay: ok\n");
	return 0;
}
