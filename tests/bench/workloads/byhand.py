# SPDX-License-Identifier: Apache-2.0
"""The same job written by hand: a host buffer with all the data, a device buffer of the given capacity, and copies
between them while the kernel before still runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from workloads import arena
from workloads.engine import TIMEOUT_S, Engine
from workloads.launcher import Fence, Launcher
from workloads.link import Link
from workloads.plan import ALIGN, Move, Moves, Plan
from workloads.workload import Array, Step, Tile, Workload


class ByHand(Engine):
    def __init__(self, workload: Workload, capacity: int, rounds: int, launcher: Launcher, link: Link) -> None:
        super().__init__(workload, capacity, rounds)
        self.launcher, self.link = launcher, link
        self.copied_bytes = {True: 0, False: 0}
        self._host = arena.Arena(sum(-(-spec.nbytes // ALIGN) * ALIGN for spec in workload.specs.values()))
        self.device = arena.Arena(capacity)
        self.arrays = self._arrays()
        workload.fill(self.arrays)
        own = getattr(workload, "by_hand", None)
        self._own: Callable[[int], None] | None = own(self) if own else None
        self._plan: Plan | None = None
        if not self._own:
            self._plan = Plan(self.all_steps(), workload.specs, capacity, workload.foresight)
            self.planned = self._plan.moves

    def _arrays(self) -> dict[str, Array]:
        arrays, offset = {}, 0
        for name, spec in self.workload.specs.items():
            arrays[name] = self._host.array(offset, spec.shape, spec.dtype)
            offset += -(-spec.nbytes // ALIGN) * ALIGN
        return arrays

    def round(self, number: int) -> None:
        if self._own:
            self._own(number)
        else:
            super().round(number)

    def move(self, queue: Sequence[Move], moves: Moves) -> None:
        for move in queue:
            host, device = self.arrays[move.tile.array][move.tile.first : move.tile.last], self._at(*move[1:])
            self.copy(device, host) if move.inwards else self.copy(host, device, inwards=False)

    def copy(self, dst: Array, src: Array, inwards: bool = True) -> None:
        self.link.copy(dst, src)
        self.copied_bytes[inwards] += dst.nbytes

    def _shape(self, tile: Tile) -> tuple[int, ...]:
        return (tile.last - tile.first, *self.workload.specs[tile.array].shape[1:])

    def _at(self, tile: Tile, offset: int) -> Array:
        return self.device.array(offset, self._shape(tile), self.workload.specs[tile.array].dtype)

    def launch(self, step: Step, moves: Moves | None) -> Fence:
        assert moves
        windows = [
            self.device.window(offset, self._shape(tile), self.workload.specs[tile.array].dtype)
            for tile, offset in moves.views
        ]
        return self.launcher.launch(arena.run, step.kernel, windows, step.args)

    def finish(self) -> None:
        if self._plan:
            self.move(self._plan.flush(), Moves([], [], [], [], []))

    def counters(self) -> dict[str, float]:
        return {"h2d_bytes": self.copied_bytes[True], "d2h_bytes": self.copied_bytes[False]}

    def close(self) -> None:
        self.launcher.launch(arena.forget, self.device.path).wait(TIMEOUT_S)
        self.arrays = {}
        self._own = None
        for each in (self._host, self.device):
            each.close()


def on(hand: ByHand, kernel: Callable[..., Any], windows: list[arena.Window], *args: Any) -> Fence:
    """One kernel of a job that is written out by its workload."""
    return hand.launcher.launch(arena.run, kernel, windows, args)
