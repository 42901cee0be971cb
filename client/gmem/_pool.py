# SPDX-License-Identifier: Apache-2.0
"""Pools: named memory that several processes share, at one address and with one state of each page."""

from __future__ import annotations

import math
import os
import weakref
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from gmem._errors import Busy, Exists, GmemError, InvalidArgument, PermissionDenied
from gmem._mapping import Mapping
from gmem._memory import Shape, _checked_dtype, _checked_shape, _freed, page_bytes_of
from gmem._session import Session, default

_BUSY_RANGES = 64


class Pool:
    """A pool by its name. Made by pool(); opened by open(), array() or publish()."""

    def __init__(self, session: Session, name: str, owner: int | None = None, remote: str | None = None) -> None:
        self.session = session
        self.name = name
        self.remote = remote
        self._owner = owner
        self._version: int | None = None
        self._mapping: Mapping | None = None
        self._published = False

    # ---- opening ----

    @property
    def is_open(self) -> bool:
        return self._mapping is not None and not self._mapping.closed

    def _memory(self) -> Mapping:
        if not self.is_open:
            self.open()
        assert self._mapping is not None
        return self._mapping

    def _create(self, nbytes: int, mode: int, page_bytes: int, small: bool, persistent: bool) -> None:
        refused: list[dict[str, Any]] = []
        try:
            while True:
                made = self.session.request(
                    "pool_create", name=self.name, bytes=nbytes, mode=mode, page_bytes=page_bytes, small=small,
                    persistent=persistent,
                )  # fmt: skip
                try:
                    self._map(made)
                    return
                except FileExistsError:  # that range is in use here: another one
                    self.session.request("pool_unlink", name=self.name)
                    refused.append(made)
                    if len(refused) == _BUSY_RANGES:
                        raise
                except BaseException:
                    self.session.request("pool_unlink", name=self.name)
                    refused.append(made)
                    raise
        finally:
            for other in refused:  # only now, so that they were not offered again
                self.session.request("munmap", va=other["va"], bytes=other["bytes"])

    def open(self, write: bool = False) -> Pool:
        """Maps it, to read only or to read and write; what is open already stays as it is. Returns itself."""
        if self.is_open:
            if write and self._mapping is not None and self._mapping.read_only:
                raise Busy(f"write: {self.name} is open to read only; close it first", argument="write")
            return self
        further: dict[str, Any] = {} if self._owner is None else {"uid": self._owner}
        if self.remote is not None:
            further["remote"] = self.remote
        with self.session.sharing:
            found = self.session.request("pool_open", name=self.name, write=write, **further)
            self._published = found["sealed"]
            self._version = found.get("version")
            if found["mapped"]:
                self._mapping = self.session.mappings.get(found["va"]) or self._adopt(found)
                return self
            try:
                self._map(found)
            except BaseException as error:
                with suppress(GmemError):
                    self.session.request("munmap", va=found["va"], bytes=found["bytes"])
                if isinstance(error, FileExistsError):
                    raise Exists(f"name: {self.name} lies at 0x{found['va']:x}, which is in use in this process",
                                 argument="name") from None  # fmt: skip
                raise
        return self

    def _map(self, region: dict[str, Any]) -> None:
        """In the contexts, which do it beside, and in this process."""
        with self.session.sharing:
            contexts = self.session.process_contexts()
            for context in contexts:
                context.map_pool(region["va"], 0)
            try:
                self.session.map_pool(region["va"])
            except BaseException:
                for context in contexts:
                    context.map_pool(region["va"], region["bytes"])
                raise
            self._mapping = self._adopt(region)

    def _adopt(self, region: dict[str, Any]) -> Mapping:
        """The mapping object of what is mapped: it goes with its last array."""
        mapping = Mapping(region["va"], region["bytes"], region["read_only"])
        finalizer = weakref.finalize(mapping, _free, self.session, region["va"], region["bytes"])
        finalizer.atexit = False
        self.session.mappings[region["va"]] = mapping
        _finalizers[mapping] = finalizer
        return mapping

    def close(self) -> None:
        """Unmaps it. BufferError while arrays over it exist."""
        mapping, self._mapping = self._mapping, None
        if mapping is None or mapping.closed:
            return
        try:
            mapping._close()
        except BufferError:
            self._mapping = mapping
            raise
        _finalizers[mapping]()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- what is in it ----

    @property
    def address(self) -> int:
        return self._memory().address

    @property
    def nbytes(self) -> int:
        return self._memory().nbytes

    @property
    def writable(self) -> bool:
        return not self._memory().read_only and not self._published

    @property
    def published(self) -> bool:
        """As far as this object has seen."""
        return self._published

    @property
    def version(self) -> int | None:
        """Which version of a pool on servers this is; the newest one has the highest number. None for other pools, and
        for one that has not been opened or published yet."""
        return self._version

    def array(
        self, dtype: npt.DTypeLike = np.uint8, shape: Shape | None = None, *, offset: int = 0
    ) -> np.ndarray[Any, Any]:
        """An ndarray over the pool from byte `offset` on; without a shape, one row of all that is left. It can be
        written to if the pool was opened for writing, and was not published when this was called."""
        memory, checked = self._memory(), _checked_dtype(dtype)
        if not isinstance(offset, (int, np.integer)) or not 0 <= offset <= memory.nbytes:
            raise InvalidArgument(f"offset: {offset!r} is not in the pool's {memory.nbytes} bytes", argument="offset")
        extents = ((memory.nbytes - offset) // checked.itemsize,) if shape is None else _checked_shape(shape)
        count = math.prod(extents)
        if count * checked.itemsize > memory.nbytes - offset:
            size, room = count * checked.itemsize, memory.nbytes - offset
            text = f"shape: {size} bytes do not fit into the {room} from offset on"
            raise InvalidArgument(text, argument="shape")
        result = np.frombuffer(memory, checked, count=count, offset=int(offset)).reshape(extents)
        if self._published:
            result.flags.writeable = False
        return result

    # ---- life ----

    def publish(self, array: npt.ArrayLike | None = None, *, mode: int = 0o600, remote: str | None = None) -> Pool:
        """Makes it immutable, for ever. Nobody can write to it afterwards, through arrays that are there already either
        (as to any read-only memory: SIGSEGV). With an array, first puts that there: in a new pool of its size if there
        is none of this name, of that mode. Returns itself.

        remote: the name of a remote tier, on whose servers it becomes the newest version of this name, for
        gmem.pool(name, remote=) on any machine that has these servers attached. It returns when they have all of it.
        LeaseLost, Busy (another machine is publishing that name), NotReplicated, Unreachable, OutOfMemory: the version
        before is still the newest, and this may be asked for again."""
        if self.remote is not None:
            raise InvalidArgument("remote: what comes from servers is published already", argument="remote")
        if array is not None:
            source = np.asarray(array)
            if source.dtype.hasobject:
                raise InvalidArgument("array: Python objects can't live in unified memory", argument="array")
            if not self.is_open:
                self._create(max(source.nbytes, 1), _checked_mode(mode), 0, False, False)
            if not self.writable:
                raise PermissionDenied(f"array: {self.name} is open to read only, or published", argument="array")
            if source.nbytes > self.nbytes:
                text = f"array: {source.nbytes} bytes do not fit into the {self.nbytes} of {self.name}"
                raise InvalidArgument(text, argument="array")
            self.array(source.dtype, source.shape)[...] = source
        further = {} if remote is None else {"remote": remote}
        reply = self.session.request("pool_publish", name=self.name, **further)
        self._published = True
        self._version = reply.get("version", self._version)
        return self

    def unlink(self) -> None:
        """Nobody can open it any more. It goes when the last process has closed it; from servers, when no machine reads
        any of its versions."""
        further = {} if self.remote is None else {"remote": self.remote}
        self.session.request("pool_unlink", name=self.name, **further)

    def __repr__(self) -> str:
        state = "closed" if not self.is_open else f"{self.nbytes} bytes at 0x{self.address:x}"
        return f"<gmem.Pool {self.name}: {state}{', published' if self._published else ''}>"


_finalizers: weakref.WeakKeyDictionary[Mapping, weakref.finalize[Any, Any]] = weakref.WeakKeyDictionary()


def _free(session: Session, address: int, nbytes: int) -> None:
    if not session.closed:
        _freed.free(lambda: _unmap(session, address, nbytes))


def _unmap(session: Session, address: int, nbytes: int) -> None:
    with session.sharing:
        for context in session.process_contexts():  # first: the range may come to be something else's at once
            context.map_pool(address, nbytes)
        session.unmap(address, nbytes)


def _checked_mode(mode: int) -> int:
    if not isinstance(mode, int) or isinstance(mode, bool) or not 0 <= mode <= 0o777:
        raise InvalidArgument(f"mode: {mode!r} is not a mode of 0 to 0o777", argument="mode")
    return mode


def pool(
    name: str, size: int | None = None, *, mode: int = 0o600, write: bool | None = None,
    page_size: str | int | None = None, persistent: bool = False, owner: int | None = None,
    remote: str | None = None, session: Session | None = None,
) -> Pool:  # fmt: skip
    """A pool: memory with a name that every process of this gmemd can open, at the same address in all of them and in
    their device contexts. A page that one process has brought in is there for all.

    With a size (in bytes) it is made, and open for writing; Exists if there is one of that name. It ends with this
    session, or by unlink(); persistent (administrators only) by unlink() alone. mode: who may open it, as of a file.
    Without a size it is one that exists: write=True or False opens it now, else the first use does, to read only.
    owner: the uid whose pool it has to be.
    remote: the name of a remote tier: the newest version that a machine has published there under that name, to read
    only. Its pages come when they are touched, once for all processes of this machine. What is open stays what it is.
    """
    if not isinstance(name, str):
        raise InvalidArgument(f"name: {name!r} is no string", argument="name")
    session = session if session is not None else default()
    if remote is not None and (not isinstance(remote, str) or not remote):
        raise InvalidArgument(f"remote: {remote!r} is not the name of a device", argument="remote")
    if remote is not None and size is not None:
        raise InvalidArgument("remote: make a pool, and publish that: pool.publish(remote=)", argument="remote")
    made = Pool(session, name, owner, remote)
    if size is None:
        return made if write is None else made.open(write)
    if not isinstance(size, (int, np.integer)) or isinstance(size, bool) or not 0 < size < 1 << 63:
        raise InvalidArgument(f"size: {size!r} bytes; at least 1 and less than 2^63", argument="size")
    if owner is not None and owner != os.geteuid():
        raise InvalidArgument("owner: a pool that is made is this user's", argument="owner")
    made._create(int(size), _checked_mode(mode), page_bytes_of(page_size), False, bool(persistent))
    return made
