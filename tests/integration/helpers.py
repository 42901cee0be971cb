# SPDX-License-Identifier: Apache-2.0
"""Other processes, and waiting for them."""

import os
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import gmem

ROOT = Path(__file__).resolve().parents[2]


def eventually(check: Callable[[], bool], what: str, seconds: float = 10.0) -> None:
    """What another process does takes a moment; a wait has an end."""
    until = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < until, what
        time.sleep(0.01)


def listens(path: str) -> bool:
    """Of gmemd's socket: its name is there before anybody listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        return sock.connect_ex(path) == 0


# An interpreter below a home directory that is closed to others is shown to them in a mount namespace of their own.
REACHABLE = """
set -e
hidden=$1; shift
top=/$(echo "$hidden" | cut -d/ -f2)
place=$(mktemp -d)
mount --make-rprivate /
mount --bind "$hidden" "$place"
mount -t tmpfs -o mode=755 tmpfs "$top"
mkdir -p "$hidden"
mount --bind "$place" "$hidden"
exec "$@"
"""


def as_user(uid: int, command: list[str]) -> list[str]:
    command = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", *command]
    prefix = Path(os.path.realpath(sys.executable)).parents[1]
    if not all(os.stat(path).st_mode & stat.S_IXOTH for path in prefix.parents):
        command = ["unshare", "--mount", "bash", "-c", REACHABLE, "-", str(prefix), *command]
    return command


def run_python(code: str, *, session: gmem.Session | None = None, uid: int | None = None, env=None, timeout=60):
    """A program of its own, as that user."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    if uid is not None:
        command = as_user(uid, command)
    environment = {**os.environ, **(env or {})}
    environment.pop("GMEM_SOCKET", None)
    if session is not None:
        environment["GMEM_SOCKET"] = session.path
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


@contextmanager
def started_python(code: str, session: gmem.Session) -> Iterator[subprocess.Popen]:
    """The same, running beside the test; killed at the end of the block at the latest."""
    environment = {**os.environ, "GMEM_SOCKET": session.path}
    process = subprocess.Popen(
        # setpriv: not left behind if the tests are killed
        ["setpriv", "--pdeathsig", "KILL", sys.executable, "-c", textwrap.dedent(code)],
        env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )
    try:
        yield process
    finally:
        kill(process)


def kill(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
