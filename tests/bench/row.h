/* SPDX-License-Identifier: Apache-2.0
 *
 * Rows of the benchmark: pairs of gmem's figure and its floor's, one pair for each repetition, both taken in the same
 * run, one after the other. A row's ratio is the median of the ratios of its pairs.
 */
#ifndef BENCH_ROW_H
#define BENCH_ROW_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define REPETITIONS_MAX 32

struct pairs {
	size_t count;
	double value[REPETITIONS_MAX];
	double floor[REPETITIONS_MAX]; /* 0: the row has no floor */
};

void pairs_add(struct pairs *pairs, double value, double floor);

/* A growing list of times in nanoseconds. */
struct times {
	size_t count, capacity;
	uint64_t *ns;
};

void times_add(struct times *times, uint64_t ns);
/* Of 0 to 100; sorts. */
double times_percentile(struct times *times, double percent);
double times_mean(const struct times *times);
void times_clear(struct times *times);
void times_free(struct times *times);

/* target: "ratio <= 1.15", "value <= 16" or NULL for a row that is only reported. */
struct row {
	const char *id, *unit, *target, *floor_is;
};

/* Only rows whose id begins with one of these are printed; NULL: all. */
void row_select(char **prefixes, int count);
bool row_wanted(const char *id_prefix);
/* The same for any of the ids stem_size; the list of stems ends with NULL. */
bool rows_wanted(const char *const *stems, const char *size);
/* One JSON line on stdout. No pairs: not measured, and why says why. */
void row_print(const struct row *row, const struct pairs *pairs, const char *why);

#endif
