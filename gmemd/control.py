# SPDX-License-Identifier: Apache-2.0
"""gmemctl's side of the protocols: the ADMIN handshake, and requests over a DEALER socket."""

from __future__ import annotations

import itertools
import os
import socket
import time
from types import TracebackType
from typing import Any

import msgpack
import zmq

from gmemd import schema, wire
from gmemd.config import SYSTEM_RUNTIME_DIR
from gmemd.errors import RequestError

_LAST_WORDS_MS = 200  # an answer may be under way on the other socket
DEFAULT_SOCKET = str(SYSTEM_RUNTIME_DIR / "gmemd.sock")


def socket_path(given: str | None) -> str:
    return given or os.environ.get("GMEM_SOCKET") or DEFAULT_SOCKET


class Control:
    """A connection to a gmemd: request() raises RequestError for what it refuses, OSError when it can't be reached.

    The handshake's connection is held open meanwhile: the token lives as long as it does."""

    def __init__(self, path: str, timeout_s: float = 10.0) -> None:
        self._timeout_s = timeout_s
        self._ids = itertools.count(1)
        self._handshake = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        self._context = zmq.Context()
        self._dealer = self._context.socket(zmq.DEALER)
        try:
            self._welcome = self._greet(path)
            self._dealer.setsockopt(zmq.LINGER, 0)
            self._dealer.connect(self._welcome.control)
        except BaseException:
            self.close()
            raise

    def _greet(self, path: str) -> wire.Welcome:
        self._handshake.settimeout(self._timeout_s)
        self._handshake.connect(path)
        self._handshake.sendall(wire.pack_hello(wire.ADMIN))
        data = self._handshake.recv(wire.RECEIVE_BYTES)
        if not data:
            raise ConnectionResetError(f"gmemd at {path} closed the connection")
        welcome = wire.unpack_welcome(data)
        if welcome.status:
            raise RequestError(-welcome.status, welcome.message)
        return welcome

    @property
    def events_endpoint(self) -> str:
        return self._welcome.events

    def request(self, op: str, timeout_s: float | None = None, **args: Any) -> dict[str, Any]:
        request_id = next(self._ids)
        message = {"v": schema.VERSION, "id": request_id, "op": op, "token": self._welcome.token, **args}
        self._dealer.send(msgpack.packb(message))
        deadline = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        while True:
            self._wait(op, deadline)
            reply = msgpack.unpackb(self._dealer.recv())
            if reply.get("id") == request_id:
                break
        if not reply["ok"]:
            error = reply["error"]
            raise RequestError(error["errno"], error["message"], error.get("argument"))
        return {key: value for key, value in reply.items() if key not in ("id", "ok")}

    def _wait(self, op: str, deadline: float) -> None:
        """Until something has come. The end of the handshake's connection is the end of gmemd, or of this token."""
        poller = zmq.Poller()
        poller.register(self._dealer, zmq.POLLIN)
        poller.register(self._handshake, zmq.POLLIN)
        left = deadline - time.monotonic()
        ready = dict(poller.poll(max(1, int(left * 1000)))) if left > 0 else {}
        if not ready:
            raise TimeoutError(f"gmemd did not answer {op} in time")
        if self._dealer not in ready and not self._dealer.poll(_LAST_WORDS_MS):
            raise ConnectionResetError(f"gmemd went away, or ended the connection, before it answered {op}")

    def close(self) -> None:
        self._dealer.close(linger=0)
        self._context.term()
        self._handshake.close()

    def __enter__(self) -> Control:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
