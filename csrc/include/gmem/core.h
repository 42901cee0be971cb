/* SPDX-License-Identifier: Apache-2.0
 *
 * What the daemon calls: the whole of the core behind one handle. Functions return 0 or -errno; `ret` comes last and
 * is untouched on failure. All are thread-safe, none needs the GIL, those marked (blocks) may wait for copies.
 * Sessions, contexts and devices are named by ids that are never reused; an unknown id gives -ENOENT.
 */
#ifndef GMEM_CORE_H
#define GMEM_CORE_H

#include <sys/types.h>

#include <gmem/access.h>
#include <gmem/driver.h>
#include <gmem/types.h>

struct gmem_core;
struct gmem_kept_fd;
struct gmem_source;
struct gmem_file_args;

struct gmem_core_config {
	uint64_t window_base;       /* 2 MiB aligned; 0: default */
	uint64_t window_bytes;      /* 0: default (10 TiB) */
	uint64_t host_limit_bytes;  /* 0: the machine's memory */
	uint64_t feature_mask;      /* uffd features allowed; ~0: whatever the kernel has (tests mask some off) */
	uint32_t fault_threads;     /* 0: default */
	bool hugepages;             /* use hugetlb where it can be had */
	bool overcommit;            /* mmap does not check that everything could be held */
	bool event_fork;            /* ask for EVENT_FORK (needs CAP_SYS_PTRACE; falls back by itself) */
	const char *policy;         /* who leaves a full hnode: a name of gmem_policy_name(); NULL: default */
	bool no_fault_ahead;        /* a fault brings its own page only */
	int keep_socket;            /* where descriptors are sent to be held (sd_notify), taken over; 0: nothing is kept */
	uint32_t keep_max_fds;      /* how many may be held */
	const struct gmem_kept_fd *kept; /* what a predecessor left there, taken over: keep.h */
	size_t kept_count;
	uint64_t hold_ns;           /* how long a page that bounces between hnodes is held where it is; 0: it is not */
	uint64_t stuck_ns;          /* how long a thread may be at one thing before it is reported; 0: 5 s */
};

struct gmem_core_features {
	uint64_t uffd;          /* UFFD_FEATURE_* the kernel has and the mask allows */
	bool event_fork;        /* usable by this process */
	bool continue_wp;       /* kernel 6.4: read duplicates */
	bool poison;            /* kernel 6.6 */
	bool hugepages;
	bool uffd_device;       /* /dev/userfaultfd can be opened */
	int uffd_device_fd;     /* borrowed, to be passed to clients; -1 */
};

/* With the state of a predecessor among config->kept, its sessions are there already, but nothing is served before
 * gmem_core_resume(). -EPROTO: it is of another version; nothing has been touched. */
int gmem_core_create(const struct gmem_core_config *config, struct gmem_core **ret);
bool gmem_core_recovers(struct gmem_core *core);
/* The predecessor's devices have been attached again, by gmem_device_attach_at(). Finishes or undoes what the predecessor was doing, wakes everybody and goes on. Pages that only a device which was
 * not attached again had are poisoned. Does nothing if there was no predecessor. (blocks) */
int gmem_core_resume(struct gmem_core *core);
/* Brings every page home and leaves clients with plain shared memory that needs no daemon; then ends everything. */
void gmem_core_destroy(struct gmem_core *core);
void gmem_core_features(struct gmem_core *core, struct gmem_core_features *ret);

struct gmem_window {
	uint64_t base, bytes;
	uint64_t part_base[GMEM_CLASS_COUNT], part_bytes[GMEM_CLASS_COUNT];
};
void gmem_core_window(struct gmem_core *core, struct gmem_window *ret);

/* Names of the policies, the default first; NULL beyond the last. */
const char *gmem_policy_name(size_t index);

/* ---- sessions: one client process each ---- */
int gmem_session_create(struct gmem_core *core, uid_t uid, pid_t pid, uint64_t *ret_session);
int gmem_session_destroy(struct gmem_core *core, uint64_t session); /* (blocks); frees everything it held */
/* A predecessor's session that had not come to its client: a forked child can be claimed again; others end, and nothing
 * is done to what their processes have mapped. */
int gmem_session_disown(struct gmem_core *core, uint64_t session);
/* Those that some process has claimed; fills at most capacity ids, ret_count is the full count. */
void gmem_session_ids(struct gmem_core *core, uint64_t *ids, size_t capacity, size_t *ret_count);
/* Files for the client to map, by class; borrowed; -1 where there is none. */
int gmem_session_files(struct gmem_core *core, uint64_t session, int ret_fds[GMEM_CLASS_COUNT]);
/* The session's ring (gmem_wire.h) and its doorbell, made at the first call; borrowed. */
int gmem_session_ring(struct gmem_core *core, uint64_t session, int ret_fds[2]);
/* The file through which the agent of a process hears of what to drop, made at the first call; borrowed. context 0: the
 * session's own process. -ENOENT: it is not attached; -EOPNOTSUPP: its system calls would fail on what was dropped. */
int gmem_view_agent(struct gmem_core *core, uint64_t session, uint64_t context, int *ret_fd);
/* Takes ownership of both fds in every case. Checks that uffd is a non-blocking userfaultfd that nobody has
 * initialised; registers all committed regions of the session on it. */
int gmem_session_attach(struct gmem_core *core, uint64_t session, int uffd, int pidfd);

struct gmem_region_info {
	uint64_t va, bytes, offset, page_bytes;
	enum gmem_class class_;
	enum gmem_fork fork;
	bool committed;
	bool kept; /* the client has it mapped already, and need not commit */
	bool read_only; /* to be mapped PROT_READ and MAP_PRIVATE */
	bool sealed;    /* a pool that is published */
	int fd; /* borrowed; open for as long as the session lives, also if the region goes */
};
/* Fills at most capacity entries, ret_count is the full count. */
/* Whether all of the range is in its regions. */
bool gmem_session_covers(struct gmem_core *core, uint64_t session, uint64_t va, uint64_t bytes);
int gmem_session_regions(struct gmem_core *core, uint64_t session, struct gmem_region_info *regions, size_t capacity,
			 size_t *ret_count);
/* A child that shares the parent's GMEM_FORK_SHARE regions. stored: it came by EVENT_FORK and has its view already. */
int gmem_session_fork(struct gmem_core *core, uint64_t parent, uid_t uid, pid_t pid, uint64_t *ret_child,
		      bool *ret_stored);

/* Ends child sessions whose process never showed itself and is gone (raw clone). To be called now and then. */
void gmem_core_reap(struct gmem_core *core);

/* ---- device contexts: a process of the client, on one device ---- */
int gmem_context_files(struct gmem_core *core, uint64_t session, int hnid, int ret_fds[GMEM_CLASS_COUNT]);
/* What a context must map besides the window, or over parts of it: regions shared by a parent, which are in other files,
 * and what has been moved. fd borrowed. */
int gmem_context_overlays(struct gmem_core *core, uint64_t session, int hnid, struct gmem_region_info *regions,
			  size_t capacity, size_t *ret_count);
/* The process has mapped both parts of the window (whole) and the overlays. Takes ownership of both fds. */
int gmem_context_attach(struct gmem_core *core, uint64_t session, int hnid, int uffd, int pidfd, pid_t pid,
			uint64_t *ret_context);
/* The process has mapped a range beside its window, of a region that has moved there. -EINVAL: there is none. */
int gmem_context_overlay(struct gmem_core *core, uint64_t context, uint64_t va, uint64_t bytes);
/* On a device that makes its own frames: a context in the client's own process, which is at the other end of *ret_fd (the
 * caller's): gmem_wire.h says what it is asked there. -ENOTSUP: this device's contexts are processes of their own, or for
 * the functions above: they are not. */
int gmem_context_channel(struct gmem_core *core, uint64_t session, int hnid, pid_t pid, uint64_t *ret_context, int *ret_fd);
/* The process has mapped its window there again. */
int gmem_context_uncover(struct gmem_core *core, uint64_t context, uint64_t va, uint64_t bytes);
int gmem_context_detach(struct gmem_core *core, uint64_t context);

/* ---- memory ---- */
struct gmem_mmap_args {
	uint64_t bytes;      /* rounded up to page_bytes */
	uint64_t page_bytes; /* 4096, 65536, 2 MiB, or 0: 2 MiB for 2 MiB and more, else 4 KiB */
	enum gmem_fork fork;
	bool small_only;     /* never hugetlb */
	uint64_t above;      /* not below that address, where there is room: what is below is in use in the client */
	struct gmem_source *source; /* of fresh pages, taken over in every case; NULL: they are zero */
	bool uncharged;      /* with a source: its pages can always go back there */
	uint64_t asked;      /* a number of the request's, 0: none */
	bool again;          /* a predecessor may have reserved it for the request of that number: then that range */
	bool kept;           /* one that the client keeps will do */
};
/* Reserves a range. The client maps it, then commits; without a commit it goes away with the session. */
int gmem_mmap(struct gmem_core *core, uint64_t session, const struct gmem_mmap_args *args,
	      struct gmem_region_info *ret);
int gmem_mmap_commit(struct gmem_core *core, uint64_t session, uint64_t va);
/* The same, for memory that the client has at another address already, outside the window: [at, at + args->bytes) is made
 * known as a second region on the same pages. The client fills the first one piece by piece and moves each piece there
 * (mremap), over what it was; the last move commits it. Then it gives back the rest of the first one. -EEXIST: something
 * there is managed; -EINVAL: not whole pages, or in the window. */
int gmem_adopt(struct gmem_core *core, uint64_t session, uint64_t at, const struct gmem_mmap_args *args,
	       struct gmem_region_info *ret);
/* A region over a client's file (source.h), whose pages are read when they are touched. Takes fd in every case; *ret_why says
 * why it was refused, NULL: for no reason of the file's. */
int gmem_map_file(struct gmem_core *core, uint64_t session, int fd, const struct gmem_file_args *file,
		  const struct gmem_mmap_args *args, struct gmem_region_info *ret, const char **ret_why);
/* Writes what was changed back to the sources of the range's objects, and returns when it would survive the machine's end;
 * what is not changed, and memory without a source that is written to, is passed over. -EBUSY: a device holds a page. (blocks) */
int gmem_flush(struct gmem_core *core, uint64_t session, uint64_t va, uint64_t bytes);
/* The client has unmapped [va, va + bytes) already (its UNMAP event may or may not have been seen). */
int gmem_munmap(struct gmem_core *core, uint64_t session, uint64_t va, uint64_t bytes);
/* A whole region, which stays mapped for a later one of its size (kept.h). -EAGAIN: this one does not; nothing is done. */
int gmem_munmap_keep(struct gmem_core *core, uint64_t session, uint64_t va, uint64_t bytes);
/* The region that begins at va, as a context on hnid (GMEM_HOST: the process itself) is to map it; fd is the caller's. */
int gmem_region_file(struct gmem_core *core, uint64_t session, uint64_t va, int hnid, struct gmem_region_info *ret);

int gmem_advise(struct gmem_core *core, uint64_t session, int hnid, uint64_t va, uint64_t bytes,
		enum gmem_advice advice); /* (blocks) */
int gmem_prefetch(struct gmem_core *core, uint64_t session, int hnid, uint64_t va, uint64_t bytes); /* (blocks) */
int gmem_discard(struct gmem_core *core, uint64_t session, uint64_t va, uint64_t bytes);            /* (blocks) */
/* Reads zero afterwards, parts of pages as well. (blocks) */
int gmem_zero(struct gmem_core *core, uint64_t session, uint64_t va, uint64_t bytes);
/* hnid: where dst shall be afterwards. touched: pages of src that nobody has touched leave dst as it is. (blocks) */
int gmem_hmemcpy(struct gmem_core *core, uint64_t session, int hnid, uint64_t dst, uint64_t src, uint64_t bytes,
		 bool touched);
/* One entry for each logical page that overlaps the range; at most capacity; ret_count is the full count. The range
 * must lie in one region. */
int gmem_query(struct gmem_core *core, uint64_t session, uint64_t va, uint64_t bytes, struct gmem_page_info *pages,
	       size_t capacity, size_t *ret_count);

/* Brackets device access on a context: migrates, maps and holds the ranges there until release. asked: a number of the
 * request's, 0: none; what a predecessor has held for the request of that number is held once. (blocks) */
int gmem_acquire(struct gmem_core *core, uint64_t context, const struct gmem_range *ranges, size_t count, bool write,
		 uint64_t asked);
int gmem_release(struct gmem_core *core, uint64_t context, const struct gmem_range *ranges, size_t count);
/* By asked and index of each range. What is not held under that name has been released before, which is no error: so it
 * can be done again. */
int gmem_release_named(struct gmem_core *core, uint64_t context, const struct gmem_hold_name *names, size_t count);

/* ---- pools: objects that several sessions map, at the same address, from files of their own. Who may do what with which
 * is for the caller to know; numbers of pools are never reused. ---- */
struct gmem_pool_args {
	struct gmem_mmap_args memory;
	bool persistent; /* charged to the user alone, and not to the session, which it may outlive */
};
/* It has no region yet, in the session either. */
int gmem_pool_create(struct gmem_core *core, uint64_t session, const struct gmem_pool_args *args, uint64_t *ret_pool);
/* Reserves its range in the session, to be mapped from gmem_region_file() and committed. If the session has it open
 * already, that is what it gets (committed says so; read_only is as it was opened). -EPERM: it is sealed, and write is
 * asked for; -EBUSY: it has it open to read only; -EEXIST: it has something else there. */
int gmem_pool_open(struct gmem_core *core, uint64_t session, uint64_t pool, bool write, struct gmem_region_info *ret);
/* Nobody can open it any more; it goes with the last region on it. */
int gmem_pool_unlink(struct gmem_core *core, uint64_t pool);
/* Seals it for ever: its content goes to a file that nobody can write to, which is what is opened from now on. Regions
 * that are there keep the old one, can't write any more, and get copies of pages. Does nothing if it has been done.
 * -EBUSY: it is under way, or a device holds a page of it for writing; -EOPNOTSUPP: the kernel has no write-protecting
 * CONTINUE (before 6.4). After any error nobody can write, and it may be asked for again. (blocks) */
int gmem_pool_publish(struct gmem_core *core, uint64_t pool);
struct gmem_pool_info {
	uint64_t pool, va, bytes, page_bytes;
	enum gmem_class class_;
	bool sealed;
	uint64_t writers, readers; /* regions that are open, before it was published too */
	uint64_t fetched_bytes;    /* imported ones: what has come from the servers since this core was made */
	uint64_t resident_bytes[GMEM_HNODE_MAX];
};
int gmem_pool_info(struct gmem_core *core, uint64_t pool, struct gmem_pool_info *ret);
void gmem_pool_ids(struct gmem_core *core, uint64_t *ids, size_t capacity, size_t *ret_count);

/* ---- pools that several machines share: versions of them are on the servers of a device (driver.h: pool_*) ---- */
/* Which pages of a published pool have content: a bit for each, in whole 64-bit words. -EBUSY: it is not published; -EIO:
 * a page is lost. */
int gmem_pool_present(struct gmem_core *core, uint64_t pool, uint64_t *present);
/* Writes those that version->present names of [first, first + count) to hnid's servers, and sets their checksums. first is
 * a multiple of 16. -EOPNOTSUPP: no such device; else as pool_put has it, and nothing is known of what is there. (blocks) */
int gmem_pool_export(struct gmem_core *core, uint64_t pool, int hnid, const struct gmem_pool_version *version,
		     uint64_t first, uint64_t count);
/* A pool whose pages come from there when they are touched, to read only: of this user, but not of the session, and no
 * room is promised for it. Detaching the device is -EBUSY while there is one, unless forced. */
int gmem_pool_import(struct gmem_core *core, uint64_t session, int hnid, const struct gmem_pool_version *version,
		     uint64_t *ret_pool);
/* Forgets what hnid's servers have of these pages. (blocks) */
int gmem_pool_erase(struct gmem_core *core, int hnid, const struct gmem_pool_version *version, uint64_t first,
		    uint64_t count);

/* ---- devices ---- */
/* message: GMEM_MESSAGE_MAX bytes, filled on failure. */
int gmem_device_attach(struct gmem_core *core, const struct gmem_driver_ops *ops,
		       const struct gmem_driver_config *config, int *ret_hnid);
/* The same at a number that is free; for a device of a predecessor. -EEXIST: it is taken. */
int gmem_device_attach_at(struct gmem_core *core, const struct gmem_driver_ops *ops,
			  const struct gmem_driver_config *config, int hnid);
/* Brings every page home, then removes the device. -EBUSY while contexts are open on it unless force; force detaches
 * them first. (blocks) */
int gmem_device_detach(struct gmem_core *core, int hnid, bool force);
/* GMEM_CAP_*; 0: there is no such device. Waits for nobody. */
uint32_t gmem_device_caps(struct gmem_core *core, int hnid);
/* How much of its capacity may be used, from now on; what is too much leaves. -EINVAL: below 2 MiB or above the capacity;
 * -EBUSY: more is pinned; -ENOMEM, -EAGAIN: there is nowhere for the rest to go, and nothing has changed. (blocks) */
int gmem_limit(struct gmem_core *core, int hnid, uint64_t bytes);
/* Quotas: what one session, or all sessions of one user, may hold on an hnode; 0: no quota. Who reaches it makes room among
 * his own pages, and if he can't, the access gets SIGBUS. A default is for everybody, now and later. -ENODEV, -ENOENT;
 * -EINVAL: below 2 MiB. gmem_quota_session also moves away what is too much: -EAGAIN, -ENOMEM: it can't, and nothing has
 * changed. (blocks) */
void gmem_quota_default(struct gmem_core *core, int hnid, uint64_t session_bytes, uint64_t uid_bytes);
int gmem_quota_session(struct gmem_core *core, uint64_t session, int hnid, uint64_t bytes);
int gmem_quota_uid(struct gmem_core *core, uid_t uid, int hnid, uint64_t bytes);
/* Where a tier stands in the chain below the host: the lowest rank is nearest, equal ones by hnid, new ones last. */
int gmem_tier_rank(struct gmem_core *core, int hnid, uint32_t rank);
const struct gmem_driver_ops *gmem_driver_builtin(const char *name); /* "simgpu"; NULL if unknown */

struct gmem_hnode_stats {
	int hnid;
	char name[GMEM_NAME_MAX];
	char driver[GMEM_NAME_MAX];
	struct gmem_device_info info;
	uint64_t used_bytes, peak_bytes, pinned_bytes;
	uint64_t contexts;
	uint64_t faults;         /* taken on this hnode: host faults for hnid 0, device faults else */
	uint64_t in_bytes;       /* copied to it */
	uint64_t out_bytes;      /* copied from it */
	uint64_t evictions;      /* pages that left to make room */
	uint64_t evicted_clean;  /* of these, without a copy */
	uint64_t errors;
	int health;
	char last_error[GMEM_MESSAGE_MAX]; /* by the driver's word; "": none, or it does not say */
	struct gmem_device_usage usage; /* of tiers; zeros where the driver does not say */
	const char *policy;      /* who leaves next: constant for the life of the core */
};
/* Fills at most GMEM_HNODE_MAX entries. */
void gmem_hnodes(struct gmem_core *core, struct gmem_hnode_stats *hnodes, size_t *ret_count);

struct gmem_core_stats {
	uint64_t host_faults, device_faults, write_protect_faults, spurious_faults;
	uint64_t first_touches;
	uint64_t h2d_bytes, d2h_bytes, d2d_bytes;
	uint64_t duplicates;      /* read copies made beside a valid one */
	uint64_t invalidations;   /* copies dropped because of a write */
	uint64_t evictions, evicted_clean;
	uint64_t prefetched_pages, ahead_pages, discarded_pages;
	uint64_t poisoned_pages, retries, parked_faults;
	uint64_t leftovers;        /* pages that had content where they were not */
	uint64_t outside_faults;   /* touches of what is registered and no region's: SIGBUS */
	uint64_t evictions_stopped; /* by a request for the page */
	uint64_t throttled_faults; /* of pages that bounce: they waited */
	uint64_t aged_pages;      /* whose translations were dropped to see whether they are used */
	uint64_t migration_ns;    /* summed over threads */
	uint64_t fault_ns;
	uint64_t sessions, contexts, regions, objects, lpt_bytes;
	uint64_t events_lost;
	uint64_t ring_requests;   /* completed */
	uint64_t ring_errors;     /* rings that a client broke */
	uint64_t stuck_reports;   /* threads that were found at the same thing for too long */
};
void gmem_core_stats(struct gmem_core *core, struct gmem_core_stats *ret);

struct gmem_session_stats {
	uint64_t session;
	uid_t uid;
	pid_t pid;
	uint64_t mapped_bytes, regions, contexts;
	uint64_t host_faults, device_faults;
	uint64_t resident_bytes[GMEM_HNODE_MAX];
	uint64_t quota_bytes[GMEM_HNODE_MAX]; /* its own; 0: none */
};
int gmem_session_stats(struct gmem_core *core, uint64_t session, struct gmem_session_stats *ret);

/* ---- what the threads do ---- */
struct gmem_thread_info {
	size_t index;            /* its place, which events name */
	pid_t tid;
	const char *role;        /* fault, fill, ring, reclaim */
	const char *doing;       /* nothing, read, fault, event, ahead, requests, reclaim */
	const char *op;          /* the driver's op that it waits for; NULL: none */
	int hnid;                /* that driver's device; -1: none */
	uint64_t session, va;    /* for whom, and where; 0: for nobody in particular */
	uint64_t held_ns;        /* for how long, within a tenth of a second; 0: not for long */
	bool stuck;              /* it was reported */
};
/* Fills at most capacity entries, ret_count is the full count. */
void gmem_core_threads(struct gmem_core *core, struct gmem_thread_info *threads, size_t capacity, size_t *ret_count);

/* ---- traces: the uses of pages that the core sees, one recording at a time ---- */
struct gmem_trace_config {
	uint64_t session;      /* only of this one; 0: of all */
	int hnid;              /* only there, and writes elsewhere; -1: everywhere */
	uint64_t buffer_bytes; /* at most; what nobody reads in time is lost, and counted. At least 40 KiB are taken */
};
/* -EBUSY: there is a recording already; -ENODEV; -ENOMEM. */
int gmem_trace_start(struct gmem_core *core, const struct gmem_trace_config *config);
/* Nothing more is recorded; what is there can be read. */
void gmem_trace_stop(struct gmem_core *core);
/* How many accesses were read, each of them once; 0: there is none just now. ret_lost: of this recording, so far. */
size_t gmem_trace_read(struct gmem_core *core, struct gmem_access *accesses, size_t capacity, uint64_t *ret_lost);
/* Stops, and gives the buffer back. */
void gmem_trace_close(struct gmem_core *core);

/* ---- events for the daemon's Python side ---- */
enum gmem_event_type {
	GMEM_EVENT_FORK = 1,      /* session = parent, value = child session */
	GMEM_EVENT_VIEW_GONE,     /* a process ended or closed its uffd: session, value = context id or 0 */
	GMEM_EVENT_POISONED,      /* session, va: a page became or was found unobtainable; error = errno */
	GMEM_EVENT_SEGV,          /* context touched memory outside every region and was sent SIGSEGV: va, value = context */
	GMEM_EVENT_NOT_ACQUIRED,  /* a context of a device that can't replay touched memory it had not acquired */
	GMEM_EVENT_PRESSURE,      /* hnid: low watermark reached */
	GMEM_EVENT_DEVICE_LOST,   /* hnid */
	GMEM_EVENT_STUCK,         /* a thread: value = index of gmem_core_threads(); session, va, hnid as there */
	GMEM_EVENT_UNSTUCK,       /* it has gone on: value */
	GMEM_EVENT_ERROR,         /* unexpected errno in the fault path: error, va */
};
struct gmem_event {
	uint32_t type;
	int32_t hnid;
	int32_t error;
	uint32_t reserved;
	uint64_t session;
	uint64_t va;
	uint64_t value;
};
int gmem_event_fd(struct gmem_core *core);                                       /* readable while events wait */
size_t gmem_event_read(struct gmem_core *core, struct gmem_event *events, size_t capacity);

#endif
