/* SPDX-License-Identifier: Apache-2.0
 *
 * Children: private memory stays private, whatever makes them, while threads of the parent write.
 */
#include "any.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stdatomic.h>
#include <sys/syscall.h>

#define BYTES (4 * MIB)
#define WRITERS 3
#define FORKS 4

extern char **environ;
pid_t _Fork(void);

static unsigned char *heap, *mapped, *apart, *wiped, *guarded;
static pthread_key_t keys[40]; /* more than the C library has room for by itself */
static atomic_bool stop;
static uint64_t *_Atomic counters; /* two words each, equal whenever nobody is writing them */
static char stack[256 * 1024];

static void set_all(int value)
{
	memset(heap, value, BYTES);
	memset(mapped, value + 1, BYTES);
}

static void check_all(int value)
{
	CHECK(all(heap, BYTES, value) && all(mapped, BYTES, value + 1));
}

static int in_child(void *arg)
{
	(void)arg;
	check_all(10);
	set_all(20);
	check_all(20);
	CHECK(all(wiped, MIB, 0));
	CHECK(guarded[0] == 9);
	free(heap);
	heap = malloc(BYTES);
	set_all(30);
	check_all(30);
	_exit(33);
}

static void *keep_writing(void *arg)
{
	uint64_t *words = (uint64_t *)counters + 1024 * (uintptr_t)arg;
	FILE *file = fopen("/dev/null", "w");

	for (int i = 0; i < 40; i++)
		pthread_setspecific(keys[i], words);
	for (uint64_t i = 1; !atomic_load(&stop); i++) {
		__atomic_store_n(&words[0], i, __ATOMIC_SEQ_CST); /* the copy is of one moment: never the second ahead */
		__atomic_store_n(&words[512], i, __ATOMIC_SEQ_CST);
		fprintf(file, "%d\n", (int)i);
		free(malloc(i % 5000));
	}
	fclose(file);
	return NULL;
}

static void forks_beside_threads(void)
{
	pthread_t writers[WRITERS];

	for (uintptr_t i = 0; i < WRITERS; i++)
		CHECK(!pthread_create(&writers[i], NULL, keep_writing, (void *)i));
	for (int i = 0; i < FORKS; i++) {
		pid_t child = fork(), next;

		if (!child) {
			for (int w = 0; w < WRITERS; w++) {
				uint64_t first = counters[1024 * w], second = counters[1024 * w + 512];

				CHECK(first == second || first == second + 1);
				usleep(1000);
				CHECK(counters[1024 * w] == first); /* nobody writes here */
			}
			free(malloc(100000));
			next = fork();
			if (!next)
				in_child(NULL);
			CHECK(wait_for(next) == 33);
			check_all(10);
			exit(i); /* with stdio's and atexit's */
		}
		CHECK(wait_for(child) == i);
	}
	stop = true;
	for (int i = 0; i < WRITERS; i++)
		pthread_join(writers[i], NULL);
}

static void others(void)
{
	char *const command[] = { "sh", "-c", "exit $(($(echo 30) + 1))", NULL };
	pid_t child;

	child = _Fork();
	if (!child)
		in_child(NULL);
	CHECK(wait_for(child) == 33);
	child = clone(in_child, stack + sizeof(stack), SIGCHLD, NULL);
	CHECK(wait_for(child) == 33);
	child = (pid_t)syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
	if (!child)
		in_child(NULL);
	CHECK(wait_for(child) == 33);
	child = (pid_t)syscall(SYS_fork);
	if (!child)
		in_child(NULL);
	CHECK(wait_for(child) == 33);
	check_all(10);
	CHECK(!posix_spawn(&child, "/bin/sh", NULL, NULL, command, environ));
	CHECK(wait_for(child) == 31);
	child = vfork();
	if (!child) {
		heap[0] = 77; /* the parent's memory */
		execv("/bin/sh", command);
		_exit(1);
	}
	CHECK(wait_for(child) == 31 && heap[0] == 77);
	heap[0] = 10;
	child = clone((int (*)(void *))(void *)_exit, stack + sizeof(stack), CLONE_VM | SIGCHLD, (void *)7);
	CHECK(wait_for(child) == 7);
	CHECK(system("exit 5") == 5 << 8);
	check_all(10);
}

/* A child that closes whatever it finds, as `daemon()` and process pools do. */
static void closing(void)
{
	pid_t child = fork();

	if (!child) {
		char *text = strdup("exit 9"), *command[] = { "sh", "-c", text, NULL };

		close_range(3, ~0u, 0);
		check_all(10);
		set_all(50);
		execvp("sh", command);
	}
	CHECK(wait_for(child) == 9);
}

/* The table is full: fork() works, or fails as it may. */
static void exhausted(void)
{
	int fd;

	for (int i = 0; i < 3; i++) {
		pid_t child;

		while ((fd = dup(2)) >= 0)
			;
		child = fork();
		if (!child)
			in_child(NULL);
		CHECK(child < 0 || wait_for(child) == 33);
		CHECK(child >= 0 || errno == EMFILE || errno == EAGAIN);
	}
	CHECK(!close_range(3, ~0u, 0));
	check_all(10);
}

int main(int argc, char **argv)
{
	heap = malloc(BYTES);
	mapped = map(BYTES, PROT_READ | PROT_WRITE);
	apart = map(MIB, PROT_READ | PROT_WRITE);
	wiped = map(MIB, PROT_READ | PROT_WRITE);
	guarded = map(MIB, PROT_READ | PROT_WRITE);
	counters = calloc(WRITERS * 1024, 8);
	CHECK(is_managed(heap) && is_managed(mapped) && is_managed(apart) && is_managed((void *)counters));
	for (int i = 0; i < 40; i++)
		CHECK(!pthread_key_create(&keys[i], NULL));
	memset(wiped, 4, MIB);
	memset(guarded, 9, MIB);
	CHECK(!madvise(apart, MIB, MADV_DONTFORK) && !madvise(wiped, MIB, MADV_WIPEONFORK));
	CHECK(!mprotect(guarded, 4096, PROT_READ));
	set_all(10);
	forks_beside_threads();
	others();
	closing();
	if (argc > 1 && !strcmp(argv[1], "exhausted"))
		exhausted();
	puts("ok");
	return 0;
}
