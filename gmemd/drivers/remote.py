# SPDX-License-Identifier: Apache-2.0
"""What accompanies the core's `remote` driver: the options that people write, the servers behind them, and the map of
the cluster that the driver is told."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import structlog

from gmemd.drivers import tls
from gmemd.drivers.private import PrivateServer
from gmemd.drivers.published import Published
from gmemd.drivers.servers import Mapper, Servers, parse_endpoints
from gmemd.drivers.tls import Tls
from gmemd.errors import refuse
from gmemd.sizes import format_size, parse_size

log = structlog.get_logger("gmemd.remote")

OPTIONS = {
    "endpoints": "servers, HOST:PORT[,HOST:PORT...] or unix:/PATH; any of a cluster will do. Without: a private server",
    "user": "user name; the server's default user without",
    "password_file": "file with the password in its first line, readable by gmemd's user alone",
    "replicas": "how many replicas must have a page before it leaves the host",
    "timeout": "seconds until a server that does not answer is an error",
    "lease": "seconds after which a machine that publishes a pool, and is not heard of, may be replaced by another",
    "tenant": "whose pages these are: a part of their names, which access rules refer to",
    "capacity": "bytes of pages it may hold",
    **tls.OPTIONS,
}
_CAPACITY = 1 << 30
_TIMEOUT_S = 15.0
_LEASE_S = 30.0
_LEASE_MIN_S = 1.0


def _number(options: Mapping[str, str], name: str, default: float) -> float:
    text = options.get(name, str(default))
    try:
        return float(text)
    except ValueError:
        raise refuse(name, f"{text!r} is not a number") from None


class Companion:
    """Of one device. prepare() makes the core's options of what people write; attached() or close() come next."""

    def __init__(self, name: str, state: Mapping[str, Any] | None = None) -> None:
        self._name = name
        self._state = dict(state or {})
        self._private: PrivateServer | None = None
        self._mapper: Mapper | None = None
        self._published: dict[str, Any] = {}
        self._tls: Tls | None = None

    def prepare(self, options: Mapping[str, str]) -> dict[str, str]:
        """(blocks) RequestError names the option."""
        for key in options:
            if key not in OPTIONS:
                raise refuse(key, f"no such option; there are {', '.join(OPTIONS)}")
        try:
            capacity = parse_size(options.get("capacity", _CAPACITY))
        except ValueError as error:
            raise refuse("capacity", str(error)) from None
        timeout_ms = int(_number(options, "timeout", _TIMEOUT_S) * 1000)
        replicas = int(_number(options, "replicas", 0))
        lease_s = _number(options, "lease", _LEASE_S)
        if lease_s < _LEASE_MIN_S:
            raise refuse("lease", f"at least {_LEASE_MIN_S:g} seconds")
        self._tls = Tls.of(options)
        try:
            servers = self._servers(options, capacity)
            if "map" not in self._state:
                self._check(servers, capacity, replicas)
                self._state["map"] = servers.map()
            self._mapper = Mapper(servers, self._name, self._state["map"])
        except ImportError as error:
            why = f"the package {error.name} is missing: pip install 'gmem[remote]'"
            raise refuse("driver", why, errno.ENOENT) from None
        core = {"control": str(self._mapper.theirs.fileno()), "capacity": str(capacity), "timeout_ms": str(timeout_ms),
                "replicas": str(replicas)}  # fmt: skip
        self._published = {"tenant": options.get("tenant", "default"), "replicas": replicas,
                           "timeout_s": timeout_ms / 1000, "lease_s": lease_s}  # fmt: skip
        core.update({key: options[key] for key in ("user", "password_file", "tenant") if key in options})
        if self._tls is not None:
            core.update(self._tls.options())
        if self._private is not None and self._private.guard >= 0:
            core["guard"] = str(self._private.guard)
        return core

    def published(self, machine: str) -> Published:
        """The pools that are published there, for whoever closes it. machine: what this gmemd is called there."""
        assert self._mapper is not None
        return Published(self._mapper.servers.again(), machine=machine, **self._published)

    def _servers(self, options: Mapping[str, str], capacity: int) -> Servers:
        if "endpoints" in options:
            endpoints = parse_endpoints(options["endpoints"])
            if self._tls is not None and endpoints[0].path:
                raise refuse("tls", "a Unix socket has none")
        else:
            for key in ("user", "password_file", *tls.OPTIONS):
                if key in options:
                    raise refuse(key, "a private server has none: name endpoints")
            endpoints = [self._private_server(capacity).endpoint]
        return Servers(endpoints, options.get("user", ""), options.get("password_file", ""), self._tls)

    def _check(self, servers: Servers, capacity: int, replicas: int) -> None:
        """Not in place of a predecessor: its pages are there, whether the servers can be reached just now or not."""
        servers.open()
        room = servers.check(replicas)
        if room and room < capacity * 1.25:
            log.warning("servers have less memory than the tier may hold", tier=self._name, maxmemory=format_size(room),
                        capacity=format_size(capacity))  # fmt: skip

    def _private_server(self, capacity: int) -> PrivateServer:
        """A predecessor's, which the driver's descriptors keep alive, or a new one."""
        folder = self._state.get("private")
        if folder:
            server = PrivateServer(Path(folder))
            if not server.answers():
                raise refuse("endpoints", f"the private server in {folder} is gone, and so are its pages", errno.EIO)
        else:
            server = PrivateServer.start(capacity)
        self._private = server
        return server

    def attached(self) -> dict[str, Any]:
        """The driver has what it needs; what a successor has to know."""
        if self._mapper is not None:
            self._mapper.start()
        left = {"map": self._state["map"]}
        if self._private is not None:
            self._private.close()
            left["private"] = str(self._private.folder)
        return left

    def close(self) -> None:
        if self._mapper is not None:
            self._mapper.close()
            self._mapper = None
        if self._private is not None:
            self._private.close()
            self._private = None
