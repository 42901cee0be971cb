# SPDX-License-Identifier: Apache-2.0
"""`python tests/bench/workloads [--quick] [--only NAME]... [--out FILE]`: jobs on memory that is too small for them.

FILE gets {"machine": ..., "rows": [...]} as from `make bench`; beside it lies a plot of slowdown over data/memory.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy: a kernel is one thread, as the copies are

import argparse  # noqa: E402
import fcntl  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

BENCH = Path(__file__).resolve().parent.parent
sys.path[0] = str(BENCH)  # instead of this folder, whose modules are a package's
os.environ["PYTHONPATH"] = os.pathsep.join([str(BENCH), *filter(None, [os.environ.get("PYTHONPATH")])])  # for drivers

import hugepages  # noqa: E402
import machine  # noqa: E402
import rows  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn  # noqa: E402

from workloads import catalogue, pager, plot, results, runner, table  # noqa: E402

BUILD = BENCH.parent.parent / "build" / "bench"
PERCENTS = (75, 100, 125, 150, 200, 300)
QUICK_PERCENTS = (75, 200)
LINKS = (0, 4_000_000_000)
HUGE_PAGES = 1536


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="workloads", description="jobs on memory that is too small for them")
    parser.add_argument("--quick", action="store_true", help="tiny data, two ratios: whether it works, not how fast")
    parser.add_argument("--only", action="append", choices=list(catalogue.WORKLOADS), metavar="NAME", help="repeatable")
    parser.add_argument("--percent", type=int, action="append", metavar="P", help="data/memory in % (repeatable)")
    parser.add_argument("--link", type=float, action="append", metavar="GB/S", help="0: memory speed (repeatable)")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds of each")
    parser.add_argument("--tier", default=runner.TIER, help="what host memory overflows into; as gmemd's --device")
    parser.add_argument("--umap", type=Path, metavar="DIR", help="where LLNL UMap is installed (../umap.py)")
    parser.add_argument("--out", type=Path, default=BUILD / "workloads.json", metavar="FILE")
    return parser.parse_args(argv)


def settings(chosen: argparse.Namespace) -> list[runner.Setting]:
    percents = chosen.percent or (QUICK_PERCENTS if chosen.quick else PERCENTS)
    library = pager.build(chosen.umap, BUILD) if chosen.umap else None
    links = [int(link * 1e9) for link in chosen.link] if chosen.link else LINKS
    return [
        runner.Setting(percent, link, chosen.tier, 2 if chosen.quick else chosen.rounds, pager=library)
        for link in links
        for percent in percents
    ]


def measure(chosen: argparse.Namespace, huge: bool, progress: Progress) -> list[runner.Measured]:
    measured: list[runner.Measured] = []
    chosen_settings = settings(chosen)
    daemons = runner.Daemons(huge)
    task = progress.add_task("starting", total=None)
    try:
        for name in chosen.only or catalogue.WORKLOADS:
            workload = catalogue.make(name, chosen.quick)
            for setting in chosen_settings:
                if setting.link and workload.where == "host":
                    continue  # no link between the host and itself
                progress.update(task, description=f"{name}, {setting.percent} %")
                measured += runner.run(workload, setting, daemons)
    finally:
        daemons.close()
        progress.remove_task(task)
    return measured


def write(out: Path, found: list[rows.Row]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".tmp")
    partial.write_text(json.dumps({"machine": machine.facts(), "rows": found}, indent=1) + "\n")
    partial.replace(out)


def main(argv: list[str] | None = None) -> int:
    chosen = arguments(argv)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    BUILD.mkdir(parents=True, exist_ok=True)
    lock = (BUILD / "lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)  # two at once would measure each other
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        with hugepages.overcommit(HUGE_PAGES) as huge:
            measured = measure(chosen, huge, progress)
    # Belady's schedule for a cycle: all but what the device keeps goes over the link each time.
    half = {"transformer": catalogue.make("transformer", chosen.quick).nbytes // 2}
    found = results.make_rows(measured, half)
    write(chosen.out, found)
    table.show(console, measured, found)
    plot.write(chosen.out.with_suffix(".png"), measured)
    console.print(f"{chosen.out}: {len(found)} rows; {chosen.out.with_suffix('.png')}", highlight=False)
    wrong = [each for each in measured if each.wrong]
    for each in wrong:
        console.print(f"wrong result: {each.workload}, {each.percent} %, {each.variant}: {each.note}", style="red")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
