# SPDX-License-Identifier: Apache-2.0
"""Events: what the core reports is acted on and told, what the daemon itself does is told. The PUB socket lives here.

Topics and their fields stand in docs/protocol.md. Anybody who can reach the socket can listen, so an event has what its
topic needs and never a token.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from typing import Any

import msgpack
import structlog
import zmq

from gmemd.devices import DeviceTable
from gmemd.door import LOOK_MS, Door
from gmemd.sessions import SessionTable
from gmemd.watch import Watch

log = structlog.get_logger("gmemd.events")

_BATCH = 256
_HWM = 1000
_LINGER_MS = 200
_REAP_PAUSE_S = 0.25
# The same report again within this time is not told again: a fault that repeats must not fill a disk.
_QUIET_S = 1.0


class Publisher:
    """The PUB socket. publish() may be called from any thread; the loop's thread sends."""

    def __init__(self, context: zmq.Context, endpoint: str, admit: Callable[[], None] = lambda: None) -> None:
        self._socket = context.socket(zmq.PUB)
        self._socket.setsockopt(zmq.LINGER, _LINGER_MS)
        self._socket.setsockopt(zmq.SNDHWM, _HWM)
        self._socket.setsockopt(zmq.MAXMSGSIZE, 4096)  # what a subscriber may send us
        self._door = Door(self._socket, endpoint, admit)
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._door.monitor.fileno(), self._look)
        self._look()

    def _look(self) -> None:
        if self._socket.closed or self._loop is None:
            return
        self._door.look()
        if not self._door.is_open:
            self._loop.call_later(LOOK_MS / 1000, self._look)

    def publish(self, topic: str, fields: dict[str, Any]) -> None:
        if self._loop is None:
            return
        try:
            self._loop.call_soon_threadsafe(self._send, topic, fields)
        except RuntimeError:
            pass  # the loop has ended

    def _send(self, topic: str, fields: dict[str, Any]) -> None:
        if self._socket.closed:
            return
        try:
            self._socket.send_multipart((topic.encode(), msgpack.packb(fields)), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            log.debug("event not sent", topic=topic, error=str(error))

    def close(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._door.monitor.fileno())
        self._door.close()
        self._socket.close()


class EventPump:
    """Reads the core's events when its descriptor says so. defer runs work that may block, away from the loop."""

    def __init__(
        self, core: Any, sessions: SessionTable, devices: DeviceTable, publish: Callable[[str, dict[str, Any]], None],
        defer: Callable[..., None], watch: Watch,
    ) -> None:  # fmt: skip
        self._core = core
        self._sessions = sessions
        self._devices = devices
        self._publish = publish
        self._defer = defer
        self._watch = watch
        self._reap_due = False
        self._fd = -1
        self._last_logged: dict[tuple[Any, ...], float] = {}
        self._handlers: dict[str, Callable[[dict[str, Any]], None]] = {
            "fork": self._fork,
            "view_gone": self._view_gone,
            "poisoned": self._poisoned,
            "segv": self._segv,
            "not_acquired": self._not_acquired,
            "pressure": self._pressure,
            "device_lost": self._device_lost,
            "stuck": self._stuck,
            "unstuck": self._unstuck,
            "error": self._error,
        }

    def start(self) -> None:
        self._fd = self._core.event_fd()
        asyncio.get_running_loop().add_reader(self._fd, self.pump)

    def stop(self) -> None:
        if self._fd >= 0:
            asyncio.get_running_loop().remove_reader(self._fd)
            self._fd = -1

    def pump(self) -> None:
        """A bounded batch; the descriptor stays readable while more wait."""
        for event in self._core.read_events(_BATCH):
            handler = self._handlers.get(event["type"])
            if handler is None:
                log.warning("unknown event of the core", type=event["type"])
                continue
            handler(event)

    def _worth_telling(self, *what: Any) -> bool:
        now = asyncio.get_running_loop().time()
        if now - self._last_logged.get(what, -_QUIET_S) < _QUIET_S:
            return False
        if len(self._last_logged) > 1024:
            self._last_logged.clear()
        self._last_logged[what] = now
        return True

    def _fork(self, event: dict[str, Any]) -> None:
        log.debug("fork stored", parent=event["session"], child=event["value"])
        if not self._reap_due:  # most of those who never say hello end soon
            self._reap_due = True
            asyncio.get_running_loop().call_later(_REAP_PAUSE_S, self._reap)

    def _reap(self) -> None:
        self._reap_due = False
        self._defer(self._reap_now)

    def _reap_now(self) -> None:
        """(blocks)"""
        try:
            self._core.reap()
        except OSError as error:
            if error.errno != errno.ESHUTDOWN:
                raise

    def _view_gone(self, event: dict[str, Any]) -> None:
        if event["value"]:
            context = self._sessions.context_by_id(event["value"])
            if context is not None:
                self._defer(self._sessions.end_context, context, "process ended")
            return
        session = self._sessions.by_core_id(event["session"])
        if session is not None:
            self._defer(self._sessions.end, session, "process ended")
        else:
            self._defer(self._destroy_unclaimed, event["session"])

    def _destroy_unclaimed(self, core_id: int) -> None:
        """A forked child that ended before it said hello."""
        try:
            self._core.session_destroy(core_id)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESRCH):
                log.error("a session can't be removed", session=core_id, error=str(error))

    def _poisoned(self, event: dict[str, Any]) -> None:
        if self._worth_telling("poisoned", event["session"]):
            log.error("page lost", session=event["session"], va=hex(event["va"]), errno=abs(event["error"]))
        self._publish("page.poisoned", {"session": event["session"], "va": event["va"], "errno": abs(event["error"])})

    def _segv(self, event: dict[str, Any]) -> None:
        log.warning("context touched memory outside every region", session=event["session"], context=event["value"],
                    va=hex(event["va"]))  # fmt: skip
        fields = {"session": event["session"], "context": event["value"], "va": event["va"]}
        self._publish("context.segv", fields)

    def _not_acquired(self, event: dict[str, Any]) -> None:
        log.warning("context touched memory that it had not acquired", session=event["session"],
                    context=event["value"], va=hex(event["va"]))  # fmt: skip
        fields = {"session": event["session"], "context": event["value"], "va": event["va"]}
        self._publish("context.not_acquired", fields)

    def _pressure(self, event: dict[str, Any]) -> None:
        if self._worth_telling("pressure", event["hnid"], event["session"]):
            self._defer(self._tell_pressure, event["hnid"], event["session"])

    def _tell_pressure(self, hnid: int, session: int) -> None:
        """(blocks) The core's counters wait for a device that is being attached or detached. session: whose quota is
        near, 0 if the whole hnode is."""
        hnode = self._devices.describe(hnid)
        if hnode is not None:
            fields = {name: hnode[name] for name in ("hnid", "name", "used_bytes", "capacity_bytes")}
            fields["session"] = session
            log.debug("memory pressure", **fields)
            self._publish("memory.pressure", fields)

    def _device_lost(self, event: dict[str, Any]) -> None:
        name = self._devices.name_of(event["hnid"])
        log.error("device lost", hnid=event["hnid"], name=name, errno=abs(event["error"]))
        self._publish("device.lost", {"hnid": event["hnid"], "name": name})

    def _stuck(self, event: dict[str, Any]) -> None:
        thread = self._watch.find(event["value"])
        if thread is not None:
            log.error("thread stuck", **thread)
            self._publish("thread.stuck", thread)

    def _unstuck(self, event: dict[str, Any]) -> None:
        log.warning("thread goes on", index=event["value"])
        self._publish("thread.resumed", {"index": event["value"]})

    def _error(self, event: dict[str, Any]) -> None:
        if self._worth_telling("error", event["session"], event["error"]):
            log.error("fault not resolved", session=event["session"], va=hex(event["va"]), errno=abs(event["error"]))
