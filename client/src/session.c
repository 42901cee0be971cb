/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "adopt.h"
#include "atfork.h"
#include "error.h"
#include "session.h"

int gmem_check_bytes(size_t bytes)
{
	if (!bytes || bytes > INT64_MAX)
		return gmem_fail(-EINVAL, "bytes: %zu is out of range: at least 1 and less than 2^63", bytes);
	return 0;
}

int gmem_check_options(size_t size, size_t least, const char *what)
{
	if (size < least || size > 4096)
		return gmem_fail(-EINVAL, "options: size %zu is not that of struct %s", size, what);
	return 0;
}

void gmem_session_count_contexts(struct gmem *session, int change)
{
	pthread_mutex_lock(&session->lock);
	if (session->context_pid != getpid()) {
		session->context_pid = getpid();
		session->context_count = 0;
	}
	session->context_count += (size_t)change;
	pthread_mutex_unlock(&session->lock);
}

struct gmem_heap_slot *gmem_session_heap(struct gmem *session, uint64_t *ret_base, uint64_t *ret_bytes)
{
	*ret_base = gmem_link_window_base(session->link);
	*ret_bytes = gmem_link_window_bytes(session->link);
	return &session->heap;
}

int gmem_session_check(const struct gmem *session)
{
	int err = gmem_link_status(session->link);

	if (err)
		return gmem_fail(err, "this forked process could not join gmemd: %s",
				 gmem_link_message(session->link));
	if (gmem_link_is_lost(session->link))
		return gmem_fail(-ECONNRESET, "gmemd has gone, or has ended this session");
	return 0;
}

/* ---- fork ---- */

static pthread_rwlock_t all_lock = PTHREAD_RWLOCK_INITIALIZER; /* write-held over a fork */
static struct gmem *all; /* all_lock */

/* Runs before the handlers of rpc.c and link.c, which were registered earlier: what is under way needs their locks. */
static void before_fork(void)
{
	pthread_rwlock_wrlock(&all_lock);
	for (struct gmem *session = all; session; session = session->next) {
		pthread_rwlock_wrlock(&session->mapping);
		pthread_mutex_lock(&session->lock);
	}
}

static void after_fork(void)
{
	for (struct gmem *session = all; session; session = session->next) {
		pthread_mutex_unlock(&session->lock);
		pthread_rwlock_unlock(&session->mapping);
	}
	pthread_rwlock_unlock(&all_lock);
}

static void after_fork_child(void)
{
	for (struct gmem *session = all; session; session = session->next) {
		pthread_mutex_unlock(&session->lock);
		/* A write lock knows its owner by thread id, which is another one here. */
		pthread_rwlock_init(&session->mapping, NULL);
	}
	pthread_rwlock_init(&all_lock, NULL);
}

static void install_handlers(void)
{
	gmem_atfork(before_fork, after_fork, after_fork_child);
}

static void enlist(struct gmem *session)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;

	pthread_once(&once, install_handlers);
	pthread_rwlock_wrlock(&all_lock);
	session->next = all;
	all = session;
	pthread_rwlock_unlock(&all_lock);
}

static void delist(struct gmem *session)
{
	struct gmem **at;

	pthread_rwlock_wrlock(&all_lock);
	for (at = &all; *at != session; at = &(*at)->next)
		;
	*at = session->next;
	pthread_rwlock_unlock(&all_lock);
}

int gmem_session_each(int (*fn)(struct gmem *session, void *arg), void *arg)
{
	int err = pthread_rwlock_tryrdlock(&all_lock) ? -EAGAIN : 0;

	if (err)
		return err;
	for (struct gmem *session = all; session && !err; session = session->next)
		err = fn(session, arg);
	pthread_rwlock_unlock(&all_lock);
	return err;
}

/* ---- open, close ---- */

static int connect_to(struct gmem *session, const char *path)
{
	char message[GMEM_WIRE_MESSAGE_BYTES] = "";
	int err = gmem_link_open(path, &session->link, message);

	/* Some messages carry the path already. */
	if (err && !strncmp(message, path, strlen(path)))
		return gmem_fail(err, "%s", message);
	if (err)
		return gmem_fail(err, "%s: %s", path, message[0] ? message : strerror(-err));
	return 0;
}

static int connect_embedded(struct gmem *session, const struct gmem_open_options *options)
{
	int err = gmem_embedded_get(options ? options->devices : NULL, options ? options->device_count : 0,
				    &session->embedded);

	if (err)
		return err;
	err = connect_to(session, gmem_embedded_socket(session->embedded));
	if (err)
		gmem_embedded_put(session->embedded);
	return err;
}

const char *gmem_session_chosen_socket(void)
{
	const char *chosen = secure_getenv("GMEM_SOCKET");

	return chosen && *chosen ? chosen : NULL;
}

static int connect_somewhere(struct gmem *session, const char *path, const struct gmem_open_options *options)
{
	bool own = options && options->device_count;
	int err;

	if (path)
		return connect_to(session, path);
	if (!own) {
		const char *chosen = gmem_session_chosen_socket();

		if (chosen)
			return connect_to(session, chosen);
		err = connect_to(session, GMEM_SYSTEM_SOCKET);
		if (err != -ENOENT && err != -ECONNREFUSED && err != -EACCES)
			return err;
	}
	return connect_embedded(session, options);
}

static int check_open(const char *path, const struct gmem_open_options *options, struct gmem **ret)
{
	if (!ret)
		return gmem_fail(-EINVAL, "ret: is NULL");
	if (path && !*path)
		return gmem_fail(-EINVAL, "path: is empty");
	if (!options)
		return 0;
	if (gmem_check_options(options->size, sizeof(*options), "gmem_open_options"))
		return -EINVAL;
	if (options->device_count && path)
		return gmem_fail(-EINVAL, "options: only a private gmemd takes devices, and path asks for another");
	for (size_t i = 0; i < options->device_count; i++)
		if (!options->devices || !options->devices[i])
			return gmem_fail(-EINVAL, "options: devices[%zu] is NULL", i);
	return 0;
}

int gmem_open(const char *path, const struct gmem_open_options *options, struct gmem **ret)
{
	struct gmem *session;
	int err = check_open(path, options, ret);

	if (err)
		return err;
	session = calloc(1, sizeof(*session));
	if (!session)
		return gmem_fail(-ENOMEM, "out of memory");
	err = connect_somewhere(session, path, options);
	if (err) {
		free(session);
		return err;
	}
	err = gmem_rpc_create(session->link, &session->rpc);
	if (err) {
		gmem_link_close(session->link);
		if (session->embedded)
			gmem_embedded_put(session->embedded);
		free(session);
		return err;
	}
	pthread_mutex_init(&session->lock, NULL);
	pthread_rwlock_init(&session->mapping, NULL);
	enlist(session);
	*ret = session;
	return 0;
}

int gmem_close(struct gmem *session)
{
	if (!session)
		return gmem_fail(-EINVAL, "session: is NULL");
	gmem_session_count_contexts(session, 0);
	if (session->context_count)
		return gmem_fail(-EBUSY, "session: %zu of its contexts are open", session->context_count);
	if (session->heap.heap)
		session->heap.destroy(session->heap.heap);
	gmem_link_give_back(session->link);
	delist(session);
	gmem_rpc_destroy(session->rpc);
	gmem_link_stop_agent(session->link);
	/* munmap(2) waits until the userfaultfd's reader has heard of it. If gmemd is dead, that would be for ever, unless
	 * its last descriptor is closed; if it lives, it has one of its own. */
	if (session->link->uffd >= 0)
		close(session->link->uffd);
	session->link->uffd = -1;
	gmem_link_close(session->link);
	if (session->embedded)
		gmem_embedded_put(session->embedded);
	pthread_rwlock_destroy(&session->mapping);
	pthread_mutex_destroy(&session->lock);
	free(session);
	return 0;
}
