/* SPDX-License-Identifier: Apache-2.0
 *
 * Overlays: what the process of a context has mapped over its window, which is mapped whole from its session's file: the
 * regions that are in other files. A pool that is opened while there are contexts is an overlay of theirs when their
 * processes have said so, and not before: a page that is put where another file is mapped would be lost.
 */
#ifndef GMEM_OVERLAY_H
#define GMEM_OVERLAY_H

#include <gmem/as.h>
#include <gmem/session.h>

/* Whether the view maps that place from the file that holds it. */
bool gmem_overlay_maps(struct gmem_view *view, const struct gmem_place *place);
/* A predecessor's. */
int gmem_overlay_adopt(struct gmem_view *view, const struct gmem_record *known, uint32_t record);
/* The view is gone. */
void gmem_overlays_free(struct gmem_view *view);

#endif
