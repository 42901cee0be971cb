# SPDX-License-Identifier: Apache-2.0
"""Buffers and memory resources, in the spelling of RMM and cuda.core."""

from __future__ import annotations

from typing import Any

import numpy as np

from gmem._mapping import Mapping
from gmem._memory import allocate, extent_of, mapping_finalizers
from gmem._session import Session, default


class Buffer(Mapping):
    """Plain bytes of unified memory: buffer protocol, `__array_interface__`, DLPack. Freed by close(), at the end of
    a with block, or when it and everything that looks at it is gone."""

    session: Session

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return np.frombuffer(self, np.uint8).__array_interface__

    def __dlpack__(self, **options: Any) -> Any:
        return np.frombuffer(self, np.uint8).__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)  # kDLCPU: the CPU can always read it

    def prefetch(self, device: Any) -> None:
        """Moves it to a device (name, hnid or Device), or to "host"."""
        hnid = self.session.hnid(device)
        va, nbytes = extent_of(self, "buffer")
        self.session.request("prefetch", hnid=hnid, va=va, bytes=nbytes)

    def discard(self) -> None:
        """Drops the content of every page that lies in it whole; they read zero then."""
        va, nbytes = extent_of(self, "buffer")
        self.session.request("discard", va=va, bytes=nbytes)

    def close(self) -> None:
        """Frees it now. BufferError while arrays or memoryviews of it exist; nothing happens the second time."""
        if self.closed:
            return
        self._close()
        mapping_finalizers[self]()

    def __enter__(self) -> Buffer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<gmem.Buffer of {self.nbytes} bytes at 0x{self.address:x}{', closed' if self.closed else ''}>"


def alloc(
    nbytes: int, *, page_size: str | int | None = None, fork: str = "share", session: Session | None = None
) -> Buffer:
    """nbytes of unified memory that reads zero."""
    session = session if session is not None else default()
    buffer = allocate(Buffer, nbytes, page_size, fork, session)
    assert isinstance(buffer, Buffer)
    buffer.session = session
    return buffer


class MemoryResource:
    """Allocates Buffers with fixed options."""

    def __init__(
        self, *, page_size: str | int | None = None, fork: str = "share", session: Session | None = None
    ) -> None:
        self._options: dict[str, Any] = {"page_size": page_size, "fork": fork, "session": session}

    def allocate(self, nbytes: int, stream: Any = None) -> Buffer:
        return alloc(nbytes, **self._options)

    def deallocate(self, buffer: Buffer, nbytes: int | None = None, stream: Any = None) -> None:
        buffer.close()
