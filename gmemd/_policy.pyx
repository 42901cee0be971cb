# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, binding=False
"""Replays of gmem/replay.h, GIL released. gmemd/policy.py is the face of it."""

import errno
import os

from libc.stdint cimport uint8_t, uint32_t, uint64_t


cdef extern from "gmem/policy.h" nogil:
    const char *gmem_policy_name(size_t index)


cdef extern from "gmem/accesses.h" nogil:
    struct gmem_access:
        pass
    struct gmem_accesses:
        size_t uses, absent
        uint32_t distinct, pages
        uint64_t peak
        uint8_t unit_shift
    struct gmem_accesses_filter:
        int hnid
        uint32_t kinds, session
    int gmem_accesses_init(gmem_accesses *, const uint64_t *, const uint8_t *, size_t)
    int gmem_accesses_load(gmem_accesses *, const gmem_access *, size_t, const gmem_accesses_filter *)
    void gmem_accesses_deinit(gmem_accesses *)
    size_t gmem_access_check(const gmem_access *, size_t)


cdef extern from "gmem/replay.h" nogil:
    enum:
        GMEM_VISIBLE_ALL
    struct gmem_replay_counts "gmem_replay":
        uint64_t misses, evicted_dirty, evicted_clean, in_units, out_units, dropped_units
    int gmem_replay(const gmem_accesses *, const char *, uint64_t, uint32_t, uint64_t, gmem_replay_counts *)
    int gmem_replay_opt(const gmem_accesses *, uint64_t, gmem_replay_counts *)
    int gmem_replay_static(const gmem_accesses *, uint64_t, gmem_replay_counts *)


def names():
    """Of the policies, the default first."""
    found = []
    while gmem_policy_name(len(found)) is not NULL:
        found.append((<bytes>gmem_policy_name(len(found))).decode())
    return tuple(found)


def first_unsound(const uint8_t[::1] records not None):
    """Which of a trace's records can't be an access; None if all can."""
    cdef size_t count = records.shape[0] // sizeof(gmem_access), found
    if not count:
        return None
    with nogil:
        found = gmem_access_check(<const gmem_access *>&records[0], count)
    return None if found == count else found


cdef class Accesses:
    """A sequence of uses, ready to be replayed any number of times."""

    cdef gmem_accesses _accesses

    def __dealloc__(self):
        gmem_accesses_deinit(&self._accesses)

    @staticmethod
    def of_pages(const uint64_t[::1] pages not None, const uint8_t[::1] writes not None):
        """Both buffers have one element for each use; pages are all of one size."""
        cdef Accesses made = Accesses()
        cdef const uint64_t *page = NULL
        cdef const uint8_t *write = NULL
        cdef size_t count = pages.shape[0]
        cdef int err
        if pages.shape[0] != writes.shape[0]:
            raise ValueError("pages and writes differ in length")
        if count:
            page, write = &pages[0], &writes[0]
        with nogil:
            err = gmem_accesses_init(&made._accesses, page, write, count)
        if err:
            raise OSError(-err, os.strerror(-err))
        return made

    @staticmethod
    def of_records(const uint8_t[::1] records not None, int hnid, uint32_t kinds, uint32_t session=0):
        """What a trace says of one hnode; see struct gmem_accesses_filter. ValueError: something in it is no access."""
        cdef Accesses made = Accesses()
        cdef const gmem_access *first = NULL
        cdef size_t count = records.shape[0] // sizeof(gmem_access)
        cdef gmem_accesses_filter wanted
        cdef int err
        wanted.hnid, wanted.kinds, wanted.session = hnid, kinds, session
        if count:
            first = <const gmem_access *>&records[0]
        with nogil:
            err = gmem_accesses_load(&made._accesses, first, count, &wanted)
        if err == -errno.EINVAL:
            raise ValueError(f"record {first_unsound(records)} is no access")
        if err:
            raise OSError(-err, os.strerror(-err))
        return made

    @property
    def uses(self):
        return self._accesses.uses

    @property
    def absent(self):
        """Uses for which there was no copy when they were recorded."""
        return self._accesses.absent

    @property
    def stays(self):
        """Pages, counted anew when they come back from elsewhere or with new content."""
        return self._accesses.distinct

    @property
    def pages(self):
        return self._accesses.pages

    @property
    def peak(self):
        """The most units that were there at a time, if nothing is evicted."""
        return self._accesses.peak

    @property
    def unit_bytes(self):
        """Size of the smallest page; 1: unknown, as there is none or nobody said."""
        return 1 << self._accesses.unit_shift

    def replay(self, str policy, uint64_t capacity, double visible=1.0, uint64_t seed=1):
        """(misses, evicted dirty, evicted clean, units copied in, copied out, dropped). policy: one of names(), or "opt",
        or "static". capacity: units. visible: the share of hits that the policy is shown."""
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
        return (
            counts.misses, counts.evicted_dirty, counts.evicted_clean,
            counts.in_units, counts.out_units, counts.dropped_units,
        )
