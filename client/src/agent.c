/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <gmem_wire.h>

#include "agent.h"
#include "syscalls.h"

#define STACK_BYTES (256u << 10)

struct gmem_agent {
	struct gmem_agent_shared *shared;
	uint64_t window_base, window_bytes;
	gmem_agent_fn beside;
	void *arg; /* beside's */
	bool stop; /* atomic */
	pthread_t thread;
};

static void drop(const struct gmem_agent *agent, struct gmem_agent_entry entry)
{
	uint64_t offset = entry.va - agent->window_base;

	/* What is in the window is in files: of private memory DONTNEED would drop the content, and of a pool that is mapped to
	 * read only there is none. */
	if (entry.va < agent->window_base || offset >= agent->window_bytes || entry.bytes > agent->window_bytes - offset) {
		if (agent->beside)
			agent->beside(agent->arg, entry.va, entry.bytes);
		return;
	}
	gmem_sys_madvise((void *)(uintptr_t)entry.va, entry.bytes, MADV_DONTNEED); /* unmapped meanwhile: ENOMEM, and no harm */
}

static void *run(void *arg)
{
	struct gmem_agent *agent = arg;
	struct gmem_agent_shared *shared = agent->shared;
	uint32_t tail = __atomic_load_n(&shared->tail, __ATOMIC_RELAXED);

	pthread_setname_np(pthread_self(), "gmem-agent");
	while (!__atomic_load_n(&agent->stop, __ATOMIC_ACQUIRE)) {
		uint32_t head = __atomic_load_n(&shared->head, __ATOMIC_ACQUIRE);

		if (head == tail) {
			syscall(SYS_futex, &shared->head, FUTEX_WAIT, head, NULL, NULL, 0);
			continue;
		}
		drop(agent, shared->entries[tail % GMEM_AGENT_ENTRIES]);
		__atomic_store_n(&shared->tail, ++tail, __ATOMIC_RELEASE);
	}
	return NULL;
}

static int start_thread(struct gmem_agent *agent)
{
	pthread_attr_t attributes;
	sigset_t all, before;
	int err;

	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, STACK_BYTES);
	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, &before); /* the program's handlers run on its own threads */
	err = pthread_create(&agent->thread, &attributes, run, agent);
	if (err == EINVAL) /* the program's thread-local storage is part of it, and does not fit */
		err = pthread_create(&agent->thread, NULL, run, agent);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	pthread_attr_destroy(&attributes);
	return -err;
}

static int map(struct gmem_agent *agent, int fd)
{
	void *at = mmap(NULL, GMEM_AGENT_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	if (at == MAP_FAILED)
		return -errno;
	agent->shared = at;
	madvise(at, GMEM_AGENT_BYTES, MADV_DONTFORK);
	return agent->shared->magic == GMEM_AGENT_MAGIC ? 0 : -EPROTO;
}

int gmem_agent_start(int fd, uint64_t window_base, uint64_t window_bytes, gmem_agent_fn beside, void *arg,
		     struct gmem_agent **ret)
{
	struct gmem_agent *agent = calloc(1, sizeof(*agent));
	int err = agent ? map(agent, fd) : -ENOMEM;

	close(fd);
	if (!err) {
		agent->window_base = window_base;
		agent->window_bytes = window_bytes;
		agent->beside = beside;
		agent->arg = arg;
		err = start_thread(agent);
	}
	if (!err) {
		*ret = agent;
		return 0;
	}
	if (agent && agent->shared)
		munmap(agent->shared, GMEM_AGENT_BYTES);
	free(agent);
	return err;
}

void gmem_agent_stop(struct gmem_agent *agent)
{
	__atomic_store_n(&agent->stop, true, __ATOMIC_RELEASE);
	/* head itself changes, or a thread that is about to wait would miss the wake-up */
	__atomic_add_fetch(&agent->shared->head, 1, __ATOMIC_SEQ_CST);
	syscall(SYS_futex, &agent->shared->head, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
	pthread_join(agent->thread, NULL);
	munmap(agent->shared, GMEM_AGENT_BYTES);
	free(agent);
}

void gmem_agent_abandon(struct gmem_agent *agent)
{
	free(agent); /* the mapping was not inherited */
}
