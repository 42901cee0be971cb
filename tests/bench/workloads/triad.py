# SPDX-License-Identifier: Apache-2.0
"""STREAM triad, a = b + s * c (McCalpin, "Memory bandwidth and machine balance in current high performance
computers", 1995): every byte once, in order."""

from __future__ import annotations

import numpy as np

from workloads.workload import READ, WRITE, Access, Array, Arrays, Spec, Step, Tile, Workload

PASSES = 2


def triad(b: Array, c: Array, a: Array, s: float) -> None:
    np.multiply(c, np.float32(s), out=a)
    np.add(a, b, out=a)


class Triad(Workload):
    name = "triad"
    result = "a"

    def __init__(self, quick: bool = False) -> None:
        self.tile, self.tiles = (1 << 19, 4) if quick else (1 << 20, 8)

    @property
    def specs(self) -> dict[str, Spec]:
        shape = (self.tile * self.tiles,)
        return {
            "a": Spec(shape, np.float32),
            "b": Spec(shape, np.float32, constant=True),
            "c": Spec(shape, np.float32, constant=True),
        }

    def fill(self, arrays: Arrays) -> None:
        for number, name in enumerate("bc"):
            arrays[name][:] = np.random.default_rng(number).integers(0, 1000, self.tile * self.tiles)

    def steps(self, round: int) -> list[Step]:
        cut = [(at, at + self.tile) for at in range(0, self.tile * self.tiles, self.tile)]
        return [
            Step(
                triad,
                (Access(Tile("b", *at), READ), Access(Tile("c", *at), READ), Access(Tile("a", *at), WRITE)),
                (float(round + number),),
            )
            for number in range(PASSES)
            for at in cut
        ]

    def check(self, arrays: Arrays, round: int) -> str | None:
        b, c = (np.random.default_rng(n).integers(0, 1000, self.tile * self.tiles) for n in range(2))
        wrong = int(np.count_nonzero(arrays["a"] != b + (round + PASSES - 1) * c))  # small integers: exact
        return f"{wrong} elements of a" if wrong else None
