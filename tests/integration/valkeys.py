# SPDX-License-Identifier: Apache-2.0
"""Servers for tests of the remote tier, on loopback: one, or a cluster of three primaries with a replica each. Ended by
pid at the end, and by the kernel if the tests are killed. The package's Valkey, or what GMEM_TEST_SERVER names."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import valkey

from gmemd.drivers.private import find_server

SLOTS = 16384
# The kernel's "parent" is the thread that started a process: this one is there as long as the tests are.
starter = ThreadPoolExecutor(1, "servers")
BUILT = Path(__file__).resolve().parents[2] / "build" / "servers"


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
    """start() once more after kill(): the same port and folder, and no pages. tls: certificates; nothing plain then.
    With an option unixsocket the tests reach it by that: it may be in another network namespace (netns.py)."""

    def __init__(
        self, folder: Path, program: str = "", host: str = "127.0.0.1", prefix: tuple[str, ...] = (),
        tls: Certificates | None = None, port: int = 0, **config: Any
    ) -> None:  # fmt: skip
        self.program = program or os.environ.get("GMEM_TEST_SERVER") or find_server()
        self.host, self.port = host, port or free_port()
        self.folder = folder
        self.prefix = prefix
        folder.mkdir(parents=True, exist_ok=True)
        self.config = {
            "bind": host, "port": self.port, "dir": folder, "save": "", "appendonly": "no", "loglevel": "warning",
            "logfile": folder / "log", "maxmemory": "512mb", "maxmemory-policy": "noeviction", "protected-mode": "no",
            **{key.replace("_", "-"): value for key, value in config.items()},
        }
        self.client_options: dict[str, Any] = {}
        if tls is not None:
            self.config.update({
                "port": 0, "tls-port": self.port, "tls-cert-file": tls.path("server.crt"),
                "tls-key-file": tls.path("server.key"), "tls-ca-cert-file": tls.path("ca.crt"),
                "tls-replication": "yes", **({"tls-cluster": "yes"} if "cluster-enabled" in self.config else {}),
            })  # fmt: skip
            self.config.update({key.replace("_", "-"): value for key, value in config.items()})
            files = {"ssl_ca_certs": "ca.crt", "ssl_certfile": "client.crt", "ssl_keyfile": "client.key"}
            self.client_options = {"ssl": True, **{key: str(tls.path(name)) for key, name in files.items()}}
        self.process: subprocess.Popen | None = None
        self.start()

    def start(self) -> None:
        lines = [f'{key} "{value}"' if value == "" else f"{key} {value}" for key, value in self.config.items()]
        (self.folder / "conf").write_text("\n".join(lines) + "\n")
        command = ["setpriv", "--pdeathsig", "KILL", self.program, str(self.folder / "conf")]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = starter.submit(subprocess.Popen, [*self.prefix, *command], **quiet).result()

    @property
    def endpoint(self) -> str:
        return f"{self.host}:{self.port}"

    def client(self, **options: Any) -> valkey.Valkey:
        options = {"socket_timeout": 5, **options}
        if "unixsocket" in self.config:
            path = str(self.config["unixsocket"])
            return valkey.Valkey(unix_socket_path=path, **options)
        return valkey.Valkey(host=self.host, port=self.port, **self.client_options, **options)

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
    """places: options of each server, primaries first."""

    def __init__(
        self, folder: Path, program: str = "", primaries: int = 3, tls: Certificates | None = None,
        places: Sequence[dict[str, Any]] = (), **config: Any,
    ) -> None:  # fmt: skip
        config = {"cluster-enabled": "yes", "cluster-node-timeout": 1000, "cluster-require-full-coverage": "no",
                  "cluster-config-file": "nodes.conf", "repl-diskless-sync": "yes", "repl-diskless-sync-delay": 0,
                  "rdbcompression": "no", "client-output-buffer-limit": "replica 1gb 512mb 60", **config}  # fmt: skip
        self.servers = [
            Server(folder / str(n), program, tls=tls, **(places[n] if places else {}), **config)
            for n in range(2 * primaries)
        ]
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

    def whole(self, seconds: float = 30.0) -> None:
        """All slots are served, and each primary has its replica."""
        until(lambda: all(map(_is_ok, self.alive())), "the cluster is whole", seconds)
        until(self._all_followed, "replicas are connected", seconds)

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
    redis = find_redis()
    if redis:
        yield redis


def find_redis() -> str:
    """Debian's; "": not installed. Its package redis-tools, which starts no service, has the server's program as well:
    it is what it is called."""
    program = shutil.which("redis-server")
    check = shutil.which("redis-check-rdb")
    if program or not check:
        return program or ""
    BUILT.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        (BUILT / "redis-server").symlink_to(check)
    return str(BUILT / "redis-server")


class Certificates:
    """An authority of our own, and what it has signed: make() adds NAME.crt and NAME.key. By the openssl program."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._run("req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout ca.key -out ca.crt "
                  "-days 2 -subj /CN=test-authority")  # fmt: skip

    def path(self, name: str) -> Path:
        return self.folder / name

    def make(self, name: str, subject: str = "IP:127.0.0.1", days: int = 2) -> Certificates:
        """days: negative: it has expired."""
        self.path(f"{name}.ext").write_text(f"subjectAltName={subject}\nbasicConstraints=CA:FALSE\n")
        self._run(f"req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout {name}.key -out {name}.csr "
                  f"-subj /CN=gmem-test-{name}")  # fmt: skip
        self._run(f"x509 -req -in {name}.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days {days} -out {name}.crt "
                  f"-extfile {name}.ext")  # fmt: skip
        self.path(f"{name}.key").chmod(0o600)
        return self

    def _run(self, command: str) -> None:
        done = subprocess.run(["openssl", *command.split()], cwd=self.folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
