# SPDX-License-Identifier: Apache-2.0
"""The table of docs/maintainer.md: misses of each policy on each kind of trace, beside LRU's and OPT's.

python tests/bench/policies.py [--visible 0] [--ratio 1.5 --ratio 2]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import traces

from gmemd.policy import POLICIES, Trace, replay

COLUMNS = tuple(name for name in POLICIES if name != "lru")


def row(trace: Trace, which: str, ratios: Sequence[float], visible: float) -> tuple[float, float]:
    """Misses over LRU's: geometric mean over the ratios, and the worst of them."""
    quotients = []
    for ratio in ratios:
        capacity = trace.capacity(ratio)
        got, lru = (replay(trace, name, capacity, visible=visible).misses for name in (which, "lru"))
        quotients.append(got / lru)
    return math.exp(sum(map(math.log, quotients)) / len(quotients)), max(quotients)


def main() -> None:
    parser = argparse.ArgumentParser(description="Misses over LRU's: mean over memory ratios (worst)")
    parser.add_argument("--visible", type=float, default=1.0, help="share of hits that the policies are shown")
    parser.add_argument("--ratio", type=float, action="append", help="working set / capacity (default: 1.25 to 3)")
    args = parser.parse_args()
    ratios = args.ratio or [ratio for ratio in traces.RATIOS if ratio > 1]
    print("| trace | " + " | ".join((*COLUMNS, "OPT")) + " |")
    print("|---" * (len(COLUMNS) + 2) + "|")
    for name, make in {**traces.PATTERNS, **traces.MIXES}.items():
        made = make()
        trace = Trace(made.pages, made.writes)
        cells = []
        for which in (*COLUMNS, "opt"):
            mean, worst = row(trace, which, ratios, args.visible)
            cells.append(f"{mean:.2f}" if which == "opt" else f"{mean:.2f} ({worst:.2f})")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
