# SPDX-License-Identifier: Apache-2.0
"""Messages of the handshake, as client/include/gmem_wire.h lays them out: packing, and unpacking what nobody trusts."""

from __future__ import annotations

import errno
import os
import struct
from dataclasses import dataclass

from gmemd.errors import RequestError

MAGIC = 0x4D454D47
VERSION = 1
TOKEN_BYTES = 32
PATH_BYTES = 108
NAME_BYTES = 32
MESSAGE_BYTES = 160

HELLO, WELCOME, REGION, UFFD, READY, ASK, ANSWER, FILE = 1, 2, 3, 4, 5, 6, 7, 8
CLIENT, FORK_CHILD, CONTEXT, ADMIN, FILES, MAP_FILE = 1, 2, 3, 4, 5, 6
KIND_NAMES = {CLIENT: "client", FORK_CHILD: "fork child", CONTEXT: "context", ADMIN: "admin",
              FILES: "files", MAP_FILE: "file"}  # fmt: skip

WANT_RING = 1 << 0
WANT_AGENT = 1 << 1

HAS_UFFD_DEV = 1 << 0
HAS_HUGE = 1 << 1
HAS_SMALL = 1 << 2
EVENT_FORK = 1 << 3
FORK_STORED = 1 << 4
HAS_RING = 1 << 5
HAS_CHANNEL = 1 << 6
HAS_CUDA = 1 << 7

HAS_AGENT = 1 << 0  # of READY

REGION_HUGE = 1 << 0
REGION_READ_ONLY = 1 << 1

ASK_FILE, ASK_MAPPED, ASK_RESTORED = 1, 2, 3

FILE_WRITE = 1 << 0
FILE_NO_INHERIT = 1 << 1
FILE_PRIVATE = 1 << 2

# A message longer than this is truncated by the kernel, and so refused; an honest one is at most WELCOME's size.
RECEIVE_BYTES = 1024

_HEADER = struct.Struct("=IHH")
_HELLO = struct.Struct("=IHHII32s32s")
_WELCOME = struct.Struct("=IHHiIQQQQQQQIi32s108s108s160s")
_REGION = struct.Struct("=IHHQQQII")
_UFFD = struct.Struct("=IHHII")
_FILE = struct.Struct("=IHHQQII")
_READY = struct.Struct("=IHHiI160s")
_ASK = struct.Struct("=IHHIIQQ")
_ANSWER = struct.Struct("=IHHiIQQQII160s")

SIZES = {
    "hello": _HELLO.size,
    "welcome": _WELCOME.size,
    "region": _REGION.size,
    "uffd": _UFFD.size,
    "ready": _READY.size,
    "file": _FILE.size,
    "ask": _ASK.size,
    "answer": _ANSWER.size,
}


@dataclass(frozen=True)
class Hello:
    kind: int
    token: bytes
    device: str
    wants_ring: bool = False
    wants_agent: bool = False


@dataclass(frozen=True)
class Welcome:
    """Answer to HELLO; with a status other than 0 only `message` says something."""

    status: int = 0
    flags: int = 0
    session: int = 0
    window: tuple[int, int] = (0, 0)
    huge: tuple[int, int] = (0, 0)
    small: tuple[int, int] = (0, 0)
    region_count: int = 0
    hnid: int = 0
    token: bytes = bytes(TOKEN_BYTES)
    control: str = ""
    events: str = ""
    message: str = ""


def _text(value: str, size: int) -> bytes:
    """Encoded and cut so that the terminating NUL always fits; never in the middle of a character."""
    return value.encode("utf-8", "replace")[: size - 1].decode("utf-8", "ignore").encode()


def _untext(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("utf-8", "replace")


def _malformed(what: str) -> RequestError:
    return RequestError(errno.EPROTO, what)


def _check_header(data: bytes, want: int, layout: struct.Struct, name: str) -> None:
    if len(data) < _HEADER.size:
        raise _malformed(f"{name}: message of {len(data)} bytes is too short")
    magic, version, kind = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise _malformed(f"{name}: wrong magic 0x{magic:08x}")
    if version != VERSION:
        raise RequestError(errno.EPROTONOSUPPORT, f"{name}: handshake version {version}, gmemd speaks {VERSION}")
    if kind != want:
        raise _malformed(f"expected {name}, got a message of type {kind}")
    if len(data) != layout.size:
        raise _malformed(f"{name}: {len(data)} bytes instead of {layout.size}")


def pack_hello(kind: int, token: bytes = bytes(TOKEN_BYTES), device: str = "", flags: int = 0) -> bytes:
    return _HELLO.pack(MAGIC, VERSION, HELLO, kind, flags, token, _text(device, NAME_BYTES))


def unpack_hello(data: bytes) -> Hello:
    _check_header(data, HELLO, _HELLO, "HELLO")
    _, _, _, kind, flags, token, device = _HELLO.unpack(data)
    if kind not in KIND_NAMES:
        raise RequestError(errno.EINVAL, f"HELLO: unknown kind {kind}", "kind")
    unknown = flags & ~(WANT_RING | WANT_AGENT)
    if unknown:
        raise _malformed(f"HELLO: unknown flags 0x{unknown:x}")
    if b"\0" not in device:
        raise RequestError(errno.EINVAL, "HELLO: device is not NUL-terminated", "device")
    try:
        name = device.split(b"\0", 1)[0].decode("ascii")
    except UnicodeDecodeError:
        raise RequestError(errno.EINVAL, "HELLO: device is not ASCII", "device") from None
    return Hello(kind, token, name, bool(flags & WANT_RING), bool(flags & WANT_AGENT))


def pack_welcome(welcome: Welcome) -> bytes:
    w = welcome
    return _WELCOME.pack(
        MAGIC, VERSION, WELCOME, w.status, w.flags, w.session, *w.window, *w.huge, *w.small, w.region_count, w.hnid,
        w.token, _text(w.control, PATH_BYTES), _text(w.events, PATH_BYTES), _text(w.message, MESSAGE_BYTES),
    )  # fmt: skip


def unpack_welcome(data: bytes) -> Welcome:
    _check_header(data, WELCOME, _WELCOME, "WELCOME")
    f = _WELCOME.unpack(data)
    return Welcome(
        status=f[3], flags=f[4], session=f[5], window=f[6:8], huge=f[8:10], small=f[10:12], region_count=f[12],
        hnid=f[13], token=f[14], control=_untext(f[15]), events=_untext(f[16]), message=_untext(f[17]),
    )  # fmt: skip


def pack_region(va: int, size: int, offset: int, flags: int, page_bytes: int) -> bytes:
    return _REGION.pack(MAGIC, VERSION, REGION, va, size, offset, flags, page_bytes)


def unpack_region(data: bytes) -> tuple[int, int, int, int, int]:
    """(va, bytes, offset, flags, page_bytes)"""
    _check_header(data, REGION, _REGION, "REGION")
    return _REGION.unpack(data)[3:]


def pack_uffd(user_mode_only: bool = False) -> bytes:
    return _UFFD.pack(MAGIC, VERSION, UFFD, int(user_mode_only), 0)


def unpack_uffd(data: bytes) -> bool:
    """Whether the client made its userfaultfd with UFFD_USER_MODE_ONLY."""
    _check_header(data, UFFD, _UFFD, "UFFD")
    user_mode_only, reserved = _UFFD.unpack(data)[3:]
    if user_mode_only > 1 or reserved:
        raise _malformed("UFFD: a field is out of range")
    return bool(user_mode_only)


@dataclass(frozen=True)
class File:
    """A range of a file, to be a region."""

    offset: int
    size: int
    page_bytes: int
    write: bool
    private: bool
    fork: str


def pack_file(offset: int, size: int, page_bytes: int = 0, flags: int = 0) -> bytes:
    return _FILE.pack(MAGIC, VERSION, FILE, offset, size, page_bytes, flags)


def unpack_file(data: bytes) -> File:
    _check_header(data, FILE, _FILE, "FILE")
    offset, size, page_bytes, flags = _FILE.unpack(data)[3:]
    if flags & ~(FILE_WRITE | FILE_NO_INHERIT | FILE_PRIVATE) or flags & FILE_WRITE and flags & FILE_PRIVATE:
        raise _malformed(f"FILE: unknown flags 0x{flags:x}")
    if offset % 4096 or offset >= 1 << 63:
        raise RequestError(errno.EINVAL, f"offset: {offset} is not a multiple of 4096 below 2^63", "offset")
    if not 0 < size < 1 << 63 or offset + size >= 1 << 63:
        raise RequestError(errno.EINVAL, f"bytes: {size} is out of range", "bytes")
    if page_bytes not in (0, 4096, 65536, 2 << 20):
        raise RequestError(errno.EINVAL, f"page_bytes: {page_bytes} is not a page size", "page_bytes")
    fork = "none" if flags & FILE_NO_INHERIT else "share"
    return File(offset, size, page_bytes, bool(flags & FILE_WRITE), bool(flags & FILE_PRIVATE), fork)


def pack_ready(status: int = 0, message: str = "", flags: int = 0) -> bytes:
    return _READY.pack(MAGIC, VERSION, READY, status, flags, _text(message, MESSAGE_BYTES))


def unpack_ready(data: bytes) -> tuple[int, str]:
    """(status, message)"""
    _check_header(data, READY, _READY, "READY")
    status, _, message = _READY.unpack(data)[3:]
    return status, _untext(message)


@dataclass(frozen=True)
class Ask:
    what: int
    va: int
    size: int


def pack_ask(what: int, va: int, size: int = 0) -> bytes:
    return _ASK.pack(MAGIC, VERSION, ASK, what, 0, va, size)


def unpack_ask(data: bytes) -> Ask:
    _check_header(data, ASK, _ASK, "ASK")
    what, reserved, va, size = _ASK.unpack(data)[3:]
    if what not in (ASK_FILE, ASK_MAPPED, ASK_RESTORED) or reserved or (what == ASK_FILE) != (size == 0):
        raise _malformed("ASK: a field is out of range")
    if va + size >= 1 << 63:
        raise _malformed("ASK: the range is out of range")
    return Ask(what, va, size)


def pack_answer(
    status: int = 0, message: str = "", *, flags: int = 0, va: int = 0, size: int = 0, offset: int = 0,
    page_bytes: int = 0,
) -> bytes:  # fmt: skip
    text = _text(message, MESSAGE_BYTES)
    return _ANSWER.pack(MAGIC, VERSION, ANSWER, status, flags, va, size, offset, page_bytes, 0, text)


def unpack_answer(data: bytes) -> tuple[int, int, int, int, int, int, str]:
    """(status, flags, va, bytes, offset, page_bytes, message)"""
    _check_header(data, ANSWER, _ANSWER, "ANSWER")
    status, flags, va, size, offset, page_bytes, _, message = _ANSWER.unpack(data)[3:]
    return status, flags, va, size, offset, page_bytes, _untext(message)


def is_userfaultfd(fd: int) -> bool:
    """A link read from procfs asks nothing of whatever is behind the descriptor, so it can't block on a hostile one."""
    return os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[userfaultfd]"
