# SPDX-License-Identifier: Apache-2.0
"""External sort (Knuth, TAOCP vol. 3, 5.4): sorted runs first, then one merge of all of them. The merge reads a slice
of every run for each piece of the result."""

from __future__ import annotations

import numpy as np

from workloads.workload import READ, UPDATE, WRITE, Access, Array, Arrays, Spec, Step, Tile, Workload


def run(keys: Array) -> None:
    keys.sort()


def merge(*views: Array) -> None:
    """Slices of the runs, then the piece of the result that they make up."""
    *slices, out = views
    np.concatenate(slices, out=out)
    out.sort(kind="stable")  # timsort: finds the sorted slices, and merges them


class Sort(Workload):
    name = "sort"
    result = "sorted"

    def __init__(self, quick: bool = False) -> None:
        self.run, self.runs = (1 << 17, 4) if quick else (1 << 19, 8)
        keys = self._keys().reshape(self.runs, self.run)
        order = np.argsort(keys, axis=None)
        bounds = keys.reshape(-1)[order[:: self.run]].tolist()[1:]  # as good as samples give, and the same each time
        keys.sort(axis=1)
        self.cuts = [np.concatenate(([0], np.searchsorted(each, bounds), [self.run])).tolist() for each in keys]

    def _keys(self) -> Array:
        return np.random.default_rng(0).integers(0, 1 << 62, self.run * self.runs)

    @property
    def specs(self) -> dict[str, Spec]:
        shape = (self.run * self.runs,)
        return {"keys": Spec(shape, np.int64, 65536), "sorted": Spec(shape, np.int64, 65536)}

    def fill(self, arrays: Arrays) -> None:
        arrays["keys"][:] = self._keys()

    def steps(self, round: int) -> list[Step]:
        n = self.run
        steps = [Step(run, (Access(Tile("keys", at, at + n), UPDATE),)) for at in range(0, n * self.runs, n)]
        written = 0
        for piece in range(self.runs):
            slices = [
                Tile("keys", number * n + cuts[piece], number * n + cuts[piece + 1])
                for number, cuts in enumerate(self.cuts)
                if cuts[piece] < cuts[piece + 1]
            ]
            size = sum(tile.last - tile.first for tile in slices)
            reads = [Access(tile, READ) for tile in slices]
            steps.append(Step(merge, (*reads, Access(Tile("sorted", written, written + size), WRITE))))
            written += size
        return steps

    def check(self, arrays: Arrays, round: int) -> str | None:
        """Ascending, and the same keys: their sums and sums of squares modulo 2^64, whatever their order."""
        have, keys = arrays["sorted"], self._keys()
        if np.any(have[1:] < have[:-1]):
            return "not ascending"
        with np.errstate(over="ignore"):
            same = have.sum() == keys.sum() and (have * have).sum() == (keys * keys).sum()
        return None if same else "other keys than before"
