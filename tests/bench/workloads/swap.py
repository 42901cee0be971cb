# SPDX-License-Identifier: Apache-2.0
"""The kernel's way with arrays that are larger than memory: swap to compressed RAM (zram), under a memory cgroup of
the same budget. Needs root; set up for one measurement, and taken down after it. Run as a module it is the process in
the cgroup."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from workloads import arena, direct
from workloads.workload import Workload

CONTROL = Path("/sys/class/zram-control")
BENCH = Path(__file__).resolve().parent.parent
SLACK_BYTES = 6 << 20  # for the kernels' temporaries, which are not in unified memory either
FIRST = "32767"  # before any swap the machine may have
TIMEOUT_S = 300
ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class NotAvailable(Exception):
    """Why there is none here."""


def measure(workload: Workload, percent: int, rounds: int) -> tuple[list[float], str | None, bool]:
    """Seconds of each round, a note, and whether the result was wrong."""
    try:
        with _ending(), _zram(2 * workload.nbytes), _cgroup(workload.capacity(percent) + SLACK_BYTES) as group:
            quick = workload.nbytes < type(workload)().nbytes
            command = [sys.executable, "-m", "workloads.swap", str(group), workload.name, str(int(quick)), str(rounds)]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCH), *filter(None, sys.path)])}
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=TIMEOUT_S)
        if done.returncode:
            return [], f"zram: {done.stderr.strip().splitlines()[-1:] or done.returncode}", False
        return direct.read(done.stdout)
    except NotAvailable as error:
        return [], f"not available: {error}", False


@contextlib.contextmanager
def _ending() -> Iterator[None]:
    """A process that is asked to end takes down what it has set up."""

    def stop(number: int, _frame: object) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, stop) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _zram(nbytes: int) -> Iterator[None]:
    """A compressed swap device of our own."""
    if os.geteuid() != 0:
        raise NotAvailable("zram needs root")
    try:
        number = (CONTROL / "hot_add").read_text().strip()
    except OSError as error:
        raise NotAvailable(f"zram: {error}") from None
    device, settings = f"/dev/zram{number}", Path(f"/sys/block/zram{number}")
    with contextlib.ExitStack() as stack:
        stack.callback((CONTROL / "hot_remove").write_text, number)
        try:
            with contextlib.suppress(OSError):
                (settings / "comp_algorithm").write_text("lz4")
            (settings / "disksize").write_text(str(nbytes))
            stack.callback((settings / "reset").write_text, "1")
            _do(["mkswap", device])
            _do(["swapon", "-p", FIRST, device])
        except OSError as error:
            raise NotAvailable(f"zram: {error}") from None
        stack.callback(_do, ["swapoff", device])
        yield


def _do(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise OSError(f"{command[0]}: {error.stderr.strip()}") from None


@contextlib.contextmanager
def _cgroup(limit_bytes: int) -> Iterator[Path]:
    """A memory cgroup below ours, version 2 or 1."""
    group, limit = _below_ours()
    try:
        group.mkdir()
    except OSError as error:
        raise NotAvailable(f"memory cgroup: {error}") from None
    try:
        try:
            (group / limit).write_text(str(limit_bytes))
        except OSError as error:
            raise NotAvailable(f"memory cgroup: {error}") from None
        yield group
    finally:
        until = time.monotonic() + 10
        while group.exists() and time.monotonic() < until:
            with contextlib.suppress(OSError):  # busy for a moment after its last process
                group.rmdir()
            time.sleep(0.01)


def _below_ours() -> tuple[Path, str]:
    name = f"gmem-workloads-{os.getpid()}"
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return Path("/sys/fs/cgroup/memory" + path) / name, "memory.limit_in_bytes"
    if "memory" in _text("/sys/fs/cgroup/cgroup.subtree_control").split():
        return Path("/sys/fs/cgroup") / name, "memory.max"
    raise NotAvailable("no memory cgroup")


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def main(group: str, name: str, quick: str, rounds: str) -> None:
    from workloads import catalogue

    workload = catalogue.make(name, bool(int(quick)))
    Path(group, "cgroup.procs").write_text(str(os.getpid()))  # now: only the data is charged

    def let_go() -> None:  # the check has arrays of its own
        for limit in ("memory.limit_in_bytes", "memory.max"):
            if Path(group, limit).exists():
                Path(group, limit).write_text("-1" if limit != "memory.max" else "max")

    direct.report(workload, arena.plain(workload.specs), int(rounds), let_go)


if __name__ == "__main__":
    main(*sys.argv[1:])
