# SPDX-License-Identifier: Apache-2.0
"""The real handshake server on a real socket, over a core that only keeps books; userfaultfds are real ones."""

import array
import asyncio
import contextlib
import errno
import fcntl
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gmemd import wire
from gmemd.admission import Admissions
from gmemd.config import Limits
from gmemd.devices import DeviceTable
from gmemd.drivers.registry import Registry
from gmemd.handshake import HandshakeServer
from gmemd.sessions import SessionTable

USERFAULTFD_IOC_NEW = 0xAA00


def new_uffd():
    try:
        device = os.open("/dev/userfaultfd", os.O_RDWR)
    except OSError:
        pytest.skip("/dev/userfaultfd can't be opened")
    try:
        return fcntl.ioctl(device, USERFAULTFD_IOC_NEW, os.O_CLOEXEC | os.O_NONBLOCK)
    finally:
        os.close(device)


def open_fds():
    return len(os.listdir("/proc/self/fd"))


class Rig:
    """The server's loop runs on a thread of its own."""

    def __init__(self, core, directory, **limits):
        self.core = core
        self.path = str(directory / "gmemd.sock")
        self.published = []
        publish = lambda topic, fields: self.published.append((topic, fields))  # noqa: E731
        limits = Limits(**{"handshake_timeout_s": 5.0, **limits})
        self.sessions = SessionTable(
            core,
            sessions_per_uid=limits.sessions_per_uid,
            contexts_per_session=limits.contexts_per_session,
            publish=publish,
        )
        self.devices = DeviceTable(core, Registry(core.driver_builtin), self.sessions, publish)
        admissions = Admissions(
            core, self.sessions, self.devices, control="ipc:///c", events="ipc:///e", publish=publish
        )
        self.server = HandshakeServer(admissions, limits)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(self.path)
        self.on_loop(self._start(listener))
        self.peers = []

    async def _start(self, listener):
        self.server.start(listener)

    def on_loop(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(20)

    def connect(self):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.settimeout(10)
        sock.connect(self.path)
        self.peers.append(sock)
        return sock

    def hello(self, kind=wire.CLIENT, token=bytes(32), device="", sock=None, flags=0):
        sock = sock or self.connect()
        sock.send(wire.pack_hello(kind, token, device, flags))
        data, fds, _, _ = socket.recv_fds(sock, 1024, 8)
        return sock, wire.unpack_welcome(data), fds

    def client(self):
        """A session, through READY."""
        sock, welcome, fds = self.hello()
        assert welcome.status == 0, welcome.message
        close_all(fds)
        assert self.attach(sock) == (0, "")
        return sock, welcome

    def attach(self, sock, fd=None):
        fd = new_uffd() if fd is None else fd
        socket.send_fds(sock, [wire.pack_uffd()], [fd])
        os.close(fd)
        return wire.unpack_ready(sock.recv(1024))

    def close(self):
        for event in self.core.delay.values():
            event.set()
        for sock in self.peers:
            sock.close()
        self.on_loop(self.server.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()


def close_all(fds):
    for fd in fds:
        os.close(fd)


def refusal(sock):
    """The refusal that is the last message of a connection."""
    data = sock.recv(1024)
    assert sock.recv(1024) == b""
    try:
        welcome = wire.unpack_welcome(data)
        return -welcome.status, welcome.message
    except OSError:
        status, message = wire.unpack_ready(data)
        return -status, message


@pytest.fixture
def make_rig(fake_core, tmp_path):
    rigs = []

    def make(**limits):
        rigs.append(Rig(fake_core, tmp_path, **limits))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


@pytest.fixture
def rig(make_rig):
    return make_rig()


def test_a_client_gets_its_session(rig, fake_core, eventually):
    sock, welcome, fds = rig.hello()
    assert welcome.status == 0 and welcome.session in fake_core.sessions
    assert welcome.flags == wire.HAS_UFFD_DEV | wire.HAS_HUGE | wire.HAS_SMALL | wire.EVENT_FORK
    assert welcome.window == (0x660000000000, 1 << 40) and welcome.small[0] == 0x660000000000
    assert (welcome.control, welcome.events, welcome.region_count, welcome.hnid) == ("ipc:///c", "ipc:///e", 0, 0)
    huge, small = fake_core.session_files(welcome.session)
    expected = [os.fstat(fd).st_ino for fd in (fake_core.features()["uffd_device_fd"], huge, small)]
    assert [os.fstat(fd).st_ino for fd in fds] == expected
    close_all(fds)
    assert not rig.published, "a session starts when its userfaultfd is there"
    assert rig.attach(sock) == (0, "")
    assert rig.published[0][0] == "session.started"
    assert rig.published[0][1]["pid"] == os.getpid() and rig.published[0][1]["uid"] == os.getuid()
    session = rig.sessions.by_token(welcome.token)
    assert session.core_id == welcome.session and session.pid == os.getpid()
    sock.close()
    eventually(lambda: not fake_core.sessions)
    assert rig.published[-1][0] == "session.ended"
    eventually(lambda: rig.server.connections == 0)


def test_who_wants_a_ring_gets_it_and_its_doorbell(rig, fake_core):
    sock, welcome, fds = rig.hello(flags=wire.WANT_RING)
    assert welcome.status == 0 and welcome.flags & wire.HAS_RING and len(fds) == 5
    ring = fake_core.session_ring(welcome.session)
    assert [os.fstat(fd).st_ino for fd in fds[3:]] == [os.fstat(fd).st_ino for fd in ring]
    close_all(fds)
    assert rig.attach(sock) == (0, "")
    _, child, fds = rig.hello(wire.FORK_CHILD, welcome.token, flags=wire.WANT_RING)
    assert child.flags & wire.HAS_RING and len(fds) == 5
    assert os.fstat(fds[3]).st_ino != os.fstat(ring[0]).st_ino
    close_all(fds)
    _, context, fds = rig.hello(wire.CONTEXT, welcome.token, "simgpu0", flags=wire.WANT_RING)
    assert not context.flags & wire.HAS_RING, "a context makes no requests"
    close_all(fds)


def test_a_session_without_a_ring_is_a_session(rig, fake_core):
    fake_core.fail = {"session_ring": errno.ENFILE}
    sock, welcome, fds = rig.hello(flags=wire.WANT_RING)
    assert welcome.status == 0 and not welcome.flags & wire.HAS_RING and len(fds) == 3
    close_all(fds)
    assert rig.attach(sock) == (0, "")


def test_an_admin_gets_a_token_and_no_memory(rig, fake_core, eventually):
    sock, welcome, fds = rig.hello(wire.ADMIN)
    assert welcome.status == 0 and fds == [] and welcome.session == 0
    session = rig.sessions.by_token(welcome.token)
    assert session.admin and session.core_id == 0 and not fake_core.sessions
    sock.close()
    eventually(lambda: len(rig.sessions) == 0)


def test_a_forked_child_gets_its_regions(rig, fake_core):
    _, parent = rig.client()
    fake_core.mmap(parent.session, 8192, page_bytes=0, fork="share", small=False)
    fake_core.mmap(parent.session, 4096, page_bytes=0, fork="none", small=False)
    sock, child, fds = rig.hello(wire.FORK_CHILD, parent.token)
    assert child.status == 0 and child.region_count == 1 and child.token != parent.token
    close_all(fds)
    data, fds, _, _ = socket.recv_fds(sock, 1024, 8)
    assert wire.unpack_region(data) == (0x660000000000, 8192, 0, 0, 4096)
    assert os.fstat(fds[0]).st_ino == os.fstat(fake_core.session_files(parent.session)[1]).st_ino
    close_all(fds)
    assert rig.attach(sock) == (0, "")
    assert rig.sessions.by_token(child.token).core_id == child.session


def test_a_stored_fork_needs_no_userfaultfd(rig, fake_core):
    _, parent = rig.client()
    fake_core.stored = True
    sock, child, fds = rig.hello(wire.FORK_CHILD, parent.token)
    assert child.flags & wire.FORK_STORED and child.region_count == 0
    close_all(fds)
    assert wire.unpack_ready(sock.recv(1024)) == (0, "")
    assert [topic for topic, _ in rig.published] == ["session.started"] * 2


def test_a_context(rig, fake_core, eventually):
    client, session = rig.client()
    rig.devices.attach("simgpu", "simgpu0", {})
    fake_core.mmap(session.session, 4096, page_bytes=0, fork="share", small=False)
    sock, welcome, fds = rig.hello(wire.CONTEXT, session.token, "simgpu0")
    assert welcome.status == 0 and welcome.hnid == 1 and welcome.region_count == 1 and len(fds) == 3
    close_all(fds)
    data, fds, _, _ = socket.recv_fds(sock, 1024, 8)
    assert wire.unpack_region(data)[0] == 0x660000000000
    close_all(fds)
    assert rig.attach(sock) == (0, "")
    owner = rig.sessions.by_token(session.token)
    (context,) = rig.sessions.contexts_of(owner)
    assert (context.hnid, context.pid) == (1, os.getpid())
    assert fake_core.contexts == {context.id: (session.session, 1)}
    # closed by its session: the context's process is told by the end of its connection
    rig.sessions.end_context(context, "closed by its session")
    assert sock.recv(10) == b"" and not fake_core.contexts
    # and the other way: the process ends
    sock, welcome, fds = rig.hello(wire.CONTEXT, session.token, "simgpu0")
    close_all(fds)
    close_all(socket.recv_fds(sock, 1024, 8)[1])
    assert rig.attach(sock) == (0, "")
    sock.close()
    eventually(lambda: not fake_core.contexts and not rig.sessions.contexts_of(owner))
    assert client.send(b"x") == 1  # the session itself is still connected


def test_the_end_of_a_session_ends_its_contexts(rig, fake_core, eventually):
    client, session = rig.client()
    rig.devices.attach("simgpu", "simgpu0", {})
    sock, _, fds = rig.hello(wire.CONTEXT, session.token, "simgpu0")
    close_all(fds)
    rig.attach(sock)
    client.close()
    assert sock.recv(10) == b""
    eventually(lambda: not fake_core.sessions and not fake_core.contexts and rig.server.connections == 0)


@pytest.mark.parametrize(
    "kind, device, number, word",
    [
        (wire.FORK_CHILD, "", errno.EPERM, "token"),
        (wire.CONTEXT, "simgpu0", errno.EPERM, "token"),
    ],
)
def test_a_wrong_token_is_refused(rig, kind, device, number, word):
    sock, welcome, fds = rig.hello(kind, b"x" * 32, device)
    assert (welcome.status, fds) == (-number, []) and word in welcome.message
    assert sock.recv(10) == b""


def test_a_token_of_another_user_or_without_memory_is_refused(rig, fake_core):
    _, tool, _ = rig.hello(wire.ADMIN)
    other = rig.sessions.open(fake_core.session_create(4321, 1), 4321, 1, False, lambda reason: None)
    for token in (tool.token, other.token):
        for kind in (wire.FORK_CHILD, wire.CONTEXT):
            _, welcome, fds = rig.hello(kind, token, "simgpu0")
            assert welcome.status == -errno.EPERM and not fds
    assert not fake_core.called("session_fork") and not fake_core.called("context_files")


def test_a_context_of_an_unknown_device(rig):
    _, session = rig.client()
    _, welcome, _ = rig.hello(wire.CONTEXT, session.token, "simgpu9")
    assert welcome.status == -errno.ENOENT and "simgpu9" in welcome.message


def test_a_context_of_a_device_that_only_stores(rig, fake_core):
    _, session = rig.client()
    rig.devices.attach("simgpu", "tier", {})
    fake_core.fail["context_files"] = errno.EOPNOTSUPP
    _, welcome, fds = rig.hello(wire.CONTEXT, session.token, "tier")
    assert welcome.status == -errno.EOPNOTSUPP and "device: tier only stores" in welcome.message and not fds


def test_running_out_of_descriptors_is_waited_for(rig, monkeypatch, eventually):
    accept, failures = socket.socket.accept, []

    def failing(sock):
        if len(failures) < 3:
            failures.append(time.monotonic())
            raise OSError(errno.EMFILE, "Too many open files")
        return accept(sock)

    monkeypatch.setattr(socket.socket, "accept", failing)
    rig.client()
    assert len(failures) == 3 and failures[2] - failures[0] > 0.15, "it looks away for a moment each time"


@pytest.mark.parametrize(
    "data, number",
    [
        (b"x", errno.EPROTO),
        (b"\0" * 80, errno.EPROTO),
        (wire.pack_hello(wire.CLIENT)[:-1], errno.EPROTO),
        (wire.pack_hello(77), errno.EINVAL),
        (b"y" * 5000, errno.EPROTO),
        (wire.pack_uffd(), errno.EPROTO),
    ],
    ids=lambda value: f"{len(value)}" if isinstance(value, bytes) else "",
)
def test_a_malformed_hello(rig, data, number):
    sock = rig.connect()
    sock.send(data)
    assert refusal(sock)[0] == number


def test_descriptors_where_none_belong(rig, fake_core, eventually):
    before = open_fds()
    for count in (1, 4, 5, 100):
        sock = rig.connect()
        pipes = [os.open("/dev/null", os.O_RDONLY) for _ in range(count)]
        socket.send_fds(sock, [wire.pack_hello(wire.CLIENT)], pipes)
        close_all(pipes)
        assert refusal(sock)[0] == errno.EPROTO
        sock.close()
    eventually(lambda: open_fds() == before)
    assert not fake_core.called("session_create")


def test_what_is_no_userfaultfd_is_refused(rig, fake_core, eventually):
    before, files = open_fds(), len(fake_core.fds)
    read, write = os.pipe()
    memfd = os.memfd_create("anon_inode:[userfaultfd]")
    event = os.eventfd(0)
    for given in ([read], [memfd], [event], [], [read, write], [write] * 4, [read] * 20):
        sock, welcome, fds = rig.hello()
        close_all(fds)
        if given:
            socket.send_fds(sock, [wire.pack_uffd()], given)
        else:
            sock.send(wire.pack_uffd())
        number, message = refusal(sock)
        assert number == (errno.EPROTO if len(given) > 4 else errno.EBADF), message
        sock.close()
    close_all([read, write, memfd, event])
    assert not fake_core.called("session_attach")
    eventually(lambda: not fake_core.sessions and open_fds() == before)
    assert len(fake_core.fds) == files


def test_a_malformed_uffd_message(rig, fake_core, eventually):
    for data in (b"x", wire.pack_uffd() + b"x", wire.pack_hello(wire.CLIENT), wire.pack_uffd()[:-1] + b"\1"):
        sock, _, fds = rig.hello()
        close_all(fds)
        sock.send(data)
        assert refusal(sock)[0] == errno.EPROTO
    eventually(lambda: not fake_core.sessions)


def test_a_file_comes_by_descriptor(rig, fake_core, eventually):
    _, welcome = rig.client()
    before, files = open_fds(), len(fake_core.fds)
    both = wire.FILE_WRITE | wire.FILE_PRIVATE
    for count, data, number in [
        (1, wire.pack_file(4096, 8192, flags=wire.FILE_WRITE), 0),
        (0, wire.pack_file(0, 4096), errno.EBADF), (2, wire.pack_file(0, 1), errno.EBADF),
        (1, wire.pack_file(5, 4096), errno.EINVAL), (1, wire.pack_file(0, 0), errno.EINVAL),
        (1, wire.pack_file(0, 1 << 63), errno.EINVAL), (1, wire.pack_file(0, 1, 5), errno.EINVAL),
        (1, wire.pack_file(0, 1, flags=8), errno.EPROTO), (1, wire.pack_file(0, 1, flags=both), errno.EPROTO),
        (1, b"x", errno.EPROTO), (1, wire.pack_uffd(), errno.EPROTO), (9, wire.pack_file(0, 1), errno.EPROTO),
    ]:  # fmt: skip
        given = [os.memfd_create("file") for _ in range(count)]
        sock, answer, _ = rig.hello(wire.MAP_FILE, welcome.token)
        assert answer.status == 0
        socket.send_fds(sock, [data], given)
        close_all(given)
        if number:
            assert refusal(sock)[0] == number, data
        else:
            assert wire.unpack_ready(sock.recv(1024))[0] == 0
            assert wire.unpack_region(sock.recv(1024))[1] == 8192
        sock.close()
    assert len(fake_core.called("map_file")) == 1
    eventually(lambda: open_fds() <= before)
    assert len(fake_core.fds) == files
    _, answer, _ = rig.hello(wire.MAP_FILE, bytes(32))
    assert answer.status == -errno.EPERM


def test_a_file_that_the_core_refuses(rig, fake_core):
    _, welcome = rig.client()
    cases = [(errno.EBADF, "it is only a path"), (errno.EMFILE, "as many as it may"), (errno.ENOMEM, "bytes")]
    for number, words in cases:
        fake_core.fail["map_file"] = OSError(number, words)
        sock, _, _ = rig.hello(wire.MAP_FILE, welcome.token)
        fd = os.memfd_create("file")
        socket.send_fds(sock, [wire.pack_file(0, 4096)], [fd])
        os.close(fd)
        said = refusal(sock)
        assert said[0] == number and words in said[1]


def test_what_the_core_refuses_is_said(rig, fake_core, eventually):
    fake_core.fail["session_create"] = errno.ENOMEM
    _, welcome, _ = rig.hello()
    assert welcome.status == -errno.ENOMEM and "cannot allocate" in welcome.message
    fake_core.fail = {"session_attach": OSError(errno.EINVAL, "already initialised")}
    sock, _, fds = rig.hello()
    close_all(fds)
    assert rig.attach(sock) == (-errno.EINVAL, "already initialised")
    fake_core.fail = {"session_files": errno.ETIMEDOUT}
    _, welcome, _ = rig.hello()
    assert welcome.status == -errno.ETIMEDOUT and "took too long" not in welcome.message
    fake_core.fail = {}
    eventually(lambda: not fake_core.sessions)


def test_speaking_out_of_turn_ends_the_session(rig, fake_core, eventually):
    sock, _ = rig.client()
    sock.send(b"hello again")
    with contextlib.suppress(ConnectionResetError):
        assert sock.recv(10) == b""
    eventually(lambda: rig.published[-1][0] == "session.ended")
    assert "out of turn" in rig.published[-1][1]["reason"]


def test_silent_peers_time_out_and_hold_up_nobody(make_rig, fake_core, eventually):
    rig = make_rig(handshake_timeout_s=0.5)
    silent = [rig.connect() for _ in range(20)]
    half, _, fds = rig.hello()
    close_all(fds)
    start = time.monotonic()
    rig.client()
    assert time.monotonic() - start < 0.4
    assert refusal(silent[0])[0] == errno.ETIMEDOUT
    assert refusal(half)[0] == errno.ETIMEDOUT
    eventually(lambda: len(fake_core.sessions) == 1 and rig.server.connections == 1)


def test_a_peer_that_does_not_read_times_out(make_rig, fake_core, eventually):
    rig = make_rig(handshake_timeout_s=0.5)
    client, parent = rig.client()
    for _ in range(3000):
        fake_core.mmap(parent.session, 4096, page_bytes=0, fork="share", small=False)
    sock = rig.connect()
    sock.send(wire.pack_hello(wire.FORK_CHILD, parent.token))
    eventually(lambda: fake_core.called("session_fork"))
    rig.client()
    eventually(lambda: len(fake_core.sessions) == 2)
    before = open_fds()
    sock.close()
    eventually(lambda: open_fds() < before)


def test_many_regions_arrive(rig, fake_core):
    _, parent = rig.client()
    for _ in range(2000):
        fake_core.mmap(parent.session, 4096, page_bytes=0, fork="share", small=False)
    before = open_fds()
    sock, child, fds = rig.hello(wire.FORK_CHILD, parent.token)
    close_all(fds)
    assert child.region_count == 2000
    for number in range(2000):
        data, fds, _, _ = socket.recv_fds(sock, 1024, 8)
        assert wire.unpack_region(data)[0] == 0x660000000000 + 4096 * number and len(fds) == 1
        close_all(fds)
    assert rig.attach(sock) == (0, "")
    assert open_fds() < before + 20, "duplicates are not kept"


def test_limits_per_user(make_rig, fake_core, eventually):
    rig = make_rig(handshakes_per_uid=3, connections_per_uid=5, sessions_per_uid=4)
    silent = [rig.connect() for _ in range(3)]
    eventually(lambda: rig.server.connections == 3)
    assert refusal(rig.connect())[0] == errno.EAGAIN
    for sock in silent:
        sock.close()
    eventually(lambda: rig.server.connections == 0)
    clients = [rig.client()[0] for _ in range(4)]
    _, welcome, _ = rig.hello()
    assert welcome.status == -errno.EDQUOT and "sessions" in welcome.message
    eventually(lambda: rig.server.connections == 4)
    clients[0].close()
    eventually(lambda: len(fake_core.sessions) == 3)
    rig.client()


def test_connection_limit(make_rig, eventually):
    rig = make_rig(connections_per_uid=2)
    rig.client(), rig.client()
    number, message = refusal(rig.connect())
    assert number == errno.EDQUOT and "connections" in message


def test_a_peer_that_leaves_in_the_middle(rig, fake_core, eventually):
    before = open_fds()
    rig.connect().close()
    sock = rig.connect()
    sock.send(wire.pack_hello(wire.CLIENT))
    sock.close()
    sock, _, fds = rig.hello()
    close_all(fds)
    sock.close()
    gate = fake_core.delay["session_create"] = threading.Event()
    sock = rig.connect()
    sock.send(wire.pack_hello(wire.CLIENT))
    time.sleep(0.05)
    sock.close()
    gate.set()
    eventually(lambda: not fake_core.sessions and rig.server.connections == 0 and open_fds() <= before)


def test_stop_in_the_middle_leaves_nothing(fake_core, tmp_path, eventually):
    before = open_fds()
    rig = Rig(fake_core, tmp_path)
    gate = fake_core.delay["session_create"] = threading.Event()
    sock = rig.connect()
    sock.send(wire.pack_hello(wire.CLIENT))
    eventually(lambda: fake_core.called("session_create"))
    threading.Timer(0.2, gate.set).start()
    rig.close()
    assert not fake_core.sessions and open_fds() == before


CHILD = """
import os, socket, sys
sys.path.insert(0, {root!r})
from gmemd import wire
s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
s.connect({path!r})
if {leak}:
    # somebody else holds the connection open: only the process's end tells
    parent = socket.socket(fileno=3)
    socket.send_fds(parent, [b"x"], [s.fileno()])
s.send(wire.pack_hello(wire.ADMIN))
assert wire.unpack_welcome(s.recv(1024)).status == 0
print("up", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("leak", [False, True])
def test_the_end_of_the_process_ends_the_session(rig, eventually, leak):
    ours, theirs = socket.socketpair()
    root = str(Path(__file__).resolve().parents[2])
    code = CHILD.format(root=root, path=rig.path, leak=leak)
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        preexec_fn=lambda: os.dup2(theirs.fileno(), 3), close_fds=False,
    )  # fmt: skip
    fds = socket.recv_fds(ours, 1, 1)[1] if leak else []
    assert child.stdout.readline() == b"up\n"
    assert len(rig.sessions) == 1
    child.kill()
    child.communicate()
    eventually(lambda: len(rig.sessions) == 0)
    close_all(fds)
    ours.close()
    theirs.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be another user")
def test_another_user_is_no_administrator(rig):
    os.chmod(rig.path, 0o666)
    directory = Path(rig.path)
    for parent in directory.parents[:4]:
        if str(parent).startswith("/tmp/"):
            parent.chmod(0o755)
    code = f"""
import os, socket, sys
sys.path.insert(0, {str(Path(__file__).resolve().parents[2])!r})
from gmemd import wire
os.setgid(65534); os.setuid(65534)
s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
s.connect({rig.path!r})
s.send(wire.pack_hello(wire.ADMIN))
w = wire.unpack_welcome(s.recv(1024))
sys.stdout.write(w.token.hex()); sys.stdout.flush()
sys.stdin.read()
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    token = bytes.fromhex(child.stdout.read(64))
    session = rig.sessions.by_token(token)
    assert session.uid == 65534 and not session.admin
    # and its token opens nothing for this user
    _, welcome, _ = rig.hello(wire.FORK_CHILD, token)
    assert welcome.status == -errno.EPERM
    child.communicate("")


def test_ancillary_of_another_kind_is_ignored(rig):
    sock = rig.connect()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    with contextlib.suppress(OSError):
        sock.sendmsg([wire.pack_hello(wire.ADMIN)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", []))])
        assert wire.unpack_welcome(sock.recv(1024)).status == 0
