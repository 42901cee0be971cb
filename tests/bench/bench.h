/* SPDX-License-Identifier: Apache-2.0 */
#ifndef BENCH_H
#define BENCH_H

#include <stdbool.h>
#include <stdint.h>

#include "floor.h"
#include "order.h"
#include "row.h"

/* From tests/unit_c: the benchmark's process is the daemon, and forks clients and device contexts. */
#include "../unit_c/harness.h"

#define KIB 1024ul
#define MIB (1024ul * KIB)
#define GIB (1024ul * MIB)
#define HUGE_BYTES (2 * MIB)

/* A size that rows exist for; huge: hugetlb. */
struct size {
	const char *name;
	uint64_t page_bytes;
};
#define SIZES { { "4k", 4 * KIB }, { "64k", 64 * KIB }, { "2m", HUGE_BYTES } }

/* Each group runs in a process of its own and prints its rows. */
void faults_host(void);
void faults_device(void);
void faults_concurrent(void);
void thrash(void);
void density(void);
void first_touch(void);
void migrations(void);
void prefetches(void);
void evictions(void);
void mappings(void);
void page_table(void);
void ring_requests(void);
void file_tier(void);
void compressed_tier(void);
void remote_tier(void);
void trace_rows(void);
void primitives(void);

extern bool huge_pages; /* enough of them can be had for every group */
void nap_us(unsigned us);

#endif
