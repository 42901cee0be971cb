# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, binding=False
"""Replays of gmem/replay.h, GIL released. gmemd/policy.py is the face of it."""

import os

from libc.stdint cimport uint8_t, uint32_t, uint64_t


cdef extern from "gmem/policy.h" nogil:
    const char *gmem_policy_name(size_t index)


cdef extern from "gmem/replay.h" nogil:
    enum:
        GMEM_VISIBLE_ALL
    struct gmem_accesses:
        size_t count
        uint32_t distinct
    struct gmem_replay_counts "gmem_replay":
        uint64_t misses, evicted_dirty, evicted_clean
    int gmem_accesses_init(gmem_accesses *, const uint64_t *, const uint8_t *, size_t)
    void gmem_accesses_deinit(gmem_accesses *)
    int gmem_replay(const gmem_accesses *, const char *, uint32_t, uint32_t, uint64_t, gmem_replay_counts *)
    int gmem_replay_opt(const gmem_accesses *, uint32_t, gmem_replay_counts *)
    int gmem_replay_static(const gmem_accesses *, uint32_t, gmem_replay_counts *)


def names():
    """Of the policies, the default first."""
    found = []
    while gmem_policy_name(len(found)) is not NULL:
        found.append((<bytes>gmem_policy_name(len(found))).decode())
    return tuple(found)


cdef class Accesses:
    """A trace, ready to be replayed any number of times. Both buffers have one element for each access."""

    cdef gmem_accesses _accesses
    cdef object _writes  # borrowed by the above
    cdef bint _ready

    def __cinit__(self, const uint64_t[::1] pages not None, const uint8_t[::1] writes not None):
        cdef const uint64_t *page = NULL
        cdef const uint8_t *write = NULL
        cdef size_t count = pages.shape[0]
        cdef int err
        if pages.shape[0] != writes.shape[0]:
            raise ValueError("pages and writes differ in length")
        if count:
            page, write = &pages[0], &writes[0]
        self._writes = writes
        with nogil:
            err = gmem_accesses_init(&self._accesses, page, write, count)
        if err:
            raise OSError(-err, os.strerror(-err))
        self._ready = True

    def __dealloc__(self):
        if self._ready:
            gmem_accesses_deinit(&self._accesses)

    @property
    def count(self):
        return self._accesses.count

    @property
    def distinct(self):
        return self._accesses.distinct

    def replay(self, str policy, uint32_t capacity, double visible=1.0, uint64_t seed=1):
        """(misses, evicted dirty, evicted clean). policy: one of names(), or "opt", or "static". visible: the share of
        hits that the policy is shown."""
        cdef bytes name = policy.encode()
        cdef const char *text = name
        cdef uint32_t shown = <uint32_t>(min(max(visible, 0.0), 1.0) * GMEM_VISIBLE_ALL)
        cdef gmem_replay_counts counts
        cdef int err
        if policy == "opt":
            with nogil:
                err = gmem_replay_opt(&self._accesses, capacity, &counts)
        elif policy == "static":
            with nogil:
                err = gmem_replay_static(&self._accesses, capacity, &counts)
        else:
            with nogil:
                err = gmem_replay(&self._accesses, text, capacity, shown, seed, &counts)
        if err:
            raise OSError(-err, os.strerror(-err))
        return counts.misses, counts.evicted_dirty, counts.evicted_clean
