# SPDX-License-Identifier: Apache-2.0
"""The files behind a session's memory are in its hands: sizes, seals, holes, writes and flags."""

import errno


def test_sizes_and_seals(arena):
    for answers in arena.attacker().ask("seals").values():
        assert answers == {"shrink": errno.EPERM, "grow": errno.EPERM, "seal": errno.EPERM, "same": True}


def test_punching_and_writing_under_moves(arena):
    attackers = [arena.attacker() for _ in range(2)]
    for attacker in attackers:
        attacker.send("punch_under", seconds=1.5)
    arena.check_honest()
    assert all(attacker.answer() for attacker in attackers)
    last = attackers[0]
    last.ask("session")
    assert last.ask("write_and_read") == 0, "and an honest session of the same user works"


def test_flags_of_shared_descriptions(arena):
    """O_APPEND would move what gmemd writes to the end of the file."""
    assert arena.attacker().ask("append_mode") == 0
