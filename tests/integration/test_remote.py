# SPDX-License-Identifier: Apache-2.0
"""The remote tier on real servers: Valkey from the package, Redis where it is installed; one server, and a cluster of
three primaries with a replica each."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time

import gmem
import numpy as np
import pytest
from helpers import ROOT, eventually, run_python
from machines import Machine
from valkeys import Cluster, Server, programs, until

MIB = 1 << 20
HOST = 8 * MIB


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = Server(tmp_path_factory.mktemp("server")).ready()
    yield made
    made.kill()


@pytest.fixture
def attach(connect):
    """A daemon with little memory, and a remote tier below it."""

    def make(endpoints="", host=HOST, **options):
        device = {"name": "far", "driver": "remote", "capacity": 192 * MIB, **options}
        if endpoints:
            device["endpoints"] = endpoints
        return connect(device, settings=[f"host.limit={host}"])

    return make


def row(session, name="far"):
    return next(d for d in session.request("devices")["devices"] if d["name"] == name)


def numbers(mib, seed):
    return np.random.default_rng(seed).integers(0, 1 << 62, mib * MIB // 8, np.int64)


def spread(data, page_size):
    """An array of the same content, most of which is in the tier."""
    a = gmem.empty(data.shape, np.int64, page_size=page_size)
    a[:] = data
    return a


def alone(pattern):
    """Processes of that command line, of this test's."""
    found = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True).stdout.split()
    return [int(pid) for pid in found if int(pid) != os.getpid()]


# ---- what it stores, and where ----


def test_a_private_server(attach):
    session = attach()
    data = numbers(32, 1)
    a = spread(data, "64K")
    assert row(session)["used_bytes"] > 16 * MIB and set(row(session)["caps"]) == {"peer", "remote", "slow"}
    assert np.array_equal(a, data)
    a[::3] += 1
    data[::3] += 1
    assert np.array_equal(a, data)
    assert row(session)["errors"] == 0
    servers = alone("gmem-valkey-")
    assert servers
    session.close()
    eventually(lambda: not set(servers) & set(alone("gmem-valkey-")), "the server ends with its daemon")


@pytest.mark.parametrize("page_size", ["4K", "64K", "2M"])
def test_a_cluster(attach, cluster, page_size):
    session = attach(cluster.endpoints, replicas=1, tenant="t1")
    data = numbers(64, 2)
    a = spread(data, page_size)
    keys = cluster.keys()
    assert keys and all(key.startswith(b"gmem:t1:{t") and key.count(b":") == 5 for key in keys)
    if page_size != "2M":  # of these there are only a few extents
        assert sum(bool(server.client().dbsize()) for server in cluster.primaries()) > 1, "one object, many shards"
    if page_size == "4K":
        assert len(keys) < row(session)["stored_pages"] / 4, "small pages share values"
    assert np.array_equal(a, data)
    del a
    eventually(lambda: not cluster.keys(), "what nobody wants is dropped")


@pytest.mark.parametrize("program", list(programs()), ids=os.path.basename)
def test_other_servers(attach, tmp_path, program):
    single = Server(tmp_path / "s", program).ready()
    try:
        session = attach(single.endpoint)
        data = numbers(24, 3)
        a = spread(data, "64K")
        assert np.array_equal(a, data) and row(session)["errors"] == 0
        session.close()
        assert single.client().dbsize() == 0
    finally:
        single.kill()


def test_every_page_is_confirmed_by_a_replica(attach, cluster):
    session = attach(cluster.endpoints, replicas=1)
    data = numbers(24, 4)
    a = spread(data, "2M")
    time.sleep(0.1)
    for primary in cluster.primaries():
        calls = primary.client().info("commandstats")
        assert calls["cmdstat_wait"]["calls"] > 0
    assert row(session)["used_bytes"] > 0 and np.array_equal(a, data)


@pytest.mark.parametrize("program", list(programs()), ids=os.path.basename)
def test_the_configuration_that_servers_begin_with(attach, tmp_path, program):
    """Each line of it is taken, and is in the operator's manual with a reason."""
    path = ROOT / "systemd" / "gmem-valkey.conf"
    manual = (ROOT / "docs" / "operator.md").read_text().split("**The servers.**")[1].split("\n**")[0]
    settings = [line.split(maxsplit=1) for line in path.read_text().splitlines() if line and line[0] != "#"]
    single = Server(tmp_path / "s", program, include=path).ready()
    try:
        client = single.client()
        for name, value in settings:
            assert f"`{name}" in manual, f"{name} has no reason"
            assert in_bytes(value) in in_bytes(client.config_get(name)[name] or '""')
        client.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
        until(lambda: client.cluster("INFO")["cluster_state"] == "ok", "it serves all slots")
        session = attach(single.endpoint)
        data = numbers(16, 10)
        a = spread(data, "64K")
        assert np.array_equal(a, data) and client.dbsize() > 0 and row(session)["errors"] == 0
        session.close()
    finally:
        single.kill()


def in_bytes(value):
    """As servers say it."""
    units = {"gb": 1 << 30, "mb": 1 << 20}
    value = value.replace("slave ", "replica ")
    return re.sub(r"(\d+)(gb|mb)", lambda found: str(int(found[1]) * units[found[2]]), value)


# ---- who may ----


@pytest.fixture
def refused(connect):
    """What a daemon says that attaches no such tier; the same daemon each time."""
    session = connect(settings=[f"host.limit={HOST}"])

    def ask(endpoints="", **options):
        given = {"timeout": 0.5, "endpoints": endpoints, **options}
        config = {key: str(value) for key, value in given.items() if value}
        with pytest.raises(gmem.GmemError) as caught:
            session.request("attach", driver="remote", name="refused", config=config)
        return str(caught.value)

    return ask


def secret(tmp_path, text, mode=0o600):
    path = tmp_path / "secret"
    path.write_text(text + "\n")
    path.chmod(mode)
    return str(path)


def test_refusals_say_which_option(refused, server, tmp_path):
    assert "endpoints: 'a:b:c'" in refused("a:b:c")
    assert "endpoints" in refused("127.0.0.1:1")
    assert "replicas: " in refused(server.endpoint, replicas=1)
    assert "nope: no such option" in refused(server.endpoint, nope=1)
    assert "capacity" in refused(server.endpoint, capacity=4096)
    assert "tenant" in refused(server.endpoint, tenant="a:b")
    assert "can be read by others" in refused(server.endpoint, password_file=secret(tmp_path, "x", 0o644))
    assert "can't be read" in refused(server.endpoint, password_file=str(tmp_path / "none"))
    assert "a private server has none" in refused(user="x")


def test_a_server_that_would_lose_pages_is_refused(refused, tmp_path):
    evicting = Server(tmp_path / "s", maxmemory_policy="allkeys-lru").ready()
    try:
        assert "maxmemory-policy is allkeys-lru" in refused(evicting.endpoint)
    finally:
        evicting.kill()


def test_a_tenant_of_its_own(attach, refused, server, tmp_path):
    """A user that may use the keys of its tenant, and the commands that are used, as docs/operator.md has it."""
    rules = ("reset on >geheim ~gmem:A:* +get +getrange +set +unlink +wait +ping +auth +asking +info "
             "+cluster|slots +command")  # fmt: skip
    server.client().execute_command("ACL SETUSER", "gmem-a", *rules.split())
    path = secret(tmp_path, "geheim")
    told = refused(server.endpoint, user="gmem-a", password_file=secret(tmp_path, "falsch"), tenant="A")
    assert "password_file" in told and "falsch" not in told
    secret(tmp_path, "geheim")
    assert "NOPERM" in refused(server.endpoint, user="gmem-a", password_file=path, tenant="B")
    session = attach(server.endpoint, user="gmem-a", password_file=path, tenant="A")
    data = numbers(24, 5)
    a = spread(data, "64K")
    assert np.array_equal(a, data) and row(session)["errors"] == 0
    for pid in alone("gmemd"):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
            assert b"geheim" not in file.read()


def test_a_password_is_nowhere(server, tmp_path):
    """On no command line, in no environment, in no log and no answer, whether it is right, wrong or changed."""
    words = ("geheim-4711", "falsch-0815", "anders-1234")
    rules = "~gmem:A:* +get +getrange +set +unlink +wait +ping +auth +asking +info +cluster|slots +command"
    client = server.client()
    client.execute_command("ACL SETUSER", "quiet", *f"reset on >{words[0]} {rules}".split())
    path = secret(tmp_path, words[0])
    machine = Machine(tmp_path / "m", server.endpoint, "daemon.log_level=debug", f"host.limit={HOST}", user="quiet",
                      password_file=path, tenant="A", timeout=1)  # fmt: skip
    try:
        program = machine.program()
        load = "a = gmem.full(3 << 20, 7, np.int64, page_size='64K'); answer = bool((a == 7).all())"
        assert program.do(load) is True
        client.execute_command("ACL SETUSER", "quiet", "resetpass", f">{words[2]}")
        client.execute_command("CLIENT KILL USER quiet")
        assert program.do("answer = bool((a == 7).all())") == -signal.SIGBUS
        secret(tmp_path, words[1])
        config = {"endpoints": server.endpoint, "user": "quiet", "password_file": path, "tenant": "A"}
        with pytest.raises(OSError, match="password_file") as refused:
            machine.ask("attach", driver="remote", name="near", config=config)
        said = [str(refused.value), repr(machine.ask("devices")), machine.log.read_text()]
        assert "WRONGPASS" in said[1], "it says why"
        secret(tmp_path, words[2])
        assert machine.program().do(load) is True
        said += [repr(machine.ask("devices")), repr(machine.ask("stats")), machine.log.read_text()]
        for pid in [machine.process.pid, *machine.daemons(), *alone("gmemd"), *alone("valkey-server")]:
            for name in ("cmdline", "environ"):
                with contextlib.suppress(OSError), open(f"/proc/{pid}/{name}", "rb") as file:
                    said.append(file.read().decode(errors="replace"))
        assert not [word for word in words for text in said if word in text]
    finally:
        machine.close()


# ---- what goes wrong ----


def test_a_server_that_is_full_loses_nothing(attach, tmp_path):
    small = Server(tmp_path / "s", maxmemory="24mb").ready()
    try:
        session = attach(small.endpoint, host=24 * MIB, timeout=1)
        data = numbers(20, 6)
        a = spread(data, "64K")
        code = """
            import gmem
            gmem.connect()
            rest = gmem.full(48 << 20, 7, "u1", page_size="64K")
            print((rest == 7).all())
        """
        done = run_python(code, session=session)
        assert done.returncode == -signal.SIGBUS, "what can't be held is an error for whoever asks"
        eventually(lambda: len(session.request("sessions")["sessions"]) == 1, "its memory is free again")
        assert np.array_equal(a, data), "and nobody else's loss"
        small.client().config_set("maxmemory", "256mb")
        time.sleep(1.1)
        assert run_python(code, session=session).stdout == "True\n"
        assert np.array_equal(a, data)
    finally:
        small.kill()


def test_a_damaged_value_is_never_returned(attach, tmp_path):
    damaged = Server(tmp_path / "s").ready()
    try:
        session = attach(damaged.endpoint)
        code = """
            import gmem, numpy as np, sys
            gmem.connect()
            a = gmem.full(24 << 17, 7, np.int64, page_size="64K")
            print("stored", flush=True)
            sys.stdin.readline()
            print((a == 7).all(), flush=True)
        """
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)], env={**os.environ, "GMEM_SOCKET": session.path},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout.readline() == "stored\n"
        client = damaged.client()
        until(lambda: client.dbsize() > 10, "pages are stored")
        for key in client.scan_iter():
            client.setrange(key, 100, b"X")
        out, _ = process.communicate("\n", timeout=60)
        assert process.returncode == -signal.SIGBUS and out == ""
        assert row(session)["errors"] > 0
    finally:
        damaged.kill()


def test_a_primary_that_is_killed(attach, cluster):
    """kill -9 of a primary while pages come and go: its replica takes over, and what had been confirmed is there. It
    has no replica itself then; until somebody starts the other again, what would go there stays where it is."""
    session = attach(cluster.endpoints, replicas=1, timeout=25)
    data = numbers(32, 7)
    a = spread(data, "64K")
    victim = cluster.primaries()[0]

    def fail_over() -> None:
        time.sleep(0.3)
        victim.kill()
        until(lambda: len(cluster.primaries()) == 3, "its replica has taken over")  # it is empty: not earlier
        victim.start()

    failing = threading.Thread(target=fail_over)
    failing.start()
    rounds = 0
    while failing.is_alive() or rounds < 2:
        a[:: 1 + rounds % 7] += 1
        data[:: 1 + rounds % 7] += 1
        assert np.array_equal(a[rounds % 3 :: 3], data[rounds % 3 :: 3])
        rounds += 1
    assert np.array_equal(a, data)
    cluster.whole()
    assert victim.client().info()["role"] == "slave", "another has its place"
    assert np.array_equal(a, data)
    assert row(session)["health"] == 0 and row(session)["errors"] == 0


def test_a_replica_that_lags(cluster, tmp_path):
    """It hangs while pages leave, and takes over from a primary that is killed: it has little of what that one had.
    What it has not confirmed has not left."""
    machine = Machine(tmp_path / "m", cluster.endpoints, f"host.limit={HOST}", replicas=1, capacity=192 * MIB,
                      timeout=30)  # fmt: skip
    primaries = {server.port for server in cluster.primaries()}
    others = [server for server in cluster.alive() if server.port not in primaries]
    victim = cluster.primaries()[0]
    try:
        program = machine.program()
        program.do("a = gmem.full(12 << 20, 1, np.int64, page_size='64K')")
        cluster.whole()
        for server in others:
            server.pause()
        program.begin("a[:] = np.arange(12 << 20)")
        time.sleep(1)
        assert not program.has_said(), "nothing leaves that nobody confirms"
        victim.kill()
        for server in others:
            server.go_on()
        until(lambda: len(cluster.primaries()) == 3, "its replica has taken over")
        victim.start()
        assert program.end(60) is None
        assert program.do("answer = bool(np.array_equal(a, np.arange(12 << 20)))", 60) is True
    finally:
        for server in others:
            server.go_on()
        cluster.whole()
        machine.close()
        cluster.flush()  # what was dropped while the replica hung came back with it


def test_a_server_that_hangs_and_comes_back(attach, tmp_path):
    slow = Server(tmp_path / "s").ready()
    try:
        session = attach(slow.endpoint, timeout=30)
        data = numbers(24, 8)
        a = spread(data, "64K")
        slow.pause()
        threading.Timer(1.5, slow.go_on).start()
        began = time.monotonic()
        assert np.array_equal(a, data)
        assert time.monotonic() - began > 1, "whoever reads waits"
        a += 1
        assert np.array_equal(a, data + 1) and row(session)["errors"] == 0
    finally:
        slow.go_on()
        slow.kill()


def test_a_server_that_is_gone_is_an_error_within_the_timeout(attach, tmp_path):
    gone = Server(tmp_path / "s").ready()
    try:
        session = attach(gone.endpoint, timeout=0.5)
        done = run_python(
            f"""
            import gmem, numpy as np, os
            gmem.connect()
            a = gmem.full(24 << 17, 7, np.int64, page_size="64K")
            os.kill({gone.process.pid}, 9)
            print((a == 7).all())
            """,
            session=session,
        )
        assert done.returncode == -signal.SIGBUS and done.stdout == ""
        assert row(session)["errors"] > 0
    finally:
        gone.kill()


# ---- surviving ----


@pytest.mark.parametrize("where", ["private", "cluster"])
def test_pages_outlive_a_daemon_that_is_killed(where, cluster, tmp_path):
    options = f",endpoints={cluster.servers[0].endpoint}" if where == "cluster" else ""
    folder = tmp_path / "run"
    command = [
        sys.executable, "-m", "gmemd", "run", "--supervised", "--runtime-dir", str(folder), "--log-level", "info",
        "--set", f"host.limit={HOST}", "--device", f"name=far,driver=remote,capacity=128M{options}",
    ]  # fmt: skip
    with open(tmp_path / "log", "w") as log:
        daemon = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        eventually(lambda: (folder / "gmemd.sock").exists(), "gmemd is up", 20)
        until(lambda: '"ready"' in (tmp_path / "log").read_text(), "gmemd is ready")
        done = run_python(
            f"""
            import gmem, numpy as np, os, time
            gmem.connect({str(folder / "gmemd.sock")!r})
            data = np.random.default_rng(9).integers(0, 1 << 62, 16 << 17, np.int64)
            a = gmem.empty(data.shape, np.int64, page_size="64K")
            a[:] = data
            for _ in range(2):
                pids = [int(p) for p in os.popen("pgrep -P {daemon.pid}").read().split()]
                os.kill(pids[0], 9)
                assert np.array_equal(a, data)
                a += 1
                data += 1
            print(np.array_equal(a, data))
            """,
        )
        assert done.stdout == "True\n", done.stderr + (tmp_path / "log").read_text()
    finally:
        daemon.terminate()
        daemon.wait(20)
    eventually(lambda: not cluster.keys(), "values that no page is in are dropped, also those of killed daemons")
