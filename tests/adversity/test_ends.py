# SPDX-License-Identifier: Apache-2.0
"""Clients that are killed at any moment, stopped, or lose a device's process."""

import os
import signal
import sys
import textwrap
import time
from pathlib import Path

import pytest
from arena import MALLORY, ROOTLY, Talker
from helpers import as_user

ROUNDS = int(os.environ.get("GMEM_KILL_ROUNDS", "500"))
BATCH = 50


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


PROGRAM = """
import json, os, signal, sys
import gmem, numpy as np

session = gmem.connect()
word = lambda text: print(json.dumps(text), flush=True) or sys.stdin.readline()

def name_of(call):
    try:
        call()
    except gmem.GmemError as error:
        return type(error).__name__
    return ""
"""


@pytest.fixture
def run_program(tmp_path):
    programs = []

    def run(arena, code):
        path = Path(arena.directory) / "program.py"
        path.write_text(PROGRAM + textwrap.dedent(code))
        path.chmod(0o644)
        command = [sys.executable, str(path)]
        programs.append(Talker(as_user(MALLORY, command) if ROOTLY else command, {"GMEM_SOCKET": arena.socket}))
        return programs[-1]

    yield run
    for program in programs:
        program.kill()


def test_a_context_that_is_killed_takes_nothing_with_it(arena, run_program):
    """A simgpu's memory is the device's, not the process's: what was written there is there."""
    program = run_program(
        arena,
        """
        a = gmem.zeros(1 << 18, np.uint64, page_size="64K")
        kept = gmem.full(1 << 16, 7, np.uint64, page_size="4K")
        context = gmem.device("simgpu0").context()
        def write(x):
            x[:] = np.arange(len(x), dtype=np.uint64)
        context.launch(write, a).wait(20)
        hang = context.launch(lambda x: __import__("time").sleep(60), kept)
        os.kill(context.process_id, signal.SIGKILL)
        lost = name_of(lambda: hang.wait(20))
        right = bool((a == np.arange(1 << 18, dtype=np.uint64)).all() and (kept == 7).all())
        with gmem.device("simgpu0").context() as other:
            total = int(other.launch(lambda x: x.sum(), a).wait(20))
        word([lost, right, total == (1 << 18) * ((1 << 18) - 1) // 2])
        """,
    )
    assert program.answer(60) == ["ContextLost", True, True]


def test_a_page_that_is_lost_is_a_named_error_and_sigbus(arena, run_program, tmp_path):
    """What lived in one place only, and that place is gone: nobody reads zeros for it, and everything else is
    served."""
    gone = tmp_path / "gone"
    name = "lost0"
    hnid = arena.control.request("attach", driver="hang:Lost", name=name, config={"hang": str(gone)})["hnid"]
    program = run_program(
        arena,
        f"""
        a = gmem.full(1 << 16, 5, np.uint64, page_size="64K")
        b = gmem.full(1 << 16, 6, np.uint64, page_size="64K")
        gmem.prefetch(a, {hnid})
        word("stored")
        named = name_of(lambda: gmem.prefetch(a, 0))
        again = name_of(lambda: gmem.prefetch(a, 0))
        word([named, again, bool((b == 6).all())])
        print(a[0])
        """,
    )
    assert program.answer() == "stored"
    gone.touch()
    program.process.stdin.write(b"go\n")
    program.process.stdin.flush()
    assert program.answer() == ["Poisoned", "Poisoned", True]
    program.process.stdin.write(b"go\n")
    program.process.stdin.flush()
    assert program.process.wait(20) == -signal.SIGBUS
    arena.check_honest()
    gone.unlink()
    arena.control.request("detach", name=name, force=True)
