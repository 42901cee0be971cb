# SPDX-License-Identifier: Apache-2.0
"""Blocked matrix multiplication, stored block by block: pieces of a matrix are used again and again, in a known
order."""

from __future__ import annotations

import numpy as np

from workloads.workload import READ, UPDATE, WRITE, Access, Array, Arrays, Spec, Step, Tile, Workload

BLOCK = 512  # of float64: 2 MiB a block


def first(a: Array, b: Array, c: Array) -> None:
    np.matmul(a[0], b[0], out=c[0])


def further(a: Array, b: Array, c: Array) -> None:
    c[0] += a[0] @ b[0]


class Matmul(Workload):
    name = "matmul"
    result = "c"

    def __init__(self, quick: bool = False) -> None:
        self.blocks = 2 if quick else 4

    @property
    def specs(self) -> dict[str, Spec]:
        shape = (self.blocks**2, BLOCK, BLOCK)
        constant = Spec(shape, np.float64, constant=True)
        return {"a": constant, "b": constant, "c": Spec(shape, np.float64)}

    def fill(self, arrays: Arrays) -> None:
        for number, name in enumerate("ab"):
            rng = np.random.default_rng(number)
            for block in arrays[name]:
                block[:] = rng.integers(-8, 9, block.shape)

    def steps(self, round: int) -> list[Step]:
        n, steps = self.blocks, []
        for i in range(n):
            for j in range(n):
                for k in range(n):
                    steps.append(
                        Step(
                            further if k else first,
                            (
                                Access(_block("a", i * n + k), READ),
                                Access(_block("b", k * n + j), READ),
                                Access(_block("c", i * n + j), UPDATE if k else WRITE),
                            ),
                        )
                    )
        return steps

    def check(self, arrays: Arrays, round: int) -> str | None:
        """C x = A (B x), exactly (Freivalds, Probabilistic machines can use less running time, 1977)."""
        x = np.random.default_rng(2).integers(-8, 9, (self.blocks * BLOCK, 4)).astype(np.float64)
        a, b, c = (self._dense(arrays[name]) for name in "abc")
        wrong = int(np.count_nonzero(c @ x != a @ (b @ x)))
        return f"{wrong} sums of rows of c" if wrong else None

    def _dense(self, blocks: Array) -> Array:
        n = self.blocks
        return blocks.reshape(n, n, BLOCK, BLOCK).swapaxes(1, 2).reshape(n * BLOCK, n * BLOCK)


def _block(array: str, number: int) -> Tile:
    return Tile(array, number, number + 1)
