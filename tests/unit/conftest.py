# SPDX-License-Identifier: Apache-2.0
"""What the tests of gmemd share: a core that only keeps books, a daemon process, and a bare client process."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

UNIT = Path(__file__).resolve().parent
ROOT = UNIT.parent.parent
WINDOW = 0x660000000000


class FakeCore:
    """The core's methods over dictionaries: real descriptors, no memory. calls records every call; fail[name] is an
    errno, or an exception, for a method; delay[name] an Event that the method waits for."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.fail: dict[str, Any] = {}
        self.delay: dict[str, threading.Event] = {}
        self.sessions: dict[int, dict[str, Any]] = {}
        self.contexts: dict[int, tuple[int, int]] = {}
        self.pools: dict[int, dict[str, Any]] = {}
        self.devices: dict[int, tuple[str, str]] = {0: ("host", "host")}
        self.tiers: set[str] = set()  # drivers that only store pages
        self.ranks: dict[int, int] = {}
        self.quotas: dict[int, dict[int, int]] = {}
        self.fds: dict[int, int] = {}
        self.events: list[dict[str, Any]] = []
        self.tracing: list[bytes] | None = None  # records that nobody has read
        self.trace_lost = 0
        self.closed = False
        self.busy: list[dict[str, Any]] = []
        self.stored = False
        self._event_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self._device_fd = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        self._next = 0
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(type(self), f"do_{name}", None)
        if method is None:
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, *args, *kwargs.values()))
            if name in self.delay:
                assert self.delay[name].wait(20)
            failure = self.fail.get(name)
            if isinstance(failure, int):
                raise OSError(failure, os.strerror(failure))
            if failure is not None:
                raise failure
            with self._lock:
                return method(self, *args, **kwargs)

        return call

    def _id(self) -> int:
        self._next += 1
        return self._next

    def _known(self, session: int) -> dict[str, Any]:
        if session not in self.sessions:
            raise OSError(errno.ENOENT, "no such session")
        return self.sessions[session]

    def called(self, name: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == name]

    def post(self, **event: Any) -> None:
        blank = {"type": "error", "hnid": 0, "error": 0, "session": 0, "va": 0, "value": 0}
        self.events.append({**blank, **event})
        os.eventfd_write(self._event_fd, 1)

    def do_close(self) -> None:
        if not self.closed:
            self.closed = True
            for fd in (self._event_fd, self._device_fd, *self.fds.values()):
                os.close(fd)

    def do_window(self) -> dict[str, int]:
        return {
            "base": WINDOW, "bytes": 1 << 40, "huge_base": WINDOW + (1 << 39), "huge_bytes": 1 << 39,
            "small_base": WINDOW, "small_bytes": 1 << 39,
        }  # fmt: skip

    def do_features(self) -> dict[str, Any]:
        return {
            "uffd": 0, "event_fork": True, "continue_wp": True, "poison": True, "hugepages": True, "uffd_device": True,
            "uffd_device_fd": self._device_fd,
        }  # fmt: skip

    def do_recovers(self) -> bool:
        return False

    def do_session_ids(self) -> list[int]:
        return list(self.sessions)

    def do_resume(self) -> None:
        pass

    def do_reap(self) -> None:
        pass

    def do_driver_builtin(self, name: str) -> bool:
        return name == "simgpu"

    def do_trace_start(self, *, session: int, hnid: int, buffer_bytes: int) -> None:
        if self.tracing is not None:
            raise OSError(errno.EBUSY, "there is one")
        self.tracing = []

    def do_trace_stop(self) -> None:
        pass

    def do_trace_read(self, most: int) -> tuple[bytes, int]:
        taken, self.tracing[:] = self.tracing[:most], self.tracing[most:]
        return b"".join(taken), self.trace_lost

    def do_trace_close(self) -> None:
        self.tracing = None

    def do_event_fd(self) -> int:
        return self._event_fd

    def do_read_events(self, capacity: int = 256) -> list[dict[str, Any]]:
        batch, self.events = self.events[:capacity], self.events[capacity:]
        if not self.events:
            with suppress(BlockingIOError):
                os.eventfd_read(self._event_fd)
        return batch

    def _file(self) -> int:
        number = os.memfd_create("fake")
        self.fds[number] = number
        return number

    def do_session_create(self, uid: int, pid: int) -> int:
        session = self._id()
        self.sessions[session] = {"uid": uid, "pid": pid, "regions": [], "files": (self._file(), self._file())}
        return session

    def do_session_destroy(self, session: int) -> None:
        for fd in self._known(session)["files"]:
            os.close(self.fds.pop(fd))
        del self.sessions[session]

    def do_session_files(self, session: int) -> tuple[int, int]:
        return self._known(session)["files"][:2]

    def do_session_ring(self, session: int) -> tuple[int, int]:
        known = self._known(session)
        if "ring" not in known:
            known["ring"] = (self._file(), self._file())
            known["files"] += known["ring"]
        return known["ring"]

    def do_session_attach(self, session: int, uffd: int, pidfd: int) -> None:
        os.close(uffd)
        os.close(pidfd)
        self._known(session)

    def do_session_fork(self, parent: int, uid: int, pid: int) -> tuple[int, bool]:
        regions = self._known(parent)["regions"]
        child = self.do_session_create(uid, pid)
        self.sessions[child]["regions"] = [r for r in regions if r["fork"] == "share"]
        return child, self.stored

    def do_regions(self, session: int) -> list[dict[str, Any]]:
        return self._known(session)["regions"]

    def do_session_stats(self, session: int) -> dict[str, Any]:
        known = self._known(session)
        return {
            "session": session, "uid": known["uid"], "pid": known["pid"], "mapped_bytes": 4096, "regions": 1,
            "contexts": 0, "host_faults": 2, "device_faults": 3, "resident_bytes": {0: 4096},
            "quota_bytes": dict(self.quotas.get(session, {})),
        }  # fmt: skip

    def do_context_files(self, session: int, hnid: int) -> tuple[int, int]:
        return self._known(session)["files"]

    def do_context_overlays(self, session: int, hnid: int) -> list[dict[str, Any]]:
        return self._known(session)["regions"]

    def do_context_attach(self, session: int, hnid: int, uffd: int, pidfd: int, pid: int) -> int:
        os.close(uffd)
        os.close(pidfd)
        self._known(session)
        context = self._id()
        self.contexts[context] = (session, hnid)
        return context

    def do_session_covers(self, session: int, va: int, size: int) -> bool:
        return False

    def do_context_overlay(self, context: int, va: int, size: int) -> None:
        if context not in self.contexts:
            raise OSError(errno.ENOENT, "no such context")

    def do_context_uncover(self, context: int, va: int, size: int) -> None:
        self.do_context_overlay(context, va, size)

    def do_region_file(self, session: int, va: int, hnid: int) -> dict[str, Any]:
        for region in self._known(session)["regions"]:
            if region["va"] == va:
                return {**region, "fd": os.dup(region["fd"])}
        raise OSError(errno.EINVAL, "no region begins there")

    def do_pool_ids(self) -> list[int]:
        return list(self.pools)

    def do_pool_create(self, session: int, size: int, *, page_bytes: int, small: bool, persistent: bool) -> int:
        self._known(session)
        pool = self._id()
        self.pools[pool] = {"bytes": size, "sealed": False, "page_bytes": page_bytes or 4096}
        return pool

    def do_pool_open(self, session: int, pool: int, write: bool) -> dict[str, Any]:
        known, found = self._known(session), self._pool(pool)
        if write and found["sealed"]:
            raise OSError(errno.EPERM, "sealed")
        va = WINDOW + (1 << 38) + (pool << 30)
        for region in known["regions"]:
            if region["va"] == va:
                if write and region["read_only"]:
                    raise OSError(errno.EBUSY, "open to read only")
                region["sealed"] = found["sealed"]
                return region
        region = {
            "va": va, "bytes": found["bytes"], "offset": va - WINDOW, "page_bytes": found["page_bytes"], "huge": False,
            "fork": "share", "fd": known["files"][1], "read_only": not write, "committed": False,
            "sealed": found["sealed"],
        }  # fmt: skip
        known["regions"].append(region)
        return region

    def do_pool_unlink(self, pool: int) -> None:
        self._pool(pool)
        del self.pools[pool]

    def do_pool_publish(self, pool: int) -> None:
        self._pool(pool)["sealed"] = True

    def do_pool_info(self, pool: int) -> dict[str, Any]:
        return {
            "pool": pool, "va": WINDOW + (1 << 38) + (pool << 30), "huge": False, "writers": 0, "readers": 0,
            "resident_bytes": {0: 4096}, **self._pool(pool),
        }  # fmt: skip

    def _pool(self, pool: int) -> dict[str, Any]:
        if pool not in self.pools:
            raise OSError(errno.ENOENT, "no such pool")
        return self.pools[pool]

    def do_context_detach(self, context: int) -> None:
        if self.contexts.pop(context, None) is None:
            raise OSError(errno.ENOENT, "no such context")

    def do_mmap(
        self, session: int, size: int, *, page_bytes: int, fork: str, small: bool, above: int = 0
    ) -> dict[str, Any]:
        known = self._known(session)
        offset = sum(r["bytes"] for r in known["regions"])
        region = {
            "va": WINDOW + offset, "bytes": size, "offset": offset, "page_bytes": page_bytes or 4096,
            "huge": page_bytes == 2 << 20 and not small, "fork": fork, "fd": known["files"][1], "read_only": False,
            "committed": False,
        }  # fmt: skip
        known["regions"].append(region)
        return region

    def do_map_file(
        self, session: int, fd: int, offset: int, size: int, *, page_bytes: int, write: bool, private: bool, fork: str
    ) -> dict[str, Any]:
        os.close(fd)
        return self.do_mmap(session, size, page_bytes=page_bytes, fork=fork, small=True)

    def do_flush(self, session: int, va: int, size: int) -> None:
        self._known(session)

    def do_adopt(self, session: int, va: int, size: int, *, page_bytes: int, fork: str) -> dict[str, Any]:
        return self.do_mmap(session, size, page_bytes=page_bytes, fork=fork, small=True)

    def do_mmap_commit(self, session: int, va: int) -> None:
        self._known(session)

    def do_munmap(self, session: int, va: int, size: int) -> None:
        known = self._known(session)
        known["regions"] = [r for r in known["regions"] if r["va"] != va]

    def do_advise(self, session: int, hnid: int, va: int, size: int, advice: str) -> None:
        self._known(session)

    def do_prefetch(self, session: int, hnid: int, va: int, size: int) -> None:
        self._known(session)

    def do_discard(self, session: int, va: int, size: int) -> None:
        self._known(session)

    def do_hmemcpy(self, session: int, hnid: int, dst: int, src: int, size: int) -> None:
        self._known(session)

    def do_query(self, session: int, va: int, size: int, capacity: int) -> tuple[bytes, int]:
        total = -(-size // 4096)
        one = bytes([1, 0, 1, 0, 0, 12, 0, 0])
        return one * min(total, capacity), total

    def do_acquire(self, context: int, ranges: list[Any], write: bool, asked: int) -> None:
        pass

    def do_release(self, context: int, ranges: list[Any]) -> None:
        pass

    def do_release_named(self, context: int, holds: list[Any]) -> None:
        pass

    def do_device_attach(self, driver: str, name: str, config: dict[str, str], py: Any = None, at: int = 0) -> int:
        hnid = at or next(h for h in range(1, 16) if h not in self.devices)
        self.devices[hnid] = (name, driver)
        return hnid

    def do_device_detach(self, hnid: int, force: bool = False) -> None:
        if hnid not in self.devices:
            raise OSError(errno.ENOENT, "no such device")
        del self.devices[hnid]

    def do_tier_rank(self, hnid: int, rank: int) -> None:
        if self.devices[hnid][1] not in self.tiers:
            raise OSError(errno.EINVAL, "no tier")
        self.ranks[hnid] = rank

    def do_limit(self, hnid: int, size: int) -> None:
        pass

    def do_quota_default(self, hnid: int, session_bytes: int, uid_bytes: int) -> None:
        pass

    def do_quota_session(self, session: int, hnid: int, size: int) -> None:
        self._known(session)
        self.quotas.setdefault(session, {})[hnid] = size

    def do_quota_uid(self, uid: int, hnid: int, size: int) -> None:
        pass

    def do_device_caps(self, hnid: int) -> int:
        return 0

    def do_hnodes(self) -> list[dict[str, Any]]:
        zero = dict.fromkeys(
            ("used_bytes", "peak_bytes", "pinned_bytes", "contexts", "faults", "in_bytes", "out_bytes", "evictions",
             "evicted_clean", "errors", "health", "bandwidth_bytes_per_s", "latency_ns", "assured_bytes",
             "stored_pages", "stored_page_bytes", "stored_bytes", "raw_pages"), 0)  # fmt: skip
        return [
            {"hnid": h, "name": name, "driver": driver, "capacity_bytes": 1 << 20, "page_bytes_mask": 1 << 12,
             "caps": 0x041, "policy": "acme", "last_error": "", **zero}
            for h, (name, driver) in sorted(self.devices.items())
        ]  # fmt: skip

    def do_threads(self) -> list[dict[str, Any]]:
        return self.busy

    def do_stats(self) -> dict[str, int]:
        counters = ("h2d_bytes", "d2h_bytes", "evictions", "regions", "contexts", "fault_ns")
        return {"sessions": len(self.sessions), **dict.fromkeys(counters, 0)}


@pytest.fixture
def fake_core() -> Iterator[FakeCore]:
    core = FakeCore()
    yield core
    for event in core.delay.values():
        event.set()
    core.do_close()


def eventually(condition: Callable[[], Any], timeout_s: float = 10.0) -> Any:
    """The condition's value as soon as it is true; fails when it never is."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, "it did not come to pass in time"
        time.sleep(0.01)


@pytest.fixture(name="eventually")
def _eventually() -> Callable[..., Any]:
    return eventually


class Daemon:
    """A gmemd process of its own."""

    def __init__(self, directory: Path, *args: str, embedded: bool = False, **popen: Any) -> None:
        self.directory = directory / "run"
        self.socket = str(self.directory / "gmemd.sock")
        self.log_path = directory / "log"
        ready, ready_child = os.pipe()
        command = [sys.executable, "-m", "gmemd", "run", "--runtime-dir", str(self.directory), "--ready-fd",
                   str(ready_child), *args]  # fmt: skip
        if embedded:
            command.append("--embedded")
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                pass_fds=(ready_child, *popen.pop("pass_fds", ())), **popen,
            )  # fmt: skip
        os.close(ready_child)
        self.said = os.read(ready, 4096).decode()
        os.close(ready)

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def stop(self, timeout_s: float = 20.0) -> int:
        self.process.terminate()
        return self.process.wait(timeout_s)

    def ctl(self, *args: str) -> Any:
        """What gmemctl prints as JSON."""
        done = self.ctl_process(*args, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def ctl_process(self, *args: str) -> subprocess.CompletedProcess[str]:
        code = "import sys; from gmemd.cli import main_gmemctl; sys.exit(main_gmemctl())"
        command = [sys.executable, "-c", code, "--socket", self.socket, *args]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.fixture
def run_daemon(tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    pytest.importorskip("gmemd._core")
    daemons: list[Daemon] = []

    def run(*args: str, **options: Any) -> Daemon:
        directory = tmp_path / f"d{len(daemons)}"
        directory.mkdir()
        daemon = Daemon(directory, *args, **options)
        daemons.append(daemon)
        return daemon

    yield run
    for daemon in daemons:
        if daemon.process.poll() is None:
            daemon.process.kill()
            daemon.process.wait(20)


class Client:
    """A bare client process (bareclient.py): a command is a line of JSON, and so is its answer."""

    def __init__(self, socket: str, *args: str, **popen: Any) -> None:
        env = {**os.environ, "PYTHONPATH": str(ROOT), **popen.pop("env", {})}
        self.process = subprocess.Popen(
            [sys.executable, str(UNIT / "bareclient.py"), socket, *args], cwd=ROOT, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, env=env, **popen,
        )  # fmt: skip
        self.welcome = self._read()

    def _read(self) -> Any:
        line = self.process.stdout.readline()
        assert line, f"the client has ended with {self.process.wait(10)}"
        return json.loads(line)

    def send(self, command: str, **args: Any) -> None:
        self.process.stdin.write(json.dumps({"command": command, **args}) + "\n")
        self.process.stdin.flush()

    def ask(self, command: str, **args: Any) -> Any:
        self.send(command, **args)
        return self._read()

    def end(self) -> int:
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        return self.process.wait(20)


@pytest.fixture
def run_client() -> Iterator[Callable[..., Client]]:
    clients: list[Client] = []

    def run(socket: str, *args: str, **options: Any) -> Client:
        clients.append(Client(socket, *args, **options))
        return clients[-1]

    yield run
    for client in clients:
        if client.process.poll() is None:
            client.process.kill()
        client.end()
