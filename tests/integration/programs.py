# SPDX-License-Identifier: Apache-2.0
"""The C library as an application has it: installed, compiled against, and run beside a gmemd of its own."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from helpers import ROOT

SOURCES = Path(__file__).parent / "libgmem"
EXAMPLES = ROOT / "client/examples"
C_FLAGS = ["-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-pthread"]
DEVICES = ["name=simgpu0,driver=simgpu,capacity=8M", "name=simgpu1,driver=simgpu,capacity=8M,replayable=off"]
TIMEOUT_S = 100


def run_ok(command: list[str | Path], **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, **options)
    assert done.returncode == 0, f"{command[0]} ended with {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def jemalloc() -> str | None:
    """The library of another allocator, if there is one."""
    found = subprocess.run(["gcc", "-print-file-name=libjemalloc.so.2"], capture_output=True, text=True).stdout.strip()
    return found if os.path.isabs(found) and os.path.exists(found) else None


class Builder:
    """Compiles against the installed library: what pkg-config says, and nothing else."""

    def __init__(self, prefix: Path, directory: Path) -> None:
        self.prefix = prefix
        self.directory = directory

    def _flags(self, what: str) -> list[str]:
        path = {"PKG_CONFIG_PATH": str(self.prefix / "lib/pkgconfig")}
        return run_ok(["pkg-config", what, "gmem-heap"], env={**os.environ, **path}).split()

    def program(self, source: Path) -> Path:
        made = self.directory / source.stem
        rpath = f"-Wl,-rpath,{self.prefix}/lib"
        run_ok(["cc", *C_FLAGS, *self._flags("--cflags"), source, *self._flags("--libs"), rpath, "-o", made])
        return made

    def kernels(self, source: Path) -> Path:
        made = self.directory / f"{source.stem}.so"
        run_ok(["cc", *C_FLAGS, *self._flags("--cflags"), "-shared", "-fPIC", source, "-o", made])
        return made


class Daemon:
    def __init__(self, devices: Sequence[str] = DEVICES) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="gmem-test-", dir="/tmp"))  # short: paths of sockets are
        self.socket = self.directory / "gmemd.sock"
        command = [sys.executable, "-m", "gmemd", "run", "--runtime-dir", self.directory]
        command += [part for device in devices for part in ("--device", device)]
        ready, ready_end = os.pipe()
        with open(self.directory / "log", "wb") as log:
            self.process = subprocess.Popen([*command, "--ready-fd", str(ready_end)], stderr=log, cwd=ROOT,
                                            pass_fds=(ready_end,))  # fmt: skip
        os.close(ready_end)
        with os.fdopen(ready) as pipe:
            said = pipe.read()
        assert "READY=1" in said, said + self.log()

    def log(self) -> str:
        return (self.directory / "log").read_text(errors="replace")

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "GMEM_SOCKET": str(self.socket)}

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            shutil.rmtree(self.directory)
