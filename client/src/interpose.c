/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>

#include "interpose.h"
#include "syscalls.h"

#define HANDLERS_MAX 16
#define LOCAL _Thread_local __attribute__((tls_model("initial-exec")))

LOCAL bool gmem_inside;

void gmem_find_next(const char *name, void *ret)
{
	void *found = dlsym(RTLD_NEXT, name);

	if (found)
		memcpy(ret, &found, sizeof(found)); /* function pointers are no void pointers in C */
}

bool gmem_enter(struct gmem_visit *visit)
{
	/* not those that a mistake of the program's raises at once */
	const uint64_t at_once = 1ull << (SIGSEGV - 1) | 1ull << (SIGBUS - 1) | 1ull << (SIGILL - 1) |
				 1ull << (SIGFPE - 1) | 1ull << (SIGTRAP - 1) | 1ull << (SIGABRT - 1);
	const uint64_t blocked = ~at_once;

	if (gmem_inside)
		return false;
	gmem_sys(SYS_rt_sigprocmask, SIG_BLOCK, (long)&blocked, (long)&visit->signals, sizeof(blocked), 0, 0);
	gmem_inside = true;
	return true;
}

void gmem_leave(const struct gmem_visit *visit)
{
	int before = errno;

	gmem_inside = false;
	gmem_sys(SYS_rt_sigprocmask, SIG_SETMASK, (long)&visit->signals, 0, sizeof(visit->signals), 0, 0);
	errno = before;
}

/* ---- fork: gmem's handlers are the first that the C library knows ---- */

/* A child's memory has to be its own before any other handler of the program writes to it; the C library would run them
 * in the order in which libraries came to register them. */
static struct {
	void (*prepare)(void);
	void (*parent)(void);
	void (*child)(void);
} handlers[HANDLERS_MAX];
static _Atomic int handler_count;
static int (*next_register)(void (*prepare)(void), void (*parent)(void), void (*child)(void), void *library);
/* From gmem's last step before a fork to its first one after. */
static LOCAL struct gmem_visit forking;
static LOCAL bool entered;

void gmem_fork_prepare(void)
{
	entered = gmem_enter(&forking);
	for (int i = atomic_load(&handler_count) - 1; i >= 0; i--)
		if (handlers[i].prepare)
			handlers[i].prepare();
}

static void leave_fork(void)
{
	if (entered)
		gmem_leave(&forking);
	entered = false;
}

void gmem_fork_parent(void)
{
	for (int i = 0; i < atomic_load(&handler_count); i++)
		if (handlers[i].parent)
			handlers[i].parent();
	leave_fork();
}

void gmem_fork_child(void)
{
	for (int i = 0; i < atomic_load(&handler_count); i++)
		if (handlers[i].child)
			handlers[i].child();
	leave_fork();
}

static void register_first(void)
{
	gmem_find_next("__register_atfork", &next_register);
	if (next_register)
		next_register(gmem_fork_prepare, gmem_fork_parent, gmem_fork_child, NULL);
}

static int be_first(void)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;

	pthread_once(&once, register_first);
	return next_register ? 0 : ENOMEM;
}

/* Behind pthread_atfork(). */
int in_register_atfork(void (*prepare)(void), void (*parent)(void), void (*child)(void), void *library)
	IN_PLACE_OF("__register_atfork");
int in_register_atfork(void (*prepare)(void), void (*parent)(void), void (*child)(void), void *library)
{
	int err = be_first();

	return err ? err : next_register(prepare, parent, child, library);
}

/* atfork.h */
__attribute__((visibility("default"))) int gmem_preload_atfork(void (*prepare)(void), void (*parent)(void),
							       void (*child)(void))
{
	static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
	int err = be_first(), at;

	pthread_mutex_lock(&lock);
	at = atomic_load(&handler_count);
	err = at < HANDLERS_MAX ? err : ENOMEM;
	if (!err) {
		handlers[at].prepare = prepare;
		handlers[at].parent = parent;
		handlers[at].child = child;
		atomic_store(&handler_count, at + 1);
	}
	pthread_mutex_unlock(&lock);
	return err;
}
