# SPDX-License-Identifier: Apache-2.0
"""A gmemd as a machine's users would share it, somebody honest who uses it all the time, and a count of what it holds.

Each test attacks the daemon in its own way. Whatever it did, the daemon must be up afterwards, the honest client's
memory must be what it wrote there, and the daemon must hold what it held before: the fixture `arena` looks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from arena import Arena


def _arena(*options: str, **more) -> Iterator[Arena]:
    arena = Arena(*options, **more)
    try:
        yield arena
    finally:
        arena.close()


@pytest.fixture(scope="session")
def shared_arena() -> Iterator[Arena]:
    yield from _arena("--device", "simgpu0:capacity=8M", env={"PYTHONPATH": str(Path(__file__).resolve().parent)})


@pytest.fixture
def arena(shared_arena: Arena) -> Iterator[Arena]:
    """The daemon that most tests attack, one after the other."""
    yield from _watched(shared_arena)


@pytest.fixture(scope="module")
def make_module_arena() -> Iterator[Callable[..., Arena]]:
    """A daemon for the tests of a module."""
    yield from _maker()


@pytest.fixture
def make_arena() -> Iterator[Callable[..., Arena]]:
    """A daemon of the test's own, with options of gmemd's command line."""
    yield from _maker()


def _maker() -> Iterator[Callable[..., Arena]]:
    arenas: list[Arena] = []

    def make(*options: str, **more) -> Arena:
        arenas.append(Arena(*options, **more))
        return arenas[-1]

    yield make
    for arena in arenas:
        arena.close()


def _watched(arena: Arena) -> Iterator[Arena]:
    arena.check_honest()
    before = arena.census()
    yield arena
    arena.check_honest()
    arena.settle(before)
    arena.end_attackers()
