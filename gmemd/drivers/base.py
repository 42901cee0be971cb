# SPDX-License-Identifier: Apache-2.0
"""What a driver written in Python looks like: the ops of csrc/include/gmem/driver.h as methods.

Subclassing Driver is a convenience; any object with the methods will do. An op that the object does not have is NULL in
the table, and the core does without it. Only `probe` and `info` are required.

How calls are made: from the core's threads, several at once, with the GIL taken for the call. Such a device is marked
SLOW by itself, so that threads which resolve page faults never wait for Python.

Memory is passed as a memoryview over the page itself, valid only until the method returns; keeping it, or an array made
from it, is an error and fails the op.

Errors: an OSError's errno is what the core sees; ValueError and TypeError in probe are a refusal of the configuration;
anything else is EIO. The text is kept for the log and for whoever asked for the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Info:
    """What info() returns. page_bytes are powers of two; caps are names as `gmemctl devices` prints them."""

    capacity_bytes: int
    page_bytes: Sequence[int] = (4096, 65536, 2 << 20)
    caps: Sequence[str] = ("peer",)
    bandwidth_bytes_per_s: int = 0  # of the link; 0 = memory speed
    latency_ns: int = 0  # of one copy
    assured_bytes: int = 0  # of the capacity, what fits whatever its content; 0: all of it


@dataclass(frozen=True)
class Usage:
    """What peer_usage() returns: what the pages that are stored take."""

    pages: int
    page_bytes: int  # their size before compression
    stored_bytes: int  # what they take, the allocator's waste included
    raw_pages: int = 0  # of pages, those stored as they are


class Driver:
    """A device that stores pages behind its own allocator, as every tier does, overrides the peer_* methods."""

    options: Mapping[str, str] = {}
    """Option names with one line each for people; check_options() refuses others."""

    def probe(self, name: str, config: Mapping[str, str]) -> None:
        """Opens the device. ValueError with a sentence refuses the configuration."""
        self.check_options(config)

    def info(self) -> Info:
        raise NotImplementedError

    def check_options(self, config: Mapping[str, str]) -> None:
        for key in config:
            if key not in self.options:
                known = ", ".join(sorted(self.options)) or "none"
                raise ValueError(f"unknown option {key!r}; known are {known}")

    # Further ops, with their signatures; not defined here because an op that exists is an op that gets called:
    #
    # remove() -> None
    # health() -> None                                     raises when the device is lost
    # last_error() -> str
    # peer_map(key: int, src: memoryview) -> None          stores a page under a key
    # peer_unmap(key: int, dst: memoryview) -> None        reads it back, and keeps it
    # peer_free(key: int, size: int) -> None               forgets it
    # peer_map_batch(pages: list[tuple[int, memoryview]]) -> Sequence[Exception | None] | None
    # peer_unmap_batch(pages: list[tuple[int, memoryview]]) -> Sequence[Exception | None] | None
    #     several pages, each with what befell it (None = all went well); raising says that no page was touched
    # peer_usage() -> Usage                                for operators
    # peer_hmemcpy(key: int, offset: int, buffer: memoryview, to_peer: bool) -> None
    # peer_va_alloc_fixed(va: int, size: int) -> None
    # peer_va_free(va: int, size: int) -> None
    # copy(pieces: list[tuple[memoryview, memoryview]], after: int) -> int | None    (dst, src); a fence, None = done
    # fill(dst: memoryview, byte: int) -> int | None
    # fence_wait(fence: int, timeout_ns: int) -> None
    # pmap_create(as_id: int) -> object                    the rest of pmap_* get that object
    # pmap_destroy(pmap) -> None
    # pmap_enter(pmap, va: int, size: int, frame: int, prot: int) -> None
    # pmap_release(pmap, va: int, size: int) -> None
    # pmap_protect(pmap, va: int, size: int, prot: int) -> None
    # tlb_invl(pmap, va: int, size: int) -> None
    # tlb_invl_coalesced(pmap, ranges: list[tuple[int, int]]) -> None
    # invalidate(as_id: int, va: int, size: int, cause: int, sequence: int) -> None
