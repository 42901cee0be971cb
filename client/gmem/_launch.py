# SPDX-License-Identifier: Apache-2.0
"""What goes between a client and its device process: pickles in which arrays of unified memory are addresses."""

from __future__ import annotations

import ctypes
import io
import os
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import cloudpickle
import numpy as np

from gmem._mapping import Mapping

# In the client: finds the mapping that keeps an address alive. In a device process nothing has to be kept.
_owner_of: Callable[[int], Mapping | None] = lambda address: None  # noqa: E731


def set_owner_lookup(lookup: Callable[[int], Mapping | None]) -> None:
    global _owner_of
    _owner_of = lookup


def view(
    address: int, nbytes: int, start: int, dtype: np.dtype[Any], shape: tuple[int, ...], strides: tuple[int, ...],
    writeable: bool,
) -> np.ndarray[Any, Any]:  # fmt: skip
    """The array of that dtype, shape and strides whose first element is at `start`, in [address, address + nbytes)."""
    mapping = _owner_of(address)
    if mapping is None or address + nbytes > mapping.address + mapping.nbytes:
        mapping = Mapping(address, nbytes)
    flat = np.frombuffer(mapping, np.uint8)
    result = np.ndarray(shape, dtype, flat, start - mapping.address, strides)
    if result.flags.writeable != writeable and not (writeable and mapping.read_only):
        result.flags.writeable = writeable
    return result


def _is_plain(kind: type) -> bool:
    return kind is np.ndarray or getattr(kind, "_gmem_plain", False)


class NotWhole(ValueError):
    """An array only a part of which is unified memory: a copy of it would be neither the one nor the other."""


class Pickler(cloudpickle.Pickler):
    """ranges: base and size of the session's addresses; arrays whole in one are sent as addresses, and collected in
    `arrays`."""

    def __init__(self, file: io.BytesIO, ranges: Sequence[tuple[int, int]]) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._ranges = [(base, base + size) for base, size in ranges]
        self.arrays: list[np.ndarray[Any, Any]] = []

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, np.ndarray) and _is_plain(type(obj)) and obj.size and not obj.dtype.hasobject:
            low, high = np.lib.array_utils.byte_bounds(obj)
            near = [(base, end) for base, end in self._ranges if base < high and low < end]
            if any(low < base or end < high for base, end in near):
                base, end = near[0]
                text = f"args: of the array at [0x{low:x}, 0x{high:x}) only [0x{base:x}, 0x{end:x})"
                raise NotWhole(f"{text} is adopted; pass that part, or adopt it with edges=True")
            if near:
                self.arrays.append(obj)
                start = obj.__array_interface__["data"][0]
                return view, (low, high - low, start, obj.dtype, obj.shape, obj.strides, obj.flags.writeable)
        if isinstance(obj, Mapping):
            return Mapping, (obj.address, obj.nbytes, obj.read_only)
        return super().reducer_override(obj)


def dumps(obj: Any, ranges: Sequence[tuple[int, int]]) -> tuple[bytes, list[np.ndarray[Any, Any]]]:
    file = io.BytesIO()
    pickler = Pickler(file, ranges)
    pickler.dump(obj)
    return file.getvalue(), pickler.arrays


loads = pickle.loads


class CFunction:
    """A C function of a shared object, as a kernel. Arrays are passed as pointers to their first element, ints as
    int64_t, floats as double, unless argtypes (ctypes types) says otherwise."""

    def __init__(
        self, path: str | os.PathLike[str], symbol: str, argtypes: Sequence[Any] | None = None, restype: Any = None
    ) -> None:
        self.path = os.path.abspath(os.fspath(path))
        self.symbol = symbol
        self.argtypes = tuple(argtypes) if argtypes is not None else None
        self.restype = restype

    def _argument(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return ctypes.c_void_p(value.__array_interface__["data"][0])
        if isinstance(value, Mapping):
            return ctypes.c_void_p(value.address)
        if self.argtypes is not None:
            return value
        if isinstance(value, (bool, int, np.integer)):
            return ctypes.c_int64(int(value))
        if isinstance(value, (float, np.floating)):
            return ctypes.c_double(float(value))
        return value

    def __call__(self, *args: Any) -> Any:
        function = getattr(ctypes.CDLL(self.path), self.symbol)
        function.argtypes = self.argtypes
        function.restype = self.restype
        return function(*[self._argument(value) for value in args])

    def __repr__(self) -> str:
        return f"<C kernel {self.symbol} of {self.path}>"


def cfunc(
    path: str | os.PathLike[str], symbol: str, argtypes: Sequence[Any] | None = None, restype: Any = None
) -> CFunction:
    """A kernel written in C, to be launched in a device context. It is loaded there, never in gmemd."""
    return CFunction(path, symbol, argtypes, restype)


def as_kernel(fn: Any) -> Callable[..., Any]:
    """A callable, or (path of a shared object, symbol)."""
    if callable(fn):
        return fn
    if isinstance(fn, tuple) and len(fn) == 2 and all(isinstance(part, (str, os.PathLike)) for part in fn):
        return cfunc(fn[0], str(fn[1]))
    raise TypeError(f"fn: {fn!r} is neither a callable nor a (path, symbol) pair")
