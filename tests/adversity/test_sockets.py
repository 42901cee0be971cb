# SPDX-License-Identifier: Apache-2.0
"""Rubbish, half handshakes, floods, wrong descriptors, tokens of others."""

import os
import random
import socket
import sys
import time
from pathlib import Path

import msgpack
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parent))
import raw  # noqa: E402

from gmemd import schema, wire  # noqa: E402


def test_random_bytes_at_the_handshake(target):
    rng = random.Random(1)
    hello = wire.pack_hello(wire.CLIENT)
    for n in range(300):
        with raw.dial(target.socket) as sock:
            if n % 3 == 0:
                body = rng.randbytes(rng.choice((0, 1, 7, len(hello), 1000, 4000)))
            else:
                mutated = bytearray(hello)
                for _ in range(rng.randint(1, 4)):
                    mutated[rng.randrange(len(mutated))] = rng.randrange(256)
                body = bytes(mutated)
            try:
                sock.send(body)
                sock.recv(1024)
            except OSError:
                pass  # it hung up on us


def test_half_handshakes_time_out_or_end_with_their_connection(target):
    socks = [raw.dial(target.socket) for _ in range(40)]
    for n, sock in enumerate(socks):
        if n % 2:
            sock.send(wire.pack_hello(wire.CLIENT))
    time.sleep(0.2)
    again = raw.Session(target.socket).ready()
    assert again.ask("ping")["ok"], "others are served meanwhile"
    again.sock.close()
    again.context.destroy(linger=0)
    for sock in socks:
        sock.close()


def test_thousands_of_connections(target):
    refused = 0
    for _ in range(20):
        socks = []
        for _ in range(100):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
            try:
                sock.connect(target.socket)
            except BlockingIOError:
                refused += 1
            socks.append(sock)
        for sock in socks:
            sock.close()
    session = raw.Session(target.socket)
    assert session.welcome.status == 0
    session.sock.close()


def wrong_fds():
    read, write = os.pipe()
    left, right = socket.socketpair()
    plain = os.open("/dev/zero", os.O_RDWR)
    memfd = os.memfd_create("x")
    return {"pipe": read, "other end": write, "socket": left.detach(), "peer": right.detach(), "device": plain,
            "memfd": memfd, "eventfd": os.eventfd(0)}  # fmt: skip


@pytest.mark.parametrize("which", ["pipe", "other end", "socket", "device", "memfd", "eventfd"])
def test_descriptors_that_are_no_userfaultfd(target, which):
    fds = wrong_fds()
    session = raw.Session(target.socket)
    status, message = session.give(fds[which])
    assert status < 0 and "uffd" in message
    session.sock.close()
    for fd in fds.values():
        os.close(fd)


def test_userfaultfds_that_are_not_as_they_must_be(target):
    first = raw.Session(target.socket)
    if wire.HAS_UFFD_DEV not in first.by_flag:
        pytest.skip("no /dev/userfaultfd")
    blocking = first.new_uffd(os.O_CLOEXEC)
    status, _ = first.give(blocking)
    assert status < 0
    second = raw.Session(target.socket).ready()
    third = raw.Session(target.socket)
    status, _ = third.give(second.uffd)  # another session's, which has been initialised
    assert status < 0
    assert second.ask("ping")["ok"]
    for session in (first, second, third):
        session.sock.close()
        session.context.destroy(linger=0)


def test_no_descriptor_too_many_and_too_early(target):
    for fds in ([], [0, 1, 2]):
        session = raw.Session(target.socket)
        socket.send_fds(session.sock, [wire.pack_uffd(False)], fds)
        status, _ = wire.unpack_ready(session.sock.recv(1024))
        assert status < 0
        session.sock.close()
    with raw.dial(target.socket) as sock:
        socket.send_fds(sock, [wire.pack_hello(wire.CLIENT)], [0])
        assert wire.unpack_welcome(sock.recv(1024)).status < 0


def test_random_bytes_at_the_control_socket(target):
    session = raw.Session(target.socket).ready()
    rng = random.Random(2)
    for _ in range(500):
        frames = [rng.randbytes(rng.choice((0, 1, 10, 100, 5000))) for _ in range(rng.randint(1, 4))]
        session.dealer.send_multipart(frames, zmq.NOBLOCK)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as plain:
        plain.connect(session.welcome.control.removeprefix("ipc://"))
        plain.sendall(rng.randbytes(100_000)[: 1 << 16])
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as plain:
        plain.connect(session.welcome.events.removeprefix("ipc://"))
        plain.sendall(rng.randbytes(1 << 12))
    other = raw.Session(target.socket).ready()
    assert other.ask("ping")["ok"]
    for each in (session, other):
        each.sock.close()
        each.context.destroy(linger=0)


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(1 << 63), (1 << 64) - 1), st.floats(), st.text(max_size=40),
    st.binary(max_size=40), st.lists(st.integers(-5, 1 << 50), max_size=4),
    st.dictionaries(st.text(max_size=5), st.integers(0, 9), max_size=3),
    st.sampled_from([0, 1, 4096, 1 << 21, 0x660000000000, 0x6B0000000000]),
)  # fmt: skip
DANGEROUS = {"detach", "attach", "limit", "quota", "close", "upgrade", "drivers"}  # an administrator's: it may


@pytest.fixture(scope="module")
def asker(target):
    session = raw.Session(target.socket).ready()
    yield session
    session.sock.close()
    session.context.destroy(linger=0)


@settings(max_examples=300, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(data=st.data())
def test_requests_with_mutated_fields(asker, data):
    op = data.draw(st.sampled_from(sorted(set(schema.OPS) - DANGEROUS)))
    args = {name: data.draw(VALUES) for name in schema.OPS[op].fields if data.draw(st.integers(0, 5))}
    reply = asker.ask(op, **args)
    assert reply["ok"] or reply["error"]["errno"] > 0
    if reply["ok"] and op == "mmap":
        asker.ask("munmap", va=reply["va"], bytes=reply["bytes"])


def test_tokens_of_others_and_of_nobody(target):
    one, other = raw.Session(target.socket).ready(), raw.Session(target.socket).ready()
    va = one.map(1 << 16)
    for token in (os.urandom(32), bytes(32), one.welcome.token[:-1] + b"\0"):
        reply = other.ask("munmap", token=token, va=va, bytes=1 << 16)
        assert reply["error"]["code"] == "EPERM"
    for op in ("discard", "prefetch", "munmap"):
        args = {"va": va, "bytes": 1 << 16, **({"hnid": 0} if op == "prefetch" else {})}
        other.ask(op, **args)
    assert one.ask("query", va=va, bytes=1 << 16)["ok"], "it is still mapped"
    for each in (one, other):
        each.sock.close()
        each.context.destroy(linger=0)


def test_a_client_that_never_reads_its_replies(target):
    session = raw.Session(target.socket).ready()
    body = msgpack.packb({"v": 1, "id": 1, "op": "devices", "token": session.welcome.token})
    session.dealer.setsockopt(zmq.SNDTIMEO, 20)
    sent = 0
    for _ in range(20_000):
        try:
            session.dealer.send(body)
            sent += 1
        except zmq.Again:
            break
    other = raw.Session(target.socket).ready()
    assert other.ask("ping")["ok"] and sent > 100
    for each in (session, other):
        each.sock.close()
        each.context.destroy(linger=0)
