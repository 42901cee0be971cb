# SPDX-License-Identifier: Apache-2.0
"""A daemon that has run out of something refuses, and goes on when there is some again."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from arena import HONEST, MALLORY, OSCAR, ROOTLY, Arena
from helpers import eventually

WIDE = ("connections_per_uid=4096", "sessions_per_uid=4096", "handshakes_per_uid=64")
root_only = pytest.mark.skipif(not ROOTLY, reason="needs root to be other users")


@pytest.fixture
def few_fds(make_arena) -> Arena:
    arena = make_arena("--device", "simgpu0:capacity=8M", limits=WIDE, prefix=("prlimit", "--nofile=768:768"))
    arena.check_honest()  # who has a connection keeps it
    return arena


def test_sessions_until_there_are_no_descriptors(few_fds):
    before = few_fds.census()
    attacker = few_fds.attacker()
    outcome = attacker.ask("sessions", count=260, seconds=60)
    assert outcome["made"] < 260 and outcome["errno"] == errno.EMFILE
    few_fds.check_honest()
    few_fds.settle(before)
    again = few_fds.attacker()
    assert again.ask("session") and again.ask("write_and_read") == 0


@pytest.mark.parametrize("name", ["gmemd.sock", "control.sock", "events.sock"])
def test_connections_until_there_are_no_descriptors(few_fds, name):
    before = few_fds.census()
    attacker = few_fds.attacker()
    attacker.ask("connections", name=name, count=1500, hold=True, seconds=60)
    few_fds.check_honest()
    few_fds.settle(before)
    again = few_fds.attacker()
    assert again.ask("session") and again.ask("write_and_read") == 0


def test_forks_until_there_are_no_descriptors(few_fds):
    before = few_fds.census()
    few_fds.attacker().ask("fork_bomb", count=300, stay=True, seconds=60)
    few_fds.check_honest()
    few_fds.settle(before)


@root_only
def test_threads(make_arena):
    """RLIMIT_NPROC counts all tasks of a user, so the daemon is one: no thread can be started any more."""
    arena = make_arena("--device", "simgpu0:capacity=8M", honest=False, as_uid=OSCAR)
    before = arena.census()
    client = arena.attacker(OSCAR)
    client.ask("session")
    subprocess.run(
        ["setpriv", f"--reuid={OSCAR}", f"--regid={OSCAR}", "--clear-groups",
         "prlimit", f"--pid={arena.pid}", "--nproc=1:1"],
        check=True,
    )  # fmt: skip
    for name in ("a", "b"):
        reply = client.ask("request", op="attach", args={"driver": "simgpu", "name": name})
        assert not reply["ok"] and reply["error"]["errno"] in (errno.EAGAIN, errno.EPERM, errno.ENOMEM), reply
    assert client.ask("write_and_read") == 0
    other = arena.attacker(OSCAR)
    assert other.ask("session") and other.ask("write_and_read") == 0
    other.ask("fork_bomb", count=20)
    arena.settle(before)
    assert arena.process.poll() is None


@pytest.mark.parametrize("spare_mib", [0, 2, 16])
def test_address_space(make_arena, spare_mib):
    """malloc, mmap and thread stacks fail from now on."""
    arena = make_arena("--device", "simgpu0:capacity=8M", honest=False)
    first = arena.attacker()
    first.ask("session")
    assert first.ask("write_and_read") == 0
    size = int(Path(f"/proc/{arena.pid}/statm").read_text().split()[0]) * 4096 + (spare_mib << 20)
    resource.prlimit(arena.pid, resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
    refusals = 0
    for _ in range(12):
        outcome = arena.attacker().ask("sessions", count=6)
        refusals += outcome["errno"] != 0
    storm = [arena.attacker() for _ in range(2)]
    for attacker in storm:
        attacker.send("try_storm", seconds=0.5)
    for attacker in storm:
        attacker.answer()
    assert arena.process.poll() is None, arena.log[-3000:]
    resource.prlimit(arena.pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    arena.end_attackers()
    eventually(lambda: arena.stats()["sessions"] == 0, "all of it has gone", 20)
    again = arena.attacker()
    assert again.ask("session") and again.ask("write_and_read") == 0


@pytest.mark.parametrize("descriptors", [20, 24, 63])
def test_a_limit_that_is_too_low_to_start_is_said(tmp_path, descriptors):
    done = subprocess.run(
        ["prlimit", f"--nofile={descriptors}:{descriptors}", sys.executable, "-m", "gmemd", "run",
         "--runtime-dir", str(tmp_path / "r")],
        capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.strip(), done
    assert "Traceback" not in done.stderr and os.strerror(errno.EMFILE) in done.stderr, done.stderr
    assert "RLIMIT_NOFILE" in done.stderr, done.stderr
    assert HONEST and MALLORY
