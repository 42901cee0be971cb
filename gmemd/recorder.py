# SPDX-License-Identifier: Apache-2.0
"""The daemon's side of a recording: one at a time, of whoever asked for it, and ended with their connection.

The core writes accesses into a ring; each read hands on what is there. gmemd opens no file for it: who records writes
where they may, and gmemd's own rights, and what its unit forbids it, have no part in it.
"""

from __future__ import annotations

import errno
import threading
import time
from typing import Any

import structlog

from gmemd import __version__
from gmemd.devices import DeviceTable
from gmemd.errors import RequestError
from gmemd.sessions import Session, SessionTable
from gmemd.trace import RECORD_BYTES

log = structlog.get_logger("gmemd.recorder")

_BATCH = 8192  # records of one reply
_HNODE_FIELDS = ("hnid", "name", "driver", "capacity_bytes", "policy")


class Recorder:
    def __init__(self, core: Any, sessions: SessionTable, devices: DeviceTable) -> None:
        self._core = core
        self._sessions = sessions
        self._devices = devices
        self._lock = threading.Lock()
        self._owner: Session | None = None
        self._running = False
        self._position = 0  # records that have arrived
        self._batch = b""  # what was answered last, in case it has not
        self._lost = 0

    def start(self, owner: Session, session: int | None, device: str | None, buffer_bytes: int) -> dict[str, Any]:
        """EBUSY: somebody records already. What the header of a trace says."""
        if session is not None and self._sessions.by_core_id(session) is None:
            raise RequestError(errno.ENOENT, f"session: there is no session {session}", "session")
        hnid = -1 if device is None else self._hnid_of(device)
        hnodes = [{key: hnode[key] for key in _HNODE_FIELDS} for hnode in self._devices.describe_all()]
        with self._lock:
            if self._owner is not None:
                raise RequestError(errno.EBUSY, f"process {self._owner.pid} ({self._owner.name}) is recording already")
            self._sessions.at_end(owner, self._end)
            self._core.trace_start(session=session or 0, hnid=hnid, buffer_bytes=buffer_bytes)
            self._owner, self._running = owner, True
            self._position, self._batch, self._lost = 0, b"", 0
        log.info("recording", pid=owner.pid, session=session, device=device)
        return {
            "gmemd": __version__, "started_ns": time.time_ns(), "hnodes": hnodes, "session": session, "device": device,
        }  # fmt: skip

    def _hnid_of(self, device: str) -> int:
        try:
            return self._devices.hnid_of(device)
        except RequestError as error:
            raise RequestError(errno.ENOENT, error.message.replace("name:", "device:", 1), "device") from None

    def read(self, owner: Session, position: int) -> dict[str, Any]:
        """What has been recorded from that record on. An answer can be asked for again until the next one is; after the
        stop an empty one ends the recording."""
        with self._lock:
            self._check(owner)
            arrived = self._position + len(self._batch) // RECORD_BYTES
            if position not in (self._position, arrived):
                text = f"position: {position} is neither {self._position} nor {arrived}"
                raise RequestError(errno.EINVAL, text, "position")
            if position == arrived:
                running = self._running  # before the look: what is empty then stays so
                self._position = arrived
                self._batch, self._lost = self._core.trace_read(_BATCH)
                if not self._batch and not running:
                    self._end_locked()
            return {"records": self._batch, "lost": self._lost, "running": self._owner is not None}

    def stop(self, owner: Session) -> None:
        with self._lock:
            self._check(owner)
            self._core.trace_stop()
            self._running = False

    def _check(self, owner: Session) -> None:
        if self._owner is not owner:
            raise RequestError(errno.ENOENT, "this connection does not record")

    def _end(self, owner: Session) -> None:
        """Its connection has ended."""
        with self._lock:
            if self._owner is owner:
                self._end_locked()

    def _end_locked(self) -> None:
        pid = self._owner.pid if self._owner else 0
        self._owner, self._running = None, False
        try:
            self._core.trace_close()
        except OSError as error:
            if error.errno != errno.ESHUTDOWN:
                raise
        log.info("recording ended", pid=pid, records=self._position, lost=self._lost)
