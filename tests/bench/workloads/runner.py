# SPDX-License-Identifier: Apache-2.0
"""Runs one workload at one ratio in all variants: the same rounds on each, in turn, the first of them unmeasured."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gmem

from workloads import pager, swap
from workloads.byhand import ByHand
from workloads.engine import Engine
from workloads.launcher import Launcher, Thread
from workloads.link import Link
from workloads.managed import Managed
from workloads.workload import Workload

HINTS, PLAIN, ONDEMAND, BYHAND, ZRAM, UMAP = "hints", "plain", "ondemand", "byhand", "zram", "umap"
TIER = "packed0:driver=zstd,algorithm=lz4"  # what zram is set to, too
FIRST_WINDOW, WINDOW_BYTES, WINDOWS = 0x6600_0000_0000, 1 << 40, 8
ON_DEMAND = ("daemon.fault_ahead=false", "daemon.policy=lru")  # what was used longest ago, and nothing else


@dataclass(frozen=True)
class Setting:
    """link: bytes a second, 0 for memory speed. tier: a device as gmemd's --device takes it, without its capacity.
    pager: the library that pager.build() makes, if UMap is to run, too."""

    percent: int
    link: int = 0
    tier: str = TIER
    rounds: int = 3
    variants: tuple[str, ...] = (HINTS, PLAIN, ONDEMAND, BYHAND, ZRAM, UMAP)
    pager: Path | None = None


@dataclass
class Measured:
    """One variant. seconds: of each measured round. note: why there are none, or that the result was wrong."""

    workload: str
    kind: str
    percent: int
    link: int
    variant: str
    seconds: list[float] = field(default_factory=list)
    counters: dict[str, float] = field(default_factory=dict)  # of a round
    note: str | None = None
    wrong: bool = False


class Daemons:
    """Private daemons for workloads on devices: one as it comes, one that brings single pages on demand, by LRU.

    huge: there are huge pages for everything. A daemon that counts on some and finds none left can't do without."""

    def __init__(self, huge: bool) -> None:
        self._stack = contextlib.ExitStack()
        self._windows = itertools.count()
        self._settings = [f"daemon.hugepages={str(huge).lower()}"]
        self.usual = self._stack.enter_context(self.start(PLAIN, ["workbench0:driver=simgpu,capacity=4M"]))
        self.on_demand = self._stack.enter_context(self.start(ONDEMAND))
        # Kernels of jobs written by hand are launched the same way; the device's memory is not used.
        self.bench = self._stack.enter_context(gmem.device("workbench0", self.usual).context())

    def start(self, variant: str, devices: Sequence[str] = (), settings: Sequence[str] = ()) -> gmem.Session:
        """One more. All are clients' of this one process, so none may use the addresses of another."""
        window = f"daemon.window_base={FIRST_WINDOW + next(self._windows) % WINDOWS * WINDOW_BYTES}"
        own = [window, f"daemon.window_bytes={WINDOW_BYTES}", *(ON_DEMAND if variant == ONDEMAND else ())]
        return gmem.connect(devices=devices, settings=[*self._settings, *own, *settings])

    def close(self) -> None:
        self._stack.close()


def run(workload: Workload, setting: Setting, daemons: Daemons) -> list[Measured]:
    variants = [variant for variant in setting.variants if variant not in (ZRAM, UMAP)]
    if not workload.hints:
        variants = [variant for variant in variants if variant != HINTS]
    measured = [_measured(workload, setting, variant) for variant in variants]
    with contextlib.ExitStack() as stack:
        engines = [stack.enter_context(_engine(workload, setting, variant, daemons)) for variant in variants]
        for number in range(workload.warm_up + setting.rounds):
            for engine, result in zip(engines, measured, strict=True):
                _round(engine, result, number, number >= workload.warm_up)
        for engine, result in zip(engines, measured, strict=True):
            engine.finish()
            result.note = workload.check(engine.arrays, workload.warm_up + setting.rounds - 1)
            result.wrong = result.note is not None
            result.counters = {name: value / setting.rounds for name, value in result.counters.items()}
    return measured + _elsewhere(workload, setting)


def _elsewhere(workload: Workload, setting: Setting) -> list[Measured]:
    """What others make of the same memory, in a process of its own."""
    if workload.where != "host":
        return []
    measured = []
    for variant in (ZRAM, UMAP):
        if variant not in setting.variants or (variant == UMAP and not setting.pager):
            continue
        result = _measured(workload, setting, variant)
        if variant == ZRAM:
            found = swap.measure(workload, setting.percent, setting.rounds)
        else:
            assert setting.pager
            found = pager.measure(setting.pager, workload, setting.percent, setting.rounds)
        result.seconds, result.note, result.wrong = found
        measured.append(result)
    return measured


def _measured(workload: Workload, setting: Setting, variant: str) -> Measured:
    return Measured(workload.name, workload.kind, setting.percent, setting.link, variant)


def _round(engine: Engine, result: Measured, number: int, counts: bool) -> None:
    before = engine.counters()
    began = time.perf_counter()
    engine.round(number)
    seconds = time.perf_counter() - began
    if not counts:
        return
    result.seconds.append(seconds)
    for name, value in engine.counters().items():
        result.counters[name] = result.counters.get(name, 0) + value - before[name]


@contextlib.contextmanager
def _engine(workload: Workload, setting: Setting, variant: str, daemons: Daemons) -> Iterator[Engine]:
    capacity, rounds = workload.capacity(setting.percent), workload.warm_up + setting.rounds
    with contextlib.ExitStack() as stack:
        engine: Engine
        if variant == BYHAND:
            tier = setting.tier if workload.where == "host" else None
            launcher = _launcher(workload, daemons, stack)
            engine = ByHand(workload, capacity, rounds, launcher, Link(setting.link), tier)
        elif workload.where == "host":
            tier = f"{setting.tier},capacity={2 * workload.nbytes}"
            session = stack.enter_context(daemons.start(variant, [tier], [f"host.limit={capacity}"]))
            engine = Managed(workload, capacity, rounds, session, None, variant == HINTS)
        else:
            session = daemons.on_demand if variant == ONDEMAND else daemons.usual
            name = f"simgpu-{variant}"
            session.attach("simgpu", name, capacity=capacity, bandwidth=setting.link)
            stack.callback(session.detach, name, force=True)
            engine = Managed(workload, capacity, rounds, session, name, variant == HINTS)
        stack.callback(engine.close)
        yield engine


def _launcher(workload: Workload, daemons: Daemons, stack: contextlib.ExitStack) -> Launcher:
    if workload.where == "device":
        return daemons.bench
    thread = Thread()
    stack.callback(thread.close)
    return thread
