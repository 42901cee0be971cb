# SPDX-License-Identifier: Apache-2.0
"""Runs the C test programs of tests/unit_c as pytest items, one for each flavour they are built in."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# How fast a shared machine draws its inputs says nothing about what is tested.
settings.register_profile("gmem", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("gmem")

# A daemon counts on the huge pages that it sees when it maps memory. So there are as many from the first test to the
# last: what one test took back at its end was missing in the middle of another one's fault.
HUGE_PAGES = 1024
OVERCOMMIT = Path("/proc/sys/vm/nr_overcommit_hugepages")
OVERCOMMIT_BEFORE = pytest.StashKey[int]()

ROOT = Path(__file__).resolve().parent.parent
FLAVOURS = {"plain": "c", "asan": "asan", "tsan": "tsan", "cov": "cov"}  # flavour: folder below build/
SKIPPED = 77
TIMEOUT_S = {"tsan": 400}  # so much slower under ThreadSanitizer
TIMEOUT_OTHERS_S = 110
SANITIZER_OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=1:detect_stack_use_after_return=1:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1",
}


def pytest_sessionstart(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput") or not os.access(OVERCOMMIT, os.W_OK):
        return
    now = int(OVERCOMMIT.read_text())
    if now >= HUGE_PAGES:
        return
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # and so to pytest_sessionfinish
    session.config.stash[OVERCOMMIT_BEFORE] = now
    OVERCOMMIT.write_text(str(HUGE_PAGES))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if OVERCOMMIT_BEFORE in session.config.stash:
        OVERCOMMIT.write_text(str(session.config.stash[OVERCOMMIT_BEFORE]))


class CFailure(Exception):
    pass


class CProgram(pytest.Item):
    def __init__(self, *, flavour: str, **kwargs) -> None:
        super().__init__(name=flavour, **kwargs)
        self.binary = Path("build", FLAVOURS[flavour], self.path.stem)
        self.timeout_s = TIMEOUT_S.get(flavour, TIMEOUT_OTHERS_S)

    def runtest(self) -> None:
        made = subprocess.run(["make", "-s", str(self.binary)], cwd=ROOT, capture_output=True, text=True)
        if made.returncode:
            raise CFailure(f"{self.binary} does not build\n{made.stdout}{made.stderr}")
        # A session of its own: what a program leaves behind when it hangs is ended with it.
        process = subprocess.Popen(
            [ROOT / self.binary],
            cwd=ROOT,
            env={**os.environ, **SANITIZER_OPTIONS},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=self.timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            raise CFailure(f"{self.binary} did not end within {self.timeout_s} s\n{output}") from None
        if process.returncode == SKIPPED:
            pytest.skip(output.strip().splitlines()[-1] if output.strip() else "exit 77")
        if process.returncode:
            raise CFailure(f"{self.binary} ended with {process.returncode}\n{output}")

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException]) -> str:
        if isinstance(excinfo.value, CFailure):
            return str(excinfo.value)
        return str(super().repr_failure(excinfo))

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, 0, f"{self.path.stem} ({self.name})"


class CFile(pytest.File):
    def collect(self) -> Iterator[CProgram]:
        for flavour in os.environ.get("GMEM_C_FLAVOURS", "plain asan").split():
            yield CProgram.from_parent(self, flavour=flavour)


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> CFile | None:
    if file_path.parent.name == "unit_c" and file_path.match("test_*.c"):
        return CFile.from_parent(parent, path=file_path)
    return None
