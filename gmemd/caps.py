# SPDX-License-Identifier: Apache-2.0
"""Capabilities and page sizes of a device: bits in csrc/include/gmem/driver.h, words and numbers for people."""

from __future__ import annotations

from collections.abc import Iterable

CAPS = {
    "replayable": 0x001,
    "peer": 0x010,
    "coherent": 0x020,
    "compute": 0x040,
    "persistent": 0x080,
    "export_fd": 0x100,
    "remote": 0x200,
    "same_va": 0x400,
    "cpu_visible": 0x800,
    "slow": 0x1000,
    "own_frames": 0x2000,
}


def cap_names(mask: int) -> list[str]:
    return [name for name, bit in CAPS.items() if mask & bit]


def cap_mask(names: Iterable[str]) -> int:
    """ValueError for a name that is none."""
    mask = 0
    for name in names:
        if name not in CAPS:
            raise ValueError(f"unknown capability {name!r}; known are {', '.join(CAPS)}")
        mask |= CAPS[name]
    return mask


def page_sizes(mask: int) -> list[int]:
    return [1 << bit for bit in range(mask.bit_length()) if mask >> bit & 1]


def page_mask(sizes: Iterable[int]) -> int:
    """ValueError for a size that is no power of two."""
    mask = 0
    for size in sizes:
        if size <= 0 or size & (size - 1):
            raise ValueError(f"page size {size} is not a power of two")
        mask |= size
    return mask
