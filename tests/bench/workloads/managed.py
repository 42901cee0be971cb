# SPDX-License-Identifier: Apache-2.0
"""The job on gmem. Without hints it is kernels over arrays and nothing else. With them the program says what it
knows, in the calls that docs/user.md has: what is never written, what comes next, what is no longer needed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import gmem
import numpy as np

from workloads import paged, pins
from workloads.engine import TIMEOUT_S, Engine
from workloads.launcher import Fence, Launcher, Thread
from workloads.plan import Move, Moves, Plan
from workloads.workload import Array, Step, Tile, Workload

COUNTERS = (
    "host_faults", "device_faults", "h2d_bytes", "d2h_bytes", "evictions", "evicted_clean", "ahead_pages",
    "prefetched_pages", "discarded_pages", "migration_ns", "fault_ns",
)  # fmt: skip
TOLD_BYTES = 256 << 10  # a request for less costs as much as its fault
KEPT_FREE = 32  # a part in so many that is left to reclaim, which makes room ahead


class Managed(Engine):
    """device: its name; None for kernels on the CPU, in memory that `host.limit` keeps to the capacity."""

    def __init__(
        self, workload: Workload, capacity: int, rounds: int, session: gmem.Session, device: str | None, hints: bool
    ) -> None:
        super().__init__(workload, capacity, rounds)
        self.session, self.hints = session, hints
        self.place = session.hnid(device or "host")  # a name would be looked up in each call
        self._stack = ExitStack()
        self.arrays = {
            name: gmem.empty(spec.shape, spec.dtype, page_size=spec.page_bytes, session=session)
            for name, spec in workload.specs.items()
        }
        workload.fill(self.arrays)
        self.context: gmem.Context | None = None
        self._launcher: Launcher
        if device:
            self.context = self._launcher = gmem.device(device, session).context()
            self._stack.callback(self.context.close)
        else:
            thread = self._launcher = Thread()
            self._stack.callback(thread.close)
        self._round = None
        self._told: list[gmem.Fence] = []
        if hints:
            self._say()

    def _say(self) -> None:
        own = getattr(self.workload, "hint", None)
        self._round = own(self) if own else None
        for name, spec in self.workload.specs.items():
            if spec.constant or spec.mostly_read:
                gmem.advise(self.arrays[name], "read_mostly", session=self.session)
        if not own:
            self._plan()

    def _plan(self) -> None:
        """Prefetches as they are needed, or pins what pays and prefetches the rest: whichever moves less. In pages, as
        these are what moves."""
        specs = {name: paged.in_bytes(spec) for name, spec in self.workload.specs.items()}
        steps = [paged.step(step, self.workload.specs) for step in self.all_steps()]
        capacity = self.capacity - self.capacity // KEPT_FREE
        pinned = pins.choose(steps[: len(self.steps[0])], specs, capacity) if self.workload.foresight is None else []
        plans = {}
        for kept in ([], pinned):
            rest = capacity - sum(pins.nbytes(tile, specs) for tile in kept)
            moves = Plan([pins.others(step, kept) for step in steps], specs, rest, self.workload.foresight).moves
            plans[pins.moved(moves, specs)] = kept, moves
        kept, self.planned = plans[min(plans)]
        for tile in paged.joined(kept):
            gmem.advise(self.bytes(tile), "pinned", self.place, session=self.session)

    def tile(self, tile: Tile) -> Array:
        return self.arrays[tile.array][tile.first : tile.last]

    def bytes(self, tile: Tile) -> Array:
        return self.arrays[tile.array].reshape(-1).view(np.uint8)[tile.first : tile.last]

    def round(self, number: int) -> None:
        if self._round:
            self._round(number)
        else:
            super().round(number)
            for fence in self._told:
                fence.wait(TIMEOUT_S)
            self._told.clear()

    def move(self, queue: Sequence[Move], moves: Moves) -> None:
        """Requests of a stream are done in order. Only discards are waited for, as they would take what the kernel
        writes; a kernel that comes before its data waits in a fault."""
        early, specs = queue is moves.early, self.workload.specs
        fresh = moves.fresh if early else []
        wanted = [move.tile for move in queue if move.inwards] + fresh
        told = (
            ("discard", fresh),  # all of it will be written: nothing has to be copied
            ("cold", [paged.inside(tile, specs[tile.array]) for late, tile in moves.gone if late != early]),
            ("prefetch", wanted),
        )
        for advice, tiles in told:
            for tile in paged.joined(tiles):
                if tile.last - tile.first >= TOLD_BYTES:
                    fence = gmem.advise_async(self.bytes(tile), advice, self.place, session=self.session)
                    self._told.append(fence)
            if advice == "discard" and self._told:
                self._told[-1].wait(TIMEOUT_S)

    def launch(self, step: Step, moves: Moves | None = None) -> Fence:
        views = [_readable(self.tile(access.tile), access.mode) for access in step.accesses]
        return self._launcher.launch(step.kernel, *views, *step.args)

    def finish(self) -> None:
        """Nothing: memory is where it is, and the CPU reads it."""

    def counters(self) -> dict[str, float]:
        stats: dict[str, Any] = self.session.stats()
        return {name: stats[name] for name in COUNTERS}

    def close(self) -> None:
        self._stack.close()
        self._round = None
        self.arrays = {}


def _readable(view: Array, mode: str) -> Array:
    if mode == "read":
        view.flags.writeable = False  # views are made anew for each launch
    return view
