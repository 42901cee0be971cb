/* SPDX-License-Identifier: Apache-2.0
 *
 * Pools: objects that any session may map, each with files of its own. A region on one that was opened to read only is
 * mapped privately from a descriptor that can't write, so what its process does there stays there.
 *
 * Publishing moves the content to another object, `next`, whose files nobody has ever had a writable descriptor of, page
 * by page, and then puts that in the place of the old one, which becomes a copy of it (source.h) for the regions that are
 * there. Who still holds a descriptor of the old files spoils that copy, and with it those who had opened the pool before.
 *
 *   POOL record                                       what recovery does
 *     {object, other 0}                                 nothing
 *     {object, other next}                              seals object, goes on moving pages
 *     {object next, other object, published}            range and charge are those of next, whatever the objects' records say
 */
#ifndef GMEM_POOL_H
#define GMEM_POOL_H

#include <gmem/core.h>
#include <gmem/keep.h>
#include <gmem/vm_object.h>

struct gmem_pool {
	uint64_t id;                /* (C) */
	struct gmem_core *core;     /* (C) */
	struct gmem_object *object; /* pools_lock; referenced */
	struct gmem_object *next;   /* (S) of who publishes; referenced, NULL: not begun */
	uint32_t record;            /* the same */
	bool busy, unlinked;        /* pools_lock; is being published; goes when that is done */
	struct gmem_pool *chain;    /* pools_lock */
};

/* A new one of that number; references the object. */
int gmem_pool_add(struct gmem_core *core, uint64_t id, struct gmem_object *object);
/* Its object, referenced; NULL: there is no such pool. */
struct gmem_object *gmem_pool_object(struct gmem_core *core, uint64_t id);
/* A predecessor's, whose objects are there; next: NULL unless its publishing was under way. */
int gmem_pool_adopt(struct gmem_core *core, const struct gmem_record *known, uint32_t record,
		    struct gmem_object *object, struct gmem_object *next);
/* Goes on with what a predecessor was publishing. (blocks) */
void gmem_pools_go_on(struct gmem_core *core);
/* For the end of the core: what regions would have pulled from a source later, they get now, or SIGBUS. (blocks) */
void gmem_pools_complete(struct gmem_core *core);
void gmem_pools_end(struct gmem_core *core);

#endif
