/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "context.h"
#include "error.h"

#define SENT_MAX 8
#define HOLD_TRIES_MAX 200
#define HOLD_WAIT_NS 1000000000ull
#define MS_NS 1000000ull

/* ---- the list ---- */

static void free_launch(struct gmem_launch *launch)
{
	free(launch->held);
	free(launch);
}

/* Sends what may be with the process. What does not fit now goes with the next completion. */
static void send_locked(struct gmem_context *context)
{
	struct gmem_launch *launch = context->first;

	for (size_t i = 0; launch && i < context->sent; i++)
		launch = launch->next;
	while (launch && context->sent < SENT_MAX) {
		ssize_t n = send(context->channel, &launch->run, sizeof(launch->run), MSG_NOSIGNAL | MSG_DONTWAIT);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return; /* full; or at its end, as the reader will see */
		context->sent++;
		launch = launch->next;
	}
}

static int append(struct gmem_context *context, struct gmem_launch *launch)
{
	int err;

	pthread_mutex_lock(&context->lock);
	err = context->ended;
	if (err) {
		gmem_fail(err, "%s", context->message);
	} else {
		launch->run.id = ++context->last_id;
		if (context->last)
			context->last->next = launch;
		else
			context->first = launch;
		context->last = launch;
		send_locked(context);
	}
	pthread_mutex_unlock(&context->lock);
	return err;
}

static struct gmem_launch *take_first_locked(struct gmem_context *context)
{
	struct gmem_launch *launch = context->first;

	context->first = launch->next;
	if (!context->first)
		context->last = NULL;
	if (context->sent)
		context->sent--;
	context->completed++;
	pthread_cond_broadcast(&context->progress);
	return launch;
}

/* ---- launching ---- */

static int check_launch(const struct gmem_context *context, const char *library, const char *symbol, void *const *args,
			size_t arg_count, struct gmem_fence **ret)
{
	if (!context || !ret)
		return gmem_fail(-EINVAL, "%s: is NULL", context ? "ret" : "context");
	if (context->owner != getpid())
		return gmem_fail(-ECANCELED, "context: belongs to the parent process; open one of your own");
	if (context->gpu)
		return gmem_fail(-EOPNOTSUPP, "context: kernels on %s are launched with CUDA, between gmem_acquire() and "
				 "gmem_release_after()", context->device.name);
	if (!library || !*library)
		return gmem_fail(-EINVAL, "library: is NULL or empty");
	if (!symbol || !*symbol || strlen(symbol) >= GMEM_LAUNCH_SYMBOL_BYTES)
		return gmem_fail(-EINVAL, "symbol: must have 1 to %d bytes", GMEM_LAUNCH_SYMBOL_BYTES - 1);
	if (arg_count > GMEM_ARGS_MAX)
		return gmem_fail(-EINVAL, "arg_count: %zu is more than %d", arg_count, GMEM_ARGS_MAX);
	if (arg_count && !args)
		return gmem_fail(-EINVAL, "args: is NULL");
	return 0;
}

static int check_options(const struct gmem_launch_options *options)
{
	int err = gmem_check_options(options->size, sizeof(*options), "gmem_launch_options");

	if (!err)
		err = gmem_check_ranges(options->writes, options->write_count, "options: writes");
	if (!err)
		err = gmem_check_ranges(options->reads, options->read_count, "options: reads");
	return err;
}

static int fill_run(struct gmem_launch_run *run, const char *library, const char *symbol, void *const *args,
		    size_t arg_count)
{
	char resolved[PATH_MAX];

	/* The device process keeps the directory it was started in. */
	if (strchr(library, '/')) {
		if (!realpath(library, resolved))
			return gmem_fail(-errno, "library: %s: %s", library, strerror(errno));
		library = resolved;
	}
	if (strlen(library) >= sizeof(run->library))
		return gmem_fail(-ENAMETOOLONG, "library: longer than %zu bytes", sizeof(run->library) - 1);
	strcpy(run->library, library);
	strcpy(run->symbol, symbol);
	run->arg_count = arg_count;
	for (size_t i = 0; i < arg_count; i++)
		run->args[i] = (uintptr_t)args[i];
	return 0;
}

static bool is_full(int err)
{
	return err == -ENOMEM || err == -ENOSPC || err == -EBUSY || err == -EAGAIN;
}

/* Holds a launch's ranges on the device. If what earlier launches hold is in the way, waits for them. */
static int hold_patiently(struct gmem_context *context, const struct gmem_range *ranges, size_t count, bool write)
{
	int err;

	for (int i = 0; i < HOLD_TRIES_MAX; i++) {
		struct timespec until;
		uint64_t completed;
		bool idle;

		pthread_mutex_lock(&context->lock);
		completed = context->completed;
		idle = !context->first;
		pthread_mutex_unlock(&context->lock);
		err = gmem_context_hold(context, ranges, count, write);
		if (!err || !is_full(err) || idle)
			return err;
		until = gmem_timespec(gmem_now_ns() + HOLD_WAIT_NS);
		pthread_mutex_lock(&context->lock);
		while (completed == context->completed && !context->ended)
			if (pthread_cond_timedwait(&context->progress, &context->lock, &until))
				break;
		pthread_mutex_unlock(&context->lock);
	}
	return err;
}

static void let_go(struct gmem_context *context, struct gmem_launch *launch)
{
	if (launch->held_count)
		gmem_context_let_go(context, launch->held, launch->held_count);
	launch->held_count = 0;
}

static int hold_all(struct gmem_context *context, const struct gmem_launch_options *options,
		    struct gmem_launch *launch)
{
	size_t writes = options->write_count, reads = options->read_count;
	int err = 0;

	if (!writes && !reads)
		return 0;
	launch->held = calloc(writes + reads, sizeof(*launch->held));
	if (!launch->held)
		return gmem_fail(-ENOMEM, "out of memory");
	if (writes) {
		memcpy(launch->held, options->writes, writes * sizeof(*launch->held));
		err = hold_patiently(context, options->writes, writes, true);
		launch->held_count = err ? 0 : writes;
	}
	if (!err && reads) {
		memcpy(launch->held + writes, options->reads, reads * sizeof(*launch->held));
		err = hold_patiently(context, options->reads, reads, false);
		launch->held_count += err ? 0 : reads;
	}
	if (err) {
		char why[384];

		snprintf(why, sizeof(why), "%s", gmem_last_error());
		let_go(context, launch);
		gmem_fail(err, "options: %s", why);
	}
	return err;
}

int gmem_context_launch(struct gmem_context *context, const char *library, const char *symbol, void *const *args,
			size_t arg_count, const struct gmem_launch_options *options, struct gmem_fence **ret)
{
	struct gmem_fence *fence = NULL;
	struct gmem_launch *launch;
	int err = check_launch(context, library, symbol, args, arg_count, ret);

	if (!err && options)
		err = check_options(options);
	if (err)
		return err;
	launch = calloc(1, sizeof(*launch));
	if (!launch)
		return gmem_fail(-ENOMEM, "out of memory");
	launch->timeout_ns = options ? options->timeout_ns : 0;
	err = fill_run(&launch->run, library, symbol, args, arg_count);
	if (!err)
		err = gmem_fence_create(&fence);
	if (!err && options)
		err = hold_all(context, options, launch);
	if (!err) {
		/* It may be complete, and freed, before append() returns. */
		launch->fence = fence;
		err = append(context, launch);
		if (!err) {
			*ret = fence;
			return 0;
		}
		let_go(context, launch);
	}
	if (fence) {
		gmem_fence_complete(fence, err, 0, "");
		gmem_fence_free(fence);
	}
	free_launch(launch);
	return err;
}

int gmem_context_ask(struct gmem_context *context, enum gmem_launch_kind kind, const uint64_t args[3], int *ret_value)
{
	struct gmem_launch *launch = calloc(1, sizeof(*launch));
	struct gmem_fence *fence;
	int err = launch ? gmem_fence_create(&fence) : -ENOMEM;

	if (err) {
		free(launch);
		return gmem_fail(err, "out of memory");
	}
	launch->fence = fence;
	launch->run.kind = kind;
	launch->run.arg_count = 3;
	memcpy(launch->run.args, args, 3 * sizeof(*args));
	err = append(context, launch);
	if (!err)
		err = gmem_fence_wait(fence, GMEM_FOREVER, ret_value);
	else
		free_launch(launch);
	if (err)
		gmem_fence_complete(fence, err, 0, "");
	gmem_fence_free(fence);
	return err;
}

/* ---- what the process says ---- */

/* Until the running kernel's time is over; -1: no limit. */
static int time_left_ms(struct gmem_context *context)
{
	uint64_t deadline = 0, now = gmem_now_ns(), left;

	pthread_mutex_lock(&context->lock);
	if (context->first)
		deadline = context->first->deadline_ns;
	pthread_mutex_unlock(&context->lock);
	if (!deadline)
		return -1;
	if (deadline <= now)
		return 0;
	left = (deadline - now + MS_NS - 1) / MS_NS;
	return left < INT_MAX ? (int)left : INT_MAX;
}

static void on_started(struct gmem_context *context)
{
	struct gmem_launch *launch;

	pthread_mutex_lock(&context->lock);
	launch = context->first;
	if (launch && launch->timeout_ns && launch->timeout_ns < INT64_MAX)
		launch->deadline_ns = gmem_now_ns() + launch->timeout_ns;
	pthread_mutex_unlock(&context->lock);
}

static void on_finished(struct gmem_context *context, const struct gmem_launch_said *said)
{
	struct gmem_launch *launch;
	int err = 0;

	pthread_mutex_lock(&context->lock);
	launch = context->first;
	pthread_mutex_unlock(&context->lock);
	if (said->what == GMEM_LAUNCH_NO_LIBRARY)
		err = -ELIBACC;
	else if (said->what == GMEM_LAUNCH_NO_SYMBOL)
		err = -ENOENT;
	/* Let go first: whoever waits for the fence, or for room, finds the memory free. */
	let_go(context, launch);
	pthread_mutex_lock(&context->lock);
	take_first_locked(context);
	send_locked(context);
	pthread_mutex_unlock(&context->lock);
	gmem_fence_complete(launch->fence, err, said->value, said->message);
	free_launch(launch);
}

/* False: the process has said something that makes no sense. */
static bool hear(struct gmem_context *context, const struct gmem_launch_said *said)
{
	uint64_t running = 0;

	pthread_mutex_lock(&context->lock);
	if (context->first && context->sent)
		running = context->first->run.id;
	pthread_mutex_unlock(&context->lock);
	if (!running || said->id != running)
		return false;
	if (said->what == GMEM_LAUNCH_STARTED)
		on_started(context);
	else
		on_finished(context, said);
	return true;
}

static void write_obituary(const struct gmem_context *context, int status, char *ret, size_t capacity)
{
	const char *device = context->device.name;

	if (status != -1 && WIFSIGNALED(status)) {
		int number = WTERMSIG(status);
		const char *name = sigabbrev_np(number), *why = "";

		if (number == SIGSEGV)
			why = ": a kernel touched memory that is not there";
		else if (number == SIGBUS)
			why = ": a kernel touched memory that it had not acquired, or that could not be had";
		snprintf(ret, capacity, "context: its process on %s was killed by SIG%s%s", device, name ? name : "?",
			 why);
	} else if (status != -1 && WIFEXITED(status)) {
		snprintf(ret, capacity, "context: its process on %s ended with status %d", device,
			 WEXITSTATUS(status));
	} else {
		snprintf(ret, capacity, "context: its process on %s has ended", device);
	}
}

static void complete_all(struct gmem_context *context, int first_err, const char *first_message)
{
	int err = first_err;
	const char *message = first_message;

	for (;;) {
		struct gmem_launch *launch;

		pthread_mutex_lock(&context->lock);
		launch = context->first ? take_first_locked(context) : NULL;
		pthread_mutex_unlock(&context->lock);
		if (!launch)
			return;
		gmem_fence_complete(launch->fence, err, 0, message);
		free_launch(launch);
		err = context->ended;
		message = context->message;
	}
}

/* The process is gone, or has to go: every fence hears why. */
static void end(struct gmem_context *context, bool too_long)
{
	struct gmem_request request;
	char obituary[384];
	int status = -1;

	gmem_child_wait(&context->child, true, -1, &status);
	write_obituary(context, status, obituary, sizeof(obituary));
	/* gmemd sees the end by itself; but then what was held or dirty there is home before anyone hears of it. */
	gmem_request_init(&request, "context_close", 1);
	gmem_request_uint(&request, "context", context->id);
	gmem_rpc_call(context->session->rpc, &request, NULL);
	pthread_mutex_lock(&context->lock);
	if (!context->ended) {
		context->ended = -EOWNERDEAD;
		snprintf(context->message, sizeof(context->message), "%s",
			 too_long ? "context: was ended, because a kernel ran longer than its timeout" : obituary);
	}
	pthread_mutex_unlock(&context->lock);
	if (too_long)
		complete_all(context, -ETIME, "the kernel ran longer than its timeout");
	else
		complete_all(context, context->ended, context->message);
}

void *gmem_launch_read(void *arg)
{
	struct gmem_context *context = arg;

	for (;;) {
		struct pollfd readable = { .fd = context->channel, .events = POLLIN };
		struct gmem_launch_said said;
		int n = poll(&readable, 1, time_left_ms(context));

		if (n == 0 && time_left_ms(context) == 0) {
			end(context, true);
			return NULL;
		}
		if (n <= 0)
			continue;
		n = (int)recv(context->channel, &said, sizeof(said), MSG_DONTWAIT);
		/* It died with launches unread. That is reported once, before what it said last. */
		if (n < 0 && errno == ECONNRESET)
			continue;
		said.message[sizeof(said.message) - 1] = '\0';
		if (n != sizeof(said) || !hear(context, &said)) {
			end(context, false);
			return NULL;
		}
	}
}
