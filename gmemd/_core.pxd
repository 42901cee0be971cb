# SPDX-License-Identifier: Apache-2.0
# csrc/include/gmem/core.h and driver.h, as much of them as _core.pyx uses.
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t


cdef extern from "<stdbool.h>" nogil:
    ctypedef bint c_bool "bool"


cdef extern from "<sys/types.h>" nogil:
    ctypedef unsigned int uid_t
    ctypedef int pid_t


cdef extern from "gmem/types.h" nogil:
    enum:
        GMEM_HNODE_MAX
        GMEM_NAME_MAX
        GMEM_MESSAGE_MAX
        GMEM_CLASS_SMALL
        GMEM_CLASS_HUGE
        GMEM_CLASS_COUNT
        GMEM_FORK_SHARE
        GMEM_FORK_NONE
        GMEM_FORK_COPY
        GMEM_ADVISE_DISCARD
        GMEM_ADVISE_PREFETCH
        GMEM_ADVISE_PINNED
        GMEM_ADVISE_UNPINNED
        GMEM_ADVISE_READ_MOSTLY
        GMEM_ADVISE_NO_READ_MOSTLY
        GMEM_ADVISE_PREFERRED
        GMEM_ADVISE_COLD
        GMEM_ADVISE_ACCESSED_BY
        GMEM_ADVISE_NOT_ACCESSED_BY
        GMEM_ADVISE_FREEZE
        GMEM_ADVISE_THAW
        GMEM_ADVISE_ZERO
    enum gmem_class:
        pass
    enum gmem_fork:
        pass
    enum gmem_advice:
        pass
    enum gmem_prot:
        pass
    struct gmem_page_info:
        pass


cdef extern from "gmem/access.h" nogil:
    struct gmem_access:
        pass


cdef extern from "gmem/crash.h" nogil:
    void gmem_crash_named(const char *)


cdef extern from "gmem/driver.h" nogil:
    enum:
        GMEM_DRIVER_ABI
        GMEM_CAP_SLOW
    enum gmem_cause:
        pass
    struct gmem_device:
        pass
    struct gmem_pmap:
        pass
    struct gmem_driver_config:
        const char *name
        const char *const *keys
        const char *const *values
        size_t count
        char *message
    struct gmem_device_info:
        uint64_t capacity_bytes
        uint64_t page_bytes_mask
        uint32_t caps
        uint64_t bandwidth_bytes_per_s
        uint64_t latency_ns
        uint64_t assured_bytes
    struct gmem_device_usage:
        uint64_t pages, page_bytes, stored_bytes, raw_pages
    struct gmem_pool_version:
        const char *name
        uint64_t stamp, pages
        uint8_t shift
        const uint64_t *present
        uint32_t *checks
    struct gmem_peer_io:
        uint64_t key
        void *memory
        size_t bytes
        int result
    struct gmem_sg:
        void *dst
        const void *src
        size_t bytes
    ctypedef uint64_t gmem_fence_t
    struct gmem_range:
        uint64_t va
        uint64_t bytes
    struct gmem_driver_ops:
        uint32_t abi
        uint32_t size
        const char *name
        int (*probe)(const gmem_driver_config *, gmem_device **) noexcept
        void (*remove)(gmem_device *) noexcept
        int (*info)(gmem_device *, gmem_device_info *) noexcept
        int (*health)(gmem_device *) noexcept
        const char *(*last_error)(gmem_device *) noexcept
        int (*pmap_create)(gmem_device *, uint64_t, gmem_pmap **) noexcept
        void (*pmap_destroy)(gmem_pmap *) noexcept
        int (*pmap_enter)(gmem_pmap *, gmem_range, uint64_t, gmem_prot) noexcept
        int (*pmap_release)(gmem_pmap *, gmem_range) noexcept
        int (*pmap_protect)(gmem_pmap *, gmem_range, gmem_prot) noexcept
        int (*tlb_invl)(gmem_pmap *, gmem_range) noexcept
        int (*tlb_invl_coalesced)(gmem_pmap *, const gmem_range *, size_t) noexcept
        int (*copy)(gmem_device *, const gmem_sg *, size_t, gmem_fence_t, gmem_fence_t *) noexcept
        int (*fill)(gmem_device *, void *, int, size_t, gmem_fence_t *) noexcept
        int (*fence_wait)(gmem_device *, gmem_fence_t, uint64_t) noexcept
        int (*peer_va_alloc_fixed)(gmem_device *, gmem_range) noexcept
        int (*peer_va_free)(gmem_device *, gmem_range) noexcept
        int (*peer_map)(gmem_device *, uint64_t, const void *, size_t) noexcept
        int (*peer_unmap)(gmem_device *, uint64_t, void *, size_t) noexcept
        int (*peer_free)(gmem_device *, uint64_t, size_t) noexcept
        int (*peer_hmemcpy)(gmem_device *, uint64_t, size_t, void *, size_t, c_bool) noexcept
        void (*invalidate)(gmem_device *, uint64_t, gmem_range, gmem_cause, uint64_t) noexcept
        int (*peer_map_batch)(gmem_device *, gmem_peer_io *, size_t) noexcept
        int (*peer_unmap_batch)(gmem_device *, gmem_peer_io *, size_t) noexcept
        int (*peer_usage)(gmem_device *, gmem_device_usage *) noexcept


cdef extern from "gmem/keep.h" nogil:
    enum:
        GMEM_STATE_VERSION
    struct gmem_kept_fd:
        char name[64]
        int fd


cdef extern from "gmem/source.h" nogil:
    struct gmem_file_args:
        uint64_t offset, bytes
        c_bool write, private_

cdef extern from "gmem/core.h" nogil:
    struct gmem_core:
        pass
    struct gmem_core_config:
        uint64_t window_base, window_bytes, host_limit_bytes, feature_mask
        uint32_t fault_threads
        c_bool hugepages, overcommit, event_fork, no_fault_ahead
        const char *policy
        int keep_socket
        uint32_t keep_max_fds
        const gmem_kept_fd *kept
        size_t kept_count
        uint64_t stuck_ns, hold_ns
    struct gmem_core_features:
        uint64_t uffd
        c_bool event_fork, continue_wp, poison, hugepages, uffd_device
        int uffd_device_fd
    struct gmem_window:
        uint64_t base, bytes
        uint64_t part_base[2]
        uint64_t part_bytes[2]
    struct gmem_hold_name:
        uint32_t record, index
        uint64_t asked
    struct gmem_region_info:
        uint64_t va, bytes, offset, page_bytes
        gmem_class class_
        gmem_fork fork
        c_bool committed, read_only, sealed
        int fd
    struct gmem_mmap_args:
        uint64_t bytes, page_bytes
        gmem_fork fork
        c_bool small_only
        uint64_t above
        uint64_t asked
        c_bool again
    struct gmem_pool_args:
        gmem_mmap_args memory
        c_bool persistent
    struct gmem_pool_info:
        uint64_t pool, va, bytes, page_bytes
        gmem_class class_
        c_bool sealed
        uint64_t writers, readers, fetched_bytes
        uint64_t resident_bytes[16]
    struct gmem_hnode_stats:
        int hnid
        char name[32]
        char driver[32]
        gmem_device_info info
        gmem_device_usage usage
        uint64_t used_bytes, peak_bytes, pinned_bytes, contexts, faults, in_bytes, out_bytes, evictions
        uint64_t evicted_clean, errors
        int health
        char last_error[160]
        const char *policy
    struct gmem_core_stats:
        uint64_t host_faults, device_faults, write_protect_faults, spurious_faults, first_touches
        uint64_t h2d_bytes, d2h_bytes, d2d_bytes, duplicates, invalidations, evictions, evicted_clean
        uint64_t prefetched_pages, ahead_pages, discarded_pages, poisoned_pages, retries, parked_faults, aged_pages
        uint64_t throttled_faults, evictions_stopped, leftovers, outside_faults
        uint64_t migration_ns, fault_ns, sessions, contexts, regions, objects, lpt_bytes, events_lost
        uint64_t ring_requests, ring_errors, stuck_reports
    struct gmem_thread_info:
        size_t index
        pid_t tid
        const char *role
        const char *doing
        const char *op
        int hnid
        uint64_t session, va, held_ns
        c_bool stuck
    struct gmem_session_stats:
        uint64_t session
        uid_t uid
        pid_t pid
        uint64_t mapped_bytes, regions, contexts, host_faults, device_faults
        uint64_t resident_bytes[16]
        uint64_t quota_bytes[16]
    struct gmem_event:
        uint32_t type
        int32_t hnid
        int32_t error
        uint64_t session, va, value
    enum:
        GMEM_EVENT_FORK
        GMEM_EVENT_VIEW_GONE
        GMEM_EVENT_POISONED
        GMEM_EVENT_SEGV
        GMEM_EVENT_NOT_ACQUIRED
        GMEM_EVENT_PRESSURE
        GMEM_EVENT_DEVICE_LOST
        GMEM_EVENT_STUCK
        GMEM_EVENT_UNSTUCK
        GMEM_EVENT_ERROR

    void gmem_core_threads(gmem_core *, gmem_thread_info *, size_t, size_t *)
    c_bool gmem_core_recovers(gmem_core *)
    int gmem_core_resume(gmem_core *)
    int gmem_core_create(const gmem_core_config *, gmem_core **)
    void gmem_core_destroy(gmem_core *)
    void gmem_core_features_ "gmem_core_features"(gmem_core *, gmem_core_features *)
    void gmem_core_window(gmem_core *, gmem_window *)
    void gmem_core_reap(gmem_core *)
    void gmem_core_stats_ "gmem_core_stats"(gmem_core *, gmem_core_stats *)
    int gmem_session_create(gmem_core *, uid_t, pid_t, uint64_t *)
    void gmem_session_ids(gmem_core *, uint64_t *, size_t, size_t *)
    int gmem_session_disown(gmem_core *, uint64_t)
    int gmem_session_destroy(gmem_core *, uint64_t)
    int gmem_session_files(gmem_core *, uint64_t, int *)
    int gmem_session_ring(gmem_core *, uint64_t, int *)
    int gmem_view_agent(gmem_core *, uint64_t, uint64_t, int *)
    int gmem_session_attach(gmem_core *, uint64_t, int, int)
    c_bool gmem_session_covers(gmem_core *, uint64_t, uint64_t, uint64_t)
    int gmem_session_regions(gmem_core *, uint64_t, gmem_region_info *, size_t, size_t *)
    int gmem_session_fork(gmem_core *, uint64_t, uid_t, pid_t, uint64_t *, c_bool *)
    int gmem_session_stats_ "gmem_session_stats"(gmem_core *, uint64_t, gmem_session_stats *)
    int gmem_context_files(gmem_core *, uint64_t, int, int *)
    int gmem_context_overlays(gmem_core *, uint64_t, int, gmem_region_info *, size_t, size_t *)
    int gmem_context_attach(gmem_core *, uint64_t, int, int, int, pid_t, uint64_t *)
    uint32_t gmem_device_caps(gmem_core *, int)
    int gmem_context_channel(gmem_core *, uint64_t, int, pid_t, uint64_t *, int *)
    int gmem_context_overlay(gmem_core *, uint64_t, uint64_t, uint64_t)
    int gmem_context_uncover(gmem_core *, uint64_t, uint64_t, uint64_t)
    int gmem_context_detach(gmem_core *, uint64_t)
    int gmem_region_file(gmem_core *, uint64_t, uint64_t, int, gmem_region_info *)
    int gmem_pool_create(gmem_core *, uint64_t, const gmem_pool_args *, uint64_t *)
    int gmem_pool_open(gmem_core *, uint64_t, uint64_t, c_bool, gmem_region_info *)
    int gmem_pool_unlink(gmem_core *, uint64_t)
    int gmem_pool_publish(gmem_core *, uint64_t)
    int gmem_pool_info_ "gmem_pool_info"(gmem_core *, uint64_t, gmem_pool_info *)
    void gmem_pool_ids(gmem_core *, uint64_t *, size_t, size_t *)
    int gmem_pool_present(gmem_core *, uint64_t, uint64_t *)
    int gmem_pool_export(gmem_core *, uint64_t, int, const gmem_pool_version *, uint64_t, uint64_t)
    int gmem_pool_import(gmem_core *, uint64_t, int, const gmem_pool_version *, uint64_t *)
    int gmem_pool_erase(gmem_core *, int, const gmem_pool_version *, uint64_t, uint64_t)
    int gmem_mmap(gmem_core *, uint64_t, const gmem_mmap_args *, gmem_region_info *)
    int gmem_map_file(
        gmem_core *, uint64_t, int, const gmem_file_args *, const gmem_mmap_args *, gmem_region_info *, const char **)
    int gmem_flush(gmem_core *, uint64_t, uint64_t, uint64_t)
    int gmem_adopt(gmem_core *, uint64_t, uint64_t, const gmem_mmap_args *, gmem_region_info *)
    int gmem_mmap_commit(gmem_core *, uint64_t, uint64_t)
    int gmem_munmap(gmem_core *, uint64_t, uint64_t, uint64_t)
    int gmem_advise(gmem_core *, uint64_t, int, uint64_t, uint64_t, gmem_advice)
    int gmem_prefetch(gmem_core *, uint64_t, int, uint64_t, uint64_t)
    int gmem_discard(gmem_core *, uint64_t, uint64_t, uint64_t)
    int gmem_hmemcpy(gmem_core *, uint64_t, int, uint64_t, uint64_t, uint64_t, c_bool)
    int gmem_query(gmem_core *, uint64_t, uint64_t, uint64_t, gmem_page_info *, size_t, size_t *)
    int gmem_acquire(gmem_core *, uint64_t, const gmem_range *, size_t, c_bool, uint64_t)
    int gmem_release(gmem_core *, uint64_t, const gmem_range *, size_t)
    int gmem_release_named(gmem_core *, uint64_t, const gmem_hold_name *, size_t)
    int gmem_device_attach(gmem_core *, const gmem_driver_ops *, const gmem_driver_config *, int *)
    int gmem_device_attach_at(gmem_core *, const gmem_driver_ops *, const gmem_driver_config *, int)
    int gmem_device_detach(gmem_core *, int, c_bool)
    int gmem_limit(gmem_core *, int, uint64_t)
    int gmem_tier_rank(gmem_core *, int, uint32_t)
    void gmem_quota_default(gmem_core *, int, uint64_t, uint64_t)
    int gmem_quota_session(gmem_core *, uint64_t, int, uint64_t)
    int gmem_quota_uid(gmem_core *, uid_t, int, uint64_t)
    const gmem_driver_ops *gmem_driver_builtin(const char *)
    void gmem_hnodes(gmem_core *, gmem_hnode_stats *, size_t *)
    struct gmem_trace_config:
        uint64_t session
        int hnid
        uint64_t buffer_bytes
    int gmem_trace_start(gmem_core *, const gmem_trace_config *)
    void gmem_trace_stop(gmem_core *)
    size_t gmem_trace_read(gmem_core *, gmem_access *, size_t, uint64_t *)
    void gmem_trace_close(gmem_core *)
    int gmem_event_fd(gmem_core *)
    size_t gmem_event_read(gmem_core *, gmem_event *, size_t)
