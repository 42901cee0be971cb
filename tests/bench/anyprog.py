# SPDX-License-Identifier: Apache-2.0
"""Rows of `gmemctl run`: what managed memory costs an unmodified program whose limit is never reached, beside the same
program with the same allocator preloaded, on plain memory."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from pathlib import Path

import rows

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PREFIX = "any_"
FLOOR = "the program with jemalloc preloaded"
# what, scale of a nanosecond, unit, target
ROWS = {
    "any_malloc": ("malloc", 1.0, "ns", "ratio <= 1.15"),
    "any_compute": ("compute", 1.0, "ns", "ratio <= 1.15"),
    "any_fork_64m": ("fork", 1e-6, "ms", None),
    "any_spawn": ("spawn", 1e-6, "ms", None),
}
REPETITIONS = 5
TIMEOUT_S = 200


def jemalloc() -> str | None:
    """Debian's; the one inside of libgmem-any is of the same version."""
    found = subprocess.run(["gcc", "-print-file-name=libjemalloc.so.2"], capture_output=True, text=True).stdout.strip()
    return found if os.path.isabs(found) and os.path.exists(found) else None


def build(folder: Path) -> Path:
    subprocess.run(["make", "-s", "-C", str(ROOT / "client"), "lib"], check=True)
    program = folder / "anyprog"
    command = ["gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-fno-builtin-malloc"]
    subprocess.run([*command, str(HERE / "anyprog.c"), "-o", str(program)], check=True)
    return program


def _time(command: list[str | Path], **more) -> float:
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True, **more)
    return float(done.stdout)


def measure(folder: Path, only: list[str]) -> list[rows.Row]:
    wanted = [id for id in ROWS if not only or any(id.startswith(prefix) for prefix in only)]
    floor = jemalloc()
    if not wanted or not floor or not os.access("/dev/userfaultfd", os.R_OK | os.W_OK):
        return [rows.make_row(id, ROWS[id][2], ROWS[id][3], [], FLOOR) for id in wanted]
    program, made = build(folder), []
    run = [Path(sysconfig.get_path("scripts")) / "gmemctl", "run", "--quiet", "--require", "--limit", "1G", "--"]
    for id in wanted:
        what, scale, unit, target = ROWS[id]
        pairs = [
            (
                scale * _time([*run, program, what]),
                scale * _time([program, what], env={**os.environ, "LD_PRELOAD": floor}),
            )
            for _ in range(REPETITIONS)
        ]
        made.append(rows.make_row(id, unit, target, pairs, FLOOR))
    return made
