# SPDX-License-Identifier: Apache-2.0
"""The door of a ZeroMQ socket: shut while descriptors run short.

libzmq takes every connection that comes, and ends the process when accept(2) says EMFILE. So its listener is closed
before that, with room for what it takes until it is; connections that are there stay, others are refused by the kernel and
try again. Belongs to the thread that owns the socket.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable

import structlog
import zmq

log = structlog.get_logger("gmemd.door")

# libzmq takes about ten connections in a millisecond, and whoever shuts the door may have to wait for a CPU.
_RESERVE_LEAST = 256
_RESERVE_PART = 8
LOOK_MS = 100


def open_descriptors() -> int:
    """How many this process has; the size of the directory says it since Linux 6.2."""
    return os.stat("/proc/self/fd").st_size or len(os.listdir("/proc/self/fd"))


def reserve_of(limit: int) -> int:
    """How many descriptors are kept for others than libzmq, and for what it takes before the door is shut."""
    return min(max(_RESERVE_LEAST, limit // _RESERVE_PART), limit // 2)


class Door:
    """admit gives the file of the endpoint its mode, each time when it has been made."""

    def __init__(self, sock: zmq.Socket, endpoint: str, admit: Callable[[], None]) -> None:
        self._socket = sock
        self._endpoint = endpoint
        self._admit = admit
        self._is_open = False
        self._next_try = 0.0
        self._monitor = sock.get_monitor_socket(zmq.EVENT_ACCEPTED)
        self._monitor.setsockopt(zmq.LINGER, 0)
        self._open()

    @property
    def monitor(self) -> zmq.Socket:
        """Readable when somebody has come in: then look()."""
        return self._monitor

    @property
    def is_open(self) -> bool:
        return self._is_open

    def _open(self) -> None:
        self._socket.bind(self._endpoint)
        self._admit()
        self._is_open = True

    def _free(self) -> int:
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0] - open_descriptors()

    def look(self) -> None:
        """To be called when somebody has come in, and every LOOK_MS while it is not open."""
        try:
            while True:
                self._monitor.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            pass
        reserve = reserve_of(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        if self._is_open and self._free() < reserve:
            self._socket.unbind(self._endpoint)
            self._is_open = False
            log.warning("descriptors run short: no new connections", endpoint=self._endpoint)
        elif not self._is_open and self._free() > reserve + reserve // 8 and time.monotonic() >= self._next_try:
            self._reopen()

    def _reopen(self) -> None:
        try:
            self._open()
            log.info("new connections again", endpoint=self._endpoint)
        except zmq.ZMQError as error:  # its predecessor is being closed, perhaps
            log.debug("the endpoint can't be bound yet", error=str(error))
            self._next_try = time.monotonic() + LOOK_MS / 1000

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(0)
