# SPDX-License-Identifier: Apache-2.0
"""Files into unified memory."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import numpy.typing as npt

from gmem._errors import GmemError, InvalidArgument
from gmem._memory import Shape, _checked_dtype, _checked_shape, empty

_CHUNK = 4 << 20


def from_file(
    path: str | os.PathLike[str], dtype: npt.DTypeLike = np.uint8, shape: Shape | None = None, *, offset: int = 0,
    **options: Any,
) -> np.ndarray[Any, Any]:  # fmt: skip
    """Reads a file, or `shape` elements of it from byte `offset` on, into a fresh array.

    It goes through a bounce buffer: read(2) straight into unified memory fails with EFAULT where userfaultfd serves
    user mode only.
    """
    if not isinstance(offset, (int, np.integer)) or isinstance(offset, bool) or not 0 <= offset < 1 << 63:
        raise InvalidArgument(f"offset: {offset!r} is not a position in a file", argument="offset")
    offset = int(offset)
    checked = _checked_dtype(dtype)
    with open(path, "rb", buffering=0) as file:
        left = os.fstat(file.fileno()).st_size - offset
        if shape is None:
            if left < 0 or left % checked.itemsize:
                raise InvalidArgument(f"offset: {left} bytes are no whole number of {checked}", argument="offset")
            extents: tuple[int, ...] = (left // checked.itemsize,)
        else:
            extents = _checked_shape(shape)
        nbytes = math.prod(extents) * checked.itemsize
        if nbytes > left:
            raise InvalidArgument(f"shape: needs {nbytes} bytes, the file has {max(left, 0)} there", argument="shape")
        result = empty(extents, checked, **options)
        if nbytes:
            _fill(file.fileno(), offset, result.reshape(-1).view(np.uint8), os.fspath(path))
    return result


def _fill(fd: int, offset: int, target: np.ndarray[Any, Any], path: str) -> None:
    bounce = np.empty(min(_CHUNK, target.nbytes), np.uint8)
    done = 0
    while done < target.nbytes:
        want = min(bounce.nbytes, target.nbytes - done)
        got = os.preadv(fd, [memoryview(bounce.data)[:want]], offset + done)
        if not got:
            raise GmemError(f"{path}: it became shorter while it was read")
        target[done : done + got] = bounce[:got]
        done += got
