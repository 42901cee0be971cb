# SPDX-License-Identifier: Apache-2.0
"""Valkey and Redis servers as the daemon's Python side sees them: who they are, whether they will do, which of them has
which hash slots. Pages go another way (csrc/drivers/exchange.c); this is everything that is not on theirs, by the
`valkey` package.

The map of a cluster is told to the driver over a socket of messages, whose form is in csrc/drivers/nodes.h: at the
start, and whenever the driver says that it is stale.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import threading
from dataclasses import dataclass
from typing import Any

import structlog

from gmemd.drivers.tls import Tls, explain
from gmemd.errors import RequestError, refuse

log = structlog.get_logger("gmemd.servers")

SLOTS = 16384
_NODES_MAX = 256  # of csrc/drivers/nodes.h
_ANSWER_S = 1.0  # of one server, for what is asked here
_PORT = 6379
_VERSION_MIN = 7
_ENDPOINT = re.compile(r"(?P<host>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::(?P<port>\d{1,5}))?")


@dataclass(frozen=True)
class Endpoint:
    """A server's address: host and port, or the path of a Unix socket."""

    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def resolve(self) -> str:
        """In numbers: the driver looks no name up. OSError if there is no such host."""
        if self.path:
            return str(self)
        found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        return str(Endpoint(str(found[0][4][0]), self.port))


def parse_endpoints(text: str) -> list[Endpoint]:
    """"host:6379 [::1]:6380", with commas, semicolons or spaces between, or one "unix:/path"."""
    endpoints = []
    for item in filter(None, re.split(r"[,;\s]+", text)):
        if item.startswith("unix:"):
            if not item.startswith("unix:/"):
                raise refuse("endpoints", f"{item!r}: the path of a socket is absolute")
            endpoints.append(Endpoint(path=item.removeprefix("unix:")))
            continue
        match = _ENDPOINT.fullmatch(item)
        port = int(match["port"] or _PORT) if match else 0
        if match is None or not 0 < port < 65536:
            raise refuse("endpoints", f"{item!r} is not HOST:PORT, [IPV6]:PORT or unix:/PATH")
        endpoints.append(Endpoint(match["host"].strip("[]"), port))
    if not endpoints:
        raise refuse("endpoints", "none is named")
    if len(endpoints) > 1 and any(endpoint.path for endpoint in endpoints):
        raise refuse("endpoints", "a Unix socket is the only one")
    return endpoints


def read_secret(path: str) -> str:
    """The first line of a file that only its owner can read. It is never logged, nor part of an error."""
    if not path.startswith("/"):
        raise refuse("password_file", "must be an absolute path")
    try:
        with open(path, encoding="utf-8") as file:
            status = os.fstat(file.fileno())
            line = file.readline(1024).rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise refuse("password_file", f"{path} can't be read: {error}") from None
    if status.st_mode & 0o077:
        raise refuse("password_file", f"{path} can be read by others: chmod 600", errno.EACCES)
    if not line:
        raise refuse("password_file", f"{path} is empty")
    return line


class Servers:
    """A server, or a cluster of them. Methods block for about a second for each server that does not answer."""

    def __init__(self, endpoints: list[Endpoint], user: str, password_file: str, tls: Tls | None) -> None:
        import valkey
        from valkey.credentials import CredentialProvider

        class FromFile(CredentialProvider):
            """Read for each connection: passwords are changed."""

            def get_credentials(self) -> tuple[str] | tuple[str, str]:
                secret = read_secret(password_file)
                return (user, secret) if user else (secret,)

        self._valkey = valkey
        self._made_of = (endpoints, user, password_file, tls)
        self._endpoints = endpoints
        self._arguments: dict[str, Any] = {
            "socket_timeout": _ANSWER_S, "socket_connect_timeout": _ANSWER_S, "retry": None, "retry_on_timeout": False,
        }  # fmt: skip
        if password_file:
            read_secret(password_file)
            self._arguments["credential_provider"] = FromFile()
        self._tls = tls
        self._cluster: Any = None
        self._one: Any = None
        self._seen: dict[str, str] = {}

    def again(self) -> Servers:
        """The same with connections of its own, which are made when they are needed."""
        return Servers(*self._made_of)

    def open(self) -> None:
        """RequestError says what is wrong with the first server that answers, or that none does."""
        problems = []
        for endpoint in self._endpoints:
            try:
                self._open_at(endpoint)
                return
            except self._valkey.AuthenticationError as error:
                raise refuse("password_file", f"{endpoint} refuses user or password: {error}", errno.EACCES) from None
            except (self._valkey.ValkeyError, OSError) as error:
                if isinstance(error, RequestError):
                    raise
                problems.append(f"{endpoint}: {explain(error)}{self._hint(error)}")
        raise refuse("endpoints", f"no server can be used: {'; '.join(problems)}"[:500], errno.ECONNREFUSED)

    def _hint(self, error: Exception) -> str:
        """Where only one side speaks TLS, it waits for the other, or the other hangs up."""
        if self._tls is not None:
            return " (does it speak TLS?)" if isinstance(error, self._valkey.TimeoutError) else ""
        hung_up = isinstance(error, self._valkey.ConnectionError) and isinstance(
            error.__context__, (ConnectionResetError, type(None))
        )
        return " (does it want TLS?)" if hung_up or isinstance(error, self._valkey.InvalidResponse) else ""

    def _open_at(self, endpoint: Endpoint) -> None:
        if endpoint.path:
            client = self._valkey.Valkey(unix_socket_path=endpoint.path, **self._arguments)
        elif self._tls is not None:
            pool = self._tls.connections()(host=endpoint.host, port=endpoint.port, **self._arguments)
            client = self._valkey.Valkey(connection_pool=pool)
        else:
            client = self._valkey.Valkey(host=endpoint.host, port=endpoint.port, **self._arguments)
        client.ping()
        try:
            client.execute_command("CLUSTER SLOTS")
        except self._valkey.ResponseError as error:
            if isinstance(error, self._valkey.exceptions.NoPermissionError):
                raise refuse("user", f"may not ask for the map of the cluster: {error}", errno.EACCES) from None
            self._one = client
            self._endpoints = [endpoint]
            return
        client.close()
        self._join()

    def _join(self) -> None:
        from valkey.cluster import ClusterNode, ValkeyCluster

        nodes = [ClusterNode(endpoint.host, endpoint.port) for endpoint in self._endpoints]
        arguments = dict(self._arguments)
        del arguments["retry"], arguments["retry_on_timeout"]
        if self._tls is not None:  # a class of pools is only taken beside a URL
            arguments["url"] = f"valkey://{self._endpoints[0]}"
            arguments["connection_pool_class"] = self._tls.connections()
        self._cluster = ValkeyCluster(startup_nodes=nodes, cluster_error_retry_attempts=0, **arguments)

    @property
    def is_cluster(self) -> bool:
        return self._cluster is not None

    def _primaries(self) -> list[tuple[str, Any]]:
        if self._cluster is None:
            return [(str(self._endpoints[0]), self._one)]
        return [(node.name, self._cluster.get_valkey_connection(node)) for node in self._cluster.get_primaries()]

    def client_of(self, key: str) -> Any:
        """The client of the node that has that key's slot, as far as is known."""
        if self._cluster is None and self._one is None:
            self.open()
        if self._cluster is None:
            return self._one
        return self._cluster.get_valkey_connection(self._cluster.get_node_from_key(key))

    def describe(self) -> list[dict[str, Any]]:
        """For each primary what it says of itself; what a user may not ask is missing."""
        found = []
        for name, client in self._primaries():
            try:
                info = client.info()
            except self._valkey.exceptions.NoPermissionError:
                info = {}
            found.append({"name": name, **info})
        return found

    def check(self, replicas: int) -> int:
        """Whether they will do; returns their maxmemory together, 0 if one of them has none."""
        told = self.describe()
        for server in told:
            name = server["name"]
            version = str(server.get("valkey_version") or server.get("redis_version") or "")
            if version and int(version.split(".")[0]) < _VERSION_MIN:
                raise refuse("endpoints", f"{name} is version {version}; 7 or later is needed")
            policy = server.get("maxmemory_policy", "noeviction")
            if policy != "noeviction":
                raise refuse("endpoints", f"{name} would throw pages away: maxmemory-policy is {policy}")
            connected = server.get("connected_slaves", replicas)
            if connected < replicas:
                raise refuse("replicas", f"{name} has {connected} of {replicas}")
            if server.get("role", "master") != "master" and self._cluster is None:
                raise refuse("endpoints", f"{name} is a replica")
            if "maxmemory" in server and not server["maxmemory"]:
                log.warning("a server has no maxmemory: it grows until the system ends it", server=name)
        limits = [server.get("maxmemory", 0) for server in told]
        return sum(limits) if all(limits) else 0

    def map(self) -> bytes:
        """What is told to the driver."""
        if self._cluster is None:
            endpoint = self._endpoints[0]
            name = endpoint.host or "localhost"
            return f"topology 1\nnode {endpoint.resolve()} {name}\nslots 0 {SLOTS - 1} 0\n".encode()
        cache = self._cluster.nodes_manager.slots_cache
        numbers: dict[str, int] = {}
        lines: list[str] = []
        ranges: list[list[int]] = []
        for slot in sorted(cache):
            node = cache[slot][0]
            address = self._numeric(node.host, node.port)
            if address not in numbers:
                numbers[address] = len(numbers)
                lines.append(f"node {address} {node.host}")
            number = numbers[address]
            if ranges and ranges[-1][1] == slot - 1 and ranges[-1][2] == number:
                ranges[-1][1] = slot
            else:
                ranges.append([slot, slot, number])
        if not 0 < len(numbers) <= _NODES_MAX:
            raise refuse("endpoints", f"a cluster of {len(numbers)} primaries")
        lines += [f"slots {first} {last} {number}" for first, last, number in ranges]
        return "\n".join([f"topology {len(numbers)}", *lines, ""]).encode()

    def _numeric(self, host: str, port: int) -> str:
        """A name that can't be looked up just now is what it was."""
        name = str(Endpoint(host, port))
        try:
            self._seen[name] = Endpoint(host, port).resolve()
        except OSError:
            if name not in self._seen:
                raise
        return self._seen[name]

    def refresh(self) -> None:
        """Looks again who has which slots. An exception of the package's if nobody can be asked."""
        if self._cluster is not None:
            self._cluster.nodes_manager.initialize()
        elif self._one is None:
            self.open()

    def close(self) -> None:
        for client in (self._cluster, self._one):
            if client is not None:
                with contextlib.suppress(Exception):
                    client.close()


class Mapper:
    """A thread that tells the driver a new map whenever it asks for one. `theirs` is the driver's end of the socket."""

    def __init__(self, servers: Servers, name: str, known: bytes) -> None:
        """known: the first map."""
        self.servers = servers
        self._ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.send(known)
        self._thread = threading.Thread(target=self._run, name=f"map-{name}", daemon=True)

    def start(self) -> None:
        self.theirs.close()
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                if not self._ours.recv(64):
                    return
                self.servers.refresh()
                self._ours.send(self.servers.map())
            except (BrokenPipeError, ConnectionResetError):
                return
            except Exception as error:  # whatever the package raises; the driver asks again
                if self._ours.fileno() < 0:
                    return
                log.warning("the map of the servers can't be had", error=f"{type(error).__name__}: {error}"[:300])

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._ours.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            self.theirs.close()
        if self._thread.is_alive():
            self._thread.join(3 * _ANSWER_S)
        self._ours.close()
        self.servers.close()
