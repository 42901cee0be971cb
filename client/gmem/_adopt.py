# SPDX-License-Identifier: Apache-2.0
"""Memory that the program has already, brought under management at its own address."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np

from gmem._errors import InvalidArgument
from gmem._memory import page_bytes_of
from gmem._session import Session, default

_kept: list[Any] = []  # owners of adopted memory whose end can't be noticed


def _owner(array: np.ndarray[Any, Any]) -> Any:
    """Who frees the memory."""
    owner: Any = array
    while isinstance(owner, np.ndarray) and owner.base is not None:
        owner = owner.base
    return owner.obj if isinstance(owner, memoryview) else owner


def _gone(session: weakref.ref[Session], va: int, *dead: int) -> None:
    """The owner is about to free its memory. An allocator may drop it later by madvise(MADV_DONTNEED), and count on
    zeros, which adopted memory would not give it: so it is ordinary memory again by then."""
    known = session()
    if known is not None:
        known.disown(va, *dead)


def adopt(
    array: np.ndarray[Any, Any], *, page_size: str | int | None = None, edges: bool = False,
    session: Session | None = None,
) -> tuple[int, int]:  # fmt: skip
    """Brings the memory of an array that NumPy has allocated under management, at its own address, while other threads
    read and write it. Returns (address, nbytes) of what is managed now, which every function here takes for an array.

    Only whole pages of 4 KiB: the first and last bytes of the array, and all of a small one (nbytes 0), are left out,
    unless edges=True takes the rest of those pages too, with whatever else of the program lies there. A kernel gets an
    array by address only if all of it is managed. page_size: what moves at once; None: 64 KiB (4 KiB for less than
    that). The memory is freed with the array, as ever, and is ordinary memory again when the session ends. A forked
    child gets a copy of it.

    InvalidArgument: not a writeable array of one piece. NotSupported, PermissionDenied, Busy: not private anonymous
    memory, or in use in a way that forbids it; the message says which. EEXIST: managed already, or the address is in
    use in an open context. OutOfMemory: more than can be held; if that comes out half-way, what had been adopted by
    then stays so."""
    if not isinstance(array, np.ndarray) or array.dtype.hasobject:
        raise InvalidArgument(f"array: a {type(array).__name__} is no array of numbers", argument="array")
    if not array.flags.writeable:
        raise InvalidArgument("array: is not writeable", argument="array")
    low, high = np.lib.array_utils.byte_bounds(array)
    if high - low != array.nbytes or not array.nbytes:
        raise InvalidArgument("array: is empty, or not of one piece", argument="array")
    session = session if session is not None else default()
    owner = _owner(array)
    va, nbytes = session.adopt(low, high - low, page_bytes_of(page_size), edges)
    if nbytes:
        session.adopted[va] = nbytes
        owned = isinstance(owner, np.ndarray) and owner.flags.owndata
        if owned:  # nobody but NumPy frees it, and NumPy calls what weakrefs have first
            session.stays(va, nbytes)
        gone = (weakref.ref(session), va, nbytes, low, high) if owned else (weakref.ref(session), va)
        try:
            weakref.finalize(owner, _gone, *gone).atexit = False
        except TypeError:
            _kept.append(owner)
    return va, nbytes
