# SPDX-License-Identifier: Apache-2.0
"""The same job written by hand: all the data in a store (stores.py), a buffer of the given capacity where kernels run,
and copies between them while the kernel before still runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from workloads import arena, stores
from workloads.engine import TIMEOUT_S, Engine
from workloads.launcher import Fence, Launcher
from workloads.link import Link
from workloads.plan import Move, Moves, Plan
from workloads.workload import Array, Step, Tile, Workload


class ByHand(Engine):
    def __init__(
        self, workload: Workload, capacity: int, rounds: int, launcher: Launcher, link: Link, tier: str | None = None
    ) -> None:
        """tier: what gmem would overflow into; None: host memory, behind the link."""
        super().__init__(workload, capacity, rounds)
        self.launcher = launcher
        self.copied_bytes = {True: 0, False: 0}
        self._host = arena.Arena(stores.held(workload.specs))
        self.arrays = stores.lay(self._host, workload.specs)
        workload.fill(self.arrays)
        self.store: stores.Store = stores.Plain(self.arrays, link)
        if tier is not None:
            self._leave_to_store(tier)
        self.device = arena.Arena(capacity)
        own = getattr(workload, "by_hand", None)
        self._own: Callable[[int], None] | None = own(self) if own else None
        self._plan: Plan | None = None
        if not self._own:
            self._plan = Plan(self.all_steps(), workload.specs, capacity, workload.foresight)
            self.planned = self._plan.moves

    def _leave_to_store(self, tier: str) -> None:
        stored = getattr(self.workload, "stored", None)
        tiles = stored() if stored else stores.tiles_of(self.all_steps())
        self.store = stores.beside(tier, self.arrays, self.workload.specs, tiles)
        self.arrays = {}
        self._host.close()

    def _bring_home(self) -> None:
        """For whoever looks at the results."""
        self._host = arena.Arena(stores.held(self.workload.specs))
        self.arrays = stores.lay(self._host, self.workload.specs)
        for name, array in self.arrays.items():
            self.store.get(Tile(name, 0, len(array)), array)

    def round(self, number: int) -> None:
        if self._own:
            self._own(number)
        else:
            super().round(number)

    def move(self, queue: Sequence[Move], moves: Moves) -> None:
        for move in queue:
            self.bring(move.tile, self._at(*move[1:])) if move.inwards else self.send(move.tile, self._at(*move[1:]))

    def bring(self, tile: Tile, to: Array) -> None:
        self.store.get(tile, to)
        self.copied_bytes[True] += to.nbytes

    def send(self, tile: Tile, source: Array) -> None:
        self.store.put(tile, source)
        self.copied_bytes[False] += source.nbytes

    def bring_rows(self, array: str, rows: Array, to: Array) -> None:
        """Rows from all over an array in plain memory, in one copy."""
        assert isinstance(self.store, stores.Plain)
        self.store.link.copy(to, self.arrays[array][rows])
        self.copied_bytes[True] += to.nbytes

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
        if not self.arrays:
            self._bring_home()

    def counters(self) -> dict[str, float]:
        return {"h2d_bytes": self.copied_bytes[True], "d2h_bytes": self.copied_bytes[False]}

    def close(self) -> None:
        self.launcher.launch(arena.forget, self.device.path).wait(TIMEOUT_S)
        self.arrays = {}
        self._own = None
        self.store.close()
        for each in (self._host, self.device):
            each.close()


def on(hand: ByHand, kernel: Callable[..., Any], windows: list[arena.Window], *args: Any) -> Fence:
    """One kernel of a job that is written out by its workload."""
    return hand.launcher.launch(arena.run, kernel, windows, args)
