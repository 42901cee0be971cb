# SPDX-License-Identifier: Apache-2.0
"""The real ROUTER server over a core that only keeps books."""

import ctypes
import errno
import itertools
import os
import threading
import time

import msgpack
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gmemd import __version__, schema
from gmemd.devices import DeviceTable
from gmemd.drivers.registry import Registry
from gmemd.ops import Operations
from gmemd.server import Server, make_identities_random
from gmemd.sessions import Context, SessionTable
from gmemd.watch import Watch

VA = 0x660000000000


class Rig:
    def __init__(self, core, directory):
        self.core = core
        self.context = zmq.Context()
        self.endpoint = f"ipc://{directory}/control.sock"
        self.published = []
        publish = lambda topic, fields: self.published.append((topic, fields))  # noqa: E731
        drivers = Registry(core.driver_builtin)
        self.sessions = SessionTable(core, sessions_per_uid=100, contexts_per_session=8, publish=publish)
        self.devices = DeviceTable(core, drivers, self.sessions, publish)
        operations = Operations(core, self.sessions, self.devices, drivers, Watch(core, self.devices.name_of, 0))
        self.server = Server(self.context, self.endpoint, self.sessions, operations, workers=8, requests_in_flight=20)
        self.server.start()
        self.ids = itertools.count(1)
        self.dealers = []

    def session(self, uid=1000, admin=False, memory=True):
        core_id = self.core.session_create(uid, 1) if memory else 0
        return self.sessions.open(core_id, uid, os.getpid(), admin, lambda reason: None)

    def dealer(self):
        dealer = self.context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.RCVTIMEO, 10_000)
        dealer.connect(self.endpoint)
        self.dealers.append(dealer)
        return dealer

    def ask(self, session, op, /, dealer=None, **args):
        dealer = dealer or self.dealer()
        request_id = next(self.ids)
        dealer.send(msgpack.packb({"v": 1, "id": request_id, "op": op, "token": session.token, **args}))
        reply = msgpack.unpackb(dealer.recv())
        assert reply.pop("id") == request_id
        return reply

    def error(self, session, op, /, **args):
        reply = self.ask(session, op, **args)
        assert reply["ok"] is False, reply
        return reply["error"]["code"], reply["error"].get("argument")

    def close(self):
        for event in self.core.delay.values():
            event.set()
        self.server.stop(5)
        for dealer in self.dealers:
            dealer.close()
        self.context.term()


@pytest.fixture
def rig(fake_core, tmp_path):
    rig = Rig(fake_core, tmp_path)
    yield rig
    rig.close()


def test_every_op_answers(rig):
    admin = rig.session(uid=0, admin=True)
    assert rig.ask(admin, "ping") == {"ok": True, "version": __version__, "pid": os.getpid()}
    assert rig.ask(admin, "attach", driver="simgpu", name="g0", config={"capacity": "1M"}) == {"ok": True, "hnid": 1}
    region = rig.ask(admin, "mmap", bytes=8192)
    assert region == {"ok": True, "va": VA, "bytes": 8192, "offset": 0, "page_bytes": 4096, "huge": False}
    assert rig.ask(admin, "mmap_commit", va=VA) == {"ok": True}
    for op, args in [
        ("advise", {"hnid": 1, "advice": "pinned"}),
        ("advise", {"hnid": -1, "advice": "preferred"}),
        ("prefetch", {"hnid": 1}),
        ("discard", {}),
    ]:
        assert rig.ask(admin, op, va=VA, bytes=8192, **args) == {"ok": True}
    assert rig.ask(admin, "hmemcpy", hnid=-1, dst=VA, src=VA + 4096, bytes=10) == {"ok": True}
    assert rig.core.called("hmemcpy")[-1][1] == 0, "the host is meant by -1"
    query = rig.ask(admin, "query", va=VA, bytes=8192)
    assert query["page_bytes"] == 4096 and len(query["pages"]) == 16
    context = Context(rig.core.context_attach(admin.core_id, 1, *os.pipe(), 5), admin, 1, 5, lambda reason: None)
    rig.sessions.open_context(admin, context)
    assert rig.ask(admin, "contexts")["contexts"] == [{"context": context.id, "hnid": 1, "pid": 5}]
    acquired = rig.ask(admin, "acquire", context=context.id, ranges=[[VA, 4096]], write=True)
    *what, asked = rig.core.called("acquire")[0]
    assert what == [context.id, [(VA, 4096)], True] and asked > 0, "the request's id"
    assert acquired == {"ok": True, "hold": asked}
    assert rig.ask(admin, "release", context=context.id, ranges=[[VA, 4096]]) == {"ok": True}
    assert not rig.core.called("release_named")
    assert rig.ask(admin, "release", context=context.id, holds=[[asked, 0]]) == {"ok": True}
    assert rig.core.called("release_named") == [(context.id, [(asked, 0)])] and len(rig.core.called("release")) == 1
    assert rig.ask(admin, "release", context=context.id)["error"]["argument"] == "ranges"
    assert rig.ask(admin, "context_close", context=context.id) == {"ok": True}
    assert [d["name"] for d in rig.ask(admin, "devices")["devices"]] == ["host", "g0"]
    assert {"name": "simgpu", "builtin": True, "origin": "gmemd"} in rig.ask(admin, "drivers")["drivers"]
    stats = rig.ask(admin, "stats")
    assert stats["stats"]["sessions"] == 1 and len(stats["hnodes"]) == 2
    sessions = rig.ask(admin, "sessions")["sessions"]
    assert sessions[0]["session"] == admin.core_id and sessions[0]["resident_bytes"] == {"0": 4096}
    regions = rig.ask(admin, "map")
    assert regions["total"] == 1
    assert regions["regions"][0] == {"session": admin.core_id, "va": VA, "bytes": 8192, "page_bytes": 4096,
                                     "huge": False,
                                     "fork": "share"}  # fmt: skip
    assert rig.ask(admin, "limit", name="host", bytes=1 << 30) == {"ok": True}
    assert rig.core.called("limit") == [(0, 1 << 30)]
    assert rig.ask(admin, "quota", name="g0", bytes=1 << 30, uid=5) == {"ok": True}
    assert rig.core.called("quota_uid") == [(5, 1, 1 << 30)]
    header = rig.ask(admin, "trace_start", session=admin.core_id, device="g0")
    assert [h["name"] for h in header["hnodes"]] == ["host", "g0"] and header["device"] == "g0"
    assert rig.core.called("trace_start") == [(admin.core_id, 1, 16 << 20)]
    assert rig.ask(admin, "trace_read", position=0) == {"ok": True, "records": b"", "lost": 0, "running": True}
    assert rig.ask(admin, "trace_stop") == {"ok": True}
    assert rig.ask(admin, "trace_read", position=0)["running"] is False
    assert rig.ask(admin, "munmap", va=VA, bytes=8192) == {"ok": True}
    assert rig.ask(admin, "detach", name="g0") == {"ok": True}
    assert rig.ask(admin, "close") == {"ok": True}
    assert rig.error(admin, "ping") == ("EPERM", "token")
    assert not rig.core.sessions
    assert {call[0] for call in rig.core.calls} >= {"mmap", "munmap", "query", "session_destroy", "device_detach"}


def test_bad_arguments_are_named_and_nothing_is_done(rig):
    session = rig.session()
    for op, args, expected in [
        ("mmap", {"bytes": 0}, ("EINVAL", "bytes")),
        ("mmap", {"bytes": -1}, ("EINVAL", "bytes")),
        ("mmap", {"bytes": 1 << 63}, ("EINVAL", "bytes")),
        ("mmap", {"bytes": (1 << 40) + 1}, ("ENOMEM", "bytes")),
        ("munmap", {"va": VA + 5, "bytes": 4096}, ("EINVAL", "va")),
        ("munmap", {"va": 4096, "bytes": 4096}, ("EINVAL", "va")),
        ("discard", {"va": VA + (1 << 40) - 4096, "bytes": 8192}, ("EINVAL", "va")),
        ("prefetch", {"va": VA, "bytes": 1, "hnid": 3}, ("EINVAL", "hnid")),
        ("prefetch", {"va": VA, "bytes": 1, "hnid": -1}, ("EINVAL", "hnid")),
        ("advise", {"va": VA, "bytes": 1, "hnid": -1, "advice": "pinned"}, ("EINVAL", "hnid")),
        ("hmemcpy", {"hnid": 0, "dst": VA, "src": 0, "bytes": 1}, ("EINVAL", "src")),
        ("query", {"va": VA}, ("EINVAL", "bytes")),
        ("acquire", {"context": 1, "ranges": [[VA, 1]], "write": False}, ("ENOENT", "context")),
        ("context_close", {"context": 1}, ("ENOENT", "context")),
        ("context_overlay", {"context": 1, "va": VA, "bytes": 4096}, ("ENOENT", "context")),
        ("context_overlay", {"context": 1, "va": VA + 1, "bytes": 4096}, ("EINVAL", "va")),
        ("explode", {}, ("ENOSYS", "op")),
        ("ping", {"extra": 1}, ("EINVAL", "extra")),
        ("map", {"session": 99}, ("ENOENT", "session")),
        ("quota", {"name": "nope", "bytes": 1 << 21}, ("ENOENT", "name")),
        ("quota", {"name": "host", "bytes": 1 << 21, "session": 1, "uid": 1}, ("EINVAL", "session")),
        ("quota", {"name": "host", "bytes": -1}, ("EINVAL", "bytes")),
    ]:
        assert rig.error(session, op, **args) == expected, (op, args)
    assert {call[0] for call in rig.core.calls} == {"window", "session_create", "session_covers"}  # only looked


def test_a_query_of_too_many_pages(rig):
    session = rig.session()
    assert rig.ask(session, "query", va=VA, bytes=65536 * 4096)["ok"]
    assert rig.error(session, "query", va=VA, bytes=65537 * 4096) == ("EINVAL", "bytes")


@pytest.mark.parametrize(
    "method, op, number, expected",
    [
        ("mmap", "mmap", errno.ENOMEM, ("ENOMEM", "bytes")),
        ("mmap_commit", "mmap_commit", errno.EINVAL, ("EINVAL", "va")),
        ("prefetch", "prefetch", errno.EINVAL, ("EINVAL", "va")),
        ("prefetch", "prefetch", errno.ENOMEM, ("ENOMEM", "bytes")),
        ("prefetch", "prefetch", errno.EIO, ("EIO", None)),
        ("advise", "advise", errno.EINVAL, ("EINVAL", "va")),
        ("discard", "discard", errno.ENOENT, ("ENOENT", None)),
        ("mmap", "mmap", errno.EDQUOT, ("EDQUOT", "bytes")),
        ("quota_session", "quota", errno.EINVAL, ("EINVAL", "bytes")),
        ("quota_session", "quota", errno.EAGAIN, ("EAGAIN", "bytes")),
        ("quota_session", "quota", errno.EDQUOT, ("EDQUOT", "bytes")),
    ],
)
def test_errors_of_the_core_name_the_argument_in_words(rig, method, op, number, expected):
    session = rig.session()
    rig.core.fail[method] = number
    args = {"mmap": {"bytes": 1}, "mmap_commit": {"va": VA}, "prefetch": {"hnid": 0, "va": VA, "bytes": 1},
            "advise": {"hnid": 0, "va": VA, "bytes": 1, "advice": "cold"},
            "discard": {"va": VA, "bytes": 1}, "quota": {"name": "host", "bytes": 1 << 21}}  # fmt: skip
    reply = rig.ask(session, op, **args[op])
    assert (reply["error"]["code"], reply["error"].get("argument")) == expected
    assert len(reply["error"]["message"]) > 20 and reply["error"]["errno"] == number


def test_an_unexpected_exception_is_an_answer_and_tells_nothing(rig):
    session = rig.session()
    rig.core.fail["discard"] = ZeroDivisionError("secret")
    reply = rig.ask(session, "discard", va=VA, bytes=1)
    assert reply["error"]["code"] == "EIO" and "secret" not in reply["error"]["message"]
    assert rig.ask(session, "ping")["ok"]


def test_who_may_ask_what(rig):
    user, admin, tool = rig.session(uid=1000), rig.session(uid=0, admin=True), rig.session(uid=1000, memory=False)
    for op, args in [("attach", {"driver": "os:system", "name": "x"}), ("detach", {"name": "x"}),
                     ("limit", {"name": "host", "bytes": 1 << 30}), ("trace_start", {})]:  # fmt: skip
        assert rig.error(user, op, **args) == ("EPERM", "token")
        assert rig.error(tool, op, **args) == ("EPERM", "token")
    assert not rig.core.called("device_attach")
    assert rig.error(tool, "mmap", bytes=4096) == ("EPERM", "token")
    assert rig.error(tool, "close") == ("EPERM", "token")
    assert rig.ask(tool, "devices")["ok"]
    assert [s["session"] for s in rig.ask(tool, "sessions")["sessions"]] == [user.core_id]
    assert [s["session"] for s in rig.ask(admin, "sessions")["sessions"]] == [user.core_id, admin.core_id]
    assert rig.error(user, "map", session=admin.core_id) == ("ENOENT", "session")
    assert rig.ask(admin, "map", session=user.core_id)["ok"]


def test_a_session_lowers_its_own_quota_only(rig):
    user, other, admin = rig.session(uid=1000), rig.session(uid=1000), rig.session(uid=0, admin=True)
    tool = rig.session(uid=1000, memory=False)
    quota = {"name": "host", "bytes": 8 << 20}
    for session, whose in [(user, {"session": other.core_id}), (user, {"uid": 1000}), (tool, {"uid": 1000})]:
        assert rig.error(session, "quota", **quota, **whose) == ("EPERM", "session")
    assert rig.error(tool, "quota", **quota) == ("EINVAL", "session")
    assert not rig.core.called("quota_session") and not rig.core.called("quota_uid")
    assert rig.ask(user, "quota", **quota)["ok"]
    for size in (0, 9 << 20):
        assert rig.error(user, "quota", name="host", bytes=size) == ("EPERM", "bytes")
    assert rig.ask(user, "quota", name="host", bytes=4 << 20)["ok"]
    assert rig.ask(admin, "quota", name="host", bytes=0, session=user.core_id)["ok"]
    assert rig.core.called("quota_session") == [
        (user.core_id, 0, 8 << 20), (user.core_id, 0, 4 << 20), (user.core_id, 0, 0)]  # fmt: skip
    assert rig.ask(user, "sessions")["sessions"][0]["quota_bytes"] == {"0": 0}


def test_one_sessions_context_is_not_anothers(rig):
    one, other = rig.session(), rig.session()
    rig.sessions.open_context(one, Context(55, one, 1, 5, lambda reason: None))
    for op, args in [
        ("acquire", {"ranges": [[VA, 1]], "write": True}),
        ("release", {"ranges": [[VA, 1]]}),
        ("context_overlay", {"va": VA, "bytes": 4096}),
        ("context_close", {}),
    ]:
        assert rig.error(other, op, context=55, **args) == ("ENOENT", "context")
    assert not rig.core.called("acquire") and not rig.core.called("context_detach")


def test_tokens(rig):
    session = rig.session()
    dealer = rig.dealer()
    for token, code in [(bytes(32), "EPERM"), (session.token[:31] + b"!", "EPERM"), (b"", "EPERM"), (None, "EPERM")]:
        dealer.send(msgpack.packb({"v": 1, "id": 3, "op": "ping", "token": token}))
        reply = msgpack.unpackb(dealer.recv())
        assert (reply["id"], reply["error"]["code"], reply["error"]["argument"]) == (3, code, "token")
    dealer.send(msgpack.packb({"v": 1, "id": 3, "op": "ping"}))
    assert msgpack.unpackb(dealer.recv())["error"]["argument"] == "token"


@pytest.mark.parametrize(
    "frames",
    [
        [b""],
        [b"\xc1"],
        [b"\x91" * 4000],
        [b"\x91" * 500_000],
        [b"a", b"b"],
        [b"", b"x"],
        [b"x"] * 50,
        [b"\xdd\xff\xff\xff\xff"],
    ],
    ids=lambda frames: f"{len(frames)}x{len(frames[0])}",
)
def test_malformed_messages_are_answered_and_the_server_lives(rig, frames):
    dealer, session = rig.dealer(), rig.session()
    dealer.send_multipart(frames)
    reply = msgpack.unpackb(dealer.recv())
    assert reply["id"] == 0 and reply["ok"] is False and reply["error"]["code"] == "EPROTO"
    assert rig.ask(session, "ping", dealer=dealer)["ok"]


def test_a_message_over_the_limit_ends_the_connection_only(rig):
    dealer, session = rig.dealer(), rig.session()
    dealer.setsockopt(zmq.RCVTIMEO, 300)
    dealer.send(b"x" * (schema.MESSAGE_BYTES_MAX + 1))
    with pytest.raises(zmq.Again):
        dealer.recv()
    assert rig.ask(session, "ping")["ok"]


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_messages_are_answered(rig, body):
    dealer = rig.dealers[0] if rig.dealers else rig.dealer()
    dealer.send(body)
    assert msgpack.unpackb(dealer.recv())["ok"] is False


def test_thousands_of_requests(rig):
    session, dealer = rig.session(), rig.dealer()
    waiting, answers = set(), {}
    for number in range(5000):
        dealer.send(
            msgpack.packb({"v": 1, "id": number, "op": "query", "token": session.token, "va": VA, "bytes": 4096})
        )
        waiting.add(number)
        while len(waiting) >= 16:
            reply = msgpack.unpackb(dealer.recv())
            waiting.discard(reply["id"])
            answers[reply["id"]] = reply["ok"]
    while waiting:
        reply = msgpack.unpackb(dealer.recv())
        waiting.discard(reply["id"])
        answers[reply["id"]] = reply["ok"]
    assert len(answers) == 5000 and all(answers.values())


def test_a_flood_is_refused_request_by_request(rig):
    session, dealer = rig.session(), rig.dealer()
    gate = rig.core.delay["prefetch"] = threading.Event()
    for number in range(200):
        dealer.send(
            msgpack.packb(
                {"v": 1, "id": number, "op": "prefetch", "token": session.token, "hnid": 0, "va": VA, "bytes": 1}
            )
        )
    refused = [msgpack.unpackb(dealer.recv()) for _ in range(180)]
    assert {reply["error"]["code"] for reply in refused} == {"EAGAIN"}
    gate.set()
    done = [msgpack.unpackb(dealer.recv()) for _ in range(20)]
    assert all(reply["ok"] for reply in done)
    assert {reply["id"] for reply in refused + done} == set(range(200))
    assert rig.ask(session, "discard", va=VA, bytes=1)["ok"], "the count has gone down again"


def test_stuck_requests_of_one_session_do_not_hold_up_others(rig):
    stuck, other = rig.session(uid=1), rig.session(uid=2)
    gate = rig.core.delay["prefetch"] = threading.Event()
    dealer = rig.dealer()
    for number in range(20):
        dealer.send(
            msgpack.packb(
                {"v": 1, "id": number, "op": "prefetch", "token": stuck.token, "hnid": 0, "va": VA, "bytes": 1}
            )
        )
    start = time.monotonic()
    assert rig.ask(other, "discard", va=VA, bytes=4096)["ok"] and rig.ask(stuck, "ping")["ok"]
    assert time.monotonic() - start < 2
    gate.set()


def test_replies_may_overtake(rig):
    session, dealer = rig.session(), rig.dealer()
    gate = rig.core.delay["discard"] = threading.Event()
    for number, op in ((1, "discard"), (2, "munmap")):
        dealer.send(msgpack.packb({"v": 1, "id": number, "op": op, "token": session.token, "va": VA, "bytes": 4096}))
    assert msgpack.unpackb(dealer.recv())["id"] == 2
    gate.set()
    assert msgpack.unpackb(dealer.recv())["id"] == 1


def test_stop_finishes_what_runs_and_refuses_the_rest(rig):
    session, dealer = rig.session(), rig.dealer()
    gate = rig.core.delay["discard"] = threading.Event()
    dealer.send(msgpack.packb({"v": 1, "id": 1, "op": "discard", "token": session.token, "va": VA, "bytes": 1}))
    while not rig.core.called("discard"):
        time.sleep(0.01)
    stopper = threading.Thread(target=rig.server.stop, args=(10,))
    stopper.start()
    time.sleep(0.05)
    dealer.send(msgpack.packb({"v": 1, "id": 2, "op": "ping", "token": session.token}))
    refused = msgpack.unpackb(dealer.recv())
    assert (refused["id"], refused["error"]["code"]) == (2, "ESHUTDOWN")
    gate.set()
    assert msgpack.unpackb(dealer.recv()) == {"id": 1, "ok": True}
    stopper.join(5)
    assert not stopper.is_alive()


def test_what_is_asked_again_is_done_once(rig):
    session = rig.session()
    dealer = rig.dealer()
    request = {"v": 1, "id": 5, "op": "mmap", "token": session.token, "bytes": 4096}
    gate = rig.core.delay["mmap"] = threading.Event()
    for _ in range(3):
        dealer.send(msgpack.packb(request))
    assert not dealer.poll(200), "one is under way"
    gate.set()
    first = msgpack.unpackb(dealer.recv())
    assert first["ok"] and not dealer.poll(100)
    dealer.send(msgpack.packb(request))
    assert msgpack.unpackb(dealer.recv()) == first, "the answer may have been lost"
    assert len(rig.core.called("mmap")) == 1
    dealer.send(msgpack.packb({**request, "id": 6}))
    assert msgpack.unpackb(dealer.recv())["ok"] and len(rig.core.called("mmap")) == 2
    dealer.send(msgpack.packb({**request, "bytes": 8192}))
    assert msgpack.unpackb(dealer.recv())["ok"] and len(rig.core.called("mmap")) == 3, "another request, all the same"


def first_identity(context, make_random):
    """What a ROUTER calls its first connection, in a process whose random numbers are known."""
    ctypes.CDLL(None).srand(1)
    if make_random:
        make_identities_random(context)
    with context.socket(zmq.ROUTER) as router, context.socket(zmq.DEALER) as dealer:
        endpoint = f"inproc://identities-{os.urandom(8).hex()}"
        router.bind(endpoint)
        dealer.connect(endpoint)
        dealer.send(b"")
        return router.recv_multipart()[0]


def test_identities_are_not_to_be_guessed():
    with zmq.Context() as context:
        context.socket(zmq.PAIR).close()
        assert first_identity(context, False) == first_identity(context, False), "they come from rand()"
        assert len({first_identity(context, True) for _ in range(3)}) == 3
