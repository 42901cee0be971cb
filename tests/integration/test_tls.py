# SPDX-License-Identifier: Apache-2.0
"""The remote tier over TLS, on Debian's Redis with certificates of our own: one server, a cluster, and everything about
certificates that can be wrong."""

import os
import shutil
import subprocess
import threading
import time

import numpy as np
import pytest
from helpers import run_python
from test_remote import attach, numbers, refused, row, secret, spread  # noqa: F401 (fixtures)
from test_sharedpools import equal, machine, opens, publish, told  # noqa: F401 (fixtures)
from test_sharedpools import row as pool_row
from valkeys import Certificates, Cluster, Server, find_redis, until

pytestmark = pytest.mark.skipif(not find_redis(), reason="no server with TLS: apt-get install redis-tools")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    made = Certificates(tmp_path_factory.mktemp("certificates"))
    made.make("server").make("client").make("named", "DNS:pages.example").make("expired", days=-1)
    return made


@pytest.fixture(scope="module")
def strangers(tmp_path_factory):
    return Certificates(tmp_path_factory.mktemp("strangers")).make("server").make("client")


@pytest.fixture(scope="module")
def server(tmp_path_factory, certificates):
    made = Server(tmp_path_factory.mktemp("tls"), find_redis(), tls=certificates).ready()
    yield made
    made.kill()


@pytest.fixture
def tls(certificates):
    """Options of a client that is in order, but for those that are given; None: left out."""

    def make(**other):
        files = {"tls_ca_file": "ca.crt", "tls_cert_file": "client.crt", "tls_key_file": "client.key"}
        options = {"tls": "on", **{key: str(certificates.path(name)) for key, name in files.items()}, **other}
        return {key: str(value) for key, value in options.items() if value is not None}

    return make


def present(client, certificates, name, **others):
    """From now on the server is that one. Whoever is connected has to come again."""
    files = {"tls-cert-file": certificates.path(f"{name}.crt"), "tls-key-file": certificates.path(f"{name}.key")}
    files.update(others)
    client.config_set(*(str(word) for pair in files.items() for word in pair))
    client.execute_command("CLIENT KILL TYPE normal SKIPME yes")


# ---- it works ----


@pytest.mark.parametrize("page_size", ["64K", "2M"])
def test_one_server(attach, server, tls, page_size):  # noqa: F811
    session = attach(server.endpoint, **tls())
    data = numbers(32, 1)
    a = spread(data, page_size)
    assert server.client().dbsize() > 0
    for step in (3, 7):
        a[::step] += 1
        data[::step] += 1
    assert np.array_equal(a, data) and row(session)["errors"] == 0
    assert row(session)["used_bytes"] > 16 << 20


def test_a_user_with_password(attach, server, tls, tmp_path):  # noqa: F811
    rules = ("reset on >geheim ~gmem:A:* +get +getrange +set +unlink +wait +ping +auth +asking +info "
             "+cluster|slots +command")  # fmt: skip
    server.client().execute_command("ACL SETUSER", "u", *rules.split())
    session = attach(server.endpoint, user="u", password_file=secret(tmp_path, "geheim"), tenant="A", **tls())
    data = numbers(16, 2)
    a = spread(data, "64K")
    assert np.array_equal(a, data) and row(session)["errors"] == 0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, certificates):
    made = Cluster(tmp_path_factory.mktemp("cluster"), find_redis(), tls=certificates)
    yield made
    made.close()


@pytest.fixture
def fail_over(cluster):
    """One primary is killed, and started again once its replica has its place, since it is empty then."""
    threads = []

    def start_again(victim):
        until(lambda: len(cluster.primaries()) == 3, "a replica has taken over", 60)
        victim.start()

    def begin():
        victim = cluster.primaries()[0]
        victim.kill()
        threads.append(threading.Thread(target=start_again, args=(victim,)))
        threads[-1].start()
        return threads[-1]

    yield begin
    for thread in threads:
        thread.join()
    cluster.whole(60)


def test_a_cluster_whose_primary_is_killed(attach, cluster, fail_over, tls):  # noqa: F811
    session = attach(cluster.endpoints, replicas=1, timeout=25, **tls())
    data = numbers(24, 3)
    a = spread(data, "64K")
    assert sum(bool(primary.client().dbsize()) for primary in cluster.primaries()) > 1
    thread = fail_over()
    a += 1
    thread.join()
    assert np.array_equal(a, data + 1)
    assert row(session)["errors"] == 0
    session.close()


# ---- pools of several machines ----


def test_a_pool_of_several_machines(machine, told, cluster, fail_over, tls, tmp_path):  # noqa: F811
    """Published, opened and fetched once over TLS, by a user with a password; also while a primary is killed."""
    rules = ("reset on >geheim ~gmem:A:* +get +getrange +set +unlink +wait +ping +auth +asking +info +cluster|slots "
             "+command +watch +unwatch +multi +exec +incr +incrby +pexpire +time +hset +hdel +hgetall +zadd +zrem "
             "+zrange +zremrangebyscore +sadd +srem +smembers")  # fmt: skip
    for each in cluster.servers:
        each.client().execute_command("ACL SETUSER", "gmem-a", *rules.split())
    options = tls(user="gmem-a", password_file=secret(tmp_path, "geheim"), tenant="A", replicas=1, timeout=40, lease=20)
    one, other = machine(cluster.endpoints, **options), machine(cluster.endpoints, **options)
    writer, reader = told(one), told(other)
    first = publish(writer, "table", 1, 8)
    assert opens(reader, "table") == first and equal(reader, 1, 8)
    assert pool_row(other, "table")["fetched_bytes"] == 8 << 20
    assert {key.split(b":")[1] for key in cluster.keys() if b"{p." in key} == {b"A"}  # noqa: SIM118
    late = told(other)
    opens(late, "table")
    victim = cluster.primaries()[0]  # the user that it has been told of is in no file
    thread = fail_over()
    second = publish(writer, "table", 2, 8)
    thread.join()
    until(victim.client().ping, "it is there again")
    victim.client().execute_command("ACL SETUSER", "gmem-a", *rules.split())
    assert second > first and equal(late, 1, 8)
    assert opens(late, "table") == second and equal(late, 2, 8)


def test_a_pool_behind_a_certificate_that_has_expired(machine, told, certificates, tls, tmp_path):  # noqa: F811
    """An error with that name within the time-out for who reads what is not here, or opens; later all goes on."""
    renewed = Server(tmp_path / "s", find_redis(), tls=certificates).ready()
    try:
        one, other = (machine(renewed.endpoint, **tls(timeout=1)) for _ in range(2))
        writer, reader, second = told(one), told(other), told(other)
        publish(writer, "table", 1, 2)
        opens(reader, "table")
        opens(second, "table")
        assert second.do("answer = int(table[0] == data(1, 2)[0])") == 1
        client = renewed.client()
        present(client, certificates, "expired")
        assert reader.do("answer = int(table[-1])") == -7, "SIGBUS"
        for request in ("gmem.pool('table', remote='far').open()", "gmem.pool('table', remote='far').unlink()"):
            said = second.do(request)
            assert "Unreachable" in said and "certificate has expired" in said
        assert "Unreachable" in publish(writer, "other", 1, 1)
        assert "certificate has expired" in row(other)["last_error"]
        present(client, certificates, "server")
        assert equal(second, 1, 2)
        assert writer.do("answer = pool.publish(remote='far').version") == 1
        assert opens(second, "other") == 1 and equal(second, 1, 1)
    finally:
        renewed.kill()


def test_names(attach, certificates, tls, tmp_path):  # noqa: F811
    """A certificate for another name will do if that name was asked for, or none."""
    named = Server(tmp_path / "named", find_redis(), tls=certificates, tls_cert_file=certificates.path("named.crt"),
                   tls_key_file=certificates.path("named.key")).ready()  # fmt: skip
    try:
        for options in ({"tls_server_name": "pages.example"}, {"tls_verify": "ca"},
                        {"tls_verify": "none", "tls_ca_file": None}):  # fmt: skip
            session = attach(named.endpoint, **tls(**options))
            data = numbers(16, 4)
            a = spread(data, "64K")
            assert np.array_equal(a, data) and row(session)["errors"] == 0
            del a
            session.close()
    finally:
        named.kill()


# ---- it is refused ----


def test_options(refused, server, certificates, strangers, tls, tmp_path):  # noqa: F811
    readable, garbage, locked = (tmp_path / name for name in ("readable", "garbage", "locked"))
    shutil.copy(certificates.path("client.key"), readable)
    readable.chmod(0o644)
    garbage.write_text("no certificate")
    command = ["openssl", "ec", "-in", certificates.path("client.key"), "-aes128", "-passout", "pass:geheim"]
    subprocess.run([*command, "-out", locked], check=True, capture_output=True)
    locked.chmod(0o600)
    garbage.chmod(0o600)
    for expected, options in (
        ("tls: 'perhaps' is not on or off", {"tls": "perhaps"}),
        ("tls_ca_file: needs tls=on", {"tls_ca_file": str(garbage)}),
        ("tls_verify: 'some' is not", tls(tls_verify="some")),
        ("tls_ca_file: must be an absolute path", tls(tls_ca_file="ca.crt")),
        ("none can't be read: No such file", tls(tls_ca_file=tmp_path / "none")),
        ("tls_ca_file: can't be used: ", tls(tls_ca_file=garbage)),
        ("tls_cert_file: can't be used: ", tls(tls_cert_file=garbage, tls_key_file=None)),
        ("tls_key_file: needs a tls_cert_file", tls(tls_cert_file=None)),
        (f"tls_key_file: {readable} can be read by others", tls(tls_key_file=readable)),
        ("tls_key_file: can't be used: ", tls(tls_key_file=locked)),
        ("tls_key_file: can't be used: tls: key values mismatch", tls(tls_key_file=strangers.path("client.key"))),
    ):
        said = refused(server.endpoint, **options)
        assert expected in said and "BEGIN" not in said and "geheim" not in said
    assert "tls: a Unix socket has none" in refused("unix:/run/nobody", **tls())
    assert "a private server has none" in refused(tls="on")


def test_certificates_that_will_not_do(refused, certificates, strangers, tls, tmp_path):  # noqa: F811
    for name, expected in (("expired", "certificate has expired"), ("named", "IP address mismatch")):
        wrong = Server(tmp_path / name, find_redis(), tls=certificates, tls_cert_file=certificates.path(f"{name}.crt"),
                       tls_key_file=certificates.path(f"{name}.key"))  # fmt: skip
        try:
            until(lambda wrong=wrong: wrong.client(ssl_cert_reqs="none").ping(), "the server answers")
            assert expected in refused(wrong.endpoint, **tls())
        finally:
            wrong.kill()
    other = Server(tmp_path / "strangers", find_redis(), tls=strangers).ready()
    try:
        assert "self-signed certificate in certificate chain" in refused(other.endpoint, **tls())
        said = refused(other.endpoint, **tls(tls_ca_file=strangers.path("ca.crt")))
        assert "unknown ca" in said or "tls: EOF" in said or "reset" in said  # its alert, or that it hung up
        without = {"tls_cert_file": None, "tls_key_file": None}
        wanted = refused(other.endpoint, **tls(tls_ca_file=strangers.path("ca.crt"), **without))
        assert "tls: " in wanted  # that it wants one, or that it hung up: what comes first
    finally:
        other.kill()


def test_only_one_side_speaks_tls(refused, server, tls, tmp_path):  # noqa: F811
    plain = Server(tmp_path / "plain", find_redis()).ready()
    try:
        assert "TLS" in refused(plain.endpoint, **tls())
        assert "does it want TLS?" in refused(server.endpoint)
    finally:
        plain.kill()


# ---- what changes while it runs ----


def test_a_certificate_that_expires_under_it(attach, certificates, tls, tmp_path):  # noqa: F811
    """Nothing more is said to that server; pages wait for a good certificate, and none is lost."""
    renewed = Server(tmp_path / "s", find_redis(), tls=certificates).ready()
    try:
        session = attach(renewed.endpoint, timeout=30, **tls())
        data = numbers(24, 5)
        a = spread(data, "64K")
        client = renewed.client()
        present(client, certificates, "expired")
        before, said = page_calls(client), []

        def mend():
            said.append(row(session)["last_error"])
            said.append(page_calls(client))
            present(client, certificates, "server")

        threading.Timer(1.0, mend).start()
        began = time.monotonic()
        assert np.array_equal(a, data)
        assert time.monotonic() - began > 0.9, "whoever reads waits"
        assert "certificate has expired" in said[0]
        assert said[1] == before, "it was told nothing"
        a += 1
        assert np.array_equal(a, data + 1) and row(session)["errors"] == 0
        session.close()
    finally:
        renewed.kill()


def page_calls(client):
    stats = client.info("commandstats")
    return {word: stats.get(f"cmdstat_{word}", {}).get("calls") for word in ("get", "getrange", "set")}


def test_files_that_are_renewed(attach, certificates, strangers, tls, tmp_path):  # noqa: F811
    """Another authority, on both sides, without a restart of either."""
    mine = tmp_path / "mine"
    shutil.copytree(certificates.folder, mine)
    files = {"tls_ca_file": mine / "ca.crt", "tls_cert_file": mine / "client.crt", "tls_key_file": mine / "client.key"}
    changing = Server(tmp_path / "s", find_redis(), tls=certificates).ready()
    try:
        session = attach(changing.endpoint, timeout=30, **tls(**files))
        data = numbers(24, 6)
        a = spread(data, "64K")
        client = changing.client()
        for path in files.values():  # as programs do that renew them
            fresh = path.with_suffix(".new")
            shutil.copy(strangers.path(path.name), fresh)
            os.replace(fresh, path)
        present(client, strangers, "server", **{"tls-ca-cert-file": strangers.path("ca.crt")})
        assert np.array_equal(a, data)
        a += 1
        assert np.array_equal(a, data + 1) and row(session)["errors"] == 0
        session.close()
    finally:
        changing.kill()


def test_what_never_gets_better_is_an_error_within_the_timeout(attach, certificates, tls, tmp_path):  # noqa: F811
    lost = Server(tmp_path / "s", find_redis(), tls=certificates).ready()
    try:
        session = attach(lost.endpoint, timeout=0.5, **tls())
        code = f"""
            import gmem, numpy as np, os, subprocess, sys
            gmem.connect()
            a = gmem.full(24 << 17, 7, np.int64, page_size="64K")
            os.kill({lost.process.pid}, 19)
            print("hung", flush=True)
            print((a == 7).all())
        """
        done = run_python(code, session=session)
        assert done.returncode == -7 and done.stdout == "hung\n", "SIGBUS"
        assert row(session)["errors"] > 0
    finally:
        lost.go_on()
        lost.kill()
