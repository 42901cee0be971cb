# SPDX-License-Identifier: Apache-2.0
"""Replays: policies against models of them written anew from their papers, and the misses that they are chosen by."""

import importlib.util
import sys
from collections import OrderedDict
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmemd import config, policy
from gmemd.policy import POLICIES, Trace, curve, replay

spec = importlib.util.spec_from_file_location("traces", Path(__file__).parents[1] / "bench" / "traces.py")
traces = importlib.util.module_from_spec(spec)
sys.modules["traces"] = traces
spec.loader.exec_module(traces)

ACCESSES = st.lists(st.tuples(st.integers(0, 12), st.booleans()), max_size=300)


def test_the_configuration_knows_them_all():
    assert config.POLICIES == POLICIES


# ---- models ----


def fifo(pages, capacity):
    queue, misses = [], 0
    for page in pages:
        if page not in queue:
            misses += 1
            if len(queue) == capacity:
                queue.pop(0)
            queue.append(page)
    return misses


def lru(pages, capacity):
    order, misses = OrderedDict(), 0
    for page in pages:
        if page in order:
            order.move_to_end(page)
            continue
        misses += 1
        if len(order) == capacity:
            order.popitem(last=False)
        order[page] = True
    return misses


def clock(pages, capacity):
    queue, used, misses = [], set(), 0
    for page in pages:
        if page in queue:
            used.add(page)
            continue
        misses += 1
        while len(queue) == capacity:
            oldest = queue.pop(0)
            if oldest in used:
                used.remove(oldest)
                queue.append(oldest)
        queue.append(page)
    return misses


def sieve(pages, capacity):
    """The paper's figure: a list from new to old, a hand on a page of it or nowhere."""
    newest_first, visited, hand, misses = [], set(), None, 0
    for page in pages:
        if page in newest_first:
            visited.add(page)
            continue
        misses += 1
        if len(newest_first) == capacity:
            at = newest_first.index(hand) if hand is not None else capacity - 1
            while newest_first[at] in visited:
                visited.remove(newest_first[at])
                at = at - 1 if at else capacity - 1
            hand = newest_first[at - 1] if at else None
            newest_first.pop(at)
        newest_first.insert(0, page)
    return misses


def opt(pages, capacity):
    held, misses = set(), 0
    for i, page in enumerate(pages):
        if page in held:
            continue
        misses += 1
        if len(held) == capacity:
            later = {p: next((j for j in range(i, len(pages)) if pages[j] == p), len(pages)) for p in held}
            held.remove(max(held, key=lambda p: later[p]))
        held.add(page)
    return misses


@given(ACCESSES, st.integers(1, 14))
@settings(deadline=None)
def test_models_agree(accesses, capacity):
    trace, pages = Trace.of(accesses), [page for page, _ in accesses]
    for name, model in (("lru", lru), ("clock", clock), ("sieve", sieve), ("opt", opt)):
        assert replay(trace, name, capacity).misses == model(pages, capacity), name
    for name in ("lru", "clock", "sieve"):
        assert replay(trace, name, capacity, visible=0).misses == fifo(pages, capacity), name


@given(ACCESSES, st.integers(1, 14), st.sampled_from((0.0, 0.3, 1.0)))
@settings(deadline=None)
def test_what_holds_for_all(accesses, capacity, visible):
    trace = Trace.of(accesses)
    least = replay(trace, "opt", capacity).misses
    for name in POLICIES:
        got = replay(trace, name, capacity, visible=visible)
        assert least <= got.misses <= len(trace)
        # What came in has left or is still there.
        assert got.misses - got.evicted_dirty - got.evicted_clean == min(got.misses, capacity, trace.working_set)
        assert got == replay(trace, name, capacity, visible=visible)
        if not any(write for _, write in accesses):
            assert got.evicted_dirty == 0
        if capacity >= trace.working_set:
            assert got.misses == trace.working_set


def test_writes_and_bytes():
    trace = Trace.of([(1, True), (2, False), (3, False), (1, False), (2, True), (3, False)], page_bytes=65536)
    got = replay(trace, "lru", 2)
    assert (got.misses, got.evicted_dirty, got.evicted_clean) == (6, 2 - 1, 3)
    assert got.in_bytes == 6 * 65536 and got.out_bytes == 65536 and got.miss_ratio == 1.0
    assert [r.misses for r in curve(trace, ["lru"], [1, 3])["lru"]] == [6, 3]
    assert replay(Trace.of([]), "lru", 2).miss_ratio == 0.0


@pytest.mark.parametrize(
    ("arguments", "word"), [(("mru", 2), "policy"), (("lru", 0), "capacity"), (("lru", 1 << 32), "capacity")]
)
def test_bad_arguments_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        replay(Trace.of([(1, True)]), *arguments)
    with pytest.raises(ValueError, match="visible"):
        replay(Trace.of([(1, True)]), "lru", 1, visible=2)


# ---- the default is chosen by these ----


@cache
def made(name):
    made = {**traces.PATTERNS, **traces.MIXES}[name]()
    return Trace(made.pages, made.writes)


def misses(name, ratio, which, visible=1.0):
    trace = made(name)
    return replay(trace, which, trace.capacity(ratio), visible=visible).misses


@pytest.mark.parametrize("name", traces.PATTERNS)
def test_never_much_worse_than_lru(name):
    for ratio in traces.RATIOS:
        assert misses(name, ratio, POLICIES[0]) <= 1.05 * misses(name, ratio, "lru"), ratio


# Memory of a few dozen pages: large pages on a small device. What a loop uses together is a part of it that counts.
FEW = {
    "triad": lambda: traces.triad(16, 12),
    "matmul": lambda: traces.matmul(4, 1),
    "transformer": lambda: traces.transformer(12, 4, 2, 12),
    "numpy passes": lambda: traces.numpy_passes(20, 8),
    "kv sessions": lambda: traces.kv_sessions(2, 300),
    "external sort": lambda: traces.external_sort(32, 4),
    "pagerank": lambda: traces.pagerank(4, 32, 12),
    "gather": lambda: traces.gather(1.0, 4000, 48),
    "scan + zipf": lambda: traces.scan_mix(1.0, 0.25, 30, 60, 6000, 10),
}
LOOPS = ("triad", "transformer", "numpy passes", "scan + zipf")


@pytest.mark.parametrize("name", FEW)
def test_few_frames(name):
    """To learn which expert is better costs some misses, once: a window's, in traces as short as these."""
    made = FEW[name]()
    trace = Trace(made.pages, made.writes)
    for ratio in traces.RATIOS:
        capacity = trace.capacity(ratio)
        got, lru = (replay(trace, which, capacity).misses for which in (POLICIES[0], "lru"))
        assert got <= 1.05 * lru + 8, ratio
        if name in LOOPS and ratio > 1:
            assert got <= 0.9 * lru, ratio
        got, lru = (replay(trace, which, capacity, visible=0.0).misses for which in (POLICIES[0], "lru"))
        assert got <= 1.2 * lru, ratio


@pytest.mark.parametrize("name", traces.MIXES)
def test_scans_do_not_flush(name):
    for ratio in traces.RATIOS:
        if ratio > 1:
            assert misses(name, ratio, POLICIES[0]) <= 0.8 * misses(name, ratio, "lru"), ratio


@pytest.mark.parametrize("name", [name for name in traces.PATTERNS if name.startswith("gather")])
def test_near_the_best_static_choice(name):
    for ratio in traces.RATIOS:
        assert misses(name, ratio, POLICIES[0]) <= 1.1 * misses(name, ratio, "static"), ratio


@pytest.mark.parametrize("name", [*traces.PATTERNS, *traces.MIXES])
def test_faults_alone_are_enough_to_go_by(name):
    """Without any visible hit LRU is FIFO. Sessions are where the default loses then, up to a fifth."""
    for ratio in traces.RATIOS:
        assert misses(name, ratio, POLICIES[0], 0.0) <= 1.2 * misses(name, ratio, "lru", 0.0), ratio


@pytest.mark.parametrize("seed", range(3))
def test_other_traces_of_the_kind(seed):
    """The same targets on traces that nothing was chosen by."""
    for trace, most in (
        (traces.kv_sessions(60, 3000, seed=100 + seed), 1.05),
        (traces.pagerank(700, 2500, 5, seed=100 + seed), 1.05),
        (traces.external_sort(2400, 120, seed=100 + seed), 1.05),
        (traces.matmul(10 + seed, 8), 1.05),
        (traces.numpy_passes(500 + 90 * seed), 1.05),
        (traces.scan_mix(0.9 + 0.1 * seed, 0.35, 1500, 2500, 200_000, seed=100 + seed), 0.8),
    ):
        replayed = Trace(trace.pages, trace.writes)
        for ratio in (1.25, 1.6, 2.2, 3.0):
            capacity = replayed.capacity(ratio)
            got, by_lru = (replay(replayed, which, capacity).misses for which in (POLICIES[0], "lru"))
            assert got <= most * by_lru, (most, ratio, capacity)


def test_generators_repeat():
    for name in ("kv sessions", "external sort", "pagerank"):
        first, second = traces.PATTERNS[name](), traces.PATTERNS[name]()
        assert (first.pages == second.pages).all() and (first.writes == second.writes).all()
        assert first.pages.size == first.writes.size
        assert policy.Trace(first.pages, first.writes).working_set == first.working_set
