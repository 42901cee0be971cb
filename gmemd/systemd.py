# SPDX-License-Identifier: Apache-2.0
"""The part of systemd's protocols that gmemd speaks: notifications, watchdog, socket activation. Without systemd every
call does nothing."""

from __future__ import annotations

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

    @property
    def watchdog_interval_s(self) -> float:
        """How often watchdog() is to be called, half of what the manager allows; 0 if it does not watch."""
        return self._watchdog_s / 2

    def send(self, *assignments: str) -> None:
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            try:
                sock.connect(self._address)
                sock.sendall("\n".join(assignments).encode())
            except OSError:
                pass  # a manager that is gone is no reason to stop

    def ready(self, status: str) -> None:
        self.send("READY=1", f"STATUS={status}", f"MAINPID={os.getpid()}")

    def stopping(self, status: str) -> None:
        self.send("STOPPING=1", f"STATUS={status}")

    def watchdog(self) -> None:
        self.send("WATCHDOG=1")


def activated_socket(environ: MutableMapping[str, str] | None = None) -> socket.socket | None:
    """The listening SEQPACKET Unix socket of gmemd.socket, if systemd passed one; other descriptors are closed."""
    environ = os.environ if environ is None else environ
    pid, count = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "")
    environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdigit():
        return None
    found: socket.socket | None = None
    for fd in range(_LISTEN_FDS_START, _LISTEN_FDS_START + int(count)):
        os.set_inheritable(fd, False)
        try:
            sock = socket.socket(fileno=fd)
        except OSError:
            os.close(fd)
            continue
        fits = sock.family == socket.AF_UNIX and sock.type == socket.SOCK_SEQPACKET
        if fits and found is None and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            found = sock
        else:
            sock.close()
    return found
