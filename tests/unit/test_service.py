# SPDX-License-Identifier: Apache-2.0
"""A whole gmemd with the real core, seen from outside: its life, its clients, and what it leaves behind."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import msgpack
import pytest
import zmq

from gmemd import wire

pytest.importorskip("gmemd._core")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be another user")
PAGE = 4096


@pytest.fixture
def daemon(run_daemon):
    daemon = run_daemon("--device", "simgpu0:capacity=8M")
    assert daemon.said == "READY=1\n", daemon.log
    return daemon


def ok(reply):
    assert not isinstance(reply, dict) or reply.get("ok", True), reply
    return reply


def test_start_and_stop_leave_nothing(daemon):
    names = sorted(os.listdir(daemon.directory))
    assert names == ["control.sock", "events.sock", "gmemd.sock"]
    mode = 0o666 if os.geteuid() == 0 else 0o600
    assert all(stat.S_IMODE(os.stat(daemon.directory / name).st_mode) == mode for name in names)
    assert daemon.stop() == 0
    assert not daemon.directory.exists()
    lines = [json.loads(line) for line in daemon.log.splitlines()]
    assert [line["event"] for line in lines if line["event"] in ("ready", "stopping", "stopped")] == [
        "ready", "stopping", "stopped"]  # fmt: skip
    assert not [line for line in lines if line["level"] == "error"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_stop_it(daemon, number):
    daemon.process.send_signal(number)
    assert daemon.process.wait(20) == 0
    assert not daemon.directory.exists()


def test_a_client_from_hello_to_goodbye(daemon, run_client, eventually):
    client = run_client(daemon.socket)
    region = ok(client.ask("mmap", bytes=1 << 20))
    client.ask("write", va=region["va"] + 5, text="hello")
    assert client.ask("read", va=region["va"] + 5, size=5) == "hello"
    assert client.ask("read", va=region["va"] + 500_000, size=3) == "\0\0\0"
    (session,) = daemon.ctl("sessions")["sessions"]
    assert session["session"] == client.welcome["session"] and session["pid"] == client.process.pid
    assert session["mapped_bytes"] == 1 << 20 and session["regions"] == 1 and session["host_faults"] > 0
    assert session["name"] and session["resident_bytes"]["0"] > 0
    (row,) = daemon.ctl("map")["regions"]
    assert (row["va"], row["bytes"], row["session"]) == (region["va"], 1 << 20, session["session"])
    ok(client.ask("munmap", va=region["va"], bytes=1 << 20))
    assert daemon.ctl("map")["regions"] == []
    assert client.end() == 0
    eventually(lambda: not daemon.ctl("sessions")["sessions"])
    assert daemon.ctl("devices")["devices"][0]["used_bytes"] == 0


def test_a_killed_client_frees_everything(daemon, run_client, eventually):
    client = run_client(daemon.socket)
    region = ok(client.ask("mmap", bytes=4 << 20, page_bytes=65536))
    client.ask("fill", va=region["va"], bytes=4 << 20, step=PAGE)
    assert daemon.ctl("devices")["devices"][0]["used_bytes"] >= 4 << 20
    client.process.kill()
    eventually(lambda: not daemon.ctl("sessions")["sessions"])
    assert [d["used_bytes"] for d in daemon.ctl("devices")["devices"]] == [0, 0]
    assert daemon.ctl("stats")["stats"]["regions"] == 0


def test_memory_moves_to_a_device_and_back_without_loss(daemon, run_client):
    client = run_client(daemon.socket)
    region = ok(client.ask("mmap", bytes=4 << 20, page_bytes=65536))
    place = {"va": region["va"], "bytes": 4 << 20}
    client.ask("fill", **place, step=PAGE)
    ok(client.ask("request", op="prefetch", args={"hnid": 1, **place}))
    assert daemon.ctl("devices")["devices"][1]["used_bytes"] == 4 << 20
    pages = bytes.fromhex(ok(client.ask("request", op="query", args=place))["pages"])
    assert len(pages) == 64 * 8 and {pages[i * 8 + 2] for i in range(64)} == {2}, "valid on hnode 1 only"
    assert client.ask("check", **place, step=PAGE) == 0
    stats = daemon.ctl("stats")["stats"]
    assert stats["h2d_bytes"] >= 4 << 20 and stats["d2h_bytes"] >= 4 << 20


def test_a_context_sees_the_same_addresses(daemon, run_client, eventually):
    client = run_client(daemon.socket)
    region = ok(client.ask("mmap", bytes=1 << 20, page_bytes=65536))
    client.ask("write", va=region["va"], text="from the host")
    context = run_client(daemon.socket, "context", client.welcome["token"], "simgpu0")
    assert context.welcome["hnid"] == 1
    assert context.ask("read", va=region["va"], size=13) == "from the host"
    context.ask("write", va=region["va"] + 300_000, text="from the device")
    assert client.ask("read", va=region["va"] + 300_000, size=15) == "from the device"
    (row,) = ok(client.ask("request", op="contexts", args={}))["contexts"]
    assert row["hnid"] == 1 and row["pid"] == context.process.pid
    held = {"context": row["context"], "ranges": [[region["va"], 1 << 20]]}
    ok(client.ask("request", op="acquire", args={**held, "write": True}))
    ok(client.ask("request", op="release", args=held))
    busy = daemon.ctl_process("detach", "simgpu0")
    assert busy.returncode == 1 and "EBUSY" in busy.stderr
    ok(client.ask("request", op="context_close", args={"context": row["context"]}))
    assert ok(client.ask("request", op="contexts", args={}))["contexts"] == []
    daemon.ctl("detach", "simgpu0")
    assert client.ask("read", va=region["va"] + 300_000, size=15) == "from the device"


def test_a_killed_context_leaves_its_session(daemon, run_client, eventually):
    client = run_client(daemon.socket)
    region = ok(client.ask("mmap", bytes=1 << 20))
    context = run_client(daemon.socket, "context", client.welcome["token"], "simgpu0")
    context.ask("write", va=region["va"], text="last words")
    context.process.kill()
    eventually(lambda: not ok(client.ask("request", op="contexts", args={}))["contexts"])
    assert client.ask("read", va=region["va"], size=10) == "last words"


def test_detach_with_force_ends_contexts_and_brings_pages_home(daemon, run_client):
    client = run_client(daemon.socket)
    region = ok(client.ask("mmap", bytes=1 << 20))
    context = run_client(daemon.socket, "context", client.welcome["token"], "simgpu0")
    context.ask("write", va=region["va"], text="on the device")
    daemon.ctl("detach", "simgpu0", "--force")
    assert client.ask("read", va=region["va"], size=13) == "on the device"
    assert [d["name"] for d in daemon.ctl("devices")["devices"]] == ["host"]
    context.process.wait(20)


@pytest.mark.parametrize("event_fork", [True, False])
def test_fork(run_daemon, run_client, eventually, event_fork):
    daemon = run_daemon("--set", f"daemon.event_fork={str(event_fork).lower()}")
    client = run_client(daemon.socket)
    if event_fork and not client.welcome["flags"] & wire.EVENT_FORK:
        pytest.skip("no EVENT_FORK here: needs CAP_SYS_PTRACE")
    region = ok(client.ask("mmap", bytes=1 << 20))
    client.ask("write", va=region["va"], text="parent")
    told = client.ask("fork", va=region["va"], text="child!")
    assert told["status"] == 0 and told["child"]["saw"] == "parent" and told["child"]["stored"] is event_fork, told
    assert told["child"]["session"] != client.welcome["session"]
    assert client.ask("read", va=region["va"], size=6) == "child!"
    eventually(lambda: len(daemon.ctl("sessions")["sessions"]) == 1)
    client.end()
    eventually(lambda: daemon.ctl("stats")["stats"]["sessions"] == 0)


def test_bad_requests_of_a_real_session(daemon, run_client):
    client, other = run_client(daemon.socket), run_client(daemon.socket)
    mine = ok(client.ask("mmap", bytes=8192))["va"]
    foreign = ok(other.ask("mmap", bytes=8192))["va"]
    for op, args, expected in [
        ("mmap", {"bytes": 0}, ("EINVAL", "bytes")),
        ("mmap", {"bytes": 1 << 62}, ("ENOMEM", "bytes")),
        ("mmap", {"bytes": 4 << 40}, ("ENOMEM", "bytes")),
        ("mmap_commit", {"va": foreign}, ("EINVAL", "va")),
        ("mmap_commit", {"va": mine + 4096}, ("EINVAL", "va")),
        ("prefetch", {"hnid": 1, "va": foreign, "bytes": 4096}, ("EINVAL", "va")),
        ("prefetch", {"hnid": 1, "va": mine, "bytes": 16384}, ("EINVAL", "va")),
        ("prefetch", {"hnid": 5, "va": mine, "bytes": 1}, ("EINVAL", "hnid")),
        ("discard", {"va": foreign, "bytes": 4096}, ("EINVAL", "va")),
        ("query", {"va": foreign, "bytes": 1}, ("EINVAL", "va")),
        ("hmemcpy", {"hnid": 0, "dst": mine, "src": foreign, "bytes": 10}, ("EINVAL", "dst")),
        ("advise", {"hnid": -1, "va": mine, "bytes": 1, "advice": "accessed_by"}, ("EINVAL", "hnid")),
        ("attach", {"driver": "simgpu", "name": "simgpu0"}, ("EEXIST", "name")),
        ("attach", {"driver": "simgpu", "name": "tiny", "config": {"capacity": "100"}}, ("EINVAL", "config")),
        ("attach", {"driver": "simgpu", "name": "x", "config": {"colour": "red"}}, ("EINVAL", "config")),
        ("detach", {"name": "nope"}, ("ENOENT", "name")),
    ]:
        error = client.ask("request", op=op, args=args)["error"]
        assert (error["code"], error.get("argument")) == expected, (op, args, error)
    other.ask("write", va=foreign, text="untouched")
    # unmapping what is not its own is done, and touches nobody's memory
    ok(client.ask("request", op="munmap", args={"va": foreign, "bytes": 8192}))
    assert other.ask("read", va=foreign, size=9) == "untouched"
    assert daemon.stop() == 0


def test_memory_survives_a_graceful_stop(daemon, run_client):
    client = run_client(daemon.socket)
    region = ok(client.ask("mmap", bytes=1 << 20, page_bytes=65536))
    place = {"va": region["va"], "bytes": 1 << 20}
    client.ask("fill", **place, step=PAGE)
    ok(client.ask("request", op="prefetch", args={"hnid": 1, **place}))
    assert daemon.stop() == 0
    assert not daemon.directory.exists()
    assert client.ask("check", **place, step=PAGE) == 0


def test_events_are_published(daemon, run_client):
    context = zmq.Context()
    subscriber = context.socket(zmq.SUB)
    subscriber.setsockopt(zmq.LINGER, 0)
    subscriber.setsockopt(zmq.RCVTIMEO, 10_000)
    subscriber.subscribe("")
    subscriber.connect(f"ipc://{daemon.directory}/events.sock")
    time.sleep(0.3)
    client = run_client(daemon.socket)
    daemon.ctl("attach", "simgpu", "g1", "capacity=1M")
    daemon.ctl("detach", "g1")
    client.end()
    seen = [subscriber.recv_multipart() for _ in range(4)]
    subscriber.close()
    context.term()
    assert [topic for topic, _ in seen] == [
        b"session.started",
        b"device.attached",
        b"device.detached",
        b"session.ended",
    ]
    token = bytes.fromhex(client.welcome["token"])
    assert all(token not in body for _, body in seen)
    assert msgpack.unpackb(seen[1][1]) == {"hnid": 2, "name": "g1", "driver": "simgpu", "capacity_bytes": 1 << 20}


def test_two_daemons_do_not_share_a_directory(daemon, run_daemon, tmp_path):
    second = run_daemon("--set", "daemon.log_level=error", "--runtime-dir", str(daemon.directory))
    assert second.process.wait(20) == 1
    assert second.said.startswith("ERROR=runtime_dir: another gmemd runs in")
    assert daemon.ctl("status")["pid"] == daemon.process.pid


def test_what_a_killed_daemon_left_is_no_obstacle(run_daemon):
    first = run_daemon()
    first.process.kill()
    first.process.wait(20)
    assert sorted(os.listdir(first.directory)) == ["control.sock", "events.sock", "gmemd.sock"]
    second = run_daemon("--runtime-dir", str(first.directory))
    assert second.said == "READY=1\n"
    assert second.stop() == 0


@pytest.mark.parametrize(
    "args, words",
    [
        (["--device", "simgpu0:capacity=1"], "capacity: smaller than one page"),
        (["--device", "x:driver=nope"], "there is no driver 'nope'"),
        (["--device", "x:driver=no.such:Thing"], "can't be loaded"),
    ],
)
def test_a_start_that_fails_says_why_and_leaves_nothing(run_daemon, args, words):
    daemon = run_daemon(*args)
    assert daemon.process.wait(20) == 1
    assert daemon.said.startswith("ERROR=") and words in daemon.said
    assert words in daemon.log and not daemon.directory.exists()


def test_a_directory_of_others_is_refused(run_daemon, tmp_path):
    (tmp_path / "open").mkdir(mode=0o777)
    (tmp_path / "open").chmod(0o777)
    daemon = run_daemon("--runtime-dir", str(tmp_path / "open"))
    assert daemon.process.wait(20) == 1 and "written by others" in daemon.said


def test_embedded_ends_with_its_process_tree(run_daemon, run_client):
    read, write = os.pipe()
    daemon = run_daemon("--parent-fd", str(read), embedded=True, pass_fds=(read,))
    os.close(read)
    assert stat.S_IMODE(daemon.directory.stat().st_mode) == 0o700
    client = run_client(daemon.socket)
    daemon.process.send_signal(signal.SIGINT)
    os.close(write)
    time.sleep(1.0)
    assert daemon.process.poll() is None, "a session is still there"
    client.end()
    assert daemon.process.wait(20) == 0
    assert not daemon.directory.exists()


def test_embedded_without_a_pipe_watches_its_parent(tmp_path):
    code = f"""
import subprocess, sys, os
r, w = os.pipe()
p = subprocess.Popen([sys.executable, "-m", "gmemd", "run", "--embedded", "--runtime-dir", {str(tmp_path / "run")!r},
                      "--ready-fd", str(w)], pass_fds=(w,))
os.close(w)
print(os.read(r, 100).decode().strip(), p.pid, flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    said, pid = done.stdout.split()
    assert said == "READY=1"
    deadline = time.monotonic() + 10
    stat_path = Path(f"/proc/{pid}/stat")
    while stat_path.exists() and stat_path.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "it has outlived its process tree"
        time.sleep(0.05)
    assert not (tmp_path / "run").exists()


def test_readiness_is_told_to_systemd(run_daemon, tmp_path):
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(str(tmp_path / "notify"))
    sock.settimeout(10)
    environ = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "400000"}
    daemon = run_daemon(env=environ)
    seen = [sock.recv(1000).decode() for _ in range(3)]
    assert any(f"READY=1\nSTATUS=devices: none\nMAINPID={daemon.process.pid}" == text for text in seen)
    assert "WATCHDOG=1" in seen
    assert daemon.stop() == 0
    while not (text := sock.recv(1000).decode()).startswith("STOPPING=1"):
        assert text == "WATCHDOG=1"
    sock.close()


@needs_root
def test_a_client_of_another_user(daemon, run_client, tmp_path):
    for parent in [daemon.directory, *daemon.directory.parents][:5]:
        if str(parent).startswith("/tmp/"):
            parent.chmod(0o755)
    client = run_client(daemon.socket, env={"GMEM_TEST_UID": "65534"})
    region = ok(client.ask("mmap", bytes=1 << 20))
    client.ask("write", va=region["va"], text="nobody")
    assert client.ask("read", va=region["va"], size=6) == "nobody"
    assert client.ask("request", op="attach", args={"driver": "os:abort", "name": "x"})["error"]["code"] == "EPERM"
    root = run_client(daemon.socket)
    assert len(ok(client.ask("request", op="sessions", args={}))["sessions"]) == 1
    assert len(ok(root.ask("request", op="sessions", args={}))["sessions"]) == 2
    # a token does not carry memory across users
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect(daemon.socket)
    sock.send(wire.pack_hello(wire.CONTEXT, bytes.fromhex(client.welcome["token"]), "simgpu0"))
    assert wire.unpack_welcome(sock.recv(1024)).status < 0
    sock.close()


def test_many_short_clients_leave_no_descriptor(daemon, run_client, eventually):
    def descriptors():
        return len(os.listdir(f"/proc/{daemon.process.pid}/fd"))

    client = run_client(daemon.socket)
    client.end()
    eventually(lambda: not daemon.ctl("sessions")["sessions"])
    before = descriptors()
    for _ in range(10):
        client = run_client(daemon.socket)
        region = ok(client.ask("mmap", bytes=1 << 16))
        client.ask("write", va=region["va"], text="x")
        client.process.kill()
    for _ in range(200):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect(daemon.socket)
        sock.send(wire.pack_hello(wire.CLIENT)[: _ % 81])
        sock.close()
    eventually(lambda: not daemon.ctl("sessions")["sessions"])
    eventually(lambda: descriptors() <= before)
