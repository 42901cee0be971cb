# SPDX-License-Identifier: Apache-2.0
"""What has to hold at the end of a run. Each check returns what is wrong, in words, or nothing."""

from __future__ import annotations

import time
from pathlib import Path

import model
import numpy as np
import weights
from encoder import Batch, PlainEncoder

DIFFERENCE_MAX = 1e-5


class Reference:
    """The same model by plain NumPy on ordinary memory, for a sample of the batches. Each is computed right after the
    device has done it, so that both are timed on a machine that is busy with the same other things."""

    def __init__(self, net: model.Model, sample: list[Batch]) -> None:
        self.sample = sample
        self.seconds = 0.0
        self.expected: list[tuple[Batch, np.ndarray]] = []
        self.encoder = PlainEncoder(net, max(net.config.positions, *(batch.padded for batch in sample)))
        self.encoder.encode(Batch(0, sample[0].tokens[:8]))  # starts the BLAS threads

    @property
    def texts(self) -> int:
        return sum(len(batch.tokens) for batch in self.sample)

    def encode(self, batch: Batch) -> None:
        began = time.perf_counter()
        expected = self.encoder.encode(batch)
        self.seconds += time.perf_counter() - began
        self.expected.append((batch, expected))

    def difference(self, embeddings: np.ndarray) -> float:
        """The largest one of all elements; NaN if there is one."""
        return float(np.max([np.abs(expected - embeddings[b.first : b.last]).max() for b, expected in self.expected]))


def difference(value: float, texts: int) -> str | None:
    if value <= DIFFERENCE_MAX:  # so that a NaN fails
        return None
    return f"embeddings of {texts} texts differ from plain NumPy's by {value:.3g}, more than {DIFFERENCE_MAX:g}"


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
