# SPDX-License-Identifier: Apache-2.0
"""A private gmemd for one program and its children, as `gmemctl run` starts it."""

from __future__ import annotations

import errno
import json
import os
import secrets
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gmemd.config import ConfigError

_START_S, _LOOK_S = 60.0, 0.05
_END_S = 10.0
_LOG = "log"


@dataclass(frozen=True)
class Tier:
    driver: str
    options: dict[str, str]


def _capacity(tier: Tier) -> dict[str, str]:
    """What it may take if nothing was said: half of the machine's memory, or most of what is free in the filesystem."""
    if "capacity" in tier.options:
        return {}
    if tier.driver == "zstd":
        return {"capacity": str(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)}
    folder = tier.options["path"]
    if not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    try:
        free = os.statvfs(folder)
    except OSError as error:
        raise ConfigError(f"--tier: {tier.options['path']}: {error.strerror}") from None
    usable = free.f_bavail * free.f_frsize // 10 * 9 >> 21 << 21
    return {"capacity": str(max(usable, 2 << 20)), **({} if "preallocate" in tier.options else {"preallocate": "off"})}


def without_preload(environ: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in environ.items() if key != "LD_PRELOAD" and not key.startswith("GMEM_RUN_")}


class Daemon:
    """A private gmemd, supervised: it is started again if it is killed. It ends when we and the program's last process
    have ended."""

    def __init__(
        self, limit_bytes: int, tiers: tuple[Tier, ...], interrupted: Callable[[], bool] = lambda: False
    ) -> None:
        self._interrupted = interrupted
        base = os.environ.get("XDG_RUNTIME_DIR", "")
        if len(base) < 60 and os.access(base, os.W_OK | os.X_OK):
            self.directory = Path(base) / f"gmem-{os.getpid()}-{secrets.token_hex(4)}"
            self.directory.mkdir(mode=0o700)
        else:
            self.directory = Path(tempfile.mkdtemp(prefix=f"gmem-{os.getuid()}-", dir="/tmp"))
        self.socket = str(self.directory / "gmemd.sock")
        self._alive = -1
        try:
            self._start(_config(limit_bytes, tiers))
        except BaseException:
            self.close()
            raise

    def _start(self, text: str) -> None:
        config = self.directory / "config.toml"
        config.write_text(text)
        parent_end, self._alive = os.pipe()
        ready, ready_end = os.pipe()
        command = [sys.executable, "-m", "gmemd", "run", "--embedded", "--supervised", "--config", str(config),
                   "--runtime-dir", str(self.directory), "--ready-fd", str(ready_end),
                   "--parent-fd", str(parent_end)]  # fmt: skip
        try:
            with open(self.directory / _LOG, "wb") as log:
                self._process = subprocess.Popen(
                    command, pass_fds=(ready_end, parent_end), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    start_new_session=True, env=without_preload(os.environ), cwd="/" if _is_installed() else None,
                )  # fmt: skip
        finally:
            os.close(ready_end)
            os.close(parent_end)
        try:
            self._wait_ready(ready)
        finally:
            os.close(ready)

    def _wait_ready(self, fd: int) -> None:
        said = b""
        until = time.monotonic() + _START_S
        while b"READY=1" not in said:
            if self._interrupted():
                raise OSError(errno.EINTR, os.strerror(errno.EINTR))
            if not select.select([fd], [], [], _LOOK_S)[0]:
                if time.monotonic() < until:
                    continue
                raise OSError(errno.ETIMEDOUT, f"gmemd was not ready within {_START_S:.0f} s")
            chunk = os.read(fd, 4096)
            if not chunk:
                why = said.decode(errors="replace").removeprefix("ERROR=").strip() or "".join(self.log()[-1:])
                raise OSError(errno.ECONNREFUSED, f"gmemd did not start: {why or 'it said nothing'}")
            said += chunk

    def log(self) -> list[str]:
        with suppress(OSError):
            return (self.directory / _LOG).read_text(errors="replace").splitlines()
        return []

    def close(self) -> None:
        if self._alive >= 0:
            os.close(self._alive)
            self._alive = -1
        process = getattr(self, "_process", None)
        if process is not None:
            try:
                process.wait(timeout=_END_S)
            except subprocess.TimeoutExpired:
                return  # a child of the program's still uses it
        shutil.rmtree(self.directory, ignore_errors=True)


def _is_installed() -> bool:
    """Else gmemd is found in the working directory, as `python -m` does."""
    return Path(__file__).resolve().parent.parent.name == "site-packages"


def _config(limit_bytes: int, tiers: tuple[Tier, ...]) -> str:
    """A file, as paths may contain anything. What is committed may be more than there is, as in the kernel."""
    lines = ["[daemon]", "overcommit = true", 'log_level = "error"']
    lines += ["[limits]", "sessions_per_uid = 65536", "connections_per_uid = 65536", "handshakes_per_uid = 65536"]
    if limit_bytes:
        lines += ["[host]", f"limit = {limit_bytes}"]
    for index, tier in enumerate(tiers):
        lines += [f"[devices.{tier.driver}{index or ''}]", f'driver = "{tier.driver}"', f"tier = {index}"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in {**tier.options, **_capacity(tier)}.items()]
    return "\n".join(lines) + "\n"
