/* SPDX-License-Identifier: Apache-2.0
 *
 * Fault: what a thread waits for at an address, and how it is answered. Faults that need a slow device, or have to wait, are
 * for a filler (fill.h).
 */
#ifndef GMEM_FAULT_H
#define GMEM_FAULT_H

#include <gmem/view.h>

#define GMEM_THREADS_MAX 16 /* that answer them, of each kind */

struct gmem_core;
struct gmem_place;

struct gmem_fault {
	struct gmem_view *view;
	uint64_t va;
	uint32_t flags; /* GMEM_UFFD_FAULT_* */
	pid_t thread;   /* who waits; 0: unknown */
};

/* The page must come over a slow link, or room must be made across one: a filler shall wait for it. */
bool gmem_fault_is_slow(struct gmem_core *core, const struct gmem_place *place, int hnid);
/* Resolves one fault now, or sees to it that the faulting thread is woken later. */
void gmem_fault_resolve(struct gmem_core *core, const struct gmem_fault *fault, bool may_defer);
/* A fault of a device context that can't be answered in the ordinary way. True if it was dealt with. */
bool gmem_devfault_refuse(struct gmem_core *core, struct gmem_view *view, uint64_t va, bool known);
/* Memory that can't be had: SIGBUS at the touch, an event, a counter. */
void gmem_fault_poison(struct gmem_core *core, struct gmem_view *view, struct gmem_range range, int error);

#endif
