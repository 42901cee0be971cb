# SPDX-License-Identifier: Apache-2.0
"""Machines of a test: a supervised gmemd with a remote tier called far, in a network namespace perhaps, and programs
that use it; and what servers were asked for pages of a pool."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

from told import Told
from valkeys import Cluster, Server, until

from gmemd.control import Control


class Machine:
    """Its gmemd is started again when it is killed. prefix: of the command, for a namespace."""

    def __init__(
        self, folder: Path, endpoints: str, *settings: str, prefix: tuple[str, ...] = (),
        crash_file: Path | None = None, **options: Any,
    ) -> None:  # fmt: skip
        self.socket = str(folder / "run" / "gmemd.sock")
        self.log = folder / "log"
        self.prefix = prefix
        folder.mkdir(exist_ok=True)
        device = {"name": "far", "driver": "remote", "capacity": "64M", "timeout": 4, "lease": 2,
                  "endpoints": endpoints.replace(",", ";"), **options}  # fmt: skip
        command = [
            *prefix, "setpriv", "--pdeathsig", "TERM", sys.executable, "-m", "gmemd", "run", "--supervised",
            "--runtime-dir", str(folder / "run"), "--log-level", "info",
            *(word for one in settings for word in ("--set", one)),
            "--device", ",".join(f"{key}={value}" for key, value in device.items()),
        ]  # fmt: skip
        environ = {**os.environ, **({"GMEM_CRASH_FILE": str(crash_file)} if crash_file else {})}
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environ)
        until(lambda: '"ready"' in self.log.read_text() or self.process.poll() is not None, "gmemd is ready", 60)
        assert self.process.poll() is None, self.log.read_text()
        self._told: list[Told] = []

    def program(self, **options: Any) -> Told:
        """One more, on this machine."""
        self._told.append(Told(self.socket, prefix=self.prefix, **options))
        return self._told[-1]

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        with Control(self.socket, 30) as control:
            return control.request(op, **arguments)

    def pools(self) -> list[dict[str, Any]]:
        return self.ask("pools")["pools"]

    def lives(self) -> int:
        """How many gmemds there have been; each knows by then where it is to die (csrc/include/gmem/crash.h)."""
        return self.log.read_text().count('"features"')

    def daemons(self) -> list[int]:
        """The pid of the gmemd that is there, and not of who watches over it."""
        found = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True)
        return [int(pid) for pid in found.stdout.split()]

    def kill(self) -> None:
        os.kill(self.daemons()[0], signal.SIGKILL)

    def close(self) -> None:
        for each in self._told:
            each.close()
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        self.process.kill()


class Traffic:
    """What a cluster's servers are asked in a block: by MONITOR, who has asked for which page how often; by INFO,
    commands and bytes."""

    _PAGE = re.compile(r"\{p\.(?P<pool>[^:}]+):(?P<extent>[0-9a-f]+)\}:")

    def __init__(self, cluster: Cluster) -> None:
        self._servers = cluster.alive()
        self._threads = [threading.Thread(target=self._listen, args=(server,), daemon=True) for server in self._servers]
        self._begun = threading.Semaphore(0)
        self._lock = threading.Lock()
        self.reads: Counter[tuple[str, str]] = Counter()  # of (machine's address, key)
        self._before = self._info()

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        for _ in self._threads:
            assert self._begun.acquire(timeout=20)
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            with contextlib.suppress(Exception):  # it was killed meanwhile
                server.client().echo("end of the traffic")
        for thread in self._threads:
            thread.join(20)

    def _listen(self, server: Server) -> None:
        with contextlib.suppress(Exception), server.client(socket_timeout=None).monitor() as monitor:
            self._begun.release()
            while True:
                told = monitor.next_command()
                if "end of the traffic" in told["command"]:
                    return
                words = told["command"].split(" ", 2)
                if words[0].upper() in ("GET", "GETRANGE") and self._PAGE.search(words[1]):
                    with self._lock:
                        self.reads[told["client_address"], words[1]] += 1

    def _info(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for server in self._servers:
            info = server.client().info("everything")
            found["gets"] += sum(info.get(f"cmdstat_{word}", {}).get("calls", 0) for word in ("get", "getrange"))
            found["bytes"] += info["total_net_output_bytes"] - info.get("total_net_repl_output_bytes", 0)
        return found

    def counted(self) -> Counter[str]:
        """GET calls and bytes sent since the beginning, by the servers' own count."""
        return self._info() - self._before
