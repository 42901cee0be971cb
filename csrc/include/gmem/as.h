/* SPDX-License-Identifier: Apache-2.0
 *
 * Address space: the regions one client maps, and the views on them: the client's process and its device contexts.
 */
#ifndef GMEM_AS_H
#define GMEM_AS_H

#include <gmem/hints.h>
#include <gmem/lockrank.h>
#include <gmem/view.h>
#include <gmem/vm_object.h>

struct gmem_region {
	uint64_t va, bytes;         /* (R) and (O): changed under both */
	uint64_t offset;            /* (R) and (O): from the object's start */
	struct gmem_object *object; /* (C) holds a reference */
	struct gmem_as *as;         /* (C) */
	enum gmem_fork fork;        /* (C) */
	bool read_only;             /* (C) its process maps it privately: nothing that it does there gets into the object */
	bool committed;             /* (R) registered on the process's uffd */
	uint64_t asked;             /* (R) for which request it waits to be committed; 0: unknown */
	uint32_t record;            /* (R) */
	struct gmem_region *next;   /* (O) in object->regions */
};

/* More than the kernel lets a process map, by default. */
#define GMEM_REGIONS_MAX 65536

struct gmem_as {
	struct gmem_rwlock lock;
	uint64_t session_id;          /* (C) */
	struct gmem_region **regions; /* (R) sorted by va */
	size_t count, capacity;       /* (R) */
	struct gmem_hints hints;      /* (R) */
	struct gmem_mutex views_lock;
	struct gmem_view *views;      /* views_lock */
};

int gmem_as_init(struct gmem_as *as, struct gmem_keep *keep, uint64_t session_id);
void gmem_as_deinit(struct gmem_as *as); /* no regions and no views are left */

/* Adds a region on the object (a reference is taken). */
int gmem_as_insert(struct gmem_as *as, struct gmem_object *object, uint64_t va, uint64_t offset, uint64_t bytes,
		   enum gmem_fork fork, bool committed);
/* The same for any region: va, bytes, offset, object, fork, read_only and committed of like. */
int gmem_as_insert_like(struct gmem_as *as, const struct gmem_region *like);
/* The region at va was made for that request. */
void gmem_as_asked(struct gmem_as *as, uint64_t va, uint64_t asked);
/* The region of so many bytes that was made for that request, and is not committed. */
bool gmem_as_find_asked(struct gmem_as *as, uint64_t asked, uint64_t bytes, uint64_t *ret_va);
/* The same for an as that no other thread knows yet: takes no lock of the as. */
int gmem_as_insert_private(struct gmem_as *as, const struct gmem_region *like);
/* A predecessor's region, which has its record already. */
int gmem_as_adopt(struct gmem_as *as, struct gmem_object *object, const struct gmem_record *known, uint32_t record);
/* Where the first region at or behind va begins; UINT64_MAX: there is none. */
uint64_t gmem_as_next(struct gmem_as *as, uint64_t va);
/* The region at va is registered on the process's uffd now. */
void gmem_as_commit(struct gmem_as *as, uint64_t va);
/* All of them are, as of a process that came with its regions mapped. */
void gmem_as_commit_all(struct gmem_as *as);
/* Removes [va, va + bytes) from the as: regions inside go, others are cut. For each piece, fn is called without locks
 * (NULL: nothing). */
typedef void (*gmem_piece_fn)(struct gmem_object *object, uint64_t offset, uint64_t bytes, void *arg);
void gmem_as_remove(struct gmem_as *as, uint64_t va, uint64_t bytes, gmem_piece_fn fn, void *arg);
/* mremap: what was mapped at from is at to now. */
void gmem_as_move(struct gmem_as *as, uint64_t from, uint64_t to, uint64_t bytes);

/* What a fault at va needs to know; takes a reference on the object. -ENOENT. */
struct gmem_place {
	struct gmem_object *object;
	uint64_t index;      /* logical page in the object */
	struct gmem_range range; /* the part of that page this region maps, in the as's addresses */
	uint64_t region_va, region_bytes, region_offset;
	enum gmem_fork fork;
	bool committed, read_only;
	struct gmem_hint hint;
};
int gmem_as_lookup(struct gmem_as *as, uint64_t va, struct gmem_place *ret);

/* Placement advice for a range; see hints.h. */
int gmem_as_advise(struct gmem_as *as, uint64_t va, uint64_t bytes, enum gmem_advice advice, int hnid);

void gmem_as_add_view(struct gmem_as *as, struct gmem_view *view);
/* Drops the as's reference. False if it was not there. */
bool gmem_as_remove_view(struct gmem_as *as, struct gmem_view *view);
/* Referenced; NULL if there is none. */
struct gmem_view *gmem_as_view(struct gmem_as *as, int hnid);

#endif
