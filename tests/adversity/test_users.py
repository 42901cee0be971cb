# SPDX-License-Identifier: Apache-2.0
"""What one user can do to another: nothing."""

import errno
import os

import pytest
from arena import HONEST, OSCAR, ROOTLY

from gmemd import wire

pytestmark = pytest.mark.skipif(not ROOTLY, reason="needs root to be two other users")
DENIED = (errno.EACCES, errno.EPERM)


@pytest.fixture
def victim(arena):
    """Oscar's session, with memory on host and device; its token has come to Mallory's ears."""
    victim = arena.attacker(OSCAR)
    return victim, victim.ask("session")


def test_a_token_alone_joins_nothing(arena, victim):
    oscar, session = victim
    mallory = arena.attacker()
    for kind, device in ((wire.FORK_CHILD, ""), (wire.CONTEXT, "simgpu0")):
        answer = mallory.ask("hello", kind=kind, token=session["token"], device=device)
        assert answer == {"errno": errno.EPERM, "fds": 0}
    assert oscar.ask("write_and_read") == 0


def test_guessed_tokens(arena, victim):
    oscar, session = victim
    mallory = arena.attacker()
    mallory.ask("session")
    token = bytearray.fromhex(session["token"])
    for at in (0, 15, 31):
        near = bytearray(token)
        near[at] ^= 1
        reply = mallory.ask("request", op="sessions", args={}, token=near.hex())
        assert reply["error"]["errno"] == errno.EPERM


def test_sessions_contexts_and_memory_of_others(arena, victim):
    oscar, session = victim
    region = oscar.ask("mmap") if False else oscar.ask("request", op="mmap", args={"bytes": 65536, "small": True})
    mallory = arena.attacker()
    mallory.ask("session")
    reply = mallory.ask("request", op="sessions")
    assert [row["uid"] for row in reply["sessions"]] == [mallory_uid(reply)], "one hears of one's own"
    assert mallory.ask("request", op="map", args={"session": session["session"]})["error"]["errno"] == errno.ENOENT
    for op, args in (
        ("munmap", {"va": region["va"], "bytes": 65536}), ("discard", {"va": region["va"], "bytes": 65536}),
        ("query", {"va": region["va"], "bytes": 65536}), ("mmap_commit", {"va": region["va"]}),
        ("prefetch", {"va": region["va"], "bytes": 65536, "hnid": 1}),
        ("hmemcpy", {"hnid": 0, "dst": region["va"], "src": region["va"], "bytes": 4096}),
    ):  # fmt: skip
        reply = mallory.ask("request", op=op, args=args)
        if op not in ("discard", "munmap"):
            assert not reply["ok"], f"{op} on somebody else's address"
    for context in range(1, 40):
        reply = mallory.ask("request", op="context_close", args={"context": context})
        assert reply["error"]["errno"] == errno.ENOENT
        reply = mallory.ask("request", op="acquire", args={"context": context, "ranges": [[region["va"], 4096]],
                                                           "write": True})  # fmt: skip
        assert reply["error"]["errno"] == errno.ENOENT
    assert oscar.ask("write_and_read") == 0


def mallory_uid(reply):
    return reply["sessions"][0]["uid"]


def test_devices_are_for_administrators(arena):
    mallory = arena.attacker()
    mallory.ask("session")
    for op, args in (("attach", {"driver": "simgpu", "name": "evil"}), ("detach", {"name": "simgpu0", "force": True}),
                     ("attach", {"driver": "os:system", "name": "evil"})):  # fmt: skip
        assert mallory.ask("request", op=op, args=args)["error"]["errno"] == errno.EPERM


def test_processes_and_their_descriptors(arena, victim):
    oscar, _ = victim
    pids = [arena.pid, oscar.process.pid, arena.honest.process.pid]
    for pid, answers in arena.attacker().ask("try_processes", pids=pids).items():
        assert all(number in DENIED for number in answers.values()), (pid, answers)


def test_files_in_the_runtime_directory(arena):
    mallory = arena.attacker()
    assert all(number in DENIED for number in mallory.ask("try_directory"))
    # what the daemon has open is nobody's to open again
    fds = [f"/proc/{arena.pid}/fd/{name}" for name in os.listdir(f"/proc/{arena.pid}/fd")][:40]
    for path, (read, write) in mallory.ask("try_files", paths=[*fds, f"/proc/{arena.pid}/mem"]).items():
        assert read in DENIED and write in DENIED, path


def test_credentials_come_from_the_kernel(arena):
    assert HONEST != OSCAR
    mallory = arena.attacker()
    mallory.ask("session")
    reply = mallory.ask("request", op="sessions")
    assert {row["uid"] for row in reply["sessions"]} == {54322}
