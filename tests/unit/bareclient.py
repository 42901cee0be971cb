# SPDX-License-Identifier: Apache-2.0
"""A client of gmemd with nothing but the protocol: what the handshake says, done with system calls.

bareclient.py SOCKET                        a session
bareclient.py SOCKET context TOKEN DEVICE   a device context of one

A line of JSON on stdin is a command, a line on stdout its answer."""

import contextlib
import ctypes
import fcntl
import json
import os
import socket
import sys

import msgpack
import zmq

from gmemd import wire

PROT_RW, MAP_SHARED, MAP_NORESERVE, MAP_FIXED, MAP_FIXED_NOREPLACE = 3, 1, 0x4000, 0x10, 0x100000
USERFAULTFD_IOC_NEW = 0xAA00
SYS_USERFAULTFD, UFFD_USER_MODE_ONLY = 323, 1  # x86-64
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def mmap(va, size, fd, offset, flags=MAP_FIXED_NOREPLACE):
    got = libc.mmap(va, size, PROT_RW, MAP_SHARED | MAP_NORESERVE | flags, fd, offset)
    if got != va:
        raise OSError(ctypes.get_errno(), f"mmap at {va:#x}: {got}")


class Client:
    def __init__(self, path, kind=wire.CLIENT, token=bytes(32), device=""):
        self.path = path
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(20)
        self.sock.connect(path)
        with contextlib.suppress(BrokenPipeError):  # refused already: why, is there to be read
            self.sock.send(wire.pack_hello(kind, token, device))
        data, self.fds, _, _ = socket.recv_fds(self.sock, 1024, 8)
        self.welcome = w = wire.unpack_welcome(data)
        if w.status:
            raise OSError(-w.status, w.message)
        flags = (wire.HAS_UFFD_DEV, wire.HAS_HUGE, wire.HAS_SMALL)
        self.by_flag = dict(zip([flag for flag in flags if w.flags & flag], self.fds, strict=True))
        if kind == wire.CONTEXT:
            for flag, (base, size) in ((wire.HAS_HUGE, w.huge), (wire.HAS_SMALL, w.small)):
                if flag in self.by_flag:
                    mmap(base, size, self.by_flag[flag], base - w.window[0])
        for _ in range(w.region_count):
            data, fds, _, _ = socket.recv_fds(self.sock, 1024, 1)
            va, size, offset, _, _ = wire.unpack_region(data)
            mmap(va, size, fds[0], offset, MAP_FIXED if kind == wire.CONTEXT else MAP_FIXED_NOREPLACE)
        if not w.flags & wire.FORK_STORED:
            self.uffd = self.new_uffd()
            socket.send_fds(self.sock, [wire.pack_uffd(wire.HAS_UFFD_DEV not in self.by_flag)], [self.uffd])
        status, message = wire.unpack_ready(self.sock.recv(1024))
        if status:
            raise OSError(-status, message)
        self.dealer = zmq.Context().socket(zmq.DEALER)
        self.dealer.setsockopt(zmq.RCVTIMEO, 30_000)
        self.dealer.connect(w.control)
        self.number = 0

    def new_uffd(self):
        flags = os.O_CLOEXEC | os.O_NONBLOCK
        if wire.HAS_UFFD_DEV in self.by_flag:
            return fcntl.ioctl(self.by_flag[wire.HAS_UFFD_DEV], USERFAULTFD_IOC_NEW, flags)
        fd = libc.syscall(SYS_USERFAULTFD, flags | UFFD_USER_MODE_ONLY)
        if fd < 0:
            raise OSError(ctypes.get_errno(), "userfaultfd")
        return fd

    def request(self, op, **args):
        self.number += 1
        message = {"v": 1, "id": self.number, "op": op, "token": self.welcome.token, **args}
        self.dealer.send(msgpack.packb(message))
        reply = msgpack.unpackb(self.dealer.recv())
        if isinstance(reply.get("pages"), bytes):
            reply["pages"] = reply["pages"].hex()
        return reply

    # ---- commands ----

    def do_request(self, op, args):
        return self.request(op, **args)

    def do_mmap(self, **args):
        region = self.request("mmap", **args)
        if not region["ok"]:
            return region
        flag = wire.HAS_HUGE if region["huge"] else wire.HAS_SMALL
        mmap(region["va"], region["bytes"], self.by_flag[flag], region["offset"])
        commit = self.request("mmap_commit", va=region["va"])
        return region if commit["ok"] else commit

    def do_munmap(self, va, bytes):
        assert libc.munmap(va, bytes) == 0
        return self.request("munmap", va=va, bytes=bytes)

    def do_write(self, va, text):
        ctypes.memmove(va, text.encode(), len(text))
        return True

    def do_read(self, va, size):
        return ctypes.string_at(va, size).decode("latin-1")

    def do_fill(self, va, bytes, step):
        """A number at each step, different at each place."""
        for at in range(va, va + bytes, step):
            ctypes.c_uint64.from_address(at).value = at * 7
        return True

    def do_check(self, va, bytes, step):
        return sum(ctypes.c_uint64.from_address(at).value != at * 7 for at in range(va, va + bytes, step))

    def do_fork(self, va, text):
        """The child says hello, looks at va, writes there and ends; what it saw."""
        read, write = os.pipe()
        child = os.fork()
        if child:
            os.close(write)
            with os.fdopen(read) as answer:
                return {"child": json.loads(answer.read()), "status": os.waitpid(child, 0)[1]}
        self.sock.close()
        forked = Client.__new__(Client)
        try:
            # Without EVENT_FORK the regions would be DONTFORK; this client unmaps what it inherited.
            if not self.welcome.flags & wire.EVENT_FORK:
                libc.munmap(self.welcome.small[0], self.welcome.small[1])
                libc.munmap(self.welcome.huge[0], self.welcome.huge[1])
            forked.__init__(self.path, wire.FORK_CHILD, self.welcome.token)
            stored = bool(forked.welcome.flags & wire.FORK_STORED)
            seen = self.do_read(va, len(text))
            self.do_write(va, text)
            told = {"saw": seen, "stored": stored, "session": forked.welcome.session}
        except OSError as error:
            told = {"error": str(error)}
        os.write(write, json.dumps(told).encode())
        os._exit(0)

    def do_exit(self):
        os._exit(0)


def main():
    if "GMEM_TEST_UID" in os.environ:  # here, since another user may not be able to read what is imported
        os.setgroups([])
        os.setgid(int(os.environ["GMEM_TEST_UID"]))
        os.setuid(int(os.environ["GMEM_TEST_UID"]))
    kind, token, device = wire.CLIENT, bytes(32), ""
    if len(sys.argv) > 2:
        kind, token, device = wire.CONTEXT, bytes.fromhex(sys.argv[3]), sys.argv[4]
    client = Client(sys.argv[1], kind, token, device)
    w = client.welcome
    print(json.dumps({"session": w.session, "token": w.token.hex(), "flags": w.flags, "hnid": w.hnid}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        answer = getattr(client, "do_" + command.pop("command"))(**command)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
