# SPDX-License-Identifier: Apache-2.0
"""A gmemd that was killed: what the client asks of it fails, and nothing of the client hangs. Each in a program of its
own, with an end: munmap(2) and fork(2) wait for a gmemd that is not there to read their events."""

import pytest
from helpers import run_python

BEFORE = """
import os, time, gmem, numpy as np
session = gmem.connect(devices=["simgpu0:capacity=4M"], settings=["daemon.event_fork={events}"])
a = gmem.full(1 << 20, 3, np.uint8, page_size="64K")
small = gmem.full(10, 4)
os.kill(session.embedded.pid, 9)
while not session._daemon_gone():
    time.sleep(0.01)
assert (a == 3).all() and (small == 4).all(), "what is mapped stays"
"""

AFTER = {
    "requests": """
try:
    gmem.stats()
except gmem.ConnectionLost:
    print("ok")
""",
    "free": """
del a, small
print("ok")
""",
    "close": """
session.close()
print("ok")
""",
    "exit": """
print("ok")
""",
    "fork": """
pid = os.fork()
if pid == 0:
    try:
        gmem.zeros(1 << 20)
    except gmem.ConnectionLost:
        os._exit(7)
    os._exit(1)
assert os.WEXITSTATUS(os.waitpid(pid, 0)[1]) == 7
print("ok")
""",
    "fork touches": """
pid = os.fork()
if pid == 0:
    a[0]
    os._exit(1)
assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == 11, "neither zeros nor a hang"
print("ok")
""",
    "reconnect": """
gmem.connect(devices=["simgpu0:capacity=4M"])
b = gmem.full(1 << 20, 5, np.uint8, page_size="64K")
assert (b == 5).all() and (a == 3).all()
print("ok")
""",
}


@pytest.mark.parametrize("events", ["true", "false"])
@pytest.mark.parametrize("what", AFTER)
def test_nothing_hangs(what, events):
    done = run_python(BEFORE.format(events=events) + AFTER[what], timeout=40)
    assert (done.stdout, done.returncode) == ("ok\n", 0), done.stderr
