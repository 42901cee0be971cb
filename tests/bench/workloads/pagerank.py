# SPDX-License-Identifier: Apache-2.0
"""PageRank (Page et al., 1999) by power iteration on a graph whose degrees follow a power law: edges are streamed,
and the small vector of shares is hit all over with each of them."""

from __future__ import annotations

import numpy as np

from workloads.workload import READ, WRITE, Access, Array, Arrays, Spec, Step, Tile, Workload, differs, whole

DAMPING = 0.85
ITERATIONS = 2
TOLERANCE = 1e-9
SKEW = 3.0  # vertex number n * u**SKEW for uniform u: a few vertices have most of the edges


def shares(ranks: Array, degrees: Array, out: Array) -> None:
    np.divide(ranks, degrees, out=out)


def gather(edges: Array, first: Array, share: Array, out: Array, start: int) -> None:
    """Ranks of the vertices of one block from the shares of those that point to them."""
    sums = np.add.reduceat(share[edges], first - start)
    np.multiply(sums, DAMPING, out=out)
    out += (1 - DAMPING) / len(share)


class PageRank(Workload):
    name, kind = "pagerank", "skewed"
    result = "ranks"

    def __init__(self, quick: bool = False) -> None:
        self.vertices, self.edges, self.blocks = (1 << 14, 1 << 20, 4) if quick else (1 << 18, 1 << 24, 32)
        rng = np.random.default_rng(0)
        into = _power_law(rng, self.edges - self.vertices, self.vertices)
        counts = np.bincount(into, minlength=self.vertices) + 1  # each has an edge at least: reduceat needs it
        self.first = np.concatenate(([0], np.cumsum(counts)))
        self.sources = _power_law(rng, self.edges, self.vertices).astype(np.int32)
        self.degrees = np.maximum(np.bincount(self.sources, minlength=self.vertices), 1).astype(np.float64)

    @property
    def specs(self) -> dict[str, Spec]:
        vector = Spec((self.vertices,), np.float64)
        return {
            "edges": Spec((self.edges,), np.int32, constant=True),
            "first": Spec((self.vertices,), np.int64, constant=True),
            "degrees": vector._replace(constant=True),
            "ranks": vector,
            "share": vector,
        }

    def fill(self, arrays: Arrays) -> None:
        arrays["edges"][:], arrays["first"][:] = self.sources, self.first[:-1]
        arrays["degrees"][:], arrays["ranks"][:] = self.degrees, 1 / self.vertices

    def steps(self, round: int) -> list[Step]:
        specs = self.specs
        ranks, degrees, share = (whole(name, specs[name]) for name in ("ranks", "degrees", "share"))
        cuts = np.searchsorted(self.first, np.linspace(0, self.edges, self.blocks + 1)).tolist()
        once = [Step(shares, (Access(ranks, READ), Access(degrees, READ), Access(share, WRITE)))]
        for begin, end in zip(cuts, cuts[1:], strict=False):
            if begin < end:
                low, high = int(self.first[begin]), int(self.first[end])
                accesses = (
                    Access(Tile("edges", low, high), READ),
                    Access(Tile("first", begin, end), READ),
                    Access(share, READ),
                    Access(Tile("ranks", begin, end), WRITE),
                )
                once.append(Step(gather, accesses, (low,)))
        return once * ITERATIONS

    def check(self, arrays: Arrays, round: int) -> str | None:
        """Edge by edge, as a weighted histogram of their targets."""
        targets = np.repeat(np.arange(self.vertices), np.diff(self.first))
        ranks = np.full(self.vertices, 1 / self.vertices)
        for _ in range((round + 1) * ITERATIONS):
            pushed = np.bincount(targets, (ranks / self.degrees)[self.sources], self.vertices)
            ranks = (1 - DAMPING) / self.vertices + DAMPING * pushed
        return differs(arrays["ranks"], ranks, TOLERANCE, "ranks")


def _power_law(rng: np.random.Generator, count: int, below: int) -> Array:
    return (rng.random(count) ** SKEW * below).astype(np.int64)
