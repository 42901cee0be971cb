# SPDX-License-Identifier: Apache-2.0
import os
import socket
import subprocess
import sys

import pytest

from gmemd.systemd import Notifier, passed_descriptors


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path):
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    name = str(tmp_path / "notify") if request.param == "path" else f"@gmem-test-{os.getpid()}"
    sock.bind("\0" + name[1:] if name.startswith("@") else name)
    sock.settimeout(5)
    yield name, sock
    sock.close()


def test_notifications(manager):
    name, sock = manager
    environ = {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid()), "HOME": "/"}
    notifier = Notifier(environ)
    assert environ == {"HOME": "/"}
    assert notifier.watchdog_interval_s == 1.5
    notifier.ready("devices: none")
    assert sock.recv(1000).decode().splitlines() == ["READY=1", "STATUS=devices: none", f"MAINPID={os.getpid()}"]
    notifier.watchdog()
    assert sock.recv(1000) == b"WATCHDOG=1"
    notifier.stopping("SIGTERM")
    assert sock.recv(1000) == b"STOPPING=1\nSTATUS=SIGTERM"


def test_a_watchdog_of_another_process_is_not_ours():
    assert Notifier({"WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}).watchdog_interval_s == 0
    assert Notifier({"WATCHDOG_USEC": "x"}).watchdog_interval_s == 0


def test_without_systemd_nothing_happens(tmp_path):
    Notifier({}).ready("x")
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")}).ready("x")
    assert passed_descriptors({}) == []
    assert passed_descriptors({"LISTEN_PID": "1", "LISTEN_FDS": "1"}) == []
    assert Notifier({"FDSTORE": "5"}).fd_store_max == 0, "nobody to tell"


def test_socket_activation(tmp_path):
    """As systemd does it: descriptors from 3 on, of which one is the right kind."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as right, socket.socket(socket.AF_UNIX) as wrong:
        right.bind(str(tmp_path / "s"))
        right.listen()
        code = (
            "import os; from gmemd.systemd import listening_socket as l, passed_descriptors as p\n"
            "os.environ['LISTEN_PID'] = str(os.getpid()); passed = p()\n"
            "print(passed, [os.get_inheritable(fd) for _, fd in passed], 'LISTEN_FDS' in os.environ)\n"
            "print([s and s.getsockname() for s in (l(fd) for _, fd in passed)])\n"
            "try: os.fstat(3)\nexcept OSError: print('3 is closed')"
        )

        def place():
            first, second = os.dup(wrong.fileno()), os.dup(right.fileno())
            os.dup2(first, 3)
            os.dup2(second, 4)

        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, preexec_fn=place, close_fds=False,
            env={**os.environ, "LISTEN_FDS": "2", "LISTEN_FDNAMES": "some:gmemd.socket"},
        )  # fmt: skip
    assert done.stdout.splitlines() == [
        "[('some', 3), ('gmemd.socket', 4)] [False, False] False", f"[None, '{tmp_path}/s']", "3 is closed",
    ], done.stderr  # fmt: skip
