/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "context.h"
#include "devices.h"
#include "error.h"

#define START_MS 60000

#ifndef GMEM_LIBEXECDIR
#define GMEM_LIBEXECDIR "/usr/local/libexec"
#endif

/* ---- its process ---- */

/* Beside the library that runs, else where it was to be installed. */
static const char *find_helper(const struct gmem_context_options *options, char *buffer, size_t capacity)
{
	const char *chosen = options ? options->helper : NULL;
	const char *slash;
	Dl_info info;

	if (!chosen)
		chosen = secure_getenv("GMEM_CONTEXT_HELPER");
	if (chosen)
		return chosen;
	if (dladdr((void *)(uintptr_t)gmem_context_open, &info) && info.dli_fname &&
	    (slash = strrchr(info.dli_fname, '/'))) {
		snprintf(buffer, capacity, "%.*s/../libexec/gmem-context", (int)(slash - info.dli_fname),
			 info.dli_fname);
		if (!access(buffer, X_OK))
			return buffer;
	}
	return GMEM_LIBEXECDIR "/gmem-context";
}

static int start_process(struct gmem_context *context, const struct gmem_context_options *options)
{
	char buffer[PATH_MAX];
	const char *helper = find_helper(options, buffer, sizeof(buffer));
	char *argv[] = { "gmem-context", NULL };
	int pair[2], theirs, err;

	if (access(helper, X_OK))
		return gmem_fail(-errno, "helper: %s: %s", helper, strerror(errno));
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair))
		return gmem_fail(-errno, "socketpair: %s", strerror(errno));
	context->channel = pair[0];
	theirs = gmem_fd_high(pair[1]);
	err = theirs < 0 ? theirs : gmem_child_spawn(helper, argv, &theirs, 1, &context->child);
	if (theirs >= 0)
		close(theirs);
	if (err) {
		close(context->channel);
		return gmem_fail(err, "helper: %s can't be started: %s", helper, strerror(-err));
	}
	return 0;
}

static void end_process(struct gmem_context *context)
{
	int status;

	gmem_child_wait(&context->child, true, -1, &status);
	close(context->channel);
}

/* Tells the process whom to join, and waits until it has. The token goes over the socket: a command line can be read by
 * everyone. */
static int greet(struct gmem_context *context)
{
	struct gmem_link *link = context->session->link;
	struct gmem_launch_hello hello = { .parent = getpid() };
	struct pollfd readable = { .fd = context->channel, .events = POLLIN };
	struct gmem_launch_ready ready;
	ssize_t n;

	memcpy(hello.token, gmem_link_token(link), sizeof(hello.token));
	strcpy(hello.socket, link->path);
	strcpy(hello.device, context->device.name);
	if (send(context->channel, &hello, sizeof(hello), MSG_NOSIGNAL) < 0)
		return gmem_fail(-EOWNERDEAD, "device: the context's process ended while it started");
	do {
		n = poll(&readable, 1, START_MS);
	} while (n < 0 && errno == EINTR);
	if (n == 0)
		return gmem_fail(-ETIMEDOUT, "device: the context was not ready within %d s", START_MS / 1000);
	n = recv(context->channel, &ready, sizeof(ready), 0);
	if (n != sizeof(ready))
		return gmem_fail(-EOWNERDEAD, "device: the context's process ended while it started");
	ready.message[sizeof(ready.message) - 1] = '\0';
	if (ready.status)
		return gmem_fail(ready.status, "device: %s: %s", context->device.name, ready.message);
	return 0;
}

int gmem_context_newest(const struct gmem_context *context, pid_t pid, uint64_t *ret)
{
	struct gmem_request request;
	struct gmem_reply reply;
	const msgpack_object *list;
	int err;

	gmem_request_init(&request, "contexts", 0);
	err = gmem_rpc_call(context->session->rpc, &request, &reply);
	if (err)
		return err;
	*ret = 0;
	list = gmem_map_get(gmem_reply_root(&reply), "contexts");
	for (uint32_t i = 0; list && list->type == MSGPACK_OBJECT_ARRAY && i < list->via.array.size; i++) {
		const msgpack_object *row = &list->via.array.ptr[i];
		uint64_t its_pid, hnid, id;

		if (!gmem_map_uint(row, "pid", &its_pid) && !gmem_map_uint(row, "hnid", &hnid) &&
		    !gmem_map_uint(row, "context", &id) && its_pid == (uint64_t)pid &&
		    hnid == (uint64_t)context->device.hnid && id > *ret)
			*ret = id;
	}
	gmem_reply_deinit(&reply);
	return 0;
}

int gmem_context_find_id(struct gmem_context *context, pid_t pid, uint64_t before)
{
	int err = gmem_context_newest(context, pid, &context->id);

	if (!err && context->id <= before)
		err = gmem_fail(-EOWNERDEAD, "device: gmemd has lost the context already");
	return err;
}

static int start_reader(struct gmem_context *context)
{
	sigset_t all, before;
	int err;

	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, &before);
	err = pthread_create(&context->reader, NULL, gmem_launch_read, context);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	return err ? gmem_fail(-err, "the context's thread: %s", strerror(err)) : 0;
}

/* ---- open, close ---- */

static int check_open(const struct gmem *session, const char *device, const struct gmem_context_options *options,
		      struct gmem_context **ret)
{
	if (!session || !ret)
		return gmem_fail(-EINVAL, "%s: is NULL", session ? "ret" : "session");
	if (!device || !*device)
		return gmem_fail(-EINVAL, "device: is NULL or empty");
	return options ? gmem_check_options(options->size, sizeof(*options), "gmem_context_options") : 0;
}

static int start(struct gmem_context *context, const struct gmem_context_options *options)
{
	int err;

	if (context->device.caps & GMEM_CAP_OWN_FRAMES)
		return gmem_gpu_open(context);
	err = start_process(context, options);
	if (err)
		return err;
	err = greet(context);
	if (!err)
		err = gmem_context_find_id(context, context->child.pid, 0);
	if (!err)
		err = start_reader(context);
	if (err)
		end_process(context);
	return err;
}

static void enlist(struct gmem_context *context)
{
	struct gmem *session = context->session;

	gmem_session_count_contexts(session, 1);
	pthread_mutex_lock(&session->lock);
	context->next = session->contexts;
	session->contexts = context;
	pthread_mutex_unlock(&session->lock);
}

static void delist(struct gmem_context *context)
{
	struct gmem *session = context->session;
	struct gmem_context **at;

	pthread_rwlock_rdlock(&session->mapping);
	pthread_mutex_lock(&session->lock);
	for (at = &session->contexts; *at && *at != context; at = &(*at)->next)
		;
	if (*at)
		*at = context->next;
	pthread_mutex_unlock(&session->lock);
	pthread_rwlock_unlock(&session->mapping);
	gmem_session_count_contexts(session, -1);
}

static void free_held(struct gmem_held *held)
{
	while (held) {
		struct gmem_held *next = held->next;

		free(held);
		held = next;
	}
}

static void free_context(struct gmem_context *context)
{
	delist(context);
	pthread_cond_destroy(&context->progress);
	pthread_mutex_destroy(&context->lock);
	free_held(context->held);
	free(context);
}

int gmem_context_open(struct gmem *session, const char *device, const struct gmem_context_options *options,
		      struct gmem_context **ret)
{
	struct gmem_context *context;
	pthread_condattr_t attributes;
	int err = check_open(session, device, options, ret);

	if (err)
		return err;
	context = calloc(1, sizeof(*context));
	if (!context)
		return gmem_fail(-ENOMEM, "out of memory");
	context->session = session;
	context->owner = getpid();
	pthread_mutex_init(&context->lock, NULL);
	pthread_condattr_init(&attributes);
	pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
	pthread_cond_init(&context->progress, &attributes);
	pthread_condattr_destroy(&attributes);
	err = gmem_device_find(session, device, &context->device);
	if (!err && !(context->device.caps & GMEM_CAP_COMPUTE))
		err = gmem_fail(-EOPNOTSUPP, "device: %s has no contexts", device);
	/* What is adopted meanwhile would be known neither to its process nor here. */
	pthread_rwlock_rdlock(&session->mapping);
	if (!err)
		err = start(context, options);
	if (!err)
		enlist(context);
	pthread_rwlock_unlock(&session->mapping);
	if (err) {
		pthread_cond_destroy(&context->progress);
		pthread_mutex_destroy(&context->lock);
		free(context);
		return err;
	}
	*ret = context;
	return 0;
}

int gmem_context_close(struct gmem_context *context)
{
	if (!context)
		return gmem_fail(-EINVAL, "context: is NULL");
	if (context->owner != getpid()) {
		/* A forked child's copy: only its descriptors are its own. */
		pthread_mutex_lock(&context->session->lock);
		for (struct gmem_context **at = &context->session->contexts; *at; at = &(*at)->next)
			if (*at == context) {
				*at = context->next;
				break;
			}
		pthread_mutex_unlock(&context->session->lock);
		if (!context->gpu) {
			close(context->channel);
			close(context->child.pidfd);
		}
		free_held(context->held);
		free(context);
		return 0;
	}
	if (context->gpu) {
		gmem_gpu_close(context);
		free_context(context);
		return 0;
	}
	pthread_mutex_lock(&context->lock);
	if (!context->ended) {
		context->ended = -ECANCELED;
		snprintf(context->message, sizeof(context->message), "context: is closed");
	}
	pthread_mutex_unlock(&context->lock);
	/* The reader sees the end of its socket, kills the process and completes every fence. */
	shutdown(context->channel, SHUT_RDWR);
	pthread_join(context->reader, NULL);
	close(context->channel);
	free_context(context);
	return 0;
}

/* A GPU maps page by page what it is asked to; there is nothing to be prepared in it. */
static bool has_process(const struct gmem_context *context)
{
	return context->owner == getpid() && !context->gpu;
}

int gmem_contexts_cover(struct gmem *session, uint64_t va, uint64_t bytes)
{
	const uint64_t args[3] = { va, bytes, 0 };

	for (struct gmem_context *context = session->contexts; context; context = context->next) {
		int value = 0, err = has_process(context) ? gmem_context_ask(context, GMEM_LAUNCH_COVER, args, &value) : 0;

		if (!err && value) /* no kernel is to run in it that would find something else there */
			shutdown(context->channel, SHUT_RDWR);
	}
	return 0;
}

/* ---- acquire, release ---- */

int gmem_check_ranges(const struct gmem_range *ranges, size_t count, const char *what)
{
	if (count && !ranges)
		return gmem_fail(-EINVAL, "%s: is NULL", what);
	if (count > 65536)
		return gmem_fail(-EINVAL, "%s: %zu are more than 65536", what, count);
	return 0;
}

/* One for each range; NULL: out of memory. */
static struct gmem_held *make_held(const struct gmem_range *ranges, size_t count)
{
	struct gmem_held *first = NULL;

	for (size_t i = count; i--;) {
		struct gmem_held *held = malloc(sizeof(*held));

		if (!held) {
			free_held(first);
			return NULL;
		}
		*held = (struct gmem_held){ .next = first, .range = ranges[i], .index = (uint32_t)i };
		first = held;
	}
	return first;
}

/* The last one first. NULL: it is not held. */
static struct gmem_held *take_held(struct gmem_context *context, const struct gmem_range *range)
{
	struct gmem_held **at, *held;

	pthread_mutex_lock(&context->lock);
	for (at = &context->held; *at && ((*at)->range.va != range->va || (*at)->range.bytes != range->bytes);)
		at = &(*at)->next;
	held = *at;
	if (held)
		*at = held->next;
	pthread_mutex_unlock(&context->lock);
	return held;
}

void gmem_context_forget(struct gmem_context *context, const struct gmem_range *range)
{
	free(take_held(context, range));
}

/* The ring takes one range at a time; several are to be held together or not at all. */
static int ask_to_hold(struct gmem_context *context, const struct gmem_range *ranges, size_t count, bool write,
		       uint64_t *ret_hold)
{
	struct gmem_request request;
	struct gmem_reply reply;
	int err;

	if (count == 1 && gmem_link_has_ring(context->session->link)) {
		struct gmem_ring_sqe sqe = { .op = GMEM_RING_ACQUIRE, .flags = write ? GMEM_RING_WRITE : 0,
					     .va = (uintptr_t)ranges->va, .bytes = ranges->bytes, .arg = context->id };
		struct gmem_ring_cqe cqe;

		err = gmem_session_call(context->session, &sqe, &cqe);
		*ret_hold = err ? 0 : cqe.values[GMEM_RING_HOLD];
		return err;
	}
	gmem_request_init(&request, "acquire", 3);
	gmem_request_uint(&request, "context", context->id);
	gmem_request_ranges(&request, "ranges", ranges, count);
	gmem_request_bool(&request, "write", write);
	err = gmem_rpc_call(context->session->rpc, &request, &reply);
	if (err)
		return err;
	err = gmem_map_uint(gmem_reply_root(&reply), "hold", ret_hold);
	gmem_reply_deinit(&reply);
	return err ? gmem_fail(err, "acquire: gmemd's answer makes no sense") : 0;
}

int gmem_context_hold(struct gmem_context *context, const struct gmem_range *ranges, size_t count, bool write)
{
	struct gmem_held *held = make_held(ranges, count), **end = &held;
	uint64_t hold = 0;
	int err = count && !held ? gmem_fail(-ENOMEM, "acquire: out of memory") :
				   ask_to_hold(context, ranges, count, write, &hold);

	if (err) {
		free_held(held);
		return err;
	}
	for (; *end; end = &(*end)->next)
		(*end)->hold = hold;
	pthread_mutex_lock(&context->lock);
	*end = context->held;
	context->held = held;
	pthread_mutex_unlock(&context->lock);
	return 0;
}

/* held: NULL: gmemd says that nobody holds it. */
static int ask_to_let_go(struct gmem_context *context, const struct gmem_range *range, const struct gmem_held *held)
{
	struct gmem_request request;

	if (held && gmem_link_has_ring(context->session->link)) {
		struct gmem_ring_sqe sqe = { .op = GMEM_RING_RELEASE, .arg = context->id, .hold = held->hold,
					     .index = held->index };

		return gmem_session_call(context->session, &sqe, NULL);
	}
	gmem_request_init(&request, "release", 2);
	gmem_request_uint(&request, "context", context->id);
	if (held)
		gmem_request_pair(&request, "holds", held->hold, held->index);
	else
		gmem_request_ranges(&request, "ranges", range, 1);
	return gmem_rpc_call(context->session->rpc, &request, NULL);
}

int gmem_context_let_go(struct gmem_context *context, const struct gmem_range *ranges, size_t count)
{
	int err = 0;

	for (size_t i = 0; i < count; i++) {
		struct gmem_held *held = take_held(context, &ranges[i]);
		int failed = ask_to_let_go(context, &ranges[i], held);

		free(held);
		err = err ? err : failed;
	}
	return err;
}

static int check_acquire(const struct gmem_context *context, const struct gmem_range *ranges, size_t count)
{
	if (!context)
		return gmem_fail(-EINVAL, "context: is NULL");
	if (context->owner != getpid())
		return gmem_fail(-ECANCELED, "context: belongs to the parent process");
	return gmem_check_ranges(ranges, count, "ranges");
}

int gmem_acquire(struct gmem_context *context, const struct gmem_range *ranges, size_t count, uint32_t flags)
{
	int err = check_acquire(context, ranges, count);

	if (!err && (flags & ~GMEM_ACQUIRE_WRITE))
		err = gmem_fail(-EINVAL, "flags: 0x%x are not known", flags & ~GMEM_ACQUIRE_WRITE);
	if (err)
		return err;
	return context->gpu ? gmem_gpu_acquire(context, ranges, count, flags & GMEM_ACQUIRE_WRITE) :
			      gmem_context_hold(context, ranges, count, flags & GMEM_ACQUIRE_WRITE);
}

int gmem_release(struct gmem_context *context, const struct gmem_range *ranges, size_t count)
{
	int err = check_acquire(context, ranges, count);

	if (!err && !count)
		err = gmem_fail(-EINVAL, "ranges: is empty");
	return err ? err : gmem_context_let_go(context, ranges, count);
}

/* ---- adopted memory ---- */

static int map_in(struct gmem_context *context, uint64_t va, uint64_t bytes, uint64_t offset)
{
	const uint64_t args[] = { va, bytes, offset };
	struct gmem_request request;
	int value = 0, err = gmem_context_ask(context, GMEM_LAUNCH_MAP, args, &value);

	if (err == -EOWNERDEAD || err == -ECANCELED || err == -ETIME) /* it has ended */
		return 0;
	if (err)
		return err;
	if (value)
		return gmem_fail(value, "va: [0x%llx, 0x%llx) is in use in the context on %s: %s", (unsigned long long)va,
				 (unsigned long long)(va + bytes), context->device.name, strerror(-value));
	gmem_request_init(&request, "context_overlay", 3);
	gmem_request_uint(&request, "context", context->id);
	gmem_request_uint(&request, "va", va);
	gmem_request_uint(&request, "bytes", bytes);
	return gmem_rpc_call(context->session->rpc, &request, NULL);
}

/* The list does not change: the caller holds session->mapping. */
int gmem_contexts_map(struct gmem *session, uint64_t va, uint64_t bytes, uint64_t offset)
{
	const uint64_t args[] = { va, bytes, 0 };
	struct gmem_context *failed = NULL;
	char why[384];
	int err = 0, value;

	if (!bytes)
		return 0;
	for (struct gmem_context *at = session->contexts; !err && at; at = at->next) {
		err = has_process(at) ? map_in(at, va, bytes, offset) : 0;
		failed = err ? at : NULL;
	}
	if (!err)
		return 0;
	snprintf(why, sizeof(why), "%s", gmem_last_error());
	for (struct gmem_context *at = session->contexts; at != failed; at = at->next)
		if (has_process(at))
			gmem_context_ask(at, GMEM_LAUNCH_UNMAP, args, &value);
	return gmem_fail(err, "%s", why);
}
