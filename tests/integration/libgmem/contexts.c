/* SPDX-License-Identifier: Apache-2.0
 *
 * contexts DEVICE KERNELS.SO: launches that go well, and every way in which one does not.
 */
#include <pthread.h>
#include <signal.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "check.h"

#define SECOND_NS 1000000000ull
#define PATIENCE_NS (60 * SECOND_NS) /* nothing here takes so long: instead of a hang, a failure */

static struct gmem *session;
static const char *device, *library;

static struct gmem_fence *launch(struct gmem_context *context, const char *symbol, void *const *args, size_t count,
				 uint64_t timeout_ns)
{
	struct gmem_launch_options options = { .size = sizeof(options), .timeout_ns = timeout_ns };
	struct gmem_fence *fence;

	OK(gmem_context_launch(context, library, symbol, args, count, &options, &fence));
	return fence;
}

static double now_s(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static struct gmem_context *open_context(void)
{
	struct gmem_context *context;

	OK(gmem_context_open(session, device, NULL, &context));
	return context;
}

static void test_values_and_order(void)
{
	struct gmem_context *context = open_context();
	struct gmem_fence *fences[100];
	uint64_t *words;
	void *args[3] = { NULL, (void *)512, (void *)1 };
	int value = -1;
	bool done;

	OK(gmem_mmap(session, 1 << 20, NULL, (void **)&words));
	args[0] = words;
	/* More than are ever with the process at once. */
	for (int i = 0; i < 100; i++)
		fences[i] = i % 2 ? launch(context, "add", args, 3, 0) : launch(context, "answer", args, 2, 0);
	OK(gmem_fence_wait(fences[99], PATIENCE_NS, &value));
	for (int i = 0; i < 100; i++) {
		OK(gmem_fence_poll(fences[i], &done));
		CHECK(done); /* in order: what was launched before is complete */
		OK(gmem_fence_wait(fences[i], 0, &value));
		CHECK(value == (i % 2 ? 0 : 42));
		gmem_fence_free(fences[i]);
	}
	for (int i = 0; i < 512; i++)
		CHECK(words[i] == 50);
	CHECK(words[512] == 0);
	OK(gmem_munmap(session, words, 1 << 20));
	OK(gmem_context_close(context));
}

static void test_read_into_untouched(void)
{
	struct gmem_context *context = open_context();
	struct gmem_fence *fence;
	void *args[2], *memory;
	int value;

	OK(gmem_mmap(session, 3 << 20, NULL, &memory));
	memset(memory, 7, 3 << 20);
	args[0] = memory;
	args[1] = (void *)(3 << 20);
	fence = launch(context, "read_zero", args, 2, 0);
	OK(gmem_fence_wait(fence, PATIENCE_NS, &value));
	CHECK(value == (kernel_faults() ? 3 << 20 : -EFAULT));
	for (int i = 0; i < 3 << 20; i++)
		CHECK(((char *)memory)[i] == (kernel_faults() ? 0 : 7));
	gmem_fence_free(fence);
	OK(gmem_munmap(session, memory, 3 << 20));
	OK(gmem_context_close(context));
}

static void test_wait_times_out(void)
{
	struct gmem_context *context = open_context();
	void *args[1] = { (void *)300 };
	struct gmem_fence *fence = launch(context, "hold_still", args, 1, 0);
	bool done = true;
	int value = 0;

	OK(gmem_fence_poll(fence, &done));
	CHECK(!done);
	REFUSED(gmem_fence_wait(fence, 20 * 1000000, &value), ETIMEDOUT, "not complete");
	OK(gmem_fence_wait(fence, PATIENCE_NS, &value));
	CHECK(value == 300);
	gmem_fence_free(fence);
	OK(gmem_context_close(context));
}

/* What runs ends as `number` says and in words; what is queued behind it hears of it; nothing can be launched after. */
static void dies(const char *symbol, void *arg, uint64_t timeout_ns, int number, const char *words)
{
	struct gmem_context *context = open_context();
	void *args[1] = { arg };
	struct gmem_fence *before = launch(context, "answer", NULL, 0, 0);
	struct gmem_fence *fence = launch(context, symbol, args, 1, timeout_ns);
	struct gmem_fence *after = launch(context, "answer", NULL, 0, 0), *never = NULL;
	int value = 77;

	REFUSED(gmem_fence_wait(fence, PATIENCE_NS, &value), number, words);
	CHECK(value == 77);
	OK(gmem_fence_wait(before, 0, &value));
	CHECK(value == 40);
	REFUSED(gmem_fence_wait(after, PATIENCE_NS, NULL), EOWNERDEAD, "context");
	REFUSED(gmem_context_launch(context, library, "answer", NULL, 0, NULL, &never), EOWNERDEAD, "context");
	CHECK(!never);
	gmem_fence_free(before);
	gmem_fence_free(fence);
	gmem_fence_free(after);
	OK(gmem_context_close(context));
	CHECK(device_of(session, device).contexts == 0);
}

static void test_deaths(void)
{
	double start = now_s();
	void *gone;

	OK(gmem_mmap(session, 1 << 20, NULL, &gone));
	OK(gmem_munmap(session, gone, 1 << 20));
	dies("crash", NULL, 0, EOWNERDEAD, "SIGSEGV");
	dies("crash_outside", gone, 0, EOWNERDEAD, "SIGSEGV");
	dies("leave", NULL, 0, EOWNERDEAD, "status 3");
	dies("take_channel", NULL, 0, EOWNERDEAD, "context");
	dies("spin", NULL, SECOND_NS / 5, ETIME, "timeout");
	CHECK(now_s() - start < 45);
}

static void test_timeout_counts_from_the_start(void)
{
	struct gmem_context *context = open_context();
	void *args[1] = { (void *)400 };
	struct gmem_fence *first = launch(context, "hold_still", args, 1, 0);
	struct gmem_fence *second = launch(context, "answer", NULL, 0, SECOND_NS / 4);
	int value;

	OK(gmem_fence_wait(second, PATIENCE_NS, &value));
	CHECK(value == 40);
	gmem_fence_free(first);
	gmem_fence_free(second);
	OK(gmem_context_close(context));
}

static void test_close_with_work(void)
{
	struct gmem_context *context = open_context();
	struct gmem_fence *running = launch(context, "spin", NULL, 0, 0);
	struct gmem_fence *queued = launch(context, "answer", NULL, 0, 0);

	REFUSED(gmem_close(session), EBUSY, "session");
	OK(gmem_context_close(context));
	REFUSED(gmem_fence_wait(running, PATIENCE_NS, NULL), ECANCELED, "closed");
	REFUSED(gmem_fence_wait(queued, PATIENCE_NS, NULL), ECANCELED, "closed");
	gmem_fence_free(running);
	gmem_fence_free(queued);
}

static void test_refusals(void)
{
	struct gmem_context_options wrong = { .size = sizeof(wrong), .helper = "/nowhere/gmem-context" };
	struct gmem_launch_options options = { .size = 3 };
	struct gmem_context *context = NULL, *open = open_context();
	struct gmem_fence *fence = NULL;
	void *args[1] = { NULL };

	REFUSED(gmem_context_open(session, "nosuch", NULL, &context), ENOENT, "device");
	REFUSED(gmem_context_open(session, "", NULL, &context), EINVAL, "device");
	REFUSED(gmem_context_open(session, "host", NULL, &context), EOPNOTSUPP, "device");
	REFUSED(gmem_context_open(session, device, &wrong, &context), ENOENT, "helper");
	wrong.helper = "/bin/false";
	REFUSED(gmem_context_open(session, device, &wrong, &context), EOWNERDEAD, "device");
	CHECK(!context);
	REFUSED(gmem_context_launch(open, library, "answer", args, 65, NULL, &fence), EINVAL, "arg_count");
	REFUSED(gmem_context_launch(open, library, "answer", NULL, 1, NULL, &fence), EINVAL, "args");
	REFUSED(gmem_context_launch(open, library, "", NULL, 0, NULL, &fence), EINVAL, "symbol");
	REFUSED(gmem_context_launch(open, "/nowhere/k.so", "answer", NULL, 0, NULL, &fence), ENOENT, "library");
	REFUSED(gmem_context_launch(open, library, "answer", NULL, 0, &options, &fence), EINVAL, "options");
	CHECK(!fence);
	fence = launch(open, "nosuchkernel", NULL, 0, 0);
	REFUSED(gmem_fence_wait(fence, PATIENCE_NS, NULL), ENOENT, "nosuchkernel");
	gmem_fence_free(fence);
	OK(gmem_context_launch(open, "/etc/passwd", "answer", NULL, 0, NULL, &fence));
	REFUSED(gmem_fence_wait(fence, PATIENCE_NS, NULL), ELIBACC, "library");
	gmem_fence_free(fence);
	/* A kernel that can't be found is no reason to end a context. */
	fence = launch(open, "answer", NULL, 0, 0);
	OK(gmem_fence_wait(fence, PATIENCE_NS, NULL));
	gmem_fence_free(fence);
	OK(gmem_context_close(open));
}

static void test_fork(void)
{
	struct gmem_context *context = open_context();
	struct gmem_fence *fence = launch(context, "answer", NULL, 0, 0);
	int status;
	pid_t pid = fork();

	if (pid == 0) {
		struct gmem_fence *none = NULL;
		struct gmem_context *own;

		REFUSED(gmem_fence_wait(fence, PATIENCE_NS, NULL), ECANCELED, "parent");
		REFUSED(gmem_context_launch(context, library, "answer", NULL, 0, NULL, &none), ECANCELED, "parent");
		OK(gmem_context_close(context));
		own = open_context();
		fence = launch(own, "answer", NULL, 0, 0);
		OK(gmem_fence_wait(fence, PATIENCE_NS, NULL));
		OK(gmem_context_close(own));
		OK(gmem_close(session));
		_exit(0);
	}
	CHECK(waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 0);
	OK(gmem_fence_wait(fence, PATIENCE_NS, NULL));
	gmem_fence_free(fence);
	OK(gmem_context_close(context));
}

int main(int argc, char **argv)
{
	CHECK(argc == 3);
	device = argv[1];
	library = argv[2];
	OK(gmem_open(NULL, NULL, &session));
	test_values_and_order();
	test_read_into_untouched();
	test_wait_times_out();
	test_deaths();
	test_timeout_counts_from_the_start();
	test_close_with_work();
	test_refusals();
	test_fork();
	OK(gmem_close(session));
	return 0;
}
