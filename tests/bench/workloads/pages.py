# SPDX-License-Identifier: Apache-2.0
"""The pages that a workload uses, in order, for replays of policies: a step uses each page of a piece once."""

from __future__ import annotations

import numpy as np

from workloads.workload import READ, Access, Array, Step, Workload


def trace(workload: Workload, rounds: int) -> tuple[Array, Array]:
    """Page numbers, and whether they are written (uint8)."""
    bases, end = {}, 0
    for name, spec in workload.specs.items():
        bases[name] = end
        end += spec.held_bytes // spec.page_bytes
    pages, writes = [], []
    for number in range(rounds):
        for step in workload.steps(number):
            for at, access in enumerate(step.accesses):
                used = _pages(workload, step, access, first=not at) + bases[access.tile.array]
                pages.append(used)
                writes.append(np.full(len(used), access.mode != READ, np.uint8))
    return np.concatenate(pages).astype(np.uint64), np.concatenate(writes)


def _pages(workload: Workload, step: Step, access: Access, first: bool) -> Array:
    spec = workload.specs[access.tile.array]
    rows = workload.used(step) if first else None
    if rows is not None:
        return rows.reshape(-1).astype(np.int64) * spec.row_bytes // spec.page_bytes
    parts = [part for part in (access.content, access.part) if part] if access.content else [access.tile]
    begin, end = (spec.row_bytes * row for row in (parts[0].first, max(part.last for part in parts)))
    return np.arange(begin // spec.page_bytes, -(-end // spec.page_bytes))
