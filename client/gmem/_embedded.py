# SPDX-License-Identifier: Apache-2.0
"""A private gmemd for a process tree: started on demand, ended with it."""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from gmem._errors import ConnectionLost

_START_S = 60


class Embedded:
    """The daemon's process, the directory of its sockets, and the pipe whose end tells it that we are gone."""

    def __init__(self, devices: Sequence[str], settings: Sequence[str], config: str | None) -> None:
        self.owner_pid = os.getpid()
        self.runtime_dir = _runtime_dir()
        self.socket = str(self.runtime_dir / "gmemd.sock")
        parent_end, self._alive = os.pipe()
        ready, ready_end = os.pipe()
        command = [sys.executable, "-m", "gmemd", "run", "--embedded", "--runtime-dir", str(self.runtime_dir),
                   "--ready-fd", str(ready_end), "--parent-fd", str(parent_end)]  # fmt: skip
        command += [part for device in devices for part in ("--device", device)]
        command += [part for setting in settings for part in ("--set", setting)]
        command += ["--config", config] if config else []
        try:
            self._process = subprocess.Popen(command, pass_fds=(ready_end, parent_end), stdin=subprocess.DEVNULL)
        finally:
            os.close(ready_end)
            os.close(parent_end)
        try:
            self._wait_ready(ready)
        except BaseException:
            self.close()
            raise
        finally:
            os.close(ready)

    @property
    def pid(self) -> int:
        return self._process.pid

    def _wait_ready(self, fd: int) -> None:
        said = b""
        until = time.monotonic() + _START_S
        while b"READY=1" not in said:
            if not select.select([fd], [], [], max(0.0, until - time.monotonic()))[0]:
                raise ConnectionLost(f"the embedded gmemd was not ready within {_START_S} s")
            chunk = os.read(fd, 4096)
            if not chunk:
                why = said.decode(errors="replace").removeprefix("ERROR=").strip() or "it said nothing"
                raise ConnectionLost(f"the embedded gmemd did not start: {why}")
            said += chunk

    def close(self) -> None:
        """Lets the daemon end: at once if this was its last session, else with the last one of our children."""
        with contextlib.suppress(OSError):
            os.close(self._alive)
        if os.getpid() != self.owner_pid:
            return
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return  # a child still uses it
        shutil.rmtree(self.runtime_dir, ignore_errors=True)


def _runtime_dir() -> Path:
    """Short, because socket paths are: the runtime directory of the user's session if there is one."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base and os.access(base, os.W_OK | os.X_OK) and len(base) < 60:
        path = Path(base) / f"gmem-{os.getpid()}-{secrets.token_hex(4)}"
        path.mkdir(mode=0o700)
        return path
    return Path(tempfile.mkdtemp(prefix=f"gmem-{os.getuid()}-", dir="/tmp"))
