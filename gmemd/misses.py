# SPDX-License-Identifier: Apache-2.0
"""What policies would have made of a recording, at several capacities: a table, and miss-ratio curves.

Each hnode is replayed by itself. Its accesses are those of the trace on it; what other hnodes write, and what loses its
content, leaves it, whatever the policy.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gmemd.policy import POLICIES, REFERENCES, Result, Trace, replay
from gmemd.sizes import format_size, parse_size
from gmemd.trace import KINDS, RECORD, RECORD_BYTES, Recording

USES = tuple(name for name in KINDS.values() if name != "gone")
_KIND_OF = {name: number for number, name in KINDS.items()}
_HNID_AT, _NOWHERE = 28, 0xFF  # of a record
_POINTS = 32  # of a curve
DEFAULT_CAPACITIES = "25%,50%,75%,100%"


def parse_policies(text: str) -> tuple[str, ...]:
    """"all", or names; ValueError."""
    if text == "all":
        return POLICIES
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in POLICIES and name not in REFERENCES:
            raise ValueError(f"{name!r} is unknown: all, or some of {', '.join((*POLICIES, *REFERENCES))}")
    return tuple(dict.fromkeys(names))


def parse_kinds(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in USES:
            raise ValueError(f"{name!r} is unknown: some of {', '.join(USES)}")
    return names


def parse_capacities(text: str) -> tuple[int | float, ...]:
    """Bytes (int), or shares (float) of what never evicts; ValueError."""
    return tuple(_capacity(part.strip()) for part in text.split(","))


def _capacity(part: str) -> int | float:
    if not part.endswith("%"):
        size = parse_size(part)
        if not size:
            raise ValueError("0 is no capacity")
        return size
    try:
        share = float(part[:-1]) / 100
    except ValueError:
        raise ValueError(f"{part[:64]!r} is no share: write for example 25%") from None
    if not 0 < share <= 10:
        raise ValueError(f"{part} is out of range: more than 0%, at most 1000%")
    return share


def _names(recording: Recording) -> dict[int, str]:
    """Of the hnodes on which something was used; one that came later than the recording has a number only."""
    known = recording.hnodes()
    used = set(recording.records[_HNID_AT::RECORD_BYTES]) - {_NOWHERE}
    return {hnid: known[hnid]["name"] if hnid in known else f"hnode {hnid}" for hnid in sorted(used)}


def choose(recording: Recording, device: str | None) -> dict[int, str]:
    """The hnodes to replay: the one that is named, or was recorded, or all. ValueError: it is not in the trace."""
    names = _names(recording)
    device = device or recording.header.get("device")
    if device is None:
        return names
    chosen = {hnid: name for hnid, name in names.items() if name == device}
    if not chosen:
        raise ValueError(f"nothing was used on {device!r}; the trace has {', '.join(names.values()) or 'no accesses'}")
    return chosen


def _pages(trace: Trace, capacity: int | float) -> int:
    """Whole pages of the smallest size, at least one."""
    size = capacity if isinstance(capacity, int) else capacity * trace.peak_bytes
    return min(max(1, int(size) // trace.page_bytes), (1 << 32) - 1)


def _replay_all(trace: Trace, wanted: Sequence[tuple[str, int]]) -> dict[tuple[str, int], Result]:
    """Each once, side by side: replays hold no lock."""
    different = list(dict.fromkeys(wanted))
    with ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), 16)) as pool:
        return dict(zip(different, pool.map(lambda one: replay(trace, *one), different), strict=True))


def _row(result: Result, opt: Result, lru: Result) -> dict[str, Any]:
    return {
        "capacity_bytes": result.capacity_bytes, "policy": result.policy, "misses": result.misses,
        "miss_ratio": result.miss_ratio, "in_bytes": result.in_bytes, "out_bytes": result.out_bytes,
        "dropped_bytes": result.dropped_bytes, "evicted_dirty": result.evicted_dirty,
        "evicted_clean": result.evicted_clean, "of_opt": _ratio(result, opt), "of_lru": _ratio(result, lru),
    }  # fmt: skip


def _ratio(result: Result, other: Result) -> float | None:
    return result.misses / other.misses if other.misses else None


def table(trace: Trace, policies: Sequence[str], capacities: Sequence[int | float]) -> list[dict[str, Any]]:
    """One row for each capacity and policy, OPT's first: the least there can be, if all pages are of one size."""
    pages = list(dict.fromkeys(_pages(trace, capacity) for capacity in capacities))
    shown = ("opt", *(name for name in policies if name != "opt"))
    results = _replay_all(trace, [(name, count) for count in pages for name in (*shown, "lru")])
    return [
        _row(results[name, count], results["opt", count], results["lru", count]) for count in pages for name in shown
    ]


def curves(trace: Trace, policies: Sequence[str]) -> dict[str, list[tuple[int, float]]]:
    """For each policy and for OPT, miss ratios at capacities in bytes, up to what never evicts."""
    top = max(1, trace.peak_bytes // trace.page_bytes)
    counts = sorted({max(1, round(top * point / _POINTS)) for point in range(1, _POINTS + 1)})
    names = dict.fromkeys((*policies, "opt"))
    results = _replay_all(trace, [(name, count) for name in names for count in counts])
    return {name: [(r.capacity_bytes, r.miss_ratio) for r in (results[name, c] for c in counts)] for name in names}


def _recorded(recording: Recording, hnid: int, trace: Trace) -> dict[str, Any]:
    """How it was."""
    hnode = recording.hnodes().get(hnid, {})
    return {
        "misses": trace.absent, "policy": hnode.get("policy", ""), "capacity_bytes": hnode.get("capacity_bytes", 0),
    }  # fmt: skip


def report(
    recording: Recording, *, policies: Sequence[str], capacities: Sequence[int | float], device: str | None = None,
    kinds: Sequence[str] = USES, session: int = 0, with_curves: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """What `gmemctl trace replay` prints, for programs. ValueError: the device is not in the trace."""
    mask = sum(1 << _KIND_OF[kind] for kind in kinds)
    hnodes = []
    for hnid, name in choose(recording, device).items():
        trace = Trace.of_records(recording.records, hnid, mask, session)
        if not len(trace):
            continue
        hnodes.append({
            "hnid": hnid, "name": name, "accesses": len(trace), "pages": trace.working_set, "stays": trace.stays,
            "page_bytes": trace.page_bytes, "peak_bytes": trace.peak_bytes,
            "recorded": _recorded(recording, hnid, trace), "results": table(trace, policies, capacities),
            **({"curves": curves(trace, policies)} if with_curves else {}),
        })  # fmt: skip
    return {
        "records": len(recording), "lost": recording.lost, "complete": recording.complete,
        "seconds": _seconds(recording),
        "skipped": [{"at": gap.at, "bytes": gap.bytes, "why": gap.why} for gap in recording.skipped],
        "hnodes": hnodes,
    }  # fmt: skip


def _seconds(recording: Recording) -> float:
    """From the beginning to the last access."""
    if not len(recording):
        return 0.0
    return RECORD.unpack_from(recording.records, len(recording.records) - RECORD_BYTES)[0] / 1e9


def draw(made: dict[str, Any], path: str) -> None:
    """Miss-ratio curves of a report(with_curves=True). ImportError: matplotlib is missing."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    hnodes = made["hnodes"]
    figure = Figure(figsize=(8, 1 + 4 * max(1, len(hnodes))), layout="constrained")
    FigureCanvasAgg(figure)
    for number, hnode in enumerate(hnodes):
        axes = figure.add_subplot(len(hnodes), 1, number + 1)
        for name, points in hnode["curves"].items():
            style = {"color": "black", "linestyle": "--", "label": "OPT"} if name == "opt" else {"label": name}
            axes.plot([size / 2**20 for size, _ in points], [ratio for _, ratio in points], **style)
        capacity = hnode["recorded"]["capacity_bytes"]
        if 0 < capacity <= hnode["peak_bytes"]:
            axes.axvline(capacity / 2**20, color="grey", linestyle=":", label=f"its capacity, {format_size(capacity)}")
        axes.set(title=f"{hnode['name']}: {hnode['accesses']:,} accesses", xlabel="capacity, MiB", ylabel="miss ratio")
        axes.set_ylim(bottom=0)
        axes.legend()
    figure.savefig(path, format="png", dpi=120)
