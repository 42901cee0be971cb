# SPDX-License-Identifier: Apache-2.0
"""Heads, leases, readers and garbage on a real server: what two machines may do at once, and what is believed."""

import errno
import json
import time

import pytest
from valkeys import Server

from gmemd.drivers.published import Head, Published, Version
from gmemd.drivers.servers import Servers, parse_endpoints
from gmemd.errors import RequestError

ALICE, BOB = 1001, 1002


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = Server(tmp_path_factory.mktemp("server")).ready()
    yield made
    made.kill()


@pytest.fixture
def machine(server):
    server.client().flushall()
    made = []

    def make(name, **options):
        options = {"replicas": 0, "timeout_s": 1.0, "lease_s": 1.0, **options}
        made.append(Published(Servers(parse_endpoints(server.endpoint), "", "", None), "T", machine=name, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def head_of(lease, uid=ALICE, **further):
    fields = {"stamp": lease.stamp, "pages": 4, "page_bytes": 4096, "uid": uid, "gid": 1, "mode": 0o600, "crc": 0}
    return Head(**{**fields, **further})


def publish(machine, name="table", uid=ALICE):
    with machine.writing(name, uid) as lease:
        machine.intend(lease, 4, 4096)
        version = Version(name, lease.stamp, 4, 4096, bytes(8), bytearray(16))
        head = head_of(lease, uid, crc=machine.put_manifest(lease, version))
        machine.move_head(lease, head)
    return head


def refused(call, *args):
    with pytest.raises(RequestError) as caught:
        call(*args)
    return caught.value.errno


def test_a_version(machine):
    one, other = machine("one"), machine("other")
    assert other.head("table") is None and other.heads() == []
    head = publish(one)
    assert other.head("table") == head and head.version == 1
    version = other.manifest("table", head)
    assert (version.stamp, version.pages) == (head.stamp, 4)
    assert (version.present, bytes(version.checks)) == (bytes(8), bytes(16))
    assert publish(other).version == 2
    assert [(name, h.version) for name, h in one.heads()] == [("table", 2)]
    assert head.stamp & 0xFFFFFFFF != one.head("table").stamp & 0xFFFFFFFF, "no name of a value comes twice"


def test_manifests_in_pieces(machine):
    one = machine("one")
    pages = 200_000
    with one.writing("big", ALICE) as lease:
        version = Version("big", lease.stamp, pages, 4096, bytes(range(256)) * (pages // 8 // 256) + bytes(
            (pages + 63) // 64 * 8 - pages // 8 // 256 * 256), bytearray(range(250)) * (pages * 4 // 250))  # fmt: skip
        head = head_of(lease, pages=pages, crc=one.put_manifest(lease, version))
        one.move_head(lease, head)
    got = one.manifest("big", head)
    assert got.present == version.present and got.checks == version.checks


def test_only_the_holder_of_the_lease_moves_the_head(machine, server):
    """A writer that was away for longer than its lease: another one has come, and has gone or is still there."""
    late, quick = machine("late"), machine("quick")
    with late.writing("table", ALICE) as lease:
        assert refused(lambda: quick.writing("table", ALICE).__enter__()) == errno.EBUSY
        lease._over.set()  # it is not renewed any more
        time.sleep(1.2)
        assert refused(lease.check) == errno.ECANCELED
        lease._until = time.monotonic() + 100  # it has not noticed
        assert refused(late.move_head, lease, head_of(lease)) == errno.ECANCELED, "nobody else has it, but it is over"
        head = publish(quick)
        assert refused(late.move_head, lease, head_of(lease)) == errno.ECANCELED
        with quick.writing("table", ALICE):
            assert refused(late.move_head, lease, head_of(lease)) == errno.ECANCELED
            assert refused(late.renew, lease) == errno.ECANCELED
            assert refused(late.intend, lease, 4, 4096) == errno.ECANCELED
        # even with a lease that somebody gives back to it: a newer version is there
        server.client().set("gmem:T:{p.table}:lease", f"{lease.stamp:x} late", px=5000)
        assert refused(late.move_head, lease, head_of(lease)) == errno.ECANCELED
    assert late.head("table") == head


def test_a_lease_is_renewed(machine):
    one, other = machine("one"), machine("other")
    with one.writing("table", ALICE) as lease:
        one.intend(lease, 4, 4096)
        time.sleep(2.5)
        lease.check()
        assert refused(lambda: other.writing("table", ALICE).__enter__()) == errno.EBUSY
        one.move_head(lease, head_of(lease))
    assert other.head("table").stamp == lease.stamp
    assert publish(other).version > lease.stamp >> 32


def test_a_successor_takes_over_from_its_own_machine(machine):
    first, second = machine("one"), machine("one")
    abandoned = first.writing("table", ALICE)
    lease = abandoned.__enter__()
    head = publish(second)
    assert refused(first.move_head, lease, head_of(lease)) == errno.ECANCELED
    abandoned.__exit__(None, None, None)
    assert second.head("table") == head


def test_names_are_somebodys(machine):
    one = machine("one")
    publish(one, uid=ALICE)
    assert refused(lambda: one.writing("table", BOB).__enter__()) == errno.EACCES
    with one.writing("table", 0) as lease:  # root
        one.remove(lease)
    assert one.head("table") is None and one.heads() == []
    assert publish(one, uid=BOB).version > 1


def test_numbers_grow_whatever_was_lost(machine, server):
    one = machine("one")
    publish(one)
    publish(one)
    server.client().delete("gmem:T:{p.table}:fence")  # by a fail-over to a replica that did not have it
    assert publish(one).version == 3


def test_garbage(machine):
    one, other = machine("one"), machine("other")
    first = publish(one)
    assert one.garbage("table") == {}
    other.mark("table", first.stamp)
    second = publish(one)
    assert one.garbage("table") == {}, "somebody reads it"
    other.unmark("table", first.stamp)
    assert other.garbage("table") == {first.stamp: (4, 4096)}
    one.forget("table", first.stamp, 4)
    assert one.garbage("table") == {}
    assert refused(one.manifest, "table", first) == errno.EIO
    assert one.manifest("table", second)
    with one.writing("table", ALICE) as lease:
        one.intend(lease, 4, 4096)
        assert other.garbage("table") == {}, "it is being written"
    assert other.garbage("table") == {lease.stamp: (4, 4096)}, "and never was finished"
    one.admit("table", second.stamp, 4, 4096)  # what has failed at the very end, and is there all the same
    assert second.stamp not in other.garbage("table")


def test_a_reader_that_is_not_heard_of(machine):
    one, gone = machine("one"), machine("gone", lease_s=0.1)
    first = publish(one)
    gone.mark("table", first.stamp)
    publish(one)
    assert one.garbage("table") == {}
    time.sleep(1.2)  # ten leases
    assert one.garbage("table") == {first.stamp: (4, 4096)}


_SOUND = {"format": 1, "stamp": 1, "pages": 4, "page_bytes": 4096, "uid": 0, "gid": 0, "mode": 0o600, "crc": 0}
_WRONG = (
    {"format": 2}, {"pages": 0}, {"pages": 1 << 40}, {"page_bytes": 5}, {"mode": 0o7777}, {"uid": -1}, {"stamp": "x"},
    {"stamp": True}, {"crc": 1.5}, {"pages": None},
)  # fmt: skip
_RUBBISH = [b"", b"{", b"[]", b"1", b"null", b"\xff", b"{}", b"[" * 2000, b" " * 5000]


@pytest.mark.parametrize("raw", _RUBBISH + [json.dumps({**_SOUND, **wrong}).encode() for wrong in _WRONG])
def test_what_is_on_a_server_is_not_trusted(machine, server, raw):
    server.client().set("gmem:T:{p.table}:head", raw)
    assert refused(machine("one").head, "table") == errno.EIO


def test_more_rubbish(machine, server):
    client, one = server.client(), machine("one")
    old = {"x": "1 2", "1": "a b", "2": "4", "3": "0 4096", "4": "4 5", "5": "4 4096"}
    client.hset("gmem:T:{p.table}:old", mapping=old)
    client.zadd("gmem:T:{p.table}:readers", {"nonsense": 1e15, "5": 1e15})
    assert one.garbage("table") == {}
    client.zrem("gmem:T:{p.table}:readers", "5")
    assert one.garbage("table") == {5: (4, 4096)}
    client.set("gmem:T:{p.table}:lease", b"\xff\xfe", px=500)
    assert refused(lambda: one.writing("table", ALICE).__enter__()) == errno.EBUSY


def test_nobody_answers(machine, server):
    one = machine("one", timeout_s=0.3)
    head = publish(one)
    server.pause()
    try:
        assert refused(one.head, "table") == errno.ETIMEDOUT
        assert refused(lambda: one.writing("table", ALICE).__enter__()) == errno.ETIMEDOUT
    finally:
        server.go_on()
    assert one.head("table") == head


def test_too_few_replicas(machine):
    assert refused(publish, machine("one", replicas=1, timeout_s=0.5)) == errno.ENODATA
    assert machine("other").head("table") is None
