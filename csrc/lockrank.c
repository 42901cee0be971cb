/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include <gmem/lockrank.h>

#ifdef GMEM_DEBUG
static _Thread_local enum gmem_rank held[16];
static _Thread_local int held_count;

static void push(enum gmem_rank rank)
{
	if (held_count && held[held_count - 1] >= rank) {
		fprintf(stderr, "gmem: lock rank %d taken while %d is held\n", rank, held[held_count - 1]);
		abort();
	}
	if (held_count == 16)
		abort();
	held[held_count++] = rank;
}

/* Locks need not be released in the order they were taken. */
static void pop(enum gmem_rank rank)
{
	int i = held_count;

	while (i > 0 && held[i - 1] != rank)
		i--;
	if (i == 0)
		abort();
	for (; i < held_count; i++)
		held[i - 1] = held[i];
	held_count--;
}

int gmem_lockrank_held(void)
{
	return held_count;
}
#else
static void push(enum gmem_rank rank)
{
	(void)rank;
}

static void pop(enum gmem_rank rank)
{
	(void)rank;
}

int gmem_lockrank_held(void)
{
	return 0;
}
#endif

void gmem_mutex_init(struct gmem_mutex *mutex, enum gmem_rank rank)
{
	pthread_mutex_init(&mutex->m, NULL);
	mutex->rank = rank;
}

void gmem_mutex_deinit(struct gmem_mutex *mutex)
{
	pthread_mutex_destroy(&mutex->m);
}

void gmem_mutex_lock(struct gmem_mutex *mutex)
{
	push(mutex->rank);
	pthread_mutex_lock(&mutex->m);
}

void gmem_mutex_unlock(struct gmem_mutex *mutex)
{
	pthread_mutex_unlock(&mutex->m);
	pop(mutex->rank);
}

void gmem_mutex_wait(struct gmem_mutex *mutex, pthread_cond_t *cond, uint64_t timeout_ns)
{
	struct timespec until;

	if (!timeout_ns) {
		pthread_cond_wait(cond, &mutex->m);
		return;
	}
	clock_gettime(CLOCK_MONOTONIC, &until);
	timeout_ns += (uint64_t)until.tv_nsec;
	until.tv_sec += (time_t)(timeout_ns / 1000000000ull);
	until.tv_nsec = (long)(timeout_ns % 1000000000ull);
	pthread_cond_clockwait(cond, &mutex->m, CLOCK_MONOTONIC, &until);
}

void gmem_rwlock_init(struct gmem_rwlock *lock, enum gmem_rank rank)
{
	pthread_rwlock_init(&lock->l, NULL);
	lock->rank = rank;
}

void gmem_rwlock_deinit(struct gmem_rwlock *lock)
{
	pthread_rwlock_destroy(&lock->l);
}

void gmem_rwlock_read(struct gmem_rwlock *lock)
{
	push(lock->rank);
	pthread_rwlock_rdlock(&lock->l);
}

void gmem_rwlock_write(struct gmem_rwlock *lock)
{
	push(lock->rank);
	pthread_rwlock_wrlock(&lock->l);
}

void gmem_rwlock_unlock(struct gmem_rwlock *lock)
{
	pthread_rwlock_unlock(&lock->l);
	pop(lock->rank);
}
