# SPDX-License-Identifier: Apache-2.0
"""Contexts on NVIDIA GPUs: this process's own, in which arrays of unified memory keep their addresses.

A GPU can't replay a page fault, so what it touches is acquired before and released after. A release goes with an event
on the stream: it takes effect when the work before it is done, and nobody waits. What the GPU frameworks get are views:
the same pointer, described to them by `__cuda_array_interface__` and DLPack.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from gmem._client import ffi, lib
from gmem._errors import Busy, ContextLost, GmemError, InvalidArgument, NotSupported, from_errno
from gmem._fence import Fence
from gmem._mapping import Mapping
from gmem._memory import managed_extent
from gmem._session import Session

_LOOK_NS = 200_000_000
_IN_THE_WAY = (errno.ENOMEM, errno.ENOSPC, errno.EBUSY, errno.EAGAIN)
_DLPACK_CUDA = 2
_DLPACK_CODES = {"i": 0, "u": 1, "f": 2, "c": 5, "b": 6}


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )  # fmt: skip


class _DLManaged(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_DLManaged))
_DLManaged._fields_ = (("tensor", _DLTensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)

# What consumers hold until they call the deleter, by the address of its DLManagedTensor.
_lent: dict[int, Any] = {}


@_Deleter
def _take_back(managed: Any) -> None:
    _lent.pop(ctypes.addressof(managed.contents), None)


def _stream_number(stream: Any) -> int:
    """The CUstream of a PyTorch, CuPy or Numba stream, or a number; None: the legacy default stream."""
    if stream is None:
        return 0
    for name in ("cuda_stream", "ptr", "handle"):  # torch, CuPy, Numba
        value = getattr(stream, name, None)
        if value is not None:
            return int(getattr(value, "value", value) or 0)
    try:
        number = int(stream)
    except (TypeError, ValueError):
        text = f"stream: {stream!r} is no stream of PyTorch, CuPy or Numba, and no number"
        raise InvalidArgument(text, argument="stream") from None
    if not 0 <= number < 1 << 64:
        raise InvalidArgument(f"stream: {number} is no address", argument="stream")
    return number


class DeviceView:
    """An array as the GPU's frameworks take it, at its own address. Valid while the array is acquired."""

    def __init__(self, array: np.ndarray[Any, Any] | Mapping, ordinal: int, stream: int, writeable: bool) -> None:
        source = array if isinstance(array, np.ndarray) else np.frombuffer(array, np.uint8)
        self.array = source
        self.shape: tuple[int, ...] = source.shape
        self.dtype: np.dtype[Any] = source.dtype
        self.strides: tuple[int, ...] = source.strides
        self.nbytes: int = source.nbytes
        self.ptr: int = source.__array_interface__["data"][0]
        self._ordinal = ordinal
        self._stream = stream
        self._writeable = writeable and source.flags.writeable

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape, "typestr": self.dtype.str, "data": (self.ptr, not self._writeable), "version": 3,
            "strides": None if self.array.flags.c_contiguous else self.strides, "descr": self.dtype.descr,
            "stream": self._stream or 1,
        }  # fmt: skip

    def __dlpack_device__(self) -> tuple[int, int]:
        return _DLPACK_CUDA, self._ordinal

    def __dlpack__(self, *, stream: Any = None, **_: Any) -> Any:
        """A capsule of the unversioned protocol. What is mapped is in place when acquire() has returned: no stream has
        to wait for another one here."""
        if self.dtype.kind not in _DLPACK_CODES or self.dtype.byteorder == ">":
            raise NotSupported(f"array: DLPack has no dtype {self.dtype}", argument="array")
        if not self._writeable:
            text = "array: DLPack can't say that it is read-only; acquire it with mode='rw'"
            raise NotSupported(text, argument="array")
        if any(step % self.dtype.itemsize for step in self.strides):
            raise NotSupported("array: DLPack counts strides in elements", argument="array")
        count = len(self.shape)
        shape = (ctypes.c_int64 * count)(*self.shape)
        strides = (ctypes.c_int64 * count)(*(step // self.dtype.itemsize for step in self.strides))
        managed = _DLManaged()
        managed.tensor = _DLTensor(
            self.ptr, _DLPACK_CUDA, self._ordinal, count, _DLPACK_CODES[self.dtype.kind], self.dtype.itemsize * 8, 1,
            ctypes.cast(shape, ctypes.POINTER(ctypes.c_int64)), ctypes.cast(strides, ctypes.POINTER(ctypes.c_int64)), 0,
        )  # fmt: skip
        managed.deleter = _take_back
        address = ctypes.addressof(managed)
        _lent[address] = (managed, shape, strides, self)
        try:
            return _new_capsule(address, b"dltensor", None)
        except BaseException:
            del _lent[address]
            raise

    def __repr__(self) -> str:
        return f"<gmem.DeviceView {self.shape} {self.dtype} at 0x{self.ptr:x}>"


_OPENINGS = 4


class CudaContext:
    """This process's primary context on a GPU, for arrays of unified memory. Usable from several threads."""

    def __init__(self, session: Session, device: Any) -> None:
        self._session = session
        self.device = device
        self.pid = os.getpid()
        self._link = ffi.NULL
        self._cuda = ffi.NULL
        self._check_process()
        with session._layout:  # so that the context that is new there is ours
            self._open_again_if_killed()
        self.ordinal: int = lib.gmem_cuda_ordinal(self._cuda)
        self._fences: deque[tuple[int, Fence, Any]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        session.contexts.add(self)

    def _check_process(self) -> None:
        message = ffi.new("char[]", lib.GMEM_WIRE_MESSAGE_BYTES)
        err = lib.gmem_cuda_check(message)
        if err:
            raise from_errno(-err, _text(message), "device")

    def _ids(self) -> set[int]:
        return {
            context["context"] for context in self._session.request("contexts")["contexts"]
            if context["pid"] == self.pid and context["hnid"] == self.device.hnid
        }  # fmt: skip

    def _open_again_if_killed(self) -> None:
        """What was being opened when gmemd was killed may be nothing that its successor knows of."""
        for _ in range(_OPENINGS - 1):
            with contextlib.suppress(ContextLost):
                return self._open()
        return self._open()

    def _open(self) -> None:
        message = ffi.new("char[]", lib.GMEM_WIRE_MESSAGE_BYTES)
        link, cuda = ffi.new("struct gmem_link **"), ffi.new("struct gmem_cuda **")
        before = self._ids()
        err = lib.gmem_link_open_context(
            os.fsencode(self._session.path), self._session.token, self.device.name.encode(), link, message
        )
        if err:
            raise from_errno(-err, _text(message) or os.strerror(-err), "device")
        try:
            fresh = self._ids() - before
            if not fresh:
                raise ContextLost("gmemd has lost the context already")
            self.context_id = max(fresh)
            err = lib.gmem_cuda_open(self._session._link, link[0], self.context_id, cuda, message)
            if err:
                raise from_errno(-err, _text(message) or os.strerror(-err), "device")
        except BaseException:
            lib.gmem_link_close(link[0])
            raise
        self._link, self._cuda = link[0], cuda[0]

    def _check_usable(self) -> None:
        if self.pid != os.getpid():
            text = "the context belongs to the parent process, and CUDA does not survive a fork"
            raise ContextLost(text, errno=errno.ECANCELED)
        if self._closed:
            raise ContextLost("the context is closed")
        what = ffi.new("char[]", lib.GMEM_WIRE_MESSAGE_BYTES)
        if lib.gmem_cuda_status(self._cuda, what):
            raise ContextLost(f"the context on {self.device.name} is lost: {_text(what)}")

    # ---- acquire, release ----

    def acquire(self, ranges: Sequence[tuple[int, int]], write: bool) -> None:
        """Migrates and maps ranges, and holds them on the device. Waits for work whose memory is in the way."""
        while True:
            self._check_usable()
            with self._changed:
                waits_for = self._fences[0][1] if self._fences else None
            try:
                self._session.request("acquire", context=self.context_id, ranges=[list(r) for r in ranges], write=write)
                return
            except GmemError as error:
                self._check_usable()  # says better why
                if error.errno == errno.ENOENT:
                    raise ContextLost(f"the context on {self.device.name} is lost: gmemd has ended it") from None
                if error.errno == errno.EOPNOTSUPP:
                    text = "array: a CUDA device takes pages of 2 MiB of gmem's own: allocate it with page_size='2M'"
                    raise NotSupported(text, argument="array") from None
                if waits_for is None or error.errno not in _IN_THE_WAY:
                    raise
            with suppress(GmemError, TimeoutError):
                waits_for.wait(1.0)

    def release(
        self, ranges: Sequence[tuple[int, int]], stream: Any = None, keep: Any = None, result: Any = None
    ) -> Fence:
        """Lets ranges go when what is on the stream by now is done, which the fence tells."""
        number = _stream_number(stream)
        flat = ffi.new("uint64_t[]", [part for r in ranges for part in r])
        ticket = ffi.new("uint64_t *")
        fence = Fence(keep)
        with self._changed:  # fences in the order of their tickets
            if self._closed:
                raise ContextLost("the context is closed")
            err = lib.gmem_cuda_release(self._cuda, number, flat, len(ranges), ticket)
            if ticket[0]:
                self._fences.append((ticket[0], fence, result))
                if self._thread is None:
                    self._thread = threading.Thread(target=self._complete, name=f"gmem-{self.device.name}", daemon=True)
                    self._thread.start()
                self._changed.notify_all()
        if err and not ticket[0]:
            raise from_errno(-err, "release: out of memory")
        return fence

    @contextmanager
    def acquired(self, arrays: Sequence[Any], mode: str, stream: Any) -> Iterator[tuple[DeviceView, ...]]:
        """Views of arrays that are held on the device until the stream has come to the end of the block."""
        number = _stream_number(stream)
        ranges = [managed_extent(array, self._session) for array in arrays]
        if mode == "w":
            self._drop_content(ranges)
        self.acquire(ranges, mode != "r")
        try:
            yield tuple(DeviceView(array, self.ordinal, number, mode != "r") for array in arrays)
        finally:
            self.release(ranges, number, arrays)

    def _drop_content(self, ranges: Sequence[tuple[int, int]]) -> None:
        """What is about to be written whole is not copied: pages that lie in it whole begin as zeros. Those that are
        held are on the device, so there is nothing to be saved."""
        for va, nbytes in ranges:
            with suppress(Busy):
                self._session.request("discard", va=va, bytes=nbytes)

    # ---- launching ----

    def launch(self, fn: Any, *args: Any, stream: Any = None, **keywords: Any) -> Fence:
        """Calls fn(*args, **keywords) in this thread, with views in place of arrays in unified memory, which are held
        on the device until what fn has put on the stream is done. The fence's result is what fn returned."""
        self._check_usable()
        arrays = [a for a in (*args, *keywords.values()) if self._is_managed(a)]
        number = _stream_number(stream)
        writes = [managed_extent(a, self._session) for a in arrays if _writeable(a)]
        reads = [managed_extent(a, self._session) for a in arrays if not _writeable(a)]
        held: list[tuple[int, int]] = []

        def swapped(value: Any) -> Any:
            return DeviceView(value, self.ordinal, number, True) if self._is_managed(value) else value

        try:
            for ranges, write in ((writes, True), (reads, False)):
                if ranges:
                    self.acquire(ranges, write)
                    held += ranges
            value = fn(*map(swapped, args), **{name: swapped(value) for name, value in keywords.items()})
        except BaseException:
            if held:
                self.release(held, number)
            raise
        return self.release(held, number, (args, keywords), value)

    def _is_managed(self, value: Any) -> bool:
        if isinstance(value, Mapping):
            return self._session.owns(value.address)
        if not isinstance(value, np.ndarray) or not value.size:
            return False
        return self._session.owns(value.__array_interface__["data"][0])

    def synchronize(self) -> None:
        """Waits until everything that was released so far is done. Errors stay with their fences."""
        self._check_process()
        with self._changed:
            last = self._fences[-1][1] if self._fences else None
        if last is not None:
            with suppress(GmemError):
                last.wait()

    def _complete(self) -> None:
        """The thread that completes fences. Releases do not wait for it: it needs the interpreter lock."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._fences or self._closed)
                if not self._fences:
                    return
                ticket, fence, result = self._fences[0]
            err = lib.gmem_cuda_wait(self._cuda, ticket, _LOOK_NS)
            if err == -errno.ETIMEDOUT:
                continue
            with self._changed:
                self._fences.popleft()
                self._changed.notify_all()
            if err:
                what = ffi.new("char[]", lib.GMEM_WIRE_MESSAGE_BYTES)
                lib.gmem_cuda_status(self._cuda, what)
                fence._fail(ContextLost(f"the context on {self.device.name} is lost: {_text(what)}"))
            else:
                fence._complete(result)

    def close(self) -> None:
        """Waits for what was released, and takes everything out of the GPU's address space. Does nothing in a child."""
        if self.pid != os.getpid() or self._closed:
            return
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        lib.gmem_cuda_close(self._cuda)
        lib.gmem_link_close(self._link)

    def __enter__(self) -> CudaContext:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _writeable(value: Any) -> bool:
    return value.flags.writeable if isinstance(value, np.ndarray) else True


def _text(buffer: Any) -> str:
    return ffi.string(buffer).decode(errors="replace")


_opened: weakref.WeakKeyDictionary[Session, dict[int, CudaContext]] = weakref.WeakKeyDictionary()
_opening = threading.Lock()


def context_of(session: Session, device: Any) -> CudaContext:
    """The context that gmem.acquire(device, ...) uses: one for each device of a session, opened on first use."""
    with _opening:
        known = _opened.setdefault(session, {})
        context = known.get(device.hnid)
        if context is None or context._closed or context.pid != os.getpid():
            context = known[device.hnid] = CudaContext(session, device)
        return context
