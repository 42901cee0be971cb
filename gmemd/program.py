# SPDX-License-Identifier: Apache-2.0
"""`gmemctl run`: an unmodified program on managed memory, with a private gmemd for it and its children.

libgmem-any.so, preloaded, is what serves the program's malloc and mmap; here is what has to be there before it starts,
and what is told when it has ended. The program's descriptors, terminal, signals and exit status are its own.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gmemd.control import Control
from gmemd.elf import why_not_preloaded
from gmemd.private import Daemon, Tier, without_preload
from gmemd.usage import Statistics

LIBRARY = "libgmem-any.so"
EXIT_OURS, EXIT_NOT_EXECUTABLE, EXIT_NOT_FOUND = 125, 126, 127  # as env(1) and timeout(1) have it
_SAMPLE_S, _SAMPLE_MAX_S = 0.05, 0.5
_LOG_LINES_MAX = 10
_FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGQUIT,
              signal.SIGALRM, signal.SIGCONT, signal.SIGWINCH)  # fmt: skip
_FROM_TERMINAL = (signal.SIGINT, signal.SIGQUIT, signal.SIGWINCH, signal.SIGCONT)


@dataclass(frozen=True)
class Settings:
    argv: Sequence[str]
    limit_bytes: int = 0  # 0: the machine's memory
    tiers: tuple[Tier, ...] = ()
    page_bytes: int = 65536
    mmap_bytes: int = 1 << 20
    required: bool = False
    quiet: bool = False
    json: bool = False
    output: str | None = None
    socket: str | None = None  # of a gmemd that runs; None: a private one


class Refused(Exception):
    """Why the program was not started, and the exit status that says so."""

    def __init__(self, message: str, status: int = EXIT_OURS) -> None:
        super().__init__(message)
        self.status = status


def find_program(name: str) -> str:
    """As execvp(3) finds it; Refused if it does not."""
    if not name:
        raise Refused("the program's name is empty", EXIT_NOT_FOUND)
    if "/" in name:
        return _checked(name)
    denied = False
    for folder in os.environ.get("PATH", os.defpath).split(":"):
        path = os.path.join(folder or ".", name)
        if os.path.isfile(path):
            if os.access(path, os.X_OK):
                return path
            denied = True
    if denied:
        raise Refused(f"{name}: {os.strerror(errno.EACCES)}", EXIT_NOT_EXECUTABLE)
    raise Refused(f"{name}: no such program", EXIT_NOT_FOUND)


def _checked(path: str) -> str:
    try:
        os.stat(path)
    except OSError as error:
        missing = error.errno in (errno.ENOENT, errno.ENOTDIR)
        raise Refused(f"{path}: {error.strerror}", EXIT_NOT_FOUND if missing else EXIT_NOT_EXECUTABLE) from None
    if os.path.isdir(path) or not os.access(path, os.X_OK):
        reason = os.strerror(errno.EISDIR if os.path.isdir(path) else errno.EACCES)
        raise Refused(f"{path}: {reason}", EXIT_NOT_EXECUTABLE)
    return path


def find_library() -> str:
    """Where it is installed, or built."""
    chosen = os.environ.get("GMEM_RUN_LIBRARY")
    root = Path(__file__).resolve().parent.parent
    places = [root / "build/lib", Path(sys.prefix).parent, Path("/usr/local/lib"), Path("/usr/lib")]
    for path in [Path(chosen)] if chosen else [place / LIBRARY for place in places]:
        if path.is_file():
            return str(path)
    raise Refused(f"{chosen or LIBRARY} is not there: `make lib` builds it, `make install` installs it")


def environment(settings: Settings, library: str, socket: str) -> dict[str, str]:
    environ = without_preload(os.environ)
    others = os.environ.get("LD_PRELOAD", "")
    environ["LD_PRELOAD"] = f"{library}:{others}" if others else library
    environ["GMEM_RUN_SOCKET"] = socket
    environ["GMEM_RUN_PAGE_BYTES"] = str(settings.page_bytes)
    environ["GMEM_RUN_MMAP_BYTES"] = str(settings.mmap_bytes)
    environ["GMEM_RUN_REQUIRE"] = "1" if settings.required else "0"
    environ["GMEM_RUN_QUIET"] = "1" if settings.quiet else "0"
    return environ


class Signals:
    """Passed on to the program, and before it is there kept for it. The terminal's go to it by themselves."""

    def __init__(self) -> None:
        self._pid = 0
        self.early: list[int] = []
        self._before = {}
        for number in _FORWARDED:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        if not self._pid:
            if number not in (signal.SIGCONT, signal.SIGWINCH):
                self.early.append(number)
        elif number not in _FROM_TERMINAL or not self._shared_terminal():
            with suppress(ProcessLookupError):
                os.kill(self._pid, number)

    def _shared_terminal(self) -> bool:
        """The terminal has told the whole foreground group, or a shell has."""
        with suppress(OSError):
            return os.tcgetpgrp(0 if os.isatty(0) else 2) == os.getpgrp() and os.getpgid(self._pid) == os.getpgrp()
        return False

    def program_is(self, pid: int) -> None:
        self._pid = pid

    def check(self) -> None:
        """Before the program is there a signal that would end it ends us."""
        if self.early:
            self.restore()
            die_by(self.early[0])

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def die_by(number: int) -> None:
    """As the program did, for whoever waits for us; without a second core file."""
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
    with suppress(OSError, ValueError):
        signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
    os.kill(os.getpid(), number)
    time.sleep(1)  # some are no end


def _spawn(path: str, argv: Sequence[str], environ: dict[str, str]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(argv, executable=path, env=environ, close_fds=False)
    except OSError as error:
        if error.errno != errno.ENOEXEC:
            status = EXIT_NOT_FOUND if error.errno == errno.ENOENT else EXIT_NOT_EXECUTABLE
            raise Refused(f"{path}: {error.strerror}", status) from None
    return subprocess.Popen(["/bin/sh", path, *argv[1:]], env=environ, close_fds=False)  # as execvp(3) does


def _wait(process: subprocess.Popen[bytes], control: Control | None, statistics: Statistics) -> int:
    pause = _SAMPLE_S
    while True:
        try:
            return process.wait(timeout=pause if control else None)
        except subprocess.TimeoutExpired:
            pause = min(_SAMPLE_MAX_S, pause * 2)
        if control:
            try:
                statistics.sample(control)
            except OSError:
                control = None


def run(settings: Settings) -> int:
    """The program's exit status; if a signal has ended it, the same signal ends us."""
    signals = Signals()
    try:
        status = _run(settings, signals)
    except Refused as refused:
        print(f"gmemctl: {refused}", file=sys.stderr)
        return refused.status
    finally:
        signals.restore()
    if status < 0:
        die_by(-status)
        return 128 - status
    return status


def _say(settings: Settings, text: str) -> None:
    if not settings.quiet:
        print(text, file=sys.stderr, flush=True)


def _plain(settings: Settings, path: str, signals: Signals, why: str) -> int:
    if settings.required:
        raise Refused(why)
    _say(settings, f"gmemctl: {why}; it runs on plain memory")
    process = _spawn(path, settings.argv, dict(os.environ))
    signals.program_is(process.pid)
    return process.wait()


def _run(settings: Settings, signals: Signals) -> int:
    path = find_program(settings.argv[0])
    try:
        library = find_library()
        reason = why_not_preloaded(path, library)
    except Refused as refused:
        return _plain(settings, path, signals, str(refused))
    except OSError:
        reason = None  # a program that may be run and not read
    if reason:
        return _plain(settings, path, signals, f"{path} {reason}, so its memory can't be managed")
    if not settings.socket and not os.access("/dev/userfaultfd", os.R_OK | os.W_OK):
        # Without it the kernel fails system calls on memory that is elsewhere, and any program may make them.
        why = "/dev/userfaultfd may not be opened: see the udev rule 60-gmem.rules, or --socket of a gmemd that may"
        return _plain(settings, path, signals, why)
    daemon = None
    try:
        if not settings.socket:
            daemon = Daemon(settings.limit_bytes, settings.tiers, lambda: bool(signals.early))
    except OSError as error:
        signals.check()
        return _plain(settings, path, signals, f"no gmemd: {error.strerror or error}")
    try:
        if signals.early:
            return -signals.early[0]
        return _managed(settings, path, signals, library, settings.socket or daemon.socket)  # type: ignore[union-attr]
    finally:
        if daemon is not None:
            for line in daemon.log()[:_LOG_LINES_MAX]:
                _say(settings, f"gmem: gmemd: {line}")
            daemon.close()


def _managed(settings: Settings, path: str, signals: Signals, library: str, socket: str) -> int:
    statistics = Statistics(settings.limit_bytes)
    begun = time.monotonic()
    process = _spawn(path, settings.argv, environment(settings, library, socket))
    signals.program_is(process.pid)
    try:
        with Control(socket) as control:
            statistics.status = _wait(process, control, statistics)
            statistics.wall_s = time.monotonic() - begun
            statistics.sample(control)
            _tell(settings, statistics)
    except OSError as error:
        _say(settings, f"gmemctl: no statistics: {error}")
        statistics.status = process.wait()
    return statistics.status


def _tell(settings: Settings, statistics: Statistics) -> None:
    if settings.output:
        try:
            Path(settings.output).write_text(json.dumps(statistics.as_json(), indent=2) + "\n")
        except OSError as error:
            print(f"gmemctl: --output: {settings.output}: {error.strerror}", file=sys.stderr)
    if settings.json:
        print(json.dumps(statistics.as_json(), indent=2), file=sys.stderr)
    elif not settings.quiet:
        for line in statistics.as_text():
            print(line, file=sys.stderr)
