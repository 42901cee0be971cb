# SPDX-License-Identifier: Apache-2.0
"""Traces: the file that recorded accesses are kept in. docs/maintainer.md has the format; nothing here needs a daemon.

A file is a header, blocks of records, and an end. Each of them has a checksum, so that damage is found where it is;
what is sound behind it can be read all the same, if that is asked for.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

from gmemd._policy import first_unsound

VERSION = 1
MAGIC = b"GMEMTRC\n"
BLOCK, END = b"GMTB", b"GMTE"
BLOCK_RECORDS_MAX = 65536
HEADER_BYTES_MAX = 1 << 20

# struct gmem_access of csrc/include/gmem/access.h
RECORD = struct.Struct("<QQQIBBBB")
RECORD_BYTES = RECORD.size
KINDS = {1: "fault", 2: "acquire", 3: "prefetch", 4: "ahead", 5: "gone"}
WRITE, RESIDENT, EMPTY, OWNED = 1, 2, 4, 8

_HEAD = struct.Struct("<8sHHII")  # magic, version, bytes of a record, bytes of the text, its checksum
_BLOCK = struct.Struct("<4sIIIQ")  # tag, checksum of all that follows, number, records, lost before its end
_END = struct.Struct("<4sIIIQQ")  # tag, checksum, blocks, flags, records, lost
_COMPLETE = 1  # of flags: the recording was stopped in order


class TraceError(Exception):
    """A file that is no trace, or a damaged one; the message says where."""

    def __init__(self, where: str, at: int, what: str) -> None:
        super().__init__(f"{where}: byte {at}: {what}")
        self.at = at
        self.what = what


class Record(NamedTuple):
    time_ns: int
    page: int
    va: int  # of `gone`: how many pages, from page on
    session: int
    hnid: int
    kind: str
    page_bytes: int
    write: bool
    resident: bool  # there was a copy on the hnode
    empty: bool  # it had no content yet
    owned: bool  # writable from then on, so later writes are unseen


@dataclass(frozen=True)
class Skipped:
    """What --salvage left out."""

    at: int
    bytes: int
    why: str


@dataclass
class Recording:
    """A trace in memory. header: what gmemd said at the start: gmemd, started_ns, hnodes, session, device."""

    header: dict[str, Any]
    records: bytearray = field(default_factory=bytearray)
    lost: int = 0  # accesses that gmemd had no room for
    complete: bool = False  # it was stopped in order
    skipped: list[Skipped] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.records) // RECORD_BYTES

    def __iter__(self) -> Iterator[Record]:
        for time_ns, page, va, session, hnid, kind, shift, flags in RECORD.iter_unpack(self.records):
            yield Record(
                time_ns, page, va, session, hnid, KINDS[kind], 1 << shift, bool(flags & WRITE),
                bool(flags & RESIDENT), bool(flags & EMPTY), bool(flags & OWNED),
            )  # fmt: skip

    def hnodes(self) -> dict[int, dict[str, Any]]:
        return {hnode["hnid"]: hnode for hnode in self.header["hnodes"]}


class Writer:
    """Writes a trace to a file that is open for writing, from its beginning. close() writes the end, and leaves the
    file open; without it the file counts as cut off."""

    def __init__(self, file: BinaryIO, header: dict[str, Any]) -> None:
        self._file = file
        self._blocks = 0
        self.records = 0
        self.lost = 0
        self.bytes = 0
        text = json.dumps(header).encode()
        head = _HEAD.pack(MAGIC, VERSION, RECORD_BYTES, len(text), 0)[:-4]
        self._put(head + struct.pack("<I", zlib.crc32(text, zlib.crc32(head))) + text)

    def _put(self, data: bytes | memoryview) -> None:
        """All of it, also into a file without a buffer."""
        left = memoryview(data)
        while len(left):
            left = left[self._file.write(left) :]
        self.bytes += len(data)

    def add(self, records: bytes, lost: int) -> None:
        """lost: since the recording began."""
        self.lost = lost
        view = memoryview(records)
        for first in range(0, len(view), BLOCK_RECORDS_MAX * RECORD_BYTES):
            piece = view[first : first + BLOCK_RECORDS_MAX * RECORD_BYTES]
            count = len(piece) // RECORD_BYTES
            head = _BLOCK.pack(BLOCK, 0, self._blocks, count, lost)
            checksum = zlib.crc32(piece, zlib.crc32(head[8:]))
            self._put(head[:4] + struct.pack("<I", checksum) + head[8:])
            self._put(piece)
            self._blocks += 1
            self.records += count

    def close(self, complete: bool = True) -> None:
        end = _END.pack(END, 0, self._blocks, _COMPLETE if complete else 0, self.records, self.lost)
        self._put(end[:4] + struct.pack("<I", zlib.crc32(end[8:])) + end[8:])
        self._file.flush()


def write(path: str, recording: Recording) -> None:
    with open(path, "wb") as file:
        writer = Writer(file, recording.header)
        writer.add(bytes(recording.records), recording.lost)
        writer.close(recording.complete)


def read(path: str, salvage: bool = False) -> Recording:
    """The trace in a file. TraceError if it is none, or damaged; with salvage what is sound of it, and .skipped says
    what is not. A damaged header can't be salvaged: it says how the rest is to be read."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            raise TraceError(path, 0, "this is no trace: the file is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data, salvage).read()


class _Reader:
    """Goes through a file piece by piece. In salvage, from a damage to the next sound piece counts as one gap."""

    def __init__(self, path: str, data: mmap.mmap, salvage: bool) -> None:
        self._path = path
        self._data = data
        self._salvage = salvage
        self._at = 0
        self._blocks = 0  # number of the next one
        self._gap_at = -1
        self._gap_why = ""

    def read(self) -> Recording:
        self._recording = Recording(self._header())
        more = True
        while more:
            more = self._piece()
        return self._recording

    def _fail(self, what: str, at: int) -> TraceError:
        return TraceError(self._path, at, what)

    def _header(self) -> dict[str, Any]:
        data = self._data
        if data[: len(MAGIC)] != MAGIC:
            raise self._fail("this is no trace: it does not begin with GMEMTRC", 0)
        if len(data) < _HEAD.size:
            raise self._fail("the header is cut off", len(data))
        _, version, record_bytes, length, checksum = _HEAD.unpack(data[: _HEAD.size])
        if version != VERSION:
            raise self._fail(f"version {version} of the format; this gmem reads version {VERSION}", 8)
        if record_bytes != RECORD_BYTES or length > HEADER_BYTES_MAX:
            raise self._fail("the header is damaged: its sizes make no sense", 10)
        text = data[_HEAD.size : _HEAD.size + length]
        if len(text) < length:
            raise self._fail("the header is cut off", len(data))
        if zlib.crc32(text, zlib.crc32(data[: _HEAD.size - 4])) != checksum:
            raise self._fail("the header's checksum is wrong", 16)
        self._at = _HEAD.size + length
        return self._described(text)

    def _described(self, text: bytes) -> dict[str, Any]:
        try:
            header = json.loads(text)
        except ValueError:
            raise self._fail("the header is not JSON", _HEAD.size) from None
        hnodes = header.get("hnodes") if isinstance(header, dict) else None
        if not isinstance(hnodes, list) or not all(
            isinstance(hnode, dict) and isinstance(hnode.get("hnid"), int) and isinstance(hnode.get("name"), str)
            for hnode in hnodes
        ):
            raise self._fail("the header does not say which hnodes there were", _HEAD.size)
        return header

    def _piece(self) -> bool:
        """One block, or the end; false if that was the last piece."""
        if self._at >= len(self._data):
            self._damage("the file ends here, and has no end: the recording was cut off")
            self._close_gap(len(self._data))
            return False
        tag = self._data[self._at : self._at + 4]
        problem = self._block() if tag == BLOCK else self._end() if tag == END else "neither a block nor the end"
        if problem is None:
            return tag != END
        self._damage(problem)
        self._at = self._next_tag()
        return True

    def _next_tag(self) -> int:
        """What looks like a block or the end; whether it is one, its checksum will say."""
        found = [at for tag in (BLOCK, END) if (at := self._data.find(tag, self._at + 1)) >= 0]
        return min(found, default=len(self._data))

    def _damage(self, what: str) -> None:
        what = f"block {self._blocks}: {what}"
        if not self._salvage:
            raise self._fail(what, self._at)
        if self._gap_at < 0:
            self._gap_at, self._gap_why = self._at, what

    def _close_gap(self, at: int) -> None:
        if self._gap_at >= 0:
            self._recording.skipped.append(Skipped(self._gap_at, at - self._gap_at, self._gap_why))
        self._gap_at = -1

    def _block(self) -> str | None:
        """What is wrong with it."""
        begin = self._at + _BLOCK.size
        head = self._data[self._at : begin]
        if len(head) < _BLOCK.size:
            return "cut off"
        _, checksum, number, count, lost = _BLOCK.unpack(head)
        if not 0 < count <= BLOCK_RECORDS_MAX:
            return f"{count} records in one block"
        piece = self._data[begin : begin + count * RECORD_BYTES]
        if len(piece) < count * RECORD_BYTES:
            return f"cut off: {count * RECORD_BYTES - len(piece)} bytes are missing"
        if zlib.crc32(piece, zlib.crc32(head[8:])) != checksum:
            return "the checksum is wrong"
        unsound = first_unsound(piece)
        if unsound is not None:
            return f"record {unsound} is no access"
        if number < self._blocks:
            return f"number {number} comes again"
        if number > self._blocks:
            self._damage(f"missing: number {number} comes instead")
        self._close_gap(self._at)
        self._recording.records += piece
        self._recording.lost = max(self._recording.lost, lost)
        self._blocks = number + 1
        self._at = begin + len(piece)
        return None

    def _end(self) -> str | None:
        """What is wrong with it."""
        end = self._data[self._at : self._at + _END.size]
        if len(end) < _END.size:
            return "the end is cut off"
        _, checksum, blocks, flags, records, lost = _END.unpack(end)
        if zlib.crc32(end[8:]) != checksum:
            return "the end's checksum is wrong"
        if blocks != self._blocks:
            self._damage(f"missing: there were {blocks}")
        elif records != len(self._recording) and not self._recording.skipped and self._gap_at < 0:
            self._damage(f"{records} records were written, and {len(self._recording)} are there")
        self._close_gap(self._at)
        self._recording.lost, self._recording.complete = lost, bool(flags & _COMPLETE)
        self._at += _END.size
        if self._at != len(self._data):
            self._damage("there is more behind the end")
            self._close_gap(len(self._data))
        return None
