# SPDX-License-Identifier: Apache-2.0
"""Files as unified memory: their bytes are read when something touches them, on whichever hnode, and written back by
flush()."""

from __future__ import annotations

import math
import os
import weakref
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gmem._errors import GmemError, InvalidArgument, NotSupported
from gmem._mapping import Mapping
from gmem._memory import (
    _BYTES_LIMIT,
    Shape,
    _check_fork,
    _checked_dtype,
    _checked_shape,
    _freed,
    empty,
    managed_extent,
    mapping_finalizers,
    page_bytes_of,
)  # fmt: skip
from gmem._session import Session, default

_CHUNK = 4 << 20
_PAGE = 4096
MODES = ("r", "r+", "w+", "c")
_ALSO = {"readonly": "r", "readwrite": "r+", "write": "w+", "copyonwrite": "c"}  # NumPy's other names
_FLAGS = {"r": os.O_RDONLY, "c": os.O_RDONLY, "r+": os.O_RDWR, "w+": os.O_RDWR | os.O_CREAT | os.O_TRUNC}

Path = str | os.PathLike[str]


def _checked_offset(offset: Any) -> int:
    if not isinstance(offset, (int, np.integer)) or isinstance(offset, bool) or not 0 <= offset < _BYTES_LIMIT:
        raise InvalidArgument(f"offset: {offset!r} is not a position in a file", argument="offset")
    return int(offset)


def _extents(left: int, dtype: np.dtype[Any], shape: Shape | None, may_grow: bool) -> tuple[int, ...]:
    """The shape of what is mapped; left: how many bytes the file has from the offset on."""
    if shape is None:
        if left < 0 or left % dtype.itemsize:
            raise InvalidArgument(f"offset: {left} bytes are no whole number of {dtype}", argument="offset")
        return (left // dtype.itemsize,)
    extents = _checked_shape(shape)
    nbytes = math.prod(extents) * dtype.itemsize
    if nbytes >= _BYTES_LIMIT:
        raise InvalidArgument(f"shape: {nbytes} bytes is 2^63 or more", argument="shape")
    if nbytes > left and not may_grow:
        raise InvalidArgument(f"shape: needs {nbytes} bytes, the file has {max(left, 0)} there", argument="shape")
    return extents


def flush(array: Any, session: Session | None = None) -> None:
    """Writes what was changed in the array's pages back to its file (modes "r+" and "w+"), and returns when it is on
    the disk. Memory of other kinds is passed over. What could not be written is still there, and goes with the next
    one."""
    session = session if session is not None else default()
    va, nbytes = managed_extent(array, session)
    if nbytes:
        session.request("flush", va=va, bytes=nbytes)


def _end(session: Session, address: int, nbytes: int) -> None:
    """The last array over it is gone, or the interpreter ends."""
    if session.closed:
        return

    def action() -> None:
        session.write_back(address)
        session.unmap(address, nbytes)

    _freed.free(action)


def _map(
    fd: int, mode: str, offset: int, nbytes: int, page_bytes: int, fork: str, session: Session
) -> tuple[Mapping, int]:
    """The mapping, and where in it the byte at offset is."""
    before = offset % _PAGE
    writes = mode in ("r+", "w+")
    address, size = session.map_file(fd, offset - before, before + nbytes, page_bytes, mode, fork)
    mapping = Mapping(address, before + nbytes)
    finalizer: weakref.finalize[Any, Any] = weakref.finalize(mapping, _end, session, address, size)
    finalizer.atexit = writes  # else the end of the process frees everything at once
    if writes:
        session.changed_files[address] = size
    session.mappings[address] = mapping
    mapping_finalizers[mapping] = finalizer
    return mapping, before


class memmap(np.ndarray[Any, Any]):  # noqa: N801 (as NumPy spells it)
    """An array over a file's bytes, as numpy.memmap has it, in unified memory: memmap(path, dtype, mode, offset,
    shape).

    Pages are read when the CPU or a kernel touches them, and those not changed are dropped without a copy when memory
    is short. mode: "r" read-only; "c" may be changed, the file stays as it is; "r+" flush() writes back, and so does
    the end of the last array over it, of the session and of the program (not a crash of it); "w+" creates or empties
    the file first. A shape beyond the file's end makes it longer ("r+"). path: or an open file. What others write to
    the file meanwhile is seen in pages that are read later. A page that can't be read, because the file was cut short
    or its disk fails, is SIGBUS at the touch.

    NotSupported: not a regular file of a local file system."""

    filename: str | None
    offset: int
    mode: str
    session: Session | None
    _gmem_plain = True  # kernels get it by address

    def __new__(
        cls, filename: Any, dtype: npt.DTypeLike = np.uint8, mode: str = "r+", offset: int = 0,
        shape: Shape | None = None, order: Literal["C", "F"] = "C", *, page_size: str | int | None = None,
        fork: str = "share", session: Session | None = None,
    ) -> memmap:  # fmt: skip
        mode = _ALSO.get(mode, mode)
        if mode not in MODES:
            raise InvalidArgument(f"mode: {mode!r} is none of {', '.join(MODES)}", argument="mode")
        if order not in ("C", "F"):
            raise InvalidArgument(f"order: {order!r} is neither C nor F", argument="order")
        if mode == "w+" and shape is None:
            raise InvalidArgument("shape: mode w+ needs one", argument="shape")
        checked, offset, page_bytes = _checked_dtype(dtype), _checked_offset(offset), page_bytes_of(page_size)
        _check_fork(fork)
        session = session if session is not None else default()
        opened = not hasattr(filename, "fileno")
        if opened:
            fd = os.open(filename, _FLAGS[mode] | os.O_CLOEXEC, 0o666)
        else:
            filename.flush()
            fd = filename.fileno()
        try:
            grows = mode in ("r+", "w+")
            left = os.fstat(fd).st_size - offset
            extents = _extents(left, checked, shape, grows)
            nbytes = math.prod(extents) * checked.itemsize
            if grows and nbytes > left:
                os.ftruncate(fd, offset + nbytes)
            if nbytes:
                mapping, start = _map(fd, mode, offset, nbytes, page_bytes, fork, session)
                self = super().__new__(cls, extents, checked, mapping, start, order=order)
            else:
                self = super().__new__(cls, extents, checked, order=order)
        finally:
            if opened:
                os.close(fd)
        self.flags.writeable = mode != "r"
        self.filename = os.path.abspath(os.fspath(filename)) if opened else getattr(filename, "name", None)
        self.offset, self.mode, self.session = offset, mode, session
        return self

    def __array_finalize__(self, obj: Any) -> None:
        """A view knows what its array does; what is computed from it is memory of its own."""
        shares = isinstance(obj, memmap) and np.may_share_memory(self, obj)
        self.filename = obj.filename if shares else None
        self.offset = obj.offset if shares else 0
        self.mode = obj.mode if shares else ""
        self.session = obj.session if shares else None

    def flush(self) -> None:
        """Writes what was changed back to the file; nothing happens in modes "r" and "c"."""
        if self.session is not None and self.mode in ("r+", "w+"):
            flush(self, self.session)


def from_file(
    path: Path, dtype: npt.DTypeLike = np.uint8, shape: Shape | None = None, *, offset: int = 0,
    page_size: str | int | None = None, fork: str = "share", session: Session | None = None,
) -> np.ndarray[Any, Any]:  # fmt: skip
    """A file's content, or `shape` elements of it from byte `offset` on, as an array that may be changed; the file
    stays as it is. It is read where and when it is touched (memmap(mode="c")); a file that can't be, of another machine
    or of a program, is read at once."""
    offset = _checked_offset(offset)
    checked, page_bytes = _checked_dtype(dtype), page_bytes_of(page_size)
    _check_fork(fork)
    with open(path, "rb", buffering=0) as file:
        extents = _extents(os.fstat(file.fileno()).st_size - offset, checked, shape, False)
        nbytes = math.prod(extents) * checked.itemsize
        if not nbytes:
            return empty(extents, checked)
        session = session if session is not None else default()
        try:
            mapping, start = _map(file.fileno(), "c", offset, nbytes, page_bytes, fork, session)
        except NotSupported:
            result = empty(extents, checked, page_size=page_size, fork=fork, session=session)
            _fill(file.fileno(), offset, result.reshape(-1).view(np.uint8), os.fspath(path))
            return result
        return np.frombuffer(mapping, checked, math.prod(extents), start).reshape(extents)


def _fill(fd: int, offset: int, target: np.ndarray[Any, Any], path: str) -> None:
    """Through a bounce buffer: read(2) straight into unified memory fails with EFAULT where userfaultfd serves user
    mode only."""
    bounce = np.empty(min(_CHUNK, target.nbytes), np.uint8)
    done = 0
    while done < target.nbytes:
        want = min(bounce.nbytes, target.nbytes - done)
        got = os.preadv(fd, [memoryview(bounce.data)[:want]], offset + done)
        if not got:
            raise GmemError(f"{path}: it became shorter while it was read")
        target[done : done + got] = bounce[:got]
        done += got
