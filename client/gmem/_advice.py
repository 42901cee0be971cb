# SPDX-License-Identifier: Apache-2.0
"""Where memory is, and where it should be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from gmem._cuda import CudaContext, context_of
from gmem._device import Context, Device
from gmem._device import device as find_device
from gmem._errors import InvalidArgument
from gmem._fence import Fence
from gmem._memory import managed_extent
from gmem._session import Session, default

ADVICE = (
    "discard", "prefetch", "pinned", "unpinned", "read_mostly", "no_read_mostly", "preferred", "cold", "accessed_by",
    "not_accessed_by",
)  # fmt: skip
_ALSO = {"preferred_location": "preferred", "will_need": "prefetch", "dont_need": "discard"}  # what others call it
_LOCAL = ("prefetch", "pinned", "cold", "accessed_by", "not_accessed_by")
STATES = ("NOMAP", "RESIDENT", "BUSY", "POISONED")
DIRTY, PINNED, WILLNEED, READ_MOSTLY, REFERENCED = 1, 2, 4, 8, 16
PAGE_DTYPE = np.dtype(
    [("state", "u1"), ("writer", "i1"), ("valid", "u2"), ("flags", "u1"), ("page_shift", "u1"), ("why", "u2")]
)
_SPAN = 65536 * 4096  # bytes a request asks about: a whole number of pages of any size


Args = dict[str, Any]


def _prefetch_args(session: Session, array: Any, device: Any) -> Args:
    va, nbytes = managed_extent(array, session)
    return {"hnid": session.hnid(device), "va": va, "bytes": nbytes}


def prefetch(array: Any, device: Any, session: Session | None = None) -> None:
    """Moves an array, Buffer or (address, nbytes) to a device (name, hnid or Device) or to "host", by whole pages.
    Afterwards the device does not fault on it."""
    session = session if session is not None else default()
    session.request("prefetch", **_prefetch_args(session, array, device))


def prefetch_async(array: Any, device: Any, *, stream: int = 0, session: Session | None = None) -> Fence:
    """prefetch() without waiting. Requests of one stream (0 to 32767) are done in order, other streams go on meanwhile;
    the fence raises what went wrong."""
    session = session if session is not None else default()
    return session.start("prefetch", stream, array, **_prefetch_args(session, array, device))


def _advise_args(session: Session, array: Any, advice: str, device: Any) -> Args:
    advice = _ALSO.get(advice, advice)
    if advice not in ADVICE:
        raise InvalidArgument(f"advice: {advice!r} is none of {', '.join(ADVICE)}", argument="advice")
    va, nbytes = managed_extent(array, session)
    hnid = -1 if device is None else session.hnid(device)
    if hnid < 0 and advice in _LOCAL:
        raise InvalidArgument(f"device: {advice} needs one", argument="device")
    return {"hnid": hnid, "va": va, "bytes": nbytes, "advice": advice}


def advise(array: Any, advice: str, device: Any = None, session: Session | None = None) -> None:
    """One of ADVICE.

    "prefetch" ("will_need") and "pinned" need the device to move to, "cold" the one where it shall be the first to
    leave, "accessed_by" the one that will use all of it and shall fetch far ahead. "preferred" ("preferred_location")
    says where it is best kept, None takes that back: it leaves there last, and goes there when it has to leave
    elsewhere. "read_mostly" keeps a copy wherever it is read. "discard" ("dont_need") drops the content. What
    "preferred", "read_mostly" and "accessed_by" say holds for pages that are first touched later, too."""
    session = session if session is not None else default()
    session.request("advise", **_advise_args(session, array, advice, device))


def advise_async(
    array: Any, advice: str, device: Any = None, *, stream: int = 0, session: Session | None = None
) -> Fence:
    """advise() without waiting, as prefetch_async()."""
    session = session if session is not None else default()
    return session.start("advise", stream, array, **_advise_args(session, array, advice, device))


def discard(array: Any, session: Session | None = None) -> None:
    """Drops the content of every page that lies in it whole; they read zero then."""
    session = session if session is not None else default()
    va, nbytes = managed_extent(array, session)
    session.request("discard", va=va, bytes=nbytes)


def _memcpy_args(session: Session, dst: Any, src: Any, device: Any) -> Args:
    to, size = managed_extent(dst, session, "dst")
    source, source_size = managed_extent(src, session, "src")
    if size != source_size:
        raise InvalidArgument(f"src: {source_size} bytes, dst has {size}", argument="src")
    return {"hnid": -1 if device is None else session.hnid(device), "dst": to, "src": source, "bytes": size}


def memcpy(dst: Any, src: Any, device: Any = None, session: Session | None = None) -> None:
    """Copies src to dst, wherever their pages are; dst is on `device` afterwards (default: the host). Same size, not
    overlapping."""
    session = session if session is not None else default()
    session.request("hmemcpy", **_memcpy_args(session, dst, src, device))


def memcpy_async(
    dst: Any, src: Any, device: Any = None, *, stream: int = 0, session: Session | None = None
) -> Fence:
    """memcpy() without waiting, as prefetch_async()."""
    session = session if session is not None else default()
    return session.start("hmemcpy", stream, (dst, src), **_memcpy_args(session, dst, src, device))


def where(array: Any, session: Session | None = None) -> np.ndarray[Any, Any]:
    """The page map: one PAGE_DTYPE record for each logical page that overlaps the array. valid: bit h is set if hnode h
    has a valid copy. writer: the hnid that may write, -1 if none. state: index into STATES."""
    session = session if session is not None else default()
    va, nbytes = managed_extent(array, session)
    end, parts = va + max(nbytes, 1), []
    while va < end:
        # at most as many pages as a request may ask for, whatever their size; the next begins on a page's border
        stop = min(end, (va // _SPAN + 1) * _SPAN)
        parts.append(np.frombuffer(session.request("query", va=va, bytes=stop - va)["pages"], PAGE_DTYPE))
        va = stop
    return np.concatenate(parts) if len(parts) > 1 else parts[0].copy()


_MODES = ("r", "rw", "w")


def _context(what: Any, session: Session | None) -> Context | CudaContext:
    if isinstance(what, (Context, CudaContext)):
        return what
    device = what if isinstance(what, Device) else find_device(what, session)
    if not device.in_process:
        raise InvalidArgument(f"context: {device.name} needs an open context, not only its name", argument="context")
    return context_of(device._session, device)


@contextmanager
def acquire(
    context: Any, *arrays: Any, mode: str | None = None, write: bool | None = None, stream: Any = None,
    session: Session | None = None,
) -> Iterator[Any]:
    """Holds arrays on a context's device: migrated, mapped, and not taken away until the end of the block.

    context: an open one; for an NVIDIA GPU its device (or name or hnid) will do. mode: "r", "rw" (default), or "w" for
    what the block writes whole, whose content need not be copied (write=False is mode="r"). On an NVIDIA GPU the block
    gets their DeviceViews (a tuple, or the one), with `__cuda_array_interface__` and `__dlpack__`, and the arrays are
    let go when all that is on `stream` at its end has been done: a PyTorch, CuPy or Numba stream, or a CUstream as a
    number (default: the legacy default stream). The CPU must not touch them in the block: it would wait for its end."""
    if mode is not None and mode not in _MODES:
        raise InvalidArgument(f"mode: {mode!r} is none of {', '.join(_MODES)}", argument="mode")
    mode = mode or ("r" if write is False else "rw")
    opened = _context(context, session)
    ranges = [managed_extent(array, opened._session) for array in arrays]
    if not ranges:
        raise InvalidArgument("arrays: nothing to acquire", argument="arrays")
    if isinstance(opened, CudaContext):
        with opened.acquired(arrays, mode, stream) as views:
            yield views if len(views) > 1 else views[0]
        return
    opened.acquire(ranges, mode != "r")
    try:
        yield None
    finally:
        opened.release(ranges)


def stats(session: Session | None = None) -> dict[str, Any]:
    """The daemon's counters, and under "hnodes" those of each hnode."""
    return (session if session is not None else default()).stats()
