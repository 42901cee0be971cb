# SPDX-License-Identifier: Apache-2.0
import errno
import threading

import pytest

from gmemd.caps import cap_mask, cap_names, page_mask, page_sizes
from gmemd.devices import DeviceTable
from gmemd.drivers.registry import Registry
from gmemd.errors import RequestError
from gmemd.sessions import Context, SessionTable


@pytest.fixture
def published():
    return []


@pytest.fixture
def sessions(fake_core):
    return SessionTable(fake_core, sessions_per_uid=9, contexts_per_session=9, publish=lambda topic, fields: None)


@pytest.fixture
def devices(fake_core, sessions, published):
    registry = Registry(fake_core.driver_builtin)
    return DeviceTable(fake_core, registry, sessions, lambda topic, fields: published.append((topic, fields)))


def refusal(call, *args):
    with pytest.raises(RequestError) as caught:
        call(*args)
    return caught.value.errno, caught.value.argument


def test_attach_and_detach(devices, fake_core, published):
    assert devices.attach("simgpu", "simgpu0", {"capacity": "48M"}) == 1
    assert fake_core.called("device_attach") == [("simgpu", "simgpu0", {"capacity": "48M"}, None, 0)]
    assert devices.names() == ["simgpu0"] and devices.name_of(1) == "simgpu0" and devices.name_of(0) == "host"
    assert devices.describe(1)["caps"] == ["replayable", "compute"]
    devices.detach("simgpu0", False)
    assert fake_core.called("device_detach") == [(1, False)]
    assert devices.names() == [] and devices.describe(1) is None
    assert [topic for topic, _ in published] == ["device.attached", "device.detached"]
    assert published[0][1] == {"hnid": 1, "name": "simgpu0", "driver": "simgpu", "capacity_bytes": 1 << 20}


def test_refusals_name_the_argument(devices, fake_core):
    devices.attach("simgpu", "simgpu0", {})
    assert refusal(devices.attach, "simgpu", "simgpu0", {}) == (errno.EEXIST, "name")
    assert refusal(devices.attach, "simgpu", "host", {}) == (errno.EEXIST, "name")
    assert refusal(devices.attach, "nope", "x", {}) == (errno.ENOENT, "driver")
    assert refusal(devices.detach, "x", False) == (errno.ENOENT, "name")
    fake_core.fail["device_attach"] = OSError(errno.EINVAL, "nope: no such option")
    assert refusal(devices.attach, "simgpu", "x", {"nope": "1"}) == (errno.EINVAL, "config")
    fake_core.fail["device_detach"] = errno.EBUSY
    assert refusal(devices.detach, "simgpu0", False) == (errno.EBUSY, "name")
    assert devices.names() == ["simgpu0"]


def test_a_name_is_busy_while_it_comes_or_goes(devices, fake_core, eventually):
    gate = fake_core.delay["device_attach"] = threading.Event()
    thread = threading.Thread(target=devices.attach, args=("simgpu", "a", {}))
    thread.start()
    eventually(lambda: fake_core.called("device_attach"))
    assert refusal(devices.attach, "simgpu", "a", {}) == (errno.EBUSY, "name")
    assert refusal(devices.detach, "a", False) == (errno.ENOENT, "name")
    gate.set()
    thread.join(5)
    gate = fake_core.delay["device_detach"] = threading.Event()
    thread = threading.Thread(target=devices.detach, args=("a", False))
    thread.start()
    eventually(lambda: fake_core.called("device_detach"))
    assert refusal(lambda: devices.hold("a").__enter__()) == (errno.EBUSY, "device")
    gate.set()
    thread.join(5)
    assert refusal(lambda: devices.hold("a").__enter__()) == (errno.ENOENT, "device")


def test_detach_waits_for_a_hold(devices, fake_core):
    devices.attach("simgpu", "a", {})
    with devices.hold("a") as hnid:
        assert hnid == 1
        thread = threading.Thread(target=devices.detach, args=("a", False))
        thread.start()
        thread.join(0.1)
        assert thread.is_alive() and not fake_core.called("device_detach")
    thread.join(5)
    assert fake_core.called("device_detach")


def test_detach_with_open_contexts(devices, fake_core, sessions):
    devices.attach("simgpu", "a", {})
    session = sessions.open(fake_core.session_create(1, 1), 1, 1, False, lambda reason: None)
    told = []
    sessions.open_context(session, Context(77, session, 1, 1, told.append))
    assert refusal(devices.detach, "a", False) == (errno.EBUSY, "name")
    assert not told and not fake_core.called("device_detach")
    devices.detach("a", True)
    assert told == ["device a was detached"] and fake_core.called("device_detach") == [(1, True)]


@pytest.mark.parametrize("hnid, least, known", [(0, 0, True), (1, 0, True), (2, 0, False), (-1, 0, False),
                                                (-1, -1, True),
                                                (15, -1, False)])  # fmt: skip
def test_check_hnid(devices, hnid, least, known):
    devices.attach("simgpu", "a", {})
    if known:
        devices.check_hnid(hnid, least)
    else:
        assert refusal(devices.check_hnid, hnid, least) == (errno.EINVAL, "hnid")


def test_caps_and_page_sizes():
    assert cap_names(0x1041) == ["replayable", "compute", "slow"]
    assert cap_mask(["replayable", "compute", "slow"]) == 0x1041
    assert page_sizes(1 << 12 | 1 << 21) == [4096, 2 << 20] and page_mask([4096, 2 << 20]) == 1 << 12 | 1 << 21
    with pytest.raises(ValueError, match="unknown capability 'fast'"):
        cap_mask(["fast"])
    for size in (0, -4096, 5000):
        with pytest.raises(ValueError, match="power of two"):
            page_mask([size])


def test_tiers_stand_in_the_order_of_their_places(devices, fake_core):
    fake_core.tiers = {"simgpu"}
    for name, config in [("a", {}), ("b", {"tier": "7"}), ("c", {}), ("d", {"tier": "0"})]:
        devices.attach("simgpu", name, config)
    assert "tier" not in fake_core.called("device_attach")[1][2], "the driver is not asked"
    order = sorted(fake_core.ranks, key=fake_core.ranks.__getitem__)
    assert [devices.name_of(hnid) for hnid in order] == ["d", "b", "a", "c"]
    devices.detach("a", False)
    devices.attach("simgpu", "e", {})
    order = sorted(fake_core.ranks, key=fake_core.ranks.__getitem__)
    assert [devices.name_of(hnid) for hnid in order] == ["d", "b", "c", "e"], "a number that is used again"


@pytest.mark.parametrize("place", ["", "-1", "1000", "first", "1.5"])
def test_a_bad_place(devices, fake_core, place):
    fake_core.tiers = {"simgpu"}
    assert refusal(devices.attach, "simgpu", "a", {"tier": place}) == (errno.EINVAL, "config")
    assert not fake_core.called("device_attach") and devices.names() == []


def test_a_place_for_what_is_no_tier(devices, fake_core):
    devices.attach("simgpu", "plain", {})
    assert refusal(devices.attach, "simgpu", "a", {"tier": "1"}) == (errno.EINVAL, "config")
    assert fake_core.called("device_detach") == [(2, True)] and devices.names() == ["plain"]


def test_quotas_of_the_configuration(fake_core, sessions):
    quotas = {"session": {"host": 1 << 30, "a": 8 << 20}, "user": {"a": 9 << 20}}
    registry = Registry(fake_core.driver_builtin)
    devices = DeviceTable(fake_core, registry, sessions, lambda topic, fields: None, quotas)
    devices.attach("simgpu", "a", {})
    devices.attach("simgpu", "b", {})
    assert fake_core.called("quota_default") == [(0, 1 << 30, 0), (1, 8 << 20, 9 << 20), (2, 0, 0)]


def test_names_and_hnids(devices):
    devices.attach("simgpu", "a", {})
    assert devices.hnid_of("host") == 0 and devices.hnid_of("a") == 1
    assert refusal(devices.hnid_of, "b") == (errno.ENOENT, "name")
