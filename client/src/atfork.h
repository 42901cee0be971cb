/* SPDX-License-Identifier: Apache-2.0
 *
 * pthread_atfork() of gmem's own handlers. With libgmem-preload.so they run before those of all others in a child, and
 * after them before a fork, no matter when gmem came to be used.
 */
#ifndef GMEM_CLIENT_ATFORK_H
#define GMEM_CLIENT_ATFORK_H

#include <pthread.h>

int gmem_preload_atfork(void (*prepare)(void), void (*parent)(void), void (*child)(void)) __attribute__((weak));

static inline int gmem_atfork(void (*prepare)(void), void (*parent)(void), void (*child)(void))
{
	return gmem_preload_atfork ? gmem_preload_atfork(prepare, parent, child) : pthread_atfork(prepare, parent, child);
}

#endif
