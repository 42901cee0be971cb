# SPDX-License-Identifier: Apache-2.0
"""A driver that does not come back: it is found and named, others are served, and the manager hears of it in the
end."""

import json
import os
import socket
import time
from pathlib import Path

import pytest
import zmq
from helpers import eventually

from gmemd import show

HERE = str(Path(__file__).resolve().parent)


@pytest.fixture
def hung(make_arena, tmp_path):
    """An arena with a slow tier, the file that holds it up, and what the manager hears."""
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.bind(str(tmp_path / "notify"))
    manager.setblocking(False)
    hang = tmp_path / "hang"
    arena = make_arena(
        "--device", "simgpu0:capacity=8M", "--set", "daemon.stuck_report_s=0.5", "--set", "daemon.stuck_limit_s=1.5",
        "--device", f"name=slow0,driver=hang:Hang,hang={hang}",
        env={"PYTHONPATH": HERE, "NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "300000"},
    )  # fmt: skip
    yield arena, hang, manager
    hang.unlink(missing_ok=True)
    manager.close()


def heard(manager, what=b"WATCHDOG=1"):
    count = 0
    try:
        while True:
            count += what in manager.recv(4096)
    except BlockingIOError:
        return count


def stuck(arena):
    return arena.control.request("stats")["stuck"]


def test_a_driver_that_does_not_come_back(hung):
    arena, hang, manager = hung
    events = zmq.Context.instance().socket(zmq.SUB)
    events.setsockopt(zmq.SUBSCRIBE, b"thread.")
    events.setsockopt(zmq.RCVTIMEO, 10_000)
    events.connect(arena.control.events_endpoint)
    victim = arena.attacker()
    session = victim.ask("session")["session"]
    va = victim.ask("mmap_filled", size=1 << 20)
    assert victim.ask("request", op="prefetch", args={"va": va, "bytes": 1 << 20, "hnid": 2})["ok"]
    eventually(lambda: heard(manager) > 0, "signs of life")
    hang.touch()
    victim.send("check", va=va, bytes=1 << 20, step=4096)
    eventually(lambda: stuck(arena), "it is found")
    (thread,) = stuck(arena)
    assert thread["thread"].startswith("fill ") and thread["waits_for"] == "peer_unmap of slow0"
    assert thread["session"] == session and va <= thread["va"] < va + (1 << 20) and thread["doing"] == "a page fault"
    assert events.recv_multipart()[0] == b"thread.stuck"
    assert arena.stats()["stuck_reports"] == 1 and arena.stats()["threads_stuck"] == 1
    for _ in range(2):
        arena.check_honest()
    eventually(lambda: "no more signs of life" in arena.log, "it goes beyond the limit")
    heard(manager)
    time.sleep(0.6)
    assert heard(manager) == 0, "the manager is left to act"
    hang.unlink()
    assert victim.answer() == 0, "and when the driver comes back, nothing is lost"
    eventually(lambda: not stuck(arena), "it has gone on")
    eventually(lambda: heard(manager) > 0, "signs of life again")
    assert events.recv_multipart()[0] == b"thread.resumed"
    events.close(0)
    assert "thread stuck" in arena.log and "thread goes on" in arena.log


def test_more_hang_than_there_are_threads(hung):
    """All that fill pages wait for one driver: further ones are started, and another tier's pages still come."""
    arena, hang, manager = hung
    victims = [arena.attacker() for _ in range(6)]
    places = []
    for victim in victims:
        victim.ask("session")
        va = victim.ask("mmap_filled", size=64 << 10)
        victim.ask("request", op="prefetch", args={"va": va, "bytes": 64 << 10, "hnid": 2})
        places.append(va)
    other = arena.attacker()
    other.ask("session")
    arena.control.request("attach", driver="hang:Hang", name="fine0", config={"hang": str(hang.parent / "no")})
    va = other.ask("mmap_filled", size=64 << 10)
    assert other.ask("request", op="prefetch", args={"va": va, "bytes": 64 << 10, "hnid": 3})["ok"]
    before = len(os.listdir(f"/proc/{arena.pid}/task"))
    hang.touch()
    for victim, place in zip(victims, places, strict=True):
        victim.send("check", va=place, bytes=64 << 10, step=4096)
    eventually(lambda: len(stuck(arena)) >= 4, "all that there were hang")
    assert other.ask("check", va=va, bytes=64 << 10, step=4096) == 0
    assert len(os.listdir(f"/proc/{arena.pid}/task")) > before
    arena.check_honest()
    hang.unlink()
    assert [victim.answer() for victim in victims] == [0] * 6


def test_what_gmemctl_prints(hung):
    arena, hang, manager = hung
    lines = show.stuck_lines([{"thread": "fill 1", "doing": "x", "waits_for": "", "session": 0, "va": 0, "seconds": 1}])
    assert "waits for" not in str(lines[0]) and json.dumps(stuck(arena)) == "[]"
