# SPDX-License-Identifier: Apache-2.0
"""Bytes that nobody asked for, on every socket; connections without end, and clients that do not read."""

import errno

import msgpack
import pytest
import zmq


def test_random_packets_on_the_handshake_socket(arena):
    for attacker in (arena.attacker(), arena.attacker()):
        attacker.ask("random_packets", count=150)


@pytest.mark.parametrize("name", ["control.sock", "events.sock"])
def test_random_bytes_for_libzmq(arena, name):
    arena.attacker().ask("random_streams", name=name, count=150)


def test_random_messages_for_the_control_plane(arena):
    assert arena.attacker().ask("random_messages", count=900) > 500, "each one is answered"


def test_half_handshakes(arena):
    attacker = arena.attacker()
    attacker.ask("half_handshakes", count=40)
    arena.check_honest()
    assert attacker.ask("slow_loris_ends") == 0


@pytest.mark.parametrize("hold", [True, False])
def test_thousands_of_handshake_connections(arena, hold):
    attacker = arena.attacker()
    attacker.ask("connections", name="gmemd.sock", count=3000, hold=hold)
    arena.check_honest()


@pytest.mark.parametrize("name", ["control.sock", "events.sock"])
def test_thousands_of_connections_to_libzmq(arena, name):
    attacker = arena.attacker()
    attacker.ask("connections", name=name, count=3000, hold=True, seconds=60)
    arena.check_honest()
    attacker.ask("close_all")


def test_a_client_that_never_reads_its_replies(arena):
    attacker = arena.attacker()
    attacker.ask("session")
    region = attacker.ask("request", op="mmap", args={"bytes": 256 << 20, "small": True, "page_bytes": 4096})
    before = arena.census()
    attacker.ask("never_read", count=1500, op="query", args={"va": region["va"], "bytes": 256 << 20})
    arena.check_honest()
    grown = arena.census().anonymous - before.anonymous
    assert grown < 128 << 20, f"{grown >> 20} MiB of replies wait for somebody who does not read"


def test_a_subscriber_that_never_reads(arena):
    attacker, storm = arena.attacker(), arena.attacker()
    attacker.ask("deaf_subscriber")
    before = arena.census()
    for _ in range(30):
        assert storm.ask("sessions", count=8)["errno"] == 0
        storm.ask("close_all")
    arena.check_honest()
    assert arena.census().anonymous - before.anonymous < 32 << 20


def test_a_refusal_is_always_told(arena):
    """Also if it comes before HELLO was sent, or before it was read: no ECONNRESET, no EPIPE."""
    assert arena.attacker().ask("refusals", count=400) == {"EAGAIN": 400}


def test_replies_go_to_who_asked(arena):
    """A second connection with the same chosen identity gets nothing that is the first one's."""
    context = zmq.Context()
    first, second = (context.socket(zmq.DEALER) for _ in range(2))
    try:
        for dealer in (first, second):
            dealer.setsockopt(zmq.IDENTITY, b"twin")
            dealer.setsockopt(zmq.LINGER, 0)
            dealer.setsockopt(zmq.RCVTIMEO, 5000)
        first.connect(f"ipc://{arena.directory}/run/control.sock")
        first.send(msgpack.packb({"v": 1, "id": 1, "op": "ping", "token": b"x" * 32}))
        assert msgpack.unpackb(first.recv())["error"]["errno"] == errno.EPERM
        second.connect(f"ipc://{arena.directory}/run/control.sock")
        second.setsockopt(zmq.RCVTIMEO, 200)
        first.send(msgpack.packb({"v": 1, "id": 2, "op": "ping", "token": b"x" * 32}))
        assert msgpack.unpackb(first.recv())["id"] == 2
        with pytest.raises(zmq.Again):
            second.recv()
    finally:
        context.destroy(0)
