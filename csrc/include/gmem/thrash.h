/* SPDX-License-Identifier: Apache-2.0
 *
 * Thrash control: a page that several hnodes use at once, at least one of them writing, moves at every use, and nobody gets
 * anything done. After some takings in quick succession whoever has it keeps it for a while: the fault that would take it
 * waits that long. As NVIDIA's UVM does it (uvm_perf_thrashing.c: three within 500 us), which can map remotely where we
 * can only hold. What a page needs to be judged is in its word: how many takings, and when the last one was.
 */
#ifndef GMEM_THRASH_H
#define GMEM_THRASH_H

#include <gmem/migrate.h>

/* Whether this use takes the page from another hnode that could use it without a fault. Page locked. */
bool gmem_thrash_takes(const struct gmem_page *page, int hnid, bool write);
/* It was taken by a fault. */
void gmem_thrash_note(struct gmem_page *page, uint64_t now_ns);
/* Until when a fault that takes it has to wait; 0: it need not. */
uint64_t gmem_thrash_until(const struct gmem_page *page, int hnid, bool write, uint64_t now_ns);
/* It is not for a guess to take. */
bool gmem_thrash_bounces(const struct gmem_page *page, uint64_t now_ns);

#endif
