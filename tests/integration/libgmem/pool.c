/* SPDX-License-Identifier: Apache-2.0
 *
 * pool DEVICE KERNELS.SO: one pool in two sessions of this process tree, their contexts, and after it was published.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include "check.h"

#define BYTES (4ul << 20)
#define WORDS (BYTES / sizeof(uint64_t))

static const char *device, *library;

/* Each word of a range is incremented on the device: pool_add of kernels.c. */
static int add(struct gmem_context *context, void *at)
{
	struct gmem_launch_options options = { .size = sizeof(options) };
	void *args[] = { at, (void *)WORDS };
	struct gmem_fence *fence;
	int err, value = 0;

	OK(gmem_context_launch(context, library, "pool_add", args, 2, &options, &fence));
	err = gmem_fence_wait(fence, GMEM_FOREVER, &value);
	gmem_fence_free(fence);
	return err ? err : value;
}

static uint64_t sum(const uint64_t *at)
{
	uint64_t total = 0;

	for (size_t i = 0; i < WORDS; i++)
		total += at[i];
	return total;
}

static void check_arguments(struct gmem *session)
{
	struct gmem_pool_options options = { .size = sizeof(options), .mode = 0600 };
	struct gmem_range range;
	void *at;

	REFUSED(gmem_pool_create(NULL, "a", 1, NULL, &at), EINVAL, "session");
	REFUSED(gmem_pool_create(session, NULL, 1, NULL, &at), EINVAL, "name");
	REFUSED(gmem_pool_create(session, "a/b", 1, NULL, &at), EINVAL, "name");
	REFUSED(gmem_pool_create(session, "a", 0, NULL, &at), EINVAL, "bytes");
	REFUSED(gmem_pool_create(session, "a", 1, NULL, NULL), EINVAL, "ret");
	options.mode = 01000;
	REFUSED(gmem_pool_create(session, "a", 1, &options, &at), EINVAL, "mode");
	options.mode = 0600;
	options.flags = GMEM_POOL_WRITE;
	REFUSED(gmem_pool_create(session, "a", 1, &options, &at), EINVAL, "flags");
	REFUSED(gmem_pool_open(session, "none", NULL, &range), ENOENT, "name");
	REFUSED(gmem_pool_publish(session, "none"), ENOENT, "name");
	REFUSED(gmem_pool_unlink(session, "none"), ENOENT, "name");
}

/* In a process of its own, with a session of its own. */
static void reader(const void *expected_at, uint64_t expected)
{
	struct gmem_pool_options options = { .size = sizeof(options), .flags = GMEM_POOL_WRITE };
	struct gmem_context *context;
	struct gmem_range range, again;
	struct gmem *session;

	OK(gmem_open(NULL, NULL, &session));
	OK(gmem_context_open(session, device, NULL, &context));
	OK(gmem_pool_open(session, "table", NULL, &range));
	CHECK(range.va == expected_at && range.bytes == BYTES);
	OK(gmem_pool_open(session, "table", NULL, &again));
	CHECK(again.va == range.va);
	CHECK(sum(range.va) == expected);
	REFUSED(gmem_pool_open(session, "table", &options, &again), EBUSY, "write");
	REFUSED(gmem_discard(session, range.va, BYTES), EACCES, "");
	CHECK(add(context, range.va) == -EOWNERDEAD);
	CHECK(sum(range.va) == expected);
	OK(gmem_context_close(context));
	OK(gmem_munmap(session, range.va, range.bytes));
	options.uid = geteuid() + 1;
	options.flags = GMEM_POOL_OF_UID;
	REFUSED(gmem_pool_open(session, "table", &options, &range), EACCES, "uid");
	options.uid = geteuid();
	OK(gmem_pool_open(session, "table", &options, &range));
	CHECK(sum(range.va) == expected);
	OK(gmem_close(session));
}

static int run_reader(const void *at, uint64_t expected, char **argv)
{
	char where[32], what[32];
	int status;
	pid_t pid;

	snprintf(where, sizeof(where), "%p", at);
	snprintf(what, sizeof(what), "%llu", (unsigned long long)expected);
	pid = fork();
	if (!pid) {
		execl("/proc/self/exe", argv[0], argv[1], argv[2], where, what, NULL);
		_exit(127);
	}
	CHECK(waitpid(pid, &status, 0) == pid);
	return status;
}

static void check_closed_range(struct gmem *session, struct gmem_context *context)
{
	uint64_t *pool, *plain;

	OK(gmem_pool_create(session, "short", BYTES, NULL, (void **)&pool));
	CHECK(add(context, pool) == 0);
	OK(gmem_munmap(session, pool, BYTES));
	OK(gmem_pool_unlink(session, "short"));
	OK(gmem_mmap(session, BYTES, NULL, (void **)&plain));
	CHECK(plain == pool); /* else this shows nothing */
	plain[1] = 7;
	CHECK(add(context, plain) == 0);
	CHECK(plain[0] == 1 && plain[1] == 8);
	OK(gmem_munmap(session, plain, BYTES));
}

int main(int argc, char **argv)
{
	struct gmem_context *context;
	struct gmem *session;
	uint64_t *at;
	void *other;
	int status;

	device = argv[1];
	library = argv[2];
	if (argc > 4) {
		reader((void *)(uintptr_t)strtoull(argv[3], NULL, 16), strtoull(argv[4], NULL, 10));
		return 0;
	}
	OK(gmem_open(NULL, NULL, &session));
	check_arguments(session);
	OK(gmem_context_open(session, device, NULL, &context)); /* before there is the pool */
	check_closed_range(session, context);
	OK(gmem_pool_create(session, "table", BYTES, NULL, (void **)&at));
	REFUSED(gmem_pool_create(session, "table", BYTES, NULL, &other), EEXIST, "name");
	for (size_t i = 0; i < WORDS; i++)
		at[i] = i;
	CHECK(add(context, at) == 0);
	CHECK(at[0] == 1 && at[WORDS - 1] == WORDS);
	CHECK(run_reader(at, WORDS * (WORDS + 1) / 2, argv) == 0);
	OK(gmem_pool_publish(session, "table"));
	CHECK(sum(at) == WORDS * (WORDS + 1) / 2);
	REFUSED(gmem_discard(session, at, BYTES), EPERM, "");
	if (!fork()) {
		at[5] = 0;
		_exit(0);
	}
	CHECK(wait(&status) > 0 && WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV);
	CHECK(add(context, at) == -EOWNERDEAD);
	CHECK(sum(at) == WORDS * (WORDS + 1) / 2);
	OK(gmem_context_close(context));
	OK(gmem_pool_unlink(session, "table"));
	OK(gmem_close(session));
	return 0;
}
