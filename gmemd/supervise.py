# SPDX-License-Identifier: Apache-2.0
"""`gmemd run --supervised`: a small parent that does for gmemd what systemd's descriptor store does.

It speaks sd_notify's READY, WATCHDOG, FDSTORE, FDSTOREREMOVE and FDNAME on a socket of its own, starts the daemon again
when it has died, with everything that it had held, and ends with it when it ends in order. It imports nothing of the
daemon's, so that it has nothing to fail with.
"""

from __future__ import annotations

import array
import ctypes
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

HELD_MAX = 8192  # their names are one environment variable, which may have 128 KiB
UPGRADE_STATUS = 75  # the daemon asks to be started again, on whatever code is installed now
_FIRST = 3
_MESSAGE_BYTES = 4096
_PAUSE_S, _PAUSE_MAX_S = 0.01, 1.0  # before another try, doubled for each in a row that could not even start
_PR_SET_PDEATHSIG = 1
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Supervisor:
    """argv: the daemon's command line. watchdog_s: how long it may say nothing once it is ready; 0: for ever. ready_fd:
    for the first life, which tells whoever waits."""

    def __init__(self, argv: Sequence[str], *, watchdog_s: float = 0.0, ready_fd: int = -1) -> None:
        self._argv = list(argv)
        self._watchdog_s = watchdog_s
        self._ready_fd = ready_fd
        self._held: dict[str, int] = {}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.bind("")  # an abstract name of the kernel's choice
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._address = "@" + self._socket.getsockname()[1:].decode()
        self._child = -1
        self._stopping = False
        self._ever_ready = self._ready = False
        self._heard = 0.0

    def run(self) -> int:
        """The exit status of the daemon's last life."""
        wakeup, wakeup_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wakeup_end)
        for number in (*_FORWARDED, signal.SIGCHLD):
            signal.signal(number, self._on_signal)
        failures = 0
        while True:
            self._start()
            status = self._watch(wakeup)
            if self._is_over(status):
                return status
            failures = 0 if self._ready else failures + 1
            if failures:
                time.sleep(min(_PAUSE_MAX_S, _PAUSE_S * 2**failures))

    def _is_over(self, status: int) -> bool:
        """It ended in order, was told to, or has never worked."""
        if status == UPGRADE_STATUS:
            return False
        return status == 0 or self._stopping or not self._ever_ready

    def _on_signal(self, number: int, frame: object) -> None:
        if number != signal.SIGCHLD:
            self._stopping = True
            with suppress(ProcessLookupError):
                os.kill(self._child, number)

    # ---- the daemon's process ----

    def _start(self) -> None:
        self._ready, self._heard = False, time.monotonic()
        self._child = os.fork()
        if not self._child:
            try:
                self._become_daemon()
            except BaseException as error:
                print(f"gmemd: can't be started: {error}", file=sys.stderr)
            os._exit(1)
        if self._ready_fd >= 0:
            os.close(self._ready_fd)
            self._ready_fd = -1

    def _become_daemon(self) -> None:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        signal.set_wakeup_fd(-1)
        for number in (*_FORWARDED, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        names = list(self._held)
        self._lay_out([self._held[name] for name in names])
        environ = dict(os.environ, NOTIFY_SOCKET=self._address, FDSTORE=str(HELD_MAX))
        environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(names)), LISTEN_FDNAMES=":".join(names))
        if self._watchdog_s:
            environ.update(WATCHDOG_USEC=str(int(self._watchdog_s * 1e6)), WATCHDOG_PID=str(os.getpid()))
        once = ["--ready-fd", str(self._ready_fd)] if self._ready_fd >= 0 else []
        os.execve(self._argv[0], self._argv + once, environ)

    def _lay_out(self, fds: list[int]) -> None:
        """From 3 on; what the command line names must not be there."""
        end = _FIRST + len(fds)
        moved = []
        for fd in fds:  # out of the way first
            while fd < end:
                fd = os.dup(fd)
            moved.append(fd)
        for place, fd in enumerate(moved, _FIRST):
            os.dup2(fd, place, inheritable=True)

    # ---- listening ----

    def _watch(self, wakeup: int) -> int:
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        poller.register(wakeup, select.POLLIN)
        while True:
            for fd, _ in poller.poll(100 if self._watchdog_s else None):
                if fd == wakeup:
                    with suppress(BlockingIOError):
                        os.read(wakeup, 4096)
            self._read_all()
            status = self._collect()
            if status is not None:
                self._read_all()  # its last words
                return status
            if self._watchdog_s and self._ready and time.monotonic() - self._heard > self._watchdog_s:
                print("gmemd: the watchdog has heard nothing and ends it", file=sys.stderr)
                os.kill(self._child, signal.SIGABRT)
                self._heard = time.monotonic()

    def _collect(self) -> int | None:
        pid, raw = os.waitpid(self._child, os.WNOHANG)
        return os.waitstatus_to_exitcode(raw) if pid else None

    def _read_all(self) -> None:
        space = socket.CMSG_SPACE(4 * 8) + socket.CMSG_SPACE(12)
        while True:
            try:
                data, ancillary, _, _ = self._socket.recvmsg(
                    _MESSAGE_BYTES, space, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return
            self._message(data, ancillary)

    def _message(self, data: bytes, ancillary: list[tuple[int, int, bytes]]) -> None:
        fds, pid = array.array("i"), 0
        for level, kind, raw in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(raw[: len(raw) - len(raw) % fds.itemsize])
            elif level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
                pid = int.from_bytes(raw[:4], sys.byteorder)
        said = dict(line.split("=", 1) for line in data.decode(errors="replace").splitlines() if "=" in line)
        if pid != self._child:
            said = {}
        name = said.get("FDNAME", "")
        if said.get("FDSTORE") == "1" and len(fds) == 1 and name and ":" not in name:
            self._hold(name, fds.pop())
        if said.get("FDSTOREREMOVE") == "1" and name in self._held:
            os.close(self._held.pop(name))
        for fd in fds:
            os.close(fd)
        if said.get("READY") == "1":
            self._ready = self._ever_ready = True
        self._heard = time.monotonic() if pid == self._child else self._heard

    def _hold(self, name: str, fd: int) -> None:
        if name in self._held:
            os.close(self._held.pop(name))
        if len(self._held) >= HELD_MAX:
            os.close(fd)
            return
        self._held[name] = fd


def run(argv: Sequence[str], *, watchdog_s: float, ready_fd: int) -> int:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return Supervisor(argv, watchdog_s=watchdog_s, ready_fd=ready_fd).run()
