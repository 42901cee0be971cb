# SPDX-License-Identifier: Apache-2.0
"""Signs of life do not wait for a manager that does not listen."""

import socket

from gmemd.systemd import Notifier


def test_a_manager_that_does_not_listen_holds_up_nobody(tmp_path, monkeypatch):
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.bind(str(tmp_path / "notify"))
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    notifier = Notifier()
    for _ in range(2000):  # many more than its queue takes
        notifier.send("WATCHDOG=1", patience_s=0)
    assert manager.recv(100) == b"WATCHDOG=1"
    manager.close()
