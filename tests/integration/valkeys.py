# SPDX-License-Identifier: Apache-2.0
"""Servers for tests of the remote tier, on loopback: one, or a cluster of three primaries with a replica each. Ended by
pid at the end, and by the kernel if the tests are killed."""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import valkey

from gmemd.drivers.private import find_server

SLOTS = 16384


def until(check: Callable[[], Any], what: str, seconds: float = 20.0) -> Any:
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(valkey.ValkeyError, OSError):
            found = check()
            if found:
                return found
        assert time.monotonic() < end, what
        time.sleep(0.02)


def free_port(host: str = "127.0.0.1") -> int:
    """Free, as is the one 10,000 above, for a cluster's bus; below those that the kernel gives to clients."""
    while True:
        port = random.randrange(12000, 22000)
        with socket.socket() as one, socket.socket() as other, contextlib.suppress(OSError):
            if host == "127.0.0.1":
                one.bind((host, port))
                other.bind((host, port + 10000))
            return port


class Server:
    """start() once more after kill(): the same port and folder, and no pages."""

    def __init__(
        self, folder: Path, program: str = "", host: str = "127.0.0.1", prefix: tuple[str, ...] = (), **config: Any
    ) -> None:  # fmt: skip
        self.program = program or find_server()
        self.host, self.port = host, free_port()
        self.folder = folder
        self.prefix = prefix
        folder.mkdir(parents=True, exist_ok=True)
        self.config = {
            "bind": host, "port": self.port, "dir": folder, "save": "", "appendonly": "no", "loglevel": "warning",
            "logfile": folder / "log", "maxmemory": "512mb", "maxmemory-policy": "noeviction", "protected-mode": "no",
            **{key.replace("_", "-"): value for key, value in config.items()},
        }
        self.process: subprocess.Popen | None = None
        self.start()

    def start(self) -> None:
        lines = [f'{key} "{value}"' if value == "" else f"{key} {value}" for key, value in self.config.items()]
        (self.folder / "conf").write_text("\n".join(lines) + "\n")
        command = ["setpriv", "--pdeathsig", "KILL", self.program, str(self.folder / "conf")]
        self.process = subprocess.Popen([*self.prefix, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    @property
    def endpoint(self) -> str:
        return f"{self.host}:{self.port}"

    def client(self, **options: Any) -> valkey.Valkey:
        return valkey.Valkey(host=self.host, port=self.port, socket_timeout=5, **options)

    def ready(self) -> Server:
        until(lambda: self.client().ping(), "the server answers")
        return self

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


class Cluster:
    def __init__(self, folder: Path, program: str = "", primaries: int = 3, **config: Any) -> None:
        config = {"cluster-enabled": "yes", "cluster-node-timeout": 1000, "cluster-require-full-coverage": "no",
                  "cluster-config-file": "nodes.conf", "repl-diskless-sync": "yes", "repl-diskless-sync-delay": 0,
                  "rdbcompression": "no", "client-output-buffer-limit": "replica 1gb 512mb 60", **config}  # fmt: skip
        self.servers = [Server(folder / str(n), program, **config) for n in range(2 * primaries)]
        for server in self.servers:
            server.ready()
        first = self.servers[0]
        for server in self.servers[1:]:
            server.client().execute_command("CLUSTER MEET", first.host, first.port)
        for n, server in enumerate(self.servers[:primaries]):
            low, high = SLOTS * n // primaries, SLOTS * (n + 1) // primaries - 1
            server.client().execute_command("CLUSTER ADDSLOTSRANGE", low, high)
        until(lambda: all(len(self.nodes(server)) == 2 * primaries for server in self.servers), "all know each other")
        for n, server in enumerate(self.servers[primaries:]):
            primary = self.servers[n].client().execute_command("CLUSTER MYID")
            follow = partial(_command, server, "CLUSTER REPLICATE", primary)
            until(follow, "replicas")
        self.whole()

    @staticmethod
    def nodes(server: Server) -> Any:
        return server.client().execute_command("CLUSTER NODES")

    def primaries(self) -> list[Server]:
        return [server for server in self.servers if server.process and server.client().info()["role"] == "master"]

    def whole(self) -> None:
        """All slots are served, and each primary has its replica."""
        until(lambda: all(map(_is_ok, self.alive())), "the cluster is whole")
        until(self._all_followed, "replicas are connected")

    def alive(self) -> list[Server]:
        return [server for server in self.servers if server.process]

    def _all_followed(self) -> bool:
        followers = sum(server.client().info()["connected_slaves"] for server in self.primaries())
        return followers >= len(self.alive()) - len(self.servers) // 2

    @property
    def endpoints(self) -> str:
        return ";".join(server.endpoint for server in self.servers)

    def keys(self) -> list[bytes]:
        return [key for server in self.primaries() for key in server.client().scan_iter("gmem:*", count=1000)]

    def flush(self) -> None:
        for server in self.primaries():
            server.client().flushall()

    def close(self) -> None:
        for server in self.servers:
            server.go_on() if server.process else None
            server.kill()


def _command(server: Server, *words: Any) -> Any:
    return server.client().execute_command(*words)


def _is_ok(server: Server) -> bool:
    answer = _command(server, "CLUSTER INFO")
    return answer["cluster_state"] == "ok" if isinstance(answer, dict) else b"cluster_state:ok" in answer


def programs() -> Iterator[str]:
    """The package's server, and Debian's where it is installed."""
    yield find_server()
    redis = shutil.which("redis-server")
    if redis:
        yield redis
