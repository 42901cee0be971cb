# SPDX-License-Identifier: Apache-2.0
"""Rows of the preload library: what plain mmap() and munmap() cost a program that runs under it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import rows

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PREFIX = "preload_"
IDS = {4096: "preload_mmap_munmap_4k", 1 << 20: "preload_mmap_munmap_1m"}
FLOOR = "libc's functions, past the library"
REPETITIONS = 7
TIMEOUT_S = 100


def build(folder: Path) -> Path:
    subprocess.run(["make", "-s", "-C", str(ROOT / "client"), "lib"], check=True)
    program = folder / "preload"
    command = ["gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", str(HERE / "preload.c"), "-ldl"]
    subprocess.run([*command, "-o", str(program)], check=True)
    return program


def measure(folder: Path, only: list[str]) -> list[rows.Row]:
    wanted = [id for id in IDS.values() if not only or any(id.startswith(prefix) for prefix in only)]
    if not wanted:
        return []
    environment = {**os.environ, "LD_PRELOAD": str(ROOT / "build/lib/libgmem-preload.so")}
    command = [build(folder), str(REPETITIONS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    pairs: dict[str, list[tuple[float, float]]] = {id: [] for id in IDS.values()}
    for line in done.stdout.splitlines():
        size, ours, plain = line.split()
        pairs[IDS[int(size)]].append((float(ours), float(plain)))
    return [rows.make_row(id, "ns", "ratio <= 1.05", pairs[id], FLOOR) for id in wanted]
