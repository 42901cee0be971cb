/* SPDX-License-Identifier: Apache-2.0
 *
 * Streams of openEuler's interface: any pointer is one. It is turned into one of the ring's streams by a hash; two that
 * meet there are ordered more than they need to be. Nothing is kept of a stream but its first failure.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>

#include <libgmem.h>

#include "error.h"
#include "peer.h"
#include "session.h"

struct failure {
	struct failure *next;
	void *stream;
	int err;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* taken under the ring's */
static struct failure *failures;                         /* lock; one a stream at most */
static int unplaced;                                     /* lock; one for which there was no memory: anybody's */

static struct failure **find_locked(const void *stream)
{
	struct failure **at = &failures;

	while (*at && (*at)->stream != stream)
		at = &(*at)->next;
	return at;
}

static void note(void *stream, int err)
{
	struct failure *failure = malloc(sizeof(*failure));

	pthread_mutex_lock(&lock);
	if (!failure) {
		unplaced = err;
	} else if (!*find_locked(stream)) {
		*failure = (struct failure){ failures, stream, err };
		failures = failure;
		failure = NULL;
	}
	pthread_mutex_unlock(&lock);
	free(failure);
}

static int take(const void *stream)
{
	struct failure **at, *failure;
	int err;

	pthread_mutex_lock(&lock);
	at = find_locked(stream);
	failure = *at;
	if (failure)
		*at = failure->next;
	err = failure ? failure->err : unplaced;
	if (!failure)
		unplaced = 0;
	pthread_mutex_unlock(&lock);
	free(failure);
	return err;
}

void gmem_streams_forget(void)
{
	pthread_mutex_init(&lock, NULL); /* its holder may be a thread of the parent, and so may be what it changed */
	failures = NULL;
	unplaced = 0;
}

static uint16_t number_of(const void *stream)
{
	return (uint16_t)(((uintptr_t)stream * 0x9e3779b97f4a7c15ull) >> 49); /* 15 bits: 0 to GMEM_STREAM_MAX */
}

static int outcome(int err, const struct gmem_ring_cqe *cqe)
{
	err = err ? err : cqe->result;
	return err == -ENODEV ? -EINVAL : err;
}

static void on_complete(void *stream, const struct gmem_ring_sqe *sqe, int err, const struct gmem_ring_cqe *cqe)
{
	(void)sqe;
	err = outcome(err, cqe);
	if (err)
		note(stream, err);
}

/* Without a ring: done before it returns, and so in order. */
static int do_now(struct gmem *session, void *stream, const struct gmem_ring_sqe *sqe)
{
	int err = gmem_hmadvise(session, sqe->hnid, (void *)(uintptr_t)sqe->va, sqe->bytes, (int)sqe->arg);

	if (err)
		note(stream, err == -ENODEV ? -EINVAL : err);
	return 0;
}

int gmem_stream_add(struct gmem *session, void *stream, struct gmem_ring_sqe *sqe)
{
	struct gmem_call *call;
	int err;

	if (!gmem_link_has_ring(session->link))
		return do_now(session, stream, sqe);
	sqe->stream = number_of(stream);
	err = gmem_call_start(session->link, sqe, on_complete, stream, &call);
	if (!err)
		gmem_call_put(call);
	return err;
}

/* A request that does nothing is complete when all before it are. */
static int drain(struct gmem *session, const void *stream)
{
	const struct gmem_ring_sqe nothing = { .op = GMEM_RING_NOP, .stream = number_of(stream) };
	struct gmem_ring_cqe cqe;
	struct gmem_call *call;
	int err;

	if (!gmem_link_has_ring(session->link))
		return 0;
	err = gmem_call_start(session->link, &nothing, NULL, NULL, &call);
	if (err)
		return err;
	err = gmem_call_wait(call, GMEM_CALL_FOREVER, &cqe);
	gmem_call_put(call);
	return err;
}

int gmemStreamSynchronize(void *stream)
{
	struct gmem *session = gmem_peer_session_if_open();
	int err, failed;

	if (!stream)
		return 0;
	err = session ? drain(session, stream) : 0;
	failed = take(stream);
	err = failed ? failed : err;
	if (err) {
		gmem_fail(err, "stream: %s", gmem_strerror(err));
		errno = -err;
	}
	return err;
}
