# SPDX-License-Identifier: Apache-2.0
"""What a workload is: arrays, and steps that run kernels on pieces of them. Every engine runs the same steps on the
same data and knows nothing else of the job, so the engines differ in how they manage memory, and in nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]
HUGE = 2 << 20

READ, WRITE, UPDATE = "read", "write", "update"  # WRITE: whatever was there before is not looked at


class Spec(NamedTuple):
    """An array: how it looks, in which pages gmem moves it, and whether no step ever writes it, or little of it."""

    shape: tuple[int, ...]
    dtype: Any
    page_bytes: int = HUGE
    constant: bool = False
    mostly_read: bool = False

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.shape[1:], dtype=np.int64)) * np.dtype(self.dtype).itemsize

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.row_bytes

    @property
    def held_bytes(self) -> int:
        """What it takes of memory that is managed in pages."""
        return -(-self.nbytes // self.page_bytes) * self.page_bytes


class Tile(NamedTuple):
    """Rows [first, last) of an array: what is copied in one go."""

    array: str
    first: int
    last: int

    def overlaps(self, other: Tile) -> bool:
        return self.array == other.array and self.first < other.last and other.first < self.last

    def contains(self, other: Tile) -> bool:
        return self.array == other.array and self.first <= other.first and other.last <= self.last


class Access(NamedTuple):
    """part: what of the tile is written, if not all of it. content: what of it there is before, if that is not all."""

    tile: Tile
    mode: str
    part: Tile | None = None
    content: Tile | None = None


class Step(NamedTuple):
    """kernel(*views of the accesses' tiles, *args)."""

    kernel: Callable[..., Any]
    accesses: tuple[Access, ...]
    args: tuple[Any, ...] = ()

    def views(self, arrays: Arrays) -> list[Array]:
        return [arrays[each.tile.array][each.tile.first : each.tile.last] for each in self.accesses]


class Workload(ABC):
    """One job. Its data is the same at every ratio; the memory is what varies."""

    name = ""
    kind = "regular"  # regular: steps are known and walk in order; skewed: some pages are hot; random: none is
    result = ""  # the array that the job is done for
    where = "device"  # whose memory it overflows: device, or host
    foresight: int | None = None  # how many steps ahead a program can know what it will need; None: all
    hints = True  # False: nothing could be told ahead
    warm_up = 1  # rounds until it is as it will stay

    @property
    @abstractmethod
    def specs(self) -> dict[str, Spec]:
        """Arrays by name."""

    @abstractmethod
    def fill(self, arrays: Arrays) -> None:
        """Writes the input; the same on each call. Arrays not written are zero."""

    @abstractmethod
    def steps(self, round: int) -> list[Step]:
        """The job, once. Called for rounds 0, 1, ... in turn; each starts from what the round before has left."""

    def used(self, step: Step) -> Array | None:
        """What a step looks at of the array that it gets first, in its order, if that is not all of it."""
        return None

    @abstractmethod
    def check(self, arrays: Arrays, round: int) -> str | None:
        """Compares the result of that round with one that was computed in another way; what is wrong, if anything."""

    @property
    def nbytes(self) -> int:
        return sum(spec.held_bytes for spec in self.specs.values())

    def capacity(self, percent: int) -> int:
        """Memory of which the data is that many percent, in whole huge pages."""
        return int(self.nbytes * 100 / percent) // HUGE * HUGE


def whole(array: str, spec: Spec) -> Tile:
    return Tile(array, 0, spec.shape[0])


def differs(have: Array, want: Array, tolerance: float, what: str) -> str | None:
    """Relative to the largest value expected; not a number differs from everything."""
    scale = float(np.abs(want).max()) or 1.0
    worst = float(np.abs(have - want).max()) / scale
    return None if worst <= tolerance else f"{what}: off by {worst:.3g} of the largest value"
