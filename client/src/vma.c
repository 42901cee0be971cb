/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "vma.h"

static bool parse(const char *line, struct gmem_vma *ret)
{
	int name = 0;

	*ret = (struct gmem_vma){ 0 };
	if (sscanf(line, "%" SCNx64 "-%" SCNx64 " %4s %" SCNx64 " %*s %" SCNu64 " %n", &ret->va, &ret->end, ret->prot,
		   &ret->offset, &ret->inode, &name) < 5 || !name)
		return false;
	snprintf(ret->name, sizeof(ret->name), "%.*s", (int)strcspn(line + name, "\n"), line + name);
	return true;
}

int gmem_vma_each(uint64_t va, uint64_t end, gmem_vma_fn fn, void *arg)
{
	FILE *in = fopen("/proc/self/maps", "re");
	struct gmem_vma vma;
	char line[512];
	bool begins = true; /* the next piece of text is the beginning of a line */
	int err = 0;

	if (!in)
		return -errno;
	while (!err && fgets(line, sizeof(line), in)) {
		bool whole = begins && parse(line, &vma);

		begins = strchr(line, '\n');
		if (whole && vma.end > va && vma.va < end)
			err = fn(&vma, arg);
	}
	if (!err && ferror(in))
		err = -EIO;
	fclose(in);
	return err;
}

static bool locks_any(void)
{
	FILE *in = fopen("/proc/self/status", "re");
	unsigned long kib = 0;
	char line[256];

	while (in && fgets(line, sizeof(line), in))
		if (sscanf(line, "VmLck: %lu", &kib) == 1)
			break;
	if (in)
		fclose(in);
	return kib;
}

/* The kernel walks all page tables to say this, so it is asked only if anything is locked. */
bool gmem_vma_is_locked(uint64_t va, uint64_t end)
{
	FILE *in = locks_any() ? fopen("/proc/self/smaps", "re") : NULL;
	struct gmem_vma vma = { 0 }, next;
	bool locked = false;
	char line[512];

	while (in && !locked && fgets(line, sizeof(line), in)) {
		if (parse(line, &next))
			vma = next;
		else if (!strncmp(line, "VmFlags:", 8))
			locked = vma.end > va && vma.va < end && strstr(line, " lo");
	}
	if (in)
		fclose(in);
	return locked;
}
