# SPDX-License-Identifier: Apache-2.0
"""What is published on the servers of a remote tier: pools by name, with their versions, writers and readers.

Keys of a pool, with gmem:TENANT: before each. Those of {p.NAME} are on one node, for transactions:

    {p.NAME}:head       which version is the newest, and what it takes to read it; JSON. Written last, and never by a
                        writer that has lost its lease
    {p.NAME}:fence      counts writers. STAMP, a version's number in key names: fence << 32 | a random number
    {p.NAME}:lease      who writes just now: STAMP MACHINE; expires
    {p.NAME}:old        hash, STAMP -> PAGES PAGE_BYTES, of all versions that may have values, but for the head's
    {p.NAME}:readers    sorted set of STAMP.MACHINE, by the time (ms, the server's) until which that machine reads it
    {p.NAME:m}:N:STAMP  the manifest: which pages are present, and their checksums; pieces of 256 KiB
    {p.NAME:EXTENT}:PAGE:STAMP   pages (csrc/drivers/remotepools.c)
    {p}:names           set of the names that have a head; for people

Garbage: a version that is not the head's is dropped, by whoever looks first, when no machine reads it and its writer's
lease is over. A machine is a reader until it says that it is none, or has not been heard of for ten leases.

Transactions are WATCH, MULTI and EXEC: no script runs on the server, and the rights that a user needs are to keys of
his tenant alone.
"""

from __future__ import annotations

import contextlib
import errno
import json
import secrets
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import structlog

from gmemd.drivers.servers import Servers
from gmemd.errors import RequestError

log = structlog.get_logger("gmemd.published")

PIECE = 256 << 10  # of a manifest
READER_LEASES = 10
_FORMAT = 1
_WAIT_MS = 400  # below the time that the package waits for an answer
_PAUSE_S = 0.1
_HEAD_BYTES_MAX = 4096
_PAGES_MAX = 1 << 31
_PAGE_BYTES = (4096, 65536, 2 << 20)
_INT = (1 << 63) - 1

T = TypeVar("T")


def _unreachable(why: object) -> RequestError:
    return RequestError(errno.ETIMEDOUT, f"remote: no server has answered in time: {why}"[:300], "remote")


def _lost(name: str) -> RequestError:
    text = f"name: the lease to write {name} was lost: it expired, or another writer has it. Nothing was published"
    return RequestError(errno.ECANCELED, text, "name")


@dataclass(frozen=True)
class Head:
    """A version that is published. uid, gid and mode are those of its pool where it was made."""

    stamp: int
    pages: int
    page_bytes: int
    uid: int
    gid: int
    mode: int
    crc: int  # of the manifest

    @property
    def version(self) -> int:
        return self.stamp >> 32

    def pack(self) -> bytes:
        return json.dumps({"format": _FORMAT, **asdict(self), "time": int(time.time())}).encode()

    @classmethod
    def unpack(cls, name: str, raw: bytes) -> Head:
        """What is on a server is not trusted."""
        try:
            if len(raw) > _HEAD_BYTES_MAX:
                raise ValueError("too long")
            told = json.loads(raw)
            fields = {key: told[key] for key in cls.__dataclass_fields__}
            if told["format"] != _FORMAT or any(type(n) is not int or not 0 <= n <= _INT for n in fields.values()):
                raise ValueError("of another format")
            head = cls(**fields)
            if not 0 < head.pages <= _PAGES_MAX or head.page_bytes not in _PAGE_BYTES or head.mode > 0o777:
                raise ValueError("out of range")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            text = f"name: what the servers say of {name} can't be read: {error}"
            raise RequestError(errno.EIO, text, "name") from None
        return head


@dataclass
class Version:
    """What a version consists of, as Core.pool_export and Core.pool_import take it."""

    name: str
    stamp: int
    pages: int
    page_bytes: int
    present: bytes  # a bit for each page, in whole words of 8 bytes
    checks: bytearray  # 4 bytes for each page

    def manifest(self) -> bytes:
        return self.present + bytes(self.checks)


class Line:
    """A connection to the node that has a pool's keys, for a few commands one behind the other."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def say(self, *words: Any) -> Any:
        self._connection.send_command(*words)
        return self._connection.read_response()

    def exec(self, *commands: tuple[Any, ...]) -> list[Any] | None:
        """MULTI to EXEC; None: something that was watched has changed."""
        self._connection.send_packed_command(
            self._connection.pack_commands([("MULTI",), *commands, ("EXEC",)])
        )  # fmt: skip
        refused = None
        for _ in range(len(commands) + 1):
            try:
                self._connection.read_response()
            except Exception as error:  # of a command that is not even queued; EXEC says so again
                if not _is_refusal(error):
                    raise
                refused = refused or error
        try:
            done = self._connection.read_response()
        except Exception as error:
            raise refused or error from None
        for reply in done or ():
            if isinstance(reply, Exception):
                raise reply
        return done


def _is_refusal(error: Exception) -> bool:
    from valkey.exceptions import ResponseError

    return isinstance(error, ResponseError)


class Lease:
    """The right to publish a name, until it is lost. A thread keeps it alive."""

    def __init__(self, published: Published, name: str, stamp: int, until: float) -> None:
        self._published = published
        self.name = name
        self.stamp = stamp
        self._until = until  # on this machine's clock, before the server's
        self._lost = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, name=f"lease-{name[:8]}", daemon=True)

    def check(self) -> None:
        """ECANCELED: it is lost, and what has been written under it will never be seen."""
        if self._lost or time.monotonic() >= self._until:
            raise _lost(self.name)

    def _renew(self) -> None:
        while not self._over.wait(self._published.lease_s / 3):
            began = time.monotonic()
            try:
                self._published.renew(self)
                self._until = began + self._published.lease_s
            except RequestError as error:
                log.warning("a lease could not be renewed", pool=self.name, error=error.message)
                if error.errno == errno.ECANCELED:
                    self._lost = True
                    return

    def __enter__(self) -> Lease:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(self._published.lease_s)


class Published:
    """Of one tenant on one device's servers. Methods block, for the device's timeout at the longest; RequestError names
    what is wrong: ETIMEDOUT nobody answers, ENODATA too few replicas have it, ENOSPC full, EACCES, ECANCELED the lease
    is lost."""

    def __init__(
        self, servers: Servers, tenant: str, *, replicas: int, timeout_s: float, lease_s: float, machine: str
    ) -> None:  # fmt: skip
        self._servers = servers
        self._tenant = tenant
        self._replicas = replicas
        self._timeout_s = timeout_s
        self.lease_s = lease_s
        self._machine = machine

    @property
    def reader_s(self) -> float:
        return READER_LEASES * self.lease_s

    def close(self) -> None:
        self._servers.close()

    def key(self, name: str, what: str) -> str:
        return f"gmem:{self._tenant}:{{p.{name}}}:{what}"

    # ---- talking ----

    @contextlib.contextmanager
    def _line(self, key: str) -> Iterator[Line]:
        pool = self._servers.client_of(key).connection_pool
        connection = pool.get_connection("MULTI")
        try:
            yield Line(connection)
        except BaseException:
            connection.disconnect()  # in the middle of something, or watching
            raise
        finally:
            pool.release(connection)

    def _ask(self, key: str, work: Callable[[Line], T], timeout_s: float | None = None) -> T:
        """Until it has an answer: connections break, nodes take over from others. work may be done more than once."""
        import valkey
        from valkey.exceptions import AuthenticationError, NoPermissionError, OutOfMemoryError

        end = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        while True:
            try:
                with self._line(key) as line:
                    return work(line)
            except RequestError:
                raise
            except OutOfMemoryError as error:
                raise RequestError(errno.ENOSPC, f"remote: the server is full: {error}"[:300], "remote") from None
            except (AuthenticationError, NoPermissionError) as error:
                raise RequestError(errno.EACCES, f"remote: {error}"[:300], "remote") from None
            except (valkey.ValkeyError, OSError) as error:
                if time.monotonic() >= end:
                    raise _unreachable(error) from None
            time.sleep(_PAUSE_S)
            with contextlib.suppress(Exception):  # whatever the package raises: it is asked again
                self._servers.refresh()

    def _confirm(self, line: Line, what: str) -> None:
        """What was said on this line is had by as many replicas as were asked for."""
        end = time.monotonic() + self._timeout_s
        while self._replicas and line.say("WAIT", self._replicas, _WAIT_MS) < self._replicas:
            if time.monotonic() >= end:
                text = f"remote: fewer than {self._replicas} replicas have confirmed {what}"
                raise RequestError(errno.ENODATA, text, "remote")

    # ---- reading ----

    def head(self, name: str) -> Head | None:
        key = self.key(name, "head")
        raw = self._ask(key, lambda line: line.say("GET", key))
        return None if raw is None else Head.unpack(name, raw)

    def heads(self) -> list[tuple[str, Head]]:
        """All that there are."""
        key = f"gmem:{self._tenant}:{{p}}:names"
        names = sorted(raw.decode("utf-8", "replace") for raw in self._ask(key, lambda line: line.say("SMEMBERS", key)))
        return [(name, head) for name in names if (head := self.head(name)) is not None]

    def manifest(self, name: str, head: Head) -> Version:
        bits = (head.pages + 63) // 64 * 8
        size = bits + 4 * head.pages
        raw = bytearray()
        for number in range((size + PIECE - 1) // PIECE):
            key = self._piece(name, number, head.stamp)
            piece = self._ask(key, lambda line, key=key: line.say("GET", key))  # type: ignore[misc]
            if piece is None:
                break
            raw += piece
        if len(raw) != size or zlib.crc32(raw) != head.crc:
            text = f"name: the manifest of {name}, version {head.version}, is damaged or incomplete"
            raise RequestError(errno.EIO, text, "name")
        return Version(name, head.stamp, head.pages, head.page_bytes, bytes(raw[:bits]), raw[bits:])

    def _piece(self, name: str, number: int, stamp: int) -> str:
        return f"gmem:{self._tenant}:{{p.{name}:m}}:{number:x}:{stamp:x}"

    def mark(self, name: str, stamp: int) -> None:
        """This machine reads that version, for the next reader_s seconds."""
        key = self.key(name, "readers")

        def work(line: Line) -> None:
            line.say("ZADD", key, self._now_ms(line) + int(self.reader_s * 1000), self._member(stamp))
            if self._replicas:  # to survive a fail-over; if there are none just now, reading goes on all the same
                line.say("WAIT", self._replicas, _WAIT_MS)

        self._ask(key, work)

    def unmark(self, name: str, stamp: int, timeout_s: float | None = None) -> None:
        key = self.key(name, "readers")
        self._ask(key, lambda line: line.say("ZREM", key, self._member(stamp)), timeout_s)

    def _member(self, stamp: int) -> str:
        return f"{stamp:x}.{self._machine}"

    @staticmethod
    def _now_ms(line: Line) -> int:
        seconds, microseconds = line.say("TIME")
        return int(seconds) * 1000 + int(microseconds) // 1000

    # ---- writing ----

    @contextlib.contextmanager
    def writing(self, name: str, uid: int) -> Iterator[Lease]:
        """EBUSY: another writer has the lease. EACCES: the name is another user's."""
        nonce = secrets.randbits(32)
        key = self.key(name, "lease")
        began = time.monotonic()
        stamp = self._ask(key, lambda line: self._take(line, name, uid, nonce))
        lease = Lease(self, name, stamp, began + self.lease_s)
        try:
            with lease:
                yield lease
        finally:
            with contextlib.suppress(RequestError):
                self._ask(key, lambda line: self._let_go(line, name, stamp))

    def _take(self, line: Line, name: str, uid: int, nonce: int) -> int:
        lease = self.key(name, "lease")
        raw = line.say("GET", self.key(name, "head"))
        head = None if raw is None else Head.unpack(name, raw)
        if head is not None and uid not in (0, head.uid):
            raise RequestError(errno.EACCES, f"name: {name} is there already, another user's", "name")
        line.say("WATCH", lease)
        holder = line.say("GET", lease)
        stamp = _stamp_of(holder)
        if holder is not None and stamp & 0xFFFFFFFF == nonce:  # an answer was lost
            line.say("UNWATCH")
            return stamp
        if holder is not None and holder.decode("utf-8", "replace").split(" ")[-1] != self._machine:
            raise RequestError(errno.EBUSY, f"name: another machine is publishing {name}", "name")
        # free, or a killed predecessor's: no other thread of this gmemd writes it
        count = line.say("INCR", self.key(name, "fence"))
        if head is not None and count <= head.version:  # a fail-over has lost what was not confirmed
            count = line.say("INCRBY", self.key(name, "fence"), head.version + 1 - count)
        stamp = count << 32 | nonce
        taken = line.exec(("SET", lease, f"{stamp:x} {self._machine}", "PX", int(self.lease_s * 1000)))
        if taken is None:
            raise RequestError(errno.EBUSY, f"name: another machine is publishing {name}", "name")
        self._confirm(line, f"the lease to write {name}")
        return int(stamp)

    def _held(self, line: Line, name: str, stamp: int) -> bool:
        """Watches the lease, and whether it is still that writer's."""
        line.say("WATCH", self.key(name, "lease"))
        return _stamp_of(line.say("GET", self.key(name, "lease"))) == stamp

    def _guarded(self, line: Line, name: str, stamp: int, *commands: tuple[Any, ...]) -> None:
        while self._held(line, name, stamp):
            if line.exec(*commands) is not None:
                return
        line.say("UNWATCH")
        raise _lost(name)

    def renew(self, lease: Lease) -> None:
        key, ms = self.key(lease.name, "lease"), int(self.lease_s * 1000)
        self._ask(key, lambda line: self._guarded(line, lease.name, lease.stamp, ("PEXPIRE", key, ms)))

    def _let_go(self, line: Line, name: str, stamp: int) -> None:
        with contextlib.suppress(RequestError):  # it was lost
            self._guarded(line, name, stamp, ("UNLINK", self.key(name, "lease")))

    def intend(self, lease: Lease, pages: int, page_bytes: int) -> None:
        """Values of this version may exist from now on."""
        key = self.key(lease.name, "old")
        command = ("HSET", key, f"{lease.stamp:x}", f"{pages} {page_bytes}")

        def work(line: Line) -> None:
            self._guarded(line, lease.name, lease.stamp, command)
            self._confirm(line, f"what is to be known of {lease.name}")

        self._ask(key, work)

    def admit(self, name: str, stamp: int, pages: int, page_bytes: int) -> None:
        """A version that has failed may have values: also such as were written when others had dropped it already. Does
        nothing if it has become the head all the same."""
        key, old = self.key(name, "head"), self.key(name, "old")

        def work(line: Line) -> None:
            while True:
                line.say("WATCH", key)
                raw = line.say("GET", key)
                if raw is not None and Head.unpack(name, raw).stamp == stamp:
                    line.say("UNWATCH")
                    return
                if line.exec(("HSET", old, f"{stamp:x}", f"{pages} {page_bytes}")) is not None:
                    return

        self._ask(key, work)

    def put_manifest(self, lease: Lease, version: Version) -> int:
        """Its checksum."""
        raw = version.manifest()
        for number in range((len(raw) + PIECE - 1) // PIECE):
            lease.check()
            key, piece = self._piece(lease.name, number, version.stamp), raw[number * PIECE : (number + 1) * PIECE]

            def work(line: Line, key: str = key, piece: bytes = piece) -> None:
                line.say("SET", key, piece)
                self._confirm(line, f"the manifest of {lease.name}")

            self._ask(key, work)
        return zlib.crc32(raw)

    def move_head(self, lease: Lease, head: Head) -> None:
        """To that version, of which everything has been confirmed. The one before is garbage once nobody reads it."""
        self._ask(self.key(lease.name, "head"), lambda line: self._move(line, lease, head))
        names = f"gmem:{self._tenant}:{{p}}:names"
        self._ask(names, lambda line: line.say("SADD", names, lease.name))

    def _move(self, line: Line, lease: Lease, head: Head | None) -> None:
        """None: there is none any more."""
        name = lease.name
        key, old = self.key(name, "head"), self.key(name, "old")
        while True:
            held = self._held(line, name, lease.stamp)
            line.say("WATCH", key)
            raw = line.say("GET", key)
            before = None if raw is None else Head.unpack(name, raw)
            if head is not None and before is not None and before.stamp == head.stamp:
                break  # an answer was lost
            if not held or (before is not None and before.version >= lease.stamp >> 32):
                raise _lost(name)
            lease.check()
            commands: list[tuple[Any, ...]] = [("SET", key, head.pack()) if head else ("UNLINK", key)]
            if head is not None:
                commands.append(("HDEL", old, f"{head.stamp:x}"))
            if before is not None:
                commands.append(("HSET", old, f"{before.stamp:x}", f"{before.pages} {before.page_bytes}"))
            if line.exec(*commands) is not None:
                break
        self._confirm(line, f"the new version of {name}: it is there, but might not survive a fail-over")

    def remove(self, lease: Lease) -> None:
        """Nobody can open it any more."""
        self._ask(self.key(lease.name, "head"), lambda line: self._move(line, lease, None))
        names = f"gmem:{self._tenant}:{{p}}:names"
        self._ask(names, lambda line: line.say("SREM", names, lease.name))

    # ---- garbage ----

    def garbage(self, name: str) -> dict[int, tuple[int, int]]:
        """Stamps of versions that nobody reads or writes, with pages and page size."""
        key = self.key(name, "old")

        def work(line: Line) -> tuple[dict[bytes, bytes], list[bytes], bytes | None]:
            readers = self.key(name, "readers")
            line.say("ZREMRANGEBYSCORE", readers, "-inf", f"({self._now_ms(line)}")
            old = line.say("HGETALL", key)
            if isinstance(old, list):
                old = dict(zip(old[::2], old[1::2], strict=True))
            return old, line.say("ZRANGE", readers, 0, -1), line.say("GET", self.key(name, "lease"))

        old, readers, lease = self._ask(key, work)
        in_use = {_stamp_of(member.replace(b".", b" ", 1)) for member in readers} | {_stamp_of(lease)}
        found = {}
        for raw, size in old.items():
            with contextlib.suppress(ValueError):
                stamp, (pages, page_bytes) = int(raw, 16), map(int, size.split())
                if stamp not in in_use and 0 < pages <= _PAGES_MAX and page_bytes in _PAGE_BYTES:
                    found[stamp] = (pages, page_bytes)
        return found

    def forget(self, name: str, stamp: int, pages: int) -> None:
        """The rest of a version whose pages have been dropped."""
        size = (pages + 63) // 64 * 8 + 4 * pages
        for number in range((size + PIECE - 1) // PIECE):
            key = self._piece(name, number, stamp)
            self._ask(key, lambda line, key=key: line.say("UNLINK", key))  # type: ignore[misc]
        old = self.key(name, "old")
        self._ask(old, lambda line: line.say("HDEL", old, f"{stamp:x}"))


def _stamp_of(holder: bytes | None) -> int:
    """0: nobody's."""
    try:
        return int(holder.split(b" ")[0], 16) if holder else 0
    except ValueError:
        return 0
