/* SPDX-License-Identifier: Apache-2.0
 *
 * Memory of a device that makes its frames itself, behind the core: the cuda driver on the double of libcuda
 * (tests/gpu/double.c). The process of a context is played by a thread of the test (mapper.h), which reads and writes what
 * a kernel would.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "harness.h"
#include "mapper.h"
#include "tierops.h"

#define DOUBLE "build/gpu/libcuda-double.so"
#define PAGES 8
#define MANY 128 /* pages: 256 MiB */
#define DEVICE 1
#define LOST UINT64_MAX

enum order { IDLE, WRITE, CHECK_ALL, TOUCH, WRITE_MANY, CHECK_MANY, LEAVE };

/* What a client is told to do. page: PAGES: all of them. */
struct puppet {
	_Atomic int order;
	uint64_t va, small_va, many_va[2];
	uint64_t page, result;
	uint64_t version[PAGES]; /* 0: zeros; LOST: not to be touched */
	uint64_t owner;          /* so that two have nothing in common */
	struct client *client;   /* daemon side */
};

static struct puppet *puppets;
static struct mapper mappers[2];
static sigjmp_buf escape;

static void on_signal(int sig)
{
	siglongjmp(escape, sig);
}

static uint64_t key(const struct puppet *puppet, uint64_t page)
{
	return puppet->owner * 100 + page;
}

static void *address(const struct puppet *puppet, uint64_t page)
{
	return (void *)(uintptr_t)(puppet->va + page * MIB2);
}

static bool is(const void *at, const struct puppet *puppet, uint64_t page)
{
	const uint64_t *words = at;

	if (puppet->version[page])
		return tier_is_filled(at, MIB2, key(puppet, page), puppet->version[page]);
	for (size_t i = 0; i < MIB2 / 8; i++)
		if (words[i])
			return false;
	return true;
}

static uint64_t count_right(const struct puppet *puppet)
{
	uint64_t right = 0;

	for (uint64_t page = 0; page < PAGES; page++)
		right += puppet->version[page] == LOST || is(address(puppet, page), puppet, page);
	return right;
}

static uint64_t *word_of_many(const struct puppet *puppet, uint64_t page)
{
	return (uint64_t *)(puppet->many_va[0] + page * MIB2 + page * 64);
}

static void write_many(struct client *client, struct puppet *puppet)
{
	for (int i = 0; i < 2 && !puppet->many_va[i]; i++)
		puppet->many_va[i] = (uint64_t)client_mmap(client, MANY * MIB2, MIB2, GMEM_FORK_SHARE);
	for (uint64_t page = 0; page < MANY; page++)
		*word_of_many(puppet, page) = page + 1;
}

static uint64_t count_many(const struct puppet *puppet)
{
	uint64_t right = 0;

	for (uint64_t page = 0; page < MANY; page++)
		right += *word_of_many(puppet, page) == page + 1;
	return right;
}

/* Which signal it gets; 0: none. */
static int touch(const struct puppet *puppet)
{
	int sig = sigsetjmp(escape, 1);

	if (!sig)
		(void)*(volatile uint64_t *)address(puppet, puppet->page);
	return sig;
}

static int play(struct client *client, void *arg)
{
	struct puppet *puppet = arg;

	signal(SIGBUS, on_signal);
	puppet->va = (uint64_t)client_mmap(client, PAGES * MIB2, MIB2, GMEM_FORK_SHARE);
	puppet->small_va = (uint64_t)client_mmap(client, 16 * KIB4, KIB4, GMEM_FORK_SHARE);
	for (;;) {
		switch (atomic_load(&puppet->order)) {
		case IDLE:
			sleep_ms(1);
			continue;
		case WRITE:
			tier_fill(address(puppet, puppet->page), MIB2, key(puppet, puppet->page), puppet->version[puppet->page]);
			break;
		case CHECK_ALL:
			puppet->result = count_right(puppet);
			break;
		case TOUCH:
			puppet->result = (uint64_t)touch(puppet);
			break;
		case WRITE_MANY:
			write_many(client, puppet);
			break;
		case CHECK_MANY:
			puppet->result = count_many(puppet);
			break;
		default:
			return 0;
		}
		atomic_store(&puppet->order, IDLE);
	}
}

static uint64_t tell(struct puppet *puppet, enum order order, uint64_t page)
{
	puppet->page = page;
	atomic_store(&puppet->order, order);
	while (atomic_load(&puppet->order) != IDLE)
		sleep_ms(1);
	return puppet->result;
}

static struct puppet *start(struct gmem_core *core, uint64_t owner)
{
	struct puppet *puppet = &puppets[owner];

	memset(puppet, 0, sizeof(*puppet));
	puppet->owner = owner;
	puppet->client = client_start(core, play, puppet);
	tell(puppet, CHECK_ALL, 0);
	return puppet;
}

static void write_all(struct puppet *puppet)
{
	for (uint64_t page = 0; page < PAGES; page++) {
		puppet->version[page]++;
		tell(puppet, WRITE, page);
	}
}

static void leave(struct puppet *puppet)
{
	atomic_store(&puppet->order, LEAVE);
	CHECK_EQ(client_wait(puppet->client), 0);
}

/* ---- the device's side ---- */

static uint64_t open_context(struct gmem_core *core, struct puppet *puppet, struct mapper *mapper)
{
	uint64_t context;
	int fd;

	CHECK_EQ(gmem_context_channel(core, puppet->client->session, DEVICE, puppet->client->pid, &context, &fd), 0);
	mapper_start(mapper, fd);
	return context;
}

static struct gmem_range pages(const struct puppet *puppet, uint64_t first, uint64_t count)
{
	return (struct gmem_range){ puppet->va + first * MIB2, count * MIB2 };
}

/* A kernel that finds what the client wrote, and writes the next version. */
static void run_kernel(struct gmem_core *core, uint64_t context, struct mapper *mapper, struct puppet *puppet, uint64_t page)
{
	struct gmem_range range = pages(puppet, page, 1);
	uint8_t *at;

	CHECK_EQ(gmem_acquire(core, context, &range, 1, true, 0), 0);
	at = mapper_at(mapper, range.va, true);
	CHECK(at && is(at, puppet, page));
	puppet->version[page]++;
	tier_fill(at, MIB2, key(puppet, page), puppet->version[page]);
	CHECK_EQ(gmem_release(core, context, &range, 1), 0);
}

static struct gmem_page_info info(struct gmem_core *core, const struct puppet *puppet, uint64_t page)
{
	struct gmem_page_info got;
	size_t count;

	do
		CHECK_EQ(gmem_query(core, puppet->client->session, puppet->va + page * MIB2, MIB2, &got, 1, &count), 0);
	while (got.state == GMEM_BUSY);
	return got;
}

static struct gmem_hnode_stats device_stats(struct gmem_core *core)
{
	struct gmem_hnode_stats hnodes[GMEM_HNODE_MAX];
	size_t count;

	gmem_hnodes(core, hnodes, &count);
	CHECK(count > DEVICE);
	return hnodes[DEVICE];
}

/* ---- cases ---- */

static struct gmem_core *begin(const char *words, const char *options)
{
	struct gmem_core *core;

	setenv("GMEM_CUDA_DOUBLE", words, 1);
	core = core_start((struct gmem_core_config){ .event_fork = true });
	CHECK_EQ(attach_builtin(core, "cuda", "cuda0", options), DEVICE);
	return core;
}

static void case_moves(void)
{
	struct gmem_core *core = begin("", "capacity=8M reserve=0 threads=2");
	struct puppet *puppet = start(core, 0);
	uint64_t session = puppet->client->session, context;
	struct gmem_range range, ranges[2];
	struct mapper *mapper = &mappers[0];

	write_all(puppet);
	context = open_context(core, puppet, mapper);
	/* written by the CPU, read and written by the device, read by the CPU */
	range = pages(puppet, 0, 1);
	CHECK_EQ(gmem_acquire(core, context, &range, 1, true, 0), 0);
	CHECK_EQ(info(core, puppet, 0).valid, 1 << DEVICE);
	CHECK_EQ(gmem_prefetch(core, session, GMEM_HOST, range.va, range.bytes), -EBUSY); /* it is held */
	CHECK(is(mapper_at(mapper, range.va, true), puppet, 0));
	CHECK_EQ(gmem_release(core, context, &range, 1), 0);
	CHECK_EQ(gmem_release(core, context, &range, 1), -EINVAL);
	run_kernel(core, context, mapper, puppet, 0);
	CHECK_EQ(tell(puppet, CHECK_ALL, 0), PAGES);
	CHECK_EQ(info(core, puppet, 0).valid, 1 << GMEM_HOST | 1 << DEVICE);
	CHECK(!mapper_at(mapper, range.va, true)); /* the copies must not part */
	CHECK_EQ(gmem_acquire(core, context, &range, 1, false, 0), 0);
	CHECK(is(mapper_at(mapper, range.va, false), puppet, 0) && !mapper_at(mapper, range.va, true));
	CHECK_EQ(gmem_release(core, context, &range, 1), 0);
	puppet->version[0]++;
	tell(puppet, WRITE, 0);
	CHECK_EQ(info(core, puppet, 0).valid, 1 << GMEM_HOST);
	CHECK(!mapper_at(mapper, range.va, false));
	/* twice the memory that it has */
	for (uint64_t round = 0; round < 3; round++)
		for (uint64_t page = 0; page < PAGES; page++)
			run_kernel(core, context, mapper, puppet, page);
	CHECK(device_stats(core).evictions >= 2 * PAGES);
	CHECK(device_stats(core).used_bytes <= 4 * MIB2);
	CHECK_EQ(tell(puppet, CHECK_ALL, 0), PAGES);
	/* two ranges at once, as many as there is room for, and too many */
	ranges[0] = pages(puppet, 0, 2);
	ranges[1] = pages(puppet, 5, 2);
	CHECK_EQ(gmem_acquire(core, context, ranges, 2, false, 0), 0);
	for (uint64_t page = 0; page < PAGES; page++)
		CHECK(!mapper_at(mapper, puppet->va + page * MIB2, false) == (page != 0 && page != 1 && page != 5 && page != 6));
	CHECK_EQ(gmem_release(core, context, ranges, 2), 0);
	range = pages(puppet, 0, 5);
	CHECK_EQ(gmem_acquire(core, context, &range, 1, true, 0), -ENOMEM);
	range = (struct gmem_range){ puppet->small_va, KIB4 };
	CHECK_EQ(gmem_acquire(core, context, &range, 1, true, 0), -EOPNOTSUPP); /* it has pages of 2 MiB only */
	/* there by request, home by request, and gone */
	CHECK_EQ(gmem_prefetch(core, session, DEVICE, puppet->va + 2 * MIB2, 3 * MIB2), 0);
	CHECK_EQ(info(core, puppet, 2).valid, 1 << DEVICE);
	CHECK_EQ(info(core, puppet, 4).valid, 1 << DEVICE);
	CHECK_EQ(gmem_prefetch(core, session, GMEM_HOST, puppet->va + 2 * MIB2, MIB2), 0);
	CHECK_EQ(gmem_discard(core, session, puppet->va + 3 * MIB2, MIB2), 0);
	puppet->version[3] = 0;
	CHECK_EQ(tell(puppet, CHECK_ALL, 0), PAGES);
	run_kernel(core, context, mapper, puppet, 3); /* of zeros */
	CHECK_EQ(gmem_device_detach(core, DEVICE, false), -EBUSY);
	CHECK_EQ(gmem_device_detach(core, DEVICE, true), 0);
	CHECK(mapper_has_ended(mapper));
	CHECK_EQ(tell(puppet, CHECK_ALL, 0), PAGES);
	CHECK_EQ(info(core, puppet, 3).valid, 1 << GMEM_HOST);
	mapper_end(mapper);
	leave(puppet);
	gmem_core_destroy(core);
}

/* Two sessions on a device that is too small for one; each finds its own, and what one leaves is not the other's. */
static void case_two_sessions(void)
{
	struct gmem_core *core = begin("", "capacity=8M reserve=2M threads=2");
	struct puppet *one = start(core, 0), *two = start(core, 1);
	uint64_t contexts[2];
	struct gmem_range range;

	write_all(one);
	contexts[0] = open_context(core, one, &mappers[0]);
	contexts[1] = open_context(core, two, &mappers[1]);
	for (uint64_t page = 0; page < PAGES; page++) {
		run_kernel(core, contexts[0], &mappers[0], one, page);
		run_kernel(core, contexts[1], &mappers[1], two, page); /* untouched memory is zero there */
	}
	CHECK_EQ(tell(one, CHECK_ALL, 0), PAGES);
	CHECK_EQ(tell(two, CHECK_ALL, 0), PAGES);
	range = pages(one, 0, 1);
	CHECK_EQ(gmem_acquire(core, contexts[1], &range, 1, false, 0), -EINVAL); /* not its memory */
	CHECK_EQ(gmem_context_detach(core, contexts[0]), 0);
	CHECK(mapper_has_ended(&mappers[0]));
	mapper_end(&mappers[0]);
	leave(one);
	core_settle(core);
	for (uint64_t page = 0; page < PAGES; page++)
		run_kernel(core, contexts[1], &mappers[1], two, page);
	CHECK_EQ(tell(two, CHECK_ALL, 0), PAGES);
	leave(two);
	CHECK(mapper_has_ended(&mappers[1]));
	mapper_end(&mappers[1]);
	CHECK_EQ(device_stats(core).used_bytes, 0);
	CHECK_EQ(device_stats(core).contexts, 0);
	gmem_core_destroy(core);
}

static bool heard(struct gmem_core *core, uint32_t type, uint64_t value)
{
	struct gmem_event events[64];
	size_t count = gmem_event_read(core, events, 64);

	for (size_t i = 0; i < count; i++)
		if (events[i].type == type && events[i].value == value)
			return true;
	return false;
}

/* A process that does not unmap when it is asked: it loses its context, and everybody else waits no longer than that. */
static void case_deaf(void)
{
	struct gmem_core *core = begin("", "capacity=8M reserve=0 threads=1 patience=200");
	struct puppet *bad = start(core, 0), *good = start(core, 1);
	uint64_t contexts[2];
	struct gmem_range range = pages(bad, 0, 4);

	write_all(bad);
	contexts[0] = open_context(core, bad, &mappers[0]);
	contexts[1] = open_context(core, good, &mappers[1]);
	CHECK_EQ(gmem_acquire(core, contexts[0], &range, 1, true, 0), 0);
	CHECK_EQ(gmem_release(core, contexts[0], &range, 1), 0);
	mapper_set_mood(&mappers[0], MAPPER_SILENT);
	for (uint64_t page = 0; page < PAGES; page++) /* needs the frames */
		run_kernel(core, contexts[1], &mappers[1], good, page);
	CHECK(mapper_has_ended(&mappers[0]));
	CHECK(gmem_acquire(core, contexts[0], &range, 1, true, 0) < 0);
	CHECK(heard(core, GMEM_EVENT_VIEW_GONE, contexts[0]));
	CHECK_EQ(tell(bad, CHECK_ALL, 0), PAGES); /* the CPU has all of it */
	CHECK_EQ(tell(good, CHECK_ALL, 0), PAGES);
	CHECK_EQ(device_stats(core).health, 0);
	leave(bad);
	leave(good);
	mapper_end(&mappers[0]);
	mapper_end(&mappers[1]);
	gmem_core_destroy(core);
}

/* The device is lost: what only it had is POISONED, never zero; the rest is served. */
static void case_lost(void)
{
	struct gmem_core *core = begin("once=cuMemcpyDtoHAsync_v2:1:700", "capacity=8M reserve=0 threads=1");
	struct puppet *puppet = start(core, 0);
	uint64_t context;

	write_all(puppet);
	context = open_context(core, puppet, &mappers[0]);
	run_kernel(core, context, &mappers[0], puppet, 2);
	CHECK_EQ(device_stats(core).health, 0);
	CHECK_EQ(tell(puppet, TOUCH, 2), SIGBUS);
	CHECK_EQ(info(core, puppet, 2).state, GMEM_POISONED);
	CHECK_EQ(device_stats(core).health, -EIO);
	for (uint64_t page = 0; page < PAGES; page++)
		CHECK_EQ(tell(puppet, TOUCH, page), page == 2 ? SIGBUS : 0);
	CHECK_EQ(gmem_discard(core, puppet->client->session, puppet->va + 2 * MIB2, MIB2), -EIO);
	CHECK_EQ(tell(puppet, TOUCH, 2), SIGBUS);
	puppet->version[2] = LOST;
	CHECK_EQ(tell(puppet, CHECK_ALL, 0), PAGES);
	leave(puppet);
	mapper_end(&mappers[0]);
	gmem_core_destroy(core);
}

/* ---- what moving 256 MiB costs, in calls ---- */

static unsigned long calls_of(const char *symbol)
{
	static unsigned long (*said)(const char *);

	if (!said)
		*(void **)&said = dlsym(dlopen(DOUBLE, RTLD_NOW | RTLD_NOLOAD), "gmem_double_calls");
	CHECK(said);
	return said(symbol);
}

/* Of the daemon, and of the context's process. */
struct cost {
	unsigned long copies, waits, creates, exports, accesses, maps, unmaps, batches;
};

static struct cost cost_now(void)
{
	return (struct cost){
		.copies = calls_of("cuMemcpyHtoDAsync_v2") + calls_of("cuMemcpyDtoHAsync_v2") + calls_of("cuMemcpyDtoDAsync_v2"),
		.waits = calls_of("cuEventSynchronize") + calls_of("cuStreamSynchronize"),
		.creates = calls_of("cuMemCreate"), .exports = calls_of("cuMemExportToShareableHandle"),
		.accesses = calls_of("cuMemSetAccess"), .maps = mapper_counts(&mappers[0]).maps,
		.unmaps = mapper_counts(&mappers[0]).unmaps, .batches = mapper_counts(&mappers[0]).batches,
	};
}

#define WITHIN(name)                                                                                                    \
	do {                                                                                                            \
		if (cost.name > most.name) {                                                                            \
			fprintf(stderr, "%s: %lu " #name ", at most %lu\n", what, cost.name, most.name);                \
			exit(1);                                                                                        \
		}                                                                                                       \
	} while (0)

static struct cost before;

static void at_most(const char *what, struct cost most)
{
	struct cost now = cost_now();
	struct cost cost = { now.copies - before.copies, now.waits - before.waits, now.creates - before.creates,
			     now.exports - before.exports, now.accesses - before.accesses, now.maps - before.maps,
			     now.unmaps - before.unmaps, now.batches - before.batches };

	WITHIN(copies);
	WITHIN(waits);
	WITHIN(creates);
	WITHIN(exports);
	WITHIN(accesses);
	WITHIN(maps);
	WITHIN(unmaps);
	WITHIN(batches);
	before = cost_now();
}

static void hold(struct gmem_core *core, uint64_t context, struct gmem_range range)
{
	CHECK_EQ(gmem_acquire(core, context, &range, 1, true, 0), 0);
	CHECK_EQ(gmem_release(core, context, &range, 1), 0);
}

static void case_calls(void)
{
	struct gmem_core *core = begin("", "capacity=280M reserve=0 threads=2");
	struct puppet *puppet = start(core, 0);
	uint64_t session = puppet->client->session, context;
	struct gmem_range many, more;

	tell(puppet, WRITE_MANY, 0);
	many = (struct gmem_range){ puppet->many_va[0], MANY * MIB2 };
	more = (struct gmem_range){ puppet->many_va[1], MANY * MIB2 };
	context = open_context(core, puppet, &mappers[0]);
	before = cost_now();
	CHECK_EQ(gmem_prefetch(core, session, DEVICE, many.va, many.bytes), 0);
	at_most("prefetch to the device, frames made for it", (struct cost){ .copies = 128, .waits = 264, .creates = 128, .exports = 128, .accesses = 128, .maps = 128, .batches = 6 });
	hold(core, context, many);
	at_most("acquire of what is there", (struct cost){ 0 });
	hold(core, context, many);
	at_most("acquire again", (struct cost){ 0 });
	CHECK_EQ(gmem_prefetch(core, session, GMEM_HOST, many.va, many.bytes), 0);
	at_most("prefetch to the host", (struct cost){ .copies = 128, .waits = 136, .unmaps = 128, .batches = 64 });
	CHECK_EQ(tell(puppet, CHECK_MANY, 0), MANY);
	hold(core, context, many);
	at_most("acquire of what the host has", (struct cost){ .copies = 128, .waits = 136, .maps = 128, .batches = 4 });
	hold(core, context, more);
	at_most("acquire, for which as much has to leave", (struct cost){ .copies = 128, .waits = 160, .creates = 12, .exports = 12, .accesses = 12, .maps = 128, .unmaps = 128,
								 .batches = 16 });
	CHECK_EQ(tell(puppet, CHECK_MANY, 0), MANY);
	leave(puppet);
	CHECK(mapper_has_ended(&mappers[0]));
	mapper_end(&mappers[0]);
	gmem_core_destroy(core);
}

/* Contexts of the two kinds are opened in two ways. */
static void case_refusals(void)
{
	struct gmem_core *core = begin("", "capacity=8M reserve=0 threads=1");
	struct puppet *puppet = start(core, 0);
	uint64_t session = puppet->client->session, context = 77;
	int fds[GMEM_CLASS_COUNT], fd = 88, simgpu = attach_simgpu(core, "simgpu0", "capacity=8M");

	CHECK_EQ(gmem_context_files(core, session, DEVICE, fds), -ENOTSUP);
	CHECK_EQ(gmem_context_attach(core, session, DEVICE, -1, -1, getpid(), &context), -ENOTSUP);
	CHECK_EQ(gmem_context_channel(core, session, simgpu, getpid(), &context, &fd), -ENOTSUP);
	CHECK_EQ(gmem_context_channel(core, session, GMEM_HOST, getpid(), &context, &fd), -ENODEV);
	CHECK_EQ(gmem_context_channel(core, session, 9, getpid(), &context, &fd), -ENODEV);
	CHECK_EQ(gmem_context_channel(core, 999, DEVICE, getpid(), &context, &fd), -ENOENT);
	CHECK_EQ(context, 77);
	CHECK_EQ(fd, 88);
	CHECK_EQ(device_stats(core).contexts, 0);
	leave(puppet);
	gmem_core_destroy(core);
}

/* In a process of its own: the double reads its words once. Nothing of that may close a descriptor that is not its own: the
 * memory of a device has none, and 0 is what a careless end of it would close. */
static void in_process(const char *name, void (*fn)(void))
{
	struct stat before, after;
	int status;
	pid_t pid;

	fflush(NULL);
	pid = fork();
	CHECK(pid >= 0);
	if (!pid) {
		int input = open("/dev/zero", O_RDONLY);

		CHECK(input >= 0 && dup2(input, 0) == 0);
		CHECK(!fstat(0, &before));
		fn();
		CHECK(!fstat(0, &after));
		CHECK(after.st_rdev == before.st_rdev && after.st_ino == before.st_ino);
		exit(0);
	}
	CHECK(waitpid(pid, &status, 0) == pid);
	if (status) {
		fprintf(stderr, "%s: status %#x\n", name, (unsigned)status);
		exit(1);
	}
}

int main(void)
{
	setenv("GMEM_LIBCUDA", DOUBLE, 1);
	puppets = shared_bytes(2 * sizeof(*puppets));
	in_process("moves", case_moves);
	in_process("two sessions", case_two_sessions);
	in_process("deaf", case_deaf);
	in_process("lost", case_lost);
	in_process("refusals", case_refusals);
	in_process("calls", case_calls);
	printf("devmem: ok\n");
	return 0;
}
