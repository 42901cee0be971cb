/* SPDX-License-Identifier: Apache-2.0
 *
 * Behind madvise(2), which libgmem takes over where it is searched before the C library: in programs that are linked with
 * it. Allocators give up their free memory by MADV_DONTNEED and count on zeros, or by MADV_FREE. To the kernel adopted
 * memory is a shared file, whose content stays. So gmemd is asked as well.
 *
 * An allocator calls with its own locks held: nothing is allocated here, and no lock waited for that is held over a fork,
 * as the allocator's own handlers may come after libgmem's.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdatomic.h>

#include "adopted.h"
#include "copies.h"
#include "interpose.h"
#include "session.h"
#include "syscalls.h"

static atomic_bool any;

void gmem_adopted_some(void)
{
	atomic_store(&any, true);
}

struct drop {
	uint64_t va, bytes;
	bool zeroed;
};

static int drop(struct gmem *session, void *arg)
{
	const struct drop *drop = arg;

	return gmem_copies_drop(session->link, drop->va, drop->bytes, drop->zeroed);
}

/* What is not adopted in the range is the kernel's, which may do more for MADV_FREE than it must: adopted memory it would
 * refuse. */
__attribute__((noinline)) static int drop_all(void *at, size_t bytes, int advice)
{
	struct drop what = { (uintptr_t)at, (bytes + 4095) & ~4095ul, advice == MADV_DONTNEED };
	int err = gmem_sys_madvise(at, bytes, MADV_DONTNEED) ? -errno : 0;

	if (err && err != -ENOMEM) /* of what is not mapped in between; the rest has been done */
		return err;
	if (bytes && (uintptr_t)at + what.bytes > (uintptr_t)at)
		err = gmem_session_each(drop, &what) ?: err;
	return err;
}

int in_madvise(void *at, size_t bytes, int advice) IN_PLACE_OF("madvise");
int in_madvise(void *at, size_t bytes, int advice)
{
	int before = errno, err;

	if (LIKELY_NOT(atomic_load_explicit(&any, memory_order_relaxed)) && (advice == MADV_DONTNEED || advice == MADV_FREE)) {
		err = drop_all(at, bytes, advice);
		errno = err ? -err : before;
		return err ? -1 : 0;
	}
	return gmem_sys_madvise(at, bytes, advice);
}
