# SPDX-License-Identifier: Apache-2.0
"""gmemctl trace against real daemons: what a client and a device context touch is what is recorded and replayed."""

import json
import os
import signal
import subprocess
import sys
from collections import OrderedDict
from contextlib import contextmanager

import gmem
import numpy as np
import pytest
from helpers import ROOT, eventually, kill

from gmemd import trace
from gmemd.misses import USES
from gmemd.policy import Trace, replay
from gmemd.trace import KINDS

PAGE = 65536
ALL = sum(1 << number for number, kind in KINDS.items() if kind in USES)
CTL = [sys.executable, "-c", "import sys; from gmemd.cli import main_gmemctl; sys.exit(main_gmemctl())"]


@pytest.fixture
def plain(connect, monkeypatch):
    """A daemon that brings single pages, one after the other, and finds out nothing by itself."""
    monkeypatch.setenv("GMEM_AGENT", "0")
    return connect("simgpu0:capacity=4M", settings=["daemon.fault_ahead=false"])


def ctl(session, *args):
    command = [*CTL, "--socket", session.path, *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)


@contextmanager
def recording(session, path, *args):
    """gmemctl at work, which has begun; ended by SIGINT at the end of the block."""
    path.unlink(missing_ok=True)
    process = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", *CTL, "--socket", session.path, "trace", "record", "-o", str(path), *args],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
    )  # fmt: skip
    try:
        begun = lambda: path.exists() and path.stat().st_size > 0  # noqa: E731
        eventually(lambda: process.poll() is not None or begun(), "it has begun", 30)
        yield process
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 0, output
    finally:
        kill(process)


def touch(x, order, written):
    for page in order:
        if page in written:
            x[page * PAGE // 8] = page
        else:
            assert x[page * PAGE // 8] >= 0


def of_array(got, array, hnid):
    """Its uses on one hnode: (index of the page, record), in order."""
    base = array.__array_interface__["data"][0]
    return [
        ((record.va - base) // PAGE, record)
        for record in got
        if record.kind != "gone" and record.hnid == hnid and base <= record.va < base + array.nbytes
    ]


def lru_misses(pages, capacity):
    held, missed = OrderedDict(), 0
    for page in pages:
        if page in held:
            held.move_to_end(page)
            continue
        missed += 1
        if len(held) == capacity:
            held.popitem(last=False)
        held[page] = True
    return missed


def test_what_is_touched_is_recorded(plain, tmp_path):
    path, count = tmp_path / "t.gmt", 40
    x = gmem.empty(count * PAGE // 8, np.int64, page_size="64K", session=plain)
    order = np.random.default_rng(1).permutation(count).tolist()
    written = set(order[::3])
    with recording(plain, path, "--until-signal"):
        touch(x, order, written)
        with gmem.device("simgpu0", session=plain).context() as context:
            context.launch(touch, x, order[::-1], set()).wait(30)
            context.launch(touch, x, order[:7], set(order[:7])).wait(30)
        gmem.discard(x[: 2 * PAGE // 8])
        touch(x, [0, 5], {5})
    got = trace.read(str(path))
    assert got.complete and not got.lost
    assert got.hnodes()[1]["name"] == "simgpu0" and got.hnodes()[1]["capacity_bytes"] == 4 << 20
    session = next(s["session"] for s in plain.request("sessions")["sessions"] if s["pid"] == os.getpid())
    host, device = of_array(got, x, 0), of_array(got, x, 1)
    assert {record.session for _, record in host + device} == {session}
    assert {(record.kind, record.page_bytes) for _, record in host + device} == {("fault", PAGE)}
    first = host[:count]
    assert [page for page, _ in first] == order
    assert all(record.empty and not record.resident and record.write == (page in written) for page, record in first)
    assert [page for page, record in device[:count]] == order[::-1]
    assert not any(record.empty or record.resident or record.write for _, record in device[:count])
    assert [page for page, _ in device[count:]] == order[:7]
    assert all(record.write and record.resident and record.owned for _, record in device[count:])
    (zero, emptied), (five, last) = host[-2:]
    assert (zero, five) == (0, 5) and emptied.empty and not last.empty and last.write
    base = first[0][1].page - order[0]
    ends = [(record.page - base, record.va) for record in got if record.kind == "gone"]
    assert {(page, pages) for page, pages in ends if 0 <= page < count} == {(0, 1), (1, 1)}


def test_replays_agree_with_the_device_and_with_a_model(plain, tmp_path):
    """Random passes over half as much again as the device holds."""
    path, count = tmp_path / "t.gmt", 96
    x = gmem.full(count * PAGE // 8, 0, np.int64, page_size="64K", session=plain)
    random = np.random.default_rng(2)
    order = random.integers(0, count, 700).tolist()
    copied = lambda: plain.device_info("simgpu0")["in_bytes"]  # noqa: E731
    before = copied()
    with recording(plain, path, "--until-signal", "--device", "simgpu0"):
        with gmem.device("simgpu0", session=plain).context() as context:
            context.launch(touch, x, order, set(range(0, count, 2))).wait(60)
    got = trace.read(str(path))
    assert got.header["device"] == "simgpu0"
    seen = [page for page, _ in of_array(got, x, 1)]
    ahead = iter(order)
    assert all(page in ahead for page in seen), "what is seen is part of what is done, and in its order"
    assert set(seen) == set(order)
    made = Trace.of_records(got.records, 1, ALL)
    assert made.page_bytes == PAGE and len(made) == len(seen)
    missed = sum(not record.resident for _, record in of_array(got, x, 1))
    came = (copied() - before) // PAGE
    assert made.absent == missed <= came <= missed + 7, "what is here when it is recorded may leave before it is mapped"
    for capacity in (1, 8, 40, 64, 96):
        assert replay(made, "lru", capacity).misses == lru_misses(seen, capacity)
    reply = ctl(plain, "trace", "replay", str(path), "--policy", "lru", "--capacity", "4M,50%", "--json")
    report = json.loads(reply.stdout)
    gpu = report["hnodes"][0]
    rows = {(row["policy"], row["capacity_bytes"]): row for row in gpu["results"]}
    assert gpu["recorded"]["misses"] == missed and len(report["hnodes"]) == 1
    assert rows["lru", 4 << 20]["misses"] == lru_misses(seen, 64)
    assert rows["opt", 4 << 20]["misses"] <= min(missed, rows["lru", 4 << 20]["misses"])


def test_one_session_of_several(plain, tmp_path):
    path = tmp_path / "t.gmt"
    x = gmem.empty(4 * PAGE // 8, np.int64, page_size="64K", session=plain)
    session = next(s["session"] for s in plain.request("sessions")["sessions"] if s["pid"] == os.getpid())
    code = "import gmem; gmem.full(1 << 20, 1)[::512].sum()"
    with recording(plain, path, "--until-signal", "--session", str(session)):
        environment = {**os.environ, "GMEM_SOCKET": plain.path}
        subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, check=True, timeout=60)
        touch(x, [2, 1], {1})
    got = trace.read(str(path))
    assert {record.session for record in got} == {session}
    assert [page for page, _ in of_array(got, x, 0)] == [2, 1]


def test_one_recording_at_a_time_and_none_is_left_behind(plain, tmp_path):
    path = tmp_path / "t.gmt"
    with recording(plain, path, "--until-signal") as process:
        reply = ctl(plain, "trace", "record", "-o", str(tmp_path / "u"), "--seconds", "1")
        assert reply.returncode == 1 and f"process {process.pid}" in reply.stderr and "EBUSY" in reply.stderr
    reply = ctl(plain, "trace", "record", "-o", str(path), "--seconds", "1", "--session", "99999")
    assert reply.returncode == 1 and "session: there is no session 99999" in reply.stderr
    with pytest.raises(AssertionError):
        with recording(plain, path, "--until-signal") as process:
            kill(process)
    with pytest.raises(trace.TraceError, match="has no end"):
        trace.read(str(path))

    def recorded_again():
        return ctl(plain, "trace", "record", "-o", str(path), "--seconds", "0.05", "--json").returncode == 0

    eventually(recorded_again, "the connection's end ends the recording")
    assert trace.read(str(path)).complete


def test_a_daemon_that_stops_leaves_a_sound_trace(connect, tmp_path):
    session = connect()
    path = tmp_path / "t.gmt"
    x = gmem.empty(4 * PAGE // 8, np.int64, page_size="64K", session=session)
    with pytest.raises(AssertionError, match="not complete"):
        with recording(session, path, "--until-signal") as process:
            touch(x, [3, 0], {0})
            before = path.stat().st_size
            eventually(lambda: path.stat().st_size > before, "it has come")
            pid = session.request("ping")["pid"]
            os.kill(pid, signal.SIGTERM)
            process.wait(30)
    got = trace.read(str(path))
    assert not got.complete and [page for page, _ in of_array(got, x, 0)] == [3, 0]
