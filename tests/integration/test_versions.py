# SPDX-License-Identifier: Apache-2.0
"""A gmemd meets what one of another version has left: it refuses, touches nothing, and the right one goes on."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import gmem
import numpy as np
import pytest
from helpers import ROOT, eventually

VERSION_AT = 8  # in struct gmem_state_header


class Supervised:
    def __init__(self, directory: str) -> None:
        self.path = str(Path(directory, "run", "gmemd.sock"))
        self.log = Path(directory, "log")
        command = [sys.executable, "-m", "gmemd", "run", "--supervised", "--runtime-dir", str(Path(directory, "run"))]
        command += ["--device", "name=simgpu0,driver=simgpu,capacity=8M"]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(command, stderr=log, stdout=log, cwd=ROOT)
        eventually(Path(self.path).exists, "gmemd does not start", 30)

    def daemon(self) -> int:
        """The process; 0 between two lives."""
        pid = self.process.pid
        return int((Path(f"/proc/{pid}/task/{pid}/children").read_text().split() or ["0"])[0])

    def held(self, name: str) -> int:
        """A descriptor of what the supervisor holds under that name of a memfd; the caller's."""
        for fd in Path(f"/proc/{self.process.pid}/fd").iterdir():
            if os.readlink(fd).startswith(f"/memfd:{name}"):
                return os.open(fd, os.O_RDWR | os.O_CLOEXEC)
        raise AssertionError(f"{name} is not held")

    def held_count(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def refusals(self, text: str) -> int:
        return self.log.read_text().count(text)


@pytest.fixture
def supervised() -> Iterator[Supervised]:
    with tempfile.TemporaryDirectory(prefix="gmem-test-", dir="/tmp") as directory:
        gmemd = Supervised(directory)
        yield gmemd
        gmemd.process.terminate()
        try:
            gmemd.process.wait(30)
        finally:
            gmemd.process.kill()


def spoil_state(fd: int) -> Callable[[], object]:
    version = os.pread(fd, 4, VERSION_AT)
    os.pwrite(fd, (int.from_bytes(version, sys.byteorder) + 1).to_bytes(4, sys.byteorder), VERSION_AT)
    return lambda: os.pwrite(fd, version, VERSION_AT)


def spoil_notes(fd: int) -> Callable[[], object]:
    at = next(at for at in (0, 64 << 20) if os.pread(fd, 8, at) == b"gmnotes1")
    os.pwrite(fd, b"gmnotes2", at)
    return lambda: os.pwrite(fd, b"gmnotes1", at)


@pytest.mark.parametrize(
    ("name", "spoil", "said"),
    [("gmem-state", spoil_state, "the state that another gmemd has left is of another version; it was not touched"),
     ("gmem-notes", spoil_notes, "the notes of another gmemd are of another version; they were not touched")],
)  # fmt: skip
def test_it_refuses_and_the_right_one_goes_on(supervised: Supervised, name: str, spoil: Callable, said: str) -> None:
    session = gmem.connect(supervised.path)
    array = np.random.default_rng(1).integers(0, 1 << 60, 1 << 19)
    managed = gmem.array(array)
    gmem.prefetch(managed[: 1 << 18], "simgpu0")
    fd, found, count = supervised.held(name), [], supervised.held_count()
    mend = spoil(fd)
    os.kill(supervised.daemon(), signal.SIGKILL)
    reader = threading.Thread(target=lambda: found.append((managed == array).all()))
    reader.start()
    try:
        eventually(lambda: supervised.refusals(said) > 0, "it does not refuse", 30)
        assert supervised.process.poll() is None and not found, "what only the device has can't be read now"
        assert supervised.held_count() == count
    finally:
        mend()
        os.close(fd)
        eventually(lambda: not reader.is_alive(), "the right one does not go on", 30)
    assert found == [True]
    assert session.request("ping")["pid"] == supervised.daemon()
    session.close()
