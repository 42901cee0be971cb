/* SPDX-License-Identifier: Apache-2.0
 *
 * The physical page table of a process that a uffd watches: the client itself (the host is hnode 0) and the contexts of
 * every device whose MMU is the CPU's own (simgpu) share this one implementation of the driver ABI's MMU operations.
 * Frames need no number here: a page's frame is its file at the page's offset.
 */
#ifndef GMEM_PMAP_H
#define GMEM_PMAP_H

#include <gmem/driver.h>
#include <gmem/view.h>

static inline struct gmem_view *gmem_pmap_view(struct gmem_pmap *pmap) { return (struct gmem_view *)pmap; }
static inline struct gmem_pmap *gmem_view_pmap(struct gmem_view *view) { return (struct gmem_pmap *)view; }

/* Maps pages that are present in the file and wakes who waits for them. A page mapped read-only before becomes
 * writable when prot says so. */
int gmem_uffd_pmap_enter(struct gmem_pmap *pmap, struct gmem_range range, uint64_t frame, enum gmem_prot prot);
/* Read-only for GMEM_PROT_READ; else writable again, waking. Retries EAGAIN a bounded number of times. */
int gmem_uffd_pmap_protect(struct gmem_pmap *pmap, struct gmem_range range, enum gmem_prot prot);
int gmem_uffd_pmap_wake(struct gmem_pmap *pmap, struct gmem_range range);
/* SIGBUS at the next touch. */
int gmem_uffd_pmap_poison(struct gmem_pmap *pmap, struct gmem_range range);

#endif
