# SPDX-License-Identifier: Apache-2.0
"""The processes of the state machine keep the descriptors that they have."""

import gc
import os
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from world import receive, send, start  # noqa: E402


def opens_what_was_closed(sock, number):
    os.dup2(sock.fileno(), number)
    gc.collect()
    try:
        os.fstat(number)
        send(sock, "open")
    except OSError:
        send(sock, "closed")


def test_a_parents_garbage_closes_nothing():
    gc.disable()
    try:
        garbage = [socket.socket()]
        number = garbage[0].fileno()
        garbage.append(garbage)
        del garbage
        pid, sock = start(opens_what_was_closed, number)
    finally:
        gc.enable()
    answer, _ = receive(sock)
    sock.close()
    os.waitpid(pid, 0)
    assert answer == "open"
