# SPDX-License-Identifier: Apache-2.0
"""Embedding lookups of a recommender: bags of rows of a table, some rows far more often than others (Zipf), summed."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import gmem
import numpy as np

from workloads.byhand import ByHand, on
from workloads.launcher import Fence
from workloads.managed import Managed
from workloads.workload import READ, WRITE, Access, Array, Arrays, Spec, Step, Tile, Workload, whole

WIDTH = 64  # float32s: 256 bytes a row
TOGETHER = 16  # rows of one popularity lie together: a page of 4 KiB
BAG = 32
ZIPF = 1.05
PINNED = (0.75, 0.5, 0.25, 0.0)  # parts of the device
SPARE = 1.25
RANGES_MAX = 256  # of one request


def lookup(table: Array, out: Array, ids: Array) -> None:
    np.sum(np.take(table, ids, axis=0).reshape(-1, BAG, WIDTH), axis=1, out=out)


class Gather(Workload):
    name, kind, foresight = "gather", "skewed", 2
    result = "out"

    def __init__(self, quick: bool = False) -> None:
        self.rows, self.batch, batches = (24576, 256, 16) if quick else (389120, 4096, 24)
        rng = np.random.default_rng(0)
        heat = 1 / np.arange(1, self.rows // TOGETHER + 1) ** ZIPF
        self.pages = rng.permutation(self.rows // TOGETHER)  # hottest first
        picked = self.pages[rng.choice(len(self.pages), (batches, self.batch), p=heat / heat.sum())]
        self.ids = (picked * TOGETHER + rng.integers(0, TOGETHER, picked.shape)).astype(np.int32)

    @property
    def specs(self) -> dict[str, Spec]:
        return {
            "table": Spec((self.rows, WIDTH), np.float32, 4096, constant=True),
            "out": Spec((len(self.ids) * self.batch // BAG, WIDTH), np.float32, 4096),
        }

    def fill(self, arrays: Arrays) -> None:
        arrays["table"][:] = np.random.default_rng(1).integers(0, 1000, (self.rows, WIDTH))

    def out(self, batch: int) -> Tile:
        return Tile("out", batch * self.batch // BAG, (batch + 1) * self.batch // BAG)

    def steps(self, round: int) -> list[Step]:
        table = Access(whole("table", self.specs["table"]), READ)
        return [Step(lookup, (table, Access(self.out(n), WRITE)), (ids,)) for n, ids in enumerate(self.ids)]

    def check(self, arrays: Arrays, round: int) -> str | None:
        """In integers, the first row of each bag, then the second, and so on."""
        table = np.random.default_rng(1).integers(0, 1000, (self.rows, WIDTH))
        want = np.zeros(arrays["out"].shape, np.int64)
        for column in range(BAG):
            want += table[self.ids.reshape(-1, BAG)[:, column]]
        wrong = int(np.count_nonzero(arrays["out"] != want))
        return f"{wrong} sums of embeddings" if wrong else None

    # ---- what a program knows: which rows are hot, and the rows of the next batch ----

    def hint(self, managed: Managed) -> Callable[[int], None]:
        """Hot pages are pinned; the others of a batch are acquired, all in one request, while the batch before runs."""
        table, context = managed.arrays["table"], managed.context
        assert context
        hot = self._hot(managed.capacity)
        for first, last in _runs(np.flatnonzero(hot)):
            gmem.advise_async(_pages(table, first, last), "pinned", managed.place, session=managed.session)
        gmem.prefetch_async(table[:1], managed.place, session=managed.session).wait()  # behind those: they are done

        def ranges(ids: Array) -> list[list[tuple[int, int]]]:
            needed = np.unique(ids // TOGETHER)
            needed = needed[~hot[needed]]
            base = table.ctypes.data
            all_ranges = [(base + 4096 * first, 4096 * (last - first)) for first, last in _runs(needed)]
            return [all_ranges[at : at + RANGES_MAX] for at in range(0, len(all_ranges), RANGES_MAX)]

        def one_round(number: int) -> None:
            before: tuple[Fence | None, list[list[tuple[int, int]]]] = (None, [])
            for step in managed.steps[number]:
                held = ranges(step.args[0])
                for part in held:
                    context.acquire(part, write=False)
                fence = managed.launch(step)
                _end(context, *before)
                before = (fence, held)
            _end(context, *before)

        return one_round

    def _hot(self, capacity: int) -> Array:
        """Which pages to pin: as many as leave room for the others of two batches and for the result."""
        hot = np.zeros(len(self.pages), bool)
        for part in PINNED:
            hot[:] = False
            hot[self.pages[: int(part * capacity) // 4096]] = True
            others = max(int(np.count_nonzero(~hot[np.unique(ids // TOGETHER)])) for ids in self.ids)
            if SPARE * 2 * others * 4096 + self.specs["out"].held_bytes <= (1 - part) * capacity:
                break
        return hot

    def by_hand(self, hand: ByHand) -> Callable[[int], None]:
        """The hottest rows stay on the device. The others of a batch are gathered into one of two staging buffers."""
        table, row = hand.arrays["table"], 4 * WIDTH
        outs = len(self.ids) * self.batch // BAG * row
        staged = 2 * self.batch
        kept = min((hand.capacity - outs) // row - staged, self.rows) // TOGETHER * TOGETHER
        order = (self.pages[:, None] * TOGETHER + np.arange(TOGETHER)).reshape(-1)[:kept]
        where = np.full(self.rows, -1, np.int32)
        where[order] = np.arange(kept)
        rows = hand.device.array(0, (kept + staged, WIDTH), np.float32)
        rows[:kept] = table[order]
        cache = hand.device.window(0, rows.shape, np.float32)

        def one_round(number: int) -> None:
            fences: list[Fence] = []
            for batch, ids in enumerate(self.ids):
                slots, base = where[ids], kept + batch % 2 * self.batch
                missing, back = np.unique(ids[slots < 0], return_inverse=True)
                slots[slots < 0] = base + back
                if batch > 1:
                    fences[batch - 2].wait()
                if len(missing):
                    hand.copy(rows[base : base + len(missing)], table[missing])
                at = (kept + staged) * row + self.out(batch).first * row
                out = hand.device.window(at, (self.batch // BAG, WIDTH), np.float32)
                fences.append(on(hand, lookup, [cache, out], slots))
            for fence in fences[-2:]:
                fence.wait()
            home = hand.arrays["out"]
            hand.copy(home, hand.device.array((kept + staged) * row, home.shape, np.float32), inwards=False)

        return one_round


def _pages(table: Array, first: int, last: int) -> Array:
    return table[first * TOGETHER : last * TOGETHER]


def _runs(numbers: Array) -> list[tuple[int, int]]:
    """Ascending numbers as ranges [first, last) of neighbours."""
    starts = np.flatnonzero(np.diff(numbers, prepend=-2) != 1)
    bounds = itertools.pairwise([*starts.tolist(), len(numbers)])
    return [(int(numbers[first]), int(numbers[last - 1]) + 1) for first, last in bounds]


def _end(context: gmem.Context, fence: Fence | None, held: list[list[tuple[int, int]]]) -> None:
    if fence:
        fence.wait()
    for part in held:
        context.release(part)
