# SPDX-License-Identifier: Apache-2.0
"""The supervisor with small programs in the daemon's place."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from gmemd.supervise import UPGRADE_STATUS

RUN = """
import sys
from gmemd import supervise
sys.exit(supervise.run([sys.executable, "-c", sys.argv[1]], watchdog_s=float(sys.argv[2]), ready_fd=-1))
"""
HELPERS = """
import array, os, socket, sys, time
notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
notify.connect("\\0" + os.environ["NOTIFY_SOCKET"][1:])
def say(text, fd=None):
    fds = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))] if fd is not None else []
    notify.sendmsg([text.encode()], fds)
names = os.environ["LISTEN_FDNAMES"].split(":") if os.environ["LISTEN_FDS"] != "0" else []
assert os.environ["LISTEN_PID"] == str(os.getpid()) and len(names) == int(os.environ["LISTEN_FDS"])
held = {name: 3 + n for n, name in enumerate(names)}
life = int(os.pread(held["life"], 10, 0)) if "life" in held else 0
if "life" not in held:
    held["life"] = os.memfd_create("life")
    say("FDSTORE=1\\nFDNAME=life\\nFDPOLL=0", held["life"])
os.pwrite(held["life"], str(life + 1).encode().ljust(10), 0)
"""


def supervised(code, watchdog_s=0.0):
    command = [sys.executable, "-c", RUN, HELPERS + textwrap.dedent(code), str(watchdog_s)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def outcome(process, seconds=30):
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out.split(), err


def test_what_is_held_is_there_in_the_next_life():
    status, out, err = outcome(supervised("""
        if life == 0:
            for n in range(20):
                fd = os.memfd_create("x"); os.write(fd, str(n).encode())
                say(f"FDSTORE=1\\nFDNAME=number.{n}", fd)
            say("FDSTOREREMOVE=1\\nFDNAME=number.7")
            say("READY=1")
            os.kill(os.getpid(), 9)
        numbers = {name: os.pread(fd, 9, 0).decode() for name, fd in held.items() if name != "life"}
        print(numbers == {f"number.{n}": str(n) for n in range(20) if n != 7}, life)
        """))  # fmt: skip
    assert (status, out) == (0, ["True", "1"]), err


@pytest.mark.parametrize("end", ["os.abort()", "sys.exit(1)", f"os._exit({UPGRADE_STATUS})", "os.kill(os.getpid(), 9)"])
def test_what_dies_is_started_again(end):
    status, out, err = outcome(supervised(f"""
        print(life, flush=True)
        say("READY=1")
        if life < 3:
            {end}
        """))  # fmt: skip
    assert (status, out) == (0, ["0", "1", "2", "3"]), err


def test_what_never_worked_is_given_up():
    status, out, _ = outcome(supervised("print(life, flush=True); sys.exit(5)"))
    assert (status, out) == (5, ["0"])


def test_a_stop_is_passed_on_and_ends_it():
    process = supervised("""
        import signal
        signal.signal(signal.SIGTERM, lambda *args: sys.exit(0))
        say("READY=1")
        print("up", flush=True)
        time.sleep(60)
        """)
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    assert outcome(process)[0] == 0


def test_the_watchdog_ends_one_that_says_nothing():
    status, out, err = outcome(supervised("""
        print(life, os.environ["WATCHDOG_USEC"], flush=True)
        say("READY=1")
        if life == 0:
            time.sleep(60)
        for _ in range(8):
            say("WATCHDOG=1")
            time.sleep(0.1)
        """, 0.5))  # fmt: skip
    assert (status, out) == (0, ["0", "500000", "1", "500000"]), err
    assert "watchdog" in err


def test_only_the_daemon_is_listened_to():
    """Its children inherit the variable, perhaps."""
    status, out, err = outcome(supervised("""
        if life == 0:
            if os.fork() == 0:
                say("FDSTORE=1\\nFDNAME=foreign", os.memfd_create("x"))
                os._exit(0)
            os.wait()
            say("READY=1")
            time.sleep(0.2)
            os.kill(os.getpid(), 9)
        print(sorted(held))
        """))  # fmt: skip
    assert (status, out) == (0, ["['life']"]), err


def test_it_ends_with_its_parent():
    process = supervised("""
        say("READY=1")
        print(os.getpid(), flush=True)
        time.sleep(60)
        """)
    daemon = int(process.stdout.readline())
    process.kill()
    process.wait(10)
    until = time.monotonic() + 10
    while os.path.exists(f"/proc/{daemon}") and time.monotonic() < until:
        time.sleep(0.02)
    assert not os.path.exists(f"/proc/{daemon}")
