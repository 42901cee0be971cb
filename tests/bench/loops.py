# SPDX-License-Identifier: Apache-2.0
"""The C loops of probe.c and floor.c for Python, and the kernels made of them. Addresses are plain ints, times
nanoseconds."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from typing import Any


def nothing() -> None:
    """A kernel."""


class FloorRange(ctypes.Structure):
    _fields_ = [
        ("at", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("page_bytes", ctypes.c_uint64),
        ("fd", ctypes.c_int),
    ]


def load(path: str) -> ctypes.CDLL:
    """probe.c and floor.c. Addresses are plain ints."""
    library = ctypes.CDLL(path)
    address, size, count, flag = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint, ctypes.c_bool
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "floor_create": (address, [flag]),
        "floor_attach": (flag, [address, size, size, ctypes.POINTER(FloorRange)]),
        "warm_map": (address, [size, flag, ctypes.POINTER(ctypes.c_int)]),
        "warm_unmap": (None, [address, size, ctypes.c_int]),
        "probe_prepare": (None, []),
        "probe_die_with_parent": (None, []),
        "probe_faults": (None, [address, address, size, ctypes.c_uint32, count, count, address, address]),
        "probe_touches": (size, [address, size, ctypes.c_uint32, flag, count, address]),
        "probe_copies": (size, [address, address, size, ctypes.c_uint32, count, address]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


@contextlib.contextmanager
def on_cpu(cpu: int) -> Iterator[None]:
    """The calling thread, and threads it starts, run on that CPU only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def device_faults(path: str, cpu: int, at: int, page_bytes: int, pages: int, rounds: int, nap_us: int) -> list[int]:
    library = load(path)
    library.probe_prepare()
    times = (ctypes.c_uint64 * (pages * rounds))()
    with on_cpu(cpu):
        library.probe_faults(at, None, page_bytes, pages, rounds, nap_us, ctypes.addressof(times), None)
    return list(times)


def device_touches(path: str, at: int, page_bytes: int, pages: int, nap_us: int) -> list[int]:
    library = load(path)
    library.probe_prepare()
    times = (ctypes.c_uint64 * pages)()
    library.probe_touches(at, page_bytes, pages, True, nap_us, ctypes.addressof(times))
    return list(times)
