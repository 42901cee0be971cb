/* SPDX-License-Identifier: Apache-2.0
 *
 * Slabs: byte strings of 1 byte to 2 MiB in one sparse memfd, for tiers that compress.
 *
 *   span    a range of file offsets: 64 KiB or 2 MiB of them. Offsets cost nothing, so spans are never joined or split
 *   slab    a span whose first frames are cut into slots of one size class
 *   extent  a span whose first frames hold one string: what is large, or a multiple of the frame
 *   place   where a string is: class, slot (of an extent: frames - 1) and span, in 48 bits
 *
 * Eight classes for each doubling, from 64 bytes to 30 KiB, so a slot wastes at most an eighth; slabs are of 4 to 15
 * frames, which their slots fill exactly. A slab that empties, and an extent that is freed, are punched out of the file.
 *
 * The file is read and written by system calls and not mapped: memory that can't be had is an error instead of SIGBUS, a
 * write into a hole does not zero it first, and a punch has no page tables to visit. Writes take the file's lock in the
 * kernel, for as long as a copy takes; reads take none.
 *
 * A slot begins with its key. Callers keep an index from keys to places; gmem_slabs_squeeze() goes the other way.
 * What is outside the file (lists, bitmaps) can be built again from the places of that index.
 */
#ifndef GMEM_SLAB_H
#define GMEM_SLAB_H

#include <gmem/types.h>

#include "quota.h"

#define GMEM_SLOT_HEADER 8 /* of a slot, before its bytes: the key */
#define GMEM_PLACE_BITS 48

struct gmem_slabs;
typedef uint64_t gmem_place_t;

/* fd: a predecessor's, taken over on success: then each place that its index has is to be taken, and after the last one
 * gmem_slabs_settle() called. -1: a new one. -EPROTO: it is none, or of another size. */
int gmem_slabs_create(const char *name, struct gmem_quota *quota, int fd, struct gmem_slabs **ret);
int gmem_slabs_fd(const struct gmem_slabs *slabs);
/* -EPROTO: it can't be a place, or is taken; -ENOMEM. */
int gmem_slabs_take(struct gmem_slabs *slabs, gmem_place_t place);
void gmem_slabs_settle(struct gmem_slabs *slabs);
void gmem_slabs_destroy(struct gmem_slabs *slabs);
/* The most that slabs which are not full can waste once they have been squeezed. */
uint64_t gmem_slabs_slack_max(void);

/* -ENOSPC: the quota has no room for another slab or extent. */
int gmem_slabs_alloc(struct gmem_slabs *slabs, uint64_t bytes, gmem_place_t *ret);
void gmem_slabs_free(struct gmem_slabs *slabs, gmem_place_t place);
/* Of a slot, the GMEM_SLOT_HEADER bytes before data are overwritten; an extent has no header. */
int gmem_slabs_write(struct gmem_slabs *slabs, gmem_place_t place, uint64_t key, uint8_t *data, uint64_t bytes);
/* Bytes from the string's byte `from` on. Of a place that was freed meanwhile: anything. */
int gmem_slabs_read(struct gmem_slabs *slabs, gmem_place_t place, uint64_t from, void *dst, uint64_t bytes);

/* Empties one slab, if its class has as much free elsewhere; -ENOSPC if no class has. move is called without locks for
 * each slot that is taken: it says whether key is at that place still, and puts it elsewhere by gmem_slabs_copy(). */
typedef void (*gmem_slab_move_fn)(void *arg, uint64_t key, gmem_place_t place);
int gmem_slabs_squeeze(struct gmem_slabs *slabs, gmem_slab_move_fn move, void *arg);
/* A copy of the slot with its key, elsewhere. */
int gmem_slabs_copy(struct gmem_slabs *slabs, gmem_place_t place, gmem_place_t *ret);

/* Debugging aid: lists, bitmaps and counts agree. For when nothing else runs. */
bool gmem_slabs_is_valid(struct gmem_slabs *slabs);

#endif
