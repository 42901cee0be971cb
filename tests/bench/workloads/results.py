# SPDX-License-Identifier: Apache-2.0
"""Rows, as `make bench` writes them, from what was measured. Figures are speeds, rounds of the whole job a second, so
a ratio of one is as fast as the floor, and more is faster."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import rows

from workloads.runner import BYHAND, HINTS, ONDEMAND, PLAIN, UMAP, ZRAM, Measured

FITS = 75  # percent: the slowdown is that beside this
UNIT = "1/s"
BY_HAND, ON_DEMAND = "the same by hand", "gmem, single pages on demand, LRU"
SWAP, PAGER = "swap to zram, same budget", "UMap, same budget, compressed store"
AT_ZRAM, ZRAM_TARGETS = 200, {"numpy": "ratio >= 4", "numpy_random": "ratio >= 1.0"}
RESIDUAL_TARGET = "value <= 0.25"

Key = tuple[str, int, int, str]  # workload, link, percent, variant
Table = Mapping[Key, Measured]


def by_key(measured: Iterable[Measured]) -> dict[Key, Measured]:
    return {(each.workload, each.link, each.percent, each.variant): each for each in measured}


def suffix(link: int) -> str:
    return f"_{link / 1e9:g}gbs" if link else ""


def make_rows(measured: Iterable[Measured], works: Mapping[str, int]) -> list[rows.Row]:
    """works: for workloads whose link bounds them, the bytes that a round moves over it at 200 %."""
    table = by_key(measured)
    found = [row for key in table for row in _of_one(table, key)]
    for name, link in dict.fromkeys(key[:2] for key in table):
        found += _slowdowns(table, name, link)
        if name in works:
            found += _twice(table, name, link, works[name])
    return found


def _of_one(table: Table, key: Key) -> list[rows.Row]:
    name, link, percent, variant = key
    each, floor = table[key], table.get((name, link, percent, BYHAND))
    overflows = percent > 100
    if variant in (BYHAND, ZRAM, UMAP):
        return [_row(each, None, None, None)]
    targets = {HINTS: "ratio >= 1.0", PLAIN: "ratio >= 0.8" if each.kind == "regular" else None}
    found = [_row(each, floor, targets.get(variant), BY_HAND)]
    if variant == PLAIN:
        target = "ratio >= 1.5" if each.kind == "skewed" and overflows else None
        on_demand = table.get((name, link, percent, ONDEMAND))
        row = _row(each, on_demand, target, ON_DEMAND, "_over_ondemand")
        found.append(row | (_no_faster(table, on_demand) if target and on_demand else {}))
        swap = table.get((name, link, percent, ZRAM))
        if swap:
            target = ZRAM_TARGETS.get(name) if percent == AT_ZRAM else None
            found.append(_row(each, swap, target, SWAP, "_over_zram"))
        pager = table.get((name, link, percent, UMAP))
        if pager:
            found.append(_row(each, pager, None, PAGER, "_over_umap"))
    return found


def _no_faster(table: Table, floor: Measured) -> dict[str, Any]:
    """What a target over that floor can be at most: nobody is faster than with memory for all of it."""
    fits = [
        statistics.median(each.seconds)
        for variant in (HINTS, PLAIN, BYHAND)
        if (each := table.get((floor.workload, floor.link, FITS, variant))) and each.seconds and not each.wrong
    ]
    if not fits or not floor.seconds:
        return {}
    took, least = statistics.median(floor.seconds), min(fits)
    note = f"{took * 1e3:.0f} ms on demand, {least * 1e3:.0f} with memory for all of it: bound {took / least:.2f}"
    return {"bound": took / least, "note": note}


def _row(each: Measured, floor: Measured | None, target: str | None, floor_is: str | None, more: str = "") -> rows.Row:
    id = f"{each.workload}_{each.percent}_{each.variant}{suffix(each.link)}{more}"
    note = f"wrong result: {each.note}" if each.wrong else each.note or (floor.note if floor else None)
    speeds = [1 / s for s in each.seconds] if not each.wrong else []
    floors = [1 / s for s in floor.seconds] if floor and not floor.wrong else []
    row = rows.make_row(id, UNIT, target, _pairs(speeds, floors), floor_is, note)
    return row | {
        "workload": each.workload, "percent": each.percent, "variant": each.variant, "link_bytes_per_s": each.link,
        "counters": each.counters,
    }  # fmt: skip


def _pairs(values: list[float], floors: list[float]) -> list[tuple[float, float]]:
    """Of each round, taken in turn; a floor that was not measured is none."""
    return list(zip(values, floors if len(floors) == len(values) else [0.0] * len(values), strict=True))


# ---- over the ratios ----


def slowdowns(table: Table, name: str, link: int, variant: str) -> dict[int, float]:
    """Percent: median time of a round beside the one where everything fits."""
    times = {
        key[2]: statistics.median(each.seconds)
        for key, each in table.items()
        if (key[0], key[1], key[3]) == (name, link, variant) and each.seconds and not each.wrong
    }
    return {percent: times[percent] / times[FITS] for percent in sorted(times)} if FITS in times else {}


def residual(points: Mapping[int, float]) -> float:
    """How far the worst point lies from a straight line through those that overflow, relative to the line."""
    over = {percent: slowdown for percent, slowdown in points.items() if percent >= 100}
    x, y = np.array(list(over)), np.array(list(over.values()))
    line = np.polyval(np.polyfit(x, y, 1), x)
    return float(np.max(np.abs(y - line) / np.maximum(line, 1.0)))


def steepest(points: Mapping[int, float]) -> float:
    """The largest factor between neighbouring ratios."""
    values = list(points.values())
    return max(after / before for before, after in zip(values, values[1:], strict=False))


def _slowdowns(table: Table, name: str, link: int) -> list[rows.Row]:
    found = []
    for variant in (HINTS, PLAIN, ONDEMAND, BYHAND, ZRAM, UMAP):
        points = slowdowns(table, name, link, variant)
        if sum(percent >= 100 for percent in points) < 3:
            continue
        target = RESIDUAL_TARGET if variant in (HINTS, PLAIN) else None
        pairs = [(residual(points), 0.0)]
        row = rows.make_row(f"{name}_linear_{variant}{suffix(link)}", "", target, pairs, None, "residual of a line")
        step = rows.make_row(f"{name}_step_{variant}{suffix(link)}", "x", None, [(steepest(points), 0.0)])
        found += [row | {"points": points}, step | {"points": points}]
    return found


def _twice(table: Table, name: str, link: int, moved_bytes: int) -> list[rows.Row]:
    """The device holds half of the data: how fast beside all of it, and whether the link allows for more."""
    found = []
    for variant in (HINTS, PLAIN, BYHAND):
        each, fits = table.get((name, link, 200, variant)), table.get((name, link, 100, variant))
        if not each or not fits or not fits.seconds:
            continue
        compute_s = statistics.median(fits.seconds)
        copy_s = moved_bytes / link if link else 0.0
        bound = min(1.0, compute_s / copy_s) if copy_s else 1.0
        target = "ratio >= 0.9" if bound >= 0.9 and variant != BYHAND else None
        row = _row(each, fits, target, "the same with memory for all of it", "_over_100")
        told = f"{moved_bytes >> 20} MiB a round on the link take {copy_s * 1e3:.0f} ms, the rest {compute_s * 1e3:.0f}"
        found.append(row | {"note": row["note"] or f"{told}: bound {bound:.2f}", "bound": bound})
    return found


def headline(row: rows.Row) -> bool:
    """Worth a line of the table on the screen."""
    return row["target"] is not None or "points" in row or (row["value"] is None and row["note"] is not None)


def summary(measured: Iterable[Measured]) -> list[dict[str, Any]]:
    """One line for each workload, link and ratio: medians in ms of each variant."""
    lines: dict[tuple[str, int, int], dict[str, Any]] = {}
    for each in measured:
        line = lines.setdefault((each.workload, each.link, each.percent), {})
        line[each.variant] = statistics.median(each.seconds) * 1e3 if each.seconds and not each.wrong else None
    return [{"workload": w, "link": link, "percent": p, **line} for (w, link, p), line in lines.items()]
