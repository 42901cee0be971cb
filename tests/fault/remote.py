# SPDX-License-Identifier: Apache-2.0
"""`python tests/fault/remote.py --seconds N [--seed S]`: a program whose memory is mostly in a cluster of servers,
while these are killed, hang and are cut off; every word is checked. Prints its seed.

The servers are in a network namespace of their own where one can be made (as root), so that the link between them and
gmemd can go down or be slow; else these faults are left out, and it says so.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import random
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "integration"))

import gmem  # noqa: E402
import numpy as np  # noqa: E402
from valkeys import Cluster  # noqa: E402

MIB = 1 << 20
LOAD_BYTES = 32 * MIB
TIMEOUT_S = 40
NAMESPACE, OURS, THEIRS = "gmem-remote", "10.99.77.1", "10.99.77.2"


def ip(*words: str) -> bool:
    return subprocess.run(["ip", *words], capture_output=True).returncode == 0


class Link:
    """A namespace with a pair of interfaces between it and this one."""

    def __init__(self, name: str) -> None:
        self.name, self.outer, self.inner = f"{NAMESPACE}-{name}", f"gmr{name}o", f"gmr{name}i"
        self.made = ip("netns", "add", self.name) and all([
            ip("link", "add", self.outer, "type", "veth", "peer", "name", self.inner, "netns", self.name),
            ip("addr", "add", f"{OURS}/24", "dev", self.outer),
            ip("link", "set", self.outer, "up"),
            ip("-n", self.name, "addr", "add", f"{THEIRS}/24", "dev", self.inner),
            ip("-n", self.name, "link", "set", self.inner, "up"),
            ip("-n", self.name, "link", "set", "lo", "up"),
        ])  # fmt: skip

    @property
    def prefix(self) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.name)

    @contextlib.contextmanager
    def down(self) -> Iterator[None]:
        ip("link", "set", self.outer, "down")
        try:
            yield
        finally:
            ip("link", "set", self.outer, "up")

    @contextlib.contextmanager
    def slow(self, delay: str) -> Iterator[None]:
        queue = ["tc", "qdisc", "add", "dev", self.outer, "root", "netem", "delay", delay, "5ms"]
        done = subprocess.run(queue, capture_output=True).returncode == 0
        try:
            yield
        finally:
            if done:
                subprocess.run(["tc", "qdisc", "del", "dev", self.outer, "root"], capture_output=True)

    def close(self) -> None:
        ip("link", "del", self.outer)
        ip("netns", "del", self.name)


class Faults:
    """Each is over when it returns; what is to be found then is that nothing is lost."""

    def __init__(self, cluster: Cluster, link: Link | None, rng: random.Random) -> None:
        self.cluster, self.link, self.rng = cluster, link, rng

    def names(self) -> list[str]:
        names = ["kill_primary", "kill_replicas", "hang_primary"]
        return names + (["cut", "slow"] if self.link else [])

    def kill_primary(self) -> None:
        victim = self.rng.choice(self.cluster.primaries())
        victim.kill()
        time.sleep(2.5)
        victim.start()
        victim.ready()
        self.cluster.whole()

    def kill_replicas(self) -> None:
        primaries = {server.port for server in self.cluster.primaries()}
        replicas = [server for server in self.cluster.alive() if server.port not in primaries]
        for server in replicas:
            server.kill()
        time.sleep(2)  # nothing can leave the host meanwhile
        for server in replicas:
            server.start()
        self.cluster.whole()

    def hang_primary(self) -> None:
        victim = self.rng.choice(self.cluster.primaries())
        victim.pause()
        time.sleep(2.5)
        victim.go_on()
        self.cluster.whole()

    def cut(self) -> None:
        with self.link.down():
            time.sleep(10)
        self.cluster.whole()

    def slow(self) -> None:
        with self.link.slow("30ms"):
            time.sleep(3)


class Load:
    """A process with an array several times the host's budget, and what it has to be. A thread that waits for memory
    keeps its interpreter waiting, so it has one of its own."""

    def __init__(self, socket: str, seed: int) -> None:
        command = ["setpriv", "--pdeathsig", "KILL", sys.executable, __file__, "--load", socket, "--seed", str(seed)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def check(self) -> int:
        """Every word; returns how many rounds it has done. What goes wrong is in its exit status."""
        self._process.stdin.write("check\n")
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], 2 * TIMEOUT_S)
        answer = self._process.stdout.readline() if ready else ""
        assert answer, f"the program hangs, or has ended with {self._process.poll()}"
        return int(answer)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def load(socket: str, seed: int) -> None:
    gmem.connect(socket)
    rng = np.random.default_rng(seed)
    expected = rng.integers(0, 1 << 62, LOAD_BYTES // 8, np.int64)
    array = gmem.empty(expected.shape, np.int64, page_size="64K")
    array[:] = expected
    for rounds in itertools.count():
        part = slice((rounds * 77773) % 4096, None, 4097)
        array[part] += rounds
        expected[part] += rounds
        at = (rounds * 99991) % (len(expected) - 65536)
        assert np.array_equal(array[at : at + 65536], expected[at : at + 65536]), "a word is not what was written"
        if select.select([sys.stdin], [], [], 0)[0]:
            if not sys.stdin.readline():
                return
            assert np.array_equal(array, expected), "a word is not what was written"
            print(rounds, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--only", help="this fault alone")
    parser.add_argument("--load", metavar="SOCKET", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        load(args.load, args.seed)
        return 0
    rng = random.Random(args.seed)
    print(f"seed {args.seed}", flush=True)
    link = Link(str(args.seed % 1000))
    if not link.made:
        link.close()
        link = None
        print("no network namespace can be made here: links that are cut or slow are left out")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        if link:
            stack.callback(link.close)
        options = {"host": THEIRS, "prefix": link.prefix} if link else {}
        cluster = Cluster(Path(folder), **options)
        stack.callback(cluster.close)
        device = {"name": "far", "driver": "remote", "capacity": 256 * MIB, "endpoints": cluster.endpoints,
                  "replicas": 1, "timeout": TIMEOUT_S}  # fmt: skip
        session = gmem.connect(devices=[device], embedded=True, settings=[f"host.limit={8 * MIB}"])
        stack.callback(session.close)
        program = Load(session.path, args.seed)
        stack.callback(program.close)
        program.check()
        faults = Faults(cluster, link, rng)
        end, done = time.monotonic() + args.seconds, 0
        names = [args.only] if args.only else faults.names()
        while time.monotonic() < end or done < len(names):
            name = names[done % len(names)] if done < len(names) else rng.choice(names)
            began = time.monotonic()
            getattr(faults, name)()
            rounds = program.check()
            done += 1
            print(f"{name}: {time.monotonic() - began:.1f} s, {rounds} rounds", flush=True)
        row = next(d for d in session.request("devices")["devices"] if d["name"] == "far")
        assert row["errors"] == 0 and row["health"] == 0, row
        print(f"{done} faults, nothing lost")
    return 0


if __name__ == "__main__":
    sys.exit(main())
