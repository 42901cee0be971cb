# SPDX-License-Identifier: Apache-2.0
"""Rows of the heap: heap.c against the C library of this tree, with a private gmemd."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import rows

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PREFIX = "malloc_free_"
IDS = {64: "malloc_free_64b", 4096: "malloc_free_4k", 65536: "malloc_free_64k"}
FLOOR = "the same allocator without gmem"
REPETITIONS = 7
TIMEOUT_S = 100


def build(folder: Path) -> Path:
    """heap.c, and the allocator alone as a shared library: as far from the program as libgmem-heap is."""
    subprocess.run(["make", "-s", "-C", str(ROOT / "client"), "lib"], check=True)
    libraries, floor, program = ROOT / "build/lib", folder / "liballocator.so", folder / "heap"
    command = ["gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread"]
    names = [f"-Wl,-u,gmem_je_{name}" for name in ("mallocx", "dallocx", "mallctl")]
    sources = [str(HERE / "probe/allocator.c"), str(ROOT / "build/client/allocator.a")]
    subprocess.run([*command, "-fPIC", "-shared", *names, *sources, "-lm", "-ldl", "-o", str(floor)], check=True)
    command += [f"-I{ROOT / 'client/include'}", str(HERE / "heap.c"), f"-L{libraries}", f"-L{folder}"]
    command += [f"-Wl,-rpath,{libraries},-rpath,{folder}", "-lgmem-heap", "-lgmem", "-lallocator", "-o", str(program)]
    subprocess.run(command, check=True)
    return program


def measure(folder: Path, only: list[str]) -> list[rows.Row]:
    wanted = [id for id in IDS.values() if not only or any(id.startswith(prefix) for prefix in only)]
    if not wanted:
        return []
    program = build(folder)
    with tempfile.TemporaryDirectory(prefix="gmem-", dir="/tmp") as runtime:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "XDG_RUNTIME_DIR": runtime}
        environment.pop("GMEM_SOCKET", None)
        done = subprocess.run(
            [program, str(REPETITIONS)], env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=True
        )
    pairs: dict[str, list[tuple[float, float]]] = {id: [] for id in IDS.values()}
    for line in done.stdout.splitlines():
        size, managed, plain = line.split()
        pairs[IDS[int(size)]].append((float(managed), float(plain)))
    return [rows.make_row(id, "ns", "ratio <= 1.1", pairs[id], FLOOR) for id in wanted]
