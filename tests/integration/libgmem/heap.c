/* SPDX-License-Identifier: Apache-2.0
 *
 * heap DEVICE KERNELS: gmem_malloc() and its kin.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/wait.h>

#include "check.h"

#define MB (1ul << 20)
#define THREADS 8
#define ROUNDS 20000
#define SLOTS 64
#define FORKS 4
#define NODES 4000 /* 13 MB, on a device of 8 */
#define PATIENCE_NS 60000000000ull

static struct gmem *session;
static const char *device, *kernels;
static atomic_bool forked;
static pthread_barrier_t used;

static void test_shapes(void)
{
	char *at = gmem_malloc(session, 100), *more;
	static char plain[] = "plain memory";

	CHECK(at && gmem_malloc_usable_size(session, at) >= 100);
	memset(at, 7, 100);
	more = gmem_realloc(session, at, 3 * MB);
	CHECK(more && more[0] == 7 && more[99] == 7);
	more[3 * MB - 1] = 1;
	at = gmem_realloc(session, more, 50);
	CHECK(at && at[49] == 7);
	memset(at, 0xff, 50);
	gmem_free(session, at);
	gmem_free(session, NULL);
	for (int i = 0; i < 1000; i++) { /* what was written and freed comes back as zeros */
		char *zeros = gmem_calloc(session, 1 + i % 50, 37);

		CHECK(zeros && !zeros[0] && !memcmp(zeros, zeros + 1, (size_t)(1 + i % 50) * 37 - 1));
		memset(zeros, 0xff, (size_t)(1 + i % 50) * 37);
		gmem_free(session, zeros);
	}
	for (size_t alignment = 1; alignment <= 8 * MB; alignment *= 2) {
		at = gmem_aligned_alloc(session, alignment, 10);
		CHECK(at && !((uintptr_t)at % alignment));
		*at = 1;
		gmem_free(session, at);
	}
	CHECK(gmem_malloc(session, 0) && gmem_calloc(session, 0, 9));
	errno = 0;
	CHECK(!gmem_calloc(session, SIZE_MAX / 2, 3) && errno == ENOMEM);
	errno = 0;
	CHECK(!gmem_malloc(session, SIZE_MAX) && errno == ENOMEM && strstr(gmem_last_error(), "bytes"));
	errno = 0;
	CHECK(!gmem_malloc(session, 1ul << 46) && errno == ENOMEM && strstr(gmem_last_error(), "bytes"));
	errno = 0;
	CHECK(!gmem_aligned_alloc(session, 24, 10) && errno == EINVAL && strstr(gmem_last_error(), "alignment"));
	errno = 0;
	CHECK(!gmem_malloc(NULL, 10) && errno == EINVAL && strstr(gmem_last_error(), "session"));
	at = malloc(sizeof(plain));
	CHECK(at && (uintptr_t)at < 0x660000000000ul); /* the program's own malloc is what it was */
	free(at);
}

static void *churn(void *arg)
{
	unsigned seed = (unsigned)(uintptr_t)arg;
	unsigned char *at[SLOTS] = { NULL };
	size_t bytes[SLOTS] = { 0 };

	for (int i = 0; i < ROUNDS; i++) {
		int slot = rand_r(&seed) % SLOTS;
		size_t wanted = 1 + (size_t)rand_r(&seed) % (i % 100 ? 2000 : 200000);

		if (at[slot])
			CHECK(at[slot][0] == (unsigned char)slot && at[slot][bytes[slot] - 1] == (unsigned char)slot);
		if (at[slot] && rand_r(&seed) % 2) {
			gmem_free(session, at[slot]);
			at[slot] = NULL;
			continue;
		}
		at[slot] = gmem_realloc(session, at[slot], wanted);
		CHECK(at[slot]);
		bytes[slot] = wanted;
		memset(at[slot], slot, wanted);
	}
	for (int slot = 0; slot < SLOTS; slot++)
		gmem_free(session, at[slot]);
	return NULL;
}

static void *take_large_ones(void *arg)
{
	unsigned seed = (unsigned)(uintptr_t)arg;
	char *at[SLOTS / 8] = { NULL };

	for (int i = 0; i < ROUNDS / 100; i++) {
		int slot = rand_r(&seed) % (SLOTS / 8);

		gmem_free(session, at[slot]);
		at[slot] = gmem_malloc(session, MB / 4 + (size_t)rand_r(&seed) % (3 * MB));
		CHECK(at[slot]);
		*at[slot] = 1;
	}
	for (int slot = 0; slot < SLOTS / 8; slot++)
		gmem_free(session, at[slot]);
	return NULL;
}

static void test_threads(void)
{
	pthread_t threads[THREADS];

	for (uintptr_t i = 0; i < THREADS; i++)
		CHECK(!pthread_create(&threads[i], NULL, churn, (void *)(i + 1)));
	for (int i = 0; i < THREADS; i++)
		pthread_join(threads[i], NULL);
}

static void test_freed_memory_is_given_back(void)
{
	enum { COUNT = 512 };
	void *at[COUNT];
	uint64_t full, now;

	for (int i = 0; i < COUNT; i++) {
		at[i] = gmem_malloc(session, 65536);
		CHECK(at[i]);
		memset(at[i], 1, 65536);
	}
	full = device_of(session, "host").used_bytes;
	CHECK(full >= COUNT * 65536ul);
	for (int i = 0; i < COUNT; i++)
		gmem_free(session, at[i]);
	for (int tries = 0; tries < 300; tries++) { /* the allocator's clock ticks as it is used */
		usleep(50000);
		for (int i = 0; i < 2000; i++)
			gmem_free(session, gmem_malloc(session, 40000));
		now = device_of(session, "host").used_bytes;
		if (now < full / 2)
			return;
	}
	FAILED("%lu of %lu bytes are still there", now, full);
}

struct node {
	struct node *next;
	uint64_t value;
};

/* Nodes of different sizes, more of them than the device holds, walked there by their pointers. */
static void test_kernel(void)
{
	struct gmem_context *context;
	struct gmem_fence *fence;
	struct node *list = NULL, *node;
	void *args[1];
	int length;

	for (int i = 0; i < NODES; i++) {
		node = gmem_malloc(session, sizeof(*node) + (size_t)i % 3 * 3000);
		CHECK(node);
		*node = (struct node){ .next = list, .value = (uint64_t)i };
		list = node;
	}
	args[0] = list;
	OK(gmem_context_open(session, device, NULL, &context));
	OK(gmem_context_launch(context, kernels, "double_list", args, 1, NULL, &fence));
	OK(gmem_fence_wait(fence, PATIENCE_NS, &length));
	CHECK(length == NODES);
	for (int i = NODES - 1; list; i--) {
		node = list;
		list = node->next;
		CHECK(node->value == 2 * (uint64_t)i);
		gmem_free(session, node);
	}
	gmem_fence_free(fence);
	OK(gmem_context_close(context));
}

static int in_child(void (*fn)(volatile int *), volatile int *at)
{
	int status;
	pid_t pid = fork();

	if (!pid) {
		fn(at);
		_exit(0);
	}
	CHECK(waitpid(pid, &status, 0) == pid);
	return WIFSIGNALED(status) ? WTERMSIG(status) : -WEXITSTATUS(status);
}

static void touch(volatile int *at)
{
	*at = 1;
}

static void free_it(volatile int *at)
{
	fclose(stderr);
	gmem_free(session, (void *)at);
}

static void use_own(volatile int *at)
{
	int *own = gmem_malloc(session, sizeof(*own));

	(void)at;
	CHECK(own);
	*own = 3;
	gmem_free(session, own);
}

static void test_fork(void)
{
	volatile int *at = gmem_malloc(session, sizeof(*at)), local = 0;

	CHECK(at);
	*at = 9;
	CHECK(in_child(touch, at) == SIGSEGV);
	CHECK(in_child(free_it, at) == 0); /* the parent's: nothing is done */
	CHECK(in_child(free_it, &local) == SIGABRT);
	CHECK(in_child(use_own, at) == 0);
	CHECK(*at == 9);
	gmem_free(session, (void *)at);
}

static void *fork_from_time_to_time(void *arg)
{
	(void)arg;
	for (int i = 0; i < FORKS; i++)
		CHECK(in_child(use_own, NULL) == 0);
	atomic_store(&forked, true);
	return NULL;
}

/* What asks for regions and gives pages back needs locks that a fork takes. */
static void test_fork_while_others_allocate(void)
{
	pthread_t forking, threads[THREADS];

	CHECK(!pthread_create(&forking, NULL, fork_from_time_to_time, NULL));
	while (!atomic_load(&forked)) {
		for (uintptr_t i = 0; i < THREADS; i++)
			CHECK(!pthread_create(&threads[i], NULL, take_large_ones, (void *)(i + 1)));
		for (int i = 0; i < THREADS; i++)
			pthread_join(threads[i], NULL);
	}
	pthread_join(forking, NULL);
}

static void free_in_the_wrong_session(volatile int *other)
{
	fclose(stderr);
	use_own(NULL);
	gmem_free(session, gmem_malloc((struct gmem *)other, 10));
}

static void test_close_with_live_ones(void)
{
	struct gmem *other;
	char *at;

	OK(gmem_open(NULL, NULL, &other));
	at = gmem_malloc(other, 100000);
	CHECK(at);
	*at = 1;
	CHECK(in_child(free_in_the_wrong_session, (volatile int *)other) == SIGABRT);
	OK(gmem_close(other));
	at = gmem_malloc(session, 10); /* and this thread's caches are not mistaken for the other's */
	CHECK(at);
	*at = 1;
	gmem_free(session, at);
}

static void *use_and_end(void *arg)
{
	struct gmem *other = arg;
	void *at[100];

	for (int i = 0; i < 100; i++)
		at[i] = gmem_malloc(other, (size_t)i * 50);
	for (int i = 0; i < 100; i++)
		gmem_free(other, at[i]);
	pthread_barrier_wait(&used);
	return NULL;
}

/* A thread that is done with a session may end while it is closed. */
static void test_close_while_threads_end(void)
{
	pthread_t threads[THREADS];
	struct gmem *other;

	pthread_barrier_init(&used, NULL, THREADS + 1);
	for (int round = 0; round < 10; round++) {
		OK(gmem_open(NULL, NULL, &other));
		for (int i = 0; i < THREADS; i++)
			CHECK(!pthread_create(&threads[i], NULL, use_and_end, other));
		pthread_barrier_wait(&used);
		OK(gmem_close(other));
		for (int i = 0; i < THREADS; i++)
			pthread_join(threads[i], NULL);
	}
	pthread_barrier_destroy(&used);
}

int main(int argc, char **argv)
{
	CHECK(argc == 3);
	device = argv[1];
	kernels = argv[2];
	OK(gmem_open(NULL, NULL, &session));
	test_shapes();
	test_kernel();
	test_fork();
	test_fork_while_others_allocate();
	test_close_with_live_ones();
	test_close_while_threads_end();
	test_threads();
	test_freed_memory_is_given_back();
	OK(gmem_close(session));
	return 0;
}
