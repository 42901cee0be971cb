# SPDX-License-Identifier: Apache-2.0
"""Where a job written by hand keeps what is not in the memory that is too small: what gmem's tier is, so that both pay
the same for it. A device's jobs keep it in plain host memory, behind the link."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np

from workloads import arena
from workloads.link import Link
from workloads.plan import ALIGN
from workloads.workload import Array, Spec, Step, Tile

RAW_ABOVE = 7 / 8  # what saves less than an eighth is kept as it is, as the tier does


class Store(Protocol):
    """All arrays of a job."""

    def get(self, tile: Tile, to: Array) -> None: ...

    def put(self, tile: Tile, source: Array) -> None: ...

    def close(self) -> None: ...


class Plain:
    """Memory, behind a link."""

    def __init__(self, arrays: Mapping[str, Array], link: Link) -> None:
        self._arrays, self.link = arrays, link

    def get(self, tile: Tile, to: Array) -> None:
        self.link.copy(to, self._arrays[tile.array][tile.first : tile.last])

    def put(self, tile: Tile, source: Array) -> None:
        self.link.copy(self._arrays[tile.array][tile.first : tile.last], source)

    def close(self) -> None:
        self._arrays = {}


class Pieces:
    """An array in pieces that are stored each by itself: cut wherever a step's tile begins or ends."""

    def __init__(self, specs: Mapping[str, Spec], tiles: Iterable[Tile]) -> None:
        cuts = {name: {0, spec.shape[0]} for name, spec in specs.items()}
        for tile in tiles:
            cuts[tile.array] |= {tile.first, tile.last}
        self._cuts = {name: sorted(each) for name, each in cuts.items()}

    def all(self) -> list[Tile]:
        return [piece for name, cuts in self._cuts.items() for piece in self.of(Tile(name, cuts[0], cuts[-1]))]

    def of(self, tile: Tile) -> list[Tile]:
        cuts = self._cuts[tile.array]
        at, end = bisect_left(cuts, tile.first), bisect_left(cuts, tile.last)
        if cuts[at] != tile.first or cuts[end] != tile.last:
            raise ValueError(f"{tile} is no whole number of pieces")
        return [Tile(tile.array, *bounds) for bounds in zip(cuts[at:end], cuts[at + 1 : end + 1], strict=True)]


class Packed:
    """Compressed memory, by the library that the tier has (and zram's algorithm): one piece, one block."""

    def __init__(self, arrays: Mapping[str, Array], pieces: Pieces) -> None:
        self._pieces, self._lz4 = pieces, _lz4()
        self._blocks: dict[Tile, tuple[Array, int]] = {}  # with room for the worst case, of which the rest is untouched
        for piece in pieces.all():
            source = arrays[piece.array][piece.first : piece.last]
            self._blocks[piece] = (np.empty(self._lz4.LZ4_compressBound(source.nbytes), np.uint8), 0)
            self._pack(piece, source)

    def _pack(self, piece: Tile, source: Array) -> None:
        block, size = self._blocks[piece][0], source.nbytes
        packed = self._lz4.LZ4_compress_default(source.ctypes.data, block.ctypes.data, size, len(block))
        if not 0 < packed <= RAW_ABOVE * size:
            packed = size
            block[:size] = source.reshape(-1).view(np.uint8)
        self._blocks[piece] = (block, packed)

    def get(self, tile: Tile, to: Array) -> None:
        for piece in self._pieces.of(tile):
            part = to[piece.first - tile.first : piece.last - tile.first]
            block, packed = self._blocks[piece]
            if packed == part.nbytes:
                part.reshape(-1).view(np.uint8)[:] = block[:packed]
            elif self._lz4.LZ4_decompress_safe(block.ctypes.data, part.ctypes.data, packed, part.nbytes) != part.nbytes:
                raise ValueError(f"{piece} can't be unpacked")

    def put(self, tile: Tile, source: Array) -> None:
        for piece in self._pieces.of(tile):
            self._pack(piece, source[piece.first - tile.first : piece.last - tile.first])

    def close(self) -> None:
        self._blocks = {}


class Filed:
    """A file, past the page cache where the file system allows it; every piece begins with a block."""

    def __init__(self, arrays: Mapping[str, Array], pieces: Pieces, folder: str) -> None:
        self._pieces, self._at, end = pieces, {}, 0
        for piece in pieces.all():
            self._at[piece] = end
            end += -(-arrays[piece.array][piece.first : piece.last].nbytes // ALIGN) * ALIGN
        handle, path = tempfile.mkstemp(prefix="workload-", dir=folder)
        os.unlink(path)
        os.posix_fallocate(handle, 0, end)
        try:
            self._fd = os.open(f"/proc/self/fd/{handle}", os.O_RDWR | os.O_DIRECT)
            os.close(handle)
        except OSError:  # a tmpfs
            self._fd = handle
        self._buffer = mmap.mmap(-1, max(each.nbytes for each in arrays.values()) + ALIGN)
        for piece in pieces.all():
            self.put(piece, arrays[piece.array][piece.first : piece.last])

    def _bounce(self, nbytes: int) -> memoryview:
        return memoryview(self._buffer)[: -(-nbytes // ALIGN) * ALIGN]

    def get(self, tile: Tile, to: Array) -> None:
        for piece in self._pieces.of(tile):
            part = to[piece.first - tile.first : piece.last - tile.first]
            whole = part.nbytes % ALIGN == 0 and part.ctypes.data % ALIGN == 0
            into = part.reshape(-1).view(np.uint8) if whole else self._bounce(part.nbytes)
            if os.preadv(self._fd, [into], self._at[piece]) < part.nbytes:
                raise OSError(f"{piece} is cut short")
            if not whole:
                part.reshape(-1).view(np.uint8)[:] = np.frombuffer(into, np.uint8, part.nbytes)

    def put(self, tile: Tile, source: Array) -> None:
        for piece in self._pieces.of(tile):
            part = source[piece.first - tile.first : piece.last - tile.first].reshape(-1).view(np.uint8)
            data: memoryview | Array = part
            if part.nbytes % ALIGN or part.ctypes.data % ALIGN:
                data = self._bounce(part.nbytes)
                data[: part.nbytes] = memoryview(part)
            if os.pwritev(self._fd, [data], self._at[piece]) < part.nbytes:
                raise OSError(f"{piece} is cut short")

    def close(self) -> None:
        os.close(self._fd)


def beside(tier: str, arrays: Mapping[str, Array], specs: Mapping[str, Spec], tiles: Iterable[Tile]) -> Store:
    """A store as the tier (as gmemd's --device takes it) is. LookupError: there is none like it."""
    options = dict(part.partition("=")[::2] for part in tier.partition(":")[2].split(","))
    pieces = Pieces(specs, tiles)
    if (options.get("driver"), options.get("algorithm")) == ("zstd", "lz4"):
        return Packed(arrays, pieces)
    if options.get("driver") == "file":
        path = options["path"]
        return Filed(arrays, pieces, path if os.path.isdir(path) else os.path.dirname(path))
    raise LookupError(f"no store like {tier}")


def tiles_of(steps: Sequence[Step]) -> list[Tile]:
    """Whatever is copied in one go, in either direction."""
    return [tile for step in steps for access in step.accesses for tile in (access.tile, access.part) if tile]


def _lz4() -> ctypes.CDLL:
    """Its calls let other threads run, as copies do."""
    library = ctypes.CDLL("liblz4.so.1")
    for name in ("LZ4_compress_default", "LZ4_decompress_safe"):
        getattr(library, name).argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
    return library


def held(specs: Mapping[str, Spec]) -> int:
    """Bytes of an arena for all of them."""
    return sum(-(-spec.nbytes // ALIGN) * ALIGN for spec in specs.values())


def lay(home: arena.Arena, specs: Mapping[str, Spec]) -> dict[str, Array]:
    arrays, offset = {}, 0
    for name, spec in specs.items():
        arrays[name] = home.array(offset, spec.shape, spec.dtype)
        offset += -(-spec.nbytes // ALIGN) * ALIGN
    return arrays
