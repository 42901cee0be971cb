# SPDX-License-Identifier: Apache-2.0
"""What kind of program a file is: whether a library can be preloaded into it."""

from __future__ import annotations

import os
import stat
import struct
from contextlib import suppress

_SCRIPTS_MAX = 5  # as the kernel: a script's interpreter may be a script
_HEADER = 64
_PT_INTERP, _PT_DYNAMIC = 3, 2
_ET_EXEC, _ET_DYN = 2, 3
_CLASS_64, _LITTLE = 2, 1


def why_not_preloaded(path: str, library: str) -> str | None:
    """Why `library` will not be loaded into the program in `path`, in words that follow "it"; None: it will be.
    OSError if the file can't be read."""
    for _ in range(_SCRIPTS_MAX):
        reason = _privileged(path)
        if reason:
            return reason
        with open(path, "rb") as file:
            head = file.read(256)
            if head[:4] == b"\x7fELF":
                return _elf(file.fileno(), head, library)
        if head[:2] != b"#!":
            return None  # /bin/sh runs it, or nobody
        words = head[2:].split(b"\n")[0].split()
        if not words:
            return None
        path = os.fsdecode(words[0])
    return None


def _privileged(path: str) -> str | None:
    """The loader preloads nothing for a program that gets more rights than its user has."""
    info = os.stat(path)
    if info.st_mode & stat.S_ISUID and info.st_uid != os.geteuid():
        return "runs with its owner's rights (setuid)"
    if info.st_mode & stat.S_ISGID and info.st_mode & stat.S_IXGRP and info.st_gid not in (os.getegid(),):
        return "runs with its group's rights (setgid)"
    if os.geteuid() != 0:
        with suppress(OSError):
            if os.getxattr(path, "security.capability"):
                return "has capabilities of its own"
    return None


def _elf(fd: int, head: bytes, library: str) -> str | None:
    with open(library, "rb") as file:
        ours = file.read(20)
    # class and byte order, machine
    if head[4:6] != ours[4:6] or head[18:20] != ours[18:20]:
        return "is for another kind of machine"
    if head[4] != _CLASS_64 or head[5] != _LITTLE or len(head) < _HEADER:
        return None
    offset, = struct.unpack_from("<Q", head, 32)
    size, count = struct.unpack_from("<HH", head, 54)
    if size < 56 or count > 4096:
        return None
    headers = os.pread(fd, size * count, offset)
    kinds = {struct.unpack_from("<I", headers, at)[0] for at in range(0, len(headers) - 3, size)}
    return None if _PT_INTERP in kinds else "is linked statically"
