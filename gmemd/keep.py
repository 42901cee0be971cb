# SPDX-License-Identifier: Apache-2.0
"""What outlives this process when it is killed: descriptors that its manager (systemd, or `gmemd run --supervised`)
holds under names, of the core (gmem/keep.h) and of the Python side: `listen`, `notes`, and the clients' handshake
connections, `conn.SESSION.CONTEXT` with context 0 for the process itself.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import threading
from collections.abc import Sequence

import structlog

from gmemd.notes import VERSION as NOTES_VERSION
from gmemd.notes import Notes
from gmemd.systemd import Notifier, listening_socket

log = structlog.get_logger("gmemd.keep")

_OURS = ("listen", "notes", "conn.")
_CORES = ("state", "lpt", "file.", "uffd.", "pid.", "agent.", "chan.", "ring.", "bell.", "jobs.", "driver.", "source.")


def state_version() -> str:
    """Of all that one gmemd leaves to the next: only one that says the same takes over from it."""
    from gmemd._core import STATE_VERSION

    return f"{STATE_VERSION}.{NOTES_VERSION}"


class Keep:
    """Without a manager that holds descriptors, nothing is kept and every call does nothing."""

    def __init__(self, notifier: Notifier, passed: Sequence[tuple[str, int]]) -> None:
        self._socket: socket.socket | None = None
        self.max_fds = notifier.fd_store_max
        self._lock = threading.Lock()
        self._left: dict[str, int] = {}
        self._core_fds: list[tuple[str, int]] = []
        self._activated: list[int] = []
        for name, fd in passed:
            self._sort_in(name, fd)
        if self.max_fds:
            self._socket = notifier.connect()
        self.notes = self._open_notes()

    def _sort_in(self, name: str, fd: int) -> None:
        if not self.max_fds:
            self._activated.append(fd)
        elif name.startswith(_OURS) and name not in self._left:
            self._left[name] = fd
        elif name.startswith(_CORES):
            self._core_fds.append((name, fd))
        else:
            self._activated.append(fd)

    def _open_notes(self) -> Notes:
        if self._socket is None:
            return Notes()
        fd = self.take("notes")
        if fd is None:
            fd = Notes.new_file()
            self.hold("notes", fd)
        return Notes(fd)

    def core_arguments(self) -> dict[str, object]:
        """For the core, which takes the descriptors over. Once."""
        if self._socket is None:
            return {}
        fds, self._core_fds = self._core_fds, []
        return {"keep_socket": self._socket.dup().detach(), "keep_max_fds": self.max_fds, "kept": fds}

    def hold(self, name: str, fd: int) -> None:
        """Has the manager hold a duplicate, until forget(). Without room there it is only logged: what is lost then is
        the client's connection, should the daemon be killed."""
        if self._socket is None:
            return
        text = f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0\n".encode()
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        try:
            with self._lock:
                self._socket.sendmsg([text], ancillary)
        except OSError as error:
            log.warning("a descriptor could not be put away", name=name, error=str(error))

    def forget(self, name: str) -> None:
        if self._socket is None:
            return
        with contextlib.suppress(OSError), self._lock:
            self._socket.sendall(f"FDSTOREREMOVE=1\nFDNAME={name}\n".encode())

    def take(self, name: str) -> int | None:
        """What a predecessor had held under this name, now the caller's."""
        return self._left.pop(name, None)

    def connections(self) -> list[tuple[int, int, socket.socket]]:
        """(session, context, connection) of a predecessor's clients, now the caller's."""
        found = []
        for name in [name for name in self._left if name.startswith("conn.")]:
            session, _, context = name.removeprefix("conn.").partition(".")
            sock = socket.socket(fileno=self._left.pop(name))
            found.append((int(session), int(context), sock))
        return found

    def listener(self) -> tuple[socket.socket | None, bool]:
        """A predecessor's handshake socket or the manager's, and whether it is the manager's."""
        fd = self.take("listen")
        found = listening_socket(fd) if fd is not None else None
        ours = found is not None
        activated, self._activated = self._activated, []
        for candidate in activated:
            sock = listening_socket(candidate)
            if found is None:
                found = sock
            elif sock is not None:
                sock.close()
        return found, not ours

    def end(self) -> None:
        """The daemon has ended in order: nobody is to take over."""
        for name in ("listen", "notes", *self._left):
            self.forget(name)
        for fd in self._left.values():
            os.close(fd)
        self._left.clear()
        if self._socket is not None:
            self._socket.close()
            self._socket = None
