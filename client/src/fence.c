/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "error.h"
#include "fence.h"
#include "ring.h"

#define SECOND_NS 1000000000ull

struct gmem_fence {
	pid_t pid; /* a forked child's copy is never completed */
	struct gmem_call *call; /* of a request on a ring, which only goes on as somebody asks; else NULL */
	pthread_mutex_t lock; /* guards what follows */
	pthread_cond_t changed;
	unsigned references;
	bool complete;
	int err, value;
	char message[384];
};

uint64_t gmem_now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * SECOND_NS + (uint64_t)now.tv_nsec;
}

struct timespec gmem_timespec(uint64_t ns)
{
	return (struct timespec){ .tv_sec = (time_t)(ns / SECOND_NS), .tv_nsec = (long)(ns % SECOND_NS) };
}

int gmem_fence_create(struct gmem_fence **ret)
{
	struct gmem_fence *fence = calloc(1, sizeof(*fence));
	pthread_condattr_t attributes;

	if (!fence)
		return gmem_fail(-ENOMEM, "out of memory");
	fence->pid = getpid();
	fence->references = 2;
	pthread_mutex_init(&fence->lock, NULL);
	pthread_condattr_init(&attributes);
	pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
	pthread_cond_init(&fence->changed, &attributes);
	pthread_condattr_destroy(&attributes);
	*ret = fence;
	return 0;
}

/* Gives up a reference; the lock is held, and let go. */
static void put_locked(struct gmem_fence *fence)
{
	bool last = !--fence->references;

	pthread_mutex_unlock(&fence->lock);
	if (!last)
		return;
	if (fence->call)
		gmem_call_put(fence->call);
	pthread_cond_destroy(&fence->changed);
	pthread_mutex_destroy(&fence->lock);
	free(fence);
}

void gmem_fence_set_call(struct gmem_fence *fence, struct gmem_call *call)
{
	fence->call = call;
}

void gmem_fence_complete(struct gmem_fence *fence, int err, int value, const char *message)
{
	pthread_mutex_lock(&fence->lock);
	fence->complete = true;
	fence->err = err;
	fence->value = value;
	snprintf(fence->message, sizeof(fence->message), "%s", message);
	pthread_cond_broadcast(&fence->changed);
	put_locked(fence);
}

static int check(const struct gmem_fence *fence)
{
	if (!fence)
		return gmem_fail(-EINVAL, "fence: is NULL");
	if (fence->pid != getpid())
		return gmem_fail(-ECANCELED, "fence: belongs to the parent process");
	return 0;
}

int gmem_fence_wait(struct gmem_fence *fence, uint64_t timeout_ns, int *ret)
{
	bool forever = timeout_ns > INT64_MAX / 2;
	struct timespec until;
	int err = check(fence), late = 0;

	if (err)
		return err;
	until = gmem_timespec(forever ? 0 : gmem_now_ns() + timeout_ns);
	if (fence->call)
		gmem_call_wait(fence->call, timeout_ns, NULL);
	pthread_mutex_lock(&fence->lock);
	while (!fence->complete && !late) {
		if (forever)
			pthread_cond_wait(&fence->changed, &fence->lock);
		else
			late = pthread_cond_timedwait(&fence->changed, &fence->lock, &until);
	}
	if (!fence->complete)
		err = gmem_fail(-ETIMEDOUT, "fence: not complete yet");
	else if (fence->err)
		err = gmem_fail(fence->err, "%s", fence->message);
	else if (ret)
		*ret = fence->value;
	pthread_mutex_unlock(&fence->lock);
	return err;
}

int gmem_fence_poll(struct gmem_fence *fence, bool *ret)
{
	int err = check(fence);

	if (!err && !ret)
		err = gmem_fail(-EINVAL, "ret: is NULL");
	if (err)
		return err;
	if (fence->call)
		gmem_call_poll(fence->call);
	pthread_mutex_lock(&fence->lock);
	*ret = fence->complete;
	pthread_mutex_unlock(&fence->lock);
	return 0;
}

void gmem_fence_free(struct gmem_fence *fence)
{
	/* In a forked child the lock may be held by a thread that is not there: its copy is left alone. */
	if (!fence || fence->pid != getpid())
		return;
	pthread_mutex_lock(&fence->lock);
	put_locked(fence);
}
