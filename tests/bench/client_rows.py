# SPDX-License-Identifier: Apache-2.0
"""Rows through the whole of gmem: a Python client, its embedded gmemd and a device context, each a process of its own,
beside floors that the client takes in turn with them. Run as a program it measures and prints raw rows, one JSON line
each, as the C program does: `client_rows.py PROBE [--only ID]...`, PROBE the built probe.c.

That program is the bare handler of floor.c; it forks the client before gmem is loaded.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import hugepages
import rows
from loops import FloorRange, device_faults, device_touches, load, nothing, on_cpu

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FLAGS = ["-std=gnu11", "-g", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", "-fPIC", "-shared"]
SOURCES = ["tests/bench/probe/probe.c", "tests/bench/floor.c", "tests/bench/order.c", "csrc/uffd.c"]
TIMEOUT_S = 180

SIZES = {"4k": 4096, "64k": 65536, "2m": 2 << 20}
PREFETCHES_MIB = (64, 256)
# us of sleep before each touch: longer than a handler needs to fall asleep itself
MODES = {"isolated": 100, "stream": 0}
HUGE_PAGES = 640
WARM_BYTES = 768 << 20
COPY_BYTES = 64 << 20  # beyond any cache, and not many huge pages
CAPACITY = "320M"
REPETITIONS = 7
NO_HUGE = "no huge pages"
# The wake-up of another CPU costs as much as the rest of a fault, and the scheduler picks now one, now the other: the
# floor is the better of the two, always. gmem's own threads are left to the scheduler.
FAULT_FLOOR = "bare handler, blocking, on the faulting CPU"
CPU = max(os.sched_getaffinity(0))
MEMCPY = "memcpy, one thread"
SHM_FLOOR = "open and mmap of a file of that size in /dev/shm"
POOL_BYTES = 1 << 30
POOL_SIZES = ("4k", "64k")
# The other process of a pool: it makes it, brings all pages of a small one in, and waits.
OWNER = """
import sys, gmem
gmem.connect(sys.argv[1])
large = gmem.pool("large", size=1 << 30)
small = {size: gmem.pool(size, size=256 * page, page_size=page) for size, page in (("4k", 4096), ("64k", 65536))}
for pool in small.values():
    pool.array()[:] = 1
print("ready", flush=True)
sys.stdin.read()
"""

Pairs = list[tuple[float, float]]


def _table() -> dict[str, tuple[str, str | None, str]]:
    """id: unit, target, floor. Targets of moves are for 2 MiB pages."""
    table: dict[str, tuple[str, str | None, str]] = {}
    move_targets = {"d2h_isolated": "0.75", "d2h_stream": "0.95", "h2d_isolated": "0.85", "h2d_stream": "0.85"}
    for size in SIZES:
        for kind in ("fault", "device_fault"):
            table[f"client_{kind}_isolated_{size}_p50"] = ("us", "ratio <= 1.15", FAULT_FLOOR)
            table[f"client_{kind}_isolated_{size}_p99"] = ("us", "ratio <= 1.5", FAULT_FLOOR)
        for move, limit in move_targets.items():
            table[f"client_{move}_{size}"] = ("GB/s", f"ratio >= {limit}" if size == "2m" else None, MEMCPY)
    for way in ("h2d", "d2h"):
        for mebibytes in PREFETCHES_MIB:
            table[f"client_prefetch_{way}_{mebibytes}m"] = ("GB/s", "ratio >= 0.95", MEMCPY)
    table["client_pool_attach_1g"] = ("us", "value <= 1000", SHM_FLOOR)
    table["client_pool_attach_context_1g"] = ("us", "value <= 1000", "a kernel that does nothing")
    for size in POOL_SIZES:
        table[f"client_pool_first_touch_{size}_p50"] = ("us", "ratio <= 1.15", FAULT_FLOOR)
    return table


ROWS = _table()


def wanted(only: list[str]) -> list[str]:
    return [id for id in ROWS if not only or any(id.startswith(want) for want in only)]


# ---- in the harness ----


def build(folder: Path) -> Path:
    """probe.c and what it needs as a shared object in that folder."""
    library = folder / "probe.so"
    folder.mkdir(parents=True, exist_ok=True)
    command = [os.environ.get("CC", "gcc"), *FLAGS, "-Icsrc/include", "-Iclient/include", *SOURCES, "-o", str(library)]
    subprocess.run(command, cwd=ROOT, check=True)
    return library


def measure(folder: Path, only: list[str]) -> tuple[list[rows.Row], bool]:
    """Rows, and whether the measuring program ended well."""
    if not wanted(only):
        return [], True
    command = [sys.executable, str(Path(__file__).resolve()), str(build(folder))]
    command += [part for want in only for part in ("--only", want)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            output, _ = process.communicate(timeout=TIMEOUT_S)
        except BaseException:
            process.terminate()  # it restores the machine's settings
            raise
    return [_row(json.loads(line)) for line in output.splitlines()], process.returncode == 0


def _row(raw: dict[str, Any]) -> rows.Row:
    unit, target, floor_is = ROWS[raw["id"]]
    return rows.make_row(raw["id"], unit, target, [tuple(pair) for pair in raw["repetitions"]], floor_is, raw["note"])


# ---- in the client ----


def emit(id: str, pairs: Pairs, note: str | None = None) -> None:
    """No pairs: not measured, and note says why."""
    print(json.dumps({"id": id, "repetitions": pairs, "note": note}), flush=True)


class Bench:
    def __init__(self, path: str, library: ctypes.CDLL, floor: int, only: list[str], huge: bool) -> None:
        import gmem  # not before the fork

        self.gmem = gmem
        self.path, self.library, self.floor, self.ids, self.huge = path, library, floor, wanted(only), huge
        self.session = gmem.connect(embedded=True, devices=[f"simgpu0:capacity={CAPACITY}"])
        self.context = gmem.device("simgpu0").context()

    def close(self) -> None:
        self.context.close()
        self.session.close()

    def emit(self, results: dict[str, Pairs], note: str | None = None) -> None:
        for id, pairs in results.items():
            if id in self.ids:
                emit(id, pairs, note)

    def array(self, page_bytes: int, pages: int) -> Any:
        """Unified memory, written once by the CPU."""
        array = self.gmem.empty(pages * page_bytes, "u1", page_size=page_bytes, fork="none")
        array[::4096] = 1
        return array

    def copies(self, nbytes: int, huge: bool) -> tuple[int, int]:
        """Source and destination of the plain copy."""
        fd = ctypes.c_int()
        src, dst = (self.library.warm_map(nbytes, huge, ctypes.byref(fd)) for _ in range(2))
        if not src or not dst:
            raise MemoryError("no huge pages for the plain copy")
        return src, dst

    def measurable(self, results: dict[str, Pairs], size: str) -> bool:
        if not any(id in self.ids for id in results):
            return False
        if size == "2m" and not self.huge:
            self.emit(results, NO_HUGE)
            return False
        return True

    def faults(self, size: str) -> None:
        """Isolated faults on pages that are present, on the host and in the context."""
        results: dict[str, Pairs] = {
            f"client_{kind}_isolated_{size}_{p}": [] for kind in ("fault", "device_fault") for p in ("p50", "p99")
        }
        if not self.measurable(results, size):
            return
        pages, rounds = (32, 9) if size == "2m" else (256, 1)
        shape = (SIZES[size], pages, rounds, MODES["isolated"])
        bare = FloorRange()
        if not self.library.floor_attach(self.floor, pages * SIZES[size], SIZES[size], ctypes.byref(bare)):
            raise MemoryError("no huge pages for the bare handler")
        host, device = self.array(SIZES[size], pages), self.array(SIZES[size], pages)
        self.gmem.prefetch(device, "simgpu0")
        bare_ns, host_ns = ((ctypes.c_uint64 * (pages * rounds))() for _ in range(2))
        to = (ctypes.addressof(host_ns), ctypes.addressof(bare_ns))
        for repetition in range(REPETITIONS + 1):
            with on_cpu(CPU):
                self.library.probe_faults(host.ctypes.data, bare.at, *shape, *to)
            device_ns = self.context.launch(device_faults, self.path, CPU, device.ctypes.data, *shape).wait(60)
            times = (host_ns, host_ns, device_ns, device_ns)
            for pairs, values, percent in zip(results.values(), times, (50, 99, 50, 99), strict=True):
                if repetition:  # the first warms code and memory
                    pairs.append((percentile(values, percent) / 1e3, percentile(bare_ns, percent) / 1e3))
        self.emit(results)

    def moves(self, size: str) -> None:
        """Pages that move because the other side touches them: isolated touches, and one after the other."""
        results: dict[str, Pairs] = {f"client_{way}_{mode}_{size}": [] for way in ("h2d", "d2h") for mode in MODES}
        if not self.measurable(results, size):
            return
        pages, page_bytes = 24 if size == "2m" else 256, SIZES[size]
        src, dst = self.copies(pages * page_bytes, size == "2m")
        array = self.array(page_bytes, pages)
        times = (ctypes.c_uint64 * pages)()
        for repetition in range(REPETITIONS + 1):
            for mode, nap_us in MODES.items():
                shape = (page_bytes, pages, nap_us)
                h2d = self.context.launch(device_touches, self.path, array.ctypes.data, *shape).wait(60)
                self.library.probe_touches(array.ctypes.data, page_bytes, pages, True, nap_us, ctypes.addressof(times))
                d2h = list(times)
                self.library.probe_copies(dst, src, *shape, ctypes.addressof(times))
                bare = page_bytes / middle(list(times), mode)
                for way, values in (("h2d", h2d), ("d2h", d2h)):
                    if repetition:
                        results[f"client_{way}_{mode}_{size}"].append((page_bytes / middle(values, mode), bare))
        self.emit(results)

    def prefetches(self, mebibytes: int) -> None:
        """One request for many pages, each way, as a Python program makes it."""
        results: dict[str, Pairs] = {f"client_prefetch_{way}_{mebibytes}m": [] for way in ("h2d", "d2h")}
        if not self.measurable(results, "2m"):
            return
        nbytes = mebibytes << 20
        src, dst = self.copies(COPY_BYTES, True)
        array = self.array(SIZES["2m"], nbytes // SIZES["2m"])
        ns = ctypes.addressof(times := (ctypes.c_uint64 * 1)())
        for repetition in range(REPETITIONS + 1):
            for pairs, target in zip(results.values(), ("simgpu0", "host"), strict=True):
                start = time.perf_counter_ns()
                self.gmem.prefetch(array, target)
                ours, bare = time.perf_counter_ns() - start, 0
                for _ in range(nbytes // COPY_BYTES):
                    self.library.probe_copies(dst, src, COPY_BYTES, 1, 0, ns)
                    bare += times[0]
                if repetition:
                    pairs.append((nbytes / ours, nbytes / bare))
        self.emit(results)

    def pools(self) -> None:
        """Pools that another process has made and filled: attaching one, and the first touch of a page here."""
        ids = ["client_pool_attach_1g", "client_pool_attach_context_1g",
               *(f"client_pool_first_touch_{size}_p50" for size in POOL_SIZES)]  # fmt: skip
        if not any(id in self.ids for id in ids):
            return
        with subprocess.Popen([sys.executable, "-c", OWNER, self.session.path], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True) as owner:  # fmt: skip
            assert owner.stdout is not None and owner.stdout.readline() == "ready\n"
            self.emit({ids[0]: [self.attach() for _ in range(4 * REPETITIONS)][REPETITIONS:]})
            self.emit({ids[1]: [self.attach_context() for _ in range(4 * REPETITIONS)][REPETITIONS:]})
            for size in POOL_SIZES:
                self.emit({f"client_pool_first_touch_{size}_p50": self.first_touches(size)})
            assert owner.stdin is not None
            owner.stdin.close()

    def attach(self) -> tuple[float, float]:
        """In this process; the context maps it as well, beside, and is to be done with the one before."""
        self.context.launch(nothing).wait()
        start = time.perf_counter_ns()
        pool = self.gmem.pool("large", write=False)
        ours = time.perf_counter_ns() - start
        pool.close()
        with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
            os.truncate(file.name, POOL_BYTES)
            start = time.perf_counter_ns()
            fd = os.open(file.name, os.O_RDWR)
            memory = mmap.mmap(fd, POOL_BYTES)
            bare = time.perf_counter_ns() - start
            memory.close()
            os.close(fd)
        return ours / 1e3, bare / 1e3

    def attach_context(self) -> tuple[float, float]:
        """Until a kernel of the context has run that might use it."""
        start = time.perf_counter_ns()
        self.context.launch(nothing).wait()
        bare = time.perf_counter_ns() - start
        start = time.perf_counter_ns()
        pool = self.gmem.pool("large", write=False)
        self.context.launch(nothing).wait()
        ours = time.perf_counter_ns() - start
        pool.close()
        self.context.launch(nothing).wait()
        return ours / 1e3, bare / 1e3

    def first_touches(self, size: str) -> Pairs:
        pages, pairs = 256, []
        shape = (SIZES[size], pages, 1, MODES["isolated"])
        bare = FloorRange()
        if not self.library.floor_attach(self.floor, pages * SIZES[size], SIZES[size], ctypes.byref(bare)):
            raise MemoryError("no memory for the bare handler")
        with self.gmem.pool(size, write=True) as pool:
            bare_ns, host_ns = ((ctypes.c_uint64 * pages)() for _ in range(2))
            to = (ctypes.addressof(host_ns), ctypes.addressof(bare_ns))
            for repetition in range(REPETITIONS + 1):
                with on_cpu(CPU):
                    self.library.probe_faults(pool.address, bare.at, *shape, *to)
                if repetition:
                    pairs.append((percentile(host_ns, 50) / 1e3, percentile(bare_ns, 50) / 1e3))
        return pairs

    def run(self) -> None:
        groups: list[Callable[[], None]] = []
        for size in SIZES:
            groups += [partial(self.faults, size), partial(self.moves, size)]
        groups += [partial(self.prefetches, mebibytes) for mebibytes in PREFETCHES_MIB]
        for group in [*groups, self.pools]:
            group()


def percentile(values: Any, percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def middle(values: list[int], mode: str) -> float:
    """Time of one page: the median of isolated touches; the mean of a stream, whose pages may come several at once."""
    return statistics.median(values) if mode == "isolated" else statistics.fmean(values)


def run_client(path: str, library: ctypes.CDLL, floor: int, only: list[str], huge: bool) -> None:
    library.probe_die_with_parent()
    library.probe_prepare()
    try:
        bench = Bench(path, library, floor, only, huge)
    except Exception as error:  # whatever it is, rows measured elsewhere stand
        for id in wanted(only):
            emit(id, [], f"gmem could not be connected: {error}")
        return
    try:
        bench.run()
    finally:
        bench.close()


# ---- the measuring program ----


def warm(library: ctypes.CDLL, huge: bool) -> bool:
    """The first touch of memory in a virtual machine is slow for reasons outside it. False: no huge pages after all."""
    fd = ctypes.c_int()
    for kind in (False, True) if huge else (False,):
        at = library.warm_map(WARM_BYTES, kind, ctypes.byref(fd))
        if not at:
            return False
        library.warm_unmap(at, WARM_BYTES, fd)
    return huge


def main() -> int:
    parser = argparse.ArgumentParser(prog="client_rows.py")
    parser.add_argument("probe", metavar="PROBE")
    parser.add_argument("--only", action="append", default=[], metavar="ID")
    args = parser.parse_args()
    with hugepages.overcommit(HUGE_PAGES) as huge:
        library = load(args.probe)
        huge = warm(library, huge)
        floor = library.floor_create(True)
        child = os.fork()
        if not child:
            status = 1
            try:
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle; this process ends with it
                run_client(args.probe, library, floor, args.only, huge)
                status = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stdout.flush()
                os._exit(status)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    sys.exit(main())
