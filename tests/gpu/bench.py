# SPDX-License-Identifier: Apache-2.0
"""Figures of the cuda driver on this machine's GPU, beside those of the driver API alone in the same run.

usage: bench.py [CAPACITY_MIB]. Each line: what, figure, and its ratio to the line it is compared with. Needs a GPU.
"""

import ctypes
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "integration"))

import gmem
import numpy as np
from cuda import Cuda

MIB = 1 << 20
CAPACITY = int(sys.argv[1]) if len(sys.argv) > 1 else 2048
ROUNDS = 5


def timed(function, rounds: int = ROUNDS) -> float:
    """Median seconds."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def row(what: str, value: float, unit: str, beside: float | None = None) -> None:
    print(f"{what:58} {value:9.2f} {unit}" + (f"   x{value / beside:.2f}" if beside else ""), flush=True)


def by_hand(cuda: Cuda, size: int) -> tuple[float, float]:
    """cuMemcpyAsync from and to pinned memory: H2D and D2H GB/s."""
    host, device = ctypes.c_void_p(), ctypes.c_uint64()
    cuda.must("cuMemHostAlloc", ctypes.byref(host), ctypes.c_size_t(size), 0)
    cuda.must("cuMemAlloc_v2", ctypes.byref(device), ctypes.c_size_t(size))

    def h2d() -> None:
        cuda.must("cuMemcpyHtoDAsync_v2", device, host, ctypes.c_size_t(size), None)
        cuda.synchronize()

    def d2h() -> None:
        cuda.must("cuMemcpyDtoHAsync_v2", host, device, ctypes.c_size_t(size), None)
        cuda.synchronize()

    rates = size / timed(h2d) / 1e9, size / timed(d2h) / 1e9
    cuda.must("cuMemFree_v2", device)
    cuda.must("cuMemFreeHost", host)
    return rates


def moves(cuda: Cuda, device, size: int, pinned: tuple[float, float]) -> None:
    a = gmem.zeros(size // 8, np.int64)
    a[:] = 1
    times: dict[str, list[float]] = {"acquire": [], "prefetch to": [], "fault back": [], "prefetch back": []}

    def clock(what: str, function) -> None:
        start = time.perf_counter()
        function()
        times[what].append(time.perf_counter() - start)

    def acquire() -> None:
        with gmem.acquire(device, a) as view:
            cuda.launch("fill", view, 8, 1)

    for _ in range(ROUNDS):
        clock("acquire", acquire)
        cuda.synchronize()
        time.sleep(0.01)
        clock("fault back", lambda: a[:: MIB // 4].__iadd__(1))
        clock("prefetch to", lambda: gmem.prefetch(a, device))
        clock("prefetch back", lambda: gmem.prefetch(a, "host"))
    for what, beside in (("acquire", 0), ("prefetch to", 0), ("fault back", 1), ("prefetch back", 1)):
        rate = size / sorted(times[what])[ROUNDS // 2] / 1e9
        row(f"{what}, {size // MIB} MiB of the other side's", rate, "GB/s", pinned[beside])


def resident(cuda: Cuda, device) -> None:
    a = gmem.zeros(2 * MIB // 8, np.int64)
    context = device.context()
    ranges = [(a.__array_interface__["data"][0], a.nbytes)]
    context.acquire(ranges, True)
    context.release(ranges).wait()

    def cycle() -> None:
        for _ in range(200):
            context.acquire(ranges, True)
            context.release(ranges)

    start = time.perf_counter()
    for _ in range(200):
        context.acquire(ranges, True)
    acquired = (time.perf_counter() - start) / 200
    for _ in range(200):
        context.release(ranges)
    context.synchronize()
    row("acquire of a resident page, from Python", acquired * 1e6, "us")
    row("acquire and release of a resident page", timed(cycle) / 200 * 1e6, "us")
    context.synchronize()
    context.close()


def oversubscribed(cuda: Cuda, device, capacity: int) -> None:
    """Kernels over arrays of 64 MiB, one after the other, at 50 to 200 % of the capacity."""
    stream = cuda.stream()
    for percent in (50, 100, 125, 150, 200):
        arrays = [gmem.zeros(8 * MIB, np.int64) for _ in range(capacity * percent // 100 // (64 * MIB))]
        for a in arrays:
            with gmem.acquire(device, a, mode="w", stream=stream) as view:
                cuda.fill(view, 0, stream)

        def sweep(arrays=arrays) -> None:
            for a in arrays:
                with gmem.acquire(device, a, stream=stream) as view:
                    cuda.bump(view, 1, stream)
            cuda.synchronize()

        seconds = timed(sweep, 2)
        size = sum(a.nbytes for a in arrays)
        row(f"read-modify-write of {percent} % of {capacity // MIB} MiB", size / seconds / 1e9, "GB/s")
        assert all(a[0] == 2 and a[-1] == 8 * MIB + 1 for a in arrays), "wrong result"


def main() -> None:
    session = gmem.connect(devices=[f"cuda0:driver=cuda,capacity={CAPACITY}M,reserve={CAPACITY}M"], embedded=True)
    cuda = Cuda()
    name = ctypes.create_string_buffer(64)
    version = ctypes.c_int()
    cuda.must("cuDeviceGetName", name, 64, 0)
    cuda.must("cuDriverGetVersion", ctypes.byref(version))
    print(f"# {name.value.decode()}, CUDA {version.value}, kernel {os.uname().release}, {os.cpu_count()} CPUs")
    device = gmem.device("cuda0")
    size = min(512, CAPACITY // 4) * MIB
    pinned = by_hand(cuda, size) if "GMEM_LIBCUDA" not in os.environ else (1.0, 1.0)
    row("cuMemcpyHtoDAsync, pinned", pinned[0], "GB/s")
    row("cuMemcpyDtoHAsync, pinned", pinned[1], "GB/s")
    time.sleep(2)  # frames are made ahead
    moves(cuda, device, size, pinned)
    resident(cuda, device)
    oversubscribed(cuda, device, CAPACITY * MIB)
    stats = next(h for h in session.devices() if h["name"] == "cuda0")
    print({key: stats[key] for key in ("in_bytes", "out_bytes", "evictions", "evicted_clean", "errors", "health")})
    session.close()


main()
