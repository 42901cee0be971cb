/* SPDX-License-Identifier: Apache-2.0
 *
 * Checks of the programs that test libgmem. A failed one says where, what, and libgmem's last words, and ends the
 * program.
 */
#ifndef CHECK_H
#define CHECK_H

#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <gmem.h>

#define FAILED(...)                                                                         \
	do {                                                                                \
		fprintf(stderr, "%s:%d: ", __FILE__, __LINE__);                             \
		fprintf(stderr, __VA_ARGS__);                                               \
		fprintf(stderr, " (last error: %s)\n", gmem_last_error());                  \
		exit(1);                                                                    \
	} while (0)

#define CHECK(condition)                                                                    \
	do {                                                                                \
		if (!(condition))                                                           \
			FAILED("not true: %s", #condition);                                 \
	} while (0)

#define OK(call)                                                                            \
	do {                                                                                \
		int err_ = (call);                                                          \
		if (err_)                                                                   \
			FAILED("%s gave %d: %s", #call, err_, gmem_strerror(err_));         \
	} while (0)

/* The call fails with that errno, and its words contain what. */
#define REFUSED(call, number, what)                                                         \
	do {                                                                                \
		int err_ = (call);                                                          \
		if (err_ != -(number))                                                      \
			FAILED("%s gave %d, not -%s", #call, err_, #number);                \
		if (!strstr(gmem_last_error(), what))                                       \
			FAILED("%s: no word of \"%s\"", #call, what);                       \
	} while (0)

/* Whether system calls may be given memory that is not there yet; else they fail with EFAULT, as docs/user.md says. */
static inline bool kernel_faults(void)
{
	return !access("/dev/userfaultfd", R_OK | W_OK);
}

static inline struct gmem_device_info device_of(struct gmem *session, const char *name)
{
	struct gmem_device_info all[16];
	size_t count;

	OK(gmem_devices(session, all, sizeof(all[0]), 16, &count));
	for (size_t i = 0; i < count && i < 16; i++)
		if (!strcmp(all[i].name, name))
			return all[i];
	FAILED("no device %s", name);
}

static inline int hnid_of(struct gmem *session, const char *name)
{
	return device_of(session, name).hnid;
}

#endif
