# SPDX-License-Identifier: Apache-2.0
"""`python tests/fault/sharedpools.py [--seconds N] [--mib 1024] [--seed S] [--only FAULT]`: three machines and three
racks of servers, in network namespaces (as root). An embedding table is published on one machine and gathered from on
the others by Zipf indices, equal to plain NumPy, and each page crosses the network once for each machine. Then, for N
seconds, one machine publishes and two read while servers are killed, cut off, full and slow, passwords change and
values are damaged: nothing that was published is lost, who reads waits or gets an error with a name, and all goes on
afterwards. Prints its seed.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "integration"))

from embedding import Table  # noqa: E402
from machines import Machine, Traffic  # noqa: E402
from netns import CAN_BE_MADE, Network  # noqa: E402
from valkeys import Cluster, Server, until  # noqa: E402

MIB = 1 << 20
USER, PASSWORD = "gmem-a", "geheim"
TIMEOUT_S = 90
AWAY_S = 10
RULES = ("~gmem:A:* +get +getrange +set +unlink +wait +ping +auth +asking +info +cluster|slots +command +watch "
         "+unwatch +multi +exec +incr +incrby +pexpire +time +hset +hdel +hgetall +zadd +zrem +zrange "
         "+zremrangebyscore +sadd +srem +smembers")  # fmt: skip


class World:
    def __init__(self, folder: Path, stack: contextlib.ExitStack, table_bytes: int) -> None:
        self.network = Network(machines=3, racks=3)
        stack.callback(self.network.close)
        room = 512 * MIB + table_bytes
        self.cluster = Cluster(folder / "servers", places=self.network.servers(folder / "s"), maxmemory=room)
        stack.callback(self.cluster.close)
        self._stack, self._folder = stack, folder
        self._secret = folder / "secret"
        self._secret.write_text(PASSWORD)
        self._secret.chmod(0o600)
        for server in self.cluster.servers:
            self.admit(server, PASSWORD)
        self.machines = [self.machine(n, f"m{n}", timeout=TIMEOUT_S) for n in range(3)]

    def machine(self, number: int, name: str, **options: object) -> Machine:
        options = {"user": USER, "password_file": self._secret, "tenant": "A", "replicas": 1, "lease": 20, **options}
        prefix = self.network.machines[number].prefix
        made = Machine(self._folder / name, self.cluster.endpoints, prefix=prefix, **options)
        self._stack.callback(made.close)
        return made

    @staticmethod
    def admit(server: Server, password: str) -> None:
        """From now on with that password; who is connected has to come again."""
        client = server.client()
        client.execute_command("ACL SETUSER", USER, *f"reset on >{password} {RULES}".split())
        client.execute_command("CLIENT KILL USER", USER)

    def start(self, server: Server) -> None:
        server.start()
        server.ready()
        self.admit(server, PASSWORD)


def gathered(world: World, table: Table) -> None:
    """The table, from one machine to the two others."""
    began = time.monotonic()
    version = table.publish(world.machines[0].program(), 600)
    print(f"published {table.bytes // MIB} MiB: {time.monotonic() - began:.1f} s", flush=True)
    programs = {machine: [machine.program() for _ in range(3)] for machine in world.machines[1:]}
    with Traffic(world.cluster) as traffic:
        everybody = sum(programs.values(), [])
        assert [table.open(program) for program in everybody] == [version] * len(everybody)
        began = time.monotonic()
        for seed, program in enumerate(everybody):
            table.begin_gather(program, seed, 200_000)
        assert [program.end(600) for program in everybody] == [True] * len(everybody)
        print(f"gathered by {len(everybody)} programs: {time.monotonic() - began:.1f} s, "
              f"{sum(traffic.reads.values())} pages", flush=True)  # fmt: skip
        for some in programs.values():
            table.begin_compare(some[0])
        assert all(some[0].end(600) is True for some in programs.values())
        counted = traffic.counted()
    assert set(traffic.reads.values()) == {1}, "a page was asked for twice by the same machine"
    assert len(traffic.reads) == 2 * table.bytes // 65536
    assert counted["bytes"] < 1.05 * 2 * table.bytes + 4 * MIB
    print(f"{len(traffic.reads)} pages crossed, each once; the servers sent {counted['bytes'] // MIB} MiB", flush=True)
    for program in everybody:
        program.close()


class Faults:
    """Each publishes a version while something is wrong and reads the one before, and is over when it returns; what it
    has published is then compared on both other machines."""

    NAMES = ("kill_primary", "cut_reader", "cut_writer", "cut_rack", "no_replicas", "slow", "full", "password",
             "damaged")  # fmt: skip

    def __init__(self, world: World, rng: random.Random) -> None:
        self.world, self.rng = world, rng
        self.cluster, self.network = world.cluster, world.network
        self.table = Table("moves", 16 * MIB)
        self.writer = world.machines[0].program()
        self.version = self.table.publish(self.writer)

    def around(self, fault: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        """Somebody publishes and somebody reads meanwhile; both only wait."""
        reader = self.world.machines[1].program()
        assert self.table.open(reader) == self.version
        with fault():
            self.table.begin_publishing(self.writer, 1)
            self.table.begin_compare(reader)
        assert reader.end(2 * TIMEOUT_S) is True
        versions = self.writer.end(2 * TIMEOUT_S)
        assert isinstance(versions, list) and versions[0] > self.version, versions
        self.version = versions[0]
        reader.close()

    def settled(self) -> None:
        """All of the newest version, on both."""
        self.cluster.whole(60)
        for machine in self.world.machines[1:]:
            program = machine.program()
            assert self.table.open(program) == self.version
            assert self.table.compare(program)
            program.close()

    # ---- waits ----

    def kill_primary(self) -> None:
        @contextlib.contextmanager
        def killed() -> Iterator[None]:
            victim = self.rng.choice(self.cluster.primaries())
            victim.kill()
            yield
            until(lambda: len(self.cluster.primaries()) == 3, "a replica has taken over", 60)
            self.world.start(victim)

        self.around(killed)

    @contextlib.contextmanager
    def _away(self, place) -> Iterator[None]:
        with place.cut_off():
            yield
            time.sleep(AWAY_S)

    def cut_reader(self) -> None:
        self.around(lambda: self._away(self.network.machines[1]))

    def cut_writer(self) -> None:
        self.around(lambda: self._away(self.network.machines[0]))

    def cut_rack(self) -> None:
        self.around(lambda: self._away(self.rng.choice(self.network.racks)))

    def no_replicas(self) -> None:
        @contextlib.contextmanager
        def gone() -> Iterator[None]:
            primaries = {server.port for server in self.cluster.primaries()}
            replicas = [server for server in self.cluster.alive() if server.port not in primaries]
            for server in replicas:
                server.kill()
            yield
            time.sleep(2)
            assert not self.writer.has_said(), "nobody has confirmed it"
            for server in replicas:
                self.world.start(server)

        self.around(gone)

    def slow(self) -> None:
        @contextlib.contextmanager
        def slowed() -> Iterator[None]:
            with self.network.racks[0].slow() as kind:
                print(f"by {kind}", end=" ")
                yield
                time.sleep(3)

        self.around(slowed)

    # ---- errors ----

    def full(self) -> None:
        room = self.cluster.servers[0].config["maxmemory"]
        for server in self.cluster.servers:
            server.client().config_set("maxmemory", 1)
        self.table.begin_publishing(self.writer, 1)
        told = self.writer.end(2 * TIMEOUT_S)
        assert "OutOfMemory: remote: the server" in told, told
        reader = self.world.machines[2].program()
        assert self.table.open(reader) == self.version and self.table.compare(reader), "what was published is there"
        reader.close()
        for server in self.cluster.servers:
            server.client().config_set("maxmemory", room)
        assert self.writer.do("gmem.pool('moves').unlink()") is None
        self.version = self.table.publish(self.writer)

    def password(self) -> None:
        """On a machine that is not patient."""
        machine = self.world.machine(2, f"p{self.version}", timeout=3)
        reader, second = machine.program(), machine.program()
        for program in (reader, second):
            assert self.table.open(program) == self.version
        for server in self.cluster.servers:
            self.world.admit(server, "another")
        assert reader.do("answer = int(table[0, 0])") == -signal.SIGBUS
        told = second.do("gmem.pool('moves', remote='far').open()")
        assert "PermissionDenied: remote" in told and "another" not in told, told
        for server in self.cluster.servers:
            self.world.admit(server, PASSWORD)
        assert self.table.compare(second)
        machine.close()

    def damaged(self) -> None:
        machine = self.world.machine(2, f"d{self.version}", timeout=3)
        reader, second = machine.program(), machine.program()
        for program in (reader, second):
            assert self.table.open(program) == self.version
        client, key = next(
            (server.client(), key) for server in self.cluster.primaries()
            for key in server.client().scan_iter("gmem:A:{p.moves:0}:0:*")
            if int(key.split(b":")[-1], 16) >> 32 == self.version
        )  # fmt: skip
        whole = client.get(key)
        client.setrange(key, 100, bytes([whole[100] ^ 1]))
        assert reader.do("answer = int(table[0, 0])") == -signal.SIGBUS
        client.set(key, whole)
        assert self.table.compare(second)
        machine.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--mib", type=int, default=1024, help="of the embedding table")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--only", choices=Faults.NAMES, help="this fault alone")
    args = parser.parse_args()
    if not CAN_BE_MADE:
        print("network namespaces are made by root alone: left out")
        return 0
    rng = random.Random(args.seed)
    print(f"seed {args.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="gmem-test-", dir="/tmp") as folder, contextlib.ExitStack() as stack:
        world = World(Path(folder), stack, args.mib * MIB)
        gathered(world, Table("table", args.mib * MIB))
        faults = Faults(world, rng)
        names = [args.only] if args.only else list(Faults.NAMES)
        end, done = time.monotonic() + args.seconds, 0
        while time.monotonic() < end or done < len(names):
            name = names[done % len(names)] if done < len(names) else rng.choice(names)
            began = time.monotonic()
            getattr(faults, name)()
            faults.settled()
            done += 1
            print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)
        print(f"{done} faults, nothing lost")
    return 0


if __name__ == "__main__":
    sys.exit(main())
