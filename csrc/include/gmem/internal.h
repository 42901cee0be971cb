/* SPDX-License-Identifier: Apache-2.0
 *
 * struct gmem_core, for the core's own files.
 */
#ifndef GMEM_INTERNAL_H
#define GMEM_INTERNAL_H

#include <gmem/core.h>
#include <gmem/event.h>
#include <gmem/fault.h>
#include <gmem/fill.h>
#include <gmem/hnode.h>
#include <gmem/keep.h>
#include <gmem/lpt.h>
#include <gmem/range.h>
#include <gmem/service.h>
#include <gmem/session.h>
#include <gmem/stats.h>
#include <gmem/trace.h>
#include <gmem/watch.h>

#define GMEM_SESSION_BUCKETS 256

struct gmem_core {
	struct gmem_core_features features;      /* (C) */
	struct gmem_window window;               /* (C) */
	bool hugepages, overcommit, fault_ahead; /* (C) */
	uint64_t hold_ns;                        /* (C) thrash.h; 0: pages are not held */
	const struct gmem_policy_ops *policy;    /* (C) of all hnodes */
	atomic_bool stopping;                    /* (A) clients keep their memory: objects are forgotten, not freed */
	struct gmem_hnode *retired;              /* devices_lock; detached, kept because a late reader may look */
	struct gmem_keep keep;
	struct gmem_recovery *recovery;          /* (C) while recovering */
	bool recovering;                         /* (C) between create and resume: a predecessor's state is being taken over */
	struct gmem_lpt lpt;
	struct gmem_range_allocator va[GMEM_CLASS_COUNT];
	_Atomic(struct gmem_hnode *) hnodes[GMEM_HNODE_MAX]; /* (A) changed under devices_lock */
	struct gmem_mutex devices_lock;
	struct gmem_rwlock sessions_lock;
	struct gmem_session *sessions[GMEM_SESSION_BUCKETS]; /* sessions_lock */
	_Atomic uint64_t session_count, context_count, region_count, object_count; /* (A) */
	_Atomic uint64_t next_id;                            /* (A) of sessions and contexts */
	_Atomic uint32_t imports[GMEM_HNODE_MAX];            /* (A) objects whose pages come from servers of that device */
	struct gmem_mutex pools_lock;
	struct gmem_pool *pools;                             /* pools_lock */
	struct gmem_mutex tenants_lock;
	struct gmem_tenant *tenants;                         /* tenants_lock */
	_Atomic uint64_t session_quota[GMEM_HNODE_MAX], uid_quota[GMEM_HNODE_MAX]; /* (A) for those to come; 0: none */
	_Atomic uint64_t committed_bytes[GMEM_CLASS_COUNT];  /* (A) */
	_Atomic uint64_t kept_bytes;                         /* (A) addresses that clients keep (kept.h) */
	_Atomic uint64_t hugepages_used_bytes;               /* (A) by frames in hugetlb files, the host's and devices' */
	struct gmem_stats stats;
	struct gmem_events events;
	struct gmem_faults faults;
	struct gmem_fillers fillers;
	struct gmem_watch watch;
	struct gmem_trace trace;
	struct gmem_rings *rings;                            /* (C) */
};

static inline struct gmem_hnode *gmem_core_hnode(struct gmem_core *core, int hnid)
{
	return hnid < 0 || hnid >= GMEM_HNODE_MAX ? NULL : atomic_load(&core->hnodes[hnid]);
}

/* Whether accesses are being recorded; then gmem_page_trace() is to hear of them. */
static inline bool gmem_core_traces(const struct gmem_core *core) { return gmem_trace_is_on(&core->trace); }

void gmem_core_post(struct gmem_core *core, enum gmem_event_type type, uint64_t session, uint64_t va, uint64_t value,
		    int hnid, int error);

#endif
