# SPDX-License-Identifier: Apache-2.0
"""Slowdown over data/memory, a panel for each workload. Needs the extra `bench`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from workloads import results
from workloads.runner import BYHAND, HINTS, ONDEMAND, PLAIN, UMAP, ZRAM, Measured

COLOURS = {HINTS: "C0", PLAIN: "C1", ONDEMAND: "C3", BYHAND: "0.4", ZRAM: "C4", UMAP: "C2"}
COLUMNS = 4


def write(path: Path, measured: Iterable[Measured]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    table = results.by_key(measured)
    names = list(dict.fromkeys(key[0] for key in table))
    height = math.ceil(len(names) / COLUMNS)
    figure, axes = pyplot.subplots(height, COLUMNS, figsize=(4 * COLUMNS, 3.2 * height), squeeze=False)
    for name, axis in zip(names, axes.flat, strict=False):
        for link in dict.fromkeys(key[1] for key in table if key[0] == name):
            for variant, colour in COLOURS.items():
                points = results.slowdowns(table, name, link, variant)
                label = variant + (f", {link / 1e9:g} GB/s" if link else "")
                if points:
                    axis.plot(points.keys(), points.values(), "--" if link else "-", c=colour, marker=".", label=label)
        axis.set_title(name)
        axis.set_yscale("log")
        axis.grid(True, which="both", alpha=0.3)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    _finish(figure, axes)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _finish(figure, axes) -> None:
    for axis in axes[-1]:
        axis.set_xlabel("data / memory (%)")
    for row in axes:
        row[0].set_ylabel("slowdown beside 75 %")
    found = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(found.values(), found.keys(), loc="lower right", ncols=2)
    figure.tight_layout()
