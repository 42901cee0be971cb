# SPDX-License-Identifier: Apache-2.0
"""The ring is memory that the client may write at any time."""


def test_entries_of_random_bytes(arena):
    attackers = [arena.attacker() for _ in range(2)]
    for attacker in attackers:
        attacker.send("ring_noise", rounds=2000)
    arena.check_honest()
    for attacker in attackers:
        done = attacker.answer(60)
        assert done["flags"] & 4 == 0 and not done["left"], "every entry is answered: it is the client that is wrong"


def test_heads_and_tails_while_traffic_runs(arena):
    attackers = [arena.attacker() for _ in range(3)]
    before = arena.stats()["ring_errors"]
    for attacker in attackers:
        attacker.send("ring_games", seconds=2.0)
    for _ in range(3):
        arena.check_honest()
    outcomes = [attacker.answer(60) for attacker in attackers]
    assert all(outcome["rounds"] for outcome in outcomes), outcomes
    assert arena.stats()["ring_errors"] > before, "nonsense breaks a ring, and that is counted"
