# SPDX-License-Identifier: Apache-2.0
"""Network namespaces for tests, as root: machines and racks of servers on one switch, with links that go down or are
slow.

They have no names and nothing of them is in the namespace of the tests: each lives as long as a process that holds it,
which ends with the tests, also if these are killed. So any number of tests may have them at the same time. From outside
what is in one is reached by Unix sockets, which know of no namespaces of this kind.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from valkeys import starter

CAN_BE_MADE = os.geteuid() == 0
_SUBNET, _PORT = "10.77.0", 7001


def _net(pid: int | str) -> str:
    return os.readlink(f"/proc/{pid}/ns/net")


class Namespace:
    """Of a process that does nothing else. prefix: begins a command that is to run there."""

    def __init__(self) -> None:
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "sleep", "infinity"]
        self._holder = starter.submit(subprocess.Popen, command).result()
        end = time.monotonic() + 20
        while _net(self._holder.pid) == _net("self"):
            assert self._holder.poll() is None and time.monotonic() < end, "no network namespace can be made"
            time.sleep(0.002)
        self.pid = self._holder.pid
        self.prefix = ("nsenter", f"--net=/proc/{self.pid}/ns/net", "--")

    def run(self, *command: str) -> None:
        done = subprocess.run([*self.prefix, *command], capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"

    def ip(self, *lines: str) -> None:
        command = [*self.prefix, "ip", "-batch", "-"]
        done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def close(self) -> None:
        self._holder.kill()
        self._holder.wait()


class Place(Namespace):
    """A namespace with a link to a switch."""

    def __init__(self, switch: Namespace, number: int) -> None:
        super().__init__()
        self.address = f"{_SUBNET}.{number}"
        self._switch, self._port = switch, f"port{number}"
        self.ip(f"link add eth0 type veth peer name {self._port} netns {switch.pid}", "link set lo up",
                f"addr add {self.address}/24 dev eth0", "link set eth0 up")  # fmt: skip
        switch.ip(f"link set {self._port} master switch", f"link set {self._port} up")

    @contextlib.contextmanager
    def cut_off(self) -> Iterator[None]:
        """The link is down."""
        self._switch.ip(f"link set {self._port} down")
        try:
            yield
        finally:
            self._switch.ip(f"link set {self._port} up")

    @contextlib.contextmanager
    def slow(self, delay_ms: int = 30, mbit: int = 50) -> Iterator[str]:
        """What comes to it and goes from it is delayed, by netem; where the kernel has none, there is little bandwidth,
        by tbf. Yields which."""
        ends = [(self, "eth0"), (self._switch, self._port)]
        netem = ["netem", "delay", f"{delay_ms}ms", f"{delay_ms // 6}ms"]
        tbf = ["tbf", "rate", f"{mbit}mbit", "burst", "64kb", "latency", "400ms"]
        kind = netem if _can(*ends[0], netem) else tbf
        for place, device in ends:
            place.run("tc", "qdisc", "add", "dev", device, "root", *kind)
        try:
            yield kind[0]
        finally:
            for place, device in ends:
                place.run("tc", "qdisc", "del", "dev", device, "root")


def _can(place: Namespace, device: str, kind: list[str]) -> bool:
    command = ["tc", "qdisc", "add", "dev", device, "root", *kind]
    if subprocess.run([*place.prefix, *command], capture_output=True).returncode:
        return False
    place.run("tc", "qdisc", "del", "dev", device, "root")
    return True


class Network:
    """Places on one switch: machines for gmemds and their clients, racks for servers."""

    def __init__(self, machines: int, racks: int) -> None:
        self._switch = Namespace()
        self._switch.ip("link add switch type bridge", "link set switch up", "link set lo up")
        self._places = [Place(self._switch, n + 1) for n in range(machines + racks)]
        self.machines, self.racks = self._places[:machines], self._places[machines:]

    def servers(self, folder: Path, primaries: int = 3) -> list[dict]:
        """For valkeys.Cluster: who is where. A primary's replica is in another rack, and they listen on Unix sockets as
        well. folder: for those; a short name."""
        folder.mkdir(parents=True, exist_ok=True)
        made = []
        for n in range(2 * primaries):
            rack = self.racks[(n if n < primaries else n + 1) % len(self.racks)]
            made.append({
                "host": rack.address, "port": _PORT + n, "prefix": rack.prefix, "unixsocket": folder / f"s{n}",
            })  # fmt: skip
        return made

    def close(self) -> None:
        for place in self._places:
            place.close()
        self._switch.close()
