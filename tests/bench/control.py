# SPDX-License-Identifier: Apache-2.0
"""The control plane: gmem's `ping` request through a private gmemd, beside a bare ZeroMQ echo of the same messages in a
process of its own. Run as a program, this file is that echo: `control.py ENDPOINT`."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgpack
import rows
import zmq

ID = "control_round_trip"
UNIT = "us"
TARGET = "ratio <= 1.3"
FLOOR_IS = "bare ROUTER echo with msgpack"
REPETITIONS = 7
REQUESTS = 400


def echo(endpoint: str) -> None:
    """Answers each request with a reply of the size of gmemd's; an empty message ends it."""
    socket = zmq.Context().socket(zmq.ROUTER)
    socket.bind(endpoint)
    while True:
        identity, message = socket.recv_multipart()
        if not message:
            return
        request = msgpack.unpackb(message)
        reply = {"id": request["id"], "ok": True, "version": "0.0.0", "pid": 1}
        socket.send_multipart([identity, msgpack.packb(reply)])


def median_us(call: Callable[[], object]) -> float:
    times = []
    for _ in range(REQUESTS):
        start = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - start)
    return statistics.median(times) / 1e3


class Echo:
    """The floor: a client socket and the echo process behind it."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="gmem-bench-")
        endpoint = f"ipc://{self._folder.name}/echo.sock"
        self._process = subprocess.Popen([sys.executable, str(Path(__file__).resolve()), endpoint])
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.connect(endpoint)
        self._number = 0
        self._token = bytes(32)

    def call(self) -> dict[str, object]:
        self._number += 1
        self._socket.send(msgpack.packb({"v": 1, "id": self._number, "op": "ping", "token": self._token}))
        if not self._socket.poll(5000):
            raise TimeoutError("the echo process does not answer")
        return msgpack.unpackb(self._socket.recv())

    def close(self) -> None:
        self._socket.send(b"")
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._context.destroy(linger=0)
        self._folder.cleanup()


def measure() -> rows.Row:
    """The row; not measured, with the reason, if gmem can't be used."""
    try:
        import gmem

        session = gmem.connect(embedded=True)
    except Exception as error:  # whatever it is, the other rows stand
        return rows.make_row(ID, UNIT, TARGET, [], FLOOR_IS, f"gmem could not be connected: {error}")
    bare = Echo()
    try:
        for call in (bare.call, lambda: session._requests.call("ping")):
            median_us(call)  # sockets connect, code gets warm
        pairs = [(median_us(lambda: session._requests.call("ping")), median_us(bare.call)) for _ in range(REPETITIONS)]
    finally:
        bare.close()
        session.close()
    return rows.make_row(ID, UNIT, TARGET, pairs, FLOOR_IS)


if __name__ == "__main__":
    echo(sys.argv[1])
