# SPDX-License-Identifier: Apache-2.0
"""Requests through shared memory: what the control plane does (docs/protocol.md) without a socket in between, and the
fences of those that nobody waits for."""

from __future__ import annotations

import errno
import itertools
import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from gmem._client import ffi, lib
from gmem._errors import ConnectionLost, GmemError, from_errno
from gmem._fence import Fence

_ADVICE = {
    "discard": 4, "prefetch": 0x1000, "pinned": 0x1001, "unpinned": 0x1002, "read_mostly": 0x1010,
    "no_read_mostly": 0x1011, "preferred": 0x1012, "cold": 0x1013,
}  # fmt: skip
_FORK = {"share": 0, "none": lib.GMEM_RING_NO_INHERIT}
_FIELDS = {
    "mmap": {"bytes", "page_bytes", "fork", "small", "above"}, "mmap_commit": {"va"}, "munmap": {"va", "bytes"},
    "munmap_keep": {"va", "bytes"},
    "prefetch": {"hnid", "va", "bytes"}, "discard": {"va", "bytes"}, "advise": {"hnid", "va", "bytes", "advice"},
    "hmemcpy": {"hnid", "dst", "src", "bytes"}, "acquire": {"context", "ranges", "write"},
    "release": {"context", "holds"},
}  # fmt: skip
_LOOK_NS = 100_000_000  # how often a waiting thread handles signals
_IDLE_NS = 1_000_000_000
_WORDS_BYTES = 256


class NotHere(Exception):
    """The ring does not do this; the control plane does, or knows what is wrong with it."""


def _one(pairs: list[tuple[int, int]]) -> tuple[int, int]:
    if len(pairs) != 1:
        raise NotHere  # several are held together or not at all
    return pairs[0][0], pairs[0][1]


def _entry(op: str, args: Mapping[str, Any], stream: int = 0) -> Any:
    """The submission queue entry of a request of the control plane."""
    if args.keys() != _FIELDS.get(op):
        raise NotHere
    try:
        if op == "mmap":
            flags = _FORK[args["fork"]] | (lib.GMEM_RING_SMALL if args["small"] else 0)
            flags |= lib.GMEM_RING_KEEP
            fields = (lib.GMEM_RING_MMAP, flags, 0, args["above"], args["bytes"], args["page_bytes"])
        elif op == "mmap_commit":
            fields = (lib.GMEM_RING_MMAP_COMMIT, 0, 0, args["va"], 0, 0)
        elif op == "munmap":
            fields = (lib.GMEM_RING_MUNMAP, 0, 0, args["va"], args["bytes"], 0)
        elif op == "munmap_keep":
            fields = (lib.GMEM_RING_MUNMAP, lib.GMEM_RING_KEEP, 0, args["va"], args["bytes"], 0)
        elif op == "prefetch":
            fields = (lib.GMEM_RING_PREFETCH, 0, args["hnid"], args["va"], args["bytes"], 0)
        elif op == "discard":
            fields = (lib.GMEM_RING_DISCARD, 0, 0, args["va"], args["bytes"], 0)
        elif op == "advise":
            fields = (lib.GMEM_RING_ADVISE, 0, args["hnid"], args["va"], args["bytes"], _ADVICE[args["advice"]])
        elif op == "hmemcpy":
            fields = (lib.GMEM_RING_HMEMCPY, 0, args["hnid"], args["dst"], args["bytes"], args["src"])
        elif op == "acquire":
            flags = lib.GMEM_RING_WRITE if args["write"] else 0
            fields = (lib.GMEM_RING_ACQUIRE, flags, 0, *_one(args["ranges"]), args["context"])
        else:
            fields = (lib.GMEM_RING_RELEASE, 0, 0, 0, 0, args["context"])
        number, flags, hnid, va, size, arg = fields
        hold, index = _one(args["holds"]) if op == "release" else (0, 0)
        return ffi.new("struct gmem_ring_sqe *", (0, number, flags, stream, hnid, va, size, arg, hold, index))
    except (KeyError, TypeError, OverflowError):
        raise NotHere from None


def _reply(sqe_op: int, cqe: Any) -> dict[str, Any]:
    values = cqe.values
    if sqe_op == lib.GMEM_RING_ACQUIRE:
        return {"hold": values[lib.GMEM_RING_HOLD]}
    if sqe_op != lib.GMEM_RING_MMAP:
        return {}
    return {
        "va": values[lib.GMEM_RING_VA], "bytes": values[lib.GMEM_RING_LENGTH], "offset": values[lib.GMEM_RING_OFFSET],
        "page_bytes": values[lib.GMEM_RING_PAGE_BYTES], "huge": bool(values[lib.GMEM_RING_HUGE]),
        "kept": bool(values[lib.GMEM_RING_KEPT]),
    }  # fmt: skip


def _error(op: int, cqe: Any) -> GmemError:
    text = ffi.new("char[]", _WORDS_BYTES)
    lib.gmem_ring_words(op, ffi.addressof(cqe), text, _WORDS_BYTES)
    name = lib.gmem_ring_argument(cqe.blame)
    argument = ffi.string(name).decode() if name else None
    return from_errno(-cqe.result, ffi.string(text).decode(errors="replace"), argument)


def _lost(err: int) -> GmemError:
    if err == -errno.ECANCELED:
        return ConnectionLost("the session is closed", errno=errno.ECANCELED)
    if err == -errno.ENOMEM:
        return from_errno(errno.ENOMEM, "out of memory")
    return ConnectionLost("gmemd is gone", errno=-err)


class Ring:
    """The ring of one session, if it has one. Calls release the interpreter lock."""

    def __init__(self, link: Any) -> None:
        self._link = link
        self._tags = itertools.count(1)
        self._reset()

    def _reset(self) -> None:
        """Fences and thread are one process's."""
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._fences: dict[int, Fence] = {}
        self._thread: threading.Thread | None = None
        self._stopping = False

    def call(self, op: str, args: Mapping[str, Any]) -> dict[str, Any]:
        """The reply's fields; raises the GmemError of a failure, and NotHere if the control plane is to be asked."""
        if not lib.gmem_link_has_ring(self._link):
            raise NotHere
        sqe = _entry(op, args)
        cqe = ffi.new("struct gmem_ring_cqe *")
        pending = ffi.new("struct gmem_call **")
        err = lib.gmem_link_call(self._link, sqe, _LOOK_NS, cqe, pending)
        if err == -errno.ETIMEDOUT:
            try:
                while err == -errno.ETIMEDOUT:  # between two of them, Python handles its signals
                    err = lib.gmem_call_wait(pending[0], _LOOK_NS, cqe)
            finally:
                lib.gmem_call_put(pending[0])
        if err:
            raise _lost(err)
        if cqe.result:
            raise _error(sqe.op, cqe[0])
        return _reply(sqe.op, cqe)

    # ---- fences ----

    def start(self, op: str, args: Mapping[str, Any], stream: int, keep: Any) -> Fence:
        """Queues a request. keep lives until it is complete."""
        if not lib.gmem_link_has_ring(self._link):
            raise NotHere
        sqe = _entry(op, args, stream)
        fence = Fence(keep)
        if self._pid != os.getpid():
            self._reset()
        tag = next(self._tags)
        with self._changed:
            self._fences[tag] = fence
            if self._thread is None:
                self._thread = threading.Thread(target=self._complete, name="gmem-ring", daemon=True)
                self._thread.start()
            self._changed.notify()
        err = lib.gmem_link_start(self._link, sqe, tag)
        if err:
            with self._changed:
                self._fences.pop(tag, None)
            raise _lost(err)
        return fence

    def _complete(self) -> None:
        """The thread that completes fences."""
        done = ffi.new("struct gmem_done *")
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._fences or self._stopping)
                if not self._fences:
                    return
            if not lib.gmem_link_next_done(self._link, _IDLE_NS, done):
                self._finish(done)
            elif self._stopping:
                return

    def _finish(self, done: Any) -> None:
        with self._changed:
            fence = self._fences.pop(done.tag, None)
        if fence is None:
            return
        if done.err:
            fence._fail(_lost(done.err))
        elif done.cqe.result:
            fence._fail(_error(done.op, done.cqe))
        else:
            fence._complete(None)

    def close(self) -> None:
        """Fails what is under way; the link is not used afterwards."""
        if self._pid != os.getpid() or self._thread is None:
            return
        self._stopping = True
        lib.gmem_link_cancel(self._link)
        with self._changed:
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            with suppress(RuntimeError):  # at the interpreter's end
                self._thread.join()
