# SPDX-License-Identifier: Apache-2.0
"""What the Python side of a daemon that is killed leaves to the next one: tables of small maps in a memfd.

All of it is written at each change, in turn into one half of the file and the other, and the header of a half last: who
reads at any instant finds the one state or the other.
"""

from __future__ import annotations

import errno
import os
import struct
import threading
import zlib
from typing import Any

import msgpack

_HALF = 64 << 20  # sparse
_HEADER = struct.Struct("<8sQQL")  # magic, generation, length, CRC-32 of generation and what follows
VERSION = 1
_MAGIC = b"gmnotes%d" % VERSION


def _crc(generation: int, body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(generation.to_bytes(8, "little")))


class Notes:
    """tables[table][key] is a map of plain values. Without a descriptor nothing outlives the process. OSError (EPROTO):
    what is in the file is of another version."""

    def __init__(self, fd: int | None = None) -> None:
        self._fd = fd
        self._lock = threading.Lock()
        self._generation = 0
        self._tables: dict[str, dict[Any, dict[str, Any]]] = {}
        if fd is not None:
            self._read(fd)

    @staticmethod
    def new_file() -> int:
        return os.memfd_create("gmem-notes", os.MFD_CLOEXEC)

    def _read(self, fd: int) -> None:
        for half in (0, 1):
            raw = os.pread(fd, _HEADER.size, half * _HALF)
            if len(raw) < _HEADER.size:
                continue
            magic, generation, length, crc = _HEADER.unpack(raw)
            if magic[:-1] == _MAGIC[:-1] and magic[-1:] not in (_MAGIC[-1:], b"\0"):
                raise OSError(errno.EPROTO, "the notes of another gmemd are of another version; they were not touched")
            if magic != _MAGIC or generation <= self._generation or length > _HALF - _HEADER.size:
                continue
            body = os.pread(fd, length, half * _HALF + _HEADER.size)
            if length and _crc(generation, body) == crc:
                self._generation = generation
                self._tables = msgpack.unpackb(body, strict_map_key=False)

    def _write(self) -> None:
        if self._fd is None:
            return
        body = msgpack.packb(self._tables)
        self._generation += 1
        at = self._generation % 2 * _HALF
        os.pwrite(self._fd, body, at + _HEADER.size)
        os.pwrite(self._fd, _HEADER.pack(_MAGIC, self._generation, len(body), _crc(self._generation, body)), at)

    def table(self, name: str) -> dict[Any, dict[str, Any]]:
        with self._lock:
            return dict(self._tables.get(name, {}))

    def put(self, table: str, key: Any, note: dict[str, Any]) -> None:
        with self._lock:
            self._tables.setdefault(table, {})[key] = note
            self._write()

    def drop(self, table: str, key: Any) -> None:
        with self._lock:
            if self._tables.get(table, {}).pop(key, None) is not None:
                self._write()
