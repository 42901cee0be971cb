# SPDX-License-Identifier: Apache-2.0
"""What each advice does, on a real daemon; advice on holes; pressure that clients are told of; quotas in the middle
of a kernel."""

import os
import threading
import time

import gmem
import msgpack
import numpy as np
import pytest
import zmq
from helpers import ROOT, eventually

UNIT = str(ROOT / "tests" / "unit")
MIB = 1 << 20


@pytest.fixture(autouse=True)
def stores(monkeypatch):
    """Tiers of the tests' page store."""
    monkeypatch.setenv("PYTHONPATH", UNIT + os.pathsep + os.environ.get("PYTHONPATH", ""))


def store(name, mib):
    return {"name": name, "driver": "pagestore:PageStore", "capacity": mib * MIB}


def array(mib, value):
    return gmem.full(mib * MIB, value, np.uint8, page_size="64K")


def here(a, hnid=0):
    """How much of it has a copy there."""
    return float((gmem.where(a)["valid"] >> hnid & 1).mean())


def row(session, name):
    return next(d for d in session.request("devices")["devices"] if d["name"] == name)


def total(x):
    return int(x.sum(dtype=np.int64))


@pytest.mark.parametrize("policy", ["acme", "s3fifo", "sieve", "clock", "lfu", "lru"])
def test_what_is_cold_leaves_first(connect, policy):
    connect(store("below", 64), settings=[f"host.limit={16 * MIB}", f"daemon.policy={policy}"])
    old, new = array(6, 1), array(6, 2)
    gmem.advise(new, "cold", "host")
    more = array(7, 3)
    assert here(old) == 1 and here(new) < 0.6, "what was used last leaves, as it was said to be cold"
    assert all((a == value).all() for a, value in ((old, 1), (new, 2), (more, 3)))


def test_what_is_cold_leaves_ahead_of_need_once_memory_is_short(connect):
    """Nobody asks for so much room: that a request found none is enough."""
    session = connect("simgpu0:capacity=16M")
    cold, used = array(12, 1), array(6, 2)
    hnid = row(session, "simgpu0")["hnid"]

    def gone():
        gmem.prefetch(cold, "simgpu0")
        gmem.prefetch(used, "simgpu0")  # more than there is room for
        gmem.advise(cold, "cold", "simgpu0")
        for _ in range(100):
            if here(cold, hnid) == 0:
                return here(used, hnid) == 1
            time.sleep(0.001)
        return False

    eventually(gone, "all that is cold leaves, and nothing else")
    assert (cold == 1).all() and (used == 2).all()


def test_read_mostly_pages_have_copies_wherever_they_are_read(session):
    a = array(2, 7)
    gmem.advise(a, "read_mostly")
    with gmem.device("simgpu0").context() as context:
        assert context.launch(total, a).wait() == 7 * a.size
        assert total(a) == 7 * a.size
        pages = gmem.where(a)
        assert (pages["valid"] == 3).all() and (pages["writer"] == -1).all()
        before = session.stats()
        assert context.launch(total, a).wait() == total(a)
        after = session.stats()
        assert before["device_faults"] == after["device_faults"] and before["host_faults"] == after["host_faults"]
        a[:] = 8  # and copies go when one is written
        assert (gmem.where(a)["valid"] == 1).all()
        assert context.launch(total, a).wait() == 8 * a.size


def test_what_a_device_will_use_comes_far_ahead(connect):
    connect("simgpu0:capacity=32M")

    def first(x):
        return int(x[0])

    plain, told = array(2, 4), array(2, 5)
    gmem.advise(told, "accessed_by", "simgpu0")
    with gmem.device("simgpu0").context() as context:
        assert (context.launch(first, plain).wait(), context.launch(first, told).wait()) == (4, 5)
        eventually(lambda: here(told, 1) >= 0.5, "one fault brings a whole window")
        assert here(plain, 1) == 1 / 32
        gmem.advise(told, "not_accessed_by", "simgpu0")
    assert (told == 5).all()


def test_preferred_memory_goes_there_first(connect):
    session = connect(store("near", 64), store("far", 64), settings=[f"host.limit={8 * MIB}"])
    a, hnid = gmem.empty(12 * MIB, np.uint8, page_size="64K"), session.hnid("far")
    gmem.advise(a, "preferred", "far")
    a[:] = 6
    eventually(lambda: here(a, hnid) > 0.2, "what leaves the host passes by the nearer tier")
    assert here(a, session.hnid("near")) == 0
    assert (a == 6).all()


def test_advice_on_memory_that_was_never_touched_makes_none(session):
    a = gmem.empty(4 * MIB, np.uint8, page_size="64K")
    before = row(session, "host")["used_bytes"]
    for advice, device in (("cold", "host"), ("read_mostly", None), ("accessed_by", "simgpu0"), ("preferred", "host")):
        gmem.advise(a, advice, device)
    gmem.discard(a)
    assert row(session, "host")["used_bytes"] == before and not (gmem.where(a)["state"] != 0).any()
    gmem.advise(a, "pinned", "host")  # this one is for what is to be there
    assert row(session, "host")["used_bytes"] == before + 4 * MIB
    assert not a.any()


def test_advice_across_a_hole_is_refused_as_a_whole(session):
    a = gmem.empty(4 * MIB, np.uint8, page_size="64K")
    a[:] = 9
    va, end = a.ctypes.data, a.ctypes.data + a.nbytes
    hole = 1 << 40  # nothing of this session is behind its last region
    for advice in ("cold", "pinned", "read_mostly", "prefetch", "discard", "accessed_by", "preferred"):
        op = {"op": advice} if advice in ("prefetch", "discard") else {"op": "advise", "advice": advice}
        request = {"hnid": 0, "va": va, "bytes": end - va + hole} | {k: v for k, v in op.items() if k != "op"}
        if advice == "discard":
            del request["hnid"]
        with pytest.raises(gmem.InvalidArgument) as caught:
            session.request(op["op"], **request)
        assert "va" in str(caught.value) or "bytes" in str(caught.value), advice
    pages = gmem.where(a)
    assert (pages["valid"] == 1).all() and not (pages["flags"] & 0x0A).any(), "nothing has been done"
    assert (a == 9).all()


def test_clients_are_told_of_pressure(connect):
    session = connect(store("below", 64), settings=[f"host.limit={8 * MIB}"])
    with zmq.Context() as context, context.socket(zmq.SUB) as events:
        events.setsockopt(zmq.LINGER, 0)
        events.setsockopt(zmq.RCVTIMEO, 10_000)
        events.subscribe("memory.pressure")
        events.connect("ipc://" + os.path.join(os.path.dirname(session.path), "events.sock"))
        stop = threading.Event()
        arrays = []

        def fill():
            while not stop.is_set():  # whoever subscribes hears what happens from then on
                arrays[:] = [array(12, 1)]

        worker = threading.Thread(target=fill)
        worker.start()
        try:
            topic, body = events.recv_multipart()
        finally:
            stop.set()
            worker.join()
    assert topic == b"memory.pressure" and msgpack.unpackb(body)["hnid"] == 0


def test_a_quota_that_is_reached_in_the_middle_of_a_kernel(connect):
    """It makes room among its own pages, and goes on; so it does when the quota is lowered while it runs."""
    session = connect("simgpu0:capacity=32M")
    a, b = array(12, 2), array(12, 0)
    keep = array(2, 1)
    gmem.prefetch(keep, "simgpu0")
    session.request("quota", name="simgpu0", bytes=6 * MIB)

    def slow_sum(x, y, rounds):
        return [int((x[at : at + 65536] + y[at : at + 65536]).sum(dtype=np.int64)) for _ in range(rounds)
                for at in range(0, x.size, 65536)]  # fmt: skip

    with gmem.device("simgpu0").context() as context:
        fence = context.launch(slow_sum, a, b, 4)
        me = session.request("sessions")["sessions"][0]
        session.request("quota", name="simgpu0", bytes=4 * MIB)
        assert set(fence.wait(60)) == {2 * 65536}
        me = next(s for s in session.request("sessions")["sessions"] if s["pid"] == os.getpid())
        assert me["resident_bytes"][str(session.hnid("simgpu0"))] <= 4 * MIB
        assert context.launch(lambda x: x.fill(3), b).wait(60) is None
    assert (b == 3).all() and (a == 2).all() and (keep == 1).all()
