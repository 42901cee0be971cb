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
	int fd;                           /* device lock; -1: given away, or not exported yet */
	bool clean;                       /* device lock; all zeros */
	bool foreign;                     /* device lock; imported for a session that is not its owner's */
	uint32_t next;                    /* device lock; in the list it is in */
	struct gmem_cuda_import *imports; /* device lock */
};

struct gmem_cuda_list {
	uint32_t first, count;
};

struct gmem_mem {
	struct gmem_device *gpu;      /* (C) referenced */
	uint64_t owner, pages;        /* (C) */
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
	uint32_t frame_max;            /* (C) */
	atomic_bool lost;              /* (A) */
	struct gmem_mutex lock;
	char error[160];               /* lock */
	struct gmem_cuda_frame *frames; /* (C) mapped sparse */
	uint32_t bumped;               /* lock; numbers below have been used */
	struct gmem_cuda_list unused;  /* lock; numbers without a frame */
	struct gmem_cuda_list fresh;   /* lock; frames that no session has had */
	struct gmem_mem *mems;         /* lock */
	CUstream scrub;                /* (C) */
	pthread_t maker;
	pthread_cond_t wanted;         /* lock */
	bool stop;                     /* lock */
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
/* A descriptor of the frame for another process: made ahead, or now. */
int gmem_cuda_frame_fd(struct gmem_device *gpu, uint32_t frame, int *ret_fd);

int gmem_cuda_mem_create(struct gmem_device *gpu, uint64_t owner, uint64_t bytes, struct gmem_mem **ret);
void gmem_cuda_mem_destroy(struct gmem_mem *mem);
int gmem_cuda_mem_alloc(struct gmem_mem *mem, uint64_t offset, uint64_t bytes, bool zeroed);
int gmem_cuda_mem_free(struct gmem_mem *mem, uint64_t offset, uint64_t bytes);
void *gmem_cuda_mem_at(struct gmem_mem *mem, uint64_t offset);
uint32_t gmem_cuda_mem_frame(struct gmem_mem *mem, uint64_t offset); /* GMEM_CUDA_NONE */

/* ---- cuda_pmap.c ---- */

int gmem_cuda_pmap_open(struct gmem_device *gpu, uint64_t as_id, int channel, struct gmem_pmap **ret);
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
