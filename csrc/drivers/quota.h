/* SPDX-License-Identifier: Apache-2.0
 *
 * Bytes of memory that a tier may take, and takes. Charged before memory is allocated and returned after it has been
 * freed, so what the kernel counts is never above it.
 */
#ifndef GMEM_QUOTA_H
#define GMEM_QUOTA_H

#include <errno.h>

#include <gmem/types.h>

#define GMEM_FRAME_BYTES 4096u

struct gmem_quota {
	uint64_t limit;             /* (C) */
	_Atomic uint64_t used;      /* (A) */
};

static inline int gmem_quota_charge(struct gmem_quota *quota, uint64_t bytes)
{
	uint64_t used = atomic_load_explicit(&quota->used, memory_order_relaxed);

	do {
		if (bytes > quota->limit - used)
			return -ENOSPC;
	} while (!atomic_compare_exchange_weak(&quota->used, &used, used + bytes));
	return 0;
}

static inline void gmem_quota_return(struct gmem_quota *quota, uint64_t bytes)
{
	atomic_fetch_sub(&quota->used, bytes);
}

#endif
