# SPDX-License-Identifier: Apache-2.0
"""A session: this process's connection to one gmemd, and the default one that the module's functions use."""

from __future__ import annotations

import atexit
import errno
import os
import select
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from collections.abc import Mapping as MappingABC
from contextlib import suppress
from typing import Any

import numpy as np

from gmem._client import ffi, lib
from gmem._embedded import Embedded
from gmem._errors import ConnectionLost, GmemError, InvalidArgument, NotFound, from_errno
from gmem._fence import Fence
from gmem._mapping import Mapping
from gmem._requests import Requests
from gmem._ring import NotHere, Ring

SYSTEM_SOCKET = "/run/gmem/gmemd.sock"
_BUSY_RANGES = 64
_FAR_SHIFT = 18


class Session:
    """Made by connect(). Memory that was allocated in it ends with it."""

    def __init__(self, path: str, embedded: Embedded | None = None) -> None:
        self.path = path
        self.embedded = embedded
        self.closed = False
        link = ffi.new("struct gmem_link **")
        message = ffi.new("char[]", lib.GMEM_WIRE_MESSAGE_BYTES)
        err = lib.gmem_link_open(os.fsencode(path), link, message)
        if err:
            raise from_errno(-err, f"{path}: {ffi.string(message).decode(errors='replace') or os.strerror(-err)}")
        self._link = link[0]
        self._requests = Requests(self._control, self._token, self._daemon_gone)
        self._ring = Ring(self._link)
        # An address that munmap(2) has freed can be given out again before gmemd hears of the munmap: until then no
        # other thread may map. Reentrant, because a finaliser may unmap while its thread maps.
        self._layout = threading.RLock()
        _sessions.add(self)
        self.mappings: weakref.WeakValueDictionary[int, Mapping] = weakref.WeakValueDictionary()
        self.contexts: weakref.WeakSet[Any] = weakref.WeakSet()
        # A context that is being opened, and a pool that is: the one is to know of the other.
        self.sharing = threading.RLock()
        self.window = (lib.gmem_link_window_base(self._link), lib.gmem_link_window_bytes(self._link))
        self.adopted: dict[int, int] = {}  # address: length
        self.changed_files: dict[int, int] = {}  # the same, of what is to be written back to files

    # ---- the link ----

    def _control(self) -> str:
        return ffi.string(lib.gmem_link_control(self._link)).decode()

    def _token(self) -> bytes:
        return bytes(ffi.buffer(lib.gmem_link_token(self._link), lib.GMEM_WIRE_TOKEN_BYTES))

    def _daemon_gone(self) -> bool:
        fd = lib.gmem_link_socket(self._link)
        if fd < 0:
            return True
        poll = select.poll()
        poll.register(fd, select.POLLRDHUP)
        return bool(poll.poll(0))

    @property
    def id(self) -> int:
        return lib.gmem_link_session(self._link)

    @property
    def token(self) -> bytes:
        return self._token()

    @property
    def user_mode_only(self) -> bool:
        """System calls on untouched managed memory fail with EFAULT (no /dev/userfaultfd)."""
        return not lib.gmem_link_flags(self._link) & lib.GMEM_WIRE_HAS_UFFD_DEV

    @property
    def fork_events(self) -> bool:
        return bool(lib.gmem_link_flags(self._link) & lib.GMEM_WIRE_EVENT_FORK)

    def request(self, op: str, **args: Any) -> dict[str, Any]:
        """One request to gmemd, as docs/protocol.md has them; through the ring what can go there."""
        self._check()
        try:
            return self._ring.call(op, args)
        except NotHere:
            return self._requests.call(op, **args)

    def start(self, op: str, stream: int, keep: Any, **args: Any) -> Fence:
        """A request that is not waited for. Those of one stream are done in order."""
        if not isinstance(stream, int) or isinstance(stream, bool) or not 0 <= stream <= lib.GMEM_STREAM_MAX:
            text = f"stream: {stream!r} is not a number of 0 to {lib.GMEM_STREAM_MAX}"
            raise InvalidArgument(text, argument="stream")
        self._check()
        try:
            return self._ring.start(op, args, stream, keep)
        except NotHere:
            pass
        fence = Fence(keep)  # without a ring the work is done before this returns: in order as well
        try:
            self._requests.call(op, **args)
            fence._complete(None)
        except GmemError as error:
            fence._fail(error)
        return fence

    def _check(self) -> None:
        if self.closed:
            raise ConnectionLost("the session is closed")
        status = lib.gmem_link_status(self._link)
        if status:
            why = ffi.string(lib.gmem_link_message(self._link)).decode(errors="replace")
            raise ConnectionLost(f"this forked process could not join gmemd: {why}", errno=-status)

    # ---- regions ----

    def map(self, nbytes: int, page_bytes: int, fork: str, small: bool = False) -> tuple[int, int]:
        """Address and size of a fresh region. Ranges that are in use in this process are skipped."""
        with self._layout:
            return self._map(nbytes, page_bytes, fork, small)

    def map_file(self, fd: int, offset: int, nbytes: int, page_bytes: int, mode: str, fork: str) -> tuple[int, int]:
        """Address and size of a region over a range of a file. The descriptor stays the caller's."""
        self._check()
        flags = {"r": 0, "c": lib.GMEM_WIRE_FILE_PRIVATE}.get(mode, lib.GMEM_WIRE_FILE_WRITE)
        flags |= lib.GMEM_WIRE_FILE_NO_INHERIT if fork == "none" else 0

        def reserve(_: int) -> dict[str, Any]:
            region, message = ffi.new("struct gmem_wire_region *"), ffi.new("char[]", lib.GMEM_WIRE_MESSAGE_BYTES)
            err = lib.gmem_link_give_file(self._link, fd, offset, nbytes, page_bytes, flags, region, message)
            _refuse(err, message)
            return {"va": region.va, "bytes": region.bytes, "offset": region.offset, "huge": False}

        with self._layout:
            return self._map_reserved(reserve, fork, hold=True)

    def _map(self, nbytes: int, page_bytes: int, fork: str, small: bool) -> tuple[int, int]:
        return self._map_reserved(
            lambda above: self.request(
                "mmap", bytes=nbytes, page_bytes=page_bytes, fork=fork, small=small, above=above
            ), fork, hold=False,
        )  # fmt: skip

    def _map_reserved(self, reserve: Callable[[int], dict[str, Any]], fork: str, hold: bool) -> tuple[int, int]:
        """A range that is in use in this process is given back, and the next one is sought twice as far away: what is
        there, another gmemd's with the same window, can be large. hold: reserve() seeks nowhere in particular, so that
        what was refused is given back only afterwards."""
        refused: list[tuple[int, int]] = []
        above = tries = 0
        try:
            while True:
                region = reserve(above)
                va, size = region["va"], region["bytes"]
                kept = region.get("kept", False)  # mapped already, and committed
                if kept:
                    err = lib.gmem_link_reuse(self._link, va, size)
                else:
                    err = lib.gmem_link_map(self._link, va, size, region["offset"], region["huge"], fork == "share")
                if not err:
                    break
                refused.append((va, size))
                if not hold:
                    self.request("munmap", va=va, bytes=size)
                    refused.clear()
                if err != -errno.EEXIST or tries == _BUSY_RANGES:
                    raise from_errno(-err, f"mmap of {size} bytes at 0x{va:x}: {os.strerror(-err)}")
                above = va + (size << min(tries, _FAR_SHIFT))
                tries += 1
        finally:
            for start, length in refused:  # only now, so that they were not offered again
                self.request("munmap", va=start, bytes=length)
        if kept:
            return va, size
        try:
            self.request("mmap_commit", va=va)
        except GmemError:
            self.unmap(va, size)
            raise
        return va, size

    def map_pool(self, va: int, fork: str = "share") -> None:
        """Maps and commits what pool_create or pool_open has reserved. FileExistsError: the range is in use here."""
        with self._layout:
            err = lib.gmem_link_map_file(self._link, va, fork == "share")
            if err == -errno.EEXIST:
                raise FileExistsError(errno.EEXIST, f"0x{va:x} is in use in this process")
            if err:
                raise from_errno(-err, f"mapping a pool at 0x{va:x}: {os.strerror(-err)}")
            self.request("mmap_commit", va=va)

    def unmap(self, va: int, nbytes: int) -> None:
        """munmap, and then waits until gmemd has let go of the memory."""
        if self.closed or self._daemon_gone():
            return  # munmap(2) would wait for a gmemd that is not there to read its event
        with self._layout:
            if self._keep(va, nbytes):
                return
            err = lib.gmem_link_unmap(self._link, va, nbytes)
            if err:
                raise from_errno(-err, f"munmap of 0x{va:x}: {os.strerror(-err)}")
            with suppress(ConnectionLost):
                self.request("munmap", va=va, bytes=nbytes)

    def _keep(self, va: int, nbytes: int) -> bool:
        """Lets gmemd have the memory, and the addresses stay mapped for the next region of this size."""
        if not lib.gmem_link_may_keep(self._link, va, nbytes):
            return False
        try:
            self._ring.call("munmap_keep", {"va": va, "bytes": nbytes})
        except (NotHere, GmemError):
            return False
        lib.gmem_link_kept(self._link, va, nbytes)
        return True

    def owner_of(self, address: int) -> Mapping | None:
        """The mapping object that keeps this address alive."""
        for start, mapping in list(self.mappings.items()):
            if start <= address < start + mapping.nbytes:
                return mapping
        return None

    def owns(self, address: int) -> bool:
        return any(base <= address < base + size for base, size in self.ranges())

    def ranges(self) -> list[tuple[int, int]]:
        """Where unified memory may be: the window, and what was adopted."""
        return [self.window, *list(self.adopted.items())]

    def adopt(self, va: int, nbytes: int, page_bytes: int, edges: bool) -> tuple[int, int]:
        """Brings whole pages of a range under management; where, and how many bytes."""
        self._check()
        adoption, message = ffi.new("struct gmem_adoption *"), ffi.new("char[]", lib.GMEM_WIRE_MESSAGE_BYTES)
        with _adopting, self._layout:
            _refuse(lib.gmem_link_adopt_begin(self._link, va, nbytes, page_bytes, edges, adoption, message), message)
            mapped: list[Any] = []
            try:
                for context in self.process_contexts() if adoption.bytes else ():
                    context.map_adopted(adoption.va, adoption.bytes, adoption.offset)
                    mapped.append(context)
            except BaseException:
                lib.gmem_link_adopt_cancel(self._link, adoption)
                for context in mapped:
                    context.unmap_adopted(adoption.va, adoption.bytes)
                raise
            _refuse(lib.gmem_link_adopt_finish(self._link, adoption, message), message)
        return adoption.va, adoption.bytes

    def stays(self, va: int, nbytes: int) -> None:
        """Adopted memory that nobody unmaps or moves before disown(): its idle pages can be told from used ones."""
        lib.gmem_link_stays(self._link, va, nbytes)

    def disown(self, va: int, nbytes: int = 0, low: int = 0, high: int = 0) -> None:
        """Forgets what was adopted at va. nbytes: it is ordinary memory again; [low, high): without its content."""
        with _ending:
            if self.adopted.pop(va, None) is not None and nbytes and not self.closed:
                lib.gmem_link_disown(self._link, va, nbytes, low, high)

    def process_contexts(self) -> list[Any]:
        """Contexts that are processes of their own, and have to hear of what is mapped beside the window."""
        return [context for context in self.contexts if not context.device.in_process]

    # ---- devices ----

    def devices(self) -> list[dict[str, Any]]:
        return self.request("devices")["devices"]

    def device_info(self, device: str | int) -> dict[str, Any]:
        for info in self.devices():
            if device in (info["name"], info["hnid"]):
                return info
        raise NotFound(f"device: no device {device!r} is attached", errno=errno.ENODEV, argument="device")

    def hnid(self, device: Any) -> int:
        """hnid of a device given by name, hnid or Device; "host" is 0."""
        device = getattr(device, "hnid", device)
        if isinstance(device, (int, np.integer)) and not isinstance(device, bool):
            return int(device)
        if device == "host":
            return 0
        if not isinstance(device, str):
            raise InvalidArgument(f"device: {device!r} is neither a name nor an hnid", argument="device")
        return self.device_info(device)["hnid"]

    def attach(self, driver: str, name: str, **config: Any) -> int:
        """Attaches a device (needs the daemon's own uid or root); its hnid."""
        text = {key: str(value) for key, value in config.items()}
        return self.request("attach", driver=driver, name=name, config=text)["hnid"]

    def detach(self, name: str, force: bool = False) -> None:
        self.request("detach", name=name, force=force)

    def stats(self) -> dict[str, Any]:
        reply = self.request("stats")
        return {**reply["stats"], "hnodes": reply["hnodes"]}

    # ---- end ----

    def close(self) -> None:
        """Ends contexts and the session. Arrays in it must not be touched afterwards."""
        if self.closed:
            return
        for context in list(self.contexts):
            context.close()
        for va in list(self.changed_files):
            self.write_back(va)
        with _adopting, _ending:
            lib.gmem_link_give_back(self._link)
            self.adopted.clear()
            self.closed = True
        self._requests.close()
        self._ring.close()
        lib.gmem_link_close(self._link)
        if self.embedded:
            self.embedded.close()

    def write_back(self, va: int) -> None:
        """Of a file's region that is about to go; there is nobody to tell of an error but everybody."""
        nbytes = self.changed_files.pop(va, None)
        if nbytes is None:
            return
        try:
            self.request("flush", va=va, bytes=nbytes)
        except GmemError as error:
            warnings.warn(f"what was changed at 0x{va:x} is not in its file: {error}", stacklevel=2)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


lib.gmem_cuda_enable()
_lock = threading.RLock()
_adopting = threading.RLock()  # held over a fork: a child must not get half of what is adopted
_ending = threading.RLock()  # taken by finalizers, so nothing is waited for while it is held
_default: Session | None = None
_sessions: weakref.WeakSet[Session] = weakref.WeakSet()


def owner_of(address: int) -> Mapping | None:
    """The mapping object that keeps this address alive, in whichever session: no two open ones map the same address."""
    for session in list(_sessions):
        mapping = session.owner_of(address) if not session.closed and session.owns(address) else None
        if mapping is not None:
            return mapping
    return None


def _refuse(err: int, message: Any) -> None:
    if err:
        text = ffi.string(message).decode(errors="replace")
        name = text.split(":")[0]
        raise from_errno(-err, text, name if name in ("va", "bytes", "page_bytes", "offset", "fd") else None)


def _in_child() -> None:
    """Locks may have been held by threads that a forked child does not have."""
    global _lock, _adopting, _ending
    _lock = threading.RLock()
    _ending = threading.RLock()
    _adopting = threading.RLock()
    for session in _sessions:
        session._layout = threading.RLock()
        session.sharing = threading.RLock()


os.register_at_fork(before=lambda: _adopting.acquire(), after_in_parent=lambda: _adopting.release(),
                    after_in_child=_in_child)  # fmt: skip


def _device_specs(devices: Sequence[str | MappingABC[str, Any]]) -> list[str]:
    if isinstance(devices, str):
        raise InvalidArgument(f"devices: a list of them, such as [{devices!r}]", argument="devices")
    specs = []
    for device in devices:
        if isinstance(device, str):
            specs.append(device)
        else:
            specs.append(",".join(f"{key}={value}" for key, value in device.items()))
    return specs


def connect(
    path: str | os.PathLike[str] | None = None,
    *,
    devices: Sequence[str | MappingABC[str, Any]] = (),
    settings: Sequence[str] = (),
    config: str | os.PathLike[str] | None = None,
    embedded: bool | None = None,
) -> Session:
    """Connects to gmemd and makes the session the default one.

    path: gmemd.sock of a running daemon. Without it: $GMEM_SOCKET, the system service, else a private gmemd that
    belongs to this process tree (embedded=True: always that one; False: never). devices ("simgpu0:capacity=48M"),
    settings ("daemon.event_fork=false") and config (a TOML file) are for the private one.
    """
    global _default
    socket = os.fspath(path) if path is not None else os.environ.get("GMEM_SOCKET")
    wants_own = bool(devices or settings or config)
    if wants_own and (path is not None or embedded is False):
        raise InvalidArgument("devices: only a private gmemd takes devices, settings and config", argument="devices")
    with _lock:
        if embedded is not True and not wants_own:
            session = _connect_running(socket, must=socket is not None or embedded is False)
            if session:
                _default = session
                return session
        private = Embedded(_device_specs(devices), settings, os.fspath(config) if config is not None else None)
        try:
            _default = Session(private.socket, private)
        except BaseException:
            private.close()
            raise
        return _default


def _connect_running(socket: str | None, must: bool) -> Session | None:
    target = socket or SYSTEM_SOCKET
    try:
        return Session(target)
    except GmemError as error:
        if must or error.errno not in (errno.ENOENT, errno.ECONNREFUSED, errno.EACCES):
            raise
        return None


def default() -> Session:
    """The default session, connected on first use."""
    with _lock:
        if _default is None or _default.closed:
            return connect()
        return _default


@atexit.register
def _end_contexts() -> None:
    """Device processes would notice that we are gone, but a moment later."""
    if _default is not None and not _default.closed:
        for context in list(_default.contexts):
            if context.device.in_process:
                continue  # it ends with us
            with suppress(Exception):
                context.close()
