# SPDX-License-Identifier: Apache-2.0
"""What has to hold at the end of a run. Each check returns what is wrong, in words, or nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import weights

DIFFERENCE_MAX = 1e-5


def embeddings(difference: float, texts: int) -> str | None:
    # Written so that a NaN fails.
    if difference <= DIFFERENCE_MAX:
        return None
    return f"embeddings of {texts} texts differ from plain NumPy's by {difference:.3g}, more than {DIFFERENCE_MAX:g}"


def weight_pages(data: np.ndarray, path: Path, page_bytes: int) -> tuple[int, str | None]:
    """Returns also how many pages were compared."""
    pages = -(-len(data) // page_bytes)
    different = list(weights.differing_pages(data, path, page_bytes))
    if len(data) != path.stat().st_size:
        return pages, f"weights: {len(data)} bytes in memory, {path.stat().st_size} in {path}"
    if not different:
        return pages, None
    page, offset = different[0]
    return pages, (
        f"weights: {len(different)} of {pages} pages differ from {path}; the first is page {page} "
        f"({page_bytes} bytes each), at byte {offset} of the file"
    )


def capacity(peak_bytes: int, capacity_bytes: int) -> str | None:
    if peak_bytes <= capacity_bytes:
        return None
    return f"HBM: {peak_bytes} bytes of frames were in use, the device has {capacity_bytes}"
