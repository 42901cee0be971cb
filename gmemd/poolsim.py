# SPDX-License-Identifier: Apache-2.0
"""How a pool behaves on many machines, by simulation: what each machine still fetches, what that is for each shard, and
what happens when a shard's primary is gone for a while. Pure: no I/O, and the same figures for the same seed.

Every machine touches pages of the pool independently, page of rank r with probability proportional to r^-s (Zipf).
What a machine holds is decided by the product's own policy code: references are drawn, and replayed through
gmemd.policy.

All pages of a large pool would take too long, so a part of them is simulated (spatial sampling; C. Waldspurger et
al., SHARDS, FAST 2015): what happens to some pages in a memory that is smaller in proportion is what happens to all.
Ranks are cut into blocks of k pages, and one page stands for each block, with the block's mean probability. Pages
that are used so often that no policy would part with them are hits (see HEAD). Memory is filled first, and policies
that adapt have time to; then misses are counted. The error is that of several runs with other references.
"""

from __future__ import annotations

import math
from binascii import crc_hqx
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from gmemd.policy import Trace, replay

SLOTS = 16384
HEAD = 14.0  # uses in LRU's characteristic time: one of a million such pages would be out
_EXACT = 1 << 16  # ranks that are summed one by one
_BLOCKS = 6000  # of ranks, for sums over all of them
_SAMPLED_PAGES = 1 << 16  # at least, and ...
_SAMPLED_MEMORY = 4096  # ... so many fit into the memory
_REFERENCES = 6_000_000  # of a run, at most
_MEASURED = 400_000  # at least
_LEARN = 100  # references for each page of the memory, in which policies that adapt have done so
_HOT = 1 << 19  # ranks that are placed on shards one by one
_STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}  # 95 % of t, by runs


class Zipf:
    """Probabilities of ranks 1 to pages: p(r) = r^-exponent / sum."""

    def __init__(self, pages: int, exponent: float) -> None:
        self.pages, self.exponent = pages, exponent
        self._exact = np.concatenate([[0.0], np.cumsum(np.arange(1, min(pages, _EXACT) + 1, dtype=float) ** -exponent)])
        self._total = 1.0
        self._total = float(self.mass(np.array([pages]))[0])
        edges = np.unique(np.concatenate([np.arange(0, min(pages, 1024) + 1),
                                          np.geomspace(1, pages, _BLOCKS).astype(np.int64), [pages]]))  # fmt: skip
        self.counts = np.diff(edges).astype(float)
        self.masses = np.diff(self.mass(edges))
        self.means = self.masses / self.counts

    def mass(self, ranks: np.ndarray) -> np.ndarray:
        """Of the first so many ranks; beyond the first 65,536 by the integral, with the midpoint rule."""
        known = self._exact[np.minimum(ranks, len(self._exact) - 1)]
        low, high = len(self._exact) - 0.5, np.maximum(ranks, len(self._exact) - 1) + 0.5
        power = 1.0 - self.exponent
        beyond = np.log(high / low) if abs(power) < 1e-9 else (high**power - low**power) / power
        return (known + beyond) / self._total

    def probability(self, ranks: np.ndarray) -> np.ndarray:
        return ranks.astype(float) ** -self.exponent / self._total

    def characteristic_time(self, memory: int) -> float:
        """References after which a page that was not used has left an LRU memory of so many pages: the root of
        sum(1 - exp(-p t)) = memory (Che, Tung and Wang, 2002)."""
        return _root(lambda t: float(-(self.counts * np.expm1(-self.means * t)).sum()) - memory)

    def lru_misses(self, memory: int) -> float:
        """Miss ratio of LRU by the same approximation."""
        if memory >= self.pages:
            return 0.0
        return float((self.masses * np.exp(-self.means * self.characteristic_time(memory))).sum())

    def time_of(self, misses: float) -> float:
        """The characteristic time with which LRU would miss so much: for where misses fall, whatever the policy."""
        if misses >= 1:
            return 0.0
        return _root(lambda t: misses - float((self.masses * np.exp(-self.means * t)).sum()))


def _root(rising: Any) -> float:
    low, high = 0.0, 1.0
    while rising(high) < 0 and high < 1e30:
        high *= 4
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return high


# ---- one machine ----


@dataclass(frozen=True)
class Misses:
    ratio: float
    error: float  # half of the interval of 95 %, from the spread of the runs
    sampled_pages: int
    one_in: int  # pages for each that was simulated
    head_pages: int  # hits without simulation
    references: int  # of a run, those that fill the memory included
    settled: bool  # it was given the time that it takes to forget how it began, and to adapt


@dataclass(frozen=True)
class _Sample:
    cumulative: np.ndarray
    memory: int
    mass: float
    one_in: int
    head: int
    fill: int
    measured: int
    settled: bool


def _sample(zipf: Zipf, memory: int, exact: bool, visible: float) -> _Sample:
    time = zipf.characteristic_time(memory)
    head = 0
    if visible == 1 and not exact:
        head = int((HEAD / time * zipf._total) ** (-1 / zipf.exponent)) if zipf.exponent else 0
        head = max(0, min(head, memory // 2))
    pages, room = zipf.pages - head, memory - head
    one_in = 1 if exact else max(1, min(pages // _SAMPLED_PAGES, room // _SAMPLED_MEMORY))
    edges = np.minimum(head + one_in * np.arange(-(-pages // one_in) + 1, dtype=np.int64), zipf.pages)
    masses = np.diff(zipf.mass(edges)) / np.diff(edges)
    mass = float(1 - zipf.mass(np.array([head]))[0])
    wanted = int(4 * time * mass / one_in) + _LEARN * (room // one_in)
    measured = max(_MEASURED, int(2 * time * mass / one_in))
    fill = min(wanted, _REFERENCES - min(measured, _REFERENCES // 2))
    measured = min(measured, _REFERENCES - fill)
    return _Sample(np.cumsum(masses) / masses.sum(), max(1, room // one_in), mass, one_in, head, fill, measured,
                   fill == wanted)  # fmt: skip


def _run(sample: _Sample, policy: str, visible: float, seed: int) -> float:
    draws = np.random.default_rng(seed).random(sample.fill + sample.measured)
    pages = np.searchsorted(sample.cumulative, draws, side="right").astype(np.uint64)
    np.minimum(pages, len(sample.cumulative) - 1, out=pages)
    both = replay(Trace(pages), policy, sample.memory, visible=visible, seed=seed).misses
    filling = replay(Trace(pages[: sample.fill]), policy, sample.memory, visible=visible, seed=seed).misses
    return sample.mass * (both - filling) / sample.measured


def misses(
    zipf: Zipf, memory: int, policy: str, *, runs: int = 4, seed: int = 1, visible: float = 1.0, exact: bool = False
) -> Misses:  # fmt: skip
    """Of one machine with memory for so many pages, when it has been running for a while. exact: all pages."""
    if memory >= zipf.pages:
        return Misses(0.0, 0.0, 0, 1, zipf.pages, 0, True)
    sample = _sample(zipf, memory, exact, visible)
    with ThreadPoolExecutor(2) as pool:  # replays hold no lock
        found = list(pool.map(lambda n: _run(sample, policy, visible, 1000 * seed + n), range(runs)))
    spread = float(np.std(found, ddof=1)) / math.sqrt(runs) if runs > 1 else math.nan
    return Misses(float(np.mean(found)), _STUDENT.get(runs, 2.3) * spread, len(sample.cumulative), sample.one_in,
                  sample.head, sample.fill + sample.measured, sample.settled)  # fmt: skip


# ---- all of them ----


@dataclass(frozen=True)
class Scenario:
    machines: int = 1000
    pool_bytes: int = 100 << 40
    page_bytes: int = 64 << 10
    extent_bytes: int = 8 << 20
    shards: int = 500
    replicas: int = 1
    touches_per_s: float = 20_000.0  # of a machine, each of another page
    threads: int = 64  # of a machine, that touch them
    link_bytes_per_s: float = 3.125e9  # of a machine and of a server: 25 Gbit/s
    failover_s: float = 10.0  # until a replica has taken over: one to two of cluster-node-timeout
    policy: str = "lru"
    visible: float = 1.0
    seed: int = 1

    def check(self) -> None:
        """ValueError names what is wrong."""
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, (int, float)) and value < 0:
                raise ValueError(f"{item.name}: {value} is negative")
        for name in ("machines", "pool_bytes", "page_bytes", "shards", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1")
        for name in ("touches_per_s", "link_bytes_per_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: must be more than 0")
        if self.shards > SLOTS:
            raise ValueError(f"shards: {self.shards} are more than a cluster's {SLOTS} hash slots")
        if self.pool_bytes < 2 * self.page_bytes:
            raise ValueError("pool_bytes: less than two pages")


def _shares(scenario: Scenario, zipf: Zipf, ratio: float) -> np.ndarray:
    """How the misses fall on the shards. Extents, with pages of any rank, are placed by the hash that clusters use; the
    hottest pages one by one, all others by how many extents a slot has."""
    rng = np.random.default_rng(scenario.seed)
    shard_of = np.arange(SLOTS) * scenario.shards // SLOTS
    extents = max(1, scenario.pool_bytes // scenario.extent_bytes)
    time = zipf.time_of(ratio)
    ranks = np.arange(1, min(zipf.pages, _HOT) + 1)
    hot = zipf.probability(ranks) * np.exp(-zipf.probability(ranks) * time)
    slots = np.fromiter(
        (crc_hqx(b"t1:%d" % extent, 0) % SLOTS for extent in rng.integers(0, extents, len(ranks)).tolist()),
        np.int64, len(ranks),
    )  # fmt: skip
    rest = max(0.0, ratio - float(hot.sum()))
    weights = np.bincount(slots, hot, SLOTS) + rest * rng.poisson(extents / SLOTS, SLOTS) / extents
    shares = np.bincount(shard_of, weights, scenario.shards)
    return shares / shares.sum()


def _storm(scenario: Scenario, ratio: float, share: float) -> dict[str, float | None]:
    """The busiest shard is gone for failover_s. A thread that misses there waits; when somebody has taken over, all of
    them ask at once, beside those who went on. In steps of time, as the threads that wait ask for nothing else."""
    threads = float(scenario.machines * scenario.threads)
    asks = scenario.machines * scenario.touches_per_s / threads * ratio * share  # of this shard, by a thread that runs
    serves = scenario.link_bytes_per_s / scenario.page_bytes
    step = max(scenario.failover_s / 1000, 0.001)
    waiting, at, limit = 0.0, 0.0, scenario.failover_s + 600.0
    peak = 0.0
    while at < limit:
        waiting += (threads - waiting) * -math.expm1(-asks * step)
        if at >= scenario.failover_s:
            waiting = max(0.0, waiting - serves * step)
        peak = max(peak, waiting)
        at += step
        if at > scenario.failover_s and waiting < max(1.0, 2 * asks * threads * step):
            break
    return {
        "blocked_threads_ratio": peak / threads, "queued_requests": peak, "queued_bytes": peak * scenario.page_bytes,
        "drain_s": at - scenario.failover_s if at < limit else None,  # never: more is asked for than it serves
        "connects_per_s": scenario.machines / 0.1,  # a node that refused is not asked again for 100 ms (nodes.c)
    }  # fmt: skip


def simulate(scenario: Scenario, memories: list[int], exponents: list[float], runs: int = 4) -> dict[str, Any]:
    """What `gmemctl pools simulate` prints, for programs. memories: bytes of a machine that its pages may take."""
    scenario.check()
    results = []
    for exponent in exponents:
        zipf = Zipf(scenario.pool_bytes // scenario.page_bytes, exponent)
        for memory in memories:
            results.append(_result(scenario, zipf, memory, runs))
    return {"scenario": vars(scenario), "results": results, "publish": _publish(scenario)}


def _publish(scenario: Scenario) -> dict[str, float]:
    """Writing all of it once, by one machine, and what the servers hold."""
    return {
        "writer_s": scenario.pool_bytes / scenario.link_bytes_per_s,
        "stored_bytes_per_server": 1.25 * scenario.pool_bytes / scenario.shards,  # with what the allocator rounds up
        "servers": scenario.shards * (1 + scenario.replicas),
    }


def _result(scenario: Scenario, zipf: Zipf, memory: int, runs: int) -> dict[str, Any]:
    found = misses(zipf, memory // scenario.page_bytes, scenario.policy, runs=runs, seed=scenario.seed,
                   visible=scenario.visible)  # fmt: skip
    shares = _shares(scenario, zipf, found.ratio) if found.ratio else np.full(scenario.shards, 1 / scenario.shards)
    each = scenario.touches_per_s * found.ratio * scenario.page_bytes
    total = each * scenario.machines
    cold = min(memory, scenario.pool_bytes)
    return {
        "exponent": zipf.exponent, "memory_bytes": memory, "miss_ratio": found.ratio, "miss_ratio_error": found.error,
        "lru_by_che": zipf.lru_misses(memory // scenario.page_bytes),
        "machine_bytes_per_s": each, "machine_load": each / scenario.link_bytes_per_s,
        "shard_bytes_per_s": total / scenario.shards, "busiest_shard_bytes_per_s": total * float(shares.max()),
        "busiest_shard_load": total * float(shares.max()) / scenario.link_bytes_per_s,
        "cold_start_s": max(cold, cold * scenario.machines / scenario.shards) / scenario.link_bytes_per_s,
        "storm": _storm(scenario, found.ratio, float(shares.max())),
        "sampling": {
            "pages": found.sampled_pages, "one_in": found.one_in, "head_pages": found.head_pages,
            "references": found.references, "runs": runs, "settled": found.settled,
        },
    }  # fmt: skip
