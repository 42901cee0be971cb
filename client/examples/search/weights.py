# SPDX-License-Identifier: Apache-2.0
"""A safetensors file as one byte array with tensors as views into it.

The array is the file, byte for byte, so a page of the array compares with the same bytes of the file. The format is a
little-endian uint64 n, n bytes of JSON naming each tensor's dtype, shape and byte range, then the data.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1", "U8": "|u1"}
LENGTH_BYTES = 8
HEADER_BYTES_MAX = 100 << 20  # the format's own limit


@dataclass(frozen=True)
class Tensor:
    name: str
    dtype: str
    shape: tuple[int, ...]
    first: int  # byte offsets in the file
    last: int


def read_header(path: Path) -> list[Tensor]:
    """Tensors in file order. Raises ValueError naming the file and what is wrong with it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if size < LENGTH_BYTES or length > min(size - LENGTH_BYTES, HEADER_BYTES_MAX):
            raise ValueError(f"{path}: not a safetensors file: a header of {length} bytes in {size}")
        header = json.loads(file.read(length))
    tensors = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None:
            raise ValueError(f"{path}: {name} has dtype {entry['dtype']}, which NumPy lacks")
        first, last = (LENGTH_BYTES + length + offset for offset in entry["data_offsets"])
        wanted = int(np.prod(entry["shape"], dtype=np.int64)) * np.dtype(dtype).itemsize
        if not 0 <= first <= last <= size or last - first != wanted:
            raise ValueError(f"{path}: {name} claims bytes {first} to {last}, shape {entry['shape']}, of {size} bytes")
        tensors.append(Tensor(name, dtype, tuple(entry["shape"]), first, last))
    return sorted(tensors, key=lambda tensor: tensor.first)


def views(data: np.ndarray, tensors: list[Tensor]) -> dict[str, np.ndarray]:
    """data: the whole file as uint8. Returns read-only arrays over the same memory."""
    arrays = {}
    for tensor in tensors:
        array = data[tensor.first : tensor.last].view(tensor.dtype).reshape(tensor.shape)
        array.flags.writeable = False
        arrays[tensor.name] = array
    return arrays


def differing_pages(data: np.ndarray, path: Path, page_bytes: int) -> Iterator[tuple[int, int]]:
    """Compares data with the file page by page; yields (page, byte offset of its first difference)."""
    with path.open("rb") as file:
        for page, offset in enumerate(range(0, len(data), page_bytes)):
            mine = data[offset : offset + page_bytes]
            theirs = np.frombuffer(file.read(page_bytes), np.uint8)
            if len(theirs) < len(mine):
                yield page, offset + len(theirs)
            elif not np.array_equal(mine, theirs):
                yield page, offset + int(np.argmax(mine != theirs))
