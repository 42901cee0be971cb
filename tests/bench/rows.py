# SPDX-License-Identifier: Apache-2.0
"""Arithmetic of rows: pairs of gmem's figure and its floor's become one row; a row is met, missed, or not measured."""

from __future__ import annotations

import statistics
from typing import Any

Row = dict[str, Any]

FIELDS = ("id", "value", "unit", "floor", "ratio", "target", "met")


def is_met(target: str | None, value: float, ratio: float | None) -> bool | None:
    """target: "ratio <= 1.15", "value <= 16", or None for a row that is only reported."""
    if target is None:
        return None
    what, op, limit = target.split()
    if what not in ("ratio", "value") or op not in ("<=", ">="):
        raise ValueError(f"target: {target!r} is not understood")
    have = ratio if what == "ratio" else value
    if have is None:
        return None
    return have <= float(limit) if op == "<=" else have >= float(limit)


def make_row(
    id: str,
    unit: str,
    target: str | None,
    pairs: list[tuple[float, float]],
    floor_is: str | None = None,
    note: str | None = None,
) -> Row:
    """One (value, floor) for each repetition; floor 0: there is none. No pairs: the row was not measured."""
    row: Row = {"id": id, "value": None, "unit": unit, "floor": None, "ratio": None, "target": target, "met": None}
    if pairs:
        row["value"] = statistics.median(value for value, _ in pairs)
        if all(floor > 0 for _, floor in pairs):
            row["floor"] = statistics.median(floor for _, floor in pairs)
            row["ratio"] = statistics.median(value / floor for value, floor in pairs)
        row["met"] = is_met(target, row["value"], row["ratio"])
    return row | {"floor_is": floor_is, "note": note, "repetitions": [list(pair) for pair in pairs]}


def verdict(row: Row) -> str:
    if row["value"] is None:
        return "not measured"
    return {True: "met", False: "missed", None: ""}[row["met"]]


def number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def cells(row: Row) -> tuple[str, ...]:
    """A row as the table on the screen shows it."""
    return (
        row["id"],
        number(row["value"]),
        number(row["floor"]),
        row["unit"],
        number(row["ratio"]),
        row["target"] or "",
        verdict(row),
    )
