/* SPDX-License-Identifier: Apache-2.0
 *
 * async DEVICE: requests that nobody waits for at once: in order within a stream, errors with their fences, from
 * several threads, dropped, after a close, and in a forked child, which has a ring of its own.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

#define MB ((size_t)1 << 20)
#define PATIENCE_NS 20000000000ull

static struct gmem *session;
static uint64_t *data;
static int device;

static void wait_free(struct gmem_fence *fence)
{
	int value = 7;

	OK(gmem_fence_wait(fence, PATIENCE_NS, &value));
	CHECK(value == 0);
	OK(gmem_fence_wait(fence, 0, NULL));
	gmem_fence_free(fence);
}

/* Each copy reads what the one before has written. */
static void test_order(void)
{
	const size_t pieces = 64, bytes = 4096, words = bytes / 8;
	struct gmem_fence *fences[64];

	memset(data, 0, (pieces + 1) * bytes);
	data[0] = 42;
	for (size_t i = 0; i < pieces; i++)
		OK(gmem_hmemcpy_async(session, i % 2 ? device : GMEM_NO_HNID, data + (i + 1) * words, data + i * words,
				      bytes, 5, &fences[i]));
	wait_free(fences[pieces - 1]);
	CHECK(data[pieces * words] == 42);
	for (size_t i = 0; i + 1 < pieces; i++) {
		bool complete = false;

		OK(gmem_fence_poll(fences[i], &complete));
		CHECK(complete);
		wait_free(fences[i]);
	}
}

static void test_errors(void)
{
	struct gmem_fence *fence = NULL;
	int local;

	REFUSED(gmem_prefetch_async(NULL, 0, data, MB, 0, &fence), EINVAL, "session");
	REFUSED(gmem_prefetch_async(session, 0, data, MB, 0, NULL), EINVAL, "ret");
	REFUSED(gmem_prefetch_async(session, 0, data, MB, 40000, &fence), EINVAL, "stream");
	CHECK(!fence);
	OK(gmem_prefetch_async(session, 99, data, MB, 0, &fence));
	REFUSED(gmem_fence_wait(fence, PATIENCE_NS, NULL), EINVAL, "hnid");
	REFUSED(gmem_fence_wait(fence, PATIENCE_NS, NULL), EINVAL, "hnid");
	gmem_fence_free(fence);
	OK(gmem_hmadvise_async(session, device, data, MB, 0x7777, 1, &fence));
	REFUSED(gmem_fence_wait(fence, PATIENCE_NS, NULL), EINVAL, "advice");
	gmem_fence_free(fence);
	OK(gmem_hmemcpy_async(session, 0, data, &local, 8, 1, &fence));
	REFUSED(gmem_fence_wait(fence, PATIENCE_NS, NULL), EINVAL, "src");
	gmem_fence_free(fence);
	OK(gmem_hmadvise_async(session, device, data, MB, GMEM_ADVISE_READ_MOSTLY, 0, &fence));
	wait_free(fence);
	OK(gmem_hmadvise_async(session, device, data, MB, GMEM_ADVISE_NO_READ_MOSTLY, 0, &fence));
	wait_free(fence);
}

/* More than the queues hold, and nobody waits for any. */
static void test_dropped(void)
{
	for (int i = 0; i < 5000; i++) {
		struct gmem_fence *fence;

		OK(gmem_prefetch_async(session, 0, data, 4096, (uint16_t)(i % 3), &fence));
		gmem_fence_free(fence);
	}
	OK(gmem_prefetch(session, 0, data, 4096));
}

static void *many(void *arg)
{
	size_t me = (size_t)arg;
	uint64_t *mine = data + me * MB / 8;

	for (int i = 0; i < 300; i++) {
		struct gmem_fence *fence;
		void *at;

		OK(gmem_prefetch_async(session, i % 2 ? device : 0, mine, 65536, (uint16_t)me, &fence));
		OK(gmem_mmap(session, 8192, NULL, &at));
		*(int *)at = i;
		OK(gmem_munmap(session, at, 8192));
		wait_free(fence);
		CHECK(mine[0] == me);
	}
	return NULL;
}

static void test_threads(void)
{
	pthread_t threads[4];

	for (size_t i = 0; i < 4; i++) {
		data[i * MB / 8] = i;
		CHECK(!pthread_create(&threads[i], NULL, many, (void *)i));
	}
	for (size_t i = 0; i < 4; i++)
		CHECK(!pthread_join(threads[i], NULL));
}

static void test_fork(void)
{
	struct gmem_fence *fence, *own;
	int status;
	pid_t child;

	data[0] = 1;
	OK(gmem_prefetch_async(session, device, data, 4 * MB, 0, &fence));
	child = fork();
	if (!child) {
		alarm(60);
		REFUSED(gmem_fence_wait(fence, 0, NULL), ECANCELED, "parent");
		gmem_fence_free(fence);
		OK(gmem_prefetch_async(session, 0, data, MB, 0, &own));
		wait_free(own);
		CHECK(data[0] == 1);
		data[1] = 2;
		OK(gmem_prefetch(session, device, data, MB));
		OK(gmem_close(session));
		_exit(0);
	}
	wait_free(fence);
	CHECK(waitpid(child, &status, 0) == child);
	CHECK(status == 0);
	CHECK(data[1] == 2);
}

int main(int argc, char **argv)
{
	struct gmem_fence *late;

	CHECK(argc >= 2);
	OK(gmem_open(NULL, NULL, &session));
	device = hnid_of(session, argv[1]);
	OK(gmem_mmap(session, 4 * MB, &(struct gmem_mmap_options){ .size = sizeof(struct gmem_mmap_options),
								    .page_bytes = 4096 }, (void **)&data));
	test_order();
	test_errors();
	test_dropped();
	test_threads();
	test_fork();
	for (int i = 0; i < 50; i++)
		OK(gmem_prefetch_async(session, i % 2 ? device : 0, data, 4 * MB, 0, &late));
	OK(gmem_close(session));
	REFUSED(gmem_fence_wait(late, PATIENCE_NS, NULL), ECANCELED, "closed");
	gmem_fence_free(late);
	return 0;
}
