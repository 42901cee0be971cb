# SPDX-License-Identifier: Apache-2.0
"""Unified memory: NumPy arrays whose address is valid on the CPU and in every device context of the session.

Arrays of up to 64 KiB share regions of 4 KiB pages, in whole pages: no two arrays share a page, so they migrate, are
advised and are discarded apart. Larger ones, and those with a page size or fork mode of their own, get a region each.
"""

from __future__ import annotations

import bisect
import math
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from gmem._errors import GmemError, InvalidArgument
from gmem._mapping import Mapping
from gmem._session import Session, default

PAGE_SIZES = {"4K": 4096, "64K": 65536, "2M": 2 << 20}
FORK_MODES = ("share", "none")
_SMALL_BYTES = 64 << 10
_ARENA_BYTES = 2 << 20
_ARENA_PAGE = 4096
_BYTES_LIMIT = 1 << 63

Shape = int | Sequence[int]


def page_bytes_of(page_size: str | int | None) -> int:
    """0 for None: gmemd chooses by the region's size."""
    if page_size is None:
        return 0
    value = PAGE_SIZES.get(page_size.upper(), -1) if isinstance(page_size, str) else page_size
    if value not in PAGE_SIZES.values():
        raise InvalidArgument(f"page_size: {page_size!r} is none of 4K, 64K, 2M", argument="page_size")
    return value


def _check_fork(fork: str) -> str:
    if fork not in FORK_MODES:
        raise InvalidArgument(f"fork: {fork!r} is none of {', '.join(FORK_MODES)}", argument="fork")
    return fork


class _Arena:
    """One region cut into runs of whole pages; first fit over a sorted list of free runs."""

    def __init__(self, session: Session) -> None:
        self.pid = os.getpid()
        self.base, self.size = session.map(_ARENA_BYTES, _ARENA_PAGE, "share")
        self._free = [(0, self.size)]

    def take(self, nbytes: int) -> int | None:
        for index, (start, end) in enumerate(self._free):
            if end - start >= nbytes:
                if end - start == nbytes:
                    del self._free[index]
                else:
                    self._free[index] = (start + nbytes, end)
                return self.base + start
        return None

    def give_back(self, address: int, nbytes: int) -> bool:
        """True if the whole arena is free now."""
        start, end = address - self.base, address - self.base + nbytes
        index = bisect.bisect(self._free, (start, end))
        if index < len(self._free) and self._free[index][0] == end:
            end = self._free.pop(index)[1]
        if index and self._free[index - 1][1] == start:
            index -= 1
            start = self._free.pop(index)[0]
        self._free.insert(index, (start, end))
        return (start, end) == (0, self.size)


class _Arenas:
    """The arenas of one session. Freed runs are discarded, so that what is handed out again reads zero."""

    def __init__(self) -> None:
        self._arenas: list[_Arena] = []

    def take(self, session: Session, nbytes: int) -> tuple[int, _Arena]:
        for arena in self._arenas:
            address = arena.take(nbytes) if arena.pid == os.getpid() else None
            if address is not None:
                return address, arena
        arena = _Arena(session)
        self._arenas.append(arena)
        address = arena.take(nbytes)
        assert address is not None
        return address, arena

    def give_back(self, session: Session, arena: _Arena, address: int, nbytes: int) -> None:
        session.request("discard", va=address, bytes=nbytes)
        if arena.give_back(address, nbytes) and len(self._arenas) > 1:
            self._arenas.remove(arena)
            session.unmap(arena.base, arena.size)


class _Freed:
    """Memory whose last array is gone. Finalisers run anywhere, also while this thread allocates: they only queue, and
    free at once if nobody else is at it; whoever is, goes on with what they queued."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._queue: deque[Callable[[], None]] = deque()

    def free(self, action: Callable[[], None]) -> None:
        self._queue.append(action)
        self.drain()

    def drain(self) -> None:
        while self._queue and self.lock.acquire(blocking=False):
            try:
                with suppress(IndexError, GmemError):
                    self._queue.popleft()()
            finally:
                self.lock.release()


_freed = _Freed()
_arenas: weakref.WeakKeyDictionary[Session, _Arenas] = weakref.WeakKeyDictionary()
mapping_finalizers: weakref.WeakKeyDictionary[Mapping, weakref.finalize[Any, Any]] = weakref.WeakKeyDictionary()


def _in_child() -> None:
    """Locks may have been held by threads that a forked child does not have."""
    _freed.lock = threading.Lock()


os.register_at_fork(after_in_child=_in_child)


def _free_run(session: Session, arena: _Arena, address: int, nbytes: int) -> None:
    # Arenas belong to the process that made them; a child that shares one has nothing to say about its runs.
    if not session.closed and arena.pid == os.getpid():
        _freed.free(lambda: _arenas[session].give_back(session, arena, address, nbytes))


def _free_region(session: Session, address: int, nbytes: int) -> None:
    # A region that a forked child shares is the child's mapping too: each process unmaps for itself.
    if not session.closed:
        _freed.free(lambda: session.unmap(address, nbytes))


def _take_run(session: Session, size: int) -> tuple[int, _Arena]:
    try:
        with _freed.lock:
            return _arenas.setdefault(session, _Arenas()).take(session, size)
    finally:
        _freed.drain()


def allocate(
    cls: type[Mapping], nbytes: int, page_size: str | int | None, fork: str, session: Session | None,
    name: str = "nbytes",
) -> Mapping:
    """nbytes of zeroed unified memory, freed when the mapping object (and every array over it) is gone."""
    if not isinstance(nbytes, (int, np.integer)) or isinstance(nbytes, bool) or not 0 < nbytes < _BYTES_LIMIT:
        raise InvalidArgument(f"{name}: {nbytes!r} bytes; at least 1 and less than 2^63", argument=name)
    nbytes = int(nbytes)
    page_bytes = page_bytes_of(page_size)
    _check_fork(fork)
    session = session if session is not None else default()
    if nbytes <= _SMALL_BYTES and not page_bytes and fork == "share":
        size = -(-nbytes // _ARENA_PAGE) * _ARENA_PAGE
        address, arena = _take_run(session, size)
        mapping = cls(address, nbytes)
        finalizer: weakref.finalize[Any, Any] = weakref.finalize(mapping, _free_run, session, arena, address, size)
    else:
        address, size = session.map(nbytes, page_bytes, fork)
        mapping = cls(address, nbytes)
        finalizer = weakref.finalize(mapping, _free_region, session, address, size)
    finalizer.atexit = False  # the end of the process frees everything at once
    session.mappings[address] = mapping
    mapping_finalizers[mapping] = finalizer
    return mapping


def _checked_dtype(dtype: npt.DTypeLike) -> np.dtype[Any]:
    try:
        checked = np.dtype(dtype)
    except TypeError as error:
        raise InvalidArgument(f"dtype: {error}", argument="dtype") from None
    if checked.hasobject:
        raise InvalidArgument("dtype: Python objects can't live in unified memory", argument="dtype")
    return checked


def _checked_shape(shape: Shape) -> tuple[int, ...]:
    try:
        raw = (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
    except TypeError:
        raise InvalidArgument(f"shape: {shape!r} is no extent or sequence of extents", argument="shape") from None
    for extent in raw:
        if not isinstance(extent, (int, np.integer)) or isinstance(extent, bool) or not 0 <= extent < _BYTES_LIMIT:
            raise InvalidArgument(f"shape: {extent!r} is not an extent of 0 to 2^63 - 1", argument="shape")
    return tuple(int(extent) for extent in raw)


def empty(
    shape: Shape, dtype: npt.DTypeLike = float, *, page_size: str | int | None = None, fork: str = "share",
    session: Session | None = None,
) -> np.ndarray[Any, Any]:  # fmt: skip
    """An ndarray in unified memory. Fresh memory reads zero, so this is zeros(), for the price of nothing."""
    checked, extents = _checked_dtype(dtype), _checked_shape(shape)
    nbytes = math.prod(extents) * checked.itemsize
    if nbytes == 0:
        return np.empty(extents, checked)  # nothing to map; there is no address to share either
    if nbytes >= _BYTES_LIMIT:
        raise InvalidArgument(f"shape: {nbytes} bytes is 2^63 or more", argument="shape")
    mapping = allocate(Mapping, nbytes, page_size, fork, session, "shape")
    return np.frombuffer(mapping, checked, count=math.prod(extents)).reshape(extents)


def zeros(shape: Shape, dtype: npt.DTypeLike = float, **options: Any) -> np.ndarray[Any, Any]:
    """An ndarray of zeros in unified memory; no page of it exists before it is touched."""
    return empty(shape, dtype, **options)


def full(shape: Shape, fill_value: Any, dtype: npt.DTypeLike | None = None, **options: Any) -> np.ndarray[Any, Any]:
    result = empty(shape, np.asarray(fill_value).dtype if dtype is None else dtype, **options)
    result[...] = fill_value
    return result


def array(values: Any, dtype: npt.DTypeLike | None = None, **options: Any) -> np.ndarray[Any, Any]:
    """A copy of an array-like in unified memory."""
    source = np.asarray(values, dtype)
    result = empty(source.shape, source.dtype, **options)
    result[...] = source
    return result


def extent_of(what: Any, name: str = "array") -> tuple[int, int]:
    """First address and length of what an array, a Buffer or an (address, nbytes) pair covers."""
    if isinstance(what, Mapping):
        if what.closed:
            raise InvalidArgument(f"{name}: the buffer is closed", argument=name)
        return what.address, what.nbytes
    if isinstance(what, np.ndarray):
        low, high = np.lib.array_utils.byte_bounds(what)
        return low, high - low
    if isinstance(what, tuple) and len(what) == 2 and all(isinstance(part, (int, np.integer)) for part in what):
        address, nbytes = int(what[0]), int(what[1])
        if not 0 <= address < 1 << 64 or not 0 < nbytes < _BYTES_LIMIT:
            raise InvalidArgument(f"{name}: {what!r} is not an address and a length", argument=name)
        return address, nbytes
    raise InvalidArgument(f"{name}: a {type(what).__name__} is no array, Buffer or (address, nbytes)", argument=name)


def managed_extent(what: Any, session: Session, name: str = "array") -> tuple[int, int]:
    """extent_of(), which must lie in unified memory."""
    address, nbytes = extent_of(what, name)
    if not (session.owns(address) and session.owns(address + max(nbytes, 1) - 1)):
        raise InvalidArgument(f"{name}: 0x{address:x} is not in unified memory", argument=name)
    return address, nbytes
