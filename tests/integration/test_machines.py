# SPDX-License-Identifier: Apache-2.0
"""Several machines, each a gmemd with programs in a network namespace of its own, over a cluster of three primaries
with a replica each, in three more: an embedding table that one publishes and the others gather from; links that go down
or are slow. tests/fault/sharedpools.py is the same at 1 GiB, and for longer."""

import signal
import tempfile
import time
from pathlib import Path

import pytest
from embedding import Table
from machines import Machine, Traffic
from netns import CAN_BE_MADE, Network
from valkeys import Cluster, until

pytestmark = pytest.mark.skipif(not CAN_BE_MADE, reason="network namespaces are made by root alone")

MIB = 1 << 20


@pytest.fixture(scope="module")
def network():
    made = Network(machines=3, racks=3)
    yield made
    made.close()


@pytest.fixture(scope="module")
def cluster(network, tmp_path_factory):
    with tempfile.TemporaryDirectory(prefix="gmem-test-", dir="/tmp") as folder:  # short: paths of sockets are
        made = Cluster(tmp_path_factory.mktemp("cluster"), places=network.servers(Path(folder)))
        yield made
        made.close()


@pytest.fixture
def machine(network, cluster, tmp_path):
    """machine(n): the gmemd of machine n."""
    made = []

    def start(number, **options):
        options = {"replicas": 1, "timeout": 30, "lease": 10, **options}
        folder = Path(tempfile.mkdtemp(prefix="gmem-test-", dir="/tmp"))
        made.append(Machine(folder, cluster.endpoints, prefix=network.machines[number].prefix, **options))
        return made[-1]

    yield start
    for each in made:
        each.close()
    cluster.whole()


# ---- an embedding table ----


@pytest.mark.parametrize("count", [2, 3])
def test_a_table_is_gathered_from_on_other_machines(machine, network, cluster, count):
    """Equal to plain NumPy, and each page crosses the network once for each machine, however many programs use it."""
    table = Table(f"table{count}", 16 * MIB)
    version = table.publish(machine(0).program())
    readers = [machine(n) for n in range(1, count)]
    programs = [[reader.program() for _ in range(3)] for reader in readers]
    with Traffic(cluster) as traffic:
        everybody = [program for some in programs for program in some]
        assert [table.open(program) for program in everybody] == [version] * len(everybody)
        for seed, program in enumerate(everybody):  # all at the same time
            table.begin_gather(program, seed, 20000)
        assert [program.end(120) for program in everybody] == [True] * len(everybody)
        some = sum(traffic.reads.values())
        assert some > 0
        for some_programs in programs:
            assert table.compare(some_programs[0]), "all of it"
        counted = traffic.counted()
    addresses = {network.machines[n].address for n in range(1, count)}
    assert {address for address, _ in traffic.reads} == addresses
    assert set(traffic.reads.values()) == {1}, "no page was asked for twice by the same machine"
    pages = table.bytes // 65536
    assert len(traffic.reads) == pages * len(readers)
    assert counted["gets"] >= pages * len(readers), "the servers count the same"
    assert table.bytes * len(readers) < counted["bytes"] < 1.05 * table.bytes * len(readers) + 2 * MIB
    for reader in readers:
        assert [pool["fetched_bytes"] for pool in reader.pools()] == [table.bytes]


def test_many_programs_touch_one_page(machine, network, cluster):
    """At the same time, over a link that is so slow that all of them wait for it: one GET."""
    table = Table("single", 2 * MIB, page_size="2M")
    table.publish(machine(0).program())
    there = machine(1)
    programs = [there.program() for _ in range(6)]
    for program in programs:
        table.open(program)
    with Traffic(cluster) as traffic, network.machines[1].slow(mbit=60):
        for seed, program in enumerate(programs):
            table.begin_gather(program, seed, 100)
        assert [program.end(120) for program in programs] == [True] * len(programs)
    assert list(traffic.reads.values()) == [1]


# ---- links that fail ----


def test_a_machine_that_is_cut_off(machine, network):
    """Whoever reads there waits, within the time-out, and goes on when the link is back; others notice nothing."""
    table = Table("cut", 8 * MIB)
    writer = machine(0).program()
    table.publish(writer)
    reader, other = machine(1).program(), machine(2).program()
    table.open(reader)
    table.open(other)
    table.begin_gather(reader, 1, 100)
    assert reader.end(60) is True
    with network.machines[1].cut_off():
        table.begin_compare(reader)
        assert table.compare(other)
        time.sleep(2)
        assert not reader.has_said()
    assert reader.end(120) is True


def test_a_machine_that_is_cut_off_for_too_long(machine, network):
    """Longer than the time-out: an error for whoever touches what is not here, and a name for it; then all goes on."""
    table = Table("long", 8 * MIB)
    table.publish(machine(0).program())
    there = machine(1, timeout=2)
    reader, second = there.program(), there.program()
    for each in (reader, second):
        table.open(each)
    table.begin_gather(second, 1, 50)
    assert second.end(60) is True
    with network.machines[1].cut_off():
        assert reader.do("answer = int(table[-1, 0])", 60) == -signal.SIGBUS
        assert "Unreachable" in second.do("gmem.pool('long', remote='far').open()", 60)
        told = next(d for d in there.ask("devices")["devices"] if d["name"] == "far")
        assert told["errors"] > 0 and told["last_error"]
    until(lambda: table.open(there.program()) == 1, "the servers are there again", 60)
    assert table.compare(second)


def test_a_rack_that_is_cut_off(machine, network, cluster):
    """A primary, and the replica of another one, are away while one machine publishes and another reads: a replica
    takes over, writes wait for somebody who confirms them, and nothing that was published is lost."""
    stays = Table("stays", 8 * MIB)
    writer, reader = machine(0, timeout=60, lease=20), machine(1, timeout=60)
    publisher, program = writer.program(), reader.program()
    stays.publish(publisher)
    stays.open(program)
    moves = Table("moves", 4 * MIB)
    moves.begin_publishing(publisher, rounds=6)
    rack = network.racks[0]
    away = [server for server in cluster.servers if server.host == rack.address]

    def is_replaced():
        others = [server for server in cluster.servers if server not in away]
        return sum(server.client().info("replication")["role"] == "master" for server in others) >= 3

    with rack.cut_off():
        stays.begin_compare(program)
        until(is_replaced, "a replica has taken over", 60)
    cluster.whole(60)
    assert program.end(120) is True
    versions = publisher.end(180)
    assert versions == sorted(set(versions)) and len(versions) == 6
    late = reader.program()
    assert moves.open(late) == versions[-1] and moves.compare(late, seed=5)


def test_a_slow_network(machine, network, cluster):
    table = Table("slow", 4 * MIB)
    table.publish(machine(0).program())
    there = machine(1)
    reader = there.program()
    table.open(reader)
    with network.machines[1].slow() as kind:
        print(kind)
        table.begin_compare(reader)
        assert reader.end(120) is True
    assert [pool["fetched_bytes"] for pool in there.pools()] == [table.bytes]
