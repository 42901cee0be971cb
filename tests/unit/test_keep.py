# SPDX-License-Identifier: Apache-2.0
import array
import os
import socket

import pytest

from gmemd.keep import Keep
from gmemd.systemd import Notifier


@pytest.fixture
def manager(tmp_path):
    """As systemd holds descriptors: name -> descriptor."""

    class Manager:
        def __init__(self):
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self.sock.bind(str(tmp_path / "notify"))
            self.sock.setblocking(False)
            self.held = {}

        def environ(self, most=100):
            return {"NOTIFY_SOCKET": str(tmp_path / "notify"), "FDSTORE": str(most)}

        def read(self):
            while True:
                try:
                    data, ancillary, _, _ = self.sock.recvmsg(4096, socket.CMSG_SPACE(4))
                except BlockingIOError:
                    return self.held
                said = dict(line.split("=", 1) for line in data.decode().splitlines())
                if said.get("FDSTORE"):
                    fds = array.array("i")
                    fds.frombytes(ancillary[0][2][:4])
                    assert said["FDPOLL"] == "0"
                    self.held[said["FDNAME"]] = fds[0]
                if said.get("FDSTOREREMOVE"):
                    os.close(self.held.pop(said["FDNAME"]))

    manager = Manager()
    yield manager
    for fd in manager.held.values():
        os.close(fd)
    manager.sock.close()


def test_what_is_held_comes_back(manager, tmp_path):
    keep = Keep(Notifier(manager.environ()), [])
    keep.notes.put("sessions", 3, {"uid": 4})
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    keep.hold("conn.3.0", ours.fileno())
    ours.close()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        keep.hold("listen", listener.fileno())
    passed = [(name, os.dup(fd)) for name, fd in manager.read().items()]
    assert {name for name, _ in passed} == {"notes", "conn.3.0", "listen"}

    core_file = os.memfd_create("x")
    again = Keep(Notifier(manager.environ()), [*passed, ("file.3.0.0", core_file)])
    assert again.notes.table("sessions") == {3: {"uid": 4}}
    ((session, context, sock),) = again.connections()
    assert (session, context) == (3, 0)
    sock.send(b"hello")
    assert theirs.recv(10) == b"hello"
    found, activated = again.listener()
    assert found.getsockname() == str(tmp_path / "s") and not activated
    arguments = again.core_arguments()
    assert arguments["kept"] == [("file.3.0.0", core_file)] and arguments["keep_max_fds"] == 100
    again.forget("conn.3.0")
    again.end()
    assert manager.read() == {}
    for end in (sock, theirs, found):
        end.close()
    os.close(core_file)
    os.close(arguments["keep_socket"])


def test_without_a_store_nothing_is_kept(manager, tmp_path):
    environ = manager.environ()
    del environ["FDSTORE"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        keep = Keep(Notifier(environ), [("gmemd.socket", os.dup(listener.fileno()))])
    keep.hold("x", 0)
    keep.notes.put("a", 1, {})
    assert keep.core_arguments() == {} and keep.connections() == []
    found, activated = keep.listener()
    assert found.getsockname() == str(tmp_path / "s") and activated
    found.close()
    keep.end()
    assert manager.read() == {}


def test_a_manager_that_is_gone_is_no_reason_to_fail(manager, tmp_path):
    keep = Keep(Notifier(manager.environ()), [])
    manager.read()
    manager.sock.close()
    keep.hold("conn.1.0", 0)
    keep.forget("conn.1.0")
    keep.end()
