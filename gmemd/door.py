# SPDX-License-Identifier: Apache-2.0
"""The door of a ZeroMQ socket: shut while descriptors run short.

libzmq takes every connection that comes, and ends the process when accept(2) says EMFILE. So its listener is closed
before that, with room for what it takes until it is. The connections that it had taken end with it, and so give back
what ran short; clients connect again by themselves, and ask again what was not answered. Sessions leave that room
alone: handshakes are refused earlier (short_of_descriptors). A Door belongs to the thread that owns the socket.
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


def _limit() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _free() -> int:
    return _limit() - open_descriptors()


def short_of_descriptors() -> bool:
    """So few that there may be no more sessions: the rest is for those that are there."""
    reserve = reserve_of(_limit())
    return _free() < reserve + reserve // 2


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

    def look(self) -> None:
        """To be called when somebody has come in, and every LOOK_MS while it is not open."""
        try:
            while True:
                self._monitor.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            pass
        reserve = reserve_of(_limit())
        if self._is_open and _free() < reserve:
            self._socket.unbind(self._endpoint)
            self._is_open = False
            log.warning("descriptors run short: connections are closed", endpoint=self._endpoint)
        elif not self._is_open and _free() > reserve + reserve // 8 and time.monotonic() >= self._next_try:
            self._reopen()

    def _reopen(self) -> None:
        try:
            self._open()
            log.info("connections again", endpoint=self._endpoint)
        except zmq.ZMQError as error:  # its predecessor is being closed, perhaps
            log.debug("the endpoint can't be bound yet", error=str(error))
            self._next_try = time.monotonic() + LOOK_MS / 1000

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(0)
