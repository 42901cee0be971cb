# SPDX-License-Identifier: Apache-2.0
"""`python tests/fault/remote.py --seconds N [--seed S]`: a program whose memory is mostly in a cluster of servers,
while these are killed, hang and are cut off; every word is checked. Prints its seed.

As root gmemd and the servers are in network namespaces of their own, so that the link between them can go down or be
slow; else these faults are left out, and it says so.
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
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "integration"))

import gmem  # noqa: E402
import numpy as np  # noqa: E402
from machines import Machine  # noqa: E402
from netns import CAN_BE_MADE, Network, Place  # noqa: E402
from valkeys import Cluster  # noqa: E402

MIB = 1 << 20
LOAD_BYTES = 32 * MIB
TIMEOUT_S = 40


class Faults:
    """Each is over when it returns; what is to be found then is that nothing is lost."""

    def __init__(self, cluster: Cluster, place: Place | None, rng: random.Random) -> None:
        self.cluster, self.place, self.rng = cluster, place, rng

    def names(self) -> list[str]:
        names = ["kill_primary", "kill_replicas", "hang_primary"]
        return names + (["cut", "slow"] if self.place else [])

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
        with self.place.cut_off():
            time.sleep(10)
        self.cluster.whole()

    def slow(self) -> None:
        with self.place.slow() as kind:
            print(f"by {kind}", end=" ")
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
    with tempfile.TemporaryDirectory(prefix="gmem-test-", dir="/tmp") as folder, contextlib.ExitStack() as stack:
        network = Network(machines=1, racks=1) if CAN_BE_MADE else None
        if network:
            stack.callback(network.close)
        else:
            print("network namespaces are made by root alone: links that are cut or slow are left out")
        places = network.servers(Path(folder) / "s") if network else ()
        cluster = Cluster(Path(folder) / "servers", places=places)
        stack.callback(cluster.close)
        place = network.machines[0] if network else None
        machine = Machine(Path(folder) / "machine", cluster.endpoints, f"host.limit={8 * MIB}", replicas=1,
                          prefix=place.prefix if place else (), capacity=256 * MIB, timeout=TIMEOUT_S)  # fmt: skip
        stack.callback(machine.close)
        program = Load(machine.socket, args.seed)
        stack.callback(program.close)
        program.check()
        faults = Faults(cluster, place, rng)
        end, done = time.monotonic() + args.seconds, 0
        names = [args.only] if args.only else faults.names()
        while time.monotonic() < end or done < len(names):
            name = names[done % len(names)] if done < len(names) else rng.choice(names)
            began = time.monotonic()
            getattr(faults, name)()
            rounds = program.check()
            done += 1
            print(f"{name}: {time.monotonic() - began:.1f} s, {rounds} rounds", flush=True)
        row = next(d for d in machine.ask("devices")["devices"] if d["name"] == "far")
        assert row["errors"] == 0 and row["health"] == 0, row
        print(f"{done} faults, nothing lost")
    return 0


if __name__ == "__main__":
    sys.exit(main())
