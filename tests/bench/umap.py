# SPDX-License-Identifier: Apache-2.0
"""Rows that stand beside LLNL UMap, a user-space pager, built aside from its public source:

    cmake -S umap -B build -DENABLE_TESTS=Off -DENABLE_LOGGING=Off -DCMAKE_BUILD_TYPE=Release -DCMAKE_INSTALL_PREFIX=DIR
    make -C build install
    make bench BENCH_FLAGS="--umap DIR"
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import rows

HERE = Path(__file__).resolve().parent
PREFIX = "elsewhere_"
SIZES = {"4k": (4096, 256), "64k": (65536, 256), "2m": (2 << 20, 24)}  # page bytes and pages, as in moves.c
REPETITIONS = 5
TIMEOUT_S = 60


def build(umap: Path, folder: Path) -> Path:
    program = folder / "umap"
    libraries = umap / "lib"
    command = ["g++", "-O2", "-std=c++17", "-Wall", "-Wextra", f"-I{umap / 'include'}", str(HERE / "umap.cpp")]
    command += [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-lumap", "-pthread", "-o", str(program)]
    subprocess.run(command, check=True)
    return program


def measure(program: Path, size: str) -> list[tuple[float, float]]:
    """For each repetition: GB/s in sequence, and the median of isolated random touches in us."""
    page_bytes, pages = SIZES[size]
    # Room for everything: no page is evicted.
    settings = {"UMAP_PAGESIZE": str(page_bytes), "UMAP_BUFSIZE": str(4 * pages)}
    done = subprocess.run(
        [program, str(pages), str(REPETITIONS)],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=True,
    )
    figures = [line.split() for line in done.stdout.splitlines()]
    return [(float(sequence), float(isolated)) for sequence, isolated in figures]


def complete(measured: list[rows.Row], umap: Path, folder: Path) -> None:
    """Gives the rows that have UMap for their floor its figures, from this same run."""
    wanted = [row for row in measured if row["id"].startswith(PREFIX) and row["value"] is not None]
    if not wanted:
        return
    program = build(umap, folder)
    figures = {size: measure(program, size) for size in SIZES if any(f"_{size}" in row["id"] for row in wanted)}
    for row in wanted:
        size = next(size for size in figures if f"_{size}" in row["id"])
        which = 0 if "sequential" in row["id"] else 1
        pairs = [
            (value, floor[which]) for (value, _), floor in zip(row["repetitions"], figures[size], strict=False)
        ]
        row.update(rows.make_row(row["id"], row["unit"], row["target"], pairs, row["floor_is"]))
