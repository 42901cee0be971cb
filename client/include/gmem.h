/* SPDX-License-Identifier: Apache-2.0
 *
 * libgmem: unified memory. A pointer from gmem_mmap() is valid on the CPU and in every device context of this process;
 * data moves to whoever touches it.
 *
 * Functions return 0 or -errno; outputs come last and are left alone on failure. gmem_last_error() has words for the
 * calling thread's last failure, and names the argument. Everything is thread-safe, except that a handle must not be
 * closed while another thread uses it. A forked child may go on using a session, which is then one of its own over the
 * shared regions; device contexts and fences stay with the parent.
 *
 * Option structs: set size to sizeof(struct ...), zero the rest; later versions add fields at the end. NULL means all
 * defaults.
 */
#ifndef GMEM_H
#define GMEM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define GMEM_API __attribute__((visibility("default")))

#define GMEM_HOST 0       /* hnid of the host */
#define GMEM_NO_HNID (-1) /* "nowhere in particular", where a function says so */

struct gmem;         /* a session with one gmemd */
struct gmem_context; /* a device opened for a session */
struct gmem_fence;   /* completion of a launch, or of an asynchronous request */

struct gmem_range {
	void *va;
	size_t bytes;
};

/* ---- session ---- */

struct gmem_open_options {
	size_t size;
	const char *const *devices; /* for a private gmemd, which is then started: "simgpu0:capacity=48M" */
	size_t device_count;
};

/* path: gmemd.sock of a running daemon. NULL: $GMEM_SOCKET, else the system's /run/gmem/gmemd.sock, else a private
 * gmemd for this process tree, if `gmemd` is in PATH; -ENOENT if none of them is there. */
GMEM_API int gmem_open(const char *path, const struct gmem_open_options *options, struct gmem **ret);
/* Ends the session: its memory is unmapped and its content gone. -EBUSY while contexts are open. */
GMEM_API int gmem_close(struct gmem *session);

/* ---- memory ---- */

#define GMEM_MMAP_NO_INHERIT 0x1u /* a forked child does not get the region (by default it shares it) */
#define GMEM_MMAP_SMALL 0x2u      /* never backed by huge pages */

struct gmem_mmap_options {
	size_t size;
	size_t page_bytes; /* what moves at once: 4096, 65536 or 2097152; 0: by the region's size */
	uint32_t flags;    /* GMEM_MMAP_* */
	uint32_t reserved;
};

/* bytes is rounded up to whole pages. The memory reads zero. -ENOMEM: more than host and devices could ever hold. */
GMEM_API int gmem_mmap(struct gmem *session, size_t bytes, const struct gmem_mmap_options *options, void **ret);
/* Any page-aligned part of a region. Returns when gmemd has let go of the memory. */
GMEM_API int gmem_munmap(struct gmem *session, void *va, size_t bytes);

#define GMEM_MAP_FILE_WRITE 0x1u      /* gmem_flush() writes back what was changed */
#define GMEM_MAP_FILE_PRIVATE 0x2u    /* may be written to, and the file stays as it is */
#define GMEM_MAP_FILE_NO_INHERIT 0x4u /* a forked child does not get the region */

struct gmem_map_file_options {
	size_t size;
	size_t page_bytes; /* what is read at once: 4096, 65536 or 2097152; 0: 65536, of ranges below that 4096 */
	uint32_t flags;    /* GMEM_MAP_FILE_*; without WRITE and PRIVATE the memory can only be read */
	uint32_t reserved;
};

/* A file's bytes as memory: read when they are touched, by whichever hnode touches them; what is not changed costs no memory
 * but while there is room. fd: a regular file of a local file system, open for reading, with WRITE for both; it may be closed afterwards. offset:
 * a multiple of 4096; the range must lie in the file. Behind bytes the last page reads zero. What others do to
 * the file meanwhile is seen in pages that are read later, or not at all. A page that can't be read (the file was cut short,
 * the disk fails) is SIGBUS at the touch. gmem_munmap() does not write back.
 *
 * -EBADF: not open in that way; -EINVAL: no regular file, with O_APPEND or O_DIRECT, or too short; -EOPNOTSUPP: a file
 * system of another machine or of a program; -EMFILE: 512 files are mapped already; -ENOMEM, -EDQUOT as of gmem_mmap(). */
GMEM_API int gmem_map_file(struct gmem *session, int fd, uint64_t offset, size_t bytes,
			   const struct gmem_map_file_options *options, void **ret);
/* Writes what was changed in the range (whole pages) back to its files, and waits until it is on the disk. Memory of other
 * kinds is passed over. -EIO: the file has become shorter, or the disk fails; -ENOSPC; -EBUSY: held by an acquire. What could not be written
 * is still there, and goes with the next flush. */
GMEM_API int gmem_flush(struct gmem *session, void *va, size_t bytes);

#define GMEM_ADOPT_EDGES 0x1u /* also the pages that the range does not fill, with whatever else lies in them */

struct gmem_adopt_options {
	size_t size;
	size_t page_bytes; /* what moves at once: 4096, 65536 or 2097152; 0: 65536, of ranges below that 4096 */
	uint32_t flags;    /* GMEM_ADOPT_* */
	uint32_t reserved;
};

/* Brings memory that the program has already (from malloc, mmap, NumPy) under management, at its own address, while other
 * threads read and write it: afterwards it is as memory from gmem_mmap(), but a forked child gets a copy of it, and the
 * program frees it as it would have. Private anonymous memory only. Whole pages of 4 KiB: what lies before the first or
 * behind the last one stays as it is. *ret: what is managed now; its bytes are 0 if the range has no whole page.
 *
 * Other threads' writes wait while 2 MiB are copied; signals wait until the end. Not to be used at that time: the
 * range in O_DIRECT, io_uring or RDMA transfers, munmap(2) and its kin on it.
 *
 * -ENOMEM: not mapped, or more than host and devices can hold. -EEXIST: managed already, or the range named by
 * gmem_last_error() is in use in an open context. -EOPNOTSUPP: a file, shared memory, huge pages, no ring. -EACCES: not
 * readable and writable, or executable. -EBUSY: a thread's stack, locked memory, watched by another userfaultfd. -EMFILE.
 * Then nothing has changed, unless the room ran out on the way: then *ret is what is managed. */
GMEM_API int gmem_adopt(struct gmem *session, void *va, size_t bytes, const struct gmem_adopt_options *options,
			struct gmem_range *ret);

enum gmem_advice {
	GMEM_ADVISE_DISCARD = 4,         /* drop the content of whole pages in the range: they read zero */
	GMEM_ADVISE_PREFETCH = 0x1000,   /* move to hnid */
	GMEM_ADVISE_PINNED = 0x1001,     /* move to hnid, and stay there */
	GMEM_ADVISE_UNPINNED = 0x1002,
	GMEM_ADVISE_READ_MOSTLY = 0x1010, /* keep a copy wherever it is read */
	GMEM_ADVISE_NO_READ_MOSTLY = 0x1011,
	GMEM_ADVISE_PREFERRED = 0x1012,  /* best kept at hnid; GMEM_NO_HNID clears that */
	GMEM_ADVISE_COLD = 0x1013,       /* first to be evicted from hnid */
	GMEM_ADVISE_ACCESSED_BY = 0x1014, /* hnid will use all of it: fetch far ahead from its first fault on */
	GMEM_ADVISE_NOT_ACCESSED_BY = 0x1015,
};

GMEM_API int gmem_hmadvise(struct gmem *session, int hnid, void *va, size_t bytes, int advice);
/* Copies between two ranges that do not overlap, wherever their pages are; dst is at hnid afterwards (GMEM_NO_HNID: at
 * the host). Any alignment. */
GMEM_API int gmem_hmemcpy(struct gmem *session, int hnid, void *dst, const void *src, size_t bytes);
/* Moves a range to hnid, by whole pages; returns when it is there. */
GMEM_API int gmem_prefetch(struct gmem *session, int hnid, void *va, size_t bytes);
GMEM_API int gmem_discard(struct gmem *session, void *va, size_t bytes);

/* The same without waiting: gmem_fence_wait() gives the result, and the fence is to be freed. What has the same stream
 * (0 to 32767) is done in order, other streams go on meanwhile. What is wrong with a request is the fence's to say. */
GMEM_API int gmem_prefetch_async(struct gmem *session, int hnid, void *va, size_t bytes, uint16_t stream,
				 struct gmem_fence **ret);
GMEM_API int gmem_hmadvise_async(struct gmem *session, int hnid, void *va, size_t bytes, int advice, uint16_t stream,
				 struct gmem_fence **ret);
GMEM_API int gmem_hmemcpy_async(struct gmem *session, int hnid, void *dst, const void *src, size_t bytes,
				uint16_t stream, struct gmem_fence **ret);

enum gmem_page_state { GMEM_PAGE_NOMAP = 0, GMEM_PAGE_RESIDENT = 1, GMEM_PAGE_BUSY = 2, GMEM_PAGE_POISONED = 3 };

#define GMEM_PAGE_DIRTY 0x01
#define GMEM_PAGE_PINNED 0x02
#define GMEM_PAGE_WILLNEED 0x04
#define GMEM_PAGE_READ_MOSTLY 0x08
#define GMEM_PAGE_REFERENCED 0x10

struct gmem_page {
	uint8_t state;      /* enum gmem_page_state */
	int8_t writer;      /* hnid that may write, -1 if none */
	uint16_t valid;     /* bit h: hnid h holds a valid copy */
	uint8_t flags;      /* GMEM_PAGE_* */
	uint8_t page_shift; /* log2 of the page's size */
	uint16_t why;       /* 1 first touch, 2 host fault, 3 device fault, 4 prefetch, 5 evicted, 6 hmemcpy, 7 acquire,
			     * 8 detach, 9 advice, 10 lost */
};

/* Describes each page that the range touches, in order; the range lies in one region. Fills at most capacity elements
 * and returns how many pages there are. */
GMEM_API int gmem_query(struct gmem *session, const void *va, size_t bytes, struct gmem_page *pages, size_t capacity,
			size_t *ret);

/* ---- pools ---- */

#define GMEM_POOL_WRITE 0x1u      /* open: to read and write; else to read only */
#define GMEM_POOL_PERSISTENT 0x2u /* create: it stays when this session ends, until it is unlinked; for administrators */
#define GMEM_POOL_OF_UID 0x4u     /* open: it has to be that user's (a name is whose who was first) */

struct gmem_pool_options {
	size_t size;
	size_t page_bytes; /* create: as in gmem_mmap_options */
	uint32_t mode;     /* create: who may open it, as of a file */
	uint32_t flags;    /* GMEM_POOL_* */
	uint32_t uid;      /* with GMEM_POOL_OF_UID */
	uint32_t reserved;
};

/* A pool is memory with a name that every process of this gmemd can open: at the same address in all of them and in their
 * contexts, with one state of each page. Made, it is open here to read and write. name: up to 64 letters, digits, `_.-`,
 * the first one no dot or dash. Without options its mode is 0600. It ends with this session, or when it is unlinked; who
 * has it open keeps it. Closed by gmem_munmap() of all of it. -EEXIST: there is one of that name; -EDQUOT. */
GMEM_API int gmem_pool_create(struct gmem *session, const char *name, size_t bytes,
			      const struct gmem_pool_options *options, void **ret);
/* Opened once more by the same process, it is where it was, as it was opened first. Waits for kernels that run. -ENOENT;
 * -EACCES: the mode does not allow it, or it is another user's; -EPERM: GMEM_POOL_WRITE, and it is published; -EBUSY: this
 * process has it open to read only; -EEXIST: its address is in use here. */
GMEM_API int gmem_pool_open(struct gmem *session, const char *name, const struct gmem_pool_options *options,
			    struct gmem_range *ret);
/* Immutable for ever, for its owner: a write is SIGSEGV from now on, as to any read-only memory. */
GMEM_API int gmem_pool_publish(struct gmem *session, const char *name);
/* Nobody can open it any more. For its owner. */
GMEM_API int gmem_pool_unlink(struct gmem *session, const char *name);

/* The same on the servers of a remote tier, whose name is remote, for all machines that have these attached.
 *
 * Publishing seals the pool here and makes it the newest version of its name there; it returns when the servers have all of
 * it. The number of a version grows. -EBUSY: another machine is publishing that name; -ECANCELED: the right to do so was
 * lost on the way; -ENODATA: too few replicas have confirmed it; -ENOSPC: the servers are full; -ETIMEDOUT: none answers;
 * -EACCES: the name is another user's there, or the servers refuse it. Then the version before is still the newest, and it
 * may be asked for again. ret_version may be NULL. */
GMEM_API int gmem_pool_publish_remote(struct gmem *session, const char *name, const char *remote, uint64_t *ret_version);
/* The newest version, to read only; its pages come when they are touched, once for all processes of this machine, and one
 * that can't be had within the tier's timeout is SIGBUS. options: GMEM_POOL_OF_UID alone. Opened again when there is a newer
 * version, that is another range. */
GMEM_API int gmem_pool_open_remote(struct gmem *session, const char *name, const char *remote,
				   const struct gmem_pool_options *options, struct gmem_range *ret, uint64_t *ret_version);
/* Nobody can open it any more; it goes when no machine reads any of its versions. For its owner. */
GMEM_API int gmem_pool_unlink_remote(struct gmem *session, const char *name, const char *remote);

/* ---- heap: in libgmem-heap.so, pkg-config gmem-heap ---- */

/* malloc(3) and its kin in unified memory, moved in pages of 4 KiB: lists, trees and small arrays for kernels. Failures
 * give NULL with errno set. A forked child does not inherit the memory: touching it there is SIGSEGV, and gmem_free()
 * of it does nothing. Any other pointer that is not from this session's heap ends the program. Freed memory goes back
 * to gmemd after a second of further use; gmem_close() frees all. */
GMEM_API void *gmem_malloc(struct gmem *session, size_t bytes) __attribute__((malloc, warn_unused_result));
GMEM_API void *gmem_calloc(struct gmem *session, size_t count, size_t bytes)
	__attribute__((malloc, warn_unused_result));
/* alignment: any power of two; bytes need not be a multiple. */
GMEM_API void *gmem_aligned_alloc(struct gmem *session, size_t alignment, size_t bytes)
	__attribute__((malloc, warn_unused_result));
/* On failure at is still allocated. bytes 0 counts as 1. */
GMEM_API void *gmem_realloc(struct gmem *session, void *at, size_t bytes) __attribute__((warn_unused_result));
GMEM_API void gmem_free(struct gmem *session, void *at); /* NULL is allowed */
/* How many bytes may be used at that address, at least what was asked for. */
GMEM_API size_t gmem_malloc_usable_size(struct gmem *session, const void *at);

/* ---- devices ---- */

#define GMEM_CAP_REPLAYABLE 0x001u /* kernels may touch anything; else only what was acquired */
#define GMEM_CAP_PEER 0x010u
#define GMEM_CAP_COHERENT 0x020u
#define GMEM_CAP_COMPUTE 0x040u    /* contexts can be opened on it */
#define GMEM_CAP_PERSISTENT 0x080u
#define GMEM_CAP_EXPORT_FD 0x100u
#define GMEM_CAP_REMOTE 0x200u
#define GMEM_CAP_SAME_VA 0x400u
#define GMEM_CAP_OWN_FRAMES 0x2000u /* contexts are in the client's own process (cuda) */

struct gmem_device_info {
	int32_t hnid;
	uint32_t caps; /* GMEM_CAP_* */
	char name[32], driver[32];
	uint64_t capacity_bytes, used_bytes, peak_bytes, pinned_bytes;
	uint64_t contexts;
	uint64_t faults, in_bytes, out_bytes, evictions;
};

/* All hnodes, the host first. device_bytes is sizeof(struct gmem_device_info): the struct may grow. Fills at most
 * capacity elements and returns how many hnodes there are. */
GMEM_API int gmem_devices(struct gmem *session, struct gmem_device_info *devices, size_t device_bytes,
			  size_t capacity, size_t *ret);

/* ---- contexts: kernels on a device ---- */

/* A kernel: a function of a shared object of yours, called in the device's process. What args point to is at the same
 * addresses there if it is from gmem_mmap(); nothing else of this process is there. */
typedef int gmem_kernel(void *const *args, size_t arg_count);

#define GMEM_ARGS_MAX 64

struct gmem_context_options {
	size_t size;
	const char *helper; /* program of the device's process; NULL: the installed gmem-context */
};

struct gmem_launch_options {
	size_t size;
	uint64_t timeout_ns; /* how long the kernel may run; then its context is ended. 0: for ever */
	/* What the kernel touches, held on the device while it runs. Devices without GMEM_CAP_REPLAYABLE need this. */
	const struct gmem_range *writes;
	size_t write_count;
	const struct gmem_range *reads;
	size_t read_count;
};

GMEM_API int gmem_context_open(struct gmem *session, const char *device, const struct gmem_context_options *options,
			       struct gmem_context **ret);
/* Queues library:symbol(args, arg_count); kernels of a context run one after the other. library: path of a shared
 * object. The fence is the caller's, to be freed with gmem_fence_free(). */
GMEM_API int gmem_context_launch(struct gmem_context *context, const char *library, const char *symbol,
				 void *const *args, size_t arg_count, const struct gmem_launch_options *options,
				 struct gmem_fence **ret);
/* Ends the device's process; fences that are not complete fail with -ECANCELED. */
GMEM_API int gmem_context_close(struct gmem_context *context);

#define GMEM_ACQUIRE_WRITE 0x1u

/* Brings ranges to the context's device and holds them there, until as many calls of gmem_release(). */
GMEM_API int gmem_acquire(struct gmem_context *context, const struct gmem_range *ranges, size_t count,
			  uint32_t flags);
GMEM_API int gmem_release(struct gmem_context *context, const struct gmem_range *ranges, size_t count);

/* On a GPU (driver cuda) the context is this process's primary context there, and programs launch their kernels with CUDA,
 * between gmem_acquire() and gmem_release_after(): that lets 1 to 64 ranges go once everything that is on the stream (a CUstream;
 * NULL: the legacy default stream) by now is done, and does not wait for it. gmem_release() lets go at once, whatever runs.
 * Such a context needs regions with pages of 2 MiB, and its session opened after the device was attached and before
 * anything else is mapped in its address window. */
GMEM_API int gmem_release_after(struct gmem_context *context, void *stream, const struct gmem_range *ranges, size_t count);
/* Until all that was given to gmem_release_after() by now has been let go. -ETIMEDOUT; -EIO, -EOWNERDEAD: work has failed,
 * or the context is lost. */
GMEM_API int gmem_context_synchronize(struct gmem_context *context, uint64_t timeout_ns);

#define GMEM_FOREVER UINT64_MAX

/* Waits for a kernel and gives its return value (ret may be NULL; 0 for requests, whose errors are their own).
 * -ETIMEDOUT: not complete yet, ask again. The kernel itself failed: -ETIME it ran longer than its timeout_ns;
 * -EOWNERDEAD its process crashed, the message has the signal; -ECANCELED the context was closed; -ELIBACC the library,
 * -ENOENT the symbol could not be had. */
GMEM_API int gmem_fence_wait(struct gmem_fence *fence, uint64_t timeout_ns, int *ret);
/* Whether gmem_fence_wait() would return at once. */
GMEM_API int gmem_fence_poll(struct gmem_fence *fence, bool *ret);
/* The kernel or request goes on if it was not complete. NULL is allowed. */
GMEM_API void gmem_fence_free(struct gmem_fence *fence);

/* ---- errors ---- */

/* What a returned -errno (or errno) means in gmem. */
GMEM_API const char *gmem_strerror(int err);
/* What went wrong in this thread's last failed call, argument first; "" if none failed. Valid until the next call. */
GMEM_API const char *gmem_last_error(void);

#ifdef __cplusplus
}
#endif

#endif
