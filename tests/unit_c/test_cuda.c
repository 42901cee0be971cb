/* SPDX-License-Identifier: Apache-2.0
 *
 * The cuda driver on the double of libcuda (tests/gpu/double.c): its frames, its copy engine and its channels by
 * themselves, and then behind the core. The double reads what it is to do once, so each case is a process of its own.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <gmem/memfd.h>

#include "fdstore.h"
#include "harness.h"
#include "mapper.h"
#include "tierops.h"

#define DOUBLE "build/gpu/libcuda-double.so"
#define MIB (1ull << 20)
#define CASE_S 60

static char used_path[] = "/tmp/gmem-cuda-XXXXXX";
static const struct gmem_driver_ops *ops;

/* ---- what the tests look at ---- */

/* Bytes of the device that all processes have. */
static uint64_t device_used(void)
{
	uint64_t used = 0;
	int fd = open(used_path, O_RDONLY | O_CLOEXEC);

	CHECK(fd >= 0);
	CHECK(read(fd, &used, sizeof(used)) >= 0);
	close(fd);
	return used;
}

static bool comes_down_to(uint64_t bytes)
{
	for (int i = 0; i < 10000 && device_used() != bytes; i++)
		sleep_ms(1);
	return device_used() == bytes;
}

static unsigned thread_count(void)
{
	DIR *tasks = opendir("/proc/self/task");
	unsigned count = 0;

	CHECK(tasks);
	for (struct dirent *entry; (entry = readdir(tasks));)
		count += entry->d_name[0] != '.';
	closedir(tasks);
	return count;
}

/* A thread that was joined is shown for a moment still. */
static bool threads_come_down_to(unsigned count)
{
#ifdef __SANITIZE_THREAD__ /* has one of its own, which comes when it likes */
	return count;
#endif
	for (int i = 0; i < 5000 && thread_count() != count; i++)
		sleep_ms(1);
	return thread_count() == count;
}

static int copy(struct gmem_device *gpu, void *dst, const void *src, size_t bytes)
{
	const struct gmem_sg sg = { dst, src, bytes };
	gmem_fence_t fence = 1;
	int err = ops->copy(gpu, &sg, 1, 0, &fence);

	CHECK_EQ(fence, 0);
	return err;
}

static void write_page(struct gmem_device *gpu, struct gmem_mem *mem, uint64_t page, uint64_t version)
{
	uint8_t *host = malloc(MIB2);

	tier_fill(host, MIB2, page, version);
	CHECK_EQ(copy(gpu, ops->mem_at(mem, page * MIB2), host, MIB2), 0);
	free(host);
}

/* version 0: zeros. */
static bool page_is(struct gmem_device *gpu, struct gmem_mem *mem, uint64_t page, uint64_t version)
{
	uint64_t *host = malloc(MIB2);
	bool is = true;

	memset(host, 0x77, MIB2);
	CHECK_EQ(copy(gpu, host, ops->mem_at(mem, page * MIB2), MIB2), 0);
	if (version)
		is = tier_is_filled(host, MIB2, page, version);
	for (size_t i = 0; !version && i < MIB2 / 8; i++)
		is = is && !host[i];
	free(host);
	return is;
}

static struct gmem_mem *new_mem(struct gmem_device *gpu, uint64_t owner, uint64_t bytes)
{
	struct gmem_mem *mem;

	CHECK_EQ(ops->mem_create(gpu, owner, GMEM_CLASS_HUGE, bytes, &mem), 0);
	return mem;
}

static unsigned pages_there(struct gmem_mem *mem, uint64_t first, uint64_t count)
{
	unsigned there = 0;

	for (uint64_t page = first; page < first + count; page++)
		there += ops->mem_at(mem, page * MIB2) != NULL;
	return there;
}

/* ---- probing ---- */

static void case_options(void)
{
	tier_refused("threads=0", 0, -EINVAL, "threads");
	tier_refused("threads=17", 0, -EINVAL, "threads");
	tier_refused("patience=0", 0, -EINVAL, "patience");
	tier_refused("patience=3600001", 0, -EINVAL, "patience");
	tier_refused("device=1", 0, -ENODEV, "there is 1");
	tier_refused("capacity=2097151", 0, -EINVAL, "smaller than one page");
	tier_refused("capacity=2G", 0, -EINVAL, "less memory");
	tier_refused("colour=red", 0, -EINVAL, "colour");
	CHECK_EQ(device_used(), 0);
	setenv("GMEM_LIBCUDA", "/nowhere/libcuda.so", 1);
	tier_refused("", 0, -ENODEV, "no NVIDIA driver");
	setenv("GMEM_LIBCUDA", "libm.so.6", 1);
	tier_refused("", 0, -ENOSYS, "too old");
}

static void check_capacity(const char *options, uint64_t bytes)
{
	struct gmem_device *gpu = tier_attached(options, 0, NULL);
	struct gmem_device_info info;

	CHECK_EQ(ops->info(gpu, &info), 0);
	CHECK_EQ(info.capacity_bytes, bytes);
	CHECK_EQ(info.page_bytes_mask, MIB2);
	CHECK(info.caps & GMEM_CAP_OWN_FRAMES && !(info.caps & GMEM_CAP_REPLAYABLE));
	CHECK_EQ(ops->health(gpu), 0);
	ops->remove(gpu);
}

static void case_capacity_small(void)
{
	check_capacity("reserve=0", 512 * MIB); /* half of what is free: others want more than there is */
	check_capacity("reserve=0 capacity=5M", 4 * MIB);
}

static void case_capacity_large(void)
{
	check_capacity("reserve=0", 14336 * MIB); /* but 2 GiB */
}

/* A call fails once as the device is set up: that is refused with its name, leaves nothing, and the next try works. */
static const struct failing {
	const char *words;
	int err;
	const char *why;
} failing_probes[] = {
	{ "once=cuInit:1:100", -EIO, "cuInit" },
	{ "once=cuDeviceGetCount:1:2", -ENOMEM, "cuDeviceGetCount: CUDA_ERROR_OUT_OF_MEMORY (2)" },
	{ "once=cuDeviceGet:1:1", -EIO, "cuDeviceGet" },
	{ "once=cuDeviceGetName:1:1", -EIO, "cuDeviceGet" },
	{ "once=cuDeviceGetUuid_v2:1:1", -EIO, "cuDeviceGet" },
	{ "once=cuDeviceGetAttribute:2:1", -ENOTSUP, "virtual memory management" },
	{ "once=cuMemGetAllocationGranularity:1:1", -EIO, "cuMemGetAllocationGranularity" },
	{ "once=cuDevicePrimaryCtxRetain:1:1", -EIO, "cuDevicePrimaryCtxRetain" },
	{ "once=cuMemGetInfo_v2:1:1", -EIO, "cuMemGetInfo" },
	{ "once=cuStreamCreate:1:1", -EIO, "cuStreamCreate" },
	{ "once=cuStreamCreate:2:2", -ENOSPC, "cuStreamCreate" },
	{ "once=cuMemHostRegister_v2:2:1", -EIO, "cuMemHostRegister" },
	{ "once=cuEventCreate:3:1", -EIO, "cuEventCreate" },
	{ "once=cuStreamCreate:3:1", -EIO, "cuStreamCreate" },
	{ "once=cuMemAddressReserve:1:2", -ENOSPC, "cuMemAddressReserve" },
};
static const struct failing *failing;

static void case_failing_probe(void)
{
	unsigned threads = thread_count();
	struct gmem_device *gpu;

	tier_refused("capacity=8M reserve=2M threads=2", 0, failing->err, failing->why);
	CHECK(threads_come_down_to(threads));
	gpu = tier_attached("capacity=8M reserve=2M threads=2", 0, NULL);
	CHECK(comes_down_to(MIB2)); /* one made ahead */
	ops->remove(gpu);
	CHECK_EQ(device_used(), 0);
	CHECK(threads_come_down_to(threads));
}

/* ---- frames ---- */

static void case_frames(void)
{
	struct gmem_device *gpu = tier_attached("capacity=16M reserve=4M threads=2", 0, NULL);
	struct gmem_mem *a = new_mem(gpu, 1, 64 * MIB), *b = new_mem(gpu, 2, 64 * MIB);

	CHECK_EQ(ops->mem_alloc(a, 4096, MIB2, true), -EOPNOTSUPP);
	CHECK_EQ(ops->mem_alloc(a, 0, 4096, true), -EOPNOTSUPP);
	CHECK_EQ(pages_there(a, 0, 32), 0);
	CHECK_EQ(ops->mem_alloc(a, 2 * MIB2, 4 * MIB2, true), 0);
	CHECK_EQ(pages_there(a, 0, 32), 4);
	CHECK((uint8_t *)ops->mem_at(a, 2 * MIB2 + 100) == (uint8_t *)ops->mem_at(a, 2 * MIB2) + 100);
	for (uint64_t page = 2; page < 6; page++) {
		CHECK(page_is(gpu, a, page, 0)); /* the double's new memory is not zero */
		write_page(gpu, a, page, 1);
	}
	CHECK_EQ(ops->mem_alloc(a, 0, 4 * MIB2, true), 0); /* two of them are there, and stay as they are */
	CHECK(page_is(gpu, a, 0, 0) && page_is(gpu, a, 1, 0) && page_is(gpu, a, 2, 1) && page_is(gpu, a, 3, 1));
	CHECK_EQ(ops->mem_free(a, 0, 64 * MIB), 0);
	CHECK_EQ(pages_there(a, 0, 32), 0);
	CHECK_EQ(ops->mem_alloc(a, 2 * MIB2, 4 * MIB2, true), 0); /* what it had, and zeros again */
	for (uint64_t page = 2; page < 6; page++) {
		CHECK(page_is(gpu, a, page, 0));
		write_page(gpu, a, page, 2);
	}
	CHECK_EQ(ops->mem_free(a, 0, 64 * MIB), 0);

	/* another session's: all of the device, for which the first one's idle frames have to go; never with their content */
	CHECK_EQ(ops->mem_alloc(b, 0, 8 * MIB2, false), 0);
	for (uint64_t page = 0; page < 8; page++) {
		CHECK(page_is(gpu, b, page, 0));
		write_page(gpu, b, page, 3);
	}
	CHECK_EQ(device_used(), 16 * MIB);
	CHECK_EQ(ops->mem_alloc(a, 0, MIB2, true), -ENOSPC);
	CHECK_EQ(ops->mem_alloc(b, 8 * MIB2, MIB2, true), -ENOSPC);
	CHECK_EQ(pages_there(a, 0, 32) + pages_there(b, 8, 24), 0);
	CHECK_EQ(ops->mem_free(b, 6 * MIB2, 2 * MIB2), 0);
	CHECK_EQ(ops->mem_alloc(a, 0, 4 * MIB2, true), -ENOSPC); /* two would fit */
	CHECK_EQ(pages_there(a, 0, 32), 0);
	CHECK_EQ(ops->mem_alloc(a, 0, 2 * MIB2, true), 0);
	CHECK(page_is(gpu, a, 0, 0) && page_is(gpu, a, 1, 0));
	for (uint64_t page = 0; page < 6; page++)
		CHECK(page_is(gpu, b, page, 3));
	ops->mem_destroy(b);
	ops->remove(gpu); /* the other one outlives it */
	CHECK_EQ(device_used(), 2 * MIB2);
	ops->mem_destroy(a);
	CHECK_EQ(device_used(), 0);
}

/* Others have the device's memory, of which the core knows nothing. */
static void case_no_room(void)
{
	struct gmem_device *gpu = tier_attached("capacity=16M reserve=0 threads=1", 0, NULL);
	struct gmem_mem *a = new_mem(gpu, 1, 64 * MIB), *b = new_mem(gpu, 2, 64 * MIB);

	CHECK_EQ(ops->mem_alloc(a, 0, 6 * MIB2, true), -ENOSPC);
	CHECK_EQ(pages_there(a, 0, 32), 0);
	tier_says("no room", ops->last_error(gpu), "cuMemCreate: CUDA_ERROR_OUT_OF_MEMORY (2)");
	CHECK_EQ(ops->health(gpu), 0);
	CHECK_EQ(ops->mem_alloc(b, 0, 4 * MIB2, true), 0); /* what the first one has left over goes */
	CHECK_EQ(ops->mem_alloc(b, 4 * MIB2, MIB2, true), -ENOSPC);
	ops->mem_destroy(a);
	ops->mem_destroy(b);
	ops->remove(gpu);
	CHECK_EQ(device_used(), 0);
}

/* A session that does not use what it had gives most of it back by itself. */
static void case_idle(void)
{
	struct gmem_device *gpu = tier_attached("capacity=128M reserve=2M threads=1", 0, NULL);
	struct gmem_mem *mem = new_mem(gpu, 1, 128 * MIB);

	CHECK_EQ(ops->mem_alloc(mem, 0, 40 * MIB2, false), 0);
	CHECK_EQ(ops->mem_free(mem, 0, 40 * MIB2), 0);
	CHECK(device_used() >= 40 * MIB2);
	CHECK(comes_down_to((32 + 1) * MIB2)); /* 32 it may keep, one is made ahead */
	CHECK_EQ(ops->mem_alloc(mem, 0, 40 * MIB2, true), 0);
	CHECK(page_is(gpu, mem, 39, 0));
	ops->mem_destroy(mem);
	ops->remove(gpu);
	CHECK_EQ(device_used(), 0);
}

static const struct failing failing_frames[] = {
	{ "once=cuMemCreate:1:1", -EIO, "cuMemCreate" },
	{ "once=cuMemExportToShareableHandle:1:1", -EIO, "cuMemExportToShareableHandle" },
	{ "once=cuMemMap:1:1", -EIO, "cuMemMap" },
	{ "once=cuMemSetAccess:1:1", -EIO, "cuMemSetAccess" },
	{ "once=cuMemsetD8Async:1:1", -EIO, "cuMemsetD8Async" },
	{ "once=cuStreamSynchronize:1:1", -EIO, "cuMemsetD8Async" },
	{ "once=cuMemCreate:3:1", -EIO, "cuMemCreate" }, /* the third of four */
};

static void case_failing_frame(void)
{
	struct gmem_device *gpu = tier_attached("capacity=16M reserve=0 threads=1", 0, NULL);
	struct gmem_mem *mem = new_mem(gpu, 1, 64 * MIB);

	CHECK_EQ(ops->mem_alloc(mem, 0, 4 * MIB2, true), failing->err);
	tier_says(failing->words, ops->last_error(gpu), failing->why);
	CHECK_EQ(pages_there(mem, 0, 32), 0);
	CHECK_EQ(ops->health(gpu), 0);
	CHECK_EQ(ops->mem_alloc(mem, 0, 8 * MIB2, true), 0); /* no number was lost */
	for (uint64_t page = 0; page < 8; page++)
		CHECK(page_is(gpu, mem, page, 0));
	ops->mem_destroy(mem);
	ops->remove(gpu);
	CHECK_EQ(device_used(), 0);
}

/* What can't be made zero is not given out. */
static void case_failing_scrub(void)
{
	struct gmem_device *gpu = tier_attached("capacity=2M reserve=0 threads=1", 0, NULL);
	struct gmem_mem *mem = new_mem(gpu, 1, 64 * MIB);

	CHECK_EQ(ops->mem_alloc(mem, 0, MIB2, true), 0);
	write_page(gpu, mem, 0, 1);
	CHECK_EQ(ops->mem_free(mem, 0, MIB2), 0);
	CHECK_EQ(ops->mem_alloc(mem, MIB2, MIB2, true), -EIO);
	CHECK_EQ(pages_there(mem, 0, 32), 0);
	CHECK_EQ(ops->mem_alloc(mem, MIB2, MIB2, true), 0);
	CHECK(page_is(gpu, mem, 1, 0));
	ops->mem_destroy(mem);
	ops->remove(gpu);
}

/* ---- the copy engine ---- */

#define ODD (5 * MIB + 12345)

static void case_copies(void)
{
	struct gmem_device *gpu = tier_attached("capacity=32M reserve=0 threads=3", 0, NULL);
	struct gmem_mem *mem = new_mem(gpu, 1, 32 * MIB);
	uint8_t *from = malloc(8 * MIB), *to = malloc(8 * MIB);
	struct gmem_sg sg[200];
	gmem_fence_t fence;
	size_t count = 0;

	CHECK_EQ(ops->mem_alloc(mem, 0, 16 * MIB2, true), 0);
	tier_fill(from, 8 * MIB, 5, 1);
	/* in, from page to page, and out again, in pieces of every kind; frames are in a row only by chance */
	for (uint64_t page = 0; page < 4; page++)
		CHECK_EQ(copy(gpu, ops->mem_at(mem, page * MIB2), from + page * MIB2, MIB2), 0);
	for (uint64_t page = 0; page < 4; page++)
		CHECK_EQ(copy(gpu, ops->mem_at(mem, (8 + page) * MIB2), ops->mem_at(mem, page * MIB2), MIB2), 0);
	for (uint64_t page = 0; page < 4; page++)
		sg[count++] = (struct gmem_sg){ to + page * MIB2, ops->mem_at(mem, (8 + page) * MIB2), MIB2 };
	CHECK_EQ(ops->copy(gpu, sg, count, 0, &fence), 0);
	CHECK(!memcmp(from, to, 8 * MIB));
	/* many odd ones, and some that are the host's alone */
	memset(to, 0, 8 * MIB);
	count = 0;
	for (uint64_t at = 0; at < MIB2; at += 20011) {
		size_t bytes = MIB2 - at < 20011 ? MIB2 - at : 20011;

		sg[count] = (struct gmem_sg){ to + at, (uint8_t *)ops->mem_at(mem, 9 * MIB2) + at, bytes };
		if (count % 5 == 4)
			sg[count].src = from + MIB2 + at;
		count++;
	}
	CHECK_EQ(ops->copy(gpu, sg, count, 0, &fence), 0);
	CHECK(!memcmp(from + MIB2, to, MIB2));
	fence = 1;
	CHECK_EQ(ops->copy(gpu, sg, 0, 0, &fence), 0);
	CHECK_EQ(fence, 0);
	free(from);
	free(to);
	ops->mem_destroy(mem);
	ops->remove(gpu);
}

#define COPIERS 4
#define ROUNDS 20

struct copier {
	struct gmem_device *gpu;
	struct gmem_mem *mem;
	uint64_t page;
};

static void *copy_often(void *arg)
{
	struct copier *copier = arg;

	for (uint64_t round = 1; round <= ROUNDS; round++) {
		write_page(copier->gpu, copier->mem, copier->page, round);
		CHECK(page_is(copier->gpu, copier->mem, copier->page, round));
	}
	return NULL;
}

static void case_concurrent_copies(void)
{
	struct gmem_device *gpu = tier_attached("capacity=8M reserve=0 threads=2", 0, NULL);
	struct gmem_mem *mem = new_mem(gpu, 1, 8 * MIB);
	struct copier copiers[COPIERS];
	pthread_t threads[COPIERS];

	CHECK_EQ(ops->mem_alloc(mem, 0, COPIERS * MIB2, true), 0);
	for (int i = 0; i < COPIERS; i++) {
		copiers[i] = (struct copier){ gpu, mem, (uint64_t)i };
		CHECK(!pthread_create(&threads[i], NULL, copy_often, &copiers[i]));
	}
	for (int i = 0; i < COPIERS; i++)
		CHECK(!pthread_join(threads[i], NULL));
	ops->mem_destroy(mem);
	ops->remove(gpu);
}

/* A client's page that has gone meanwhile is an answer. */
__attribute__((unused)) static void case_page_gone(void)
{
	struct gmem_device *gpu = tier_attached("capacity=4M reserve=0 threads=2", 0, NULL);
	struct gmem_mem *mem = new_mem(gpu, 1, 4 * MIB);
	int fd = memfd_create("client", MFD_CLOEXEC);
	uint8_t *at = mmap(NULL, MIB2, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	CHECK(at != MAP_FAILED && !ftruncate(fd, MIB2 / 2));
	CHECK_EQ(gmem_copy_guard_init(), 0);
	CHECK_EQ(ops->mem_alloc(mem, 0, MIB2, true), 0);
	write_page(gpu, mem, 0, 1);
	CHECK_EQ(copy(gpu, ops->mem_at(mem, 0), at, MIB2), -EFAULT);
	CHECK_EQ(copy(gpu, at, ops->mem_at(mem, 0), MIB2), -EFAULT);
	CHECK_EQ(ops->health(gpu), 0);
	write_page(gpu, mem, 0, 2);
	CHECK(page_is(gpu, mem, 0, 2));
	close(fd);
	ops->mem_destroy(mem);
	ops->remove(gpu);
}

/* A copy that fails once is done again; the calls are the third page's. */
static const struct failing failing_copies[] = {
	{ "once=cuMemcpyHtoDAsync_v2:9:1", 0, "cuMemcpyAsync" },
	{ "once=cuEventRecord:9:1", 0, "cuEventRecord" },
	{ "fail=cuMemcpyHtoDAsync_v2:9:1", -EIO, "cuMemcpyAsync" },
	{ "fail=cuEventRecord:9:1", -EIO, "cuEventRecord" },
	{ "fail=cuEventSynchronize:9:1", -EIO, "cuEventSynchronize" },
};

static void case_failing_copy(void)
{
	struct gmem_device *gpu = tier_attached("capacity=4M reserve=0 threads=1", 0, NULL); /* pieces of 2 MiB: a call a page */
	struct gmem_mem *mem = new_mem(gpu, 1, 4 * MIB);
	uint8_t *host = malloc(MIB2);

	CHECK_EQ(ops->mem_alloc(mem, 0, MIB2, true), 0);
	for (uint64_t n = 1; n <= 8; n++)
		write_page(gpu, mem, 0, n);
	tier_fill(host, MIB2, 0, 9);
	CHECK_EQ(copy(gpu, ops->mem_at(mem, 0), host, MIB2), failing->err);
	tier_says(failing->words, ops->last_error(gpu), failing->why);
	CHECK_EQ(ops->health(gpu), 0);
	if (!failing->err)
		CHECK(page_is(gpu, mem, 0, 9));
	free(host);
	ops->mem_destroy(mem);
	ops->remove(gpu);
	CHECK_EQ(device_used(), 0);
}

/* The device is lost: what it had is damaged for good, what was to go there is where it was. */
static void case_lost(void)
{
	struct gmem_device *gpu = tier_attached("capacity=4M reserve=0 threads=2", 0, NULL);
	struct gmem_mem *mem = new_mem(gpu, 1, 4 * MIB);
	uint8_t *host = calloc(1, MIB2);

	CHECK_EQ(ops->mem_alloc(mem, 0, MIB2, true), 0);
	write_page(gpu, mem, 0, 1);
	CHECK_EQ(ops->health(gpu), 0);
	CHECK_EQ(copy(gpu, host, ops->mem_at(mem, 0), MIB2), -EBADMSG);
	CHECK_EQ(ops->health(gpu), -EIO);
	tier_says("lost", ops->last_error(gpu), "ILLEGAL_ADDRESS");
	CHECK_EQ(copy(gpu, ops->mem_at(mem, 0), host, MIB2), -EIO);
	CHECK_EQ(copy(gpu, host, ops->mem_at(mem, 0), MIB2), -EBADMSG);
	CHECK_EQ(ops->mem_alloc(mem, MIB2, MIB2, true), -EIO);
	free(host);
	ops->mem_destroy(mem);
	ops->remove(gpu);
}

/* ---- channels ---- */

static struct mapper mappers[2];

static struct gmem_pmap *open_context(struct gmem_device *gpu, uint64_t session, struct mapper *mapper)
{
	struct gmem_pmap *pmap;
	int pair[2];

	CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair));
	CHECK_EQ(ops->pmap_open(gpu, session, pair[0], &pmap), 0);
	mapper_start(mapper, pair[1]);
	CHECK(!memcmp(mapper->hello.uuid, "gmem test double", 16));
	CHECK_EQ(mapper->hello.frame_bytes, MIB2);
	return pmap;
}

static void close_context(struct gmem_pmap *pmap, struct mapper *mapper)
{
	ops->pmap_destroy(pmap);
	CHECK(mapper_has_ended(mapper)); /* which tells its process to let go of everything */
	CHECK_EQ(mapper_holds(mapper), 0);
	mapper_end(mapper);
}

static uint64_t va_of(uint64_t page)
{
	return 0x670000000000 + page * MIB2;
}

static int map(struct gmem_pmap *pmap, struct gmem_mem *mem, uint64_t page, uint64_t count, uint64_t at, enum gmem_prot prot)
{
	return ops->pmap_map(pmap, (struct gmem_range){ va_of(at), count * MIB2 }, mem, page * MIB2, prot);
}

static struct gmem_range pages(uint64_t first, uint64_t count)
{
	return (struct gmem_range){ va_of(first), count * MIB2 };
}

/* What the context has there is that page, and all of it. */
static bool sees(struct mapper *mapper, uint64_t at, uint64_t page, uint64_t version)
{
	const uint8_t *memory = mapper_at(mapper, va_of(at), false);

	return memory && tier_is_filled(memory, MIB2, page, version);
}

static void case_channel(void)
{
	struct gmem_device *gpu = tier_attached("capacity=160M reserve=0 threads=1", 0, NULL);
	struct gmem_mem *mem = new_mem(gpu, 1, 256 * MIB);
	struct mapper *one = &mappers[0], *two = &mappers[1];
	struct gmem_pmap *first = open_context(gpu, 1, one), *second = open_context(gpu, 1, two);
	struct mapper_counts counts;

	CHECK_EQ(one->hello.frame_count, 512); /* of all of the device: a successor's capacity may be larger */
	CHECK_EQ(ops->mem_alloc(mem, 0, 70 * MIB2, false), 0);
	for (uint64_t page = 0; page < 4; page++)
		write_page(gpu, mem, page, 1);
	CHECK_EQ(map(first, mem, 0, 1, 0, GMEM_PROT_WRITE), 0);
	CHECK_EQ(ops->pmap_map(first, (struct gmem_range){ va_of(1) + 4096, MIB2 }, mem, 0, GMEM_PROT_WRITE), -EOPNOTSUPP);
	CHECK_EQ(ops->pmap_map(first, (struct gmem_range){ 1ull << 47, MIB2 }, mem, 0, GMEM_PROT_WRITE), -EOPNOTSUPP);
	CHECK_EQ(map(first, mem, 70, 1, 70, GMEM_PROT_WRITE), -ENOENT); /* it has no frame */
	/* 140 steps: three batches; all of it is there when flush returns */
	CHECK_EQ(map(first, mem, 0, 70, 0, GMEM_PROT_WRITE), 0);
	CHECK_EQ(ops->pmap_flush(first), 0);
	counts = mapper_counts(one);
	CHECK_EQ(counts.imports, 70);
	CHECK_EQ(counts.maps, 70);
	CHECK_EQ(counts.batches, 3);
	for (uint64_t page = 0; page < 4; page++)
		CHECK(sees(one, page, page, 1) && mapper_at(one, va_of(page), true));
	/* what is there is not done again */
	CHECK_EQ(map(first, mem, 0, 70, 0, GMEM_PROT_READ), 0);
	CHECK_EQ(ops->pmap_flush(first), 0);
	CHECK_EQ(mapper_counts(one).batches, 3);

	/* the other one reads: the first must not write any more */
	CHECK_EQ(ops->pmap_protect(first, pages(0, 2), GMEM_PROT_WRITE), -EOPNOTSUPP);
	CHECK_EQ(ops->pmap_protect(first, pages(0, 2), GMEM_PROT_READ), 0);
	CHECK(!mapper_at(one, va_of(0), true) && !mapper_at(one, va_of(1), true) && mapper_at(one, va_of(2), true));
	CHECK_EQ(map(second, mem, 0, 2, 0, GMEM_PROT_READ), 0);
	CHECK_EQ(map(first, mem, 0, 1, 0, GMEM_PROT_READ), 0);
	CHECK_EQ(ops->pmap_flush(first) | ops->pmap_flush(second), 0);
	CHECK(sees(one, 0, 0, 1) && sees(two, 0, 0, 1) && sees(two, 1, 1, 1));
	CHECK(!mapper_at(one, va_of(0), true) && !mapper_at(two, va_of(0), true));
	CHECK_EQ(mapper_counts(one).imports, 70); /* once */
	/* protecting takes what is writable away, and leaves what can only be read */
	CHECK_EQ(ops->pmap_protect(second, pages(0, 2), GMEM_PROT_READ), 0);
	CHECK(sees(two, 0, 0, 1));
	CHECK_EQ(ops->pmap_map(second, pages(0, 1), mem, 0, GMEM_PROT_WRITE), 0);
	CHECK_EQ(ops->pmap_flush(second), 0);
	CHECK_EQ(mapper_counts(two).protects, 1);
	mapper_at(two, va_of(0), true)[0] ^= 0xff; /* and what it writes is what the device has */
	CHECK(!page_is(gpu, mem, 0, 1));
	mapper_at(two, va_of(0), true)[0] ^= 0xff;
	CHECK(page_is(gpu, mem, 0, 1));

	/* a page at another address, and another page at that one */
	CHECK_EQ(map(second, mem, 0, 1, 9, GMEM_PROT_WRITE), 0);
	CHECK_EQ(map(second, mem, 2, 1, 1, GMEM_PROT_WRITE), 0);
	CHECK_EQ(ops->pmap_flush(second), 0);
	CHECK(!mapper_at(two, va_of(0), false) && sees(two, 9, 0, 1) && sees(two, 1, 2, 1));
	CHECK_EQ(ops->pmap_release(second, pages(1, 1)), 0);
	CHECK_EQ(ops->pmap_flush(second), 0);
	CHECK(!mapper_at(two, va_of(1), false));

	/* frames that go are taken away everywhere before that returns; they stay with their session, so nobody lets go */
	CHECK_EQ(ops->mem_free(mem, 0, 70 * MIB2), 0);
	for (uint64_t page = 0; page < 70; page++)
		CHECK(!mapper_at(one, va_of(page), false) && !mapper_at(two, va_of(page), false));
	CHECK_EQ(mapper_counts(one).forgets + mapper_counts(two).forgets, 0);
	CHECK_EQ(mapper_holds(one), 70);
	ops->mem_destroy(mem); /* and with its end they do */
	CHECK_EQ(mapper_holds(one) + mapper_holds(two), 0);
	CHECK_EQ(device_used(), 0);
	close_context(first, one);
	close_context(second, two);
	ops->remove(gpu);
}

/* More batches than may be in flight: the queue waits for answers, and the order stays. */
static void case_many_batches(void)
{
	struct gmem_device *gpu = tier_attached("capacity=4M reserve=0 threads=1", 0, NULL);
	struct gmem_mem *mem = new_mem(gpu, 1, 4 * MIB);
	struct gmem_pmap *pmap = open_context(gpu, 1, &mappers[0]);

	CHECK_EQ(ops->mem_alloc(mem, 0, 2 * MIB2, false), 0);
	write_page(gpu, mem, 0, 1);
	write_page(gpu, mem, 1, 1);
	for (uint64_t n = 0; n < 1500; n++) /* each takes the page before away */
		CHECK_EQ(map(pmap, mem, n % 2, 1, 5, GMEM_PROT_WRITE), 0);
	CHECK_EQ(ops->pmap_flush(pmap), 0);
	CHECK(sees(&mappers[0], 5, 1, 1));
	CHECK(mapper_counts(&mappers[0]).batches > 2 * 16);
	close_context(pmap, &mappers[0]);
	ops->mem_destroy(mem);
	ops->remove(gpu);
}

/* What processes of another session could once reach is never the owner's again. */
static void case_foreign(void)
{
	struct gmem_device *gpu = tier_attached("capacity=8M reserve=0 threads=1", 0, NULL);
	struct gmem_mem *mem = new_mem(gpu, 1, 8 * MIB);
	struct gmem_pmap *own = open_context(gpu, 1, &mappers[0]), *foreign = open_context(gpu, 2, &mappers[1]);

	CHECK_EQ(ops->mem_alloc(mem, 0, 2 * MIB2, true), 0);
	CHECK_EQ(map(own, mem, 0, 2, 0, GMEM_PROT_WRITE), 0);
	CHECK_EQ(map(foreign, mem, 0, 1, 0, GMEM_PROT_READ), 0);
	CHECK_EQ(ops->pmap_flush(own) | ops->pmap_flush(foreign), 0);
	CHECK_EQ(ops->mem_free(mem, 0, 2 * MIB2), 0);
	CHECK_EQ(mapper_holds(&mappers[0]), 1);
	CHECK_EQ(mapper_holds(&mappers[1]), 0);
	CHECK_EQ(device_used(), MIB2);
	close_context(own, &mappers[0]);
	close_context(foreign, &mappers[1]);
	ops->mem_destroy(mem);
	ops->remove(gpu);
	CHECK_EQ(device_used(), 0);
}

/* A process that does not do what it is asked has nothing mapped, as far as the driver is concerned, and holds up nobody. */
static void check_mood(enum mapper_mood mood, const char *why)
{
	struct gmem_device *gpu = tier_attached("capacity=8M reserve=0 threads=1 patience=300", 0, NULL);
	struct gmem_mem *mem = new_mem(gpu, 1, 8 * MIB);
	struct gmem_pmap *bad = open_context(gpu, 1, &mappers[0]), *good = open_context(gpu, 1, &mappers[1]);

	CHECK_EQ(ops->mem_alloc(mem, 0, 2 * MIB2, true), 0);
	write_page(gpu, mem, 0, 1);
	CHECK_EQ(map(bad, mem, 0, 2, 0, GMEM_PROT_WRITE), 0);
	CHECK_EQ(ops->pmap_flush(bad), 0);
	CHECK_EQ(map(good, mem, 0, 1, 0, GMEM_PROT_READ), 0);
	CHECK_EQ(ops->pmap_flush(good), 0);
	mapper_set_mood(&mappers[0], mood);
	CHECK_EQ(ops->pmap_release(bad, pages(0, 1)), 0); /* is queued */
	CHECK_EQ(ops->pmap_flush(bad), -EOWNERDEAD);
	if (why)
		tier_says("mood", ops->last_error(gpu), why);
	CHECK(mapper_has_ended(&mappers[0]));
	CHECK_EQ(ops->pmap_flush(bad), -EOWNERDEAD);
	CHECK_EQ(map(bad, mem, 0, 1, 0, GMEM_PROT_READ), -EOWNERDEAD);
	CHECK_EQ(ops->pmap_release(bad, pages(0, 1)), -EOWNERDEAD);
	CHECK_EQ(ops->pmap_protect(bad, pages(0, 1), GMEM_PROT_READ), -EOWNERDEAD);
	CHECK(sees(&mappers[1], 0, 0, 1));
	CHECK_EQ(ops->mem_free(mem, 0, 2 * MIB2), 0);
	CHECK(!mapper_at(&mappers[1], va_of(0), false));
	CHECK_EQ(ops->health(gpu), 0);
	close_context(bad, &mappers[0]);
	close_context(good, &mappers[1]);
	ops->mem_destroy(mem);
	ops->remove(gpu);
	CHECK_EQ(device_used(), 0);
}

static void case_silent(void)
{
	check_mood(MAPPER_SILENT, "did not answer");
}

static void case_fails(void)
{
	check_mood(MAPPER_FAILS, "a context's process: CUDA_ERROR_OUT_OF_MEMORY (2)");
}

static void case_confused(void)
{
	check_mood(MAPPER_CONFUSED, NULL);
}

static void case_curt(void)
{
	check_mood(MAPPER_CURT, NULL);
}

static void case_leaves(void)
{
	check_mood(MAPPER_LEAVES, NULL);
}

/* So many descriptors are on their way, and stay there. */
static void fill_the_flight(int count)
{
	int pair[2];

	CHECK(!socketpair(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0, pair));
	for (int sent = 0, err = 0; !err; sent += !err) {
		char byte = 0;
		struct iovec part = { &byte, 1 };
		union {
			struct cmsghdr head;
			char room[CMSG_SPACE(sizeof(int))];
		} control = { .head = { .cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS } };
		struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = &control,
					  .msg_controllen = sizeof(control.room) };

		memcpy(CMSG_DATA(&control.head), &pair[0], sizeof(int));
		err = sendmsg(pair[1], &message, MSG_DONTWAIT) < 0 ? errno : 0;
		CHECK(err != EAGAIN && sent <= 2 * count);
	}
}

/* A frame whose descriptor could not be put away: it is exported again for each context that wants it. */
static void case_no_descriptor(void)
{
	struct gmem_device *gpu = tier_attached("capacity=4M reserve=0 threads=1", 0, NULL);
	struct gmem_mem *mem = new_mem(gpu, 1, 4 * MIB);
	struct gmem_pmap *own = open_context(gpu, 1, &mappers[0]), *other = open_context(gpu, 1, &mappers[1]);
	const struct rlimit few = { 64, 64 };

	/* the kernel lets nobody without privileges have more in flight than that: none, to begin with */
	CHECK(!setrlimit(RLIMIT_NOFILE, &few) && !setresuid(65534, 65534, 65534));
	fill_the_flight(64);
	CHECK_EQ(ops->mem_alloc(mem, 0, MIB2, true), 0); /* the first export: made with the frame */
	tier_says("put away", ops->last_error(gpu), "would not outlive gmemd");
	CHECK_EQ(map(own, mem, 0, 1, 0, GMEM_PROT_WRITE), 0);
	CHECK_EQ(map(other, mem, 0, 1, 0, GMEM_PROT_WRITE), -EIO); /* the second one fails */
	tier_says("export", ops->last_error(gpu), "cuMemExportToShareableHandle");
	CHECK_EQ(map(other, mem, 0, 1, 0, GMEM_PROT_WRITE), 0);
	CHECK_EQ(ops->health(gpu), 0);
	close_context(own, &mappers[0]);
	close_context(other, &mappers[1]);
	ops->mem_destroy(mem);
	ops->remove(gpu);
}

/* ---- a successor ----
 *
 * Lives of a driver, each a process that ends as by kill -9. The test holds what they have put away, and the other ends of
 * the channels of their contexts.
 */

static struct fdstore store;
static struct gmem_keep keep;
static struct gmem_driver_keep driver;
static const char *double_words; /* for the next life; NULL: as they are */
static int channels[2]; /* the driver's ends, of mappers[] */

static int take_over(const char *options, struct gmem_device **ret)
{
	struct gmem_kept_fd left[FDSTORE_MAX];

	fdstore_copy(&store, left);
	CHECK_EQ(gmem_keep_init(&keep, dup(store.daemons), FDSTORE_MAX, left, store.count), 0);
	gmem_driver_keep_init(&driver, &keep, 1);
	driver.takes_over = store.count;
	return tier_attach(options, 0, &driver, ret);
}

static struct gmem_device *taken_over(const char *options)
{
	struct gmem_device *gpu;

	if (take_over(options, &gpu)) {
		fprintf(stderr, "%s: %s\n", options, tier_message);
		exit(1);
	}
	return gpu;
}

static pid_t start_life(void (*fn)(void))
{
	pid_t pid;

	fflush(NULL);
	pid = fork();
	CHECK(pid >= 0);
	if (!pid) {
		alarm(CASE_S);
		if (double_words)
			setenv("GMEM_CUDA_DOUBLE", double_words, 1); /* it is loaded in each life anew */
		fn();
		_exit(0);
	}
	return pid;
}

static void end_life(pid_t pid)
{
	int status;

	while (waitpid(pid, &status, WNOHANG) != pid) {
		fdstore_take_all(&store);
		usleep(200);
	}
	fdstore_take_all(&store);
	if (status) {
		fprintf(stderr, "a life ended with %#x\n", (unsigned)status);
		exit(1);
	}
}

static void live(void (*fn)(void))
{
	end_life(start_life(fn));
}

static struct gmem_pmap *new_context(struct gmem_device *gpu, uint64_t session, int n)
{
	struct gmem_pmap *pmap;

	CHECK_EQ(ops->pmap_open(gpu, session, dup(channels[n]), &pmap), 0);
	return pmap;
}

static struct gmem_pmap *old_context(struct gmem_device *gpu, uint64_t session, int n)
{
	struct gmem_pmap *pmap;

	CHECK_EQ(ops->pmap_adopt(gpu, session, dup(channels[n]), &pmap), 0);
	return pmap;
}

#define OLD "capacity=32M reserve=4M threads=1"

/* Mems of two sessions, one of them of two classes, with holes; contexts with pages to write, to read, and without. */
static void life_first(void)
{
	struct gmem_device *gpu = taken_over(OLD);
	struct gmem_mem *mem = new_mem(gpu, 7, 64 * MIB), *small, *other = new_mem(gpu, 8, 64 * MIB);
	struct gmem_pmap *own = new_context(gpu, 7, 0), *foreign = new_context(gpu, 9, 1);

	CHECK_EQ(ops->mem_create(gpu, 7, GMEM_CLASS_SMALL, 64 * MIB, &small), 0);
	CHECK_EQ(ops->mem_alloc(mem, 3 * MIB2, 5 * MIB2, true), 0);
	CHECK_EQ(ops->mem_alloc(small, 3 * MIB2, 2 * MIB2, true), 0);
	CHECK_EQ(ops->mem_alloc(other, 0, 2 * MIB2, false), 0);
	for (uint64_t page = 3; page < 8; page++)
		write_page(gpu, mem, page, 1);
	write_page(gpu, small, 3, 2);
	write_page(gpu, other, 1, 3);
	CHECK_EQ(map(own, mem, 3, 5, 3, GMEM_PROT_WRITE), 0);
	CHECK_EQ(map(foreign, mem, 3, 1, 3, GMEM_PROT_READ), 0);
	CHECK_EQ(ops->pmap_flush(own) | ops->pmap_flush(foreign), 0);
	CHECK_EQ(ops->pmap_protect(own, pages(3, 1), GMEM_PROT_READ), 0);
	CHECK_EQ(ops->mem_free(mem, 5 * MIB2, MIB2), 0); /* it stays with its session, and in its process */
	CHECK_EQ(ops->pmap_release(own, pages(6, 1)), 0); /* is queued, and never said */
}

static void check_first(struct gmem_device *gpu, struct gmem_mem *mem, struct gmem_mem *small, struct gmem_mem *other)
{
	CHECK_EQ(pages_there(mem, 0, 32), 4);
	CHECK(!ops->mem_at(mem, 5 * MIB2));
	for (uint64_t page = 3; page < 8; page++)
		CHECK(page == 5 || page_is(gpu, mem, page, 1));
	CHECK(pages_there(small, 0, 32) == 2 && page_is(gpu, small, 3, 2) && page_is(gpu, small, 4, 0));
	CHECK(pages_there(other, 0, 32) == 2 && page_is(gpu, other, 0, 0) && page_is(gpu, other, 1, 3));
	CHECK_EQ(ops->health(gpu), 0);
}

/* All of it is there, and goes on as it was. */
static void life_second(void)
{
	struct gmem_device *gpu = taken_over(OLD);
	struct gmem_mem *mem = new_mem(gpu, 7, 64 * MIB), *other = new_mem(gpu, 8, 64 * MIB), *small;
	struct gmem_pmap *own = old_context(gpu, 7, 0), *foreign = old_context(gpu, 9, 1);

	CHECK(driver.restored);
	CHECK_EQ(ops->mem_create(gpu, 7, GMEM_CLASS_SMALL, 64 * MIB, &small), 0);
	ops->settle(gpu);
	check_first(gpu, mem, small, other);
	/* what was mapped is known: it is not done again, is taken away, and can be had again without an import */
	CHECK_EQ(map(own, mem, 6, 2, 6, GMEM_PROT_WRITE), 0);
	CHECK_EQ(ops->pmap_protect(own, pages(7, 1), GMEM_PROT_READ), 0);
	CHECK_EQ(map(own, mem, 3, 2, 3, GMEM_PROT_READ), 0);
	CHECK_EQ(ops->pmap_flush(own), 0);
	/* what the other session's process could reach goes for good */
	CHECK_EQ(ops->mem_free(mem, 3 * MIB2, MIB2), 0);
	CHECK_EQ(ops->pmap_flush(own) | ops->pmap_flush(foreign), 0);
	for (uint64_t page = 8; page < 16; page++) { /* and there is room for all that there can be */
		CHECK_EQ(ops->mem_alloc(mem, page * MIB2, MIB2, true), 0);
		CHECK(page_is(gpu, mem, page, 0));
		write_page(gpu, mem, page, 4);
	}
	CHECK_EQ(ops->mem_alloc(mem, 20 * MIB2, 2 * MIB2, true), -ENOSPC);
	CHECK_EQ(map(own, mem, 8, 8, 8, GMEM_PROT_WRITE), 0);
	CHECK_EQ(ops->pmap_flush(own), 0);
}

/* One session is over, and another one's process: what they had is free, and nobody else's. */
static void life_third(void)
{
	struct gmem_device *gpu = taken_over("capacity=40M reserve=0 threads=1");
	struct gmem_mem *mem = new_mem(gpu, 7, 64 * MIB), *fresh = new_mem(gpu, 20, 64 * MIB);
	struct gmem_pmap *own = old_context(gpu, 7, 0);

	ops->settle(gpu);
	CHECK_EQ(pages_there(mem, 0, 32), 11);
	for (uint64_t page = 8; page < 16; page++)
		CHECK(page_is(gpu, mem, page, 4));
	CHECK_EQ(ops->mem_alloc(fresh, 0, 9 * MIB2, true), 0);
	for (uint64_t page = 0; page < 9; page++)
		CHECK(page_is(gpu, fresh, page, 0));
	CHECK_EQ(ops->mem_alloc(fresh, 9 * MIB2, MIB2, true), -ENOSPC);
	ops->pmap_destroy(own);
	ops->mem_destroy(mem);
	ops->mem_destroy(fresh);
	ops->remove(gpu);
	gmem_driver_forget(&driver);
}

static void open_channels(void)
{
	for (int n = 0; n < 2; n++) {
		int pair[2];

		CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair));
		channels[n] = pair[0];
		mappers[n].fd = pair[1];
	}
}

static void close_channels(void)
{
	for (int n = 0; n < 2; n++) {
		close(channels[n]);
		CHECK(mapper_has_ended(&mappers[n]));
		mapper_end(&mappers[n]);
	}
}

/* The mapper reads the hello when it starts, so the first life is on its way then. */
static void begin_lives(void (*first)(void))
{
	pid_t pid;

	fdstore_open(&store);
	open_channels();
	pid = start_life(first);
	for (int n = 0; n < 2; n++)
		mapper_start(&mappers[n], mappers[n].fd);
	end_life(pid);
}

static void case_successor(void)
{
	begin_lives(life_first);
	CHECK(mapper_holds(&mappers[0]) == 5 && mapper_holds(&mappers[1]) == 1);
	live(life_second);
	CHECK_EQ(mapper_counts(&mappers[0]).lists, 1);
	CHECK(sees(&mappers[0], 6, 6, 1) && mapper_at(&mappers[0], va_of(6), true)); /* while it was written, nobody asked */
	CHECK(!mapper_at(&mappers[0], va_of(7), true));
	CHECK(sees(&mappers[0], 4, 4, 1) && sees(&mappers[0], 15, 15, 4));
	CHECK(!mapper_at(&mappers[0], va_of(3), false) && !mapper_at(&mappers[0], va_of(5), false));
	CHECK_EQ(mapper_holds(&mappers[1]), 0);
	CHECK_EQ(mapper_counts(&mappers[0]).imports, 5 + 8);
	live(life_third);
	CHECK(mapper_has_ended(&mappers[0]));
	CHECK_EQ(store.count, 0);
	close_channels();
	fdstore_close(&store);
}

static void life_finds_mem(void)
{
	struct gmem_device *gpu = taken_over(OLD);
	struct gmem_mem *mem = new_mem(gpu, 7, 64 * MIB), *other = new_mem(gpu, 8, 64 * MIB), *small;

	CHECK_EQ(ops->mem_create(gpu, 7, GMEM_CLASS_SMALL, 64 * MIB, &small), 0);
	ops->settle(gpu);
	check_first(gpu, mem, small, other);
}

static void life_finds_nothing(void)
{
	struct gmem_device *gpu = taken_over("capacity=32M reserve=0 threads=1");
	struct gmem_mem *mem = new_mem(gpu, 7, 64 * MIB);

	ops->settle(gpu);
	CHECK_EQ(pages_there(mem, 0, 32), 0);
	CHECK_EQ(ops->health(gpu), 0);
	CHECK_EQ(ops->mem_alloc(mem, 0, 16 * MIB2, true), 0);
	for (uint64_t page = 0; page < 16; page++)
		CHECK(page_is(gpu, mem, page, 0));
	gmem_keep_drop_left(&keep); /* which does not take what has been made since */
}

static void life_finds_zeros(void)
{
	struct gmem_device *gpu = taken_over(OLD);
	struct gmem_mem *mem = new_mem(gpu, 7, 64 * MIB);

	ops->settle(gpu);
	CHECK_EQ(pages_there(mem, 0, 32), 16);
}

static void life_refuses(void)
{
	struct gmem_device *gpu;

	CHECK_EQ(take_over(OLD, &gpu), -EPROTONOSUPPORT);
	tier_says("version", tier_message, "of version");
}

static void poke(off_t offset, uint32_t value)
{
	int fd = fdstore_find(&store, "driver.1.frames");

	CHECK(fd >= 0 && pwrite(fd, &value, sizeof(value), offset) == sizeof(value));
}

/* What another version has left is left to it; what is damaged is lost, and said to be. */
static void case_versions(void)
{
	size_t count;

	begin_lives(life_first);
	count = store.count;
	poke(8, 2);
	live(life_refuses);
	poke(8, 1);
	poke(12, 16);
	live(life_refuses);
	CHECK_EQ(store.count, count); /* nothing was given up */
	poke(12, 24);
	live(life_finds_mem);
	poke(0, 0x12345678);
	live(life_finds_nothing);
	live(life_finds_zeros);
	close_channels();
	fdstore_close(&store);
	begin_lives(life_first);
	poke(16, 7); /* as many frames as another GPU has */
	live(life_finds_nothing);
	close_channels();
	fdstore_close(&store);
	begin_lives(life_first);
	fdstore_forget(&store, "driver.1.frames");
	live(life_finds_nothing);
	close_channels();
	fdstore_close(&store);
	begin_lives(life_first);
	fdstore_forget(&store, "driver.1.b0");
	fdstore_forget(&store, "driver.1.b1"); /* of two threads that were the first */
	live(life_finds_nothing);
	close_channels();
	fdstore_close(&store);
}

/* Notes that make no sense: whoever they name gets nothing that is another's. */
static void life_finds_some(void)
{
	struct gmem_device *gpu = taken_over("capacity=32M reserve=0 threads=1");
	struct gmem_mem *mem = new_mem(gpu, 7, 64 * MIB);

	ops->settle(gpu);
	for (uint64_t page = 0; page < 32; page++)
		CHECK(!ops->mem_at(mem, page * MIB2) || page_is(gpu, mem, page, page == 5 ? 0 : 1));
	CHECK(pages_there(mem, 0, 32) < 4);
	CHECK_EQ(ops->mem_alloc(mem, 0, 16 * MIB2, true), 0);
}

static void life_finds_one(void)
{
	struct gmem_device *gpu = taken_over("capacity=32M reserve=0 threads=1");
	struct gmem_mem *mem = new_mem(gpu, 7, 64 * MIB);

	ops->settle(gpu);
	CHECK_EQ(pages_there(mem, 0, 32), 1);
	CHECK(ops->mem_at(mem, 3 * MIB2));
	CHECK_EQ(ops->mem_alloc(mem, 0, 16 * MIB2, true), 0);
}

static void case_damaged_notes(void)
{
	const off_t note = 4096;

	for (int n = 0; n < 4; n++) {
		begin_lives(life_first);
		for (uint32_t frame = 0; frame < 8; frame++) {
			if (n == 0)
				poke(note + frame * 24 + 12, 0x7fffffff); /* a place beyond */
			if (n == 1)
				poke(note + frame * 24 + 8, 4 << 8 | GMEM_CLASS_HUGE); /* several at one place: the first has it */
			if (n == 2)
				poke(note + frame * 24 + 16, 99); /* another generation */
			if (n == 3)
				poke(note + frame * 24 + 20, 0); /* not made */
		}
		live(n == 1 ? life_finds_one : life_finds_some);
		close_channels();
		fdstore_close(&store);
	}
}

/* Processes that do not say what they have, or say what can't be, lose their contexts; nobody else does. */
static void life_with_bad_context(void)
{
	struct gmem_device *gpu = taken_over("capacity=32M reserve=4M threads=1 patience=300");
	struct gmem_mem *mem = new_mem(gpu, 7, 64 * MIB);
	struct gmem_pmap *own = old_context(gpu, 7, 0), *foreign = old_context(gpu, 9, 1);

	ops->settle(gpu);
	CHECK_EQ(ops->pmap_flush(own), -EOWNERDEAD);
	CHECK_EQ(ops->pmap_flush(foreign), 0);
	CHECK_EQ(map(own, mem, 3, 1, 3, GMEM_PROT_READ), -EOWNERDEAD);
	CHECK(page_is(gpu, mem, 3, 1) && page_is(gpu, mem, 4, 1));
	CHECK_EQ(ops->mem_free(mem, 0, 64 * MIB), 0);
	CHECK_EQ(ops->health(gpu), 0);
}

static void case_bad_contexts(void)
{
	static const enum mapper_mood moods[] = { MAPPER_SILENT, MAPPER_FAILS, MAPPER_CURT, MAPPER_CONFUSED, MAPPER_LEAVES,
						  MAPPER_LIES };

	for (size_t n = 0; n < sizeof(moods) / sizeof(moods[0]); n++) {
		begin_lives(life_first);
		mapper_set_mood(&mappers[0], moods[n]);
		live(life_with_bad_context);
		CHECK(mapper_has_ended(&mappers[0]));
		CHECK_EQ(mapper_holds(&mappers[1]), 0); /* what it had was freed */
		close_channels();
		fdstore_close(&store);
	}
}

/* A frame that can't be imported, or mapped, is lost alone; where access can't be given, the device is not there. */
static void life_finds_three(void)
{
	struct gmem_device *gpu = taken_over(OLD);
	struct gmem_mem *mem = new_mem(gpu, 7, 64 * MIB), *other = new_mem(gpu, 8, 64 * MIB), *small;
	unsigned there;

	tier_says("takeover", ops->last_error(gpu), failing->why);
	CHECK_EQ(ops->mem_create(gpu, 7, GMEM_CLASS_SMALL, 64 * MIB, &small), 0);
	ops->settle(gpu);
	there = pages_there(mem, 0, 32) + pages_there(small, 0, 32) + pages_there(other, 0, 32);
	CHECK_EQ(there, 7);
	CHECK_EQ(ops->health(gpu), 0);
	for (uint64_t page = 3; page < 8; page++)
		CHECK(!ops->mem_at(mem, page * MIB2) || page_is(gpu, mem, page, 1));
	CHECK_EQ(ops->mem_alloc(mem, 0, 10 * MIB2, true), 0);
}

static const struct failing failing_takeovers[] = {
	{ "", 0, "cuMemImportFromShareableHandle" },
	{ "", 1, "cuMemMap" },
};

static void case_failing_takeover(void)
{
	static const char *const words[] = { "once=cuMemImportFromShareableHandle:4:1", "once=cuMemMap:4:1" };
	char text[256];

	begin_lives(life_first);
	snprintf(text, sizeof(text), "used=%s %s", used_path, words[failing->err]);
	double_words = text;
	live(life_finds_three);
	double_words = NULL;
	close_channels();
	fdstore_close(&store);
}

/* ---- cases ---- */

static void in_process(const char *name, const char *words, void (*fn)(void))
{
	char text[256];
	int status;
	pid_t pid;

	CHECK(!truncate(used_path, 0));
	fflush(NULL);
	pid = fork();
	CHECK(pid >= 0);
	if (!pid) {
		snprintf(text, sizeof(text), "used=%s %s", used_path, words);
		setenv("GMEM_CUDA_DOUBLE", text, 1);
		alarm(CASE_S);
		fn();
		exit(0);
	}
	CHECK(waitpid(pid, &status, 0) == pid);
	if (status) {
		fprintf(stderr, "%s (%s): status %#x\n", name, words, (unsigned)status);
		exit(1);
	}
}

#define CASE(name, words) in_process(#name, words, case_##name)
#define EACH(table, name)                                                                                              \
	for (size_t i = 0; i < sizeof(table) / sizeof(table[0]); i++) {                                                \
		failing = &table[i];                                                                                   \
		in_process(#name, failing->words, case_##name);                                                        \
	}

int main(void)
{
	int fd = mkstemp(used_path);

	CHECK(fd >= 0);
	CHECK(!fchmod(fd, 0666)); /* one case goes on without privileges */
	close(fd);
	setenv("GMEM_LIBCUDA", DOUBLE, 1);
	ops = tier_ops = gmem_driver_builtin("cuda");
	CASE(options, "");
	CASE(capacity_small, "");
	CASE(capacity_large, "total=17179869184");
	EACH(failing_probes, failing_probe);
	CASE(frames, "");
	CASE(no_room, "room=8388608");
	CASE(idle, "");
	EACH(failing_frames, failing_frame);
	CASE(failing_scrub, "once=cuMemsetD8Async:2:1");
	CASE(copies, "");
	CASE(concurrent_copies, "");
#ifndef __SANITIZE_THREAD__ /* its handler blocks the signal while ours runs, and ours does not return */
	CASE(page_gone, "");
#endif
	EACH(failing_copies, failing_copy);
	CASE(lost, "once=cuMemcpyDtoHAsync_v2:1:700");
	CASE(channel, "");
	CASE(many_batches, "");
	CASE(foreign, "");
	CASE(silent, "");
	CASE(fails, "");
	CASE(confused, "");
	CASE(curt, "");
	CASE(leaves, "");
	CASE(no_descriptor, "once=cuMemExportToShareableHandle:2:1");
	CASE(successor, "");
	CASE(versions, "");
	CASE(damaged_notes, "");
	CASE(bad_contexts, "");
	EACH(failing_takeovers, failing_takeover);
	unlink(used_path);
	printf("cuda: ok\n");
	return 0;
}
