# SPDX-License-Identifier: Apache-2.0
"""`python tests/bench [--only ID]... [--out FILE]`: gmem beside its floors, measured in one run.

Rows come from a C program on the core itself (bench.c) and from a client of a private gmemd (client_rows.py,
control.py). FILE gets {"machine": ..., "rows": [...]}; ID is the beginning of a row's id.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import anyprog
import client_rows
import control
import heap
import machine
import preload
import remote
import rows
import umap
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "bench"
FLAGS = ["-std=gnu11", "-g", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", "-fno-omit-frame-pointer"]
INCLUDES = ["-Icsrc/include", "-Iclient/include"]
TIMEOUT_S = 240


def optional(compiler: str, what: str) -> list[str]:
    """Flags or libraries of what the core uses where it can be had."""
    return subprocess.run([".ci/optional", compiler, what], cwd=ROOT, text=True, capture_output=True).stdout.split()


CLIENTS = ("anyprog.c", "heap.c", "preload.c")  # programs of their own, without the core


def build() -> Path:
    """The C program: this folder's sources, the core's and the C tests' harness, compiled again where older."""
    sources = [
        *(source for source in sorted(HERE.glob("*.c")) if source.name not in CLIENTS),
        *sorted(ROOT.glob("csrc/**/*.c")),
        ROOT / "tests/unit_c/harness.c",
    ]
    headers = [*HERE.glob("*.h"), *ROOT.glob("csrc/**/*.h"), *ROOT.glob("client/include/*.h")]
    headers += [ROOT / "tests/unit_c/harness.h"]
    newest_header = max(header.stat().st_mtime for header in headers)
    compiler = os.environ.get("CC", "gcc")
    flags = [*FLAGS, *INCLUDES, *optional(compiler, "flags")]
    objects = []
    for source in sources:
        target = BUILD / source.relative_to(ROOT).with_suffix(".o")
        objects.append(str(target))
        if target.exists() and target.stat().st_mtime > max(newest_header, source.stat().st_mtime):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([compiler, *flags, "-c", str(source), "-o", str(target)], cwd=ROOT, check=True)
    program = BUILD / "bench"
    subprocess.run([compiler, *FLAGS, *objects, *optional(compiler, "libs"), "-o", str(program)], cwd=ROOT, check=True)
    return program


# Lines of the plan's table that nothing in gmem can be measured for yet: rows all the same, and never met.
PENDING = (
    ("d2h_retained_frame_2m", "GB/s", "ratio >= 0.80", "memcpy", "frames are not retained yet"),
)


def row_of(line: str) -> rows.Row:
    """A line of the C program. The row is computed from its repetitions here, so that there is one arithmetic."""
    raw = json.loads(line)
    pairs = [(value, floor) for value, floor in raw["repetitions"]]
    return rows.make_row(raw["id"], raw["unit"], raw["target"], pairs, raw["floor_is"], raw["note"])


def _too_long(_signal: int, _frame: object) -> None:
    raise TimeoutError(f"the benchmark did not end within {TIMEOUT_S} s")


def measure_core(program: Path, only: list[str], progress: Progress) -> tuple[list[rows.Row], bool]:
    """Rows, and whether the program ended well."""
    task = progress.add_task("first rows", total=None)
    measured = []
    environment = {**os.environ, "GMEM_BENCH_VALKEY": remote.server()}
    with subprocess.Popen(
        [str(program), *only], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    ) as process:
        assert process.stdout
        signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(TIMEOUT_S)
        try:
            for line in process.stdout:
                measured.append(row_of(line))
                progress.update(task, description=f"{len(measured)} rows, last {measured[-1]['id']}")
        except BaseException:
            process.terminate()  # it restores the machine's settings
            raise
        finally:
            signal.alarm(0)
    progress.remove_task(task)
    return measured, process.returncode == 0


def wants(only: list[str], id: str) -> bool:
    return not only or any(id.startswith(prefix) for prefix in only)


def show(console: Console, measured: list[rows.Row], out: Path) -> None:
    table = Table(title="gmem beside its floors (medians; ratio: median over repetitions)")
    for name in ("row", "gmem", "floor", "unit", "ratio", "target", ""):
        table.add_column(name, justify="left" if name in ("row", "unit", "target", "") else "right", no_wrap=True)
    for row in measured:
        style = {True: "green", False: "red", None: None}[row["met"]]
        table.add_row(*rows.cells(row), style=style)
    console.print(table)
    for note in sorted({f"{row['id']}: {row['note']}" for row in measured if row["note"] and row["value"] is None}):
        console.print(f"not measured: {note}", highlight=False)
    console.print(f"{out}: {len(measured)} rows", highlight=False)


def write(out: Path, measured: list[rows.Row]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".tmp")
    partial.write_text(json.dumps({"machine": machine.facts(), "rows": measured}, indent=1) + "\n")
    partial.replace(out)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench", description="gmem beside its floors, measured in one run")
    parser.add_argument(
        "--only", action="append", default=[], metavar="ID", help="rows whose id begins so (repeatable)"
    )
    parser.add_argument(
        "--umap", type=Path, metavar="DIR", help="where LLNL UMap is installed: floor of the elsewhere rows (umap.py)"
    )
    parser.add_argument("--out", type=Path, default=BUILD / "results.json", metavar="FILE")
    args = parser.parse_args(argv)
    console = Console() if sys.stdout.isatty() else Console(width=110)
    BUILD.mkdir(parents=True, exist_ok=True)
    lock = (BUILD / "lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)  # two at once would measure each other; held until this process ends
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("building", total=None)
        program = build()
        progress.remove_task(task)
        measured, ended_well = measure_core(program, args.only, progress)
        if args.umap:
            task = progress.add_task("UMap", total=None)
            umap.complete(measured, args.umap, BUILD)
            progress.remove_task(task)
        if client_rows.wanted(args.only):
            task = progress.add_task("rows of a real client", total=None)
            through_client, client_ended_well = client_rows.measure(BUILD, args.only)
            measured += through_client
            ended_well = ended_well and client_ended_well
            progress.remove_task(task)
        task = progress.add_task(heap.PREFIX, total=None)
        measured += heap.measure(BUILD, args.only)
        progress.remove_task(task)
        task = progress.add_task(preload.PREFIX, total=None)
        measured += preload.measure(BUILD, args.only)
        progress.remove_task(task)
        task = progress.add_task(remote.PREFIX, total=None)
        measured += remote.measure(args.only)
        progress.remove_task(task)
        task = progress.add_task(anyprog.PREFIX, total=None)
        measured += anyprog.measure(BUILD, args.only)
        progress.remove_task(task)
        if wants(args.only, control.ID):
            task = progress.add_task(control.ID, total=None)
            measured.append(control.measure())
            progress.remove_task(task)
    for id, unit, target, floor_is, note in PENDING:
        if wants(args.only, id):
            measured.append(rows.make_row(id, unit, target, [], floor_is, note))
    if not measured:
        parser.error(f"--only: no row begins with {' or '.join(args.only)}")
    write(args.out, measured)
    show(console, measured, args.out)
    return 0 if ended_well else 1


if __name__ == "__main__":
    sys.exit(main())
