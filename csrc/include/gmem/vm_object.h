/* SPDX-License-Identifier: Apache-2.0
 *
 * Object: the backing of one or more regions. It owns an extent of the LPT, a range of file offsets (the same in its
 * file on every hnode) and the VA range that this offset range was derived from, which is not given out again before the
 * object is gone. Aliases are made when a copy first needs them.
 */
#ifndef GMEM_VM_OBJECT_H
#define GMEM_VM_OBJECT_H

#include <gmem/account.h>
#include <gmem/lockrank.h>
#include <gmem/lpt.h>
#include <gmem/memfd.h>
#include <gmem/source.h>
#include <gmem/view.h>

struct gmem_core;
struct gmem_mmap_args;
struct gmem_session;
struct gmem_record;
struct gmem_region;
struct gmem_source;

struct gmem_object {
	atomic_uint refs;         /* (A) regions, frames in use by a mover, work items */
	struct gmem_core *core;   /* (C) */
	uint64_t pn, pages;       /* (C) its extent of the LPT */
	uint64_t offset, bytes;   /* (C) file offsets */
	uint8_t shift;            /* (C) log2 of the logical page size */
	enum gmem_class class_;   /* (C) */
	struct gmem_account *account; /* (C) who is charged */
	struct gmem_account *files;   /* (C) whose files hold it: the same one's, or a pool's own */
	bool pooled;              /* (C) its content stays while nobody maps it */
	atomic_bool sealed;       /* (A) nobody writes to it any more */
	atomic_bool succeeded;    /* (A) VA range and charge are another object's */
	uint64_t successor;       /* (C) once sealed: one more than the first page of that object; 0: none */
	_Atomic(struct gmem_source *) source; /* (A) set once; where the content of pages comes from that are nowhere here; NULL: zeros */
	bool uncharged;           /* (C) once it has regions; its pages can always go where they came from */
	uint32_t record;          /* (C) or, of a pool's, its publishing's */
	_Atomic uint64_t frozen_by; /* (A) a session; 0: none (freeze.h) */
	atomic_bool kept;         /* (A) its addresses stay its client's (kept.h) */
	bool reused;              /* (C) its addresses were kept, and are mapped already */
	atomic_bool marked;       /* (A) some of it is poisoned in the client's page table, for as long as that is mapped */
	struct gmem_mutex lock;
	struct gmem_region *regions;  /* (O) */
	uint64_t regions_generation;  /* (O) grows with each change of the list or of a region in it */
	_Atomic(uint8_t *) aliases[GMEM_HNODE_MAX]; /* (A) set once under lock */
};

/* References the accounts; flags: GMEM_OBJECT_* (keep.h). The VA range at offset becomes the object's, unless it has been
 * SUCCEEDED; on failure it stays the caller's. */
int gmem_object_create(struct gmem_core *core, struct gmem_account *account, struct gmem_account *files,
		       enum gmem_class class_, uint64_t offset, uint64_t bytes, uint8_t shift, unsigned flags,
		       struct gmem_object **ret);
/* The same, with a range for it and charged: what gmem_mmap() makes. (memory.c) */
int gmem_object_reserve(struct gmem_session *session, const struct gmem_mmap_args *args, struct gmem_account *account,
			struct gmem_account *files, struct gmem_object **ret);
/* One of a predecessor's, whose extent and VA range have been taken. */
int gmem_object_adopt(struct gmem_core *core, struct gmem_account *account, struct gmem_account *files,
		      const struct gmem_record *known, uint32_t record, struct gmem_object **ret);
/* One that describes itself, before anybody knows the object; kept for a successor. uncharged: no room is promised for it. Takes it over, also on failure. */
int gmem_object_set_source(struct gmem_object *object, struct gmem_source *source, bool uncharged);
void gmem_object_uncharge(struct gmem_object *object); /* a predecessor's, that was so */
struct gmem_object *gmem_object_ref(struct gmem_object *object);
/* False if it is being destroyed. */
bool gmem_object_tryref(struct gmem_object *object);
/* The last reference frees every page, the extent and the VA range, unless that is kept. */
void gmem_object_unref(struct gmem_object *object);

/* Nobody writes to it from now on. Its pages are copies of those of next, which has the same offsets: what is not here is
 * pulled from there. NULL: of nobody. */
int gmem_object_seal(struct gmem_object *object, struct gmem_object *next);
/* Gives VA range and charge to that object. */
int gmem_object_succeed(struct gmem_object *object, struct gmem_object *next);
/* Its pages come from a source, and which of them were changed since is known (GMEM_PAGE_CHANGED). */
static inline bool gmem_object_tracks(struct gmem_object *object)
{
	const struct gmem_source *source = atomic_load(&object->source);

	return source && source->tracks;
}
static inline bool gmem_object_sealed(struct gmem_object *object) { return atomic_load(&object->sealed); }
/* Its source has all that it has: a successor only once everything has been moved to it. */
static inline bool gmem_object_is_copy(struct gmem_object *object)
{
	return atomic_load(&object->source) && gmem_object_sealed(object) &&
	       (!object->successor || atomic_load(&object->succeeded));
}

int gmem_object_file(struct gmem_object *object, int hnid, struct gmem_file **ret);
/* A descriptor of that file for a process to map it with; borrowed. */
int gmem_object_lend(struct gmem_object *object, struct gmem_file *file, bool read_only, int *ret_fd);
int gmem_object_alias(struct gmem_object *object, int hnid, uint8_t **ret);
/* Where a copy engine finds the page at that offset of the object; on hnodes that are not remote, the CPU as well.
 * -ENOENT: there is no frame. */
int gmem_object_at(struct gmem_object *object, int hnid, uint64_t offset, uint8_t **ret);
/* Makes pages that read zero, where there are none. -ENOSPC, -ENOMEM. */
int gmem_object_zero(struct gmem_object *object, int hnid, uint64_t offset, uint64_t bytes);

/* Calls fn for every view on hnid that maps any of [offset, offset + bytes) of the object's offsets (offsets count
 * from the object's start), with the range in that view's addresses. No lock is held during the call. Stops at the
 * first error and returns it. hnid -1: views on every hnode. */
typedef int (*gmem_view_fn)(struct gmem_view *view, struct gmem_range range, void *arg);
int gmem_object_for_views(struct gmem_object *object, int hnid, uint64_t offset, uint64_t bytes, gmem_view_fn fn,
			  void *arg);
/* Whether any region maps any of the range. */
bool gmem_object_mapped(struct gmem_object *object, uint64_t offset, uint64_t bytes);

#endif
