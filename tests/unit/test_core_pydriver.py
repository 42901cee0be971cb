# SPDX-License-Identifier: Apache-2.0
"""Drivers written in Python behind the real core: pages leave for a dictionary and come back."""

import errno
import gc
import os
import sys
import threading
import weakref
from pathlib import Path

import pytest

_core = pytest.importorskip("gmemd._core")
UNIT = str(Path(__file__).resolve().parent)
PAGE = 4096


@pytest.fixture(scope="module")
def pagestore():
    sys.path.insert(0, UNIT)
    try:
        import pagestore

        yield pagestore
    finally:
        sys.path.remove(UNIT)


@pytest.fixture
def core():
    core = _core.Core()
    yield core
    core.close()


def attach(core, driver, **config):
    return core.device_attach("pagestore", "store", config, driver)


def refusal(call, *args, **kwargs):
    with pytest.raises(OSError) as caught:
        call(*args, **kwargs)
    return caught.value.errno, caught.value.strerror


def test_attach_info_and_detach(core, pagestore):
    store = pagestore.PageStore()
    hnid = attach(core, store, capacity=str(1 << 20))
    row = core.hnodes()[hnid]
    assert (row["name"], row["driver"], row["capacity_bytes"], row["latency_ns"]) == ("store", "pagestore", 1 << 20, 7)
    assert row["caps"] == 0x1010, "a peer, and slow since it is Python"
    assert row["page_bytes_mask"] == 1 << 12 | 1 << 16 | 1 << 21
    assert store.name == "store" and not store.removed
    references = sys.getrefcount(store)
    core.device_detach(hnid)
    assert store.removed and sys.getrefcount(store) == references - 1
    assert len(core.hnodes()) == 1


@pytest.mark.parametrize(
    "name, config, number, words",
    [
        ("PageStore", {"colour": "red"}, errno.EINVAL, "unknown option 'colour'"),
        ("PageStore", {"capacity": "-5"}, errno.EINVAL, "capacity: negative"),
        ("PageStore", {"capacity": "many"}, errno.EINVAL, "invalid literal"),
        ("PageStore", {"capacity": "100"}, errno.EINVAL, "smaller than one page"),
        ("PageStore", {"fail": "info"}, errno.EIO, "could not be set up"),
        ("Lying", {}, errno.EIO, "could not be set up"),
        ("Unknown", {}, errno.EIO, "could not be set up"),
    ],
)
def test_what_a_driver_refuses_is_said(core, pagestore, name, config, number, words):
    driver = getattr(pagestore, name)()
    got, text = refusal(attach, core, driver, **config)
    assert got == number and words in text
    assert len(core.hnodes()) == 1
    alive = weakref.ref(driver)
    del driver
    gc.collect()
    assert alive() is None, "nothing keeps a driver that was refused"


def test_a_peer_without_its_ops_is_refused(core):
    class Half:
        def probe(self, name, config):
            pass

        def info(self):
            from gmemd.drivers import Info

            return Info(1 << 20)

    assert refusal(attach, core, Half()) == (
        errno.EINVAL,
        "driver: a peer needs peer_map and peer_unmap, or their batches",
    )


def test_several_are_told_apart(core, pagestore):
    stores = [pagestore.PageStore() for _ in range(4)]
    threads = [
        threading.Thread(target=core.device_attach, args=("pagestore", f"s{n}", {"capacity": str(n + 1 << 20)}, store))
        for n, store in enumerate(stores)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [store.name for store in stores] == ["s0", "s1", "s2", "s3"]
    by_name = {row["name"]: row["capacity_bytes"] for row in core.hnodes()[1:]}
    assert by_name == {f"s{n}": n + 1 << 20 for n in range(4)}


def test_health(core, pagestore):
    class Ailing(pagestore.PageStore):
        sick = False

        def health(self):
            if self.sick:
                raise OSError(errno.ENODEV, "it fell off the bus")

        def last_error(self):
            return "it fell off the bus" if self.sick else ""

    driver = Ailing()
    hnid = attach(core, driver)
    assert core.hnodes()[hnid]["health"] == 0 and core.hnodes()[hnid]["last_error"] == ""
    driver.sick = True
    assert core.hnodes()[hnid]["health"] == -errno.ENODEV
    assert core.hnodes()[hnid]["last_error"] == "it fell off the bus"


def test_closing_the_core_removes_drivers_and_ends_calls(pagestore):
    core = _core.Core()
    store = pagestore.PageStore()
    attach(core, store)
    core.close()
    core.close()
    assert store.removed
    for call in (core.stats, core.hnodes, core.event_fd, core.reap):
        assert refusal(call)[0] == errno.ESHUTDOWN
    assert refusal(core.session_create, 0, 1)[0] == errno.ESHUTDOWN
    read, write = os.pipe()
    assert refusal(core.session_attach, 1, read, write)[0] == errno.ESHUTDOWN
    for fd in (read, write):
        with pytest.raises(OSError):
            os.fstat(fd)


@pytest.fixture
def rig(run_daemon, run_client, monkeypatch):
    """A daemon with a page store, and a client with one filled region."""
    monkeypatch.setenv("PYTHONPATH", UNIT + os.pathsep + os.environ.get("PYTHONPATH", ""))

    def rig(*options, bytes=1 << 20, page_bytes=65536, driver="pagestore:PageStore"):
        daemon = run_daemon("--device", ",".join(("name=store", f"driver={driver}", *options)))
        assert daemon.said == "READY=1\n", daemon.log
        client = run_client(daemon.socket)
        region = client.ask("mmap", bytes=bytes, page_bytes=page_bytes)
        place = {"va": region["va"], "bytes": bytes}
        client.ask("fill", **place, step=PAGE)
        return daemon, client, place

    return rig


def store_row(daemon):
    return daemon.ctl("devices")["devices"][1]


def to(client, hnid, place):
    return client.ask("request", op="prefetch", args={"hnid": hnid, **place})


@pytest.mark.parametrize("page_bytes", [4096, 65536, 2 << 20])
def test_pages_leave_and_come_back(rig, page_bytes):
    daemon, client, place = rig(bytes=4 << 20, page_bytes=page_bytes)
    assert to(client, 1, place)["ok"]
    row = store_row(daemon)
    assert row["used_bytes"] == row["in_bytes"] == 4 << 20 and row["driver"] == "pagestore:PageStore"
    assert daemon.ctl("devices")["devices"][0]["used_bytes"] == 0, "the host's memory was given back"
    assert client.ask("check", **place, step=PAGE) == 0
    assert store_row(daemon)["out_bytes"] == 4 << 20
    assert to(client, 1, place)["ok"] and to(client, 0, place)["ok"]
    assert client.ask("check", **place, step=PAGE) == 0


def test_detach_brings_pages_home(rig):
    daemon, client, place = rig()
    assert to(client, 1, place)["ok"]
    daemon.ctl("detach", "store")
    assert client.ask("check", **place, step=PAGE) == 0
    assert len(daemon.ctl("devices")["devices"]) == 1


def test_a_stop_brings_pages_home(rig):
    daemon, client, place = rig()
    assert to(client, 1, place)["ok"]
    assert daemon.stop() == 0
    assert client.ask("check", **place, step=PAGE) == 0


def test_the_end_of_a_session_frees_its_pages(rig, eventually):
    daemon, client, place = rig()
    assert to(client, 1, place)["ok"]
    client.process.kill()
    eventually(lambda: not daemon.ctl("sessions")["sessions"])
    eventually(lambda: store_row(daemon)["used_bytes"] == 0)
    assert "driver failed" not in daemon.log, "peer_free was asked for exactly what was there"


@pytest.mark.parametrize("fail, numbers", [("peer_map", (errno.ENOSPC, errno.ENOMEM)), ("keep", (errno.EIO,))])
def test_a_page_that_can_not_be_stored_stays(rig, fail, numbers):
    daemon, client, place = rig(f"fail={fail}")
    reply = to(client, 1, place)
    assert reply["ok"] is False and reply["error"]["errno"] in numbers, reply
    assert client.ask("check", **place, step=PAGE) == 0
    assert "driver failed" in daemon.log


def test_a_page_that_can_not_be_read_back_is_an_error_and_no_zeros(rig):
    daemon, client, place = rig("fail=peer_unmap")
    assert to(client, 1, place)["ok"]
    client.send("read", va=place["va"], size=8)
    assert client.process.wait(20) == -7, "SIGBUS"
    assert "the store is broken" in daemon.log
    assert daemon.ctl("status")["pid"] == daemon.process.pid


def test_capacity_is_kept(rig):
    daemon, client, place = rig(f"capacity={512 << 10}")
    to(client, 1, place)
    assert store_row(daemon)["peak_bytes"] <= 512 << 10
    assert client.ask("check", **place, step=PAGE) == 0


@pytest.mark.parametrize("page_bytes", [4096, 65536, 2 << 20])
def test_batches(rig, page_bytes):
    daemon, client, place = rig(bytes=4 << 20, page_bytes=page_bytes, driver="pagestore:Batches")
    assert to(client, 1, place)["ok"]
    row = store_row(daemon)
    assert row["assured_bytes"] == row["capacity_bytes"] // 2
    assert (row["stored_page_bytes"], row["stored_bytes"], row["raw_pages"]) == (4 << 20, 2 << 20, 1)
    assert row["stored_pages"] == (4 << 20) // page_bytes
    assert client.ask("check", **place, step=PAGE) == 0
    assert to(client, 1, place)["ok"] and to(client, 0, place)["ok"]
    assert client.ask("check", **place, step=PAGE) == 0


@pytest.mark.parametrize("fail", ["peer_map_batch", "some", "short"])
def test_a_batch_that_fails_loses_nothing(rig, fail):
    daemon, client, place = rig(f"fail={fail}", driver="pagestore:Batches", page_bytes=4096)
    reply = to(client, 1, place)
    assert reply["ok"] is False and reply["error"]["errno"] in (errno.ENOSPC, errno.ENOMEM, errno.EIO), reply
    assert client.ask("check", **place, step=PAGE) == 0
    assert "driver failed" in daemon.log
    if fail != "some":
        assert store_row(daemon)["used_bytes"] == 0
