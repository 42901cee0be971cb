# SPDX-License-Identifier: Apache-2.0
"""Plain memory for the jobs written by hand: mapped in full, in huge pages where they can be had, and shared with the
process that runs the kernels."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from workloads.workload import HUGE, Array, Spec

_mapped: dict[str, Array] = {}  # in the process that runs kernels


class Window(NamedTuple):
    """An array in an arena, as it is sent to the process that runs kernels."""

    path: str
    offset: int
    shape: tuple[int, ...]
    dtype: str

    def open(self) -> Array:
        memory = _mapped.get(self.path)
        if memory is None:
            memory = _mapped[self.path] = _map(os.open(self.path, os.O_RDWR))
        return window(memory, self.offset, self.shape, self.dtype)


class Arena:
    def __init__(self, nbytes: int) -> None:
        self._fd = _memfd(-(-nbytes // HUGE) * HUGE)
        self.path = f"/proc/{os.getpid()}/fd/{self._fd}"
        self.memory = _map(self._fd)
        self.memory[::4096] = 0  # present before anything is measured

    def array(self, offset: int, shape: tuple[int, ...], dtype: Any) -> Array:
        return window(self.memory, offset, shape, dtype)

    def window(self, offset: int, shape: tuple[int, ...], dtype: Any) -> Window:
        return Window(self.path, offset, shape, np.dtype(dtype).str)

    def close(self) -> None:
        os.close(self._fd)  # the memory goes with its last array


def run(kernel: Callable[..., Any], windows: list[Window], args: tuple[Any, ...]) -> None:
    """In the process that runs kernels."""
    kernel(*(each.open() for each in windows), *args)


def forget(path: str) -> None:
    """In the process that runs kernels: the arena is of no more use."""
    _mapped.pop(path, None)


def plain(specs: dict[str, Spec]) -> dict[str, Array]:
    """Arrays of ordinary anonymous memory, of which nothing has been touched."""
    arrays = {}
    for name, spec in specs.items():
        memory = mmap.mmap(-1, spec.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        arrays[name] = window(np.frombuffer(memory, np.uint8), 0, spec.shape, spec.dtype)
    return arrays


def window(memory: Array, offset: int, shape: tuple[int, ...], dtype: Any) -> Array:
    count = int(np.prod(shape, dtype=np.int64))
    return np.frombuffer(memory, dtype, count, offset).reshape(shape)


def _memfd(nbytes: int) -> int:
    fd = os.memfd_create("workload-huge", os.MFD_HUGETLB)
    try:
        os.ftruncate(fd, nbytes)
        mmap.mmap(fd, nbytes).close()  # reserves them, or is refused
        return fd
    except OSError:
        os.close(fd)
    fd = os.memfd_create("workload")
    os.ftruncate(fd, nbytes)
    return fd


def _map(fd: int) -> Array:
    return np.frombuffer(mmap.mmap(fd, os.fstat(fd).st_size), np.uint8)
