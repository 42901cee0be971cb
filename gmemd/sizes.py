# SPDX-License-Identifier: Apache-2.0
"""Sizes as people write them: 48M, 2G, 1.5T, 4096. Powers of 1024, as memory is counted."""

from __future__ import annotations

import re

_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50}
_PATTERN = re.compile(r"(\d+)(?:\.(\d+))?\s*([KMGTP]?)(?:i?B)?", re.IGNORECASE)
SIZE_LIMIT = 1 << 63


def parse_size(text: str | int) -> int:
    """Bytes; ValueError says what is wrong with the text."""
    if isinstance(text, bool):
        raise ValueError(f"{text!r} is not a size")
    if isinstance(text, int):
        value = text
    else:
        value = _parse_text(text)
    if not 0 <= value < SIZE_LIMIT:
        raise ValueError(f"{text!r} is out of range: a size is at least 0 and less than 2^63")
    return value


def _parse_text(text: str) -> int:
    try:
        return int(text, 0)  # plain and 0x numbers, with underscores
    except ValueError:
        pass
    match = _PATTERN.fullmatch(text.strip())
    if match is None or len(text) > 64:
        raise ValueError(f"{text[:64]!r} is not a size: write for example 4096, 48M or 1.5G")
    whole, fraction, unit = match.groups()
    scale = 1 << _UNITS[unit.upper()]
    scaled = int(whole) * scale
    if fraction:
        scaled += int(fraction) * scale // 10 ** len(fraction)
    return scaled


def format_size(value: int) -> str:
    """`48.0 MiB`; whole numbers of bytes below one KiB."""
    if value < 1024:
        return f"{value} B"
    scaled = float(value)
    for unit in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        scaled /= 1024
        if scaled < 1023.95 or unit == "PiB":
            return f"{scaled:.1f} {unit}"
    raise AssertionError("unreachable")
