# SPDX-License-Identifier: Apache-2.0
"""The control plane in one table: every op, its fields with types and limits, and who may ask for it.

Requests are untrusted. decode() takes apart the message, check_args() the fields of its op; both raise RequestError,
which names the argument. docs/protocol.md is this table for people.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgpack

from gmemd.errors import RequestError

VERSION = 1
MESSAGE_BYTES_MAX = 1 << 20
NESTING_MAX = 8
STRING_BYTES_MAX = 4096
ARRAY_MAX = 65536
MAP_MAX = 256
TOKEN_BYTES = 32
QUERY_PAGES_MAX = 65536
MAP_REGIONS_MAX = 65536
HNODE_MAX = 16
TRACE_BUFFER_BYTES, TRACE_BUFFER_MAX = 16 << 20, 1 << 31
NAME_BYTES_MAX = 31
POOL_NAME_BYTES_MAX = 64

_UINT64_MAX = (1 << 64) - 1
_BYTES_LIMIT = 1 << 63
_PAGE_BYTES = (0, 4096, 65536, 2 << 20)

# Who may ask: ANY token, a SESSION that has memory, an ADMIN.
ANY, SESSION, ADMIN = "any", "session", "admin"

ADVICE = (
    "discard", "prefetch", "pinned", "unpinned", "read_mostly", "no_read_mostly", "preferred", "cold", "accessed_by",
    "not_accessed_by", "freeze", "thaw", "zero",
)  # fmt: skip

FORK = ("share", "none", "copy")

Check = Callable[[str, Any], Any]


def _refuse(name: str, why: str, number: int = errno.EINVAL) -> RequestError:
    return RequestError(number, f"{name}: {why}", name)


def _kind(value: Any) -> str:
    names = {bool: "a boolean", str: "a string", bytes: "bytes", float: "a float", list: "an array", dict: "a map"}
    return "nil" if value is None else names.get(type(value), type(value).__name__)


def _integer(name: str, value: Any) -> int:
    if type(value) is not int:  # not isinstance: a boolean is no number here
        raise _refuse(name, f"must be an integer, not {_kind(value)}")
    return value


def uint(most: int = _UINT64_MAX) -> Check:
    def check(name: str, value: Any) -> int:
        number = _integer(name, value)
        if not 0 <= number <= most:
            raise _refuse(name, f"{number} is out of range: 0 to {most}")
        return number

    return check


def sint(least: int, most: int) -> Check:
    def check(name: str, value: Any) -> int:
        number = _integer(name, value)
        if not least <= number <= most:
            raise _refuse(name, f"{number} is out of range: {least} to {most}")
        return number

    return check


def length(name: str, value: Any) -> int:
    """A number of bytes: at least one, and below 2^63 so that no sum with an address can wrap unseen."""
    number = _integer(name, value)
    if not 0 < number < _BYTES_LIMIT:
        raise _refuse(name, f"{number} is out of range: at least 1 and less than 2^63")
    return number


def page_aligned(name: str, value: Any) -> int:
    number = uint()(name, value)
    if number % 4096:
        raise _refuse(name, f"0x{number:x} is not a multiple of 4096")
    return number


def page_size(name: str, value: Any) -> int:
    if _integer(name, value) not in _PAGE_BYTES:
        raise _refuse(name, f"{value} is not a page size: 4096, 65536, 2097152, or 0 to choose by the region's size")
    return value


def boolean(name: str, value: Any) -> bool:
    if type(value) is not bool:
        raise _refuse(name, f"must be a boolean, not {_kind(value)}")
    return value


def choice(*words: str) -> Check:
    def check(name: str, value: Any) -> str:
        if type(value) is not str:
            raise _refuse(name, f"must be a string, not {_kind(value)}")
        if value not in words:
            raise _refuse(name, f"{value[:64]!r} is unknown: one of {', '.join(words)}")
        return value

    return check


def string(most: int = STRING_BYTES_MAX, pattern: str | None = None) -> Check:
    compiled = re.compile(pattern) if pattern else None

    def check(name: str, value: Any) -> str:
        if type(value) is not str:
            raise _refuse(name, f"must be a string, not {_kind(value)}")
        if not value or len(value.encode()) > most:
            raise _refuse(name, f"must have 1 to {most} bytes")
        if "\0" in value or (compiled and not compiled.fullmatch(value)):
            raise _refuse(name, f"{value[:64]!r} has characters that are not allowed here")
        return value

    return check


def ranges(name: str, value: Any) -> list[tuple[int, int]]:
    """Pairs of address and length; errors name the pair."""
    if type(value) is not list:
        raise _refuse(name, f"must be an array of [va, bytes], not {_kind(value)}")
    if not value:
        raise _refuse(name, "is empty")
    checked = []
    for index, pair in enumerate(value):
        if type(pair) is not list or len(pair) != 2:
            raise _refuse(name, f"element {index} is not a pair [va, bytes]")
        va, size = pair
        if type(va) is not int or type(size) is not int or not 0 <= va <= _UINT64_MAX or not 0 < size < _BYTES_LIMIT:
            raise _refuse(name, f"element {index} is not a pair of an address and a length of 1 to 2^63 - 1 bytes")
        if va + size > _UINT64_MAX:
            raise _refuse(name, f"element {index} ends beyond the address space")
        checked.append((va, size))
    return checked


def holds(name: str, value: Any) -> list[tuple[int, int]]:
    """Pairs of an acquire's name and which of its ranges is meant."""
    if type(value) is not list:
        raise _refuse(name, f"must be an array of pairs, not {_kind(value)}")
    for index, item in enumerate(value):
        if type(item) is not list or len(item) != 2:
            raise _refuse(name, f"element {index} is not a pair of the name of an acquire and the number of a range")
        hold, which = item
        if type(hold) is not int or type(which) is not int or not 0 < hold <= _UINT64_MAX or not 0 <= which < 1 << 32:
            raise _refuse(name, f"element {index} is not a pair of the name of an acquire and the number of a range")
    return [(hold, which) for hold, which in value]


def string_map(name: str, value: Any) -> dict[str, str]:
    if type(value) is not dict:
        raise _refuse(name, f"must be a map of strings, not {_kind(value)}")
    for key, item in value.items():
        if type(key) is not str or type(item) is not str or not key or "\0" in key or "\0" in item:
            raise _refuse(name, f"{str(key)[:64]!r} and its value must be strings without NUL, the key not empty")
    return value


@dataclass(frozen=True)
class Field:
    check: Check
    default: Any = None
    required: bool = True


def optional(check: Check, default: Any = None) -> Field:
    return Field(check, default, required=False)


@dataclass(frozen=True)
class Op:
    """inline: answered by the ROUTER thread itself, because it can't wait for anything; waits_with: unless this field
    is there."""

    who: str
    fields: Mapping[str, Field]
    inline: bool = False
    waits_with: str = ""


_VA = Field(uint())
_BYTES = Field(length)
_HNID = Field(sint(-1, HNODE_MAX - 1))
_CONTEXT = Field(uint())
_DEVICE = Field(string(NAME_BYTES_MAX, r"[A-Za-z][A-Za-z0-9_.-]*"))
_DRIVER = Field(string(256, r"[A-Za-z_][A-Za-z0-9_.-]*(:[A-Za-z_][A-Za-z0-9_.]*)?"))

# No separators: a name is nobody's path. No leading dot or dash: it is no option either.
_POOL = Field(string(POOL_NAME_BYTES_MAX, r"[A-Za-z0-9_][A-Za-z0-9_.-]*"))

OPS: dict[str, Op] = {
    "ping": Op(ANY, {}, inline=True),
    "mmap": Op(
        SESSION,
        {
            "bytes": _BYTES,
            "page_bytes": optional(page_size, 0),
            "fork": optional(choice(*FORK), "share"),
            "small": optional(boolean, False),
            "above": optional(page_aligned, 0),
        },
    ),
    "adopt": Op(
        SESSION,
        {
            "va": Field(page_aligned),
            "bytes": _BYTES,
            "page_bytes": optional(page_size, 0),
            "fork": optional(choice(*FORK), "copy"),
        },
    ),
    "mmap_commit": Op(SESSION, {"va": Field(page_aligned)}),
    "munmap": Op(SESSION, {"va": Field(page_aligned), "bytes": _BYTES}),
    "advise": Op(SESSION, {"hnid": _HNID, "va": _VA, "bytes": _BYTES, "advice": Field(choice(*ADVICE))}),
    "prefetch": Op(SESSION, {"hnid": _HNID, "va": _VA, "bytes": _BYTES}),
    "discard": Op(SESSION, {"va": _VA, "bytes": _BYTES}),
    "flush": Op(SESSION, {"va": _VA, "bytes": _BYTES}),
    "hmemcpy": Op(SESSION, {"hnid": _HNID, "dst": _VA, "src": _VA, "bytes": _BYTES}),
    "query": Op(SESSION, {"va": _VA, "bytes": _BYTES}),
    "acquire": Op(SESSION, {"context": _CONTEXT, "ranges": Field(ranges), "write": Field(boolean)}),
    "release": Op(
        SESSION,
        {
            "context": _CONTEXT,
            "ranges": optional(ranges, []),
            "holds": optional(holds, []),
            "write": optional(boolean, False),
        },
    ),
    "pool_create": Op(
        SESSION,
        {
            "name": _POOL,
            "bytes": _BYTES,
            "mode": optional(uint(0o777), 0o600),
            "page_bytes": optional(page_size, 0),
            "small": optional(boolean, False),
            "persistent": optional(boolean, False),
        },
    ),
    "pool_open": Op(
        SESSION,
        {
            "name": _POOL,
            "write": optional(boolean, False),
            "uid": optional(uint((1 << 32) - 2)),
            "remote": optional(_DEVICE.check),
        },
        inline=True,
        waits_with="remote",
    ),
    "pool_unlink": Op(ANY, {"name": _POOL, "remote": optional(_DEVICE.check)}),
    "pool_publish": Op(ANY, {"name": _POOL, "remote": optional(_DEVICE.check)}),
    "pools": Op(ANY, {"remote": optional(_DEVICE.check)}),
    "devices": Op(ANY, {}),
    "drivers": Op(ANY, {}),
    "attach": Op(ADMIN, {"driver": _DRIVER, "name": _DEVICE, "config": optional(string_map, {})}),
    "detach": Op(ADMIN, {"name": _DEVICE, "force": optional(boolean, False)}),
    "limit": Op(ADMIN, {"name": _DEVICE, "bytes": _BYTES}),
    "quota": Op(
        ANY,
        {
            "name": _DEVICE,
            "bytes": Field(uint(_BYTES_LIMIT - 1)),
            "session": optional(uint()),
            "uid": optional(uint((1 << 32) - 2)),
        },
    ),
    "upgrade": Op(ADMIN, {}),
    "contexts": Op(SESSION, {}, inline=True),
    "context_overlay": Op(SESSION, {"context": _CONTEXT, "va": Field(page_aligned), "bytes": _BYTES}),
    "context_close": Op(SESSION, {"context": _CONTEXT}),
    "sessions": Op(ANY, {}),
    "stats": Op(ANY, {}),
    "map": Op(ANY, {"session": optional(uint()), "limit": optional(uint(MAP_REGIONS_MAX), 4096)}),
    "trace_start": Op(
        ADMIN,
        {
            "session": optional(uint()),
            "device": optional(_DEVICE.check),
            "buffer_bytes": optional(uint(TRACE_BUFFER_MAX), TRACE_BUFFER_BYTES),
        },
    ),
    "trace_read": Op(ADMIN, {"position": Field(uint())}),
    "trace_stop": Op(ADMIN, {}),
    "close": Op(SESSION, {}),
}

_ENVELOPE = frozenset(("v", "id", "op", "token"))


@dataclass(slots=True)
class Request:
    """A message whose envelope is sound; its arguments are not checked yet."""

    id: int
    name: str
    op: Op
    token: bytes
    raw_args: dict[str, Any]

    @property
    def inline(self) -> bool:
        return self.op.inline and self.op.waits_with not in self.raw_args


class BadRequest(Exception):
    """A message that can't be dispatched: what to answer, and under which id (0 if it had none)."""

    def __init__(self, request_id: int, error: RequestError) -> None:
        super().__init__(str(error))
        self.request_id = request_id
        self.error = error


def _unpack(body: bytes) -> Any:
    if len(body) > MESSAGE_BYTES_MAX:
        raise RequestError(errno.EMSGSIZE, f"message of {len(body)} bytes is longer than {MESSAGE_BYTES_MAX}")
    try:
        return msgpack.unpackb(
            body, raw=False, strict_map_key=True, max_str_len=STRING_BYTES_MAX, max_bin_len=STRING_BYTES_MAX,
            max_array_len=ARRAY_MAX, max_map_len=MAP_MAX, max_ext_len=0,
        )  # fmt: skip
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.exceptions.UnpackException) as error:
        detail = str(error) or type(error).__name__
        raise RequestError(errno.EPROTO, f"message is not acceptable msgpack: {detail[:200]}") from None


def _too_deep(value: Any, left: int) -> bool:
    if not isinstance(value, (list, dict)):
        return False
    if left == 0:
        return True
    items = value.values() if isinstance(value, dict) else value
    return any(_too_deep(item, left - 1) for item in items if isinstance(item, (list, dict)))


def decode(body: bytes) -> Request:
    """The request in a message; BadRequest with the id to answer otherwise."""
    request_id = 0
    try:
        message = _unpack(body)
        if not isinstance(message, dict):
            raise RequestError(errno.EPROTO, f"message must be a map, not {_kind(message)}")
        request_id = _request_id(message)
        if _too_deep(message, NESTING_MAX):
            raise RequestError(errno.EPROTO, f"message is nested deeper than {NESTING_MAX}")
        return _envelope(message, request_id)
    except RequestError as error:
        raise BadRequest(request_id, error) from None


def _request_id(message: dict[Any, Any]) -> int:
    value = message.get("id")
    if type(value) is not int or not 0 <= value <= _UINT64_MAX:
        raise RequestError(errno.EPROTO, "id: must be an unsigned integer", "id")
    return value


def _envelope(message: dict[Any, Any], request_id: int) -> Request:
    version = message.get("v")
    if type(version) is not int or version != VERSION:
        raise RequestError(errno.EPROTO, f"v: this gmemd speaks version {VERSION}", "v")
    name = message.get("op")
    if type(name) is not str:
        raise RequestError(errno.EPROTO, "op: must be a string", "op")
    token = message.get("token")
    if type(token) is not bytes or len(token) != TOKEN_BYTES:
        raise RequestError(errno.EPERM, f"token: must be the {TOKEN_BYTES} bytes that the handshake gave", "token")
    op = OPS.get(name)
    if op is None:
        raise RequestError(errno.ENOSYS, f"op: {name[:64]!r} is unknown", "op")
    args = {key: value for key, value in message.items() if key not in _ENVELOPE}
    return Request(request_id, name, op, token, args)


def check_args(request: Request) -> dict[str, Any]:
    """All fields of the op with defaults filled in; a wrong, missing or unknown one is named."""
    fields = request.op.fields
    for key in request.raw_args:
        if key not in fields:
            text = key if isinstance(key, str) else repr(key)
            raise RequestError(errno.EINVAL, f"{text[:64]}: {request.name} has no such field", text[:64])
    checked = {}
    for name, field in fields.items():
        if name in request.raw_args:
            checked[name] = field.check(name, request.raw_args[name])
        elif field.required:
            raise _refuse(name, f"is missing from {request.name}")
        else:
            checked[name] = field.default
    _check_ends(checked)
    return checked


def _check_ends(args: Mapping[str, Any]) -> None:
    """A range that wraps is refused here once, so that nothing behind this has to think of it."""
    size = args.get("bytes")
    for name in ("va", "dst", "src"):
        if size is not None and name in args and args[name] + size > _UINT64_MAX:
            raise _refuse("bytes", f"{name} + {size} is beyond the address space")


def encode_reply(request_id: int, reply: Mapping[str, Any]) -> bytes:
    return msgpack.packb({"id": request_id, "ok": True, **reply})


def encode_error(request_id: int, error: RequestError) -> bytes:
    body: dict[str, Any] = {"code": error.code, "errno": error.errno or errno.EIO, "message": error.message}
    if error.argument is not None:
        body["argument"] = error.argument
    return msgpack.packb({"id": request_id, "ok": False, "error": body})
