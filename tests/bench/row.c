/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "row.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static char **only;
static int only_count;

void pairs_add(struct pairs *pairs, double value, double floor)
{
	if (pairs->count == REPETITIONS_MAX)
		abort();
	pairs->value[pairs->count] = value;
	pairs->floor[pairs->count++] = floor;
}

void times_add(struct times *times, uint64_t ns)
{
	if (times->count == times->capacity) {
		times->capacity = times->capacity ? 2 * times->capacity : 1024;
		times->ns = realloc(times->ns, times->capacity * sizeof(*times->ns));
		if (!times->ns)
			abort();
	}
	times->ns[times->count++] = ns;
}

static int compare_ns(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return (x > y) - (x < y);
}

double times_percentile(struct times *times, double percent)
{
	size_t at = (size_t)((double)times->count * percent / 100);

	if (!times->count)
		abort();
	qsort(times->ns, times->count, sizeof(*times->ns), compare_ns);
	return (double)times->ns[at < times->count ? at : times->count - 1];
}

double times_mean(const struct times *times)
{
	double sum = 0;

	for (size_t i = 0; i < times->count; i++)
		sum += (double)times->ns[i];
	return times->count ? sum / (double)times->count : 0;
}

void times_clear(struct times *times)
{
	times->count = 0;
}

void times_free(struct times *times)
{
	free(times->ns);
	*times = (struct times){ 0 };
}

void row_select(char **prefixes, int count)
{
	only = prefixes;
	only_count = count;
}

/* True if some row of that prefix can be wanted: "fault" is, if "fault_isolated_4k" was asked for. */
bool row_wanted(const char *id)
{
	for (int i = 0; i < only_count; i++) {
		size_t asked = strlen(only[i]), have = strlen(id);

		if (!strncmp(only[i], id, asked < have ? asked : have))
			return true;
	}
	return !only_count;
}

bool rows_wanted(const char *const *stems, const char *size)
{
	for (; *stems; stems++) {
		char id[64];

		snprintf(id, sizeof(id), "%s_%s", *stems, size);
		if (row_wanted(id))
			return true;
	}
	return false;
}

static bool printed(const char *id)
{
	for (int i = 0; i < only_count; i++)
		if (!strncmp(only[i], id, strlen(only[i])))
			return true;
	return !only_count;
}

static int compare_doubles(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

static double median(const double *values, size_t count)
{
	double sorted[REPETITIONS_MAX];

	memcpy(sorted, values, count * sizeof(*values));
	qsort(sorted, count, sizeof(*sorted), compare_doubles);
	return count % 2 ? sorted[count / 2] : (sorted[count / 2 - 1] + sorted[count / 2]) / 2;
}

static const char *met_text(const char *target, double value, double ratio, bool has_ratio)
{
	char what[8], op[3];
	double limit, have;

	if (!target)
		return "null";
	if (sscanf(target, "%7s %2s %lf", what, op, &limit) != 3)
		abort();
	if (!strcmp(what, "ratio") && !has_ratio)
		return "null";
	have = !strcmp(what, "ratio") ? ratio : value;
	return (!strcmp(op, "<=") ? have <= limit : have >= limit) ? "true" : "false";
}

static void print_text(const char *key, const char *text)
{
	if (text)
		printf(", \"%s\": \"%s\"", key, text);
	else
		printf(", \"%s\": null", key);
}

static void print_number(const char *key, double number, bool known)
{
	if (known)
		printf(", \"%s\": %.9g", key, number);
	else
		printf(", \"%s\": null", key);
}

void row_print(const struct row *row, const struct pairs *pairs, const char *why)
{
	double ratios[REPETITIONS_MAX], value = 0, floor = 0, ratio = 0;
	size_t count = pairs ? pairs->count : 0;
	bool has_floor = count > 0;

	if (!printed(row->id))
		return;
	for (size_t i = 0; i < count; i++) {
		has_floor = has_floor && pairs->floor[i] > 0;
		ratios[i] = has_floor ? pairs->value[i] / pairs->floor[i] : 0;
	}
	if (count)
		value = median(pairs->value, count);
	if (has_floor) {
		floor = median(pairs->floor, count);
		ratio = median(ratios, count);
	}
	printf("{\"id\": \"%s\", \"unit\": \"%s\"", row->id, row->unit);
	print_number("value", value, count);
	print_number("floor", floor, has_floor);
	print_number("ratio", ratio, has_floor);
	print_text("target", row->target);
	printf(", \"met\": %s", count ? met_text(row->target, value, ratio, has_floor) : "null");
	print_text("floor_is", row->floor_is);
	print_text("note", why);
	printf(", \"repetitions\": [");
	for (size_t i = 0; i < count; i++)
		printf("%s[%.9g, %.9g]", i ? ", " : "", pairs->value[i], pairs->floor[i]);
	printf("]}\n");
	fflush(stdout);
}
