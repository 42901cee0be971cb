# SPDX-License-Identifier: Apache-2.0
"""For attackers: the handshake step by step."""

import ctypes
import fcntl
import os
import socket

import msgpack
import zmq

from gmemd import wire

USERFAULTFD_IOC_NEW = 0xAA00
PATH = os.environ.get("GMEM_SOCKET", "")
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]


def dial(path=PATH):
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect(path)
    sock.settimeout(20)
    return sock


class Session:
    """kind CLIENT up to WELCOME; give() sends a descriptor as the userfaultfd and returns READY's status."""

    def __init__(self, path=PATH, kind=wire.CLIENT, token=bytes(32), device="", flags=0):
        self.sock = dial(path)
        self.sock.send(wire.pack_hello(kind, token, device, flags) if flags else wire.pack_hello(kind, token, device))
        data, self.fds, _, _ = socket.recv_fds(self.sock, 1024, 8)
        self.welcome = wire.unpack_welcome(data)
        names = (wire.HAS_UFFD_DEV, wire.HAS_HUGE, wire.HAS_SMALL)
        self.by_flag = dict(zip([f for f in names if self.welcome.flags & f], self.fds, strict=False))
        self.context = zmq.Context()

    def new_uffd(self, flags=os.O_CLOEXEC | os.O_NONBLOCK):
        return fcntl.ioctl(self.by_flag[wire.HAS_UFFD_DEV], USERFAULTFD_IOC_NEW, flags)

    def give(self, fd):
        socket.send_fds(self.sock, [wire.pack_uffd(False)], [fd])
        return wire.unpack_ready(self.sock.recv(1024))

    def ready(self):
        self.uffd = self.new_uffd()
        status, message = self.give(self.uffd)
        assert status == 0, message
        self.dealer = self.context.socket(zmq.DEALER)
        self.dealer.setsockopt(zmq.LINGER, 0)
        self.dealer.setsockopt(zmq.RCVTIMEO, 20_000)
        self.dealer.connect(self.welcome.control)
        return self

    def ask(self, op, token=None, **args):
        self.number = getattr(self, "number", 0) + 1
        message = {"v": 1, "id": self.number, "op": op, "token": token or self.welcome.token, **args}
        self.dealer.send(msgpack.packb(message))
        return msgpack.unpackb(self.dealer.recv())

    def map(self, size, **args):
        region = self.ask("mmap", bytes=size, **args)
        flag = wire.HAS_HUGE if region["huge"] else wire.HAS_SMALL
        at = libc.mmap(region["va"], region["bytes"], 3, 0x4001 | 0x100000, self.by_flag[flag], region["offset"])
        assert at == region["va"]
        assert self.ask("mmap_commit", va=at)["ok"]
        return at
