# SPDX-License-Identifier: Apache-2.0
"""NumPy on arrays larger than the DRAM it may use: passes over a matrix in order, and random pages of 4 KiB. On the
CPU."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from workloads.byhand import ByHand, on
from workloads.launcher import Fence
from workloads.workload import READ, UPDATE, WRITE, Access, Array, Arrays, Spec, Step, Tile, Workload, differs, whole

TOLERANCE = 1e-4
PAGE = 512  # int64s


def clear(sums: Array) -> None:
    sums[:] = 0


def add_up(part: Array, sums: Array) -> None:
    sums[0] += part.sum(0, np.float64)
    sums[1] += np.square(part, dtype=np.float64).sum(0)


def standardise(part: Array, sums: Array, out: Array, rows: int) -> None:
    mean = sums[0] / rows
    scale = 1 / np.sqrt(sums[1] / rows - mean**2)
    np.multiply(part - mean.astype(np.float32), scale.astype(np.float32), out=out)


class Sequential(Workload):
    """Columns brought to mean 0 and variance 1: one pass that reads, one that reads and writes."""

    name, where = "numpy", "host"
    result = "out"

    def __init__(self, quick: bool = False) -> None:
        self.rows, self.columns, self.tiles = (1 << 15, 64, 4) if quick else (98304, 128, 24)

    @property
    def specs(self) -> dict[str, Spec]:
        shape = (self.rows, self.columns)
        return {
            "matrix": Spec(shape, np.float32, constant=True),
            "sums": Spec((2, self.columns), np.float64, 4096),
            "out": Spec(shape, np.float32),
        }

    def fill(self, arrays: Arrays) -> None:
        """Whole numbers of a byte: compressible about two to one."""
        rng = np.random.default_rng(0)
        step = self.rows // self.tiles
        for first in range(0, self.rows, step):
            piece = arrays["matrix"][first : first + step]
            piece[:] = rng.integers(0, 256, piece.shape, np.uint8)

    def steps(self, round: int) -> list[Step]:
        sums = whole("sums", self.specs["sums"])
        height = self.rows // self.tiles
        cuts = [(first, first + height) for first in range(0, self.rows - height + 1, height)]
        if cuts[-1][1] < self.rows:
            cuts.append((cuts[-1][1], self.rows))
        steps = [Step(clear, (Access(sums, WRITE),))]
        steps += [Step(add_up, (Access(Tile("matrix", *cut), READ), Access(sums, UPDATE))) for cut in cuts]
        for cut in cuts:
            accesses = (Access(Tile("matrix", *cut), READ), Access(sums, READ), Access(Tile("out", *cut), WRITE))
            steps.append(Step(standardise, accesses, (self.rows,)))
        return steps

    def check(self, arrays: Arrays, round: int) -> str | None:
        """Column by column, with the mean of squared differences."""
        matrix = {"matrix": np.empty((self.rows, self.columns), np.float32)}
        self.fill(matrix)
        for column in range(self.columns):
            each = matrix["matrix"][:, column].astype(np.float64)
            want = (each - each.mean()) / each.std()
            if wrong := differs(arrays["out"][:, column], want, TOLERANCE, f"column {column}"):
                return wrong
        return None


def add_pages(pages: Array, out: Array, numbers: Array) -> None:
    np.sum(pages[numbers], axis=1, out=out)


class Random(Workload):
    """Sums of pages of 4 KiB, each as likely as any other."""

    name, kind, where, foresight = "numpy_random", "random", "host", 2
    result = "out"
    hints = False  # a prefetch of one page costs what a fault does, also where the page is there already
    warm_up = 12  # each page that has left memory once leaves it for nothing from then on

    def __init__(self, quick: bool = False) -> None:
        self.pages, self.batch, self.batches = (1024, 64, 4) if quick else (24320, 256, 16)

    def numbers(self, round: int) -> Array:
        """Of the pages of each batch; others in each round, or what a round touches would soon be all there is."""
        rng = np.random.default_rng(round)
        return np.stack([rng.choice(self.pages, self.batch, replace=False) for _ in range(self.batches)])

    @property
    def specs(self) -> dict[str, Spec]:
        return {
            "pages": Spec((self.pages, PAGE), np.int64, 4096, constant=True),
            "out": Spec((self.batches * self.batch,), np.int64, 4096),
        }

    def fill(self, arrays: Arrays) -> None:
        """Small numbers in eight bytes: compressible about two to one, as four bytes of each are random."""
        rng = np.random.default_rng(1)
        for first in range(0, self.pages, 1024):
            piece = arrays["pages"][first : first + 1024]
            piece[:] = rng.integers(0, 1 << 32, piece.shape, np.uint32)

    def out(self, batch: int) -> Tile:
        return Tile("out", batch * self.batch, (batch + 1) * self.batch)

    def steps(self, round: int) -> list[Step]:
        pages = Access(whole("pages", self.specs["pages"]), READ)
        return [
            Step(add_pages, (pages, Access(self.out(n), WRITE)), (numbers,))
            for n, numbers in enumerate(self.numbers(round))
        ]

    def used(self, step: Step) -> Array:
        return np.asarray(step.args[0])

    def check(self, arrays: Arrays, round: int) -> str | None:
        """Each page's sum in Python's own integers, once."""
        pages = {"pages": np.empty((self.pages, PAGE), np.int64)}
        self.fill(pages)
        numbers = self.numbers(round)
        sums = {number: sum(pages["pages"][number].tolist()) for number in np.unique(numbers).tolist()}
        want = [sums[number] for number in numbers.reshape(-1).tolist()]
        wrong = sum(have != each for have, each in zip(arrays["out"].tolist(), want, strict=True))
        return f"{wrong} sums of pages" if wrong else None

    def stored(self) -> list[Tile]:
        """By hand: each page by itself, as they are wanted in no order."""
        return [Tile("pages", n, n + 1) for n in range(self.pages)]

    def by_hand(self, hand: ByHand) -> Callable[[int], None]:
        """As many pages as fit stay; the others of a batch are brought into one of two staging buffers."""
        outs = self.batches * self.batch * 8
        kept = min((hand.capacity - outs) // 4096 - 2 * self.batch, self.pages)
        near = hand.device.array(0, (kept + 2 * self.batch, PAGE), np.int64)
        hand.store.get(Tile("pages", 0, kept), near[:kept])
        window, at_out = hand.device.window(0, near.shape, np.int64), near.nbytes

        def one_round(number: int) -> None:
            fences: list[Fence] = []
            for batch, numbers in enumerate(self.numbers(number)):
                base = kept + batch % 2 * self.batch
                missing = np.flatnonzero(numbers >= kept)
                slots = numbers.copy()
                slots[missing] = base + np.arange(len(missing))
                for fence in fences[-2:-1]:
                    fence.wait()
                for at, page in enumerate(numbers[missing].tolist(), base):
                    hand.bring(Tile("pages", page, page + 1), near[at : at + 1])
                out = hand.device.window(at_out + self.out(batch).first * 8, (self.batch,), np.int64)
                fences.append(on(hand, add_pages, [window, out], slots))
            for fence in fences[-2:]:
                fence.wait()
            home = self.specs["out"]
            hand.send(whole("out", home), hand.device.array(at_out, home.shape, np.int64))

        return one_round
