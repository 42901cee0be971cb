# SPDX-License-Identifier: Apache-2.0
"""Who asks for all that there is gets his share and a refusal, and nobody else notices."""

import errno

from arena import MALLORY, OSCAR, ROOTLY


def test_sessions(arena):
    attacker = arena.attacker()
    outcome = attacker.ask("sessions", count=60)
    assert 15 <= outcome["made"] <= 24 and outcome["errno"] == errno.EDQUOT
    if ROOTLY:
        assert arena.attacker(OSCAR).ask("session"), "another user's share is his own"
    attacker.ask("close_all")
    assert attacker.ask("session")


def test_memory_without_end(arena):
    attackers = [arena.attacker() for _ in range(2)]
    for attacker in attackers:
        attacker.ask("session")
        attacker.send("storm", seconds=1.0)
    arena.check_honest()
    for attacker in attackers:
        counts = attacker.answer()
        assert counts.get("ENOMEM") and not counts.keys() - {"ok", "ENOMEM"}, counts


def test_regions_without_end(arena):
    attacker = arena.attacker()
    attacker.ask("session")
    outcome = attacker.ask("regions", count=3000)
    assert outcome["made"] > 1000
    arena.check_honest()


def test_contexts(arena):
    attacker = arena.attacker()
    token = attacker.ask("session")["token"]
    outcomes = attacker.ask("contexts", count=20, token=token, device="simgpu0")
    assert outcomes.count(0) <= 12 and set(outcomes) <= {0, errno.EDQUOT, errno.EAGAIN}
    arena.check_honest()


def test_requests_in_flight(arena):
    attackers = [arena.attacker() for _ in range(3)]
    for attacker in attackers:
        attacker.ask("session")
        attacker.send("never_read", count=3000, op="stats", args={})
    arena.check_honest()
    for attacker in attackers:
        attacker.answer()


def test_a_user_without_a_session_is_nobody(arena):
    attacker = arena.attacker(MALLORY)
    attacker.ask("session")
    for op in ("mmap", "munmap", "close", "stats", "attach"):
        reply = attacker.ask("request", op=op, args={}, token="00" * 32)
        assert not reply["ok"] and reply["error"]["errno"] == errno.EPERM
