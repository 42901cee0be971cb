# SPDX-License-Identifier: Apache-2.0
import asyncio
import re
from pathlib import Path

import msgpack
import pytest
import zmq

from gmemd.devices import DeviceTable
from gmemd.drivers.registry import Registry
from gmemd.events import EventPump, Publisher
from gmemd.sessions import Context, SessionTable
from gmemd.watch import Watch


@pytest.fixture
def rig(fake_core):
    """pump() by hand; what would be deferred runs at once."""
    published = []
    publish = lambda topic, fields: published.append((topic, fields))  # noqa: E731
    sessions = SessionTable(fake_core, sessions_per_uid=9, contexts_per_session=9, publish=publish)
    devices = DeviceTable(fake_core, Registry(fake_core.driver_builtin), sessions, publish)
    pump = EventPump(fake_core, sessions, devices, publish, lambda function, *args: function(*args),
                     Watch(fake_core, devices.name_of, 0))  # fmt: skip

    def post(*events):
        for event in events:
            fake_core.post(**event)

        async def run():
            pump.pump()

        asyncio.run(run())
        return published

    post.sessions, post.devices, post.published = sessions, devices, published
    return post


def test_a_session_whose_process_is_gone_ends(rig, fake_core):
    told = []
    session = rig.sessions.open(fake_core.session_create(1, 1), 1, 1, False, told.append)
    rig({"type": "view_gone", "session": session.core_id})
    assert told == ["process ended"] and not fake_core.sessions


def test_a_context_whose_process_is_gone_ends_alone(rig, fake_core):
    session = rig.sessions.open(fake_core.session_create(1, 1), 1, 1, False, lambda reason: None)
    told = []
    rig.sessions.open_context(session, Context(9, session, 1, 1, told.append))
    rig({"type": "view_gone", "session": session.core_id, "value": 9})
    assert told == ["process ended"] and len(fake_core.sessions) == 1
    rig({"type": "view_gone", "session": session.core_id, "value": 9})


def test_a_child_that_never_said_hello_is_destroyed(rig, fake_core):
    child = fake_core.session_create(1, 0)
    rig({"type": "fork", "session": 7, "value": child}, {"type": "view_gone", "session": child})
    assert not fake_core.sessions
    rig({"type": "view_gone", "session": child})


@pytest.mark.parametrize(
    "event, topic, fields",
    [
        ({"type": "poisoned", "session": 3, "va": 4096, "error": -5}, "page.poisoned",
         {"session": 3, "va": 4096, "errno": 5}),
        ({"type": "segv", "session": 3, "va": 1, "value": 8}, "context.segv", {"session": 3, "context": 8, "va": 1}),
        ({"type": "not_acquired", "session": 3, "va": 1, "value": 8}, "context.not_acquired",
         {"session": 3, "context": 8, "va": 1}),
        ({"type": "device_lost", "hnid": 1}, "device.lost", {"hnid": 1, "name": "g0"}),
        ({"type": "pressure", "hnid": 1}, "memory.pressure",
         {"hnid": 1, "name": "g0", "used_bytes": 0, "capacity_bytes": 1 << 20, "session": 0}),
        ({"type": "pressure", "hnid": 1, "session": 4}, "memory.pressure",
         {"hnid": 1, "name": "g0", "used_bytes": 0, "capacity_bytes": 1 << 20, "session": 4}),
    ],
)  # fmt: skip
def test_what_is_told(rig, event, topic, fields):
    rig.devices.attach("simgpu", "g0", {})
    rig.published.clear()
    assert rig(event) == [(topic, fields)]


def test_pressure_is_told_once_in_a_while(rig):
    rig.devices.attach("simgpu", "g0", {})
    rig.published.clear()
    rig(*[{"type": "pressure", "hnid": 1}] * 100)
    assert len(rig.published) == 1


def test_errors_and_unknown_types_are_only_logged(rig, capsys):
    assert rig({"type": "error", "session": 3, "va": 4096, "error": -14}, {"type": "99"}) == []
    text = capsys.readouterr().out
    assert "fault not resolved" in text and "unknown event" in text


def test_the_publisher_sends_from_any_thread_and_never_blocks(tmp_path):
    context = zmq.Context()
    endpoint = f"ipc://{tmp_path}/events.sock"

    async def main():
        publisher = Publisher(context, endpoint)
        publisher.publish("too.early", {})
        publisher.start()
        subscriber = context.socket(zmq.SUB)
        subscriber.setsockopt(zmq.LINGER, 0)
        subscriber.setsockopt(zmq.RCVTIMEO, 5000)
        subscriber.subscribe("memory.")
        subscriber.connect(endpoint)
        await asyncio.sleep(0.2)
        await asyncio.to_thread(publisher.publish, "memory.pressure", {"hnid": 1})
        await asyncio.to_thread(publisher.publish, "device.lost", {"hnid": 1})
        await asyncio.to_thread(publisher.publish, "memory.pressure", {"hnid": 2})
        frames = [await asyncio.to_thread(subscriber.recv_multipart) for _ in range(2)]
        for number in range(5000):  # far beyond what the socket keeps for a subscriber that does not read
            publisher.publish("memory.pressure", {"hnid": number})
        await asyncio.sleep(0.05)
        publisher.close()
        publisher.publish("too.late", {})
        await asyncio.sleep(0.01)
        subscriber.close()
        return frames, publisher

    frames, publisher = asyncio.run(main())
    publisher.publish("after.the.loop", {})
    context.term()
    assert [(topic, msgpack.unpackb(body)) for topic, body in frames] == [
        (b"memory.pressure", {"hnid": 1}),
        (b"memory.pressure", {"hnid": 2}),
    ]


def test_the_protocol_page_has_every_topic():
    root = Path(__file__).resolve().parents[2]
    source = "".join(
        (root / "gmemd" / name).read_text() for name in ("events.py", "devices.py", "sessions.py", "admission.py")
    )
    topics = set(re.findall(r'"((?:device|memory|session|page|context|thread)\.[a-z_]+)"', source))
    listed = set(
        re.findall(r"^\| `([a-z]+\.(?!sock)[a-z_]+)` \|", (root / "docs" / "protocol.md").read_text(), re.MULTILINE)
    )
    assert topics == listed and len(topics) == 11
