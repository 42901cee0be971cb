# SPDX-License-Identifier: Apache-2.0
"""valkey-py beside bare sockets, both in Python, pages one by one and in pipelines: why they do not go through a client
library. Reported only; the driver's own rows, beside bare sockets in C, are remotetier.c's."""

from __future__ import annotations

import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import quantiles
from typing import Any

import rows

PREFIX = "remote_valkeypy_"
SHAPES = {"4k": (4 << 10, 1), "64k": (64 << 10, 1), "2m": (2 << 20, 1), "4k_32": (4 << 10, 32),
          "64k_32": (64 << 10, 32), "2m_8": (2 << 20, 8)}  # fmt: skip
FLOOR = "bare sockets in Python"
ROUNDS = 5
CALLS = 40


def server() -> str:
    """The program; "" if there is none."""
    try:
        from gmemd.drivers.private import find_server

        return find_server()
    except (ImportError, OSError):
        return ""


def times_us(call: Callable[[], object]) -> tuple[float, float, float]:
    """Median, 99th percentile, mean."""
    times = []
    for _ in range(CALLS):
        begin = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - begin) / 1e3)
    percentiles = quantiles(times, n=100, method="inclusive")
    return percentiles[49], percentiles[98], sum(times) / CALLS


class Bare:
    """sendmsg and recv_into over a Unix socket."""

    def __init__(self, path: str) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.connect(path)

    def put(self, page: bytes, count: int) -> None:
        parts = []
        for n in range(count):
            parts += [b"*3\r\n$3\r\nSET\r\n$3\r\nb%02d\r\n$%d\r\n" % (n, len(page)), page, b"\r\n"]
        left = [memoryview(part) for part in parts]
        while left:
            sent = self._sock.sendmsg(left)
            while left and sent >= len(left[0]):
                sent -= len(left.pop(0))
            if left:
                left[0] = left[0][sent:]
        assert self._sock.recv(5 * count, socket.MSG_WAITALL) == b"+OK\r\n" * count

    def get(self, pages: list[bytearray]) -> None:
        self._sock.sendall(b"".join(b"*2\r\n$3\r\nGET\r\n$3\r\nb%02d\r\n" % n for n in range(len(pages))))
        for page in pages:
            self._sock.recv(len(b"$%d\r\n" % len(page)), socket.MSG_WAITALL)
            self._sock.recv_into(page, len(page), socket.MSG_WAITALL)
            self._sock.recv(2, socket.MSG_WAITALL)


class Library:
    """The same by valkey-py."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def put(self, page: bytes, count: int) -> None:
        if count == 1:
            self._client.set("v00", page)
            return
        with self._client.pipeline(transaction=False) as pipeline:
            for n in range(count):
                pipeline.set(f"v{n:02}", page)
            pipeline.execute()

    def get(self, count: int) -> None:
        if count == 1:
            self._client.get("v00")
            return
        with self._client.pipeline(transaction=False) as pipeline:
            for n in range(count):
                pipeline.get(f"v{n:02}")
            pipeline.execute()


def _rows_of(id: str, size: int, pairs: list[tuple[Any, Any]]) -> list[rows.Row]:
    """Three rows of what times_us() says of both; size: bytes of a call."""
    p50, p99 = ([(ours[i], bare[i]) for ours, bare in pairs] for i in (0, 1))
    rate = [(size / ours[2] / 1e3, size / bare[2] / 1e3) for ours, bare in pairs]
    return [
        rows.make_row(f"{id}_p50", "us", None, p50, FLOOR), rows.make_row(f"{id}_p99", "us", None, p99, FLOOR),
        rows.make_row(f"{id}_rate", "GB/s", None, rate, FLOOR),
    ]  # fmt: skip


def _measure(path: str) -> list[rows.Row]:
    import valkey

    library, bare, made = Library(valkey.Valkey(unix_socket_path=path)), Bare(path), []
    for name, (size, count) in SHAPES.items():
        page, pages = bytes(range(256)) * (size // 256), [bytearray(size) for _ in range(count)]
        puts, gets = [], []
        for _ in range(ROUNDS):
            puts.append((times_us(partial(library.put, page, count)), times_us(partial(bare.put, page, count))))
            gets.append((times_us(partial(library.get, count)), times_us(partial(bare.get, pages))))
        for way, pairs in (("put", puts), ("get", gets)):
            made += _rows_of(f"{PREFIX}{way}_{name}", size * count, pairs)
    return made


def measure(only: list[str]) -> list[rows.Row]:
    if only and not any(PREFIX.startswith(prefix) or prefix.startswith(PREFIX) for prefix in only):
        return []
    program = server()
    if not program:
        return [rows.make_row(f"{PREFIX}put_4k_p50", "us", None, [], FLOOR, "no server here")]
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/socket"
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", program, "--port", "0", "--unixsocket", path, "--save", ""],
            stdout=subprocess.DEVNULL,
        )
        try:
            while not Path(path).exists() and process.poll() is None:
                time.sleep(0.01)
            return _measure(path)
        finally:
            process.kill()
            process.wait()
