# SPDX-License-Identifier: Apache-2.0
"""What policies would have made of a trace. Pure: no I/O, and the same counts each time."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gmemd._policy import Accesses, names

POLICIES: tuple[str, ...] = names()  # the default first
# Not policies: they know the future. OPT has the fewest misses there can be; "static" keeps the most used pages.
REFERENCES = ("opt", "static")


@dataclass(frozen=True)
class Result:
    policy: str
    capacity_pages: int  # of page_bytes
    accesses: int
    misses: int  # pages in
    evicted_dirty: int  # pages out
    evicted_clean: int
    in_bytes: int  # copied to it; nothing for pages that had no content yet
    out_bytes: int  # copied from it, also because another hnode wrote them
    dropped_bytes: int  # evicted clean
    page_bytes: int

    @property
    def capacity_bytes(self) -> int:
        return self.capacity_pages * self.page_bytes

    @property
    def miss_ratio(self) -> float:
        return self.misses / self.accesses if self.accesses else 0.0


class Trace:
    """Accesses to pages of one size: their numbers (uint64) and whether they wrote (uint8, 0 or 1), as buffers of one
    length. of_records() takes what was recorded, with pages of several sizes: page_bytes is the smallest one's then."""

    def __init__(self, pages: Any, writes: Any = None, page_bytes: int = 4096) -> None:
        if writes is None:
            writes = bytes(len(memoryview(pages)))
        self._accesses = Accesses.of_pages(pages, writes)
        self.page_bytes = page_bytes

    @classmethod
    def of(cls, accesses: Iterable[tuple[int, bool]], page_bytes: int = 4096) -> Trace:
        """From pairs of page and write."""
        pages, writes = array("Q"), bytearray()
        for page, write in accesses:
            pages.append(page)
            writes.append(write)
        return cls(pages, writes, page_bytes)

    @classmethod
    def of_records(cls, records: Any, hnid: int, kinds: int, session: int = 0) -> Trace:
        """From the records of gmemd.trace: uses on one hnode, of those kinds (bit k: kind k), and of one session unless
        that is 0. Pages that end, or that writes elsewhere take away, come back as others. ValueError: bad records."""
        trace = cls.__new__(cls)
        trace._accesses = Accesses.of_records(records, hnid, kinds, session)
        trace.page_bytes = trace._accesses.unit_bytes if trace._accesses.uses else 4096
        return trace

    def __len__(self) -> int:
        return self._accesses.uses

    @property
    def working_set(self) -> int:
        """How many different pages there are."""
        return self._accesses.pages

    @property
    def stays(self) -> int:
        """The misses of an hnode that is large enough."""
        return self._accesses.stays

    @property
    def absent(self) -> int:
        """Misses when it was recorded."""
        return self._accesses.absent

    @property
    def peak_bytes(self) -> int:
        """The least capacity that never evicts."""
        return self._accesses.peak * self.page_bytes

    def capacity(self, ratio: float) -> int:
        """Pages of an hnode whose working set is `ratio` times as large as it."""
        return max(1, round(self.working_set / ratio))


def replay(trace: Trace, policy: str, capacity_pages: int, *, visible: float = 1.0, seed: int = 1) -> Result:
    """One policy (or one of REFERENCES) on an hnode of so many pages, empty at first.

    visible is the share of hits that the policy is shown. On a live hnode a hit on a mapped page is invisible, apart
    from acquires and faults on pages that were unmapped to see whether they are used; 0 shows nothing but faults.
    ValueError: no such policy, or no capacity.
    """
    if policy not in POLICIES and policy not in REFERENCES:
        raise ValueError(f"policy: {policy!r} is unknown: one of {', '.join((*POLICIES, *REFERENCES))}")
    if not 1 <= capacity_pages < 1 << 32:
        raise ValueError(f"capacity_pages: {capacity_pages} is out of range: 1 to {(1 << 32) - 1}")
    if not 0 <= visible <= 1:
        raise ValueError(f"visible: {visible} is out of range: 0 to 1")
    misses, dirty, clean, *units = trace._accesses.replay(policy, capacity_pages, visible, seed)
    copied_in, copied_out, dropped = (count * trace.page_bytes for count in units)
    return Result(
        policy, capacity_pages, len(trace), misses, dirty, clean, copied_in, copied_out, dropped, trace.page_bytes
    )


def curve(
    trace: Trace, policies: Sequence[str], capacities: Sequence[int], *, visible: float = 1.0
) -> dict[str, list[Result]]:
    """For each policy one result for each capacity: its miss-ratio curve."""
    return {policy: [replay(trace, policy, c, visible=visible) for c in capacities] for policy in policies}
