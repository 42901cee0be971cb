# SPDX-License-Identifier: Apache-2.0
"""The processes that a state machine over the core needs: a daemon with the core (through gmemd._core), which can be
killed at any step; its manager, which holds what a successor needs; and parties, the processes that touch memory. Real
userfaultfds, real page tables: what the kernel does is not played."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import importlib.machinery
import importlib.util
import mmap
import os
import pickle
import re
import select
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = float(os.environ.get("GMEM_MODEL_PATIENCE_S", "20"))  # whoever is blocked for so long is for ever
RESULT_BYTES = 1 << 20
KEPT_MAX = 256
PROT_RW, MAP_SHARED, MAP_NORESERVE, MAP_FIXED_NOREPLACE = 3, 1, 0x4000, 0x100000
MADV_DONTFORK = 10
USERFAULTFD_IOC_NEW = 0xAA00
PR_SET_PDEATHSIG = 1
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]


class Died(Exception):
    """The daemon has been killed."""


def crash_points() -> list[str]:
    text = (ROOT / "csrc" / "include" / "gmem" / "crash.h").read_text()
    body = text[text.index("#define GMEM_CRASH_POINTS") : text.index("enum gmem_crash_point")]
    return re.findall(r"X\((\w+)\)", body.partition("\n")[2])


def load_core():
    """gmemd._core, or a build of it with a fault in it: see mutants.py."""
    path = os.environ.get("GMEM_MODEL_CORE")
    if path is None:
        from gmemd import _core

        return _core
    loader = importlib.machinery.ExtensionFileLoader("gmemd._core", path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("gmemd._core", loader))
    sys.modules["gmemd._core"] = module
    loader.exec_module(module)
    return module


CORE = load_core()


# ---- talk between processes: a pickled message and some descriptors ----


def send(sock: socket.socket, message: object, fds=()) -> None:
    socket.send_fds(sock, [pickle.dumps(message)], list(fds))


def receive(sock: socket.socket):
    """(message, descriptors); EOFError: the other side has gone."""
    try:
        data, fds, _, _ = socket.recv_fds(sock, 1 << 18, 8)
    except ConnectionResetError:
        data = b""
    if not data:
        raise EOFError
    return pickle.loads(data), fds


def start(main, *args, keep=()) -> tuple[int, socket.socket]:
    """A process that runs main(sock, *args), with no descriptor but those in keep; and our end of its socket."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parent = os.getpid()
    pid = os.fork()
    if pid:
        theirs.close()
        return pid, ours
    status = 1
    # Sockets of ours that are garbage would be closed by number when they are collected there: by then it may be
    # another descriptor's, as a userfaultfd's, which nobody watches any more.
    gc.freeze()
    try:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        low = 3
        for fd in sorted({theirs.fileno(), *keep}):
            os.closerange(low, fd)
            low = fd + 1
        os.closerange(low, 1 << 16)
        main(theirs, *args)
        status = 0
    except EOFError:
        status = 0
    except BaseException as error:
        os.write(2, f"{main.__name__}: {error!r}\n".encode())
    os._exit(status)


# ---- the daemon ----


def daemon_main(sock, store_fd, kept, config, devices, crash_file):
    os.environ["GMEM_CRASH_FILE"] = crash_file
    core = CORE.Core(keep_socket=store_fd, keep_max_fds=KEPT_MAX, kept=kept, **config)
    recovers = core.recovers()
    for hnid, (driver, name, options) in devices.items():
        core.device_attach(driver, name, options, at=hnid)
    core.resume()
    send(sock, (recovers, core.window(), core.features()))
    while True:
        try:
            (op, args), fds = receive(sock)
        except EOFError:
            os._exit(0)
        try:
            answer, passed = OPS.get(op, plain(op))(core, fds, *args)
            send(sock, ("ok", answer), passed)
        except OSError as error:
            send(sock, ("error", error.errno, str(error)))
        if op == "close":
            os._exit(0)


def plain(op):
    return lambda core, fds, *args: (getattr(core, op)(*args), ())


def given(fds):
    present = [fd for fd in fds if fd is not None]
    return [fd is not None for fd in fds], present


OPS = {
    "session_files": lambda core, fds, session: given(core.session_files(session)),
    "context_files": lambda core, fds, session, hnid: given(core.context_files(session, hnid)),
    "attach": lambda core, fds, session, pid: (core.session_attach(session, fds[0], os.pidfd_open(pid)), ()),
    "attach_context": lambda core, fds, session, hnid, pid: (
        core.context_attach(session, hnid, fds[0], os.pidfd_open(pid), pid), ()),
    "mmap": lambda core, fds, session, size, page_bytes, fork: (
        core.mmap(session, size, page_bytes=page_bytes, fork=fork, small=True), ()),
    "attach_device": lambda core, fds, hnid, device: (
        core.device_attach(*device, at=hnid), ()),
    "region_files": lambda core, fds, session: (
        core.regions(session), [region["fd"] for region in core.regions(session)][:8]),
    "stats": lambda core, fds: (dict(core.stats()), ()),
}  # fmt: skip


class Daemon:
    """The manager, and the daemon's present life."""

    def __init__(self, config, devices, crash_file):
        self.config, self.devices, self.crash_file = config, devices, crash_file
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.ours.setblocking(False)
        self.kept: list[tuple[str, int]] = []
        self.lives = self.kills = 0
        self.pid = 0
        self.sock = None

    def live(self):
        """Starts it; with what is held, if it is not the first. Died: at a crash point, on its way."""
        keep = [self.theirs.fileno(), *(fd for _, fd in self.kept)]
        self.pid, self.sock = start(
            daemon_main, self.theirs.fileno(), list(self.kept), self.config, dict(self.devices), self.crash_file,
            keep=keep,
        )  # fmt: skip
        self.lives += 1
        recovers, self.window, self.features = self.wait()
        assert recovers == (self.lives > 1)

    def collect(self):
        """What it has had held, or given up."""
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self.ours, 4096, 1)
            except BlockingIOError:
                return
            text = data.decode()
            name = re.search(r"FDNAME=(\S+)", text)
            if "FDSTOREREMOVE=1" in text:
                for held in [held for held in self.kept if held[0] == name[1]]:
                    os.close(held[1])
                    self.kept.remove(held)
            elif fds:
                assert len(self.kept) < KEPT_MAX
                self.kept.append((name[1], fds[0]))

    def arm(self, point="", passes=1):
        """Where the next life is to be killed."""
        Path(self.crash_file).write_text(f"{point}:{passes}" if point else "")

    def has_died(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def bury(self):
        _, status = os.waitpid(self.pid, 0)
        self.collect()
        self.sock.close()
        self.pid = 0
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"gmemd ended with {status:#x}"

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        self.kills += 1

    def wait(self):
        """Its next message."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            ready, _, _ = select.select([self.sock, self.ours], [], [], max(0, deadline - time.monotonic()))
            self.collect()
            if self.sock in ready:
                break
            assert ready or time.monotonic() < deadline, f"gmemd does not answer for {PATIENCE_S} s"
        try:
            message, self.fds = receive(self.sock)
        except EOFError:
            raise Died from None
        return message

    def call(self, op, *args, fds=()):
        try:
            send(self.sock, (op, args), fds)
        except OSError:
            raise Died from None
        answer = self.wait()
        if answer[0] == "error":
            raise OSError(answer[1], answer[2])
        return answer[1]

    def end(self):
        """In order, or anyhow."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        if self.sock:
            self.sock.close()
        for _, fd in self.kept:
            os.close(fd)
        self.ours.close()
        self.theirs.close()


# ---- those who touch ----


def words(at, count, stride):
    """The words at an address, or in an array of bytes, and at each stride behind."""
    size = (count - 1) * stride + 8
    raw = np.frombuffer((ctypes.c_uint8 * size).from_address(at), np.uint8) if isinstance(at, int) else at[:size]
    return np.ndarray((count,), np.uint64, raw, strides=(stride,))


class Acts:
    """What a party can be told to do."""

    def __init__(self, result):
        self.result = result
        self.files = {}
        self.pipe = os.pipe()
        for end in self.pipe:
            os.set_blocking(end, False)

    def uffd(self):
        with open("/dev/userfaultfd", "rb", buffering=0) as dev:
            return None, [fcntl.ioctl(dev.fileno(), USERFAULTFD_IOC_NEW, os.O_CLOEXEC | os.O_NONBLOCK)]

    def take(self, window, present, device, fds):
        """The files of its session on its hnode, of huge pages and of small ones. A context maps the whole window."""
        left = iter(fds)
        self.files = dict(zip(("huge", "small"), (next(left) if there else None for there in present), strict=True))
        for name, fd in self.files.items():
            if device and fd is not None:
                base = window[f"{name}_base"]
                self.map_file(base, window[f"{name}_bytes"], base - window["base"], fd)

    def map_file(self, va, size, offset, fd):
        at = libc.mmap(va, size, PROT_RW, MAP_SHARED | MAP_NORESERVE | MAP_FIXED_NOREPLACE, fd, offset)
        assert at == va, (hex(va), at, ctypes.get_errno())

    def map(self, va, size, offset, inherit, fds):
        self.map_file(va, size, offset, fds[0] if fds else self.files["small"])
        for fd in fds:
            os.close(fd)
        if not inherit:
            libc.madvise(va, size, MADV_DONTFORK)

    def unmap(self, va, size):
        return libc.munmap(va, size)

    def fill(self, va, count, stride, value):
        words(va, count, stride)[:] = value

    def read(self, va, size):
        ctypes.memmove(ctypes.addressof(ctypes.c_char.from_buffer(self.result)), va, size)

    def probe(self, va):
        """errno of a system call that reads there, 0 if it can."""
        if libc.write(self.pipe[1], va, 8) == 8:
            os.read(self.pipe[0], 8)
            return 0
        return ctypes.get_errno()

    def fork(self, fds):
        pid = os.fork()
        if not pid:
            libc.prctl(PR_SET_PDEATHSIG, 0)
            party_serve(socket.socket(fileno=fds[0]), self)
        os.close(fds[0])
        return pid

    def leave(self):
        os._exit(0)


def party_main(sock, result):
    party_serve(sock, Acts(result))


def party_serve(sock, acts):
    while True:
        try:
            (name, args), fds = receive(sock)
        except EOFError:
            os._exit(0)
        act = getattr(acts, name)
        answer = act(*args, fds) if name in ("map", "fork", "take") else act(*args)
        if isinstance(answer, tuple):
            send(sock, answer[0], answer[1])
            for fd in answer[1]:
                os.close(fd)
        else:
            send(sock, answer)


class Party:
    """A process of a session: the client itself, a device context of it (hnid), or a forked child."""

    def __init__(self, hnid):
        self.hnid, self.pid, self.context = hnid, 0, 0
        self.sock = self.doing = None
        self.result = mmap.mmap(-1, RESULT_BYTES)
        self.ours = False  # our child, and not a party's

    pair = staticmethod(lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))

    def start(self):
        self.pid, self.sock = start(party_main, self.result)
        self.ours = True
        return self

    def take(self, window, present, fds):
        self.begin("take", window, present, self.hnid > 0, fds=fds)
        self.finish()
        for fd in fds:
            os.close(fd)

    def begin(self, act, *args, fds=()):
        assert self.doing is None
        self.doing = (act, args)
        send(self.sock, (act, args), fds)

    def poll(self, seconds) -> bool:
        return bool(select.select([self.sock], [], [], seconds)[0])

    def finish(self):
        try:
            answer, self.fds = receive(self.sock)
        except EOFError:
            raise AssertionError(f"a party has died over {self.doing}") from None
        self.doing = None
        return answer

    def ends(self) -> bool:
        """Somebody has ended it, or does so now."""
        return self.poll(PATIENCE_S) and not self.sock.recv(1, socket.MSG_PEEK)

    def end(self):
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            if self.ours:
                os.waitpid(self.pid, 0)
            self.pid = 0
            self.sock.close()
