# SPDX-License-Identifier: Apache-2.0
"""Steps as gmem sees them: what they use is pages, if these are large. Tiles are bytes of an array here, and arrays
begin with a page."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from workloads.workload import HUGE, UPDATE, WRITE, Access, Spec, Step, Tile


def in_bytes(spec: Spec) -> Spec:
    return spec._replace(shape=(spec.nbytes,), dtype=np.uint8)


def step(of: Step, specs: dict[str, Spec]) -> Step:
    return of._replace(accesses=tuple(page for access in of.accesses for page in _pages(access, specs)))


def _pages(access: Access, specs: dict[str, Spec]) -> list[Access]:
    """What is there, and what is written anew. A page is written whole only if the tile covers it."""
    spec, found = specs[access.tile.array], []
    used = [part for part in (access.content, access.part) if part] if access.content else [access.tile]
    first, last = used[0].first * spec.row_bytes, max(part.last for part in used) * spec.row_bytes
    if spec.page_bytes < HUGE:  # more than can be planned one by one
        return [Access(Tile(access.tile.array, first, last), access.mode)]
    for begin in range(first // spec.page_bytes * spec.page_bytes, last, spec.page_bytes):
        end = min(begin + spec.page_bytes, spec.nbytes)
        whole = first <= begin and end <= last
        mode = UPDATE if access.mode == WRITE and not whole else access.mode
        found.append(Access(Tile(access.tile.array, begin, end), mode))
    return found


def joined(tiles: Iterable[Tile]) -> list[Tile]:
    """Neighbours as one."""
    found: list[Tile] = []
    for tile in sorted(set(tiles)):
        if found and found[-1].array == tile.array and found[-1].last == tile.first:
            found[-1] = Tile(tile.array, found[-1].first, tile.last)
        else:
            found.append(tile)
    return found


def inside(tile: Tile, spec: Spec) -> Tile:
    """Without the parts of pages at its edges."""
    begin = -(-tile.first // spec.page_bytes) * spec.page_bytes
    end = tile.last if tile.last == spec.nbytes else tile.last // spec.page_bytes * spec.page_bytes
    return Tile(tile.array, begin, max(begin, end))
