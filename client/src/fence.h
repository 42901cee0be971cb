/* SPDX-License-Identifier: Apache-2.0
 *
 * Fences: shared by whoever launched and whoever completes; freed by the later of the two.
 */
#ifndef GMEM_CLIENT_FENCE_H
#define GMEM_CLIENT_FENCE_H

#include <gmem.h>
#include <time.h>

struct gmem_call;
struct gmem_fence;

/* With two references: the caller's for gmem_fence_free(), and one that gmem_fence_complete() takes. */
int gmem_fence_create(struct gmem_fence **ret);
/* The request that completes it, before anybody else knows the fence; takes over the caller's reference. */
void gmem_fence_set_call(struct gmem_fence *fence, struct gmem_call *call);
/* err: 0, or -errno with its words. Once. */
void gmem_fence_complete(struct gmem_fence *fence, int err, int value, const char *message);

/* CLOCK_MONOTONIC */
uint64_t gmem_now_ns(void);
struct timespec gmem_timespec(uint64_t ns);

#endif
