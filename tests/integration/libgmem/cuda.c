/* SPDX-License-Identifier: Apache-2.0
 *
 * cuda KERNELS.ptx: contexts on a GPU, here the double of libcuda: kernels of the program's own between acquire and release,
 * on memory that is larger than the device's.
 */
#include "check.h"

#include <dlfcn.h>
#include <sys/wait.h>

#define MIB ((size_t)1 << 20)
#define PATIENCE_NS 60000000000ull
#define ARRAYS 12 /* of 2 MiB; the device has 16 MiB */
#define WORDS (2 * MIB / 8)

static void *library;
static struct gmem *session;
static void *kernels[2]; /* bump, spin */

static void *call(const char *name)
{
	void *found = dlsym(library, name);

	CHECK(found);
	return found;
}

static void start_cuda(const char *ptx)
{
	int (*init)(unsigned) = call("cuInit"), (*retain)(void **, int) = call("cuDevicePrimaryCtxRetain");
	int (*set)(void *) = call("cuCtxSetCurrent"), (*load)(void **, const void *) = call("cuModuleLoadData");
	int (*function)(void **, void *, const char *) = call("cuModuleGetFunction");
	static char text[65536];
	FILE *in = fopen(ptx, "re");
	void *context, *module;

	CHECK(in && fread(text, 1, sizeof(text) - 1, in) > 0);
	fclose(in);
	CHECK(!init(0) && !retain(&context, 0) && !set(context) && !load(&module, text));
	CHECK(!function(&kernels[0], module, "bump") && !function(&kernels[1], module, "spin"));
}

static void *new_stream(void)
{
	int (*create)(void **, unsigned) = call("cuStreamCreate");
	void *stream;

	CHECK(!create(&stream, 1));
	return stream;
}

static void launch(int kernel, void *at, uint64_t count, uint64_t value, void *stream)
{
	int (*run)(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **, void **) =
		call("cuLaunchKernel");
	uint64_t address = (uintptr_t)at;
	void *params[] = { &address, &count, &value };

	CHECK(!run(kernels[kernel], 256, 1, 1, 256, 1, 1, 0, stream, params, NULL));
}

static struct gmem_range map(size_t bytes, size_t page_bytes)
{
	struct gmem_mmap_options options = { .size = sizeof(options), .page_bytes = page_bytes };
	struct gmem_range range = { .bytes = bytes };

	OK(gmem_mmap(session, bytes, &options, &range.va));
	return range;
}

static void add(struct gmem_context *context, struct gmem_range *range, uint64_t value, void *stream)
{
	OK(gmem_acquire(context, range, 1, GMEM_ACQUIRE_WRITE));
	launch(0, range->va, range->bytes / 8, value, stream);
	OK(gmem_release_after(context, stream, range, 1));
}

static void check_words(const struct gmem_range *range, uint64_t value)
{
	for (size_t i = 0; i < range->bytes / 8; i++)
		if (((uint64_t *)range->va)[i] != value)
			FAILED("word %zu is %llu, not %llu", i, (unsigned long long)((uint64_t *)range->va)[i],
			       (unsigned long long)value);
}

static void test_more_than_there_is(void)
{
	void *streams[] = { NULL, new_stream(), new_stream() };
	struct gmem_range arrays[ARRAYS];
	struct gmem_context *context;

	OK(gmem_context_open(session, "cuda0", NULL, &context));
	for (int n = 0; n < ARRAYS; n++)
		arrays[n] = map(2 * MIB, 0);
	for (uint64_t round = 1; round <= 4; round++)
		for (int n = 0; n < ARRAYS; n++)
			add(context, &arrays[n], round, streams[n % 3]);
	OK(gmem_context_synchronize(context, PATIENCE_NS));
	for (int n = 0; n < ARRAYS; n++)
		check_words(&arrays[n], 10);
	CHECK(device_of(session, "cuda0").evictions > 0);
	/* several at once, and let go at once */
	OK(gmem_acquire(context, arrays, 3, 0));
	OK(gmem_release(context, arrays, 3));
	OK(gmem_context_close(context));
	for (int n = 0; n < ARRAYS; n++)
		OK(gmem_munmap(session, arrays[n].va, arrays[n].bytes));
}

/* A stream that has not come so far is waited for by who needs the memory, and by nobody else. */
static void test_releases_follow_their_streams(void)
{
	struct gmem_range a = map(2 * MIB, 0), b = map(2 * MIB, 0);
	void *slow = new_stream(), *fast = new_stream();
	struct gmem_context *context;

	OK(gmem_context_open(session, "cuda0", NULL, &context));
	OK(gmem_acquire(context, &a, 1, GMEM_ACQUIRE_WRITE));
	launch(1, NULL, 0, 700000000, slow);
	launch(0, a.va, WORDS, 1, slow);
	OK(gmem_release_after(context, slow, &a, 1));
	add(context, &b, 5, fast);
	check_words(&b, 5);
	REFUSED(gmem_context_synchronize(context, 1000000), ETIMEDOUT, "in use still");
	check_words(&a, 1);
	OK(gmem_context_synchronize(context, PATIENCE_NS));
	OK(gmem_context_close(context));
	OK(gmem_munmap(session, a.va, a.bytes));
	OK(gmem_munmap(session, b.va, b.bytes));
}

static void test_two_contexts(void)
{
	struct gmem_range a = map(4 * MIB, 0);
	struct gmem_context *one, *two;

	OK(gmem_context_open(session, "cuda0", NULL, &one));
	OK(gmem_context_open(session, "cuda0", NULL, &two));
	OK(gmem_acquire(one, &a, 1, GMEM_ACQUIRE_WRITE));
	add(two, &a, 2, NULL);
	OK(gmem_context_synchronize(two, PATIENCE_NS));
	OK(gmem_context_close(two));
	launch(0, a.va, a.bytes / 8, 3, NULL); /* the other one has it still */
	OK(gmem_release_after(one, NULL, &a, 1));
	check_words(&a, 5);
	OK(gmem_context_close(one));
	OK(gmem_munmap(session, a.va, a.bytes));
}

static int in_child(struct gmem_context *context, struct gmem_range *range)
{
	struct gmem_context *other;

	check_words(range, 0);
	REFUSED(gmem_acquire(context, range, 1, 0), ECANCELED, "parent");
	REFUSED(gmem_release_after(context, NULL, range, 1), ECANCELED, "parent");
	REFUSED(gmem_context_open(session, "cuda0", NULL, &other), ECANCELED, "fork");
	OK(gmem_context_close(context));
	return 0;
}

static void test_refusals(void)
{
	struct gmem_range a = map(2 * MIB, 0), small = map(1 * MIB, 4096), middle = map(1 * MIB, 65536), big = map(40 * MIB, 0);
	struct gmem_context *context, *simgpu;
	struct gmem_fence *fence;
	int status;
	pid_t pid;

	OK(gmem_context_open(session, "cuda0", NULL, &context));
	OK(gmem_context_open(session, "simgpu0", NULL, &simgpu));
	REFUSED(gmem_acquire(context, &small, 1, 0), EOPNOTSUPP, "ranges: a CUDA device takes pages of 2 MiB");
	REFUSED(gmem_acquire(context, &middle, 1, 0), EOPNOTSUPP, "ranges: a CUDA device takes pages of 2 MiB");
	CHECK(gmem_acquire(context, &big, 1, GMEM_ACQUIRE_WRITE) == -ENOMEM);
	REFUSED(gmem_release_after(simgpu, NULL, &a, 1), EOPNOTSUPP, "no streams");
	REFUSED(gmem_context_synchronize(simgpu, 0), EOPNOTSUPP, "no streams");
	REFUSED(gmem_release_after(context, NULL, &a, 0), EINVAL, "ranges");
	REFUSED(gmem_release_after(context, NULL, NULL, 1), EINVAL, "ranges");
	REFUSED(gmem_release_after(NULL, NULL, &a, 1), EINVAL, "context");
	REFUSED(gmem_context_launch(context, "x.so", "f", NULL, 0, NULL, &fence), EOPNOTSUPP, "launched with CUDA");
	OK(gmem_context_synchronize(context, 0));
	pid = fork();
	CHECK(pid >= 0);
	if (!pid)
		_exit(in_child(context, &a));
	CHECK(waitpid(pid, &status, 0) == pid && !status);
	add(context, &a, 1, NULL);
	check_words(&a, 1);
	OK(gmem_context_close(simgpu));
	OK(gmem_context_close(context));
	OK(gmem_munmap(session, big.va, big.bytes));
	OK(gmem_munmap(session, middle.va, middle.bytes));
	OK(gmem_munmap(session, small.va, small.bytes));
	OK(gmem_munmap(session, a.va, a.bytes));
}

int main(int argc, char **argv)
{
	CHECK(argc == 2);
	OK(gmem_open(NULL, NULL, &session));
	library = dlopen(getenv("GMEM_LIBCUDA"), RTLD_NOW);
	CHECK(library);
	start_cuda(argv[1]);
	test_more_than_there_is();
	test_releases_follow_their_streams();
	test_two_contexts();
	test_refusals();
	CHECK(device_of(session, "cuda0").contexts == 0);
	OK(gmem_close(session));
	return 0;
}
