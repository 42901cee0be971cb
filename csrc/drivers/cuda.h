/* SPDX-License-Identifier: Apache-2.0
 *
 * cuda: an NVIDIA GPU, for the driver's own files. Frames are physical handles of 2 MiB (cuMemCreate), each mapped at an
 * alias of its own for the copy engine from its making to its end, and exported as a descriptor for the processes whose
 * contexts map it. What is asked of these goes over channels (gmem_wire.h).
 *
 * Locks: a channel's, then the device's; neither is held over a copy. A page is worked on by one thread at a time (the
 * core's BUSY), so a frame in use changes hands nowhere in between.
 */
#ifndef GMEM_DRIVER_CUDA_H
#define GMEM_DRIVER_CUDA_H

#include <pthread.h>

#include <gmem/driver.h>
#include <gmem/lockrank.h>
#include <gmem_cuda_api.h>
#include <gmem_wire.h>

#include "cuda_boxes.h"

#define GMEM_CUDA_SHIFT 21
#define GMEM_CUDA_BYTES (1ull << GMEM_CUDA_SHIFT)
#define GMEM_CUDA_NONE UINT32_MAX

/* A frame that one context's process has imported, and perhaps mapped. */
struct gmem_cuda_import {
	struct gmem_pmap *pmap;                   /* (C) referenced */
	uint32_t frame;                           /* (C) */
	uint64_t va;                              /* the channel's lock; 0: not mapped */
	bool writable;                            /* the channel's lock */
	struct gmem_cuda_import *next;            /* device lock; of the frame */
	struct gmem_cuda_import *before, *behind; /* device lock; of the pmap */
};

struct gmem_cuda_frame {
	CUmemhandle handle;               /* (C) while it is there */
	int fd;                           /* device lock; -1: it is in a box, given away, or not exported yet */
	bool clean;                       /* device lock; all zeros */
	bool foreign;                     /* device lock; imported for a session that is not its owner's */
	bool unclaimed;                   /* device lock; a predecessor's, and nobody has asked for it yet */
	uint32_t next;                    /* device lock; in the list it is in */
	struct gmem_cuda_import *imports; /* device lock */
};

/* Of a frame, for a successor; cuda_notes.c has the order in which it is changed. */
#define GMEM_CUDA_MADE 1u
#define GMEM_CUDA_FOREIGN 2u

struct gmem_cuda_note {
	_Atomic uint64_t owner; /* 0: nobody has had it */
	_Atomic uint64_t place; /* page + 1, and in the low byte the page class; 0: nowhere */
	_Atomic uint32_t generation, state;
};

struct gmem_cuda_list {
	uint32_t first, count;
};

struct gmem_mem {
	struct gmem_device *gpu;      /* (C) referenced */
	uint64_t owner, pages;        /* (C) */
	enum gmem_class class_;       /* (C) */
	uint32_t *frame_of;           /* device lock; by page, mapped sparse; number + 1 */
	uint64_t used;                /* device lock */
	struct gmem_cuda_list cached; /* device lock; frames that it had */
	uint64_t used_ns;             /* device lock; when it last took one */
	struct gmem_mem *next;        /* device lock */
};

struct gmem_cuda_copier;

struct gmem_device {
	atomic_uint refs;              /* (A) mems and pmaps outlive remove */
	struct gmem_cuda_api cu;       /* (C) */
	CUdevice id;                   /* (C) */
	CUcontext ctx;                 /* (C) */
	char name[64];                 /* (C) */
	uint8_t uuid[16];              /* (C) */
	uint64_t capacity, reserve, threads, patience_ms; /* (C) */
	CUdeviceptr alias;             /* (C) of frame 0 */
	uint32_t frame_max;            /* (C) numbers are below: of all of the device, whatever its capacity */
	uint32_t frame_limit;          /* (C) so many may be there */
	struct gmem_driver_config held; /* (C) its keep is all that counts */
	struct gmem_cuda_head *head;   /* (C) in a file that outlives us, as the notes */
	struct gmem_cuda_note *notes;  /* (C) by frame; written by whoever has the frame */
	struct gmem_boxes *boxes;      /* (C) descriptors of frames */
	atomic_bool lost;              /* (A) */
	struct gmem_mutex lock;
	char error[160];               /* lock */
	struct gmem_cuda_frame *frames; /* (C) mapped sparse */
	uint32_t bumped;               /* lock; numbers below have been used */
	uint32_t made;                 /* lock; frames that are there, or are being made */
	uint32_t unclaimed;            /* lock */
	struct gmem_cuda_list unused;  /* lock; numbers without a frame */
	struct gmem_cuda_list fresh;   /* lock; frames that no session has had */
	struct gmem_mem *mems;         /* lock */
	struct gmem_pmap *resumed;     /* lock; a predecessor's contexts that have not said what they have */
	CUstream scrub;                /* (C) */
	pthread_t maker;
	pthread_cond_t wanted;         /* lock */
	pthread_cond_t arrived;        /* lock; the maker has come to its end with one */
	bool stop, making;             /* lock */
	bool settled;                  /* lock; no context has a frame that we do not know of, so numbers can be used again */
	struct gmem_cuda_copier *copier; /* (C) */
};

/* ---- cuda.c ---- */

/* The calling thread's context, for calls that need one. */
void gmem_cuda_enter(struct gmem_device *gpu);
/* -errno for what a call has answered; remembers it, and whether the device can still be used. */
int gmem_cuda_failed(struct gmem_device *gpu, const char *call, CUresult result);
void gmem_cuda_say(struct gmem_device *gpu, const char *what, int error);
void gmem_cuda_ref(struct gmem_device *gpu);
void gmem_cuda_unref(struct gmem_device *gpu);

/* ---- cuda_frames.c ---- */

int gmem_cuda_frames_start(struct gmem_device *gpu);
void gmem_cuda_frames_stop(struct gmem_device *gpu);
/* Those that are left, with the device's last reference. */
void gmem_cuda_frames_end(struct gmem_device *gpu);
static inline CUdeviceptr gmem_cuda_alias(const struct gmem_device *gpu, uint32_t frame)
{
	return gpu->alias + ((CUdeviceptr)frame << GMEM_CUDA_SHIFT);
}
static inline uint64_t gmem_cuda_alias_bytes(const struct gmem_device *gpu)
{
	return (uint64_t)gpu->frame_max << GMEM_CUDA_SHIFT;
}
/* A descriptor of the frame for another process. */
int gmem_cuda_frame_fd(struct gmem_device *gpu, uint32_t frame, int *ret_fd);
/* Of frames that are in no list. */
void gmem_cuda_end_frames(struct gmem_device *gpu, const uint32_t *frames, size_t count);
/* Device lock. */
void gmem_cuda_push(struct gmem_device *gpu, struct gmem_cuda_list *list, uint32_t frame);

int gmem_cuda_mem_create(struct gmem_device *gpu, uint64_t owner, enum gmem_class class_, uint64_t bytes, struct gmem_mem **ret);
void gmem_cuda_mem_destroy(struct gmem_mem *mem);
int gmem_cuda_mem_alloc(struct gmem_mem *mem, uint64_t offset, uint64_t bytes, bool zeroed);
int gmem_cuda_mem_free(struct gmem_mem *mem, uint64_t offset, uint64_t bytes);
void *gmem_cuda_mem_at(struct gmem_mem *mem, uint64_t offset);
uint32_t gmem_cuda_mem_frame(struct gmem_mem *mem, uint64_t offset); /* GMEM_CUDA_NONE */

/* ---- cuda_notes.c ---- */

/* Those of a predecessor, or new ones. -EPROTONOSUPPORT: of another version; nothing was touched. */
int gmem_cuda_notes_open(struct gmem_device *gpu);
void gmem_cuda_notes_close(struct gmem_device *gpu);
_Atomic uint32_t *gmem_cuda_notes_boxes(struct gmem_device *gpu);
/* Its descriptor is put away, for a successor and for other processes; it stays the caller's. */
int gmem_cuda_note_made(struct gmem_device *gpu, uint32_t frame, int fd);
void gmem_cuda_note_placed(struct gmem_device *gpu, uint32_t frame, const struct gmem_mem *mem, uint64_t page);
void gmem_cuda_note_left(struct gmem_device *gpu, uint32_t frame);
void gmem_cuda_note_foreign(struct gmem_device *gpu, uint32_t frame);
void gmem_cuda_note_ended(struct gmem_device *gpu, uint32_t frame);

/* ---- cuda_adopt.c ---- */

/* A predecessor's frames, before anybody else has come. */
int gmem_cuda_adopt(struct gmem_device *gpu);
/* Those of a new mem, device lock. */
void gmem_cuda_claim_locked(struct gmem_mem *mem);
void gmem_cuda_end_unclaimed(struct gmem_device *gpu);

/* ---- cuda_pmap.c ---- */

int gmem_cuda_pmap_open(struct gmem_device *gpu, uint64_t as_id, int channel, struct gmem_pmap **ret);
int gmem_cuda_pmap_adopt(struct gmem_device *gpu, uint64_t as_id, int channel, struct gmem_pmap **ret);
void gmem_cuda_settle(struct gmem_device *gpu);
void gmem_cuda_pmap_destroy(struct gmem_pmap *pmap);
int gmem_cuda_pmap_map(struct gmem_pmap *pmap, struct gmem_range range, struct gmem_mem *mem, uint64_t offset,
		       enum gmem_prot prot);
int gmem_cuda_pmap_release(struct gmem_pmap *pmap, struct gmem_range range);
int gmem_cuda_pmap_protect(struct gmem_pmap *pmap, struct gmem_range range, enum gmem_prot prot);
int gmem_cuda_pmap_flush(struct gmem_pmap *pmap);
/* Of frames that nobody else works on: takes their translations away in every context; with forget, they are let go of as
 * well. Returns when all that can be told have done so. */
void gmem_cuda_revoke(struct gmem_device *gpu, const uint32_t *frames, size_t count, bool forget);

/* ---- cuda_copy.c ---- */

int gmem_cuda_copier_start(struct gmem_device *gpu);
void gmem_cuda_copier_stop(struct gmem_device *gpu);
int gmem_cuda_copy(struct gmem_device *gpu, const struct gmem_sg *sg, size_t count, gmem_fence_t after,
		   gmem_fence_t *ret);

#endif
