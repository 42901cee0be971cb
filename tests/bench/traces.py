# SPDX-License-Identifier: Apache-2.0
"""Sequences of page accesses of the kinds of programs that unified memory is for: seeded, so that counts repeat.

Each generator gives pages (uint64) and writes (uint8), at the granularity of pages: an access is a burst of uses of one
page, not each load. The working set is the number of different pages; a memory ratio is working set / capacity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Trace:
    pages: np.ndarray
    writes: np.ndarray

    @property
    def working_set(self) -> int:
        return int(np.unique(self.pages).size)

    def capacity(self, ratio: float) -> int:
        """Pages of an hnode that this is `ratio` times too large for."""
        return max(1, round(self.working_set / ratio))


def _trace(pages: list[np.ndarray], writes: list[np.ndarray]) -> Trace:
    return Trace(np.concatenate(pages).astype(np.uint64), np.concatenate(writes).astype(np.uint8))


def _sweep(columns: list[tuple[np.ndarray, bool]], bursts: int) -> tuple[np.ndarray, np.ndarray]:
    """A loop over several arrays at once: element by element, so that each page comes up `bursts` times, in turn with
    the other arrays' pages."""
    pages = np.stack([pages for pages, _ in columns], axis=1)
    order = np.repeat(pages, bursts, axis=0)
    writes = np.broadcast_to(np.array([written for _, written in columns], np.uint8), order.shape)
    return order.ravel(), writes.ravel()


def _zipf_weights(count: int, alpha: float) -> np.ndarray:
    weights = 1.0 / np.arange(1, count + 1) ** alpha
    return weights / weights.sum()


def _zipf(random: np.random.Generator, pages: np.ndarray, alpha: float, count: int) -> np.ndarray:
    """Draws of shuffled pages: popularity says nothing of the address."""
    ranks = np.searchsorted(np.cumsum(_zipf_weights(pages.size, alpha)), random.random(count), side="right")
    return random.permutation(pages)[np.minimum(ranks, pages.size - 1)]


def triad(array_pages: int = 1200, passes: int = 8) -> Trace:
    """STREAM's a = b + s c (McCalpin 1995), again and again."""
    a, b, c = (np.arange(array_pages) + i * array_pages for i in range(3))
    pages, writes = _sweep([(b, False), (c, False), (a, True)], 3)
    return _trace([pages] * passes, [writes] * passes)


def matmul(blocks: int = 14, block_pages: int = 6) -> Trace:
    """C = A B by square blocks, C's block stays in the innermost loop."""
    a, b, c = (np.arange(blocks * blocks * block_pages).reshape(blocks, blocks, block_pages) for _ in range(3))
    b, c = b + a.size, c + 2 * a.size
    parts = [
        _sweep([(a[i, k], False), (b[k, j], False), (c[i, j], True)], 2)
        for i in range(blocks)
        for j in range(blocks)
        for k in range(blocks)
    ]
    return _trace([p for p, _ in parts], [w for _, w in parts])


def gather(alpha: float, count: int = 1_500_000, table_pages: int = 1500, seed: int = 1) -> Trace:
    """Rows of an embedding table by a Zipf law that stays the same."""
    pages = _zipf(np.random.default_rng(seed), np.arange(table_pages), alpha, count)
    return Trace(pages.astype(np.uint64), np.zeros(count, np.uint8))


def pagerank(vertex_pages: int = 1000, edge_pages: int = 3000, rounds: int = 6, seed: int = 2) -> Trace:
    """Edges in sequence; for each page of them some ranks of vertices whose degrees follow a power law; new ranks are
    written in sequence."""
    random = np.random.default_rng(seed)
    vertices, edges = np.arange(vertex_pages), np.arange(edge_pages) + vertex_pages
    ranks = np.arange(edge_pages) * vertex_pages // edge_pages + vertex_pages + edge_pages
    targets = _zipf(random, vertices, 0.9, edge_pages * 8).reshape(edge_pages, 8)
    step = np.concatenate([edges[:, None], targets, ranks[:, None]], axis=1)
    writes = np.zeros(step.shape, np.uint8)
    writes[:, -1] = 1
    return _trace([step.ravel()] * rounds, [writes.ravel()] * rounds)


def chase(pages: int = 4000, rounds: int = 10, seed: int = 3) -> Trace:
    """One random cycle through all pages."""
    order = np.random.default_rng(seed).permutation(pages)
    return _trace([order] * rounds, [np.zeros(pages, np.uint8)] * rounds)


def _quicksort(first: int, pages: int) -> list[np.ndarray]:
    """Partition from both ends, then each half: page accesses of an in-place sort."""
    if pages <= 1:
        return [np.array([first])]
    low = first + np.arange(pages // 2)
    high = first + pages - 1 - np.arange(pages // 2)
    middle = [np.array([first + pages // 2])] if pages % 2 else []
    order = np.stack([low, high, low, high], axis=1).ravel()
    half = pages // 2
    return [order, *middle, *_quicksort(first, half), *_quicksort(first + half, pages - half)]


def external_sort(pages: int = 3200, run_pages: int = 160, seed: int = 4) -> Trace:
    """Runs are sorted in place, then merged: from each run in turn, as its keys come, to the output."""
    random = np.random.default_rng(seed)
    parts = []
    for first in range(0, pages, run_pages):
        parts += _quicksort(first, run_pages)
    writes = [np.ones(part.size, np.uint8) for part in parts]
    runs = pages // run_pages
    bursts = 6
    turns = random.permutation(np.repeat(np.arange(runs), run_pages * bursts))
    taken = np.zeros(runs, np.int64)
    merged = np.empty((turns.size, 2), np.int64)
    for i, run in enumerate(turns):
        merged[i] = run * run_pages + taken[run] // bursts, pages + i // bursts
        taken[run] += 1
    parts.append(merged.ravel())
    writes.append(np.tile(np.array([0, 1], np.uint8), turns.size))
    return _trace(parts, writes)


def kv_append(pages: int = 600) -> Trace:
    """One sequence that grows by a page and is read from its beginning each time."""
    parts = [np.arange(n + 1) for n in range(pages)]
    writes = [np.zeros(part.size, np.uint8) for part in parts]
    for part in writes:
        part[-1] = 1
    return _trace(parts, writes)


def kv_sessions(sessions: int = 80, turns: int = 5000, seed: int = 5) -> Trace:
    """Conversations: who spoke last is likely to speak next; each turn reads its cache and appends a page. One that has
    grown long ends, and a new one takes its place and its pages."""
    random = np.random.default_rng(seed)
    most = 64
    recent = list(range(sessions))
    lengths = random.integers(4, most, sessions)
    picks = np.searchsorted(np.cumsum(_zipf_weights(sessions, 1.0)), random.random(turns), side="right")
    pages, writes = [], []
    for pick in np.minimum(picks, sessions - 1):
        session = recent.pop(pick)
        recent.insert(0, session)
        lengths[session] += 1
        if lengths[session] >= most:
            lengths[session] = 4
        pages.append(session * most + np.arange(lengths[session]))
        written = np.zeros(lengths[session], np.uint8)
        written[-1] = 1
        writes.append(written)
    return _trace(pages, writes)


def transformer(layers: int = 16, layer_pages: int = 150, hot_pages: int = 24, tokens: int = 20) -> Trace:
    """Weights of all layers in sequence for each token; a few pages of activations all the time."""
    hot = np.arange(hot_pages)
    weights = np.arange(layers * layer_pages).reshape(layers, layer_pages) + hot_pages
    pages, writes = [], []
    for layer in weights:
        order = np.stack([layer, hot[np.arange(layer_pages) % hot_pages]], axis=1)
        pages.append(order.ravel())
        writes.append(np.tile(np.array([0, 1], np.uint8), layer_pages))
    return _trace(pages * tokens, writes * tokens)


def numpy_passes(array_pages: int = 800, rounds: int = 6) -> Trace:
    """t = x * y; t += x; y -= t; s = sum(t * t), in chunks of a tenth for the last: whole arrays, temporaries that are
    made anew at the same place."""
    x, y, t, u = (np.arange(array_pages) + i * array_pages for i in range(4))
    parts = [
        _sweep([(x, False), (y, False), (t, True)], 2),
        _sweep([(t, True), (x, False)], 2),
        _sweep([(y, True), (t, False)], 2),
    ]
    chunk = array_pages // 10
    for first in range(0, array_pages, chunk):
        piece = slice(first, first + chunk)
        parts.append(_sweep([(t[piece], False), (u[:chunk], True)], 2))
        parts.append(_sweep([(u[:chunk], False)], 2))
    return _trace([p for p, _ in parts] * rounds, [w for _, w in parts] * rounds)


def scan_mix(
    alpha: float = 1.0, share: float = 0.25, hot_pages: int = 2000, scan_pages: int = 3000, count: int = 300_000,
    burst: int = 200, seed: int = 6,
) -> Trace:  # fmt: skip
    """Lookups by a Zipf law, and every so often a stretch of a long scan that begins anew when it is through."""
    random = np.random.default_rng(seed)
    lookups = _zipf(random, np.arange(hot_pages), alpha, int(count * (1 - share)))
    scan = np.arange(count - lookups.size) % scan_pages + hot_pages
    pieces = max(1, scan.size // burst)
    pages = []
    for some, stretch in zip(np.array_split(lookups, pieces), np.array_split(scan, pieces), strict=True):
        pages += [some, stretch]
    joined = np.concatenate(pages)
    return Trace(joined.astype(np.uint64), np.zeros(joined.size, np.uint8))


# What no policy may do much worse than LRU on.
def numpy_random(pages: int = 4000, count: int = 40_000, seed: int = 8) -> Trace:
    """Pages of one array, each as likely as any other."""
    order = np.random.default_rng(seed).integers(0, pages, count)
    return _trace([order], [np.zeros(count, np.uint8)])


PATTERNS: dict[str, Callable[[], Trace]] = {
    "triad": triad,
    "matmul": matmul,
    "gather 0.8": lambda: gather(0.8),
    "gather 1.0": lambda: gather(1.0),
    "gather 1.2": lambda: gather(1.2),
    "pagerank": pagerank,
    "chase": chase,
    "external sort": external_sort,
    "kv append": kv_append,
    "kv sessions": kv_sessions,
    "transformer": transformer,
    "numpy passes": numpy_passes,
    "numpy random": numpy_random,
}
# Where frequency pays: lookups beside scans.
MIXES: dict[str, Callable[[], Trace]] = {
    "scan + zipf 0.8": lambda: scan_mix(0.8),
    "scan + zipf 1.0": lambda: scan_mix(1.0),
    "scan + zipf 1.2": lambda: scan_mix(1.2),
}
RATIOS = (0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0)
