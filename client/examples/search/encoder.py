# SPDX-License-Identifier: Apache-2.0
"""Texts → unit vectors: tokens, batches, and the two ways to run the model's kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import model
import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SAMPLE_BATCHES_MIN = 3
TOKENS_MAX = 256  # what the model was trained for (sentence_bert_config.json)


@dataclass(frozen=True)
class Batch:
    first: int  # row of its first text among all texts sorted by length
    tokens: list[list[int]]

    @property
    def last(self) -> int:
        return self.first + len(self.tokens)

    @property
    def padded(self) -> int:
        return len(self.tokens) * max(map(len, self.tokens))


def open_tokenizer(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.enable_truncation(TOKENS_MAX)
    return tokenizer


def tokenize(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch(texts)]


def make_batches(tokens: list[list[int]], texts_max: int, tokens_max: int) -> tuple[list[int], list[Batch]]:
    """Sorts texts by length, which keeps padding small, and cuts them into batches of at most texts_max texts and
    tokens_max tokens, padding included. Returns the order (row → index of the text) and the batches, in row order."""
    order = sorted(range(len(tokens)), key=lambda index: len(tokens[index]))
    batches, first = [], 0
    while first < len(order):
        last = first + 1
        while (
            last < len(order)
            and last - first < texts_max
            and (last - first + 1) * len(tokens[order[last]]) <= tokens_max
        ):
            last += 1
        batches.append(Batch(first, [tokens[index] for index in order[first:last]]))
        first = last
    return order, batches


def sample_batches(batches: list[Batch], texts_min: int) -> list[Batch]:
    """Batches spread evenly over all lengths, with at least texts_min texts if there are as many."""
    for count in range(SAMPLE_BATCHES_MIN, len(batches) + 1):
        picked = [batches[i * len(batches) // count + len(batches) // (2 * count)] for i in range(count)]
        if sum(len(batch.tokens) for batch in picked) >= texts_min:
            return picked
    return batches


class PlainEncoder:
    """In the calling process, on ordinary memory."""

    def __init__(self, net: model.Model, tokens_max: int) -> None:
        self.net = net
        self.activations = model.Activations.allocate(net.config, tokens_max, np.empty)

    def encode(self, batch: Batch) -> np.ndarray:
        out = np.empty((len(batch.tokens), self.net.config.hidden), np.float32)
        shape = self.activations.load(batch.tokens)
        model.forward(self.net, self.activations, shape, out)
        return out


class DeviceEncoder:
    """As kernels in a device context, one a layer. net, activations and out all live in unified memory."""

    def __init__(self, context: Any, net: model.Model, activations: model.Activations) -> None:
        self.context = context
        self.net = net
        self.activations = activations

    def encode(self, batch: Batch, out: np.ndarray, after_kernel: Callable[[], None] = lambda: None) -> None:
        shape = self.activations.load(batch.tokens)
        kernels: list[tuple] = [(model.embed, self.net.embedding, self.activations, shape)]
        for layer in self.net.layers:
            kernels.append((model.encode, layer, self.net.config.heads, self.activations, shape))
        kernels.append((model.pool, self.activations, shape, out))
        for kernel in kernels:
            self.context.launch(*kernel).wait()
            after_kernel()
