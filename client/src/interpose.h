/* SPDX-License-Identifier: Apache-2.0
 *
 * What libraries for LD_PRELOAD share: taking the place of functions, staying out of one's own way, and being the first
 * whom a fork asks.
 */
#ifndef GMEM_CLIENT_INTERPOSE_H
#define GMEM_CLIENT_INTERPOSE_H

#include <stdbool.h>
#include <stdint.h>

#include "atfork.h"

#define LIKELY_NOT(condition) __builtin_expect(!!(condition), 0)
/* Defines libc's function of that name: not under its own in C, as headers declare some with `...`. */
#define IN_PLACE_OF(name) __asm__(name) __attribute__((visibility("default")))

/* The next library's function of that name; *ret, a pointer to function, is left alone if there is none. */
void gmem_find_next(const char *name, void *ret);

/* While gmem works for a thread, what that thread calls is gmem's, not the program's, and its signals wait: a handler may
 * call munmap(2). */
struct gmem_visit {
	uint64_t signals;
};

extern _Thread_local __attribute__((tls_model("initial-exec"))) bool gmem_inside;

/* False if this thread is at work for gmem already. */
bool gmem_enter(struct gmem_visit *visit);
void gmem_leave(const struct gmem_visit *visit);

/* What a fork runs, for those that pass the C library by. */
void gmem_fork_prepare(void);
void gmem_fork_parent(void);
void gmem_fork_child(void);

#endif
