# SPDX-License-Identifier: Apache-2.0
"""An embedding table as a pool: published by a program of one machine, gathered from by others with indices by a Zipf
law, and compared with what plain NumPy makes of the same numbers."""

from __future__ import annotations

from typing import Any

from told import Told

COLUMNS = 64  # of float32: 256 bytes a row
_PART = 65536  # rows that are made or compared in one go

_COMMON = f"""
COLUMNS, PART = {COLUMNS}, {_PART}

def rows_of(indices, seed):
    '''What is in those rows, by plain NumPy.'''
    cells = indices[:, None].astype(np.uint64) * np.uint64(COLUMNS) + np.arange(COLUMNS, dtype=np.uint64)
    words = (cells + np.uint64(seed)) * np.uint64(0x9E3779B97F4A7C15)
    return (words >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)

def zipf(rows, count, seed):
    '''Ranks, 1 / rank as likely as the first, spread over the table.'''
    rng = np.random.default_rng(seed)
    ranks = np.floor(np.exp(rng.random(count) * np.log(rows))).astype(np.int64) - 1
    return (ranks * 1000003) % rows

def write(name, rows, page_size, seed):
    pool = gmem.pool(name, size=rows * COLUMNS * 4, page_size=page_size, mode=0o644)
    table = pool.array(np.float32).reshape(-1, COLUMNS)
    for first in range(0, rows, PART):
        part = np.arange(first, min(first + PART, rows))
        table[first : first + len(part)] = rows_of(part, seed)
    version = pool.publish(remote="far").version
    del table
    pool.unlink()
    pool.close()
    return version

def is_equal(table, rows, seed):
    parts = (np.arange(first, min(first + PART, rows)) for first in range(0, rows, PART))
    return all(np.array_equal(table[part[0] : part[-1] + 1], rows_of(part, seed)) for part in parts)
"""


class Table:
    def __init__(self, name: str, size: int, page_size: str = "64K") -> None:
        self.name, self.bytes, self.rows = name, size, size // (4 * COLUMNS)
        self._page_size = page_size

    def begin_publishing(self, program: Told, rounds: int) -> None:
        """Versions of other content each, the last one of seed rounds - 1; the answer is which."""
        program.do(_COMMON)
        arguments = f"{self.name!r}, {self.rows}, {self._page_size!r}"
        program.begin(f"answer = [write({arguments}, seed) for seed in range({rounds})]")

    def publish(self, program: Told, seconds: float = 120) -> Any:
        """The version, of seed 0."""
        self.begin_publishing(program, 1)
        told = program.end(seconds)
        assert isinstance(told, list), told
        return told[0]

    def begin_opening(self, program: Told) -> None:
        """The answer is the version."""
        program.do(_COMMON)
        program.begin(f"""
            pool = gmem.pool({self.name!r}, remote="far").open()
            table = pool.array(np.float32).reshape(-1, COLUMNS)
            answer = pool.version
        """)

    def open(self, program: Told, seconds: float = 60) -> Any:
        self.begin_opening(program)
        return program.end(seconds)

    def begin_gather(self, program: Told, seed: int, count: int) -> None:
        """By a Zipf law; the answer is whether it is what it has to be."""
        program.begin(f"""
            indices = zipf({self.rows}, {count}, {seed})
            answer = bool(np.array_equal(table[indices], rows_of(indices, 0)))
        """)

    def begin_compare(self, program: Told, seed: int = 0) -> None:
        """All of it; the answer is whether it is equal."""
        program.begin(f"answer = bool(is_equal(table, {self.rows}, {seed}))")

    def compare(self, program: Told, seed: int = 0, seconds: float = 120) -> bool:
        self.begin_compare(program, seed)
        return program.end(seconds) is True
