/* SPDX-License-Identifier: Apache-2.0
 *
 * Frozen objects: nobody may write to them, and nothing of them is dropped, while a forked child takes its copy of what
 * its parent had. Reads go on, pages move. Who writes waits until they are thawed. That must not be the child itself,
 * whose mapping is its parent's memory still: it is logged. A daemon that takes over from a killed one finds nothing
 * frozen.
 */
#ifndef GMEM_FREEZE_H
#define GMEM_FREEZE_H

#include <gmem/pages.h>

/* The objects of the regions in the range, as wholes. -EBUSY: another session has frozen one. A freeze that fails leaves
 * nothing frozen, and a thaw can't fail while there is the session: what is not mapped is passed over. (blocks) */
int gmem_freeze(struct gmem_core *core, uint64_t session, uint64_t va, uint64_t bytes, bool frozen);
/* Without waking anybody: that session ends. */
void gmem_object_thaw(struct gmem_object *object, uint64_t session);

static inline bool gmem_object_frozen(struct gmem_object *object)
{
	return atomic_load(&object->frozen_by);
}

#endif
