# SPDX-License-Identifier: Apache-2.0
"""Embedding lookups of a recommender: bags of rows of a table, some rows far more often than others (Zipf), summed."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import gmem
import numpy as np

from workloads.byhand import ByHand, on
from workloads.launcher import Fence
from workloads.managed import KEPT_FREE, Managed
from workloads.workload import READ, WRITE, Access, Array, Arrays, Spec, Step, Tile, Workload, whole

WIDTH = 64  # float32s: 256 bytes a row
TOGETHER = 16  # rows of one popularity lie together: a page of 4 KiB
BAG = 32
ZIPF = 1.05


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
            "table": Spec((self.rows + 2 * self.batch, WIDTH), np.float32, 4096, constant=True),  # and two buffers
            "out": Spec((len(self.ids) * self.batch // BAG, WIDTH), np.float32, 4096),
        }

    def fill(self, arrays: Arrays) -> None:
        arrays["table"][: self.rows] = np.random.default_rng(1).integers(0, 1000, (self.rows, WIDTH))

    def out(self, batch: int) -> Tile:
        return Tile("out", batch * self.batch // BAG, (batch + 1) * self.batch // BAG)

    def steps(self, round: int) -> list[Step]:
        table = Access(whole("table", self.specs["table"]), READ)
        return [Step(lookup, (table, Access(self.out(n), WRITE)), (ids,)) for n, ids in enumerate(self.ids)]

    def used(self, step: Step) -> Array:
        return np.asarray(step.args[0])

    def check(self, arrays: Arrays, round: int) -> str | None:
        """In integers, the first row of each bag, then the second, and so on."""
        table = np.random.default_rng(1).integers(0, 1000, (self.rows, WIDTH))
        want = np.zeros(arrays["out"].shape, np.int64)
        for column in range(BAG):
            want += table[self.ids.reshape(-1, BAG)[:, column]]
        wrong = int(np.count_nonzero(arrays["out"] != want))
        return f"{wrong} sums of embeddings" if wrong else None

    # ---- what a program knows: which rows are hot, and the rows of the next batch ----

    def _layout(self, kept: int) -> Array:
        """For each row where it is among those that are kept, hottest first; -1: it is not."""
        order = (self.pages[:, None] * TOGETHER + np.arange(TOGETHER)).reshape(-1)[:kept]
        where = np.full(self.rows, -1, np.int32)
        where[order] = np.arange(kept)
        return where

    def hint(self, managed: Managed) -> Callable[[int], None]:
        """Hot pages are pinned on the device. The others' rows are gathered on the host, where they are, and copied
        into one of two buffers behind the table, which stay on the device, while the batch before runs."""
        table, place = managed.arrays["table"], {"device": managed.place, "session": managed.session}
        room = managed.capacity - managed.capacity // KEPT_FREE - self.specs["out"].held_bytes
        kept = min(room // 4096 * TOGETHER - 2 * self.batch, self.rows)
        cold = self._layout(kept) < 0
        for first, last in _runs(np.flatnonzero(~cold[::TOGETHER])):
            gmem.advise_async(table[first * TOGETHER : last * TOGETHER], "pinned", **place)
        gmem.prefetch_async(table[self.rows :], **place).wait()  # behind those: they are done
        gathered = gmem.empty((2, self.batch, WIDTH), np.float32, session=managed.session)

        def stage(batch: int, ids: Array) -> Array:
            """The ids, with those of the buffer in place of cold rows'."""
            slots, base = ids.copy(), self.rows + batch % 2 * self.batch
            missing, back = np.unique(ids[cold[ids]], return_inverse=True)
            slots[cold[ids]] = base + back
            if len(missing):
                rows = np.take(table, missing, axis=0, out=gathered[batch % 2, : len(missing)])
                gmem.memcpy(table[base : base + len(missing)], rows, **place)
            return slots

        def one_round(number: int) -> None:
            fences: list[Fence] = []
            for batch, step in enumerate(managed.steps[number]):
                for fence in fences[-2:-1]:
                    fence.wait()
                (ids,) = step.args
                fences.append(managed.launch(step._replace(args=(stage(batch, ids),))))
            for fence in fences:
                fence.wait()

        return one_round

    def by_hand(self, hand: ByHand) -> Callable[[int], None]:
        """The hottest rows stay on the device. The others of a batch are gathered into one of two staging buffers."""
        table, row = hand.arrays["table"], 4 * WIDTH
        outs = len(self.ids) * self.batch // BAG * row
        staged = 2 * self.batch
        kept = min((hand.capacity - outs) // row - staged, self.rows) // TOGETHER * TOGETHER
        where = self._layout(kept)
        rows = hand.device.array(0, (kept + staged, WIDTH), np.float32)
        rows[where[where >= 0]] = table[: self.rows][where >= 0]
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
                    hand.bring_rows("table", missing, rows[base : base + len(missing)])
                at = (kept + staged) * row + self.out(batch).first * row
                out = hand.device.window(at, (self.batch // BAG, WIDTH), np.float32)
                fences.append(on(hand, lookup, [cache, out], slots))
            for fence in fences[-2:]:
                fence.wait()
            home = self.specs["out"]
            hand.send(whole("out", home), hand.device.array((kept + staged) * row, home.shape, np.float32))

        return one_round


def _runs(numbers: Array) -> list[tuple[int, int]]:
    """Ascending numbers as ranges [first, last) of neighbours."""
    starts = np.flatnonzero(np.diff(numbers, prepend=-2) != 1)
    bounds = itertools.pairwise([*starts.tolist(), len(numbers)])
    return [(int(numbers[first]), int(numbers[last - 1]) + 1) for first, last in bounds]

