# SPDX-License-Identifier: Apache-2.0
"""What was measured, on the screen: times, and the rows that have a target."""

from __future__ import annotations

from collections.abc import Iterable

import rows
from rich.console import Console
from rich.table import Table

from workloads import results
from workloads.runner import BYHAND, HINTS, ONDEMAND, PLAIN, UMAP, ZRAM, Measured

VARIANTS = {HINTS: "hints", PLAIN: "no hints", ONDEMAND: "on demand", BYHAND: "by hand", ZRAM: "zram", UMAP: "UMap"}


def times(measured: Iterable[Measured]) -> Table:
    """Milliseconds of a round; beside it, how much slower than with everything in memory."""
    measured = list(measured)
    by_key = results.by_key(measured)
    table = Table(title="ms a round (and slowdown beside 75 %)")
    for name in ("workload", "link", "data/memory", *VARIANTS.values()):
        table.add_column(name, justify="left" if name in ("workload", "link") else "right", no_wrap=True)
    shown = None
    for line in results.summary(measured):
        name, link, percent = line["workload"], line["link"], line["percent"]
        cells = []
        for variant in VARIANTS:
            slowdown = results.slowdowns(by_key, name, link, variant).get(percent)
            beside = f" ({slowdown:.1f})" if slowdown else ""
            cells.append(rows.number(line.get(variant)) + beside)
        if (name, link) != shown:
            table.add_section()
        table.add_row(name if (name, link) != shown else "", _link(link) if (name, link) != shown else "",
                      f"{percent} %", *cells)  # fmt: skip
        shown = (name, link)
    return table


def _link(bytes_per_s: int) -> str:
    return f"{bytes_per_s / 1e9:g} GB/s" if bytes_per_s else "memory"


def targets(found: Iterable[rows.Row]) -> Table:
    table = Table(title="rows with a target (speeds in rounds a second; ratio to the floor)")
    for name in ("row", "value", "floor", "unit", "ratio", "target", ""):
        table.add_column(name, justify="left" if name in ("row", "unit", "target", "") else "right", no_wrap=True)
    for row in found:
        if row["target"] is not None:
            table.add_row(*rows.cells(row), style={True: "green", False: "red", None: None}[row["met"]])
    return table


def show(console: Console, measured: list[Measured], found: list[rows.Row]) -> None:
    console.print(times(measured))
    console.print(targets(found))
    for note in sorted({f"{row['id']}: {row['note']}" for row in found if row["value"] is None and row["note"]}):
        console.print(f"not measured: {note}", highlight=False)
    for note in sorted({f"{row['id']}: {row['note']}" for row in found if "bound" in row}):
        console.print(note, highlight=False)
