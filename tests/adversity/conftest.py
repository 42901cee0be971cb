# SPDX-License-Identifier: Apache-2.0
"""A gmemd of one's own, a client in good standing beside every attack, and a census of what gmemd holds."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import gmem
import numpy as np
import pytest

from gmemd.control import Control

ROOT = Path(__file__).resolve().parents[2]
WORDS = 1 << 17


class Target:
    """The daemon that is attacked."""

    def __init__(self, directory: Path, *settings: str) -> None:
        self.directory = directory / "run"
        self.log = directory / "log"
        ready, ready_end = os.pipe()
        command = [sys.executable, "-m", "gmemd", "run", "--runtime-dir", str(self.directory), "--ready-fd",
                   str(ready_end), "--device", "simgpu0:capacity=4M", "--set", "host.limit=256M"]  # fmt: skip
        command += [part for setting in settings for part in ("--set", setting)]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, pass_fds=[ready_end])
        os.close(ready_end)
        said = os.read(ready, 4096).decode()
        os.close(ready)
        assert said == "READY=1\n", said + self.log.read_text()

    @property
    def socket(self) -> str:
        return str(self.directory / "gmemd.sock")

    @property
    def pid(self) -> int:
        return self.process.pid

    def census(self) -> dict[str, int]:
        """What an attack must not leave behind: descriptors, threads, sessions, memory of files."""
        with Control(self.socket) as control:
            reply = control.request("stats")
        counted = {name: reply["stats"][name] for name in ("sessions", "contexts", "regions", "objects")}
        counted.update({h["name"]: h["used_bytes"] for h in reply["hnodes"]})
        # the connection that asked may still be closing, so what comes and goes with it is looked at until it settles
        counted["fds"] = len(os.listdir(f"/proc/{self.pid}/fd"))
        counted["threads"] = len(os.listdir(f"/proc/{self.pid}/task"))
        return counted

    def fds(self) -> dict[str, int]:
        """By what they are."""
        names: list[str] = []
        for fd in os.listdir(f"/proc/{self.pid}/fd"):
            with contextlib.suppress(OSError):
                names.append(os.readlink(f"/proc/{self.pid}/fd/{fd}").split(":[")[0])
        return dict(Counter(names))

    def settles(self, before: dict[str, int], seconds: float = 15.0) -> None:
        until = time.monotonic() + seconds
        while (now := self.census()) != before:
            worse = {key: (before[key], now[key]) for key in before if now[key] > before[key]}
            if not worse:
                return
            assert time.monotonic() < until, f"left behind: {worse}; {self.fds()}; {self.log.read_text()[-2000:]}"
            time.sleep(0.05)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    target = Target(tmp_path_factory.mktemp("gmemd"))
    yield target
    target.process.terminate()
    assert target.process.wait(30) == 0, target.log.read_text()


@pytest.fixture(scope="module")
def neighbour(target: Target) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """A healthy client: memory that others must not change, and what it must hold."""
    session = gmem.connect(target.socket)
    known = np.random.default_rng(1).integers(0, 1 << 62, WORDS, np.int64)
    managed = gmem.empty(WORDS, np.int64, page_size="4K", session=session)
    managed[:] = known
    yield managed, known
    session.close()


@pytest.fixture(autouse=True)
def nothing_is_harmed(target: Target, neighbour: tuple[np.ndarray, np.ndarray]) -> Iterator[None]:
    managed, known = neighbour
    gmem.prefetch(managed, "simgpu0")  # what is made once (files, threads of pools) is made by now
    gmem.prefetch(managed, "host")
    target.census()
    before = target.census()
    yield
    assert target.process.poll() is None, target.log.read_text()[-3000:]
    gmem.prefetch(managed[: WORDS // 2], "simgpu0")
    assert np.array_equal(managed, known), "a neighbour's memory was changed"
    gmem.prefetch(managed, "host")
    target.settles(before)
    assert "Traceback" not in target.log.read_text(), target.log.read_text()[-3000:]


def run_attacker(code: str, target: Target, *args: str, uid: int | None = None, seconds: float = 60.0):
    """A program of its own, since it may be killed for what it does; its last line is JSON."""
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent), "GMEM_SOCKET": target.socket}
    command = [sys.executable, "-c", code, *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environ, cwd=ROOT)
    lines = done.stdout.splitlines()
    return done.returncode, json.loads(lines[-1]) if lines else None, done.stderr


@pytest.fixture
def attack(target: Target):
    return lambda code, *args, **options: run_attacker(code, target, *args, **options)
