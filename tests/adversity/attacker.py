# SPDX-License-Identifier: Apache-2.0
"""A process that does to gmemd whatever it can. It has what any user has: the sockets, the descriptors that the
handshake gives, and the system calls of an ordinary process.

attacker.py SOCKET; its user is ATTACKER_UID. A line of JSON on stdin is a command, a line on stdout its answer."""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import json
import mmap as mmap_module
import os
import random
import resource
import select
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections import Counter
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))

import bareclient  # noqa: E402
import msgpack  # noqa: E402
import zmq  # noqa: E402

from gmemd import wire  # noqa: E402

libc = bareclient.libc
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mremap.restype = ctypes.c_void_p
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]  # waits in a fault without the GIL
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
KEEP_SIZE, PUNCH_HOLE, COLLAPSE, ZERO = 1, 2, 8, 16
SQ_TAIL, SQ_HEAD, CQ_TAIL, CQ_HEAD, FLAGS, WAITS = 64, 128, 192, 256, 320, 384
RING_BYTES, SQ_OFFSET, CQ_OFFSET = 4096 + 256 * 64 + 512 * 64, 4096, 4096 + 256 * 64
UFFDIO_REGISTER, UFFDIO_WAKE, UFFDIO_COPY = 0xC020AA00, 0x8010AA02, 0xC028AA03
UFFDIO_ZEROPAGE, UFFDIO_WRITEPROTECT, UFFDIO_UNREGISTER = 0xC020AA04, 0xC018AA06, 0x8010AA01
PAGE = 4096
GREETING = b"\xff" + bytes(7) + b"\x01\x7f" + b"\x03\x00" + b"NULL" + bytes(16) + bytes(32)  # of ZMTP


def connect(path, kind=socket.SOCK_SEQPACKET):
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.settimeout(10)
    sock.connect(path)
    return sock


def refused(call):
    """errno of what a call was refused with, 0 if it was not."""
    try:
        call()
    except OSError as error:
        return error.errno
    return 0


class Ring:
    """The session's ring, mapped with nobody to stop us."""

    def __init__(self, fd, bell):
        self.fd, self.bell = fd, bell
        self.map = mmap_module.mmap(fd, RING_BYTES)
        self.words = (ctypes.c_uint32 * (RING_BYTES // 4)).from_buffer(self.map)

    def get(self, at):
        return self.words[at // 4]

    def set(self, at, value):
        self.words[at // 4] = value & 0xFFFFFFFF  # in one store: struct would write byte after byte

    def ring(self):
        with suppress(BlockingIOError):
            os.eventfd_write(self.bell, 1)

    def submit(self, raw):
        tail = self.get(SQ_TAIL)
        at = SQ_OFFSET + tail % 256 * 64
        self.map[at : at + 64] = raw
        self.set(SQ_TAIL, tail + 1)
        self.ring()

    def wait(self, seconds=5.0):
        """Until everything is complete, or broken; what is left."""
        until = time.monotonic() + seconds
        while self.get(FLAGS) & 4 == 0 and self.get(CQ_TAIL) != self.get(SQ_TAIL) and time.monotonic() < until:
            self.set(CQ_HEAD, self.get(CQ_TAIL))
            self.ring()
            time.sleep(0.001)
        return {"flags": self.get(FLAGS), "left": self.get(SQ_TAIL) - self.get(CQ_TAIL)}


class Client(bareclient.Client):
    """A session, by the book so far; with a ring."""

    def __init__(self, path, kind=wire.CLIENT, token=bytes(32), device="", ring=False, uffd=None):
        self.ring = None
        if ring:
            self.init_with_ring(path)
        else:
            super().__init__(path, kind, token, device)

    def init_with_ring(self, path):
        self.path = path
        self.sock = connect(path)
        with suppress(BrokenPipeError):
            self.sock.send(wire.pack_hello(wire.CLIENT, flags=wire.WANT_RING))
        data, self.fds, _, _ = socket.recv_fds(self.sock, 1024, 8)
        self.welcome = w = wire.unpack_welcome(data)
        if w.status:
            raise OSError(-w.status, w.message)
        flags = [f for f in (wire.HAS_UFFD_DEV, wire.HAS_HUGE, wire.HAS_SMALL) if w.flags & f]
        self.by_flag = dict(zip(flags, self.fds, strict=False))
        if w.flags & wire.HAS_RING:
            self.ring = Ring(*self.fds[len(flags) : len(flags) + 2])
        self.uffd = self.new_uffd()
        socket.send_fds(self.sock, [wire.pack_uffd(wire.HAS_UFFD_DEV not in self.by_flag)], [self.uffd])
        status, message = wire.unpack_ready(self.sock.recv(1024))
        if status:
            raise OSError(-status, message)
        self.dealer = zmq.Context.instance().socket(zmq.DEALER)
        self.dealer.setsockopt(zmq.RCVTIMEO, 30_000)
        self.dealer.connect(w.control)
        self.number = 0

    def region(self, size, page_bytes=PAGE, small=True):
        made = self.do_mmap(bytes=size, page_bytes=page_bytes, small=small)
        if not made["ok"]:
            raise OSError(made["error"]["errno"], made["error"]["message"])
        return made

    def file_of(self, region):
        return self.by_flag[wire.HAS_HUGE if region["huge"] else wire.HAS_SMALL]

    def close(self):
        with suppress(AttributeError):
            self.dealer.close(0)
        self.sock.close()
        for fd in self.fds:
            with suppress(OSError):
                os.close(fd)
        with suppress(AttributeError, OSError):
            os.close(self.uffd)


class Attacker:
    def __init__(self, path):
        self.path = path
        self.directory = Path(path).parent
        self.random = random.Random(20)
        self.kept = []
        self.clients = []

    def client(self, **options):
        self.clients.append(Client(self.path, **options))
        return self.clients[-1]

    # ---- what several attacks begin with ----

    def do_session(self, ring=False):
        """An ordinary session, the last one from now on; its token."""
        client = self.client(ring=ring)
        return {"session": client.welcome.session, "token": client.welcome.token.hex()}

    def do_request(self, op, args=None, token=None):
        client = self.clients[-1]
        if token is not None:
            client.welcome = wire.Welcome(token=bytes.fromhex(token), control=client.welcome.control)
        return client.request(op, **(args or {}))

    def do_sessions(self, count):
        """As many as there may be; how many there were, and the errno of the refusal."""
        for made in range(count):
            try:
                self.client()
            except OSError as error:
                return {"made": made, "errno": error.errno}
        return {"made": count, "errno": 0}

    def do_refusals(self, count):
        """The errnos of refusals that come as soon as one connects: what else is told there?"""
        self.kept += [connect(self.path) for _ in range(16)]  # more half handshakes than there may be
        told = Counter()
        for _ in range(count):
            try:
                self.client()
            except OSError as error:
                told[errno.errorcode[error.errno]] += 1
        return dict(told)

    def do_close_all(self):
        for client in self.clients:
            client.close()
        self.clients.clear()
        for thing in self.kept:
            thing.close() if hasattr(thing, "close") else os.close(thing)
        self.kept.clear()
        return True

    def do_write_and_read(self, size=1 << 20):
        """What an ordinary client does."""
        region = self.clients[-1].region(size)
        self.clients[-1].do_fill(region["va"], size, PAGE)
        return self.clients[-1].do_check(region["va"], size, PAGE)

    def do_mmap_filled(self, size):
        region = self.clients[-1].region(size)
        return self.clients[-1].do_fill(region["va"], size, PAGE) and region["va"]

    def do_check(self, va, bytes, step):
        return self.clients[-1].do_check(va, bytes, step)

    # ---- sockets ----

    def do_random_packets(self, count):
        """Packets of nothing, some with descriptors, some beginning as a message of ours does."""
        descriptors = [os.open("/dev/null", os.O_RDONLY), *os.pipe(), os.memfd_create("x"), os.eventfd(0)]
        header = struct.pack("=IH", wire.MAGIC, wire.VERSION)
        for number in range(count):
            with suppress(OSError):
                with connect(self.path) as sock:
                    body = self.random.randbytes(self.random.choice((0, 1, 7, 8, 79, 80, 81, 1024, 5000)))
                    if number % 3 == 1:
                        body = header + struct.pack("=H", self.random.randrange(8)) + body
                    if number % 3 == 2:
                        good = bytearray(wire.pack_hello(self.random.randrange(1, 5)))
                        for _ in range(self.random.randrange(1, 4)):
                            good[self.random.randrange(len(good))] = self.random.randrange(256)
                        body = bytes(good)
                    chosen = self.random.sample(descriptors, self.random.choice((0, 0, 1, 3)))
                    socket.send_fds(sock, [body], chosen)
                    sock.settimeout(0.05 if number % 8 else 2)
                    sock.recv(1024)
        for fd in descriptors:
            os.close(fd)
        return True

    def do_random_streams(self, name, count):
        """Bytes for libzmq: none of its greeting, some of it, all of it and then nonsense."""
        for number in range(count):
            with suppress(OSError):
                with connect(str(self.directory / name), socket.SOCK_STREAM) as sock:
                    start = GREETING[: self.random.choice((0, 1, 10, 11, 12, 63, 64))] if number % 4 else b""
                    if number % 4 == 3:
                        start = GREETING + b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x04SUB "
                    sock.sendall(start + self.random.randbytes(self.random.choice((0, 1, 64, 300, 70_000))))
                    sock.settimeout(0.01)
                    sock.recv(1 << 16)
        return True

    def do_random_messages(self, count):
        """Whole messages for the ROUTER: random bytes, msgpack of the wrong shapes, many frames, requests without
        end."""
        dealer = zmq.Context.instance().socket(zmq.DEALER)
        dealer.connect(f"ipc://{self.directory}/control.sock")
        deep = None
        for _ in range(600):
            deep = [deep]
        shapes = [None, 1, [], {}, deep, {"v": 1}, {"v": 1, "id": 1}, {"v": 1, "id": -1, "op": "ping"},
                  {"v": 1, "id": 1, "op": "ping", "token": b""},
                  {"v": 1, "id": 1, "op": "ping", "token": b"x" * 32}]  # fmt: skip
        for number in range(count):
            if number % 3 == 0:
                dealer.send(self.random.randbytes(self.random.randrange(3000)))
            elif number % 3 == 1:
                dealer.send(msgpack.packb(self.random.choice(shapes)))
            else:
                dealer.send_multipart([self.random.randbytes(20)] * self.random.randrange(1, 40))
        # answered behind all of these, so they have been looked at
        dealer.setsockopt(zmq.RCVTIMEO, 20_000)
        seen = 0
        dealer.send(msgpack.packb({"v": 1, "id": 77, "op": "ping", "token": b"x" * 32}))
        while True:
            reply = msgpack.unpackb(dealer.recv())
            seen += 1
            if reply.get("id") == 77:
                break
        dealer.close(0)
        return seen

    def do_subscriptions(self, count):
        """Topics that nobody has ever heard of, as many as libzmq takes."""
        subscriber = zmq.Context.instance().socket(zmq.SUB)
        subscriber.connect(f"ipc://{self.directory}/events.sock")
        for number in range(count):
            topic = self.random.randbytes(self.random.randrange(1, 200)) + bytes(number % 7)
            subscriber.setsockopt(zmq.SUBSCRIBE, topic)
        time.sleep(0.2)
        subscriber.close(0)
        return True

    def do_connections(self, name, count, hold):
        """Open connections; how many were let in."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        kind = socket.SOCK_SEQPACKET if name == "gmemd.sock" else socket.SOCK_STREAM
        made = 0
        for _ in range(count):
            sock = socket.socket(socket.AF_UNIX, kind)
            sock.settimeout(0.5)
            try:
                sock.connect(str(self.directory / name))
                made += 1
            except OSError:
                sock.close()
                continue
            if hold:
                self.kept.append(sock)
            else:
                sock.close()
        return made

    def do_half_handshakes(self, count):
        """Connections that stop at each point of the handshake and stay."""
        for number in range(count):
            with suppress(OSError):
                sock = connect(self.path)
                self.kept.append(sock)
                if number % 3:
                    sock.send(wire.pack_hello(wire.CLIENT))
                if number % 3 == 2:
                    for fd in socket.recv_fds(sock, 1024, 8)[1]:
                        os.close(fd)
        return True

    def do_slow_loris_ends(self):
        """Whether every half handshake has been ended by gmemd."""
        poll = select.poll()
        left = {sock.fileno(): sock for sock in self.kept}
        for fd in left:
            poll.register(fd, select.POLLRDHUP)
        until = time.monotonic() + 20
        while left and time.monotonic() < until:
            for fd, _ in poll.poll(1000):
                poll.unregister(fd)
                del left[fd]
        return len(left)

    def do_never_read(self, count, op, args):
        """Requests whose replies nobody takes."""
        client = self.clients[-1]
        sent = 0
        dealer = zmq.Context.instance().socket(zmq.DEALER)
        dealer.setsockopt(zmq.RCVHWM, 1)
        dealer.setsockopt(zmq.RCVBUF, 4096)
        dealer.connect(f"ipc://{self.directory}/control.sock")
        self.kept.append(dealer)
        for number in range(count):
            message = {"v": 1, "id": 1000 + number, "op": op, "token": client.welcome.token, **args}
            with suppress(zmq.Again):
                dealer.send(msgpack.packb(message), zmq.NOBLOCK)
                sent += 1
            if number % 32 == 31:
                time.sleep(0.01)
        return sent

    def do_deaf_subscriber(self):
        """Asks for every event and reads none."""
        sock = connect(str(self.directory / "events.sock"), socket.SOCK_STREAM)
        sock.sendall(GREETING)
        ready = b"\x05READY\x0bSocket-Type" + struct.pack(">I", 3) + b"SUB"
        sock.sendall(bytes((4, len(ready))) + ready + b"\x00\x01\x01")
        self.kept.append(sock)
        return True

    # ---- userfaultfd ----

    def do_wrong_uffd(self, what):
        """The handshake, with something else where the userfaultfd should be; errno of the answer."""
        with connect(self.path) as sock:
            sock.send(wire.pack_hello(wire.CLIENT))
            data, fds, _, _ = socket.recv_fds(sock, 1024, 8)
            device = fds[0] if wire.unpack_welcome(data).flags & wire.HAS_UFFD_DEV else -1
            given = self.wrong_descriptor(what, device)
            socket.send_fds(sock, [wire.pack_uffd()], [given])
            for fd in (given, *fds):
                os.close(fd)
            status, message = wire.unpack_ready(sock.recv(1024))
            return {"errno": -status, "message": message}

    @staticmethod
    def wrong_descriptor(what, device):
        if what == "pipe":
            read, write = os.pipe()
            os.close(write)
            return read
        if what == "socket":
            return socket.socket(socket.AF_UNIX).detach()
        if what == "file":
            return os.open(__file__, os.O_RDONLY)
        if what == "named":
            return os.memfd_create("anon_inode:[userfaultfd]")
        if what == "eventfd":
            return os.eventfd(0)
        if what == "epoll":
            poll = select.epoll()
            return os.dup(poll.fileno())
        if what == "device":
            return os.dup(device)
        if what == "directory":
            return os.open("/", os.O_PATH)
        flags = os.O_CLOEXEC | (0 if what == "blocking" else os.O_NONBLOCK)
        fd = fcntl.ioctl(device, bareclient.USERFAULTFD_IOC_NEW, flags)
        if what == "initialised":
            fcntl.ioctl(fd, 0xC018AA3F, bytearray(struct.pack("=QQQ", 0xAA, 0, 0)))
        return fd

    def do_foreign_uffd(self):
        """A session whose userfaultfd belongs to another process, which ends in between."""
        ours, theirs = socket.socketpair()
        sock = connect(self.path)
        sock.send(wire.pack_hello(wire.CLIENT))
        data, fds, _, _ = socket.recv_fds(sock, 1024, 8)
        child = os.fork()
        if not child:
            fd = fcntl.ioctl(fds[0], bareclient.USERFAULTFD_IOC_NEW, os.O_CLOEXEC | os.O_NONBLOCK)
            socket.send_fds(theirs, [b"x"], [fd])
            ours.close()
            time.sleep(0.3)
            os._exit(0)
        uffd = socket.recv_fds(ours, 1, 1)[1][0]
        socket.send_fds(sock, [wire.pack_uffd()], [uffd])
        answer = wire.unpack_ready(sock.recv(1024))[0]
        self.kept += [sock, uffd, *fds]
        client = Client.__new__(Client)
        client.fds, client.sock, client.uffd, client.ring, client.number = [], sock, uffd, None, 0
        client.welcome = wire.unpack_welcome(data)
        client.dealer = zmq.Context.instance().socket(zmq.DEALER)
        client.dealer.setsockopt(zmq.RCVTIMEO, 20_000)
        client.dealer.connect(client.welcome.control)
        region = client.request("mmap", bytes=1 << 20, small=True)
        commit = client.request("mmap_commit", va=region["va"])
        os.waitpid(child, 0)
        late = client.request("mmap_commit", va=region["va"])
        client.dealer.close(0)
        return {"ready": answer, "mmap": region["ok"], "commit": commit["ok"], "late": late["ok"]}

    def do_steal(self, seconds):
        """Reads the messages that are gmemd's to read, while threads fault; they may wait for ever."""
        client = self.client()
        region = client.region(4 << 20)
        until = time.monotonic() + seconds

        def touch(start):
            for at in range(region["va"] + start, region["va"] + region["bytes"], PAGE * 4):
                libc.memset(at, 1, 8)

        # blocked for ever, perhaps: daemons do not keep the process
        for start in range(4):
            threading.Thread(target=touch, args=(start * PAGE,), daemon=True).start()
        stolen = 0
        while time.monotonic() < until:
            with suppress(BlockingIOError):
                stolen += len(os.read(client.uffd, 32 * 16)) // 32
        return stolen

    def do_block_reader(self, rounds):
        """Makes its userfaultfd blocking at the moment when gmemd is about to look for the next message: O_NONBLOCK
        belongs to the description that both share. Faults that come fast keep gmemd looking for a while."""
        for _ in range(rounds):
            child = os.fork()  # gmemd may end the session, and give its addresses to the next one
            if not child:
                try:
                    self.begin_to_block()
                finally:
                    os._exit(1)
            status = os.waitpid(child, 0)[1]
            if status:
                return status
        return 0

    def begin_to_block(self):
        client = self.client()
        region = client.region(1 << 20)
        fcntl.fcntl(client.uffd, fcntl.F_SETFL, os.O_RDWR | os.O_NONBLOCK)
        for at in range(region["va"], region["va"] + region["bytes"], PAGE):
            libc.memset(at, 1, 8)
        fcntl.fcntl(client.uffd, fcntl.F_SETFL, os.O_RDWR)
        time.sleep(0.05)
        os._exit(0)

    def do_foreign_ranges(self):
        """Registers memory of its own, which gmemd does not know, and has it answer the faults."""
        client = self.client()
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
        outcome = {}
        for shared in (mmap_module.MAP_PRIVATE, mmap_module.MAP_SHARED):
            libc.mmap.restype = ctypes.c_void_p
            at = libc.mmap(None, 1 << 20, 3, shared | mmap_module.MAP_ANONYMOUS, -1, 0)
            for mode in (1, 3):
                request = bytearray(struct.pack("=QQQQ", at, 1 << 20, mode, 0))
                outcome[f"{shared}.{mode}"] = refused(lambda r=request: fcntl.ioctl(client.uffd, UFFDIO_REGISTER, r))
            child = os.fork()  # whoever touches it may get SIGBUS, or wait for ever
            if not child:
                ctypes.c_uint64.from_address(at).value = 1
                os._exit(0)
            self.kept_child(child)
        return outcome

    def kept_child(self, pid, seconds=1.0):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if os.waitpid(pid, os.WNOHANG)[0]:
                return
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    def do_touch_foreign(self):
        """A process of its own touches memory that gmemd did not give, present and write-protected; its end."""
        child = os.fork()
        if not child:
            client = Client(self.path)
            at = libc.mmap(None, 1 << 20, 3, mmap_module.MAP_PRIVATE | mmap_module.MAP_ANONYMOUS, -1, 0)
            ctypes.memset(at, 1, PAGE)
            fcntl.ioctl(client.uffd, UFFDIO_REGISTER, bytearray(struct.pack("=QQQQ", at, 1 << 20, 3, 0)))
            fcntl.ioctl(client.uffd, UFFDIO_WRITEPROTECT, bytearray(struct.pack("=QQQ", at, 1 << 20, 1)))
            ctypes.c_uint64.from_address(at).value = 2
            os._exit(0)
        time.sleep(0.5)
        done, status = os.waitpid(child, os.WNOHANG)
        if not done:
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
        return {"ended": bool(done), "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0}

    def do_ioctls(self, count):
        """Every ioctl on its own uffd, with its own ranges and others."""
        client = self.client()
        region = client.region(1 << 20, 65536)
        va = region["va"]
        page = ctypes.create_string_buffer(2 * PAGE)
        src = (ctypes.addressof(page) + PAGE - 1) & ~(PAGE - 1)
        for _ in range(count):
            at = va + self.random.randrange(0, 1 << 20, PAGE)
            size = self.random.choice((PAGE, 65536, 1 << 20))
            request = self.random.choice((
                (UFFDIO_WAKE, struct.pack("=QQ", at, size)),
                (UFFDIO_UNREGISTER, struct.pack("=QQ", at, size)),
                (UFFDIO_REGISTER, struct.pack("=QQQQ", at, size, self.random.randrange(8), 0)),
                (UFFDIO_COPY, struct.pack("=QQQQQ", at, src, PAGE, 0, 0)),
                (UFFDIO_ZEROPAGE, struct.pack("=QQQQ", at, size, 0, 0)),
                (UFFDIO_WRITEPROTECT, struct.pack("=QQQ", at, size, self.random.randrange(2))),
                (0xC020AA07, struct.pack("=QQQQ", at, size, 0, 0)),  # CONTINUE
                (0xC020AA08, struct.pack("=QQQQ", at, size, 0, 0)),  # POISON
            ))
            with suppress(OSError):
                fcntl.ioctl(client.uffd, request[0], bytearray(request[1]))
            if self.random.random() < 0.3:
                client.request(self.random.choice(("prefetch", "discard")), va=va, bytes=1 << 20,
                               **({"hnid": 1}))  # an unknown field, half of the time
                client.request("prefetch", va=va, bytes=1 << 20, hnid=self.random.randrange(2))
        return True

    def do_close_uffd(self):
        """Closes every copy of it that it has, in the middle."""
        client = self.client()
        region = client.region(1 << 20)
        client.do_fill(region["va"], 512 << 10, PAGE)
        os.close(client.uffd)
        client.uffd = -1
        client.request("prefetch", va=region["va"], bytes=1 << 20, hnid=1)
        return client.do_check(region["va"], 512 << 10, PAGE)

    def do_mappings(self, count, steal):
        """munmap, mremap and mmap over regions in all orders; with `steal`, gmemd never hears of some of it."""
        child = os.fork()
        if not child:
            client = Client(self.path)
            regions = [client.region(1 << 20) for _ in range(6)]
            if steal:
                def thief():
                    while True:
                        with suppress(BlockingIOError):
                            os.read(client.uffd, 32)
                threading.Thread(target=thief, daemon=True).start()
            for _ in range(count):
                a, b = self.random.choice(regions)["va"], self.random.choice(regions)["va"]
                off = self.random.randrange(0, 1 << 20, 65536)
                size = self.random.choice((65536, 256 << 10, 1 << 20))
                what = self.random.randrange(4)
                if what == 0:
                    libc.munmap(a + off, size)
                elif what == 1:
                    libc.mremap(a + off, size, size, 3, b + self.random.randrange(0, 1 << 20, 65536))
                elif what == 2:
                    libc.mmap(a + off, size, 3, 0x11, client.by_flag[wire.HAS_SMALL],
                              self.random.randrange(0, 1 << 30, PAGE))
                else:
                    client.request("munmap", va=a, bytes=self.random.choice((PAGE, 1 << 20)))
                client.request("prefetch", va=a, bytes=1 << 20, hnid=1)
            os._exit(0)
        self.kept_child(child, 5.0)
        return True

    def do_fork_bomb(self, count, stay=False):
        """Children by bare fork, which never say hello; they end at once, or stay (and are killed)."""
        client = self.client()
        region = client.region(1 << 20)
        client.do_fill(region["va"], 64 << 10, PAGE)
        made = 0
        stayed = []
        for number in range(count):
            child = os.fork()
            if not child:
                if stay or number % 4 == 0:
                    time.sleep(60)
                os._exit(0)
            made += 1
            if not stay and number % 4:
                os.waitpid(child, 0)
            else:
                stayed.append(child)
        for child in stayed:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        return made

    # ---- memory files ----

    def do_seals(self):
        """errno of each attempt to change the file's size, its seals or its mode for others."""
        client = self.client()
        answers = {}
        for flag in (wire.HAS_SMALL, wire.HAS_HUGE):
            fd = client.by_flag.get(flag)
            if fd is None:
                continue
            size = os.fstat(fd).st_size
            answers[str(flag)] = {
                "shrink": refused(lambda f=fd: os.ftruncate(f, 0)),
                "grow": refused(lambda f=fd, s=size: os.ftruncate(f, s * 2)),
                "seal": refused(lambda f=fd: fcntl.fcntl(f, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)),
                "same": os.fstat(fd).st_size == size,
            }
        return answers

    def do_punch_under(self, seconds):
        """Takes pages out of its file, writes there and allocates there, while they move between host and device."""
        client = self.client()
        region = client.region(4 << 20, 65536)
        fd = client.file_of(region)
        until = time.monotonic() + seconds
        rounds = 0
        child = os.fork() if client.welcome.flags & wire.EVENT_FORK else 0
        if child == 0 and client.welcome.flags & wire.EVENT_FORK:
            while True:
                at = region["offset"] + random.randrange(0, 4 << 20, PAGE)
                size = random.choice((PAGE, 65536, 1 << 20))
                what = random.randrange(4)
                if what == 0:
                    libc.fallocate(fd, PUNCH_HOLE | KEEP_SIZE, at, size)
                elif what == 1:
                    libc.fallocate(fd, 0, at, min(size, region["offset"] + (4 << 20) - at))
                elif what == 2:
                    os.pwrite(fd, b"evil" * 1024, at)
                else:
                    libc.fallocate(fd, ZERO, at, size)
        while time.monotonic() < until:
            for hnid in (1, 0):
                client.request("prefetch", va=region["va"], bytes=4 << 20, hnid=hnid)
            client.request("hmemcpy", hnid=0, dst=region["va"], src=region["va"] + (2 << 20), bytes=1 << 20)
            rounds += 1
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        return rounds

    def do_append_mode(self):
        """O_APPEND on every descriptor it was given; whether its own memory is still what it wrote."""
        client = self.client(ring=True)
        for fd in client.fds:
            flags = fcntl.fcntl(fd, fcntl.F_GETFL)
            with suppress(OSError):
                fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_APPEND)
        wrong = 0
        region = client.region(4 << 20, 65536)
        for _ in range(3):
            client.do_fill(region["va"], 4 << 20, PAGE)
            for hnid in (1, 0):
                client.request("prefetch", va=region["va"], bytes=4 << 20, hnid=hnid)
            wrong += client.do_check(region["va"], 4 << 20, PAGE)
        return wrong

    # ---- ring ----

    def do_ring_noise(self, rounds):
        """Entries of random bytes, some of them well-formed but for one field; then what the server makes of it."""
        client = self.client(ring=True)
        region = client.region(1 << 20)
        ring = client.ring
        for _ in range(rounds):
            op, pick = self.random.randrange(13), self.random.choice
            fields = [self.random.getrandbits(64), op, 0, self.random.randrange(4), pick((-1, 0, 1, 2, 15, -9)),
                      region["va"] + pick((0, PAGE, 1 << 20, 1 << 40)), pick((0, 1, PAGE, 1 << 20)),
                      pick((0, 1, region["va"], 1 << 63)), 0, 0, 0]  # fmt: skip
            victim = self.random.randrange(len(fields) * 2)
            entry = struct.pack("=QHHHhQQQQQQ", *fields)
            if victim < 8:
                entry = bytearray(entry)
                for _ in range(8):
                    entry[8 + self.random.randrange(56)] = self.random.randrange(256)
            elif victim < 12:
                entry = self.random.randbytes(64)
            if ring.get(SQ_TAIL) - ring.get(SQ_HEAD) >= 256:
                ring.wait(2)
            ring.submit(bytes(entry))
            if self.random.random() < 0.02:
                ring.set(CQ_HEAD, ring.get(CQ_TAIL))
        return ring.wait()

    def do_ring_games(self, seconds):
        """A thread scribbles over all of it, heads and tails above all, while traffic runs."""
        rounds = 0
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            client = self.client(ring=True)
            ring = client.ring
            stop = threading.Event()

            def scribble(ring=ring, stop=stop):
                while not stop.is_set():
                    word = self.random.choice((SQ_TAIL, SQ_HEAD, CQ_TAIL, CQ_HEAD, FLAGS, WAITS))
                    value = self.random.choice((0, 1, 255, 256, 257, 0xFFFFFFFF, self.random.getrandbits(32)))
                    ring.set(word, value)
                    at = self.random.randrange(SQ_OFFSET, RING_BYTES - 64)
                    ring.map[at : at + 64] = self.random.randbytes(64)
                    ring.ring()

            thread = threading.Thread(target=scribble, daemon=True)
            thread.start()
            for _ in range(200):
                ring.submit(struct.pack("=QHHHhQQQQQQ", 1, self.random.randrange(11), 0, 0, 0, *([0] * 6)))
            stop.set()
            thread.join()
            libc.fallocate(ring.fd, PUNCH_HOLE | KEEP_SIZE, 0, RING_BYTES // PAGE * PAGE)
            ring.ring()
            rounds += 1
            self.clients.pop().close()
        return {"rounds": rounds}

    # ---- quotas ----

    def do_storm(self, seconds):
        """Asks for all that can be had, over and over."""
        client = self.clients[-1]
        until = time.monotonic() + seconds
        counts = {}
        size = 1 << 40
        while time.monotonic() < until:
            reply = client.request("mmap", bytes=size, small=True)
            key = "ok" if reply["ok"] else errno.errorcode[reply["error"]["errno"]]
            counts[key] = counts.get(key, 0) + 1
            size = 1 << self.random.randrange(12, 44)
        return counts

    def do_try_storm(self, seconds):
        """Sessions, memory, requests of all kinds, whatever becomes of them."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with suppress(OSError, zmq.Again):
                client = self.client(ring=self.random.random() < 0.5)
                client.dealer.setsockopt(zmq.RCVTIMEO, 1000)
                region = client.region(1 << 20)
                client.request("prefetch", va=region["va"], bytes=1 << 20, hnid=1)
                client.request("query", va=region["va"], bytes=1 << 20)
                client.request("stats")
        return True

    def do_regions(self, count):
        """Tiny regions; how many it got, and the errno of the refusal."""
        client = self.clients[-1]
        for made in range(count):
            reply = client.request("mmap", bytes=PAGE, small=True)
            if not reply["ok"]:
                return {"made": made, "errno": reply["error"]["errno"]}
        return {"made": count, "errno": 0}

    def do_contexts(self, count, token, device):
        """CONTEXT handshakes as far as WELCOME, each left open."""
        outcomes = []
        for _ in range(count):
            sock = connect(self.path)
            try:
                sock.send(wire.pack_hello(wire.CONTEXT, bytes.fromhex(token), device))
                data, fds, _, _ = socket.recv_fds(sock, 1024, 8)
            except (ConnectionResetError, BrokenPipeError):  # refused before HELLO was read
                outcomes.append(errno.EAGAIN)
                continue
            self.kept += [sock, *fds]
            outcomes.append(-wire.unpack_welcome(data).status)
        return outcomes

    # ---- other users ----

    def do_hello(self, kind, token, device=""):
        with connect(self.path) as sock:
            sock.send(wire.pack_hello(kind, bytes.fromhex(token), device))
            data, fds, _, _ = socket.recv_fds(sock, 1024, 8)
            for fd in fds:
                os.close(fd)
            return {"errno": -wire.unpack_welcome(data).status, "fds": len(fds)}

    def do_try_files(self, paths):
        """errno of opening each to read and to write."""
        return {path: [refused(lambda p=path, m=mode: os.close(os.open(p, m))) for mode in (os.O_RDONLY, os.O_RDWR)]
                for path in paths}  # fmt: skip

    def do_try_processes(self, pids):
        """errno of what one process can do to another: its descriptors, its memory, signals."""
        answers = {}
        for pid in pids:
            pidfd = os.pidfd_open(pid)
            answers[str(pid)] = {
                "fds": refused(lambda p=pid: os.listdir(f"/proc/{p}/fd")),
                "mem": refused(lambda p=pid: os.close(os.open(f"/proc/{p}/mem", os.O_RDWR))),
                "maps": refused(lambda p=pid: Path(f"/proc/{p}/maps").read_text()),
                "environ": refused(lambda p=pid: Path(f"/proc/{p}/environ").read_text()),
                "getfd": -1 if libc.syscall(438, pidfd, 0, 0) >= 0 else ctypes.get_errno(),
                "kill": refused(lambda p=pid: os.kill(p, 0)),
            }
            os.close(pidfd)
        return answers

    def do_try_directory(self):
        """Whether names in the runtime directory can be made, taken away or replaced."""
        d = str(self.directory)
        return [
            refused(lambda: os.unlink(f"{d}/control.sock")),
            refused(lambda: os.rename(f"{d}/gmemd.sock", f"{d}/x")),
            refused(lambda: os.close(os.open(f"{d}/new", os.O_CREAT | os.O_WRONLY))),
            refused(lambda: os.chmod(f"{d}/gmemd.sock", 0o777)),
        ]

    # ---- ends ----

    def do_life(self, steps):
        """An ordinary life, told step by step on stdout, to be killed in the middle."""
        client = self.client(ring=True)
        region = client.region(1 << 20, 65536)
        for _ in range(steps):
            client.do_fill(region["va"], 1 << 20, 65536)
            client.request("prefetch", va=region["va"], bytes=1 << 20, hnid=1)
            other = client.region(256 << 10)
            client.do_fill(other["va"], 256 << 10, PAGE)
            client.do_munmap(other["va"], other["bytes"])
        return True

    def do_short_lives(self, count, seed):
        """Children that live such a life each and are killed at a random moment of it."""
        chance = random.Random(seed)
        for _ in range(count):
            child = os.fork()
            if not child:
                with suppress(OSError):
                    self.do_life(1000)
                os._exit(0)
            time.sleep(chance.random() ** 2 * 0.06)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        return count

    def do_resident(self, size):
        """Memory of its own on host and device, for somebody to wait for; its pid."""
        client = self.client()
        region = client.region(size, 65536)
        client.do_fill(region["va"], size, PAGE)
        client.request("prefetch", va=region["va"], bytes=size, hnid=1)
        return os.getpid()

    def do_exit(self):
        os._exit(0)


def main():
    uid = int(os.environ["ATTACKER_UID"])
    if os.geteuid() == 0 and uid:
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
    array.array("i")
    attacker = Attacker(sys.argv[1])
    print(json.dumps(True), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(attacker, "do_" + command.pop("command"))(**command)
        except BaseException:
            answer = {"raised": traceback.format_exc()}
        print(json.dumps(answer), flush=True)


main()
