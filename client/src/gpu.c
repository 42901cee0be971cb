/* SPDX-License-Identifier: Apache-2.0
 *
 * Contexts on GPUs from C: in this process, where the program launches its kernels itself. What is here is what goes around
 * them: memory is acquired before, and let go when the stream has come to the end of what was put on it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "context.h"
#include "cuda.h"
#include "error.h"

#define TRIES_MAX 200
#define OPENINGS 4
#define LOOK_NS 1000000000ull

static pthread_mutex_t opening = PTHREAD_MUTEX_INITIALIZER; /* so that the context that is new there is ours */

/* A session that is opened with a GPU attached has the window reserved there. */
__attribute__((constructor)) static void enable(void)
{
	gmem_cuda_enable();
}

static int open_locked(struct gmem_context *context)
{
	struct gmem_link *link = context->session->link;
	char message[GMEM_WIRE_MESSAGE_BYTES] = "";
	int err = gmem_cuda_check(message);
	uint64_t before = 0;

	if (!err && (err = gmem_context_newest(context, getpid(), &before)))
		return err;
	if (!err)
		err = gmem_link_open_context(link->path, gmem_link_token(link), context->device.name, &context->gpu_link, message);
	if (err)
		return gmem_fail(err, "%s", message[0] ? message : strerror(-err));
	err = gmem_context_find_id(context, getpid(), before);
	if (!err && (err = gmem_cuda_open(link, context->gpu_link, context->id, &context->gpu, message)))
		gmem_fail(err, "%s", message[0] ? message : strerror(-err));
	if (err)
		gmem_link_close(context->gpu_link);
	return err;
}

/* What was being opened when gmemd was killed may be nothing that its successor knows of. */
int gmem_gpu_open(struct gmem_context *context)
{
	int err = -EOWNERDEAD;

	pthread_mutex_lock(&opening);
	for (int n = 0; err == -EOWNERDEAD && n < OPENINGS; n++)
		err = open_locked(context);
	pthread_mutex_unlock(&opening);
	return err;
}

void gmem_gpu_close(struct gmem_context *context)
{
	gmem_cuda_close(context->gpu);
	gmem_link_close(context->gpu_link);
}

static int check_usable(struct gmem_context *context)
{
	char what[GMEM_WIRE_MESSAGE_BYTES];

	return gmem_cuda_status(context->gpu, what) ?
		       gmem_fail(-EOWNERDEAD, "context: the one on %s is lost: %s", context->device.name, what) : 0;
}

static bool is_in_the_way(int err)
{
	return err == -ENOMEM || err == -ENOSPC || err == -EBUSY || err == -EAGAIN;
}

/* What is in the way may be what was let go of with a stream that has not come so far. */
int gmem_gpu_acquire(struct gmem_context *context, const struct gmem_range *ranges, size_t count, bool write)
{
	int err = -EAGAIN;

	for (int tries = 0; tries < TRIES_MAX; tries++) {
		uint64_t last = atomic_load(&context->last_ticket), done = atomic_load(&context->done_ticket);

		err = check_usable(context);
		if (!err)
			err = gmem_context_hold(context, ranges, count, write);
		if (!is_in_the_way(err) || done >= last)
			break;
		if (gmem_cuda_wait(context->gpu, done + 1, LOOK_NS) != -ETIMEDOUT)
			atomic_compare_exchange_strong(&context->done_ticket, &done, done + 1);
	}
	if (err == -EOPNOTSUPP)
		err = gmem_fail(err, "ranges: a CUDA device takes pages of 2 MiB of gmem's own: map with page_bytes of 2097152");
	return err && check_usable(context) ? -EOWNERDEAD : err;
}

/* ---- what programs call ---- */

static int check(const struct gmem_context *context)
{
	if (!context)
		return gmem_fail(-EINVAL, "context: is NULL");
	if (context->owner != getpid())
		return gmem_fail(-ECANCELED, "context: belongs to the parent process, and CUDA does not survive a fork");
	if (!context->gpu)
		return gmem_fail(-EOPNOTSUPP, "context: %s has no streams", context->device.name);
	return 0;
}

int gmem_release_after(struct gmem_context *context, void *stream, const struct gmem_range *ranges, size_t count)
{
	uint64_t flat[2 * 64], ticket = 0, seen;
	int err = check(context);

	if (!err)
		err = gmem_check_ranges(ranges, count, "ranges");
	if (!err && (!count || count > 64))
		err = gmem_fail(-EINVAL, "ranges: %zu of them, and not 1 to 64", count);
	if (err)
		return err;
	for (size_t i = 0; i < count; i++) {
		gmem_context_forget(context, &ranges[i]);
		flat[2 * i] = (uintptr_t)ranges[i].va;
		flat[2 * i + 1] = ranges[i].bytes;
	}
	err = gmem_cuda_release(context->gpu, (uintptr_t)stream, flat, count, &ticket);
	seen = atomic_load(&context->last_ticket);
	while (seen < ticket && !atomic_compare_exchange_weak(&context->last_ticket, &seen, ticket))
		;
	if (err && check_usable(context))
		return -EOWNERDEAD;
	return err ? gmem_fail(err, "stream: no event can be recorded on it") : 0;
}

int gmem_context_synchronize(struct gmem_context *context, uint64_t timeout_ns)
{
	int err = check(context);

	if (err)
		return err;
	err = gmem_cuda_wait(context->gpu, atomic_load(&context->last_ticket), timeout_ns);
	if (err == -EIO)
		return check_usable(context) ? -EOWNERDEAD : gmem_fail(err, "context: work before a release has failed");
	return err ? gmem_fail(err, "context: what was let go of is in use still") : 0;
}
