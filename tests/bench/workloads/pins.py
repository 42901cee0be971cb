# SPDX-License-Identifier: Apache-2.0
"""What to keep on the device for good, and to stream the rest past it, as inference engines keep the first layers of
a model that does not fit. With what is used equally often, no schedule copies less than one that keeps a fixed part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from workloads.plan import Moves
from workloads.workload import Spec, Step, Tile

AHEAD = 3  # steps whose other pieces must have room: that runs, the next, and the last, whose are on their way out


def choose(steps: Sequence[Step], specs: Mapping[str, Spec], capacity: int) -> list[Tile]:
    """Pieces that are used most, until only what two steps need is left."""
    largest = max(sum(nbytes(access.tile, specs) for access in step.accesses) for step in steps)
    room = capacity - AHEAD * largest
    uses = Counter(access.tile for step in steps for access in step.accesses)
    kept: list[Tile] = []
    for tile, _ in uses.most_common():
        if nbytes(tile, specs) <= room and not any(tile.overlaps(other) for other in kept):
            kept.append(tile)
            room -= nbytes(tile, specs)
    return kept


def others(step: Step, kept: Sequence[Tile]) -> Step:
    """The step as if it used nothing of what is kept."""
    return step._replace(
        accesses=tuple(access for access in step.accesses if not any(t.contains(access.tile) for t in kept))
    )


def nbytes(tile: Tile, specs: Mapping[str, Spec]) -> int:
    """In whole pages, one more where it does not begin with one."""
    spec = specs[tile.array]
    first, last = tile.first * spec.row_bytes, tile.last * spec.row_bytes
    return (-(-last // spec.page_bytes) - first // spec.page_bytes) * spec.page_bytes


def moved(moves: Sequence[Moves], specs: Mapping[str, Spec]) -> int:
    """Bytes in both directions, in whole pages."""
    return sum(nbytes(move.tile, specs) for each in moves for move in each.early + each.late)
