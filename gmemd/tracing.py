# SPDX-License-Identifier: Apache-2.0
"""gmemctl's side of a recording: asks gmemd for what it has recorded, again and again, and writes it to a file."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

from gmemd.trace import RECORD_BYTES, Writer

_LOOK_S = 0.01  # between two looks when little comes
_BUSY_RECORDS = 2048  # in one answer: more has come meanwhile


class Requests(Protocol):
    """gmemd.control.Control, as far as it is needed."""

    def request(self, op: str, timeout_s: float | None = None, **args: Any) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Recorded:
    records: int
    lost: int
    bytes: int  # of the file
    seconds: float
    complete: bool
    why: str = ""  # it is not complete


def begin(
    control: Requests, *, session: int | None = None, device: str | None = None, buffer_bytes: int | None = None
) -> dict[str, Any]:
    """From now on gmemd records. What record() is to be given. RequestError: it refused."""
    wanted: dict[str, Any] = {"session": session, "device": device, "buffer_bytes": buffer_bytes}
    return control.request("trace_start", **{key: value for key, value in wanted.items() if value is not None})


def record(control: Requests, header: dict[str, Any], file: BinaryIO, over: Callable[[float], bool]) -> Recorded:
    """Until over(seconds since the start), which is asked now and then, says so; or until gmemd is gone: what has come
    by then is a sound trace that says that it is not complete. OSError: the file can't be written."""
    writer = Writer(file, header)
    began = time.monotonic()
    why = ""
    try:
        for reply in _replies(control, over, began):
            if reply["records"]:
                writer.add(reply["records"], reply["lost"])
            writer.lost = reply["lost"]
    except _Gone as gone:
        why = str(gone)
    writer.close(complete=not why)
    return Recorded(writer.records, writer.lost, writer.bytes, time.monotonic() - began, not why, why)


class _Gone(Exception):
    """gmemd does not answer any more. Not for errors of the file."""


def _replies(control: Requests, over: Callable[[float], bool], began: float) -> Iterator[dict[str, Any]]:
    position, stopped, running = 0, False, True
    while running:
        try:
            if not stopped and over(time.monotonic() - began):
                control.request("trace_stop")
                stopped = True
            reply = control.request("trace_read", position=position)
        except OSError as error:
            raise _Gone(str(error.strerror or error)) from None
        count = len(reply["records"]) // RECORD_BYTES
        position += count
        running = reply["running"]
        yield reply
        if count < _BUSY_RECORDS and not stopped:
            time.sleep(_LOOK_S)


@contextmanager
def signalled() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set, instead of what they do otherwise."""
    event = threading.Event()
    before = {number: signal.signal(number, lambda *_: event.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
