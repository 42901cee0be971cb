/* SPDX-License-Identifier: Apache-2.0
 *
 * adopt_fails DEVICE KERNELS.SO: each system call of an adoption fails in turn, and each of a fork with adopted memory, in
 * the parent and in the child. Whatever happens, threads go on afterwards, and no byte is lost.
 *
 * A thread of this process decides over the calls of the one that adopts (seccomp_unotify(2)).
 */
#define _GNU_SOURCE
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include "check.h"

#define PAGE 4096ul
#define MIB (1ul << 20)
#define THREADS 2
#define STEPS_MAX 2000
#define PATIENCE_MS 20000
#define SKIP 77

enum who { NOBODY, ADOPTER, CHILD };

static struct gmem *session;
static atomic_int listener = -1;
static _Atomic pid_t adopter;
static atomic_int target = NOBODY, left; /* calls of the target until one fails */
static atomic_bool fired;

static int error_of(int number)
{
	return number == SYS_openat || number == SYS_pipe2 ? EMFILE : number == SYS_clone ? EAGAIN : ENOMEM;
}

static bool is_next(pid_t pid)
{
	int who = target;

	if (who == NOBODY || (who == ADOPTER) != (pid == adopter))
		return false;
	return atomic_fetch_sub(&left, 1) == 1;
}

/* Nothing here may wait for what the other threads do, or touch what is adopted. */
static void *supervise(void *arg)
{
	struct seccomp_notif call;
	struct seccomp_notif_resp answer;

	(void)arg;
	while (listener < 0)
		usleep(100);
	for (;;) {
		memset(&call, 0, sizeof(call));
		if (ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, &call))
			continue;
		answer = (struct seccomp_notif_resp){ .id = call.id, .flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE };
		if (is_next((pid_t)call.pid)) {
			fired = true;
			answer.flags = 0;
			answer.error = -error_of(call.data.nr);
		}
		ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &answer);
	}
	return NULL;
}

/* This thread's calls and its children's. Threads that exist already are left alone. */
static int watch_calls(void)
{
	static const int calls[] = { SYS_ioctl, SYS_mmap, SYS_mremap, SYS_madvise, SYS_process_vm_readv, SYS_pread64, SYS_openat,
				     SYS_pipe2, SYS_clone, SYS_mprotect };
	enum { COUNT = sizeof(calls) / sizeof(calls[0]) };
	struct sock_filter code[COUNT + 3];
	struct sock_fprog program = { COUNT + 3, code };

	code[0] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
	for (unsigned i = 0; i < COUNT; i++)
		code[1 + i] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)calls[i], COUNT - i, 0);
	code[COUNT + 1] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
	code[COUNT + 2] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF);
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
		return -1;
	return (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, &program);
}

static void arm(enum who who, int step)
{
	fired = false;
	left = step;
	target = who;
}

static bool disarm(void)
{
	target = NOBODY;
	return fired;
}

/* ---- memory that threads count in ---- */

struct side {
	_Atomic(uint8_t *) at; /* NULL: pause */
	size_t bytes;
	size_t index;
	atomic_ulong rounds;
	atomic_bool paused;
};

static struct side sides[THREADS];

/* A word in every page is this thread's alone. */
static void *count(void *arg)
{
	struct side *side = arg;
	uint8_t *before = NULL;
	uint64_t n = 0;

	for (;;) {
		uint8_t *at = side->at;

		side->paused = !at;
		if (at != before)
			n = 0;
		before = at;
		if (!at) {
			usleep(200);
			continue;
		}
		for (size_t i = side->index * 8; i < side->bytes; i += PAGE) {
			volatile uint64_t *word = (volatile uint64_t *)(void *)(at + i);

			if (*word != n)
				FAILED("thread %zu: %llu instead of %llu at %zu", side->index, (unsigned long long)*word,
				       (unsigned long long)n, i);
			*word = n + 1;
		}
		n++;
		side->rounds++;
	}
	return NULL;
}

static bool is_untouched(size_t i)
{
	return i % PAGE >= THREADS * 8;
}

static void check_rest(const uint8_t *at, size_t bytes)
{
	for (size_t i = 0; i < bytes; i++)
		if (is_untouched(i) && at[i] != (uint8_t)(i / PAGE + i))
			FAILED("byte %zu is %u", i, at[i]);
}

static uint8_t *begin(size_t bytes)
{
	uint8_t *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(at != MAP_FAILED);
	for (size_t i = 0; i < bytes; i++)
		if (is_untouched(i))
			at[i] = (uint8_t)(i / PAGE + i);
	for (int i = 0; i < THREADS; i++) {
		sides[i].bytes = bytes;
		sides[i].at = at;
	}
	return at;
}

static void check_threads(const char *what, int step)
{
	for (int i = 0; i < THREADS; i++) {
		unsigned long seen = sides[i].rounds;

		for (int ms = 0; sides[i].rounds < seen + 2; ms++) {
			if (ms == PATIENCE_MS)
				FAILED("%s: a thread hangs after step %d has failed", what, step);
			usleep(1000);
		}
	}
}

static void end(uint8_t *at, size_t bytes)
{
	for (int i = 0; i < THREADS; i++) {
		sides[i].at = NULL;
		while (!sides[i].paused)
			usleep(100);
	}
	check_rest(at, bytes);
	CHECK(!munmap(at, bytes));
}

/* ---- what fails ---- */

static int adoptions(void)
{
	const size_t bytes = 5 * MIB + 3 * PAGE;
	int step = 0, refused = 0;
	bool failed;

	do {
		struct gmem_range range = { NULL, 0 };
		uint8_t *at = begin(bytes);
		int err;

		check_threads("before", step);
		arm(ADOPTER, ++step);
		err = gmem_adopt(session, at, bytes, NULL, &range);
		failed = disarm();
		CHECK(failed || !err);
		refused += err != 0;
		check_threads("adopt", step);
		check_rest(at, bytes);
		if (err && range.bytes < bytes) { /* nothing is left that would keep the rest from it */
			OK(gmem_adopt(session, at + range.bytes, bytes - range.bytes, NULL, &range));
			check_threads("adopt again", step);
			check_rest(at, bytes);
		}
		end(at, bytes);
	} while (failed && step < STEPS_MAX);
	CHECK(step < STEPS_MAX && refused > 20);
	return step;
}

static int child_of(const uint8_t *at, size_t bytes)
{
	for (size_t i = 0; i < bytes; i += PAGE) {
		const uint64_t *words = (const uint64_t *)(const void *)(at + i);

		if (words[0] > words[-(long)(i ? PAGE / 8 : 0)] || at[i + 100] != (uint8_t)((i + 100) / PAGE + i + 100))
			return 1; /* of no one moment, or lost */
	}
	return 0;
}

static int forks(enum who who)
{
	const size_t bytes = 2 * MIB;
	uint8_t *at = begin(bytes);
	struct gmem_range range;
	int step = 0, none = 0;
	bool failed;

	OK(gmem_adopt(session, at, bytes, NULL, &range));
	do {
		int status = 0;
		pid_t pid;

		check_threads("before", step);
		arm(who, ++step);
		pid = fork();
		if (!pid) {
			signal(SIGSEGV, SIG_DFL);
			_exit(child_of(at, bytes));
		}
		if (pid < 0)
			CHECK(errno == EAGAIN);
		else
			CHECK(waitpid(pid, &status, 0) == pid);
		failed = disarm();
		if (pid > 0 && (failed ? status && !(WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV) : status))
			FAILED("step %d: the child ended with status %#x", step, status);
		none += pid < 0 || status;
		check_threads(who == ADOPTER ? "fork" : "child", step);
		check_rest(at, bytes);
	} while (failed && step < STEPS_MAX);
	CHECK(step < STEPS_MAX && none > 0);
	end(at, bytes);
	return step;
}

int main(int argc, char **argv)
{
	pthread_t thread;
	int fd, adopting, forking, joining;

	(void)argv;
	CHECK(argc == 3);
	OK(gmem_open(NULL, NULL, &session));
	CHECK(!pthread_create(&thread, NULL, supervise, NULL));
	for (size_t i = 0; i < THREADS; i++) {
		sides[i].index = i;
		CHECK(!pthread_create(&thread, NULL, count, &sides[i]));
	}
	adopter = (pid_t)syscall(SYS_gettid);
	fd = watch_calls();
	if (fd < 0) {
		printf("no seccomp here\n");
		return SKIP;
	}
	listener = fd;
	adopting = adoptions();
	forking = forks(ADOPTER);
	joining = forks(CHILD);
	printf("ok: %d steps of adoptions, %d of forks, %d of children\n", adopting, forking, joining);
	fflush(stdout);
	_exit(0); /* the others count on */
}
