# SPDX-License-Identifier: Apache-2.0
"""Clients that are killed at any moment, stopped, or lose a device's process."""

import os
import signal
import time

ROUNDS = int(os.environ.get("GMEM_KILL_ROUNDS", "120"))
BATCH = 20


def test_killed_at_any_moment(arena):
    """Everything is freed: the fixture compares descriptors, sessions, threads and memory."""
    attackers = [arena.attacker() for _ in range(2)]
    for batch in range(ROUNDS // BATCH // len(attackers)):
        for number, attacker in enumerate(attackers):
            attacker.send("short_lives", count=BATCH, seed=batch * 2 + number)
        for attacker in attackers:
            attacker.answer(60)
    arena.check_honest()


def test_a_stopped_client_harms_nobody(arena):
    attackers = [arena.attacker() for _ in range(3)]
    for attacker in attackers:
        attacker.ask("resident", size=3 << 20)
        attacker.send("life", steps=10_000)
    time.sleep(0.1)
    for attacker in attackers:
        os.killpg(attacker.process.pid, signal.SIGSTOP)
    for _ in range(4):  # its pages are on the device, which they fill: they must leave although nobody runs there
        arena.check_honest()
    for attacker in attackers:
        os.killpg(attacker.process.pid, signal.SIGCONT)
