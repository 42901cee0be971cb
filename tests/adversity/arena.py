# SPDX-License-Identifier: Apache-2.0
"""The daemon under attack, its honest client, and what the daemon holds."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers import ROOT, as_user

from gmemd.control import Control

HERE = Path(__file__).resolve().parent
PATIENCE_S = 30.0
ROOTLY = os.geteuid() == 0
# The users of these tests, none of them real.
HONEST, MALLORY, OSCAR = (54321, 54322, 54323) if ROOTLY else (os.geteuid(),) * 3
_COUNTED = ("sessions", "contexts", "regions", "objects")
# What an allocator may keep for itself after an attack.
_SLACK_BYTES = 24 << 20
_LIMITS = ("handshake_timeout_s=2", "sessions_per_uid=24", "connections_per_uid=48", "handshakes_per_uid=12",
           "requests_in_flight=64", "contexts_per_session=4")  # fmt: skip


class Hung(AssertionError):
    """A process did not answer in time."""


class Talker:
    """A process that answers each line of JSON with another one."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command], env={**os.environ, **env}, cwd=ROOT, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        self._rest = b""

    def send(self, command: str, **args: Any) -> None:
        self.process.stdin.write(json.dumps({"command": command, **args}).encode() + b"\n")
        self.process.stdin.flush()

    def answer(self, seconds: float = PATIENCE_S) -> Any:
        until = time.monotonic() + seconds
        while b"\n" not in self._rest:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                raise Hung(f"{self.process.args[-2:]} did not answer within {seconds} s")
            chunk = os.read(self.process.stdout.fileno(), 1 << 16)
            if not chunk:
                raise EOFError(f"{self.process.args[-2:]} has ended with {self.process.wait(10)}")
            self._rest += chunk
        line, self._rest = self._rest.split(b"\n", 1)
        answer = json.loads(line)
        if isinstance(answer, dict) and "raised" in answer:
            raise AssertionError(answer["raised"])
        return answer

    def ask(self, command: str, seconds: float = PATIENCE_S, **args: Any) -> Any:
        self.send(command, **args)
        return self.answer(seconds)

    def kill(self) -> None:
        """With everything that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(20)
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(BrokenPipeError):
                pipe.close()


@dataclass(frozen=True)
class Census:
    """What the daemon holds. anonymous and files: bytes of memory of its own, and of the memfds that it has open."""

    threads: int
    fds: Counter[str]
    counted: dict[str, int]
    anonymous: int
    files: int

    def above(self, before: Census) -> dict[str, Any]:
        """What there is more of than there was before; also a session that is missing."""
        more: dict[str, Any] = {}
        if self.threads > before.threads:
            more["threads"] = (before.threads, self.threads)
        extra = {kind: (before.fds[kind], n) for kind, n in self.fds.items() if n > before.fds[kind]}
        if extra:
            more["fds"] = extra
        for name, value in self.counted.items():
            if value != before.counted[name]:
                more[name] = (before.counted[name], value)
        for name in ("anonymous", "files"):
            was, now = getattr(before, name), getattr(self, name)
            if now > was + _SLACK_BYTES:
                more[name] = (was, now)
        return more


def _kind(link: str) -> str:
    """socket:[123] and the like without their numbers; memfds by name."""
    return link.split(":[")[0] if link.startswith(("socket:[", "pipe:[")) else link


def take_census(pid: int, stats: dict[str, int]) -> Census:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    kinds: Counter[str] = Counter()
    files: dict[int, int] = {}
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            link = os.readlink(entry.path)
            kinds[_kind(link)] += 1
            if link.startswith("/memfd:"):
                about = os.stat(entry.path)
                files[about.st_ino] = about.st_blocks * 512
    return Census(
        threads=int(status["Threads"]), fds=kinds, counted={name: stats[name] for name in _COUNTED},
        anonymous=int(status["RssAnon"].split()[0]) << 10, files=sum(files.values()),
    )  # fmt: skip


class Arena:
    """A daemon in a directory that every user may enter."""

    def __init__(self, *options: str, honest: bool = True, limits: tuple[str, ...] = (), prefix: tuple[str, ...] = (),
                 env: dict[str, str] | None = None, as_uid: int | None = None) -> None:  # fmt: skip
        self.directory = Path(tempfile.mkdtemp(prefix="gmem-adversity-", dir="/tmp"))
        self.directory.chmod(0o755)
        self.socket = str(self.directory / "run" / "gmemd.sock")
        self._attackers: list[Talker] = []
        self._bystanders: list[Talker] = []
        self.honest: Talker | None = None
        if as_uid is not None:
            os.chown(self.directory, as_uid, as_uid)
        ready, ready_end = os.pipe()
        command = [*prefix, sys.executable, "-m", "gmemd", "run", "--runtime-dir", str(self.directory / "run"),
                   "--ready-fd", str(ready_end), *options]  # fmt: skip
        for limit in (*_LIMITS, *limits):
            command += ["--set", f"limits.{limit}"]
        if as_uid is not None:
            command = as_user(as_uid, command)
        with open(self.directory / "log", "wb") as log:
            self.process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log,
                stderr=log, pass_fds=(ready_end,), env={**os.environ, **(env or {})},
            )  # fmt: skip
        os.close(ready_end)
        said = os.read(ready, 4096).decode()
        os.close(ready)
        if said != "READY=1\n":
            self.close()
            raise RuntimeError(f"gmemd did not start: {said or self.log}")
        self.control = Control(self.socket)
        if honest:
            self.honest = Talker(
                as_user(HONEST, [sys.executable, str(HERE / "honest.py")]) if ROOTLY
                else [sys.executable, str(HERE / "honest.py")], {"GMEM_SOCKET": self.socket},
            )  # fmt: skip
            self.honest.answer(60)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log(self) -> str:
        path = self.directory / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def attacker(self, uid: int = MALLORY) -> Talker:
        """A process of that user that knows the protocol, and more (attacker.py)."""
        made = Talker([sys.executable, str(HERE / "attacker.py"), self.socket],
                      {"ATTACKER_UID": str(uid), "PYTHONPATH": str(ROOT)})  # fmt: skip
        self._attackers.append(made)
        made.answer()
        return made

    def pooler(self, uid: int, bystander: bool = False) -> Talker:
        """A process of that user with the client library, for pools (pooler.py); as an attacker, or to stay."""
        command = [sys.executable, str(HERE / "pooler.py")]
        made = Talker(as_user(uid, command) if ROOTLY else command, {"GMEM_SOCKET": self.socket})
        (self._bystanders if bystander else self._attackers).append(made)
        made.answer()
        return made

    def end_attackers(self) -> None:
        for attacker in self._attackers:
            attacker.kill()
        self._attackers.clear()

    def stats(self) -> dict[str, int]:
        return self.control.request("stats")["stats"]

    def check_honest(self) -> None:
        """The daemon runs, and whoever behaves is served: every word is what it should be."""
        assert self.process.poll() is None, f"gmemd has ended with {self.process.returncode}:\n{self.log[-4000:]}"
        if self.honest is not None:
            wrong = self.honest.ask("check")
            assert not wrong, f"the honest client's memory has {wrong}\n{self.log[-4000:]}"

    def census(self) -> Census:
        return take_census(self.pid, self.stats())

    def settle(self, before: Census, seconds: float = PATIENCE_S) -> None:
        """Ends the attackers, and waits until the daemon holds what it held before."""
        self.end_attackers()
        until = time.monotonic() + seconds
        while more := self.census().above(before):
            assert time.monotonic() < until, f"left behind: {more}\n{self.log[-1500:]}"
            time.sleep(0.02)

    def close(self) -> None:
        self.end_attackers()
        for other in (*self._bystanders, *([self.honest] if self.honest else [])):
            other.kill()
        if hasattr(self, "control"):
            self.control.close()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(20)
        shutil.rmtree(self.directory, ignore_errors=True)
