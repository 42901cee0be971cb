# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind: a table on the screen, report.json, and a picture of where the model's pages lived."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import search
from corpus import Text
from rich.console import Console
from rich.table import Table

NOWHERE, HOST, DEVICE, BOTH = range(4)
PLACES = {
    NOWHERE: ("nowhere (zero)", "#f2f2f2"),
    HOST: ("host", "#4c72b0"),
    DEVICE: ("HBM", "#dd8452"),
    BOTH: ("both", "#55a868"),
}
MIB = 1 << 20
SCORE_WIDTH = 5
NAME_WIDTH = 36


@dataclass
class PageLog:
    """Where each page of the weights was, at some moments."""

    hnid: int
    seconds: list[float] = field(default_factory=list)
    places: list[np.ndarray] = field(default_factory=list)

    def add(self, seconds: float, valid: np.ndarray) -> None:
        """valid: one bit mask a page, bit h set when hnode h holds a valid copy."""
        host, device = (valid & 1).astype(bool), (valid >> self.hnid & 1).astype(bool)
        self.seconds.append(seconds)
        self.places.append((host * HOST + device * DEVICE).astype(np.uint8))


def table(values: dict[str, Any]) -> Table:
    """One row for each figure of the report that a reader wants first."""
    out = Table(title="semantic search on a device that holds half the model", show_header=False, title_justify="left")
    out.add_column(style="bold")
    out.add_column(justify="right")
    out.add_row("texts, tokens, batches", f"{values['texts']:,}, {values['tokens']:,}, {values['batches']:,}")
    out.add_row("texts/s with gmem", f"{values['texts_per_s']:,.1f}")
    out.add_row("texts/s plain NumPy, sampled batches", f"{values['texts_per_s_plain']:,.1f}")
    out.add_row("texts/s with gmem, the same batches", f"{values['texts_per_s_same_batches']:,.1f}")
    out.add_row("host faults, device faults", f"{values['host_faults']:,}, {values['device_faults']:,}")
    out.add_row("H2D, D2H", f"{mib(values['h2d_bytes'])}, {mib(values['d2h_bytes'])}")
    out.add_row("evictions (without a copy)", f"{values['evictions']:,} ({values['evicted_clean']:,})")
    out.add_row("peak HBM, capacity", f"{mib(values['hbm_peak_bytes'])}, {mib(values['hbm_capacity_bytes'])}")
    out.add_row("time in migration (all threads)", f"{values['migration_s']:,.2f} s of {values['embed_s']:,.2f} s")
    difference = "not a number" if values["max_abs_diff"] is None else f"{values['max_abs_diff']:.2g}"
    out.add_row("max. difference to plain NumPy", f"{difference} on {values['verified_texts']:,} texts")
    intact = "all equal to the file" if values["weights_intact"] else "DIFFERENT FROM THE FILE"
    out.add_row(f"{values['weight_pages']:,} weight pages", intact)
    return out


def mib(count: int) -> str:
    return f"{count / MIB:,.0f} MiB"


def answers(console: Console, query: str, hits: list[search.Hit], texts: list[Text]) -> None:
    width = min(NAME_WIDTH, max(len(texts[hit.text].name) for hit in hits))
    out = Table(title=f'"{query}"', title_justify="left", title_style="bold", show_header=False, box=None, expand=True)
    out.add_column(width=SCORE_WIDTH)
    out.add_column(width=width, no_wrap=True, overflow="ellipsis", style="cyan")
    out.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    for hit in hits:
        out.add_row(f"{hit.score:.3f}", texts[hit.text].name, texts[hit.text].summary)
    console.print(out)


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n")


def write_picture(path: Path, log: PageLog, page_bytes: int, parts: list[tuple[str, int]], capacity_pages: int) -> None:
    """parts: names and first bytes of what lies in the weights, in order."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    places = np.stack(log.places, axis=1)
    edges = np.append(log.seconds, log.seconds[-1] + 1e-3)
    figure, (pages, count) = pyplot.subplots(
        2, 1, sharex=True, figsize=(13, 8), height_ratios=(4, 1), layout="constrained"
    )
    colors = ListedColormap([color for _, color in PLACES.values()])
    pages.pcolormesh(edges, np.arange(len(places) + 1), places, cmap=colors, vmin=-0.5, vmax=len(PLACES) - 0.5)
    pages.invert_yaxis()
    pages.set_title("Where each page of the model lived")
    pages.set_ylabel(f"page of {page_bytes >> 10:,} KiB")
    starts = [first / page_bytes for _, first in parts]
    for start in starts[1:]:
        pages.axhline(start, color="black", linewidth=0.6)
    names = pages.secondary_yaxis("right")
    names.set_yticks([(a + b) / 2 for a, b in zip(starts, [*starts[1:], len(places)], strict=True)])
    names.set_yticklabels([name for name, _ in parts])
    pages.legend(
        handles=[Patch(facecolor=color, edgecolor="gray", label=label) for label, color in PLACES.values()],
        loc="upper center",
        bbox_to_anchor=(0.5, 1.12),
        ncols=len(PLACES),
        frameon=False,
    )
    count.step(edges[:-1], ((places == DEVICE) | (places == BOTH)).sum(axis=0), where="post", color=PLACES[DEVICE][1])
    count.axhline(capacity_pages, color="black", linestyle="--", linewidth=0.8)
    count.set_ylim(0, capacity_pages * 1.15)
    count.set_ylabel("weight pages in HBM")
    count.set_xlabel("seconds (dashed: what the device holds, activations included)")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
