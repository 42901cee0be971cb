/* SPDX-License-Identifier: Apache-2.0
 *
 * Requests of libgmem over the ring: those that are waited for, and those that a fence stands for.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "error.h"
#include "fence.h"
#include "session.h"

#define WORDS_BYTES 256

static int check_link(struct gmem *session)
{
	int err = gmem_link_status(session->link);

	if (err)
		return gmem_fail(err, "this forked process could not join gmemd: %s",
				 gmem_link_message(session->link));
	return 0;
}

static int lost(int err)
{
	if (err == -ENOMEM)
		return gmem_fail(err, "out of memory");
	return gmem_fail(err, "gmemd has gone, or has ended this session");
}

int16_t gmem_ring_hnid(int hnid)
{
	return (int16_t)(hnid < INT16_MIN || hnid > INT16_MAX ? INT16_MAX : hnid);
}

int gmem_session_call(struct gmem *session, struct gmem_ring_sqe *sqe, struct gmem_ring_cqe *ret)
{
	struct gmem_ring_cqe cqe;
	char words[WORDS_BYTES];
	int err = check_link(session);

	if (err)
		return err;
	err = gmem_ring_call(session->link, sqe, &cqe);
	if (err)
		return lost(err);
	if (cqe.result) {
		gmem_ring_words(sqe->op, &cqe, words, sizeof(words));
		return gmem_fail(cqe.result, "%s", words);
	}
	if (ret)
		*ret = cqe;
	return 0;
}

/* ---- fences ---- */

static void on_complete(void *arg, const struct gmem_ring_sqe *sqe, int err, const struct gmem_ring_cqe *cqe)
{
	char words[WORDS_BYTES] = "";

	if (err)
		snprintf(words, sizeof(words), "%s", err == -ECANCELED ? "the session was closed" :
			 "gmemd has gone, or has ended this session");
	else if (cqe->result)
		gmem_ring_words(sqe->op, cqe, words, sizeof(words));
	gmem_fence_complete(arg, err ? err : cqe->result, 0, words);
}

static int start(struct gmem *session, const struct gmem_ring_sqe *sqe, struct gmem_fence *fence)
{
	struct gmem_call *call;
	int err = check_link(session);

	if (err)
		return err;
	err = gmem_call_start(session->link, sqe, on_complete, fence, &call);
	if (err)
		return lost(err);
	gmem_fence_set_call(fence, call);
	return 0;
}

/* Without a ring the work is done before it returns: in order as well. */
static int do_now(struct gmem *session, const struct gmem_ring_sqe *sqe, struct gmem_fence *fence)
{
	void *va = (void *)(uintptr_t)sqe->va;
	int err;

	if (sqe->op == GMEM_RING_PREFETCH)
		err = gmem_prefetch(session, sqe->hnid, va, sqe->bytes);
	else if (sqe->op == GMEM_RING_ADVISE)
		err = gmem_hmadvise(session, sqe->hnid, va, sqe->bytes, (int)sqe->arg);
	else
		err = gmem_hmemcpy(session, sqe->hnid, va, (void *)(uintptr_t)sqe->arg, sqe->bytes);
	gmem_fence_complete(fence, err, 0, err ? gmem_last_error() : "");
	return 0;
}

static int check_start(const struct gmem *session, uint16_t stream, struct gmem_fence **ret)
{
	if (!session || !ret)
		return gmem_fail(-EINVAL, "%s: is NULL", session ? "ret" : "session");
	if (stream > GMEM_STREAM_MAX)
		return gmem_fail(-EINVAL, "stream: %u is more than %u", stream, GMEM_STREAM_MAX);
	return 0;
}

static int run_async(struct gmem *session, const struct gmem_ring_sqe *sqe, struct gmem_fence **ret)
{
	struct gmem_fence *fence;
	int err = check_start(session, sqe->stream, ret);

	if (!err)
		err = gmem_fence_create(&fence);
	if (err)
		return err;
	err = gmem_link_has_ring(session->link) ? start(session, sqe, fence) : do_now(session, sqe, fence);
	if (err) {
		gmem_fence_complete(fence, err, 0, "");
		gmem_fence_free(fence);
		return err;
	}
	*ret = fence;
	return 0;
}

int gmem_prefetch_async(struct gmem *session, int hnid, void *va, size_t bytes, uint16_t stream,
			struct gmem_fence **ret)
{
	struct gmem_ring_sqe sqe = { .op = GMEM_RING_PREFETCH, .stream = stream, .hnid = gmem_ring_hnid(hnid),
				     .va = (uintptr_t)va, .bytes = bytes };

	return run_async(session, &sqe, ret);
}

int gmem_hmadvise_async(struct gmem *session, int hnid, void *va, size_t bytes, int advice, uint16_t stream,
			struct gmem_fence **ret)
{
	struct gmem_ring_sqe sqe = { .op = GMEM_RING_ADVISE, .stream = stream, .hnid = gmem_ring_hnid(hnid),
				     .va = (uintptr_t)va, .bytes = bytes, .arg = (uint64_t)advice };

	return run_async(session, &sqe, ret);
}

int gmem_hmemcpy_async(struct gmem *session, int hnid, void *dst, const void *src, size_t bytes, uint16_t stream,
		       struct gmem_fence **ret)
{
	struct gmem_ring_sqe sqe = { .op = GMEM_RING_HMEMCPY, .stream = stream, .hnid = gmem_ring_hnid(hnid),
				     .va = (uintptr_t)dst, .bytes = bytes, .arg = (uintptr_t)src };

	return run_async(session, &sqe, ret);
}
