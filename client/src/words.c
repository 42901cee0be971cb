/* SPDX-License-Identifier: Apache-2.0
 *
 * What a failed completion means, in the words that gmemd uses for requests (gmemd/ops.py).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "ring.h"

const char *gmem_ring_argument(uint32_t blame)
{
	static const char *const names[GMEM_RING_BLAME_COUNT] = {
		[GMEM_RING_BLAME_OP] = "op", [GMEM_RING_BLAME_FLAGS] = "flags", [GMEM_RING_BLAME_HNID] = "hnid",
		[GMEM_RING_BLAME_VA] = "va", [GMEM_RING_BLAME_BYTES] = "bytes", [GMEM_RING_BLAME_ADVICE] = "advice",
		[GMEM_RING_BLAME_DST] = "dst", [GMEM_RING_BLAME_SRC] = "src",
		[GMEM_RING_BLAME_PAGE_BYTES] = "page_bytes", [GMEM_RING_BLAME_CONTEXT] = "context",
		[GMEM_RING_BLAME_RANGES] = "ranges",
	};

	return blame < GMEM_RING_BLAME_COUNT ? names[blame] : NULL;
}

static const char *name_of(uint32_t op)
{
	static const char *const names[GMEM_RING_OP_COUNT] = {
		[GMEM_RING_NOP] = "nop", [GMEM_RING_ADVISE] = "advise", [GMEM_RING_PREFETCH] = "prefetch",
		[GMEM_RING_DISCARD] = "discard", [GMEM_RING_HMEMCPY] = "hmemcpy", [GMEM_RING_MMAP] = "mmap",
		[GMEM_RING_MMAP_COMMIT] = "mmap_commit", [GMEM_RING_MUNMAP] = "munmap",
		[GMEM_RING_ACQUIRE] = "acquire", [GMEM_RING_RELEASE] = "release",
		[GMEM_RING_REGION] = "region", [GMEM_RING_ADOPT] = "adopt",
	};

	return op < GMEM_RING_OP_COUNT ? names[op] : "request";
}

static const char *of_invalid(uint32_t op, uint32_t blame)
{
	switch (blame) {
	case GMEM_RING_BLAME_HNID:
		return "there is no such hnode";
	case GMEM_RING_BLAME_BYTES:
		return "out of range: at least 1 and less than 2^63";
	case GMEM_RING_BLAME_ADVICE:
		return "not known";
	case GMEM_RING_BLAME_PAGE_BYTES:
		return "not a page size: 4096, 65536, 2097152, or 0 to choose by the region's size";
	case GMEM_RING_BLAME_DST:
		return "source or destination is not mapped by this session, or they overlap";
	case GMEM_RING_BLAME_OP:
	case GMEM_RING_BLAME_FLAGS:
		return "gmemd does not know it";
	default:
		if (op == GMEM_RING_ADOPT)
			return "not whole pages of 4096 bytes outside the window";
		return op == GMEM_RING_MMAP_COMMIT ?
			       "not the start of a region that waits for its commit, or not mapped there" :
			       "the range is not mapped by this session";
	}
}

static const char *meaning(uint32_t op, const struct gmem_ring_cqe *cqe)
{
	switch (cqe->result) {
	case -EINVAL:
		return of_invalid(op, cqe->blame);
	case -ENODEV:
		return "there is no such hnode";
	case -ENOMEM:
	case -ENOSPC:
		if (op == GMEM_RING_MMAP || op == GMEM_RING_ADOPT)
			return "more than the host and all devices together could hold, or the window has room for";
		return "there is no room: what is there is pinned or acquired, or too much was asked for";
	case -EOPNOTSUPP:
		return op == GMEM_RING_HMEMCPY	? "this device can't be copied to directly" :
		       op == GMEM_RING_PREFETCH ? "the device does not take such memory: a GPU has pages of 2 MiB of gmem's own" :
						  "this advice is not supported yet";
	case -EEXIST:
		return "some of it is managed already";
	case -EAGAIN:
		return "it stayed busy; another context may have acquired it";
	case -EIO:
		return "a page of the range was lost";
	case -ENOENT:
		return "the session or the context has ended";
	case -ENOTCONN:
		return "the session's userfaultfd has not been attached";
	default:
		return strerrordesc_np(-cqe->result);
	}
}

void gmem_ring_words(uint32_t op, const struct gmem_ring_cqe *cqe, char *ret, size_t capacity)
{
	const char *argument = gmem_ring_argument(cqe->blame), *what = meaning(op, cqe);

	snprintf(ret, capacity, "%s: %s", argument ? argument : name_of(op), what ? what : "unknown error");
}
