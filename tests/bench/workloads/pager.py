# SPDX-License-Identifier: Apache-2.0
"""The job on LLNL UMap, a user-space pager, with a buffer of the same budget over a store of compressed memory
(pager.cpp). It is built aside, as tests/bench/umap.py says. Run as a module: the process whose memory it pages."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from workloads import arena, direct
from workloads.workload import Workload

BENCH = Path(__file__).resolve().parent.parent
TIMEOUT_S = 300


def build(umap: Path, folder: Path) -> Path:
    library, installed = folder / "workload-umap.so", umap / "lib"
    command = ["g++", "-O2", "-std=c++17", "-Wall", "-Wextra", "-shared", "-fPIC", f"-I{umap / 'include'}"]
    command += [str(Path(__file__).with_suffix(".cpp")), f"-L{installed}", f"-Wl,-rpath,{installed}", "-lumap"]
    subprocess.run([*command, "-l:liblz4.so.1", "-pthread", "-o", str(library)], check=True)
    return library


def measure(library: Path, workload: Workload, percent: int, rounds: int) -> tuple[list[float], str | None, bool]:
    """Seconds of each round, a note, and whether the result was wrong."""
    page_bytes = max(spec.page_bytes for spec in workload.specs.values())
    quick = workload.nbytes < type(workload)().nbytes
    command = [sys.executable, "-m", "workloads.pager", str(library), workload.name, str(int(quick)), str(rounds)]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(BENCH), *filter(None, sys.path)]),
        "UMAP_PAGESIZE": str(page_bytes), "UMAP_BUFSIZE": str(workload.capacity(percent) // page_bytes),
    }  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return [], f"UMap: not done within {TIMEOUT_S} s", False
    if done.returncode or not done.stdout:
        return [], f"UMap: {done.stderr.strip().splitlines()[-1:] or done.returncode}", False
    return direct.read(done.stdout)


def main(library: str, name: str, quick: str, rounds: str) -> None:
    from workloads import catalogue

    workload = catalogue.make(name, bool(int(quick)))
    page_bytes = int(os.environ["UMAP_PAGESIZE"])
    sizes = {name: -(-spec.nbytes // page_bytes) * page_bytes for name, spec in workload.specs.items()}
    pager = ctypes.CDLL(library)
    pager.workload_map.argtypes, pager.workload_map.restype = (ctypes.c_size_t,), ctypes.c_void_p
    address = pager.workload_map(sum(sizes.values()))
    if not address:
        sys.exit("UMap gives no memory")
    memory = np.frombuffer((ctypes.c_char * sum(sizes.values())).from_address(address), np.uint8)
    arrays, offset = {}, 0
    for name, spec in workload.specs.items():
        arrays[name] = arena.window(memory, offset, spec.shape, spec.dtype)
        offset += sizes[name]
    direct.report(workload, arrays, int(rounds))
    os._exit(0)  # its workers do not end by themselves


if __name__ == "__main__":
    main(*sys.argv[1:])
