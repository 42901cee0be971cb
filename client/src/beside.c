/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "beside.h"
#include "link.h"
#include "syscalls.h"
#include "uffd.h"

struct gmem_beside {
	pthread_mutex_t lock; /* guards what follows, and is held while a translation is dropped; and over a fork */
	struct {
		uint64_t va, end;
	} *ranges;
	size_t count, capacity;
};

int gmem_beside_create(struct gmem_beside **ret)
{
	struct gmem_beside *beside = calloc(1, sizeof(*beside));

	if (!beside)
		return -ENOMEM;
	pthread_mutex_init(&beside->lock, NULL);
	*ret = beside;
	return 0;
}

void gmem_beside_destroy(struct gmem_beside *beside)
{
	if (!beside)
		return;
	pthread_mutex_destroy(&beside->lock);
	free(beside->ranges);
	free(beside);
}

void gmem_beside_lock(struct gmem_beside *beside)
{
	pthread_mutex_lock(&beside->lock);
}

void gmem_beside_unlock(struct gmem_beside *beside)
{
	pthread_mutex_unlock(&beside->lock);
}

static int add_locked(struct gmem_beside *beside, uint64_t va, uint64_t end)
{
	if (beside->count == beside->capacity) {
		size_t capacity = beside->capacity ? beside->capacity * 2 : 16;
		void *grown = realloc(beside->ranges, capacity * sizeof(*beside->ranges));

		if (!grown)
			return -ENOMEM;
		beside->ranges = grown;
		beside->capacity = capacity;
	}
	beside->ranges[beside->count].va = va;
	beside->ranges[beside->count++].end = end;
	return 0;
}

int gmem_beside_add(struct gmem_beside *beside, uint64_t va, uint64_t bytes)
{
	int err;

	pthread_mutex_lock(&beside->lock);
	err = add_locked(beside, va, va + bytes);
	pthread_mutex_unlock(&beside->lock);
	return err;
}

void gmem_beside_remove(struct gmem_beside *beside, uint64_t va, uint64_t bytes)
{
	uint64_t end = va + bytes;

	pthread_mutex_lock(&beside->lock);
	for (size_t i = 0; i < beside->count;) {
		uint64_t from = beside->ranges[i].va, stop = beside->ranges[i].end;

		if (stop <= va || from >= end) {
			i++;
			continue;
		}
		beside->ranges[i] = beside->ranges[--beside->count];
		if (from < va) /* what can't be added is aged as others are */
			add_locked(beside, from, va);
		if (stop > end)
			add_locked(beside, end, stop);
	}
	pthread_mutex_unlock(&beside->lock);
}

static bool covers_locked(const struct gmem_beside *beside, uint64_t va, uint64_t end)
{
	for (size_t i = 0; i < beside->count; i++)
		if (beside->ranges[i].va <= va && end <= beside->ranges[i].end)
			return true;
	return false;
}

void gmem_beside_age(void *arg, uint64_t va, uint64_t bytes)
{
	struct gmem_link *link = arg;
	bool stays;

	if (va + bytes < va)
		return;
	pthread_mutex_lock(&link->beside->lock);
	stays = covers_locked(link->beside, va, va + bytes);
	if (stays)
		gmem_sys_madvise((void *)(uintptr_t)va, bytes, MADV_DONTNEED);
	pthread_mutex_unlock(&link->beside->lock);
	if (!stays && link->uffd >= 0)
		gmem_uffd_protect(link->uffd, va, bytes);
}
