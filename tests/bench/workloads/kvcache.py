# SPDX-License-Identifier: Apache-2.0
"""A key-value cache of many conversations, as an inference server has it: at each step one of them, some far more
often than others, gets new tokens appended and is read whole for attention."""

from __future__ import annotations

import numpy as np

from workloads.workload import HUGE, UPDATE, WRITE, Access, Array, Arrays, Spec, Step, Tile, Workload, differs

WIDTH = 256
TOKENS = HUGE // (2 * WIDTH * 4)  # that one conversation has room for
APPENDED = 4
ZIPF = 1.1
TOLERANCE = 1e-4


def attend(cache: Array, out: Array, seed: int, start: int) -> None:
    """Appends keys and values, and lets as many queries look at everything so far."""
    fresh, queries = tokens(seed)
    end = start + len(fresh)
    cache[start:end] = fresh
    scores = queries @ cache[:end, 0].T * np.float32(WIDTH**-0.5)
    scores = np.exp(scores - scores.max(1, keepdims=True))
    np.matmul(scores / scores.sum(1, keepdims=True), cache[:end, 1], out=out)


def tokens(seed: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((APPENDED, 2, WIDTH), np.float32), rng.standard_normal((APPENDED, WIDTH), np.float32)


class KvCache(Workload):
    name, kind, foresight = "kvcache", "skewed", 2
    result = "out"

    def __init__(self, quick: bool = False) -> None:
        self.conversations, visits = (6, 12) if quick else (48, 192)
        rng = np.random.default_rng(0)
        heat = 1 / np.arange(1, self.conversations + 1) ** ZIPF
        self.visits = rng.choice(rng.permutation(self.conversations), visits, p=heat / heat.sum()).tolist()
        self.begun = rng.integers(TOKENS * 11 // 16, TOKENS * 25 // 32, self.conversations).tolist()

    @property
    def specs(self) -> dict[str, Spec]:
        return {
            "cache": Spec((self.conversations * TOKENS, 2, WIDTH), np.float32, mostly_read=True),
            "out": Spec((len(self.visits) * APPENDED, WIDTH), np.float32, 65536),
        }

    def fill(self, arrays: Arrays) -> None:
        for number, begun in enumerate(self.begun):
            first = number * TOKENS
            arrays["cache"][first : first + begun] = self._begin(number)

    def _begin(self, number: int) -> Array:
        return np.random.default_rng(10_000 + number).standard_normal((self.begun[number], 2, WIDTH), np.float32)

    def steps(self, round: int) -> list[Step]:
        length, steps = list(self.begun), []
        for visit, number in enumerate(self.visits):
            first, start = number * TOKENS, length[number]
            fresh = Tile("cache", first + start, first + start + APPENDED)
            out = Tile("out", visit * APPENDED, (visit + 1) * APPENDED)
            there = Tile("cache", first, first + start)
            cache = Access(Tile("cache", first, first + TOKENS), UPDATE, fresh, there)
            accesses = (cache, Access(out, WRITE))
            steps.append(Step(attend, accesses, (visit, start)))
            length[number] += APPENDED
        return steps

    def check(self, arrays: Arrays, round: int) -> str | None:
        """Conversation by conversation, in float64, every token in the order it came."""
        want = np.empty(arrays["out"].shape)
        for number in set(self.visits):
            kept = self._begin(number).astype(np.float64)
            for visit in [visit for visit, which in enumerate(self.visits) if which == number]:
                fresh, queries = tokens(visit)
                kept = np.concatenate((kept, fresh))
                weight = np.exp(np.einsum("qd,td->tq", queries, kept[:, 0], optimize=True) / np.sqrt(WIDTH))
                out = np.einsum("tq,td->qd", weight / weight.sum(0), kept[:, 1], optimize=True)
                want[visit * APPENDED : (visit + 1) * APPENDED] = out
        return differs(arrays["out"], want, TOLERANCE, "attention")
