/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <gmem/crash.h>

_Atomic int gmem_crash_at;
static atomic_int passes_left;

static const char *const names[GMEM_CRASH_COUNT] = {
#define GMEM_CRASH_TEXT(name) [GMEM_CRASH_##name] = #name,
	GMEM_CRASH_POINTS(GMEM_CRASH_TEXT)
	GMEM_CRASH_GPU_POINTS(GMEM_CRASH_TEXT)
	GMEM_CRASH_FAR_POINTS(GMEM_CRASH_TEXT)
#undef GMEM_CRASH_TEXT
};

const char *gmem_crash_name(unsigned point)
{
	return point && point < GMEM_CRASH_COUNT ? names[point] : NULL;
}

void gmem_crash_init(void)
{
	const char *path = secure_getenv("GMEM_CRASH_FILE");
	FILE *in = path ? fopen(path, "re") : NULL;
	char name[64];
	int passes;

	if (!in)
		return;
	if (fscanf(in, "%63[A-Z_]:%d", name, &passes) == 2)
		for (int i = 1; i < GMEM_CRASH_COUNT; i++)
			if (!strcmp(names[i], name)) {
				atomic_store(&passes_left, passes);
				atomic_store(&gmem_crash_at, i);
			}
	fclose(in);
}

void gmem_crash_named(const char *name)
{
	int at = atomic_load_explicit(&gmem_crash_at, memory_order_relaxed);

	if (at && !strcmp(names[at], name))
		gmem_crash_pass();
}

void gmem_crash_pass(void)
{
	if (atomic_fetch_sub(&passes_left, 1) == 1)
		raise(SIGKILL);
}
