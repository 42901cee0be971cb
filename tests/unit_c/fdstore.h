/* SPDX-License-Identifier: Apache-2.0
 *
 * The manager that holds descriptors, for tests: it takes what a daemon says in sd_notify's words, and has what a killed one
 * has left.
 */
#ifndef FDSTORE_H
#define FDSTORE_H

#include <stdbool.h>
#include <stddef.h>

#include <gmem/keep.h>

#define FDSTORE_MAX 256

struct fdstore {
	int ours, daemons; /* sockets: the daemon's end is duplicated for each of its lives */
	struct gmem_kept_fd kept[FDSTORE_MAX];
	size_t count;
};

void fdstore_open(struct fdstore *store);
void fdstore_close(struct fdstore *store); /* with all that is held */
/* One message; false: there is none. */
bool fdstore_take(struct fdstore *store);
void fdstore_take_all(struct fdstore *store);
/* The descriptor that is held under a name, the store's; -1: none. */
int fdstore_find(const struct fdstore *store, const char *name);
void fdstore_forget(struct fdstore *store, const char *name);
/* Has another one held in its place. */
void fdstore_replace(struct fdstore *store, const char *name, int fd);
/* Duplicates of all, for a daemon's next life, which takes them over. */
void fdstore_copy(const struct fdstore *store, struct gmem_kept_fd *ret);

/* Once: the file in which daemons that are started from here on read where they are to end. */
void crash_open(void);
void crash_close(void);
/* The passes-th time that one comes by the point; NULL: nowhere. */
void crash_at(const char *point, int passes);

#endif
