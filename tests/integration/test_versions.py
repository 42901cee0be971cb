# SPDX-License-Identifier: Apache-2.0
"""Upgrades. A gmemd that meets what one of another version has left refuses, touches nothing; the right one goes on."""

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
from helpers import ROOT, eventually, listens

VERSION_AT = 8  # in struct gmem_state_header


# What is installed is another version while a file says so.
SITECUSTOMIZE = """
import os, sys
if os.path.exists({other!r}) and sys.orig_argv[-1] == "state-version":
    print("99.1")
    os._exit(0)
"""


class Supervised:
    def __init__(self, directory: str) -> None:
        self.other = Path(directory, "other")
        Path(directory, "sitecustomize.py").write_text(SITECUSTOMIZE.format(other=str(self.other)))
        self.path = str(Path(directory, "run", "gmemd.sock"))
        self.log = Path(directory, "log")
        command = [sys.executable, "-m", "gmemd", "run", "--supervised", "--runtime-dir", str(Path(directory, "run"))]
        command += ["--device", "name=simgpu0,driver=simgpu,capacity=8M"]
        with open(self.log, "wb") as log:
            environment = {**os.environ, "PYTHONPATH": directory}
            self.process = subprocess.Popen(command, stderr=log, stdout=log, cwd=ROOT, env=environment)
        eventually(lambda: listens(self.path), "gmemd does not start", 30)

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
        assert supervised.held_count() >= count, "something was given up"  # its predecessor's last words may come late
    finally:
        mend()
        os.close(fd)
        eventually(lambda: not reader.is_alive(), "the right one does not go on", 30)
    assert found == [True]
    assert session.request("ping")["pid"] == supervised.daemon()
    session.close()


def upgrade(supervised: Supervised) -> subprocess.CompletedProcess:
    code = "import sys; from gmemd.cli import main_gmemctl; sys.exit(main_gmemctl())"
    command = [sys.executable, "-c", code, "--socket", supervised.path, "upgrade"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90)


def add(array: np.ndarray, value: int) -> int:
    array += value
    return int(array[0])


def test_an_upgrade_under_load(supervised: Supervised) -> None:
    """Programs see a pause: their sessions, memory, contexts and requests go on."""
    session = gmem.connect(supervised.path)
    array = gmem.zeros(1 << 18, np.int64)
    context = gmem.device("simgpu0").context()
    counted, stop, failed = [0], threading.Event(), []

    def count() -> None:
        try:
            while not stop.is_set():
                counted[0] += 1
                assert context.launch(add, array, 1).wait(60) == counted[0]
                assert (array == counted[0]).all()
                gmem.prefetch(array, "simgpu0" if counted[0] % 2 else "host")
        except BaseException as error:  # is told below
            failed.append(error)

    worker = threading.Thread(target=count)
    worker.start()
    try:
        for _ in range(2):
            before, steps = supervised.daemon(), counted[0]
            done = upgrade(supervised)
            assert done.returncode == 0 and "has taken over" in done.stdout, done.stderr
            assert before != supervised.daemon() == session.request("ping")["pid"]
            eventually(lambda steps=steps: counted[0] > steps + 3 or failed, "nothing goes on", 30)
    finally:
        stop.set()
        worker.join()
    assert not failed
    assert (array == counted[0]).all()
    session.close()


def test_an_upgrade_to_what_cannot_take_over_is_refused(supervised: Supervised) -> None:
    session = gmem.connect(supervised.path)
    array = gmem.full(1000, 5)
    before = supervised.daemon()
    supervised.other.touch()
    done = upgrade(supervised)
    assert done.returncode == 1 and "can't take over: its state version is '99.1'" in done.stderr, done.stderr
    assert supervised.daemon() == before == session.request("ping")["pid"]
    supervised.other.unlink()
    assert upgrade(supervised).returncode == 0
    assert supervised.daemon() != before and (array == 5).all()
    session.close()
