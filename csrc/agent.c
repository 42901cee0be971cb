/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <gmem_wire.h>

#include <gmem/agent.h>

int gmem_agent_create(int fd, struct gmem_agent **ret)
{
	struct gmem_agent *agent = calloc(1, sizeof(*agent));
	void *at;
	int err = -ENOMEM;

	if (agent)
		err = fd >= 0 ? gmem_file_adopt(fd, GMEM_CLASS_SMALL, GMEM_AGENT_BYTES, 0, &agent->file) :
				gmem_file_create("gmem-agent", GMEM_CLASS_SMALL, GMEM_AGENT_BYTES, 0, &agent->file);
	if (err) {
		if (fd >= 0)
			close(fd);
		free(agent);
		return err;
	}
	at = mmap(NULL, GMEM_AGENT_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, agent->file->fd, 0);
	if (at == MAP_FAILED) {
		err = -errno;
		gmem_file_unref(agent->file);
		free(agent);
		return err;
	}
	agent->shared = at;
	agent->shared->magic = GMEM_AGENT_MAGIC;
	agent->head = __atomic_load_n(&agent->shared->head, __ATOMIC_RELAXED);
	gmem_mutex_init(&agent->lock, GMEM_RANK_AGENT);
	*ret = agent;
	return 0;
}

void gmem_agent_destroy(struct gmem_agent *agent)
{
	if (!agent)
		return;
	munmap(agent->shared, GMEM_AGENT_BYTES);
	gmem_file_unref(agent->file);
	gmem_mutex_deinit(&agent->lock);
	free(agent);
}

static void write_last_locked(struct gmem_agent *agent)
{
	uint32_t tail = __atomic_load_n(&agent->shared->tail, __ATOMIC_ACQUIRE);

	if (agent->last.bytes && agent->head - tail < GMEM_AGENT_ENTRIES)
		agent->shared->entries[agent->head++ % GMEM_AGENT_ENTRIES] =
			(struct gmem_agent_entry){ agent->last.va, agent->last.bytes };
	agent->last.bytes = 0;
}

void gmem_agent_put(struct gmem_agent *agent, struct gmem_range range)
{
	gmem_mutex_lock(&agent->lock);
	if (agent->last.bytes && agent->last.va + agent->last.bytes == range.va) {
		agent->last.bytes += range.bytes;
	} else {
		write_last_locked(agent);
		agent->last = range;
	}
	gmem_mutex_unlock(&agent->lock);
}

void gmem_agent_flush(struct gmem_agent *agent)
{
	gmem_mutex_lock(&agent->lock);
	write_last_locked(agent);
	__atomic_store_n(&agent->shared->head, agent->head, __ATOMIC_RELEASE);
	gmem_mutex_unlock(&agent->lock);
	syscall(SYS_futex, &agent->shared->head, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}
