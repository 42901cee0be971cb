# SPDX-License-Identifier: Apache-2.0
"""Requests to gmemd: msgpack maps over a ZeroMQ DEALER. docs/protocol.md has the ops."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from typing import Any

import msgpack
import zmq

from gmem._errors import ConnectionLost, from_errno

# How often a waiting thread looks whether the daemon is still there, and asks again: one that was killed and started
# again knows of no request that the former had not answered; one that works on it, or has answered, takes no notice.
_PATIENCE_MS = 500


class Requests:
    """One socket a thread, so that a request that waits (prefetch of gigabytes) holds up nobody else. Sockets of a
    parent are left alone after a fork: endpoint() and token() then give the child's own."""

    def __init__(self, endpoint: Callable[[], str], token: Callable[[], bytes], lost: Callable[[], bool]) -> None:
        self._endpoint = endpoint
        self._token = token
        self._lost = lost
        self._ids = itertools.count(1)
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._context = zmq.Context()
        self._local = threading.local()

    def _socket(self) -> zmq.Socket[bytes]:
        if self._pid != os.getpid():
            # The parent's context is leaked on purpose: ending it here would end the parent's connections.
            self._abandoned = self._context
            self._reset()
        socket = getattr(self._local, "socket", None)
        if socket is None or socket.closed:
            socket = self._context.socket(zmq.DEALER)
            socket.linger = 0
            socket.connect(self._endpoint())
            self._local.socket = socket
            self._local.waiting = {}
        return socket

    def call(self, op: str, **args: Any) -> dict[str, Any]:
        """The reply's fields; raises the GmemError of an error reply."""
        socket = self._socket()
        number = next(self._ids)
        # A finaliser can run in the middle of a request, and make one of its own on the same socket.
        waiting: dict[int, dict[str, Any] | None] = self._local.waiting
        waiting[number] = None
        try:
            request = msgpack.packb({"v": 1, "id": number, "op": op, "token": self._token(), **args})
            socket.send(request)
            while waiting[number] is None:
                if not self._receive(socket, op, waiting):
                    socket.send(request, zmq.NOBLOCK)
            reply = waiting[number]
        finally:
            del waiting[number]
        assert reply is not None
        if not reply.get("ok"):
            error = reply.get("error", {})
            raise from_errno(error.get("errno", 0), error.get("message", "gmemd gave no reason"), error.get("argument"))
        return reply

    def _receive(self, socket: zmq.Socket[bytes], op: str, waiting: dict[int, dict[str, Any] | None]) -> bool:
        """False: nothing has come for a while."""
        if not socket.poll(_PATIENCE_MS):
            if self._lost():
                socket.close()
                raise ConnectionLost(f"{op}: gmemd is gone")
            return False
        try:
            reply = msgpack.unpackb(socket.recv(zmq.NOBLOCK))
        except zmq.Again:
            return True  # the finaliser's request has received ours, too
        # Others are answers to requests whose caller was interrupted; 0 is for one that could not be read.
        number = reply.get("id") or max(waiting)
        if number in waiting:
            waiting[number] = reply
        return True

    def close(self) -> None:
        if self._pid == os.getpid():
            self._context.destroy(linger=0)
