/* SPDX-License-Identifier: Apache-2.0
 *
 * The driver ABI. A driver supplies what is specific to its hardware: creating and removing translations,
 * invalidating TLBs, copying. Virtual addresses, frames, victims, states and waiting belong to the core, and a
 * driver holds no policy. A driver in C fills one gmem_driver_ops; a Python class with methods of the same names is
 * wrapped in the same table by gmemd.
 *
 * Every op may be NULL except probe and info, and these groups:
 *   - a device whose contexts are processes with a uffd (simgpu) sets GMEM_CAP_CPU_VISIBLE, leaves pmap_* as the
 *     gmem_uffd_pmap_* functions of pmap.h, and needs copy only if its link is slower than the CPU;
 *   - a device that stores pages behind its own allocator (every tier) sets GMEM_CAP_PEER and gives peer_map,
 *     peer_unmap and peer_free, or peer_map_batch, peer_unmap_batch and peer_free;
 *   - a device whose memory the CPU can't reach, and whose contexts are in the clients' own processes (cuda), sets
 *     GMEM_CAP_OWN_FRAMES and gives mem_*, pmap_open, pmap_map, pmap_flush, pmap_protect, pmap_release, pmap_destroy
 *     and copy.
 * Ops return 0 or -errno, may be called from several threads at once, and may block unless said otherwise.
 */
#ifndef GMEM_DRIVER_H
#define GMEM_DRIVER_H

#include <gmem/types.h>

#define GMEM_DRIVER_ABI 1

/* capabilities */
#define GMEM_CAP_REPLAYABLE 0x001  /* a device fault can be replayed; else accesses are bracketed by acquire/release */
#define GMEM_CAP_PEER 0x010        /* manages its own frames: peer_* */
#define GMEM_CAP_COHERENT 0x020    /* the CPU maps its memory coherently */
#define GMEM_CAP_COMPUTE 0x040     /* contexts can be opened on it */
#define GMEM_CAP_PERSISTENT 0x080
#define GMEM_CAP_EXPORT_FD 0x100
#define GMEM_CAP_REMOTE 0x200
#define GMEM_CAP_SAME_VA 0x400     /* device pointers equal CPU pointers */
#define GMEM_CAP_CPU_VISIBLE 0x800 /* frames are pages of a memfd: the core allocates and aliases them */
#define GMEM_CAP_OWN_FRAMES 0x2000 /* it makes its frames itself, and only its copy engine reaches them */
#define GMEM_CAP_SLOW 0x1000       /* ops block for long (or need the GIL): the core calls them from filler threads */

struct gmem_device; /* the driver's own */
struct gmem_pmap;   /* one context's page table; the driver's own, or a view (pmap.h) */
struct gmem_mem;    /* one session's memory of one page class on the device; the driver's own */

/* Configuration: string pairs, as written in the configuration file or on gmemctl attach. Unknown keys are an
 * error: the driver returns -EINVAL and names the key in message. */
struct gmem_driver_config {
	const char *name; /* device name, for example "simgpu0" */
	const char *const *keys;
	const char *const *values;
	size_t count;
	char *message; /* GMEM_MESSAGE_MAX bytes for the reason of a refusal */
	uint64_t key_count; /* keys of the peer ops are below this: an index may be a sparse array */
	struct gmem_driver_keep *keep; /* NULL: nothing outlives the daemon */
};

/* For drivers that store pages: descriptors (memfds, files) that outlive the daemon, each under a name of its own, of
 * at most 15 letters and digits. Who puts everything that it needs into them, in an order that makes sense at any instant,
 * and finds it there at its next probe, loses no page when the daemon is killed: keep_fd has one held, which stays the
 * driver's too; kept_fd is what a predecessor had held, now the driver's, or -1. A driver that is given any by kept_fd
 * says with that that it has its pages again; without, they are lost with the daemon. What is there but of another version
 * is left as it is: probe returns -EPROTONOSUPPORT, and the daemon leaves all of it to one that knows it. */
int gmem_driver_keep_fd(const struct gmem_driver_config *config, const char *name, int fd);
int gmem_driver_kept_fd(const struct gmem_driver_config *config, const char *name);
/* It is not held any more: what it was is damaged, or of no use. */
void gmem_driver_drop_fd(const struct gmem_driver_config *config, const char *name);

/* For drivers: options a driver knows, and where their values go. Numbers may have a suffix (48M, 2G). */
struct gmem_driver_option {
	const char *key;
	uint64_t *value;
	bool boolean;      /* on, off, true, false, yes, no, 1, 0 */
	const char **text; /* instead of value; lives as long as config does */
};
/* -EINVAL for an unknown key or a bad value; config->message says which. */
int gmem_driver_options(const struct gmem_driver_config *config, const struct gmem_driver_option *options,
			size_t count);

struct gmem_device_info {
	uint64_t capacity_bytes;
	uint64_t page_bytes_mask; /* bit n: pages of 1 << n bytes */
	uint32_t caps;
	uint32_t reserved;
	uint64_t bandwidth_bytes_per_s; /* of the link; 0 = memory speed */
	uint64_t latency_ns;            /* of one copy */
	uint64_t assured_bytes;         /* of capacity, what can be stored whatever its content; 0: all of it. A tier that
					 * compresses promises less than it may turn out to hold */
};

/* One version of a pool that several machines share. Its pages are named by the pool's name and the stamp, which no other
 * version has; what is written under a name once is never changed. */
struct gmem_pool_version {
	const char *name;        /* of letters, digits and _.- */
	uint64_t stamp, pages;
	uint8_t shift;           /* log2 of the page size */
	const uint64_t *present; /* a bit for each page: the others are zeros, and stored nowhere */
	uint32_t *checks;        /* of each page that is present: pool_put sets it, pool_get compares */
};

/* What a peer's content takes, for operators. */
struct gmem_device_usage {
	uint64_t pages, page_bytes; /* stored, and their size before compression */
	uint64_t stored_bytes;      /* what they take, the allocator's waste included */
	uint64_t raw_pages;         /* of pages, those stored as they are */
};

/* One piece of a copy. Addresses are the daemon's aliases. */
struct gmem_sg {
	void *dst;
	const void *src;
	size_t bytes;
};

/* One page on its way to or from a peer. */
struct gmem_peer_io {
	uint64_t key;
	void *memory; /* the daemon's alias: what is pushed, or where it is pulled to */
	size_t bytes;
	int result;   /* set by the driver: 0 or -errno, for this page */
};

typedef uint64_t gmem_fence_t; /* 0: complete */

enum gmem_cause { GMEM_CAUSE_UNMAP = 1, GMEM_CAUSE_MIGRATE, GMEM_CAUSE_PROTECT, GMEM_CAUSE_DISCARD, GMEM_CAUSE_RELEASE };

struct gmem_driver_ops {
	uint32_t abi;  /* GMEM_DRIVER_ABI */
	uint32_t size; /* sizeof(struct gmem_driver_ops) of the driver's build; missing tail ops are NULL */
	const char *name;

	/* identity */
	int (*probe)(const struct gmem_driver_config *config, struct gmem_device **ret);
	void (*remove)(struct gmem_device *device);
	int (*info)(struct gmem_device *device, struct gmem_device_info *ret);
	int (*health)(struct gmem_device *device); /* 0 healthy, -EIO lost */
	const char *(*last_error)(struct gmem_device *device);

	/* MMU */
	int (*pmap_create)(struct gmem_device *device, uint64_t as_id, struct gmem_pmap **ret);
	void (*pmap_destroy)(struct gmem_pmap *pmap);
	int (*pmap_enter)(struct gmem_pmap *pmap, struct gmem_range range, uint64_t frame, enum gmem_prot prot);
	int (*pmap_release)(struct gmem_pmap *pmap, struct gmem_range range);
	int (*pmap_protect)(struct gmem_pmap *pmap, struct gmem_range range, enum gmem_prot prot);
	int (*tlb_invl)(struct gmem_pmap *pmap, struct gmem_range range);
	int (*tlb_invl_coalesced)(struct gmem_pmap *pmap, const struct gmem_range *ranges, size_t count);

	/* copy engine */
	int (*copy)(struct gmem_device *device, const struct gmem_sg *sg, size_t count, gmem_fence_t after,
		    gmem_fence_t *ret);
	int (*fill)(struct gmem_device *device, void *dst, int byte, size_t bytes, gmem_fence_t *ret);
	int (*fence_wait)(struct gmem_device *device, gmem_fence_t fence, uint64_t timeout_ns);
	int (*peer_copy)(struct gmem_device *device, struct gmem_device *from, const struct gmem_sg *sg, size_t count,
			 gmem_fence_t *ret);

	/* peers with their own allocator; key names a page for as long as it is stored. A push of a key that is stored
	 * replaces it. -ENOSPC: full just now, and nothing has changed; -EIO: the page can't be read just now, and who
	 * touches it gets SIGBUS; -EBADMSG: it is damaged: POISONED for ever, never returned. No op may leave a page half
	 * stored. */
	int (*peer_va_alloc_fixed)(struct gmem_device *device, struct gmem_range range);
	int (*peer_va_free)(struct gmem_device *device, struct gmem_range range);
	int (*peer_map)(struct gmem_device *device, uint64_t key, const void *src, size_t bytes); /* push a page */
	int (*peer_unmap)(struct gmem_device *device, uint64_t key, void *dst, size_t bytes);     /* pull; keeps it */
	int (*peer_free)(struct gmem_device *device, uint64_t key, size_t bytes);
	int (*peer_hmemcpy)(struct gmem_device *device, uint64_t key, size_t offset, void *buffer, size_t bytes,
			    bool to_peer);

	/* notification: a range of an as is about to lose its translation or its write access; sequence grows by one
	 * with each call for that as. Must not block on anything of the core. */
	void (*invalidate)(struct gmem_device *device, uint64_t as_id, struct gmem_range range, enum gmem_cause cause,
			   uint64_t sequence);

	/* peers: several pages at once, each with its own result; 0, or -errno if nothing was tried at all */
	int (*peer_map_batch)(struct gmem_device *device, struct gmem_peer_io *io, size_t count);
	int (*peer_unmap_batch)(struct gmem_device *device, struct gmem_peer_io *io, size_t count);
	int (*peer_usage)(struct gmem_device *device, struct gmem_device_usage *ret);

	/* Devices that make their own frames. A mem is sparse, and addressed as the file of such pages would be: by offset,
	 * in pages of the device's. How much of it may be there at a time is counted by the core.
	 *
	 * owner names the session whose memory it is: what one session's contexts could once reach is never given to
	 * another session. With the page class it names the mem, also for a successor, which finds there what its
	 * predecessor has left, if the driver can do that. It may be destroyed after remove. */
	int (*mem_create)(struct gmem_device *device, uint64_t owner, enum gmem_class class_, uint64_t bytes,
			  struct gmem_mem **ret);
	void (*mem_destroy)(struct gmem_mem *mem);
	/* Makes the frames of a range that are not there: of zeros, or (zeroed false: they are about to be written whole) of
	 * anything that no other session had. -ENOSPC: others have the device's memory; nothing was made. */
	int (*mem_alloc)(struct gmem_mem *mem, uint64_t offset, uint64_t bytes, bool zeroed);
	/* Frees those that are there, having removed their translations from every context. */
	int (*mem_free)(struct gmem_mem *mem, uint64_t offset, uint64_t bytes);
	/* Where the copy engine finds the frame: an address for struct gmem_sg, which the CPU can't use. NULL: not there. */
	void *(*mem_at)(struct gmem_mem *mem, uint64_t offset);

	/* Contexts in a client's process: at the other end of channel, a SEQPACKET socket pair's, which the driver takes
	 * over on success. What is asked of the process may be queued: pmap_flush returns when all of it is done.
	 * -EOWNERDEAD, from then on and from every op: the process has not done it in time, has failed at it or is gone;
	 * no frame is mapped there any more as far as the driver is concerned. */
	int (*pmap_open)(struct gmem_device *device, uint64_t as_id, int channel, struct gmem_pmap **ret);
	int (*pmap_map)(struct gmem_pmap *pmap, struct gmem_range range, struct gmem_mem *mem, uint64_t offset,
			enum gmem_prot prot);
	int (*pmap_flush)(struct gmem_pmap *pmap);

	/* Pools of several machines. io[].key is the page's index in the pool; its bit in present is set. Several at once, each
	 * with its own result.
	 *
	 * put: pages of 4 KiB come with all that are present of their 16 (index & ~15). 0: as many replicas as were asked for
	 * have it; -ENODATA: fewer have; -ENOSPC: full; -ETIMEDOUT: nobody answers; -EACCES. get: -ETIMEDOUT as well; -EIO: it is
	 * damaged, or gone. */
	void (*pool_put)(struct gmem_device *device, const struct gmem_pool_version *version, struct gmem_peer_io *io,
			 size_t count);
	void (*pool_get)(struct gmem_device *device, const struct gmem_pool_version *version, struct gmem_peer_io *io,
			 size_t count);
	/* Forgets whatever is stored of pages [first, first + count); present and checks may be NULL. */
	int (*pool_drop)(struct gmem_device *device, const struct gmem_pool_version *version, uint64_t first, uint64_t count);

	/* Devices that make their own frames, when a predecessor's state is taken over: a channel of that one's, whose process
	 * goes on with what it has mapped. What that is need not be known before settle, which comes when all mems and contexts
	 * that there are have been asked for; what the driver has of others is nobody's. NULL: such contexts end. */
	int (*pmap_adopt)(struct gmem_device *device, uint64_t as_id, int channel, struct gmem_pmap **ret);
	void (*settle)(struct gmem_device *device);
};

#endif
