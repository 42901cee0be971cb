# SPDX-License-Identifier: Apache-2.0
"""The part of systemd's protocols that gmemd speaks: notifications, watchdog, socket activation. Without systemd every
call does nothing."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import MutableMapping

_LISTEN_FDS_START = 3


class Notifier:
    """Tells the service manager how it goes. The variables are taken out of the environment, so that no child of ours
    speaks in our name."""

    def __init__(self, environ: MutableMapping[str, str] | None = None) -> None:
        environ = os.environ if environ is None else environ
        path = environ.pop("NOTIFY_SOCKET", "")
        self._address = "\0" + path[1:] if path.startswith("@") else path
        usec = environ.pop("WATCHDOG_USEC", "")
        pid = environ.pop("WATCHDOG_PID", "")
        mine = not pid or pid == str(os.getpid())
        self._watchdog_s = int(usec) / 1e6 if usec.isdigit() and mine else 0.0
        most = environ.pop("FDSTORE", "")
        self.fd_store_max = int(most) if most.isdigit() and self._address else 0

    @property
    def watchdog_interval_s(self) -> float:
        """How often watchdog() is to be called, half of what the manager allows; 0 if it does not watch."""
        return self._watchdog_s / 2

    def send(self, *assignments: str, patience_s: float = 1.0) -> None:
        """A manager that is gone, or does not listen, is no reason to stop."""
        if not self._address:
            return
        with contextlib.suppress(OSError), self.connect() as sock:
            sock.settimeout(patience_s)
            sock.sendall("\n".join(assignments).encode())

    def connect(self) -> socket.socket:
        """A socket to the manager, for messages of one's own."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        try:
            sock.connect(self._address)
        except BaseException:
            sock.close()
            raise
        return sock

    def ready(self, status: str) -> None:
        self.send("READY=1", f"STATUS={status}", f"MAINPID={os.getpid()}")

    def stopping(self, status: str) -> None:
        self.send("STOPPING=1", f"STATUS={status}")

    def watchdog(self) -> None:
        self.send("WATCHDOG=1", patience_s=0)


def passed_descriptors(environ: MutableMapping[str, str] | None = None) -> list[tuple[str, int]]:
    """Those that the manager passed, close-on-exec from now on, each with its name: a listening socket of gmemd.socket,
    and what a predecessor had it hold."""
    environ = os.environ if environ is None else environ
    pid, count = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "")
    names = environ.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not count.isdigit():
        return []
    fds = range(_LISTEN_FDS_START, _LISTEN_FDS_START + int(count))
    for fd in fds:
        os.set_inheritable(fd, False)
    return [(names[i] if i < len(names) else "", fd) for i, fd in enumerate(fds)]


def listening_socket(fd: int) -> socket.socket | None:
    """The descriptor as what a handshake socket must be; None, and closed, if it is anything else."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError:
        os.close(fd)
        return None
    fits = sock.family == socket.AF_UNIX and sock.type == socket.SOCK_SEQPACKET
    if fits and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return sock
    sock.close()
    return None
