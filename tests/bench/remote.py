# SPDX-License-Identifier: Apache-2.0
"""valkey-py beside bare sockets, both in Python: why pages do not go through a client library. Reported only; the
driver's own rows, beside bare sockets in C, are remotetier.c's."""

from __future__ import annotations

import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import rows

PREFIX = "remote_valkeypy_"
SIZES = {"4k": 4 << 10, "64k": 64 << 10, "2m": 2 << 20}
ROUNDS = 5
CALLS = 40


def server() -> str:
    """The program; "" if there is none."""
    try:
        from gmemd.drivers.private import find_server

        return find_server()
    except (ImportError, OSError):
        return ""


def median_us(call: Callable[[], object]) -> float:
    times = []
    for _ in range(CALLS):
        begin = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - begin) / 1e3)
    return median(times)


class Bare:
    """sendmsg and recv_into over a Unix socket."""

    def __init__(self, path: str) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.connect(path)

    def put(self, page: bytes) -> None:
        parts = [b"*3\r\n$3\r\nSET\r\n$1\r\nb\r\n$%d\r\n" % len(page), page, b"\r\n"]
        left = [memoryview(part) for part in parts]
        while left:
            sent = self._sock.sendmsg(left)
            while left and sent >= len(left[0]):
                sent -= len(left.pop(0))
            if left:
                left[0] = left[0][sent:]
        assert self._sock.recv(5) == b"+OK\r\n"

    def get(self, page: bytearray) -> None:
        self._sock.sendall(b"*2\r\n$3\r\nGET\r\n$1\r\nb\r\n")
        self._sock.recv(len(b"$%d\r\n" % len(page)), socket.MSG_WAITALL)
        self._sock.recv_into(page, len(page), socket.MSG_WAITALL)
        self._sock.recv(2, socket.MSG_WAITALL)


def _measure(path: str) -> list[rows.Row]:
    import valkey

    client, bare, made = valkey.Valkey(unix_socket_path=path), Bare(path), []
    for name, size in SIZES.items():
        page, into = bytes(range(256)) * (size // 256), bytearray(size)
        puts, gets = [], []
        for _ in range(ROUNDS):
            puts.append((median_us(lambda p=page: client.set("v", p)), median_us(lambda p=page: bare.put(p))))
            gets.append((median_us(lambda: client.get("v")), median_us(lambda i=into: bare.get(i))))
        made.append(rows.make_row(f"{PREFIX}put_{name}", "us", None, puts, "bare sockets in Python"))
        made.append(rows.make_row(f"{PREFIX}get_{name}", "us", None, gets, "bare sockets in Python"))
    return made


def measure(only: list[str]) -> list[rows.Row]:
    if only and not any(PREFIX.startswith(prefix) or prefix.startswith(PREFIX) for prefix in only):
        return []
    program = server()
    if not program:
        return [rows.make_row(f"{PREFIX}put_4k", "us", None, [], "bare sockets in Python", "no server here")]
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
