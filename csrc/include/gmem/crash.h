/* SPDX-License-Identifier: Apache-2.0
 *
 * Crash points: places between two steps where a daemon that is being tested can be told to die, as by kill -9. The
 * file that GMEM_CRASH_FILE of its environment names says where, `POINT:N`: at the Nth time it comes by there. Without
 * that variable each point costs one comparison.
 */
#ifndef GMEM_CRASH_H
#define GMEM_CRASH_H

#include <stdatomic.h>

/* Of pools of several machines, which nobody comes by who has none: in the order in which one is published, opened, taken
 * over from a predecessor, and dropped. Some are in Python. */
#define GMEM_CRASH_FAR_POINTS(X)                                                                                       \
	X(FAR_LEASED) X(FAR_INTENDED) X(FAR_SENT) X(FAR_WRITTEN) X(FAR_LISTED) X(FAR_MOVED)                            \
	X(FAR_MARKED) X(FAR_FILLED) X(FAR_MADE) X(FAR_IMPORTED) X(FAR_NOTED) X(FAR_RECOVERED) X(FAR_FORGOTTEN)

/* Of memory of a GPU, which nobody comes by who has none: as frames are made, used and ended, and taken over. */
#define GMEM_CRASH_GPU_POINTS(X)                                                                                       \
	X(BOX_PUT) X(BOX_REQUEUED) X(BOX_DROPPED) X(FRAME_NOTED) X(FRAME_PLACED) X(FRAME_LEFT)           \
	X(FRAME_ENDED) X(RECOVER_BOXES) X(RECOVER_FRAME) X(RECOVER_CHANNEL) X(RECOVER_LISTED)

#define GMEM_CRASH_POINTS(X)                                                                                           \
	X(MARK) X(DOWNGRADE) X(FRAME) X(FILL) X(COPY_FIRST) X(COPY) X(ARRIVED) X(OWN) X(RELEASE) X(MAP) X(MAPPED)      \
	X(COMMIT) X(COMMITTED) X(FORGET) X(RUN_MOVED) X(RUN_OWN) X(RUN_RELEASE) X(RUN_MAP) X(RUN_MAPPED)               \
	X(PUSH) X(PUSHED) X(DROP) X(OBJECT_FREE) X(OBJECT_FREED) X(OBJECT_FORGOTTEN) X(REGION_CUT) X(REGION_LINKED)    \
	X(RECORD_WRITTEN) X(RECORD_PUBLISHED) X(RECORD_REPLACED) X(FD_HELD) X(FORKED) X(RING_TAKEN)                    \
	X(RING_COMPLETES) X(RING_COMPLETED) X(STORE_WRITTEN) X(STORE_FLIPPED) X(HMEMCPY) X(RECOVER_VIEW)               \
	X(RECOVER_PAGE) X(RECOVER_MAPS) X(RECOVER_DONE) X(PUBLISH_COPY) X(PUBLISH_MOVED) X(PUBLISHED)             \
	X(EVENT) X(HOLD_ENDED)

enum gmem_crash_point {
	GMEM_CRASH_NONE,
#define GMEM_CRASH_ENUM(name) GMEM_CRASH_##name,
	GMEM_CRASH_POINTS(GMEM_CRASH_ENUM)
	GMEM_CRASH_NEAR_COUNT,
	GMEM_CRASH_GPU_FIRST_ = GMEM_CRASH_NEAR_COUNT - 1, /* so that numbers go on without a gap */
	GMEM_CRASH_GPU_POINTS(GMEM_CRASH_ENUM)
	GMEM_CRASH_FAR_POINTS(GMEM_CRASH_ENUM)
#undef GMEM_CRASH_ENUM
	GMEM_CRASH_COUNT,
};

extern _Atomic int gmem_crash_at; /* enum gmem_crash_point */

/* Reads what the file says now; at the start of a core, and whenever a test has changed it. */
void gmem_crash_init(void);
void gmem_crash_pass(void);
/* The same as gmem_crash(), by name; for who is not in C. */
void gmem_crash_named(const char *name);
/* Names of the points, from 1 on; NULL beyond the last. */
const char *gmem_crash_name(unsigned point);

static inline void gmem_crash(enum gmem_crash_point point)
{
	if (__builtin_expect(atomic_load_explicit(&gmem_crash_at, memory_order_relaxed) == (int)point, 0))
		gmem_crash_pass();
}

#endif
