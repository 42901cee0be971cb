# SPDX-License-Identifier: Apache-2.0
"""Questions, and the ranking of texts by cosine similarity."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

QUERIES = (
    "compress a file",
    "parse command line options",
    "download a page from the web",
    "run a function in another process",
    "find out how long a piece of code takes",
)


@dataclass(frozen=True)
class Hit:
    text: int
    score: float


def score(embeddings: np.ndarray, queries: np.ndarray, out: np.ndarray) -> None:
    """Kernel: cosine similarities of unit vectors. (texts, hidden), (queries, hidden) → out (queries, texts)."""
    np.matmul(queries, embeddings.T, out=out)


def rank(scores: np.ndarray, order: list[int], count: int) -> list[Hit]:
    """The `count` best, best first. scores: one query's, by row; order: row → text."""
    count = min(count, len(scores))
    best = np.argpartition(-scores, count - 1)[:count]
    best = best[np.lexsort((best, -scores[best]))]
    return [Hit(order[row], float(scores[row])) for row in best]
