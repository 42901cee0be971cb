/* SPDX-License-Identifier: Apache-2.0
 *
 * A forked child has a copy of its own, wherever the pages are; so has its child.
 */
#include "compat.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/wait.h>

#define PAGES 6

static int hnid;
static uint8_t *data, *guarded, *apart;

static void wait_for(pid_t child)
{
	int status;

	CHECK(child > 0 && waitpid(child, &status, 0) == child);
	if (!WIFEXITED(status) || WEXITSTATUS(status))
		FAILED("the child ended with status %#x", status);
}

static void check_all(uint8_t value)
{
	for (int i = 0; i < PAGES - 1; i++)
		CHECK(all(data + i * PAGE, PAGE, (uint8_t)(value + i)));
	CHECK(all(data + (PAGES - 1) * PAGE, PAGE, 0)); /* nobody has touched it */
}

static void set_all(uint8_t value)
{
	for (int i = 0; i < PAGES - 1; i++)
		memset(data + i * PAGE, value + i, PAGE);
}

static void grandchild(void)
{
	check_all(40);
	set_all(60);
	CHECK(!gmemPrefetch(number(data), PAGES * PAGE / 2, hnid, NULL));
	check_all(60);
	_exit(0);
}

static void child(void)
{
	pid_t next;

	check_all(20); /* as it was, though the parent writes meanwhile */
	CHECK(gmemGetNumaId() == hnid);
	CHECK(!gmemPrefetch(number(data), PAGE, hnid, NULL));
	check_all(20);
	REFUSED(hmemcpy(-1, number(guarded), number(data), 8), EINVAL); /* still read-only */
	CHECK(guarded[5] == 9);
	GIVES(gmemPrefetch(number(apart), PAGE, hnid, NULL), EINVAL); /* MADV_DONTFORK */
	REFUSED(madvise(apart, PAGE, MADV_NORMAL), ENOMEM);
	set_all(40);
	next = fork();
	if (!next)
		grandchild();
	wait_for(next);
	check_all(40);
	CHECK(!gmemFreeEager(number(data), PAGE, &next));
	CHECK(!gmemStreamSynchronize(&next));
	CHECK(all(data, PAGE, 0) && data[PAGE] == 41);
	CHECK(!munmap(data, PAGES * PAGE));
	data = peer_memory(PAGE);
	data[0] = 1;
	_exit(0);
}

/* Threads go on with memory while their process forks. */
static void *churn(void *stop)
{
	while (!__atomic_load_n((int *)stop, __ATOMIC_RELAXED)) {
		uint8_t *mine = peer_memory(PAGE);

		mine[0] = 1;
		CHECK(!gmemPrefetch(number(mine), PAGE, hnid, &mine));
		CHECK(!gmemStreamSynchronize(&mine));
		CHECK(mine[0] == 1);
		CHECK(!munmap(mine, PAGE));
	}
	return NULL;
}

static void fork_among_threads(void)
{
	pthread_t threads[2];
	int stop = 0;

	for (int i = 0; i < 2; i++)
		CHECK(!pthread_create(&threads[i], NULL, churn, &stop));
	for (int round = 0; round < 8; round++) {
		pid_t pid = fork();

		if (!pid) {
			uint8_t *mine = peer_memory(PAGE);

			check_all(80);
			mine[0] = 2;
			CHECK(!munmap(mine, PAGE));
			_exit(0);
		}
		wait_for(pid);
	}
	__atomic_store_n(&stop, 1, __ATOMIC_RELAXED);
	for (int i = 0; i < 2; i++)
		CHECK(!pthread_join(threads[i], NULL));
}

/* Counts in one page after the other: at every moment, the first is as far as the last, or one ahead. */
static void *count(void *stop)
{
	for (uint64_t n = 1; !__atomic_load_n((int *)stop, __ATOMIC_RELAXED); n++)
		for (int i = 0; i < PAGES; i++)
			__atomic_store_n((uint64_t *)(data + i * PAGE), n, __ATOMIC_SEQ_CST);
	return NULL;
}

static void check_counts(void)
{
	uint64_t first = *(uint64_t *)data, before = first;

	for (int i = 1; i < PAGES; i++) {
		uint64_t here = *(uint64_t *)(data + i * PAGE);

		CHECK(here <= before && here + 1 >= first);
		before = here;
	}
}

static void fork_while_others_write(void)
{
	pthread_t thread;
	int stop = 0;

	memset(data, 0, PAGES * PAGE);
	CHECK(!pthread_create(&thread, NULL, count, &stop));
	for (int round = 0; round < 12; round++) {
		uint64_t before = __atomic_load_n((uint64_t *)data, __ATOMIC_SEQ_CST);
		pid_t pid;

		if (round % 3 == 0)
			CHECK(!gmemPrefetch(number(data), PAGE, hnid, NULL));
		pid = fork();
		if (!pid) {
			check_counts();
			CHECK(*(uint64_t *)data >= before);
			memset(data, 1, PAGES * PAGE);
			_exit(0);
		}
		wait_for(pid);
		before = __atomic_load_n((uint64_t *)data, __ATOMIC_SEQ_CST);
		while (__atomic_load_n((uint64_t *)data, __ATOMIC_SEQ_CST) == before)
			sched_yield(); /* it goes on */
	}
	__atomic_store_n(&stop, 1, __ATOMIC_RELAXED);
	CHECK(!pthread_join(thread, NULL));
	check_counts();
}

/* Without a descriptor the parent can't wait for the child, whose copy would be of no one moment: it gets none. */
static void fork_without_descriptors(void)
{
	static int fds[1 << 16];
	int count = 0, status;
	pid_t pid;

	while (count < 1 << 16 && (fds[count] = dup(0)) >= 0)
		count++;
	CHECK(errno == EMFILE);
	pid = fork();
	if (!pid) {
		signal(SIGSEGV, SIG_DFL);
		_exit(data[0] == 5 ? 1 : 2);
	}
	while (count)
		close(fds[--count]);
	CHECK(pid > 0 && waitpid(pid, &status, 0) == pid);
	if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGSEGV)
		FAILED("the child ended with status %#x", status);
	CHECK(data[0] == 5);
	data[0] = 6;
}

/* Known to the C library before gmem's own handler, but what it finds is the child's copy. */
static uint8_t *hasty;

static void write_early(void)
{
	if (hasty)
		*hasty = 77;
}

static void child_that_writes_early(void)
{
	pid_t pid;

	hasty = data;
	data[0] = 5;
	pid = fork();
	if (!pid) {
		CHECK(data[0] == 77);
		_exit(0);
	}
	wait_for(pid);
	CHECK(data[0] == 5);
	hasty = NULL;
}

int main(void)
{
	pid_t pid;

	CHECK(!pthread_atfork(NULL, NULL, write_early)); /* before gmem is used */

	hnid = gmemGetNumaId();
	CHECK(hnid > 0);
	data = peer_memory(PAGES * PAGE);
	guarded = peer_memory(PAGE);
	apart = peer_memory(PAGE);
	memset(guarded, 9, PAGE);
	CHECK(!mprotect(guarded, PAGE, PROT_READ));
	CHECK(!madvise(apart, PAGE, MADV_DONTFORK));
	set_all(20);
	CHECK(!gmemPrefetch(number(data), 2 * PAGE, hnid, NULL));
	pid = fork();
	if (!pid)
		child();
	set_all(80);
	wait_for(pid);
	check_all(80);
	CHECK(apart[0] == 0 && guarded[5] == 9);
	fork_among_threads();
	check_all(80);
	fork_while_others_write();
	child_that_writes_early();
	fork_without_descriptors();
	/* a child that goes on with another program */
	CHECK(!system("true"));
	CHECK(!munmap(data, PAGES * PAGE));
	return 0;
}
