# SPDX-License-Identifier: Apache-2.0
"""Devices, and contexts: processes in which kernels run on the same addresses, from the device's memory."""

from __future__ import annotations

import errno
import itertools
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np

from gmem._cuda import CudaContext
from gmem._errors import (
    Busy,
    ContextLost,
    GmemError,
    InvalidArgument,
    KernelError,
    KernelTimeout,
    NotSupported,
    OutOfMemory,
    RemoteTraceback,
    from_errno,
)  # fmt: skip
from gmem._fence import Fence
from gmem._launch import NotWhole, as_kernel, dumps, loads, set_owner_lookup
from gmem._memory import managed_extent
from gmem._session import Session, default, owner_of

_START_S = 60.0
_HELD_TRIES = 200
_TIMEOUT_MAX_S = 1e6  # longer than anybody waits, and still a number for setitimer(2) and poll(2)

set_owner_lookup(owner_of)


class Device:
    """An attached device. Attributes as gmemctl devices prints them; info() asks again."""

    def __init__(self, session: Session, info: dict[str, Any]) -> None:
        self._session = session
        self.name: str = info["name"]
        self.hnid: int = info["hnid"]
        self.driver: str = info["driver"]
        self.caps: tuple[str, ...] = tuple(info["caps"])
        self.capacity_bytes: int = info["capacity_bytes"]

    def info(self) -> dict[str, Any]:
        return self._session.device_info(self.name)

    @property
    def in_process(self) -> bool:
        """Its contexts are this process's own (an NVIDIA GPU), not processes beside it."""
        return "own_frames" in self.caps

    def context(self) -> Any:
        """Opens a context: a process of this user's, with a page table of its own on the device; or, on an NVIDIA GPU,
        this process's primary context (CudaContext)."""
        return CudaContext(self._session, self) if self.in_process else Context(self._session, self)

    def __repr__(self) -> str:
        return f"<gmem.Device {self.name} (hnid {self.hnid}, {self.driver}, {self.capacity_bytes} bytes)>"


class _Launch:
    def __init__(self, fence: Fence, timeout: float | None) -> None:
        self.fence = fence
        self.timeout = timeout
        self.deadline: float | None = None


class Context:
    """Kernels run in it one after the other, in the order of their launches. Usable from several threads."""

    def __init__(self, session: Session, device: Device) -> None:
        self._session = session
        self.device = device
        self.pid = os.getpid()
        # Held over the send of a launch, which may wait until the process reads. The reader thread must not need it:
        # the process may be waiting for the reader.
        self._sending = threading.Lock()
        self._lock = threading.Lock()
        self._pending: OrderedDict[int, _Launch] = OrderedDict()
        self._numbers = itertools.count(1)
        self._held: dict[tuple[int, int], list[list[int]]] = {}  # by acquire(): range and names
        self._ended: GmemError | None = None
        self._idle = threading.Condition(self._lock)
        with session.sharing:  # pools that are opened from here on are mapped in it, too
            self._start()
            session.contexts.add(self)
        self.context_id = self._find_id()
        self._brackets = "REPLAYABLE" not in {cap.upper() for cap in device.caps}
        self._reader = threading.Thread(target=self._read, name=f"gmem-{device.name}", daemon=True)
        self._reader.start()

    # ---- the process ----

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "gmem._context", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),), start_new_session=True, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        self._channel = Connection(ours.detach())
        self._pidfd = os.pidfd_open(self._process.pid)
        # The token goes over the pipe: a command line can be read by everyone.
        self._channel.send({
            "path": self._session.path, "token": self._session.token, "device": self.device.name,
            "sys_path": sys.path, "parent": os.getpid(), "adopted": list(self._session.adopted.items()),
        })  # fmt: skip
        try:
            if not self._channel.poll(_START_S):
                raise ContextLost(f"the context on {self.device.name} was not ready within {_START_S:.0f} s")
            answer = self._channel.recv()
        except (EOFError, OSError):
            answer = None
        except GmemError:
            self._kill()
            raise
        if answer is None or answer[0] != "ready":
            self._kill()
            if answer is None:
                raise ContextLost(f"the process of a context on {self.device.name} ended while it started")
            raise from_errno(answer[1], f"context on {self.device.name}: {answer[2]}")

    def _find_id(self) -> int:
        for context in self._session.request("contexts")["contexts"]:
            if context["pid"] == self._process.pid:
                return context["context"]
        self._kill()
        raise ContextLost("gmemd has lost the context already")

    def _kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._channel.close()
        os.close(self._pidfd)

    @property
    def process_id(self) -> int:
        return self._process.pid

    # ---- launching ----

    def launch(self, fn: Any, *args: Any, timeout: float | None = None, **keywords: Any) -> Fence:
        """Runs fn(*args, **keywords) in the device process; returns at once.

        fn: a callable (by module path if it can be imported, else by value) or a C function: gmem.cfunc(...), or
        (path, symbol). Arrays in unified memory are passed by address; everything else is copied. timeout: seconds the
        kernel may run; then the context is ended and the fence raises KernelTimeout.
        """
        self._check_owner()
        timeout = _checked_timeout(timeout)
        try:
            kernel = as_kernel(fn)
        except TypeError as error:
            raise InvalidArgument(str(error), argument="fn") from None
        try:
            body, arrays = dumps((kernel, args, keywords), self._session.ranges())
        except NotWhole as error:
            raise InvalidArgument(str(error), argument="args") from None
        held = self._hold(arrays) if self._brackets else None
        return self._send(body, Fence((args, keywords)), held, timeout)

    def _send(self, body: Any, fence: Fence, held: dict[str, Any] | None = None, timeout: float | None = None) -> Fence:
        with self._sending:
            with self._lock:
                self._check_usable()
                number = next(self._numbers)
                self._pending[number] = _Launch(fence, timeout)
            try:
                self._channel.send((number, body, held, timeout))
            except OSError:
                pass  # the reader sees the end, and fails the fence
        return fence

    def map_pool(self, address: int, nbytes: int) -> None:
        """Before whatever is launched from now on; nbytes 0: maps the pool there, else what was there before."""
        if self.pid != os.getpid():
            return
        with suppress(OSError, ValueError), self._sending:  # else it has ended
            self._channel.send((0, address, nbytes, None))

    def map_adopted(self, va: int, nbytes: int, offset: int) -> None:
        """Maps what is about to be adopted in the context's process, at its address; waits for the kernels that run."""
        if self.pid != os.getpid():
            return
        try:
            err = self._send(("map", va, nbytes, offset), Fence(None)).wait()
        except (ContextLost, KernelTimeout):
            return  # it has none of it
        if err:
            text = f"va: [0x{va:x}, 0x{va + nbytes:x}) is in use in the context on {self.device.name}"
            raise from_errno(-err, f"{text}: {os.strerror(-err)}", "va")
        self._session.request("context_overlay", context=self.context_id, va=va, bytes=nbytes)

    def unmap_adopted(self, va: int, nbytes: int) -> None:
        if self.pid == os.getpid():
            with suppress(ContextLost, KernelTimeout):
                self._send(("unmap", va, nbytes, 0), Fence(None)).wait()

    def _check_owner(self) -> None:
        """Not under a lock: in a forked child it may be held for ever."""
        if self.pid != os.getpid():
            raise ContextLost("the context belongs to the parent process; open one of your own", errno=errno.ECANCELED)

    def _check_usable(self) -> None:
        if self._ended is not None:
            raise type(self._ended)(*self._ended.args, errno=self._ended.errno)

    def synchronize(self) -> None:
        """Waits until everything launched so far is complete. Errors stay with their fences."""
        self._check_owner()
        with self._lock:
            last = list(self._pending)
            self._idle.wait_for(lambda: not any(number in self._pending for number in last))

    # ---- devices that can't replay a fault: what a kernel touches is held on the device while it runs ----

    def _hold(self, arrays: list[np.ndarray[Any, Any]]) -> dict[str, Any] | None:
        """Acquires what a kernel gets; the release request, which the device process makes when the kernel is done."""
        held: list[list[int]] = []
        try:
            for write in (True, False):
                ranges = [managed_extent(array, self._session) for array in arrays if array.flags.writeable is write]
                if ranges:
                    held += self._acquire(ranges, write)
        except BaseException:
            for hold in held:
                self._session.request("release", context=self.context_id, holds=[hold])
            raise
        return {"context": self.context_id, "holds": held} if held else None

    def acquire(self, ranges: list[tuple[int, int]], write: bool) -> None:
        """Migrates and maps ranges, and holds them on the device; waits for launches that hold what is in the way."""
        names = self._acquire(ranges, write)
        with self._lock:
            for r, name in zip(ranges, names, strict=True):
                self._held.setdefault((r[0], r[1]), []).append(name)

    def _acquire(self, ranges: list[tuple[int, int]], write: bool) -> list[list[int]]:
        """The names of the holds: one is released once, however often gmemd is killed and asked again."""
        wanted = [list(r) for r in ranges]
        attempt = 0
        while True:
            try:
                reply = self._session.request("acquire", context=self.context_id, ranges=wanted, write=write)
                return [[reply["hold"], index] for index in range(len(ranges))]
            except (OutOfMemory, Busy):
                with self._lock:
                    if not self._pending or attempt == _HELD_TRIES:
                        raise
                    self._idle.wait(1.0)  # until one of them is complete
                attempt += 1

    def release(self, ranges: list[tuple[int, int]]) -> None:
        for r in ranges:
            with self._lock:
                names = self._held.get((r[0], r[1]), [])
                name = names.pop() if names else None
                if not names:
                    self._held.pop((r[0], r[1]), None)
            what = {"holds": [name]} if name else {"ranges": [list(r)]}  # of which gmemd says that nobody holds it
            self._session.request("release", context=self.context_id, **what)

    # ---- answers ----

    def _wait_s(self) -> float | None:
        with self._lock:
            deadlines = [launch.deadline for launch in self._pending.values() if launch.deadline is not None]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _read(self) -> None:
        while True:
            try:
                # The process's end as well: what a kernel has forked may hold the channel open.
                ready = wait([self._channel, self._pidfd], self._wait_s())
                if self._channel not in ready:
                    self._end(timed_out=not ready)
                    return
                number, what, *rest = self._channel.recv()
            except (EOFError, OSError):
                self._end(timed_out=False)
                return
            if what == "started":
                with self._lock:
                    launch = self._pending.get(number)
                    if launch and launch.timeout is not None:
                        launch.deadline = time.monotonic() + launch.timeout
                continue
            self._finish(number, what, rest)

    def _finish(self, number: int, what: str, rest: list[Any]) -> None:
        with self._lock:
            launch = self._pending[number]
        try:
            if what == "done":
                launch.fence._complete(loads(rest[0]))
            else:
                launch.fence._fail(_exception(*rest))
        except Exception as error:  # a result that can't be read here
            launch.fence._fail(KernelError(f"the kernel's result can't be read: {error!r}"))
        with self._lock:
            del self._pending[number]
            self._idle.notify_all()

    def _end(self, timed_out: bool) -> None:
        """The process is gone, or has to go: every fence hears why."""
        with suppress(OSError):
            self._process.kill()
        status = self._process.wait()
        timed_out = timed_out or status == -signal.SIGALRM
        lost = ContextLost(_obituary(self.device.name, status))
        with self._lock:
            pending, self._pending = self._pending, OrderedDict()
            self._ended = self._ended or lost
        self._hang_up()
        for launch in pending.values():
            if timed_out and launch.deadline is not None:  # of all that wait, only the one that ran has a deadline
                launch.fence._fail(KernelTimeout(f"a kernel on {self.device.name} ran longer than its timeout"))
            else:
                launch.fence._fail(lost)
        with self._lock:
            self._idle.notify_all()
        with suppress(GmemError):
            self._session.request("context_close", context=self.context_id)

    def _hang_up(self) -> None:
        """A thread that sends just now gets an error first."""
        with socket.socket(fileno=os.dup(self._channel.fileno())) as ours, suppress(OSError):
            ours.shutdown(socket.SHUT_RDWR)
        with self._sending:
            self._channel.close()
        os.close(self._pidfd)

    def close(self) -> None:
        """Ends the process; kernels that have not finished raise ContextLost."""
        if self.pid != os.getpid():
            return
        with self._lock:
            self._ended = self._ended or ContextLost("the context is closed")
        with suppress(OSError):
            self._process.send_signal(signal.SIGKILL)
        if threading.current_thread() is not self._reader:
            self._reader.join()

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _checked_timeout(timeout: float | None) -> float | None:
    if timeout is None:
        return None
    if not isinstance(timeout, (int, float)) or isinstance(timeout, bool) or math.isnan(timeout) or timeout <= 0:
        raise InvalidArgument(f"timeout: {timeout!r} is not a time", argument="timeout")
    return float(timeout) if timeout < _TIMEOUT_MAX_S else None


def _exception(body: bytes | None, name: str, text: str, trace: str) -> BaseException:
    error: BaseException | None = None
    if body is not None:
        with suppress(Exception):
            error = loads(body)
    if not isinstance(error, Exception):  # SystemExit and the like are not raised into the client
        error = KernelError(f"{name}: {text}")
        error.remote_traceback = trace
    error.__cause__ = RemoteTraceback(trace)
    return error


def _obituary(device: str, status: int) -> str:
    if status >= 0:
        return f"the context on {device} ended with status {status}"
    name = signal.Signals(-status).name if -status in signal.valid_signals() else f"signal {-status}"
    why = {
        "SIGSEGV": ": a kernel touched memory that is not there",
        "SIGBUS": ": a kernel touched memory that it had not acquired, or that could not be had",
    }.get(name, "")
    return f"the context on {device} was killed by {name}{why}"


def device(name: str | int, session: Session | None = None) -> Device:
    """An attached device by name or hnid."""
    session = session if session is not None else default()
    info = session.device_info(name)
    if info["hnid"] == 0:
        raise NotSupported("device: the host is no device to open a context on", argument="device")
    return Device(session, info)


def devices(session: Session | None = None) -> list[Device]:
    session = session if session is not None else default()
    return [Device(session, info) for info in session.devices() if info["hnid"] != 0]
