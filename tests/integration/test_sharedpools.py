# SPDX-License-Identifier: Apache-2.0
"""Pools that several machines share: here these are gmemds on one, and the servers between them are real ones."""

import os
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path

import gmem
import programs
import pytest
from helpers import eventually
from machines import Machine
from told import Told
from valkeys import Cluster, Server

MIB = 1 << 20
BOB = 65534


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    yield made
    made.close()


@pytest.fixture
def server(tmp_path):
    made = Server(tmp_path / "server").ready()
    yield made
    made.go_on()
    made.kill()


@pytest.fixture(scope="module")
def common(tmp_path_factory):
    """A server for tests that have pools of other names each."""
    made = Server(tmp_path_factory.mktemp("common")).ready()
    yield made
    made.kill()


def far(endpoints, **options):
    return {"name": "far", "driver": "remote", "capacity": 64 * MIB, "endpoints": endpoints, "timeout": 4, "lease": 2,
            **options}  # fmt: skip


@pytest.fixture(scope="module")
def pair(common):
    """Two gmemds that use it."""
    sessions = [gmem.connect(devices=[far(common.endpoint)], embedded=True) for _ in range(2)]
    yield sessions
    for session in sessions:
        session.close()


@pytest.fixture
def machine(connect):
    """A gmemd with the servers attached."""

    def make(endpoints, *, settings=(), **options):
        return connect(far(endpoints, **options), settings=list(settings))

    return make


@pytest.fixture
def told():
    """A process on a machine."""
    made = []

    def start(session, **options):
        made.append(Told(session.path, **options))
        return made[-1]

    yield start
    for each in made:
        each.close()


DATA = "data = lambda seed, mib: np.random.default_rng(seed).integers(0, 1 << 62, mib << 17, np.int64)"


def publish(writer, name, seed, mib, page_size="64K", mode="0o644"):
    return writer.do(f"""
        {DATA}
        pool = gmem.pool({name!r}, size={mib} << 20, page_size={page_size!r}, mode={mode})
        pool.array(np.int64)[:] = data({seed}, {mib})
        answer = pool.publish(remote="far").version
        pool.unlink()
        del pool
    """)


def opens(reader, name):
    return reader.do(f"""
        {DATA}
        pool = gmem.pool({name!r}, remote="far").open()
        table = pool.array(np.int64)
        answer = pool.version
    """)


def equal(reader, seed, mib):
    return reader.do(f"answer = bool(np.array_equal(table, data({seed}, {mib})))")


def row(session, name, version=None):
    rows = [p for p in session.request("pools")["pools"] if p["name"] == name and p["remote"]]
    return next(p for p in rows if version in (None, p["version"]))


def keys(source, name):
    found = source.keys()
    return [key for key in found if b"{p.%s:" % name.encode() in key]


# ---- published, opened, fetched once ----


@pytest.mark.parametrize("page_size", ["4K", "64K", "2M"])
def test_each_page_comes_once(cluster, machine, told, page_size):
    one, other = machine(cluster.endpoints, replicas=1, tenant="T"), machine(cluster.endpoints, replicas=1, tenant="T")
    name, mib = f"once{page_size}", 8
    version = publish(told(one), name, 1, mib, page_size)
    stored = keys(cluster, name)
    assert all(key.startswith(b"gmem:T:{p.%s:" % name.encode()) for key in stored)
    assert sum(bool(server.client().dbsize()) for server in cluster.primaries()) == 3, "one pool, all shards"
    readers = [told(other) for _ in range(3)]
    assert [opens(reader, name) for reader in readers] == [version] * 3
    for reader in readers:  # at the same time
        reader.begin("answer = bool(np.array_equal(table, data(1, 8)))")
    assert [reader.end() for reader in readers] == [True] * 3
    found = row(other, name)
    assert found["fetched_bytes"] == mib * MIB and found["readers"] == 3 and found["sealed"]
    assert equal(readers[0], 1, mib) and row(other, name)["fetched_bytes"] == mib * MIB
    assert other.request("devices")["devices"][1]["out_bytes"] >= mib * MIB
    here = told(one)  # the machine that has published is none of another kind
    assert opens(here, name) == version and equal(here, 1, mib)


def test_only_what_is_touched_comes(pair, common, told):
    one, other = pair
    writer, reader = told(one), told(other)
    writer.do("""
        pool = gmem.pool("sparse", size=64 << 20, page_size="4K")
        array = pool.array(np.uint8)
        array[5 << 20] = 1
        array[40 << 20 : (40 << 20) + 100_000] = 2
        pool.publish(remote="far")
    """)
    assert len(keys(common.client(), "sparse")) < 40, "pages that nobody has written to are nowhere"
    assert reader.do("""
        array = gmem.pool("sparse", remote="far").array(np.uint8)
        answer = [int(array[n << 20]) for n in (5, 6, 40, 63)]
    """) == [1, 0, 2, 0]
    assert row(other, "sparse")["fetched_bytes"] <= 64 << 10
    assert reader.do("answer = int(array.sum(dtype=np.int64))") == 200_001


def test_who_reads_in_order_is_read_ahead_for(pair, common, told):
    """Each page once all the same, and far fewer waits than pages."""
    one, other = pair
    publish(told(one), "ordered", 1, 32)
    reader = told(other)
    opens(reader, "ordered")

    def faults():
        return next(s["host_faults"] for s in other.request("sessions")["sessions"] if s["pid"] == reader.process.pid)

    before = faults()
    assert equal(reader, 1, 32)
    assert row(other, "ordered")["fetched_bytes"] == 32 * MIB
    assert faults() - before < 32 * MIB // 65536 // 4


def test_from_c(server, builder):
    daemon = programs.Daemon([f"name=far,driver=remote,capacity=64M,endpoints={server.endpoint}"])
    try:
        programs.run_ok([builder.program(programs.SOURCES / "sharedpool.c")], env=daemon.environment)
    finally:
        daemon.close()


# ---- versions, writers, garbage ----


def test_readers_keep_the_version_that_they_have(pair, common, told):
    one, other = pair
    writer, early = told(one), told(other)
    first = publish(writer, "kept", 1, 4)
    assert opens(early, "kept") == first
    early.do("answer = int(table[0])")
    second = publish(writer, "kept", 2, 4)
    assert second > first
    late = told(other)
    assert opens(late, "kept") == second
    assert equal(early, 1, 4) and equal(late, 2, 4)
    time.sleep(1.5)  # whoever looks for garbage has done so
    assert len(keys(common.client(), "kept")) == 2 * 65
    early.close()
    eventually(lambda: len(keys(common.client(), "kept")) == 65, "nobody reads the first version any more", 20)
    assert [p["version"] for p in other.request("pools")["pools"] if p["name"] == "kept"] == [second]
    assert equal(late, 2, 4)


def test_unlinked(pair, common, told):
    one, other = pair
    writer, reader = told(one), told(other)
    publish(writer, "gone", 1, 4)
    opens(reader, "gone")
    assert "gone" in [p["name"] for p in other.request("pools", remote="far")["pools"]]
    assert "NotFound" in writer.do("gmem.pool('gone').unlink()")
    assert writer.do("gmem.pool('gone', remote='far').unlink()") is None
    assert "NotFound" in writer.do("gmem.pool('gone', remote='far').open()")
    assert "gone" not in [p["name"] for p in other.request("pools", remote="far")["pools"]]
    assert equal(reader, 1, 4), "who has it open keeps it"
    reader.close()
    eventually(lambda: not keys(common.client(), "gone"), "then it goes", 20)
    assert publish(writer, "gone", 2, 4) > 1, "no number is used twice"


def test_one_writer_at_a_time(pair, common, told):
    """Another machine's lease, which is renewed, and then is not."""
    writer = told(pair[0])
    client = common.client()
    client.set("gmem:default:{p.busy}:lease", "1 another", ex=100)
    assert "Busy: name: another machine is publishing busy" in publish(writer, "busy", 1, 1)
    writer.do("gmem.pool('busy').unlink(); del pool")
    client.pexpire("gmem:default:{p.busy}:lease", 200)
    eventually(lambda: not client.exists("gmem:default:{p.busy}:lease"), "it expires")
    assert publish(writer, "busy", 1, 1) == 1


def test_a_writer_that_loses_its_lease(server, machine, told):
    """It is stopped for longer than that, in the middle of its work; another one publishes meanwhile."""
    slow, quick = machine(server.endpoint, lease=1, timeout=20), machine(server.endpoint, lease=1)
    writer = told(slow)
    daemon = daemon_of(slow)
    writer.begin(f"""
        {DATA}
        pool = gmem.pool("table", size=48 << 20, page_size="4K", mode=0o644)
        pool.array(np.int64)[:] = data(1, 48)
        pool.publish(remote="far")
    """)
    eventually(lambda: len(keys(server.client(), "table")) > 50, "it is at work")
    os.kill(daemon, signal.SIGSTOP)
    try:
        eventually(lambda: not server.client().exists("gmem:default:{p.table}:lease"), "its lease expires")
        other = told(quick)
        version = publish(other, "table", 2, 2)
    finally:
        os.kill(daemon, signal.SIGCONT)
    assert "LeaseLost" in writer.end()
    reader = told(slow)
    assert opens(reader, "table") == version and equal(reader, 2, 2)
    eventually(lambda: len(keys(server.client(), "table")) == 33, "what it had written is dropped", 20)
    assert writer.do("answer = pool.publish(remote='far').version") > version, "it may try again"


def daemon_of(session):
    """The gmemd process of an embedded session."""
    return session.request("ping")["pid"]


# ---- who may ----


def test_modes_and_names(server, machine, told):
    one = machine(server.endpoint)
    other = machine(server.endpoint)
    writer, bob = told(one), told(other)
    publish(writer, "mine", 1, 1, mode="0o600")
    assert "NotFound: name: no pool none is published there" in bob.do("gmem.pool('none', remote='far').open()")
    assert "remote: no device near is attached" in bob.do("gmem.pool('mine', remote='near').open()")
    assert "PermissionDenied: write" in bob.do("gmem.pool('mine', remote='far', write=True)")
    assert "uid: mine is not a pool of uid 5" in bob.do("gmem.pool('mine', remote='far', owner=5).open()")
    assert "InvalidArgument: remote" in bob.do("gmem.pool('mine', size=4096, remote='far')")
    assert "InvalidArgument: remote" in bob.do("gmem.pool('mine', remote='far').publish()")
    assert opens(bob, "mine") == 1 and equal(bob, 1, 1)
    refusal = "read-only|SIGSEGV"
    assert bob.do("""
        try:
            table[0] = 1
        except ValueError:
            answer = "read-only"
    """) in refusal
    assert "EBUSY" in str(detach(other)) and "mine" in str(detach(other))
    bob.close()
    eventually(lambda: detach(other) is None, "nobody has it open any more")


def detach(session):
    try:
        session.request("detach", name="far")
    except gmem.GmemError as error:
        return error
    return None


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
def test_another_user(server, machine, told, tmp_path):
    open_to_all = Path(tempfile.mkdtemp(dir="/tmp"))
    open_to_all.chmod(0o755)
    other = Machine(open_to_all, server.endpoint)
    try:
        one = machine(server.endpoint)
        writer, root = told(one), Told(other.socket)
        publish(writer, "mine", 1, 1, mode="0o600")
        publish(writer, "ours", 2, 1, mode="0o604")
        bob = Told(other.socket, uid=BOB)
        assert "the mode of mine does not allow reading" in opens(bob, "mine")
        assert opens(bob, "ours") == 1 and equal(bob, 2, 1)
        assert opens(root, "mine") == 1 and equal(root, 1, 1)
        assert "another user's" in publish(bob, "ours", 3, 1)
        assert "another user's" in bob.do("gmem.pool('ours', remote='far').unlink()")
        assert equal(bob, 2, 1)
        for each in (bob, root):
            each.close()
    finally:
        other.close()
        shutil.rmtree(open_to_all)


def test_a_tenant_of_its_own(server, machine, told, tmp_path):
    """The rights that docs/operator.md gives to a tenant's user are enough."""
    rules = ("reset on >geheim ~gmem:A:* +get +getrange +set +unlink +wait +ping +auth +asking +info +cluster|slots "
             "+command +watch +unwatch +multi +exec +incr +incrby +pexpire +time +hset +hdel +hgetall +zadd +zrem "
             "+zrange +zremrangebyscore +sadd +srem +smembers")  # fmt: skip
    server.client().execute_command("ACL SETUSER", "gmem-a", *rules.split())
    path = tmp_path / "secret"
    path.write_text("geheim\n")
    path.chmod(0o600)
    options = {"user": "gmem-a", "password_file": path, "tenant": "A"}
    one, other = machine(server.endpoint, **options), machine(server.endpoint, **options)
    writer, reader = told(one), told(other)
    for seed in (1, 2):
        publish(writer, "table", seed, 1)
    opens(reader, "table")
    assert equal(reader, 2, 1)
    assert writer.do("gmem.pool('table', remote='far').unlink()") is None
    denied = {entry["object"] for entry in server.client().acl_log()}
    assert denied <= {"client|setinfo"}, "nothing is asked for that is not allowed, but the package's name to be told"


# ---- what goes wrong ----


def test_servers_that_hang(server, machine, told):
    one, other = machine(server.endpoint), machine(server.endpoint, timeout=2)
    publish(told(one), "table", 1, 4)
    reader, second = told(other), told(other)
    opens(reader, "table")
    opens(second, "table")
    server.pause()
    threading.Timer(1.2, server.go_on).start()
    began = time.monotonic()
    assert reader.do("answer = bool(table[0] == data(1, 4)[0])") is True
    assert time.monotonic() - began > 1, "whoever reads waits"
    server.pause()
    began = time.monotonic()
    assert reader.do("answer = int(table[-1])") == -signal.SIGBUS
    assert time.monotonic() - began < 12, "and has an error in the end"
    assert "Unreachable" in second.do("gmem.pool('table', remote='far').open()")
    server.go_on()
    assert equal(second, 1, 4), "and everything goes on"
    events = other.request("devices")["devices"][1]
    assert events["errors"] > 0


def test_a_damaged_page_is_never_returned(pair, common, told):
    one, other = pair
    publish(told(one), "damaged", 1, 4)
    client = common.client()
    victim = next(key for key in keys(client, "damaged") if b":20:" in key and b":m}" not in key)
    whole = client.get(victim)
    client.setrange(victim, 100, b"X")
    reader, second = told(other), told(other)
    opens(reader, "damaged")
    opens(second, "damaged")
    assert reader.do("answer = bool(table[: 8192 * 0x1f] @ table[: 8192 * 0x1f] == 0)") is False
    assert reader.do("answer = int(table[8192 * 0x20])") == -signal.SIGBUS
    client.set(victim, whole)
    assert equal(second, 1, 4), "repaired"
    manifest = next(key for key in keys(client, "damaged") if b":m}" in key)
    client.setrange(manifest, 100, b"X")
    third = told(one)
    assert "the manifest of damaged, version 1, is damaged" in opens(third, "damaged")


def test_servers_that_are_full(machine, told, tmp_path):
    small = Server(tmp_path / "small", maxmemory="16mb").ready()
    try:
        one, other = machine(small.endpoint), machine(small.endpoint)
        writer, reader = told(one), told(other)
        first = publish(writer, "table", 1, 2)
        assert "OutOfMemory: remote: the servers are full" in publish(writer, "table", 2, 32)
        assert opens(reader, "table") == first and equal(reader, 1, 2)
        eventually(lambda: len(keys(small.client(), "table")) == 33, "what was written is dropped", 20)
        small.client().config_set("maxmemory", "256mb")
        assert writer.do("answer = gmem.pool('table').publish(remote='far').version") > first
        late = told(other)
        opens(late, "table")
        assert equal(late, 2, 32)
    finally:
        small.kill()


def test_a_primary_that_is_killed(cluster, machine, told):
    """kill -9 of a primary while one machine publishes and another reads: replicas take over, and nothing that was
    published is lost. The new primary has no replica before the other one is back."""
    one, other = (machine(cluster.endpoints, replicas=1, timeout=25, lease=10) for _ in range(2))
    writer, reader = told(one), told(other)
    publish(writer, "stays", 1, 16)
    opens(reader, "stays")
    victim = cluster.primaries()[0]
    threading.Timer(0.2, victim.kill).start()
    threading.Timer(3, victim.start).start()
    writer.begin(f"""
        {DATA}
        versions = []
        for seed in range(8):
            pool = gmem.pool("moves", size=8 << 20, page_size="64K", mode=0o644)
            pool.array(np.int64)[:] = data(seed, 8)
            versions.append(pool.publish(remote="far").version)
            pool.unlink()
            pool.close()
        answer = versions
    """)
    time.sleep(0.3)
    assert equal(reader, 1, 16)
    versions = writer.end(110)
    assert versions == sorted(set(versions))
    cluster.whole()
    late = told(other)
    assert opens(late, "moves") == versions[-1] and equal(late, 7, 8)
    assert row(other, "stays")["fetched_bytes"] == 16 * MIB


def test_too_few_replicas(cluster, machine, told):
    one = machine(cluster.endpoints, replicas=1, timeout=2)
    writer = told(one)
    primaries = {server.port for server in cluster.primaries()}
    replicas = [server for server in cluster.alive() if server.port not in primaries]
    for server in replicas:
        server.kill()
    try:
        assert "NotReplicated" in publish(writer, "lonely", 1, 1)
        assert "NotFound" in opens(writer, "lonely")
    finally:
        for server in replicas:
            server.start()
        cluster.whole()
    assert writer.do("answer = pool.publish(remote='far').version") >= 1
    assert opens(writer, "lonely") and equal(writer, 1, 1)


# ---- surviving ----


def test_a_reader_outlives_its_daemon(server, machine, told, tmp_path):
    one = machine(server.endpoint)
    writer = told(one)
    first = publish(writer, "table", 1, 8)
    daemon = Machine(tmp_path, server.endpoint)
    reader = Told(daemon.socket)
    try:
        assert opens(reader, "table") == first
        assert reader.do("answer = bool((table[: 1 << 18] == data(1, 8)[: 1 << 18]).all())")
        daemon.kill()
        assert equal(reader, 1, 8), "the rest comes to its successor"
        publish(writer, "table", 2, 8)
        readers = "gmem:default:{p.table}:readers"
        until_ms = lambda: dict(server.client().zrange(readers, 0, -1, withscores=True)).popitem()[1]  # noqa: E731
        before = until_ms()
        eventually(lambda: until_ms() > before, "it goes on saying what is read here", 20)
        late = Told(daemon.socket)
        assert opens(late, "table") > first and equal(late, 2, 8)
        daemon.kill()
        assert equal(late, 2, 8) and equal(reader, 1, 8)
        for each in (reader, late):
            each.close()
        eventually(lambda: len(keys(server.client(), "table")) == 129, "the first version is dropped", 20)
    finally:
        reader.close()
        daemon.close()


def test_a_writer_outlives_its_daemon(server, machine, told, tmp_path):
    """It asks again, and the successor takes the lease over that its predecessor had."""
    daemon = Machine(tmp_path, server.endpoint)
    writer = Told(daemon.socket)
    other = machine(server.endpoint)
    try:
        writer.begin(f"""
            {DATA}
            pool = gmem.pool("table", size=48 << 20, page_size="4K", mode=0o644)
            pool.array(np.int64)[:] = data(1, 48)
            answer = pool.publish(remote="far").version
        """)
        eventually(lambda: len(keys(server.client(), "table")) > 50, "it is at work")
        daemon.kill()
        version = writer.end()
        assert version == 2
        reader = told(other)
        assert opens(reader, "table") == version and equal(reader, 1, 48)
        eventually(lambda: len(keys(server.client(), "table")) == 48 * 16 + 1, "the first attempt is dropped", 20)
    finally:
        writer.close()
        daemon.close()
