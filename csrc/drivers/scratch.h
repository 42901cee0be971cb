/* SPDX-License-Identifier: Apache-2.0
 *
 * Scratch: the file or block device that pages are in; its content means nothing once it is closed. Nobody's data is
 * ever overwritten: a file is taken if it is new, empty or begins with our header, a device if its owner says so, and
 * each only if no other daemon has it.
 */
#ifndef GMEM_DRIVERS_SCRATCH_H
#define GMEM_DRIVERS_SCRATCH_H

#include <gmem/types.h>

#define GMEM_SCRATCH_DATA GMEM_HUGE_BYTES /* pages begin here; before is the header, and a hole */

enum gmem_choice { GMEM_OFF = 0, GMEM_ON = 1, GMEM_AUTO = 2 }; /* AUTO: on if it can be had */

struct gmem_scratch_config {
	const char *path;
	uint64_t capacity; /* 0: 1 GiB, or all of a device */
	bool erase;
	enum gmem_choice preallocate, direct;
};

struct gmem_scratch {
	int fd;                      /* (C) */
	uint64_t capacity;           /* (C) a multiple of 2 MiB */
	char *made;                  /* (C) what to unlink, or NULL */
	bool direct, preallocated;   /* (C) */
	char note[GMEM_MESSAGE_MAX]; /* (C) what could not be had, or "" */
};

/* message: GMEM_MESSAGE_MAX bytes; says why it is refused, beginning with the name of an option. */
int gmem_scratch_open(const struct gmem_scratch_config *config, char *message, struct gmem_scratch *ret);
/* The one that a predecessor had open, under the same configuration; takes fd over on success. */
int gmem_scratch_adopt(const struct gmem_scratch_config *config, int fd, uint64_t capacity, struct gmem_scratch *ret);
void gmem_scratch_close(struct gmem_scratch *scratch);
/* The same for one that stays with whoever else has it: its name and its lock are left alone. */
void gmem_scratch_leave(struct gmem_scratch *scratch);

#endif
