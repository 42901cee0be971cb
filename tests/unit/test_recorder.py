# SPDX-License-Identifier: Apache-2.0
"""Recordings: one at a time, whose answers can be asked for again, and which end with whoever asked for them."""

import errno

import pytest

from gmemd.devices import DeviceTable
from gmemd.drivers.registry import Registry
from gmemd.errors import RequestError
from gmemd.recorder import Recorder
from gmemd.sessions import SessionTable


class Rig:
    def __init__(self, core):
        self.core = core
        self.sessions = SessionTable(core, sessions_per_uid=9, contexts_per_session=9, publish=lambda *_: None)
        devices = DeviceTable(core, Registry(core.driver_builtin), self.sessions, lambda *_: None)
        devices.attach("simgpu", "g0", {})
        self.recorder = Recorder(core, self.sessions, devices)

    def admin(self, pid=77):
        return self.sessions.open(0, 0, pid, True, lambda reason: None)

    def see(self, *pages):
        self.core.tracing += [page.to_bytes(32, "little") for page in pages]

    def read(self, owner, position):
        reply = self.recorder.read(owner, position)
        data = reply["records"]
        pages = [int.from_bytes(data[at : at + 32], "little") for at in range(0, len(data), 32)]
        return pages, reply["running"]


@pytest.fixture
def rig(fake_core):
    return Rig(fake_core)


def refusal(call, *args):
    with pytest.raises(RequestError) as caught:
        call(*args)
    return caught.value.code, caught.value.argument


def test_from_start_to_end(rig):
    owner = rig.admin()
    header = rig.recorder.start(owner, None, "g0", 1 << 20)
    assert [(h["hnid"], h["name"], h["policy"]) for h in header["hnodes"]] == [(0, "host", "acme"), (1, "g0", "acme")]
    assert rig.core.called("trace_start") == [(0, 1, 1 << 20)]
    assert rig.read(owner, 0) == ([], True)
    rig.see(1, 2, 3)
    assert rig.read(owner, 0) == ([1, 2, 3], True)
    rig.see(4)
    assert rig.read(owner, 0) == ([1, 2, 3], True), "the answer may not have come"
    assert rig.read(owner, 3) == ([4], True)
    assert refusal(rig.recorder.read, owner, 0) == ("EINVAL", "position")
    assert refusal(rig.recorder.read, owner, 5) == ("EINVAL", "position")
    rig.see(5)
    rig.recorder.stop(owner)
    assert rig.read(owner, 4) == ([5], True)
    rig.core.trace_lost = 9
    assert rig.recorder.read(owner, 5) == {"records": b"", "lost": 9, "running": False}
    assert rig.core.tracing is None
    assert refusal(rig.recorder.read, owner, 5) == ("ENOENT", None)
    assert refusal(rig.recorder.stop, owner) == ("ENOENT", None)
    rig.recorder.start(owner, None, None, 0)
    rig.see(6)
    assert rig.read(owner, 0) == ([6], True)


def test_one_at_a_time_and_its_owners_only(rig):
    owner, other = rig.admin(), rig.admin(78)
    rig.recorder.start(owner, None, None, 0)
    with pytest.raises(RequestError, match="process 77") as caught:
        rig.recorder.start(other, None, None, 0)
    assert caught.value.errno == errno.EBUSY
    assert refusal(rig.recorder.read, other, 0) == ("ENOENT", None)
    assert refusal(rig.recorder.stop, other) == ("ENOENT", None)
    rig.sessions.end(other, "gone")
    assert rig.read(owner, 0) == ([], True)


def test_it_ends_with_the_connection(rig):
    owner = rig.admin()
    rig.recorder.start(owner, None, None, 0)
    rig.sessions.end(owner, "gone")
    assert rig.core.tracing is None
    assert refusal(rig.recorder.start, owner, None, None, 0) == ("ESTALE", None)
    assert rig.core.tracing is None
    rig.recorder.start(rig.admin(), None, None, 0)


def test_what_is_not_there(rig):
    owner = rig.admin()
    assert refusal(rig.recorder.start, owner, 5, None, 0) == ("ENOENT", "session")
    assert refusal(rig.recorder.start, owner, None, "g1", 0) == ("ENOENT", "device")
    rig.core.fail["trace_start"] = errno.ENOMEM
    with pytest.raises(OSError):
        rig.recorder.start(owner, None, None, 0)
    del rig.core.fail["trace_start"]
    rig.recorder.start(owner, None, None, 0)
