/* SPDX-License-Identifier: Apache-2.0
 *
 * Fault-ahead: a view that faults on one page after the other, or on pages at the same distance from each other, gets the
 * next ones before it asks, in a window that doubles while the guess holds (as Linux's read-ahead does). One whose hnode has
 * most of a block gets the rest of it (density.h). Never evicts: a guess gives way to what is used.
 */
#ifndef GMEM_PREFETCH_H
#define GMEM_PREFETCH_H

#include <gmem/as.h>

struct gmem_core;

/* A fault at this place was answered. came: its content was elsewhere, or elsewhere, too, when it was to be written. */
void gmem_stream_fault(struct gmem_core *core, struct gmem_view *view, const struct gmem_place *place, bool write, bool came);
/* A fault at this place waits for whoever moves the page: a stream that it continues goes on meanwhile. */
void gmem_stream_parked(struct gmem_core *core, struct gmem_view *view, const struct gmem_place *place, bool write);
/* Whether there is something to do. */
bool gmem_stream_pending(const struct gmem_view *view);
/* Whether some of it takes time in which the client could go on: more than mapping what is here, for one that has not been
 * there first lately. */
bool gmem_stream_overtakes(const struct gmem_view *view);
/* The client has done something else since its last fault. */
void gmem_stream_unhurried(struct gmem_view *view);
/* Fetches the next piece of what the view's streams want. False if there is nothing to do. may_wait: also for a slow
 * link; else a filler is asked to. */
bool gmem_stream_step(struct gmem_core *core, struct gmem_view *view, bool may_wait);
/* Somebody has said where [va, va + bytes) shall be: guesses of other views of the as, on other hnodes than hnid, end, those
 * under way included. Not for fault threads. */
void gmem_stream_cancel(struct gmem_core *core, struct gmem_as *as, int hnid, uint64_t va, uint64_t bytes);
/* gmem_stream_step() to the end: for a filler thread, at most one for each view. */
void gmem_stream_help(struct gmem_core *core, struct gmem_view *view);

#endif
