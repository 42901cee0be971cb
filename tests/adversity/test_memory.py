# SPDX-License-Identifier: Apache-2.0
"""What a client can do to its own userfaultfd, files, ring and processes, and to those of others."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import as_user

sys.path.insert(0, str(Path(__file__).resolve().parent))
import raw  # noqa: E402

START = """
import ctypes, fcntl, json, os, random, sys
import raw
from gmemd import wire
session = raw.Session().ready()
va = session.map(1 << 20, page_bytes=4096)
def write(at, value): ctypes.c_uint64.from_address(at).value = value
def read(at): return ctypes.c_uint64.from_address(at).value
for at in range(va, va + (1 << 20), 4096): write(at, at)
def say(**what): print(json.dumps(what), flush=True)
"""


def test_punching_writing_and_sealing_its_file(attack):
    """Its own memory is what it has harmed; a punch reads zero, as it would in any file."""
    status, said, err = attack(START + """
small = session.by_flag[wire.HAS_SMALL]
offset = va - session.welcome.window[0]
libc = ctypes.CDLL(None, use_errno=True)
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
errors = []
for call in (lambda: os.ftruncate(small, 0), lambda: os.ftruncate(small, 1 << 45),
             lambda: fcntl.fcntl(small, 1033, 8)):
    try:
        call(); errors.append(0)
    except OSError as error:
        errors.append(error.errno)
assert libc.fallocate(small, 3, offset, 1 << 19) == 0
os.pwrite(small, b"x" * 65536, offset + (1 << 19))
for at in range(va, va + (1 << 20), 4096): read(at)
r = session.ask("prefetch", hnid=1, va=va, bytes=1 << 20)
r = session.ask("prefetch", hnid=0, va=va, bytes=1 << 20)
say(errors=errors, upper=read(va + (1 << 20) - 4096) == va + (1 << 20) - 4096)
""")  # fmt: skip
    assert status == 0, err
    assert all(said["errors"]) and said["upper"], said


def test_a_flood_of_writes_beyond_every_region(attack):
    """Pages of its file that gmemd knows nothing of are freed with the session: the census after says so."""
    status, said, err = attack(START + """
small = session.by_flag[wire.HAS_SMALL]
for n in range(256):
    os.pwrite(small, b"x" * 65536, (1 << 30) + n * 65536)
say(ok=session.ask("ping")["ok"])
""")
    assert status == 0 and said["ok"], err


@pytest.mark.parametrize("how", ["closes", "steals", "foreign", "unregisters"])
def test_its_own_userfaultfd(attack, how):
    """At worst it waits for ever, and is killed; that is its own business."""
    code = START + """
import select, struct, threading
how = sys.argv[1]
UFFDIO_REGISTER, UFFDIO_UNREGISTER = 0xC020AA00, 0x8010AA01
if how == "closes":
    os.close(session.uffd)
elif how == "steals":
    def thief():
        for _ in range(200):
            select.select([session.uffd], [], [], 0.01)
            try: os.read(session.uffd, 4096)
            except OSError: pass
    threading.Thread(target=thief, daemon=True).start()
elif how == "foreign":
    import mmap
    anon = mmap.mmap(-1, 1 << 20)
    at = ctypes.addressof(ctypes.c_char.from_buffer(anon))
    fcntl.ioctl(session.uffd, UFFDIO_REGISTER, struct.pack("QQQQ", at, 1 << 20, 1, 0))
    threading.Thread(target=lambda: ctypes.string_at(at, 4096), daemon=True).start()
else:
    fcntl.ioctl(session.uffd, UFFDIO_UNREGISTER, struct.pack("QQ", va, 1 << 20))
session.ask("prefetch", hnid=1, va=va, bytes=1 << 20)
def touch():
    for at in range(va, va + (1 << 20), 4096): read(at)
worker = threading.Thread(target=touch, daemon=True)
worker.start()
worker.join(1.0)
say(ok=session.ask("ping")["ok"])
os._exit(0)
"""
    try:
        status, said, err = attack(code, how, seconds=20)
    except subprocess.TimeoutExpired:
        return  # killed: the fixture looks whether that left anything behind
    assert status in (0, -signal.SIGBUS, -signal.SIGKILL), err
    assert said is None or said["ok"]


def test_rubbish_in_its_ring(attack):
    status, said, err = attack("""
import ctypes, json, mmap, os, random, sys
import gmem, numpy as np
session = gmem.connect(os.environ["GMEM_SOCKET"])
a = gmem.full(1 << 16, 5, np.int64)
maps = [line.split() for line in open("/proc/self/maps") if "gmem-ring" in line]
ring = next(int(m[0].split("-")[0], 16) for m in maps)
rng = random.Random(3)
for n in range(3000):
    at = rng.randrange(0, 4096 + 256 * 64 + 512 * 64 - 8)
    ctypes.c_uint64.from_address(ring + at).value = rng.getrandbits(64)
    if n % 100 == 0:
        try: gmem._session.default()._requests.call("ping")
        except Exception: pass
print(json.dumps({"sum": int(a.sum())}), flush=True)
os._exit(0)
""")
    assert status == 0 and said["sum"] == 5 << 16, err


def test_killed_at_any_instant_it_leaves_nothing(target):
    """The fixture counts afterwards."""
    code = START + """
session.ask("prefetch", hnid=1, va=va, bytes=1 << 19)
say(ready=True)
while True:
    for at in range(va, va + (1 << 20), 4096): write(at, at)
    session.ask("prefetch", hnid=1, va=va, bytes=1 << 19)
"""
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent), "GMEM_SOCKET": target.socket}
    rounds = int(os.environ.get("GMEM_KILL_ROUNDS", "12"))
    for n in range(rounds):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environ)
        if n % 3:
            process.stdout.readline()
            time.sleep(0.013 * (n % 7))
        else:
            time.sleep(0.02 * n % 0.3)
        process.kill()
        process.wait(20)
        process.stdout.close()


def test_stopped_it_harms_nobody(target, neighbour):
    code = START + "say(ready=True)\nimport time\ntime.sleep(60)\n"
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent), "GMEM_SOCKET": target.socket}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environ)
    process.stdout.readline()
    process.send_signal(signal.SIGSTOP)
    other = raw.Session(target.socket).ready()
    began = time.monotonic()
    va = other.map(6 << 20, page_bytes=4096)  # more than the device has, whose memory the stopped one holds in part
    assert other.ask("prefetch", hnid=1, va=va, bytes=2 << 20)["ok"]
    assert other.ask("ping")["ok"] and time.monotonic() - began < 20
    other.sock.close()
    other.context.destroy(linger=0)
    process.kill()
    process.wait(20)
    process.stdout.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs two users")
def test_one_user_and_another(target, neighbour):
    """With a public directory: what belongs to another user can't be reached by number, by token or by /proc."""
    run = target.directory
    mode = run.stat().st_mode & 0o777
    managed, _ = neighbour
    at = managed.__array_interface__["data"][0]
    code = f"""
import json, os, sys
denied = []
for path in ("/proc/{target.pid}/fd", "/proc/{target.pid}/mem", "/proc/{os.getpid()}/mem", "/proc/{target.pid}/maps"):
    try:
        os.listdir(path) if path.endswith("fd") else os.open(path, os.O_RDWR)
        denied.append(False)
    except OSError:
        denied.append(True)
try:
    import raw
    session = raw.Session("{target.socket}").ready()
    replies = [session.ask("query", va={at}, bytes=4096), session.ask("discard", va={at}, bytes=4096),
               session.ask("map", session=1), session.ask("limit", name="host", bytes=1 << 30)]
    codes = [r.get("error", dict()).get("code") for r in replies]
    seen = len(session.ask("sessions")["sessions"])
except PermissionError as error:
    codes, seen = str(error), None
print(json.dumps(dict(denied=denied, codes=codes, seen=seen)))
"""
    run.chmod(0o755)
    (run / "gmemd.sock").chmod(0o666)
    (run / "control.sock").chmod(0o666)
    parents = [p for p in run.parents if p.stat().st_mode & 0o1 == 0]
    modes = {p: p.stat().st_mode & 0o7777 for p in parents}
    try:
        for parent in parents:
            parent.chmod(modes[parent] | 0o1)
        environ = {**os.environ, "PYTHONPATH": f"{Path(__file__).resolve().parent}"}
        done = subprocess.run(
            as_user(65534, [sys.executable, "-c", code]), capture_output=True, text=True, timeout=60, env=environ
        )
    finally:
        for parent in parents:
            parent.chmod(modes[parent])
        run.chmod(mode)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert all(said["denied"]), said
    assert said["codes"] == ["EINVAL", "EINVAL", "ENOENT", "EPERM"], said
    assert said["seen"] == 1, "itself"
