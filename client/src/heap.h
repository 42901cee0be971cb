/* SPDX-License-Identifier: Apache-2.0
 *
 * Where libgmem-heap keeps what it has for a session. It is a library of its own because jemalloc wants more
 * thread-local storage than dlopen() has room for, and libgmem must be loadable late.
 */
#ifndef GMEM_CLIENT_HEAP_H
#define GMEM_CLIENT_HEAP_H

#include <gmem.h>
#include <stdint.h>

struct gmem_heap;

struct gmem_heap_slot {
	struct gmem_heap *_Atomic heap;          /* NULL: not yet. A forked child has none at first. */
	void (*destroy)(struct gmem_heap *heap); /* gmem_close() calls it if there is a heap */
};

/* ret_base, ret_bytes: the window, in which all memory of the session lies. */
GMEM_API struct gmem_heap_slot *gmem_session_heap(struct gmem *session, uint64_t *ret_base, uint64_t *ret_bytes);

#endif
