/* SPDX-License-Identifier: Apache-2.0
 *
 * What an entry of a ring asks for: checked as the control plane checks its requests, then done, what may be long in
 * slices. A failure says which argument it is about.
 */
#include <errno.h>

#include <gmem/freeze.h>
#include <gmem/internal.h>
#include <gmem/pages.h>
#include <gmem/ring.h>

#define SLICE_FIRST (2ull << 20)
#define SLICE_LEAST (64ull << 10)
#define SLICE_MOST (64ull << 20) /* of pages that nobody has touched; others take their time, and the slice shrinks */
#define SLICE_SHORT_NS 100000
#define SLICE_LONG_NS 2000000
#define ASKED_BY_RING (1ull << 63) /* requests of the control plane have numbers below */
#define ACQUIRE_PAUSE_NS 100000
#define ACQUIRE_PATIENCE_NS 200000000ull

static bool finish(struct gmem_ring_job *job, int err, enum gmem_ring_blame blame)
{
	job->cqe.result = err;
	job->cqe.blame = err ? blame : GMEM_RING_BLAME_NONE;
	return true;
}

/* As the control plane blames them (gmemd/ops.py). */
static enum gmem_ring_blame blame_of(const struct gmem_ring_sqe *sqe, int err)
{
	bool held = sqe->op == GMEM_RING_ACQUIRE || sqe->op == GMEM_RING_RELEASE;

	switch (err) {
	case -EEXIST:
		return GMEM_RING_BLAME_VA;
	case -EINVAL:
		return held ? GMEM_RING_BLAME_RANGES : sqe->op == GMEM_RING_HMEMCPY ? GMEM_RING_BLAME_DST :
		       sqe->op == GMEM_RING_MMAP ? GMEM_RING_BLAME_BYTES : GMEM_RING_BLAME_VA;
	case -ENODEV:
		return held ? GMEM_RING_BLAME_CONTEXT : GMEM_RING_BLAME_HNID;
	case -ENOMEM:
	case -ENOSPC:
		return held ? GMEM_RING_BLAME_RANGES : sqe->op == GMEM_RING_MMAP_COMMIT ? GMEM_RING_BLAME_VA :
						       GMEM_RING_BLAME_BYTES;
	case -ENOENT:
		return held ? GMEM_RING_BLAME_CONTEXT : GMEM_RING_BLAME_NONE;
	case -EOPNOTSUPP:
		return sqe->op == GMEM_RING_HMEMCPY ? GMEM_RING_BLAME_HNID :
		       sqe->op == GMEM_RING_ADVISE  ? GMEM_RING_BLAME_ADVICE : GMEM_RING_BLAME_NONE;
	default:
		return GMEM_RING_BLAME_NONE;
	}
}

static bool finish_op(struct gmem_ring_job *job, int err)
{
	return finish(job, err, blame_of(&job->sqe, err));
}

/* ---- checks: the argument to blame, or none ---- */

static enum gmem_ring_blame check_form(const struct gmem_ring_sqe *sqe)
{
	static const uint16_t allowed[GMEM_RING_OP_COUNT] = {
		[GMEM_RING_MMAP] = GMEM_RING_NO_INHERIT | GMEM_RING_COPY | GMEM_RING_SMALL | GMEM_RING_KEEP,
		[GMEM_RING_MUNMAP] = GMEM_RING_KEEP,
		[GMEM_RING_ADOPT] = GMEM_RING_NO_INHERIT | GMEM_RING_COPY, [GMEM_RING_ACQUIRE] = GMEM_RING_WRITE,
		[GMEM_RING_HMEMCPY] = GMEM_RING_TOUCHED, [GMEM_RING_REGION] = GMEM_RING_NEXT,
	};

	if (sqe->op >= GMEM_RING_OP_COUNT)
		return GMEM_RING_BLAME_OP;
	if (sqe->flags & ~allowed[sqe->op] || sqe->reserved[0] || sqe->reserved[1] || sqe->reserved[2])
		return GMEM_RING_BLAME_FLAGS;
	if (sqe->op != GMEM_RING_RELEASE && (sqe->hold || sqe->index))
		return GMEM_RING_BLAME_FLAGS;
	return GMEM_RING_BLAME_NONE;
}

static enum gmem_ring_blame check_hnid(struct gmem_core *core, const struct gmem_ring_sqe *sqe)
{
	bool anywhere = sqe->op == GMEM_RING_HMEMCPY || (sqe->op == GMEM_RING_ADVISE && !gmem_advice_is_local(sqe->arg));

	if (sqe->op != GMEM_RING_ADVISE && sqe->op != GMEM_RING_PREFETCH && sqe->op != GMEM_RING_HMEMCPY)
		return GMEM_RING_BLAME_NONE;
	if (gmem_core_hnode(core, sqe->hnid) || (anywhere && sqe->hnid == -1))
		return GMEM_RING_BLAME_NONE;
	return GMEM_RING_BLAME_HNID;
}

/* In the window, or in a region that has moved out of it. */
static bool in_reach(struct gmem_session *session, uint64_t va, uint64_t bytes)
{
	const struct gmem_window *w = &session->core->window;

	return (va >= w->base && va - w->base < w->bytes && bytes <= w->bytes - (va - w->base)) ||
	       !gmem_range_check(session, va, bytes);
}

static enum gmem_ring_blame check_range(struct gmem_session *session, const struct gmem_ring_sqe *sqe)
{
	switch (sqe->op) {
	case GMEM_RING_NOP:
	case GMEM_RING_REGION:
		return GMEM_RING_BLAME_NONE;
	case GMEM_RING_MMAP_COMMIT:
		return sqe->va & 4095 ? GMEM_RING_BLAME_VA : GMEM_RING_BLAME_NONE;
	case GMEM_RING_MUNMAP:
		if (sqe->va & 4095)
			return GMEM_RING_BLAME_VA;
		break;
	case GMEM_RING_RELEASE: /* names what was acquired, wherever that is by now */
		return sqe->bytes || sqe->hold ? GMEM_RING_BLAME_NONE : GMEM_RING_BLAME_RANGES;
	case GMEM_RING_ACQUIRE:
		if (sqe->bytes && in_reach(session, sqe->va, sqe->bytes))
			return GMEM_RING_BLAME_NONE;
		return GMEM_RING_BLAME_RANGES;
	case GMEM_RING_ADVISE: /* a thaw passes over what is not mapped any more */
		if (sqe->arg == GMEM_ADVISE_THAW && sqe->va + sqe->bytes > sqe->va)
			return GMEM_RING_BLAME_NONE;
		break;
	default:
		break;
	}
	if (!sqe->bytes || sqe->bytes > INT64_MAX)
		return GMEM_RING_BLAME_BYTES;
	if (sqe->op == GMEM_RING_MMAP || sqe->op == GMEM_RING_ADOPT)
		return GMEM_RING_BLAME_NONE;
	if (!in_reach(session, sqe->va, sqe->bytes))
		return sqe->op == GMEM_RING_HMEMCPY ? GMEM_RING_BLAME_DST : GMEM_RING_BLAME_VA;
	if (sqe->op == GMEM_RING_HMEMCPY && !in_reach(session, sqe->arg, sqe->bytes))
		return GMEM_RING_BLAME_SRC;
	return GMEM_RING_BLAME_NONE;
}

static enum gmem_ring_blame check_advice(const struct gmem_ring_sqe *sqe)
{
	if (sqe->op != GMEM_RING_ADVISE)
		return GMEM_RING_BLAME_NONE;
	switch (sqe->arg) {
	case GMEM_ADVISE_DISCARD:
	case GMEM_ADVISE_PREFETCH:
	case GMEM_ADVISE_PINNED:
	case GMEM_ADVISE_UNPINNED:
	case GMEM_ADVISE_READ_MOSTLY:
	case GMEM_ADVISE_NO_READ_MOSTLY:
	case GMEM_ADVISE_PREFERRED:
	case GMEM_ADVISE_COLD:
	case GMEM_ADVISE_ACCESSED_BY:
	case GMEM_ADVISE_NOT_ACCESSED_BY:
	case GMEM_ADVISE_FREEZE:
	case GMEM_ADVISE_THAW:
	case GMEM_ADVISE_ZERO:
		return GMEM_RING_BLAME_NONE;
	default:
		return GMEM_RING_BLAME_ADVICE;
	}
}

static enum gmem_ring_blame check(struct gmem_session *session, const struct gmem_ring_sqe *sqe)
{
	enum gmem_ring_blame blame = check_form(sqe);

	if (!blame)
		blame = check_advice(sqe);
	if (!blame)
		blame = check_hnid(session->core, sqe);
	return blame ? blame : check_range(session, sqe);
}

/* ---- short ones ---- */

static enum gmem_fork fork_of(uint16_t flags)
{
	return flags & GMEM_RING_NO_INHERIT ? GMEM_FORK_NONE : flags & GMEM_RING_COPY ? GMEM_FORK_COPY : GMEM_FORK_SHARE;
}

/* Fresh, or for what is at sqe->va already. */
static bool do_mmap(struct gmem_session *session, struct gmem_ring_job *job, bool adopt)
{
	const struct gmem_ring_sqe *sqe = &job->sqe;
	struct gmem_mmap_args args = {
		.bytes = sqe->bytes, .page_bytes = sqe->arg, .small_only = sqe->flags & GMEM_RING_SMALL,
		.above = adopt ? 0 : sqe->va, .fork = fork_of(sqe->flags), .asked = job->sq_index + 1ull, .again = job->again,
		.kept = sqe->flags & GMEM_RING_KEEP,
	};
	struct gmem_region_info region;
	int err;

	if (args.page_bytes && args.page_bytes != 1ull << GMEM_SHIFT_4K && args.page_bytes != 1ull << GMEM_SHIFT_64K &&
	    args.page_bytes != 1ull << GMEM_SHIFT_2M)
		return finish(job, -EINVAL, GMEM_RING_BLAME_PAGE_BYTES);
	if (args.bytes > session->core->window.bytes)
		return finish(job, -ENOMEM, GMEM_RING_BLAME_BYTES);
	err = adopt ? gmem_adopt(session->core, session->id, sqe->va, &args, &region) :
		      gmem_mmap(session->core, session->id, &args, &region);
	if (!err) {
		job->cqe.values[GMEM_RING_VA] = region.va;
		job->cqe.values[GMEM_RING_LENGTH] = region.bytes;
		job->cqe.values[GMEM_RING_OFFSET] = region.offset;
		job->cqe.values[GMEM_RING_PAGE_BYTES] = region.page_bytes;
		job->cqe.values[GMEM_RING_HUGE] = region.class_ == GMEM_CLASS_HUGE;
		job->cqe.values[GMEM_RING_KEPT] = region.kept;
	}
	return finish_op(job, err);
}

static bool do_munmap(struct gmem_session *session, struct gmem_ring_job *job)
{
	const struct gmem_ring_sqe *sqe = &job->sqe;

	if (sqe->flags & GMEM_RING_KEEP)
		return finish_op(job, gmem_munmap_keep(session->core, session->id, sqe->va, sqe->bytes));
	return finish_op(job, gmem_munmap(session->core, session->id, sqe->va, sqe->bytes));
}

static bool do_region(struct gmem_session *session, struct gmem_ring_job *job)
{
	uint64_t va = job->sqe.va, next = va;
	struct gmem_place place;
	int err;

	do {
		if (job->sqe.flags & GMEM_RING_NEXT)
			next = gmem_as_next(&session->as, va);
		err = gmem_as_lookup(&session->as, next > va ? next : va, &place);
	} while (err && job->sqe.flags & GMEM_RING_NEXT && next != UINT64_MAX); /* it has gone just now */
	if (err)
		return finish_op(job, -EINVAL);
	job->cqe.values[GMEM_RING_VA] = place.region_va;
	job->cqe.values[GMEM_RING_LENGTH] = place.region_bytes;
	job->cqe.values[GMEM_RING_OFFSET] = place.object->offset + place.region_offset;
	job->cqe.values[GMEM_RING_PAGE_BYTES] = 1ull << place.object->shift;
	job->cqe.values[GMEM_RING_HUGE] = place.object->class_ == GMEM_CLASS_HUGE;
	job->cqe.values[GMEM_RING_COPIED] = place.fork == GMEM_FORK_COPY;
	gmem_object_unref(place.object);
	return finish_op(job, 0);
}

/* By name it can be done again. Else which hold it is to be is noted first: a context may hold a range several times, and
 * a release that is done again by a successor takes the same hold, or none. */
static bool do_release(struct gmem_session *session, struct gmem_ring_job *job)
{
	const struct gmem_range range = { job->sqe.va, job->sqe.bytes };
	struct gmem_hold_name name = job->hold;
	int err = 0;

	if (job->sqe.hold) {
		name = (struct gmem_hold_name){ 0, job->sqe.index, job->sqe.hold };
		return finish_op(job, gmem_session_release_named(session, job->sqe.arg, &name));
	}
	if (name.record) {
		err = gmem_session_release(session, job->sqe.arg, range, &name);
		return finish_op(job, err == -EINVAL ? 0 : err);
	}
	while (!err) {
		err = gmem_session_find_hold(session, job->sqe.arg, range, &name);
		if (err)
			break;
		gmem_ring_note_hold(session->ring, job, name);
		err = gmem_session_release(session, job->sqe.arg, range, &name);
		if (!err)
			break;
		err = err == -EINVAL ? 0 : err; /* somebody else has just released it */
	}
	return finish_op(job, err);
}

static bool do_short(struct gmem_session *session, struct gmem_ring_job *job)
{
	const struct gmem_ring_sqe *sqe = &job->sqe;

	switch (sqe->op) {
	case GMEM_RING_NOP:
		return finish(job, 0, GMEM_RING_BLAME_NONE);
	case GMEM_RING_MMAP:
	case GMEM_RING_ADOPT:
		return do_mmap(session, job, sqe->op == GMEM_RING_ADOPT);
	case GMEM_RING_MMAP_COMMIT:
		return finish_op(job, gmem_mmap_commit(session->core, session->id, sqe->va));
	case GMEM_RING_MUNMAP:
		return do_munmap(session, job);
	case GMEM_RING_REGION:
		return do_region(session, job);
	default:
		return do_release(session, job);
	}
}

/* ---- long ones ---- */

bool gmem_ring_op_is_long(const struct gmem_ring_sqe *sqe)
{
	switch (sqe->op) {
	case GMEM_RING_ADVISE:
	case GMEM_RING_PREFETCH:
	case GMEM_RING_DISCARD:
	case GMEM_RING_HMEMCPY:
	case GMEM_RING_ACQUIRE:
		return true;
	default:
		return false;
	}
}

/* Slices check their own part only; but nothing is to be done if any part of the whole can't be. */
static int check_whole(struct gmem_session *session, const struct gmem_ring_sqe *sqe)
{
	int err = gmem_range_check(session, sqe->va, sqe->bytes);

	if (err || sqe->op != GMEM_RING_HMEMCPY)
		return err;
	if (sqe->va < sqe->arg + sqe->bytes && sqe->arg < sqe->va + sqe->bytes)
		return -EINVAL; /* overlapping */
	return gmem_range_check(session, sqe->arg, sqe->bytes);
}

bool gmem_ring_op_start(struct gmem_session *session, struct gmem_ring_job *job)
{
	enum gmem_ring_blame blame = check(session, &job->sqe);
	int err;

	job->cqe = (struct gmem_ring_cqe){ .user_data = job->sqe.user_data };
	if (blame)
		return finish(job, -EINVAL, blame);
	if (!gmem_ring_op_is_long(&job->sqe))
		return do_short(session, job);
	err = check_whole(session, &job->sqe);
	job->done = 0;
	job->slice = SLICE_FIRST;
	job->since_ns = job->retry_ns = 0;
	return err ? finish_op(job, err) : false;
}

/* Where the slice from at ends: between two pages, because what lies in a page by halves is not the same request. */
static uint64_t slice_end(struct gmem_session *session, const struct gmem_ring_job *job, uint64_t at)
{
	uint64_t end = job->sqe.va + job->sqe.bytes, stop = at + job->slice, next;
	struct gmem_place place;

	if (end - at <= job->slice)
		return end;
	if (job->sqe.op == GMEM_RING_HMEMCPY || gmem_as_lookup(&session->as, stop, &place))
		return stop;
	gmem_object_unref(place.object);
	next = place.range.va + place.range.bytes;
	if (place.range.va > at)
		return place.range.va;
	return next < end ? next : end;
}

/* Pages of the slices before have been frozen by then, and have waiters. */
static int freeze_slice(struct gmem_session *session, const struct gmem_ring_sqe *sqe, uint64_t at, uint64_t bytes)
{
	int err = gmem_freeze(session->core, session->id, at, bytes, true);

	if (err)
		gmem_freeze(session->core, session->id, sqe->va, at + bytes - sqe->va, false);
	return err;
}

static int do_slice(struct gmem_session *session, const struct gmem_ring_sqe *sqe, uint64_t at, uint64_t bytes)
{
	struct gmem_core *core = session->core;

	switch (sqe->op) {
	case GMEM_RING_ADVISE:
		if (sqe->arg == GMEM_ADVISE_FREEZE)
			return freeze_slice(session, sqe, at, bytes);
		return gmem_advise(core, session->id, sqe->hnid, at, bytes, (enum gmem_advice)sqe->arg);
	case GMEM_RING_PREFETCH:
		return gmem_prefetch(core, session->id, sqe->hnid, at, bytes);
	case GMEM_RING_DISCARD:
		return gmem_discard(core, session->id, at, bytes);
	default:
		return gmem_hmemcpy(core, session->id, sqe->hnid, at, sqe->arg + (at - sqe->va), bytes,
				    sqe->flags & GMEM_RING_TOUCHED);
	}
}

/* Tries and lets the others of this ring go on: the release that it waits for may be among them. */
static bool acquire_step(struct gmem_session *session, struct gmem_ring_job *job)
{
	const struct gmem_ring_sqe *sqe = &job->sqe;
	uint64_t now = gmem_now_ns(), asked = ASKED_BY_RING | job->sq_index;
	int err;

	if (now < job->retry_ns)
		return false;
	err = gmem_session_acquire(session, sqe->arg, (struct gmem_range){ sqe->va, sqe->bytes },
				   sqe->flags & GMEM_RING_WRITE, asked, job->again);
	job->cqe.values[GMEM_RING_HOLD] = asked;
	if (!job->since_ns)
		job->since_ns = now;
	if (err != -EAGAIN || now - job->since_ns > ACQUIRE_PATIENCE_NS)
		return finish_op(job, err);
	job->retry_ns = gmem_now_ns() + ACQUIRE_PAUSE_NS;
	return false;
}

bool gmem_ring_op_step(struct gmem_session *session, struct gmem_ring_job *job)
{
	uint64_t at = job->sqe.va + job->done, stop, start, took;
	int err;

	if (job->sqe.op == GMEM_RING_ACQUIRE)
		return acquire_step(session, job);
	stop = slice_end(session, job, at);
	start = gmem_now_ns();
	err = do_slice(session, &job->sqe, at, stop - at);
	took = gmem_now_ns() - start;
	if (took < SLICE_SHORT_NS && job->slice < SLICE_MOST)
		job->slice *= 2;
	else if (took > SLICE_LONG_NS && job->slice > SLICE_LEAST)
		job->slice = job->slice > SLICE_FIRST ? SLICE_FIRST : job->slice / 4;
	job->done += stop - at;
	return err || job->done >= job->sqe.bytes ? finish_op(job, err) : false;
}
