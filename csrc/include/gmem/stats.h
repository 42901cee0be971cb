/* SPDX-License-Identifier: Apache-2.0
 *
 * Counters. Plain atomics with relaxed order: a counter is touched once or twice in a fault of ten microseconds.
 */
#ifndef GMEM_STATS_H
#define GMEM_STATS_H

#include <time.h>

#include <gmem/types.h>

struct gmem_stats {
	_Atomic uint64_t host_faults, device_faults, write_protect_faults, spurious_faults, first_touches;
	_Atomic uint64_t h2d_bytes, d2h_bytes, d2d_bytes;
	_Atomic uint64_t duplicates, invalidations, evictions, evicted_clean;
	_Atomic uint64_t prefetched_pages, ahead_pages, discarded_pages, poisoned_pages, retries, parked_faults, aged_pages;
	_Atomic uint64_t throttled_faults, evictions_stopped, leftovers, outside_faults;
	_Atomic uint64_t migration_ns, fault_ns;
	_Atomic uint64_t ring_requests, ring_errors, stuck_reports;
};

static inline void gmem_count(_Atomic uint64_t *counter, uint64_t n)
{
	atomic_fetch_add_explicit(counter, n, memory_order_relaxed);
}

static inline uint64_t gmem_counter(const _Atomic uint64_t *counter)
{
	return atomic_load_explicit(counter, memory_order_relaxed);
}

static inline void gmem_cpu_relax(void)
{
#if defined(__x86_64__)
	__builtin_ia32_pause();
#elif defined(__aarch64__)
	__asm__ volatile("yield");
#endif
}

static inline uint64_t gmem_now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

#endif
