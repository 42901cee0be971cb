# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, binding=False
"""The only bridge between the daemon and its C core: one method for each function of gmem/core.h, GIL released.

Failures are OSError with the core's errno. Ids are the core's. Descriptors that methods return are the core's as well:
they are not to be closed, and duplicates are to be made while what they belong to lives. Methods may be called from any
thread; close() waits for those that are running.
"""

import errno
import os
import threading

import structlog

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport ENOMEM
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memset, strncpy
from posix.unistd cimport close as close_fd

from gmemd._pydriver cimport Table, probing

log = structlog.get_logger("gmemd.core")

_ADVICE = {
    "discard": GMEM_ADVISE_DISCARD, "prefetch": GMEM_ADVISE_PREFETCH, "pinned": GMEM_ADVISE_PINNED,
    "unpinned": GMEM_ADVISE_UNPINNED, "read_mostly": GMEM_ADVISE_READ_MOSTLY,
    "no_read_mostly": GMEM_ADVISE_NO_READ_MOSTLY, "preferred": GMEM_ADVISE_PREFERRED, "cold": GMEM_ADVISE_COLD,
    "accessed_by": GMEM_ADVISE_ACCESSED_BY, "not_accessed_by": GMEM_ADVISE_NOT_ACCESSED_BY,
    "freeze": GMEM_ADVISE_FREEZE, "thaw": GMEM_ADVISE_THAW, "zero": GMEM_ADVISE_ZERO,
}
_FORK = {"share": GMEM_FORK_SHARE, "none": GMEM_FORK_NONE, "copy": GMEM_FORK_COPY}
_FORK_NAMES = {number: name for name, number in _FORK.items()}
_EVENTS = {
    GMEM_EVENT_FORK: "fork", GMEM_EVENT_VIEW_GONE: "view_gone", GMEM_EVENT_POISONED: "poisoned",
    GMEM_EVENT_SEGV: "segv", GMEM_EVENT_NOT_ACQUIRED: "not_acquired", GMEM_EVENT_PRESSURE: "pressure",
    GMEM_EVENT_DEVICE_LOST: "device_lost", GMEM_EVENT_STUCK: "stuck", GMEM_EVENT_UNSTUCK: "unstuck",
    GMEM_EVENT_ERROR: "error",
}
STATE_VERSION = GMEM_STATE_VERSION
# gmem_driver_ops.probe has no argument of its caller's, so who is being probed is told aside: one at a time.
_probe_lock = threading.Lock()
_EVENT_BATCH_MAX = 1024
_CLOSE_WAIT_S = 30.0


cdef object _raise(int err):
    raise OSError(-err, os.strerror(-err))


cdef dict _region(const gmem_region_info *r):
    return {
        "va": r.va, "bytes": r.bytes, "offset": r.offset, "page_bytes": r.page_bytes,
        "huge": <int>r.class_ == GMEM_CLASS_HUGE, "fork": _FORK_NAMES[<int>r.fork], "fd": r.fd,
        "read_only": bool(r.read_only), "committed": bool(r.committed), "sealed": bool(r.sealed),
    }


cdef tuple _by_class(const int *fds):
    """(huge, small), None where there is none."""
    huge, small = fds[<int>GMEM_CLASS_HUGE], fds[<int>GMEM_CLASS_SMALL]
    return (huge if huge >= 0 else None, small if small >= 0 else None)


def crash(str point):
    """A crash point (csrc/include/gmem/crash.h) in Python."""
    gmem_crash_named(point.encode())


cdef int _version(
    gmem_pool_version *v, bytes name, object version, const unsigned char[::1] present, unsigned char[::1] checks
) except -1:
    cdef uint64_t pages = version.pages
    if len(present) != (pages + 63) // 64 * 8 or len(checks) != pages * 4 or not pages:
        raise ValueError("present and checks do not have the pages' size")
    memset(v, 0, sizeof(v[0]))
    v.name = name
    v.stamp = version.stamp
    v.pages = pages
    v.shift = version.page_bytes.bit_length() - 1
    v.present = <const uint64_t *>&present[0]
    v.checks = <uint32_t *>&checks[0]
    return 0


cdef gmem_range *_ranges(list pairs, size_t *count) except NULL:
    cdef gmem_range *made = <gmem_range *>malloc(max(1, len(pairs)) * sizeof(gmem_range))
    cdef size_t i = 0
    if made is NULL:
        raise MemoryError
    try:
        for va, size in pairs:
            made[i].va = va
            made[i].bytes = size
            i += 1
    except BaseException:
        free(made)
        raise
    count[0] = i
    return made


ctypedef int (*region_list)(gmem_core *, uint64_t, int, gmem_region_info *, size_t, size_t *) noexcept nogil


cdef int _session_regions(
    gmem_core *core, uint64_t session, int hnid, gmem_region_info *regions, size_t capacity, size_t *count
) noexcept nogil:
    return gmem_session_regions(core, session, regions, capacity, count)


cdef int _context_overlays(
    gmem_core *core, uint64_t session, int hnid, gmem_region_info *regions, size_t capacity, size_t *count
) noexcept nogil:
    return gmem_context_overlays(core, session, hnid, regions, capacity, count)


cdef class Core:
    """The core, created on construction."""

    cdef gmem_core *_core
    cdef int _users
    cdef bint _closing
    cdef object _idle
    cdef list _tables

    def __cinit__(
        self, *, uint64_t window_base=0, uint64_t window_bytes=0, uint64_t host_limit_bytes=0,
        uint64_t feature_mask=0xFFFFFFFFFFFFFFFF, uint32_t fault_threads=0, bint hugepages=True, bint overcommit=False,
        bint event_fork=True, bint fault_ahead=True, str policy=None, int keep_socket=0, uint32_t keep_max_fds=0,
        list kept=None, double stuck_s=0, double hold_s=0,
    ):
        """keep_socket and the descriptors of kept, pairs of name and number, are taken over; see gmem/keep.h."""
        cdef gmem_core_config config
        cdef gmem_kept_fd *left = NULL
        cdef bytes policy_name = policy.encode() if policy else None
        cdef int err
        memset(&config, 0, sizeof(config))
        config.window_base = window_base
        config.window_bytes = window_bytes
        config.host_limit_bytes = host_limit_bytes
        config.feature_mask = feature_mask
        config.fault_threads = fault_threads
        config.hugepages = hugepages
        config.overcommit = overcommit
        config.event_fork = event_fork
        if policy_name is not None:
            config.policy = policy_name
        config.no_fault_ahead = not fault_ahead
        config.keep_socket = keep_socket
        config.keep_max_fds = keep_max_fds
        config.stuck_ns = <uint64_t>(stuck_s * 1e9)
        config.hold_ns = <uint64_t>(hold_s * 1e9)
        if kept:
            left = <gmem_kept_fd *>calloc(len(kept), sizeof(gmem_kept_fd))
            if left is NULL:
                raise MemoryError
            for i, (name, fd) in enumerate(kept):
                strncpy(left[i].name, <bytes>name.encode(), 63)
                left[i].fd = fd
            config.kept = left
            config.kept_count = len(kept)
        self._idle = threading.Event()
        self._tables = []
        with nogil:
            err = gmem_core_create(&config, &self._core)
        free(left)
        if err == -errno.EPROTO:
            raise OSError(errno.EPROTO, "the state that another gmemd has left is of another version; it was not touched")
        if err:
            _raise(err)

    def __dealloc__(self):
        if self._core is not NULL:
            with nogil:
                gmem_core_destroy(self._core)
            self._core = NULL

    cdef gmem_core *_enter(self) except NULL:
        if self._core is NULL or self._closing:
            raise OSError(errno.ESHUTDOWN, "the core is closed")
        self._users += 1
        return self._core

    cdef void _leave(self) noexcept:
        self._users -= 1
        if self._closing and not self._users:
            self._idle.set()

    def close(self):
        """(blocks) Brings every page home and ends everything. Any number of times."""
        cdef gmem_core *core = self._core
        if core is NULL or self._closing:
            return
        self._closing = True
        if self._users and not self._idle.wait(_CLOSE_WAIT_S):
            log.error("the core is still in use and is left as it is", calls=self._users)
            self._core = NULL
            return
        with nogil:
            gmem_core_destroy(core)
        self._core = NULL

    def recovers(self):
        """Whether a predecessor's state is being taken over: devices are to be attached again, then resume()."""
        cdef gmem_core *core = self._enter()
        cdef c_bool recovers
        with nogil:
            recovers = gmem_core_recovers(core)
        self._leave()
        return bool(recovers)

    def resume(self):
        """(blocks) Finishes or undoes what the predecessor was doing, wakes everybody and goes on."""
        cdef gmem_core *core = self._enter()
        cdef int err
        with nogil:
            err = gmem_core_resume(core)
        self._leave()
        if err:
            _raise(err)

    # ---- what it is ----

    def features(self):
        cdef gmem_core *core = self._enter()
        cdef gmem_core_features f
        with nogil:
            gmem_core_features_(core, &f)
        self._leave()
        return {
            "uffd": f.uffd, "event_fork": bool(f.event_fork), "continue_wp": bool(f.continue_wp),
            "poison": bool(f.poison), "hugepages": bool(f.hugepages), "uffd_device": bool(f.uffd_device),
            "uffd_device_fd": f.uffd_device_fd,
        }

    def window(self):
        cdef gmem_core *core = self._enter()
        cdef gmem_window w
        with nogil:
            gmem_core_window(core, &w)
        self._leave()
        return {
            "base": w.base, "bytes": w.bytes,
            "huge_base": w.part_base[<int>GMEM_CLASS_HUGE], "huge_bytes": w.part_bytes[<int>GMEM_CLASS_HUGE],
            "small_base": w.part_base[<int>GMEM_CLASS_SMALL], "small_bytes": w.part_bytes[<int>GMEM_CLASS_SMALL],
        }

    def stats(self):
        cdef gmem_core *core = self._enter()
        cdef gmem_core_stats s
        with nogil:
            gmem_core_stats_(core, &s)
        self._leave()
        return s

    def threads(self):
        """What each of the core's threads is doing; see gmem_thread_info."""
        cdef gmem_core *core = self._enter()
        cdef gmem_thread_info infos[64]
        cdef gmem_thread_info *t
        cdef size_t count = 0
        with nogil:
            gmem_core_threads(core, infos, 64, &count)
        self._leave()
        found = []
        for i in range(min(count, <size_t>64)):
            t = &infos[i]
            found.append({
                "index": t.index, "tid": t.tid, "role": (<bytes>t.role).decode(), "doing": (<bytes>t.doing).decode(),
                "op": (<bytes>t.op).decode() if t.op is not NULL else "", "hnid": t.hnid, "session": t.session,
                "va": t.va, "held_ns": t.held_ns, "stuck": bool(t.stuck),
            })
        return found

    def reap(self):
        cdef gmem_core *core = self._enter()
        with nogil:
            gmem_core_reap(core)
        self._leave()

    # ---- sessions ----

    def session_create(self, uid_t uid, pid_t pid):
        cdef gmem_core *core = self._enter()
        cdef uint64_t session = 0
        cdef int err
        with nogil:
            err = gmem_session_create(core, uid, pid, &session)
        self._leave()
        if err:
            _raise(err)
        return session

    def session_ids(self):
        cdef gmem_core *core = self._enter()
        cdef size_t capacity = 65536, count = 0
        cdef uint64_t *ids = <uint64_t *>malloc(capacity * sizeof(uint64_t))
        try:
            if ids is NULL:
                raise MemoryError
            with nogil:
                gmem_session_ids(core, ids, capacity, &count)
            return [ids[i] for i in range(min(count, capacity))]
        finally:
            free(ids)
            self._leave()

    def session_disown(self, uint64_t session):
        """A predecessor's session that had not come to its client."""
        cdef gmem_core *core = self._enter()
        cdef int err
        with nogil:
            err = gmem_session_disown(core, session)
        self._leave()
        if err:
            _raise(err)

    def session_destroy(self, uint64_t session):
        cdef gmem_core *core = self._enter()
        cdef int err
        with nogil:
            err = gmem_session_destroy(core, session)
        self._leave()
        if err:
            _raise(err)

    def session_files(self, uint64_t session):
        """(huge, small) descriptors, None where there is none."""
        cdef gmem_core *core = self._enter()
        cdef int fds[2]
        cdef int err
        with nogil:
            err = gmem_session_files(core, session, fds)
        self._leave()
        if err:
            _raise(err)
        return _by_class(fds)

    def session_ring(self, uint64_t session):
        """(file, doorbell) descriptors of the session's ring."""
        cdef gmem_core *core = self._enter()
        cdef int fds[2]
        cdef int err
        with nogil:
            err = gmem_session_ring(core, session, fds)
        self._leave()
        if err:
            _raise(err)
        return fds[0], fds[1]

    def view_agent(self, uint64_t session, uint64_t context):
        """Descriptor of the file through which a process's agent is spoken to; context 0 is the session's own process."""
        cdef gmem_core *core = self._enter()
        cdef int fd = -1
        cdef int err
        with nogil:
            err = gmem_view_agent(core, session, context, &fd)
        self._leave()
        if err:
            _raise(err)
        return fd

    def session_attach(self, uint64_t session, int uffd, int pidfd):
        """Takes both descriptors in every case."""
        cdef gmem_core *core = self._enter_with(uffd, pidfd)
        cdef int err
        with nogil:
            err = gmem_session_attach(core, session, uffd, pidfd)
        self._leave()
        if err:
            _raise(err)

    cdef gmem_core *_enter_with(self, int uffd, int pidfd) except NULL:
        try:
            return self._enter()
        except OSError:
            close_fd(uffd)
            close_fd(pidfd)
            raise

    def session_fork(self, uint64_t parent, uid_t uid, pid_t pid):
        """(child, stored)"""
        cdef gmem_core *core = self._enter()
        cdef uint64_t child = 0
        cdef c_bool stored = False
        cdef int err
        with nogil:
            err = gmem_session_fork(core, parent, uid, pid, &child, &stored)
        self._leave()
        if err:
            _raise(err)
        return child, bool(stored)

    cdef list _list_regions(self, region_list function, uint64_t session, int hnid):
        cdef gmem_core *core = self._enter()
        cdef size_t capacity = 64, count = 0
        cdef gmem_region_info *regions = NULL
        cdef int err
        try:
            while True:
                regions = <gmem_region_info *>malloc(capacity * sizeof(gmem_region_info))
                if regions is NULL:
                    raise MemoryError
                with nogil:
                    err = function(core, session, hnid, regions, capacity, &count)
                if err:
                    _raise(err)
                if count <= capacity:
                    return [_region(&regions[i]) for i in range(count)]
                capacity = count + 16
                free(regions)
                regions = NULL
        finally:
            free(regions)
            self._leave()

    def regions(self, uint64_t session):
        return self._list_regions(_session_regions, session, 0)

    def session_stats(self, uint64_t session):
        cdef gmem_core *core = self._enter()
        cdef gmem_session_stats s
        cdef int err
        with nogil:
            err = gmem_session_stats_(core, session, &s)
        self._leave()
        if err:
            _raise(err)
        return {
            "session": s.session, "uid": s.uid, "pid": s.pid, "mapped_bytes": s.mapped_bytes, "regions": s.regions,
            "contexts": s.contexts, "host_faults": s.host_faults, "device_faults": s.device_faults,
            "resident_bytes": {h: s.resident_bytes[h] for h in range(GMEM_HNODE_MAX) if s.resident_bytes[h]},
            "quota_bytes": {h: s.quota_bytes[h] for h in range(GMEM_HNODE_MAX) if s.quota_bytes[h]},
        }

    # ---- contexts ----

    def session_covers(self, uint64_t session, uint64_t va, uint64_t size):
        """Whether all of the range is in its regions."""
        cdef gmem_core *core = self._enter()
        cdef bint covers
        with nogil:
            covers = gmem_session_covers(core, session, va, size)
        self._leave()
        return covers

    def context_files(self, uint64_t session, int hnid):
        """(huge, small) descriptors, None where there is none."""
        cdef gmem_core *core = self._enter()
        cdef int fds[2]
        cdef int err
        with nogil:
            err = gmem_context_files(core, session, hnid, fds)
        self._leave()
        if err:
            _raise(err)
        return _by_class(fds)

    def context_overlays(self, uint64_t session, int hnid):
        return self._list_regions(_context_overlays, session, hnid)

    def context_attach(self, uint64_t session, int hnid, int uffd, int pidfd, pid_t pid):
        """Takes both descriptors in every case."""
        cdef gmem_core *core = self._enter_with(uffd, pidfd)
        cdef uint64_t context = 0
        cdef int err
        with nogil:
            err = gmem_context_attach(core, session, hnid, uffd, pidfd, pid, &context)
        self._leave()
        if err:
            _raise(err)
        return context

    def device_caps(self, int hnid):
        """The bits of caps.CAPS; 0 for a number that is no device's. Waits for nobody."""
        cdef gmem_core *core = self._enter()
        cdef uint32_t caps = gmem_device_caps(core, hnid)
        self._leave()
        return caps

    def context_channel(self, uint64_t session, int hnid, pid_t pid):
        """(context, descriptor) of a context in the client's own process; the descriptor is the caller's, to pass on.
        ENOTSUP: this device's contexts are processes of their own."""
        cdef gmem_core *core = self._enter()
        cdef uint64_t context = 0
        cdef int err, fd = -1
        with nogil:
            err = gmem_context_channel(core, session, hnid, pid, &context, &fd)
        self._leave()
        if err:
            _raise(err)
        return context, fd

    def context_overlay(self, uint64_t context, uint64_t va, uint64_t size):
        cdef gmem_core *core = self._enter()
        cdef int err
        with nogil:
            err = gmem_context_overlay(core, context, va, size)
        self._leave()
        if err:
            _raise(err)

    def context_uncover(self, uint64_t context, uint64_t va, uint64_t size):
        cdef gmem_core *core = self._enter()
        cdef int err
        with nogil:
            err = gmem_context_uncover(core, context, va, size)
        self._leave()
        if err:
            _raise(err)

    def context_detach(self, uint64_t context):
        cdef gmem_core *core = self._enter()
        cdef int err
        with nogil:
            err = gmem_context_detach(core, context)
        self._leave()
        if err:
            _raise(err)

    # ---- memory ----

    def mmap(
        self, uint64_t session, uint64_t size, *, uint64_t page_bytes=0, str fork="share", bint small=False, uint64_t above=0
    ):
        cdef int fork_number = _FORK[fork]
        cdef gmem_core *core = self._enter()
        cdef gmem_mmap_args args
        cdef gmem_region_info region
        cdef int err
        memset(&args, 0, sizeof(args))
        args.bytes = size
        args.page_bytes = page_bytes
        args.fork = <gmem_fork>fork_number
        args.small_only = small
        args.above = above
        with nogil:
            err = gmem_mmap(core, session, &args, &region)
        self._leave()
        if err:
            _raise(err)
        return _region(&region)

    def adopt(self, uint64_t session, uint64_t va, uint64_t size, *, uint64_t page_bytes=0, str fork="copy"):
        cdef int fork_number = _FORK[fork]
        cdef gmem_core *core = self._enter()
        cdef gmem_mmap_args args
        cdef gmem_region_info region
        cdef int err
        memset(&args, 0, sizeof(args))
        args.bytes = size
        args.page_bytes = page_bytes
        args.fork = <gmem_fork>fork_number
        with nogil:
            err = gmem_adopt(core, session, va, &args, &region)
        self._leave()
        if err:
            _raise(err)
        return _region(&region)

    def map_file(
        self, uint64_t session, int fd, uint64_t offset, uint64_t size, *, uint64_t page_bytes=0, bint write=False,
        bint private=False, str fork="share",
    ):
        """Takes the descriptor in every case. The OSError of a file that will not do says why."""
        cdef int fork_number = _FORK[fork]
        cdef gmem_core *core = self._enter_with(fd, -1)
        cdef gmem_file_args file
        cdef gmem_mmap_args args
        cdef gmem_region_info region
        cdef const char *why = NULL
        cdef int err
        memset(&args, 0, sizeof(args))
        file.offset = offset
        file.bytes = size
        file.write = write
        file.private_ = private
        args.page_bytes = page_bytes
        args.fork = <gmem_fork>fork_number
        with nogil:
            err = gmem_map_file(core, session, fd, &file, &args, &region, &why)
        self._leave()
        if err and why is not NULL:
            raise OSError(-err, (<bytes>why).decode())
        if err:
            _raise(err)
        return _region(&region)

    def flush(self, uint64_t session, uint64_t va, uint64_t size):
        cdef gmem_core *core = self._enter()
        cdef int err
        with nogil:
            err = gmem_flush(core, session, va, size)
        self._leave()
        if err:
            _raise(err)

    def mmap_commit(self, uint64_t session, uint64_t va):
        cdef gmem_core *core = self._enter()
        cdef int err
        with nogil:
            err = gmem_mmap_commit(core, session, va)
        self._leave()
        if err:
            _raise(err)

    def munmap(self, uint64_t session, uint64_t va, uint64_t size):
        cdef gmem_core *core = self._enter()
        cdef int err
        with nogil:
            err = gmem_munmap(core, session, va, size)
        self._leave()
        if err:
            _raise(err)

    def advise(self, uint64_t session, int hnid, uint64_t va, uint64_t size, str advice):
        cdef int number = _ADVICE[advice]
        cdef gmem_core *core = self._enter()
        cdef int err
        with nogil:
            err = gmem_advise(core, session, hnid, va, size, <gmem_advice>number)
        self._leave()
        if err:
            _raise(err)

    def prefetch(self, uint64_t session, int hnid, uint64_t va, uint64_t size):
        cdef gmem_core *core = self._enter()
        cdef int err
        with nogil:
            err = gmem_prefetch(core, session, hnid, va, size)
        self._leave()
        if err:
            _raise(err)

    def discard(self, uint64_t session, uint64_t va, uint64_t size):
        cdef gmem_core *core = self._enter()
        cdef int err
        with nogil:
            err = gmem_discard(core, session, va, size)
        self._leave()
        if err:
            _raise(err)

    def hmemcpy(self, uint64_t session, int hnid, uint64_t dst, uint64_t src, uint64_t size):
        cdef gmem_core *core = self._enter()
        cdef int err
        with nogil:
            err = gmem_hmemcpy(core, session, hnid, dst, src, size, False)
        self._leave()
        if err:
            _raise(err)

    def query(self, uint64_t session, uint64_t va, uint64_t size, size_t capacity):
        """(pages, total): 8 bytes for each of at most capacity pages, and how many there are."""
        cdef gmem_core *core
        cdef bytes pages = PyBytes_FromStringAndSize(NULL, capacity * sizeof(gmem_page_info))
        cdef gmem_page_info *info = <gmem_page_info *>PyBytes_AS_STRING(pages)
        cdef size_t total = 0
        cdef int err
        core = self._enter()
        with nogil:
            err = gmem_query(core, session, va, size, info, capacity, &total)
        self._leave()
        if err:
            _raise(err)
        return pages[: min(total, capacity) * sizeof(gmem_page_info)], total

    def acquire(self, uint64_t context, list ranges, bint write, uint64_t asked=0):
        cdef size_t count = 0
        cdef gmem_range *made = _ranges(ranges, &count)
        cdef gmem_core *core
        cdef c_bool writing = write
        cdef int err
        try:
            core = self._enter()
            with nogil:
                err = gmem_acquire(core, context, made, count, writing, asked)
            self._leave()
        finally:
            free(made)
        if err:
            _raise(err)

    def release(self, uint64_t context, list ranges):
        cdef size_t count = 0
        cdef gmem_range *made = _ranges(ranges, &count)
        cdef gmem_core *core
        cdef int err
        try:
            core = self._enter()
            with nogil:
                err = gmem_release(core, context, made, count)
            self._leave()
        finally:
            free(made)
        if err:
            _raise(err)

    def release_named(self, uint64_t context, list holds):
        """holds: pairs of an acquire's name, which is the number that it was asked with, and which of its ranges."""
        cdef size_t count = len(holds)
        cdef gmem_hold_name *names = <gmem_hold_name *>calloc(count or 1, sizeof(gmem_hold_name))
        cdef gmem_core *core
        cdef int err
        if names == NULL:
            raise MemoryError
        try:
            for i in range(count):
                names[i].asked, names[i].index = holds[i]
            core = self._enter()
            with nogil:
                err = gmem_release_named(core, context, names, count)
            self._leave()
        finally:
            free(names)
        if err:
            _raise(err)

    def region_file(self, uint64_t session, uint64_t va, int hnid):
        """The region that begins at va, with a descriptor for whoever is to map it there: the caller's, to be closed."""
        cdef gmem_core *core = self._enter()
        cdef gmem_region_info region
        cdef int err
        with nogil:
            err = gmem_region_file(core, session, va, hnid, &region)
        self._leave()
        if err:
            _raise(err)
        return _region(&region)

    # ---- pools ----

    def pool_create(
        self, uint64_t session, uint64_t size, *, uint64_t page_bytes=0, bint small=False, bint persistent=False
    ):
        cdef gmem_core *core = self._enter()
        cdef gmem_pool_args args
        cdef uint64_t pool = 0
        cdef int err
        memset(&args, 0, sizeof(args))
        args.memory.bytes = size
        args.memory.page_bytes = page_bytes
        args.memory.small_only = small
        args.persistent = persistent
        with nogil:
            err = gmem_pool_create(core, session, &args, &pool)
        self._leave()
        if err:
            _raise(err)
        return pool

    def pool_open(self, uint64_t session, uint64_t pool, bint write):
        cdef gmem_core *core = self._enter()
        cdef gmem_region_info region
        cdef c_bool writing = write
        cdef int err
        with nogil:
            err = gmem_pool_open(core, session, pool, writing, &region)
        self._leave()
        if err:
            _raise(err)
        return _region(&region)

    def pool_unlink(self, uint64_t pool):
        cdef gmem_core *core = self._enter()
        cdef int err
        with nogil:
            err = gmem_pool_unlink(core, pool)
        self._leave()
        if err:
            _raise(err)

    def pool_publish(self, uint64_t pool):
        cdef gmem_core *core = self._enter()
        cdef int err
        with nogil:
            err = gmem_pool_publish(core, pool)
        self._leave()
        if err:
            _raise(err)

    def pool_info(self, uint64_t pool):
        cdef gmem_core *core = self._enter()
        cdef gmem_pool_info i
        cdef int err
        with nogil:
            err = gmem_pool_info_(core, pool, &i)
        self._leave()
        if err:
            _raise(err)
        return {
            "pool": i.pool, "va": i.va, "bytes": i.bytes, "page_bytes": i.page_bytes,
            "huge": <int>i.class_ == GMEM_CLASS_HUGE, "sealed": bool(i.sealed), "writers": i.writers,
            "readers": i.readers, "fetched_bytes": i.fetched_bytes,
            "resident_bytes": {h: i.resident_bytes[h] for h in range(GMEM_HNODE_MAX) if i.resident_bytes[h]},
        }

    def pool_present(self, uint64_t pool):
        """Which pages of a published pool have content: a bit for each, in whole words of 8 bytes."""
        cdef gmem_core *core = self._enter()
        cdef gmem_pool_info i
        cdef uint64_t *present = NULL
        cdef uint64_t words = 0
        cdef int err
        with nogil:
            err = gmem_pool_info_(core, pool, &i)
            if not err:
                words = (i.bytes // i.page_bytes + 63) // 64
                present = <uint64_t *>calloc(words, sizeof(uint64_t))
                err = gmem_pool_present(core, pool, present) if present is not NULL else -ENOMEM
        self._leave()
        try:
            if err:
                _raise(err)
            return PyBytes_FromStringAndSize(<char *>present, words * sizeof(uint64_t))
        finally:
            free(present)

    def pool_export(self, uint64_t pool, int hnid, version, uint64_t first, uint64_t count):
        """version: name, stamp, pages, page_bytes, present (bytes) and checks (a writable buffer of 4 bytes a page)."""
        cdef gmem_pool_version v
        cdef bytes name = version.name.encode()
        cdef const unsigned char[::1] present = version.present
        cdef unsigned char[::1] checks = version.checks
        cdef gmem_core *core
        cdef int err
        _version(&v, name, version, present, checks)
        core = self._enter()
        with nogil:
            err = gmem_pool_export(core, pool, hnid, &v, first, count)
        self._leave()
        if err:
            _raise(err)

    def pool_import(self, uint64_t session, int hnid, version):
        cdef gmem_pool_version v
        cdef bytes name = version.name.encode()
        cdef const unsigned char[::1] present = version.present
        cdef unsigned char[::1] checks = version.checks
        cdef gmem_core *core
        cdef uint64_t pool = 0
        cdef int err
        _version(&v, name, version, present, checks)
        core = self._enter()
        with nogil:
            err = gmem_pool_import(core, session, hnid, &v, &pool)
        self._leave()
        if err:
            _raise(err)
        return pool

    def pool_erase(self, int hnid, str name, uint64_t stamp, uint64_t pages, uint64_t page_bytes, uint64_t first,
                   uint64_t count):
        cdef gmem_pool_version v
        cdef bytes name_bytes = name.encode()
        cdef gmem_core *core
        cdef int err
        memset(&v, 0, sizeof(v))
        v.name = name_bytes
        v.stamp = stamp
        v.pages = pages
        v.shift = (<object>page_bytes).bit_length() - 1
        core = self._enter()
        with nogil:
            err = gmem_pool_erase(core, hnid, &v, first, count)
        self._leave()
        if err:
            _raise(err)

    def pool_ids(self):
        cdef gmem_core *core = self._enter()
        cdef size_t capacity = 65536, count = 0
        cdef uint64_t *ids = <uint64_t *>malloc(capacity * sizeof(uint64_t))
        try:
            if ids is NULL:
                raise MemoryError
            with nogil:
                gmem_pool_ids(core, ids, capacity, &count)
            return [ids[i] for i in range(min(count, capacity))]
        finally:
            free(ids)
            self._leave()

    # ---- devices ----

    def driver_builtin(self, str name):
        """Whether the core has a driver of that name."""
        return gmem_driver_builtin(name.encode()) is not NULL

    def device_attach(self, str driver, str name, dict config, object py=None, int at=0):
        """hnid, at if that is not 0. With py, a Python driver object, driver is only the name it goes by."""
        cdef const gmem_driver_ops *ops
        cdef Table table
        cdef int hnid
        if py is None:
            ops = gmem_driver_builtin(driver.encode())
            if ops is NULL:
                raise OSError(errno.ENOENT, f"driver: there is no driver {driver!r}")
            return self._attach(ops, name, config, at)
        table = Table(py, driver)
        with _probe_lock:
            probing(py)
            try:
                hnid = self._attach(&table.ops, name, config, at)
                self._tables.append(table)  # the core keeps its name, also after a detach
                return hnid
            finally:
                probing(None)

    cdef int _attach(self, const gmem_driver_ops *ops, str name, dict config, int at) except -1:
        cdef gmem_driver_config c
        cdef char message[160]
        cdef list texts = [text.encode() for pair in config.items() for text in pair]
        cdef bytes name_bytes = name.encode()
        cdef size_t count = len(config)
        cdef const char **pointers = <const char **>calloc(2 * count + 1, sizeof(char *))
        cdef gmem_core *core
        cdef int err, hnid = -1
        if pointers is NULL:
            raise MemoryError
        try:
            for i in range(count):
                pointers[i] = <bytes>texts[2 * i]
                pointers[count + i] = <bytes>texts[2 * i + 1]
            memset(message, 0, sizeof(message))
            c.name = name_bytes
            c.keys = pointers
            c.values = pointers + count
            c.count = count
            c.message = message
            core = self._enter()
            with nogil:
                if at:
                    hnid = at
                    err = gmem_device_attach_at(core, ops, &c, at)
                else:
                    err = gmem_device_attach(core, ops, &c, &hnid)
            self._leave()
        finally:
            free(pointers)
        if err:
            text = (<bytes>message).decode("utf-8", "replace")
            raise OSError(-err, text or os.strerror(-err))
        return hnid

    def device_detach(self, int hnid, bint force=False):
        cdef gmem_core *core = self._enter()
        cdef c_bool forced = force
        cdef int err
        with nogil:
            err = gmem_device_detach(core, hnid, forced)
        self._leave()
        if err:
            _raise(err)

    def limit(self, int hnid, uint64_t size):
        cdef gmem_core *core = self._enter()
        cdef int err
        with nogil:
            err = gmem_limit(core, hnid, size)
        self._leave()
        if err:
            _raise(err)

    def tier_rank(self, int hnid, uint32_t rank):
        cdef gmem_core *core = self._enter()
        cdef int err
        with nogil:
            err = gmem_tier_rank(core, hnid, rank)
        self._leave()
        if err:
            _raise(err)

    def quota_default(self, int hnid, uint64_t session_bytes, uint64_t uid_bytes):
        cdef gmem_core *core = self._enter()
        with nogil:
            gmem_quota_default(core, hnid, session_bytes, uid_bytes)
        self._leave()

    def quota_session(self, uint64_t session, int hnid, uint64_t size):
        cdef gmem_core *core = self._enter()
        cdef int err
        with nogil:
            err = gmem_quota_session(core, session, hnid, size)
        self._leave()
        if err:
            _raise(err)

    def quota_uid(self, uid_t uid, int hnid, uint64_t size):
        cdef gmem_core *core = self._enter()
        cdef int err
        with nogil:
            err = gmem_quota_uid(core, uid, hnid, size)
        self._leave()
        if err:
            _raise(err)

    def hnodes(self):
        cdef gmem_core *core = self._enter()
        cdef gmem_hnode_stats stats[16]
        cdef gmem_hnode_stats *s
        cdef size_t count = 0
        with nogil:
            gmem_hnodes(core, stats, &count)
        self._leave()
        found = []
        for i in range(count):
            s = &stats[i]
            found.append({
                "hnid": s.hnid, "name": (<bytes>s.name).decode("utf-8", "replace"),
                "driver": (<bytes>s.driver).decode("utf-8", "replace"),
                "assured_bytes": s.info.assured_bytes or s.info.capacity_bytes,
                "stored_pages": s.usage.pages, "stored_page_bytes": s.usage.page_bytes,
                "stored_bytes": s.usage.stored_bytes, "raw_pages": s.usage.raw_pages,
                "capacity_bytes": s.info.capacity_bytes, "page_bytes_mask": s.info.page_bytes_mask,
                "caps": s.info.caps, "bandwidth_bytes_per_s": s.info.bandwidth_bytes_per_s,
                "latency_ns": s.info.latency_ns, "used_bytes": s.used_bytes, "peak_bytes": s.peak_bytes,
                "pinned_bytes": s.pinned_bytes, "contexts": s.contexts, "faults": s.faults, "in_bytes": s.in_bytes,
                "out_bytes": s.out_bytes, "evictions": s.evictions, "evicted_clean": s.evicted_clean,
                "errors": s.errors, "health": s.health,
                "last_error": (<bytes>s.last_error).decode("utf-8", "replace"),
                "policy": (<bytes>s.policy).decode(),
            })
        return found

    # ---- traces ----

    def trace_start(self, *, uint64_t session=0, int hnid=-1, uint64_t buffer_bytes=0):
        """EBUSY: there is a recording."""
        cdef gmem_core *core = self._enter()
        cdef gmem_trace_config config
        cdef int err
        config.session = session
        config.hnid = hnid
        config.buffer_bytes = buffer_bytes
        with nogil:
            err = gmem_trace_start(core, &config)
        self._leave()
        if err:
            _raise(err)

    def trace_stop(self):
        cdef gmem_core *core = self._enter()
        with nogil:
            gmem_trace_stop(core)
        self._leave()

    def trace_read(self, size_t most):
        """(records, lost): at most so many accesses that nobody has read yet, of 32 bytes each, and how many were lost so
        far."""
        cdef gmem_core *core
        cdef gmem_access *accesses
        cdef bytes records
        cdef uint64_t lost = 0
        cdef size_t count
        records = PyBytes_FromStringAndSize(NULL, most * sizeof(gmem_access))
        accesses = <gmem_access *>PyBytes_AS_STRING(records)
        core = self._enter()
        with nogil:
            count = gmem_trace_read(core, accesses, most, &lost)
        self._leave()
        return (records if count == most else records[: count * sizeof(gmem_access)]), lost

    def trace_close(self):
        """Stops, and gives the buffer back."""
        cdef gmem_core *core = self._enter()
        with nogil:
            gmem_trace_close(core)
        self._leave()

    # ---- events ----

    def event_fd(self):
        """Readable while events wait; the core's."""
        cdef gmem_core *core = self._enter()
        cdef int fd = gmem_event_fd(core)
        self._leave()
        return fd

    def read_events(self, int capacity=256):
        cdef size_t most = min(max(capacity, 1), _EVENT_BATCH_MAX), count
        cdef gmem_core *core
        cdef gmem_event *events = <gmem_event *>malloc(most * sizeof(gmem_event))
        if events is NULL:
            raise MemoryError
        try:
            core = self._enter()
            with nogil:
                count = gmem_event_read(core, events, most)
            self._leave()
            return [
                {
                    "type": _EVENTS.get(events[i].type, str(events[i].type)), "hnid": events[i].hnid,
                    "error": events[i].error, "session": events[i].session, "va": events[i].va,
                    "value": events[i].value,
                }
                for i in range(count)
            ]
        finally:
            free(events)
