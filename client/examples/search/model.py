# SPDX-License-Identifier: Apache-2.0
"""BERT encoder for sentence embeddings (all-MiniLM-L6-v2) in plain NumPy.

Every function here works on whatever ndarrays it is given, and what one kernel leaves to the next, as well as the large
intermediates of each, are arrays that the caller supplies (`Activations`). So the same code is the kernels of the gmem
run, on unified memory in the device context, and the reference of the verification, on ordinary memory in the host
process.

Architecture: Devlin et al., "BERT" (2019), post-layer-norm as in Vaswani et al. (2017); pooling: Reimers and Gurevych,
"Sentence-BERT" (2019), mean over the tokens, then L2 normalisation.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

Array = np.ndarray
Allocate = Callable[[tuple[int, ...], str], Array]

LAYER_NORM_EPSILON = 1e-12
MASKED = np.float32(-1e9)
BLOCK_TOKENS = 512  # at least the longest text
GELU_ELEMENTS = 1 << 16  # at a time: its temporaries stay in the cache


@dataclass(frozen=True)
class Config:
    layers: int
    hidden: int
    heads: int
    intermediate: int
    positions: int
    vocabulary: int

    @classmethod
    def from_file(cls, path: Path) -> Config:
        """Reads a Hugging Face `config.json`; raises ValueError for what this module doesn't implement."""
        config = json.loads(path.read_text())
        if config.get("hidden_act") != "gelu" or config.get("position_embedding_type", "absolute") != "absolute":
            raise ValueError("config: only hidden_act=gelu and absolute positions are implemented")
        if config.get("layer_norm_eps") != LAYER_NORM_EPSILON:
            raise ValueError(f"config: layer_norm_eps must be {LAYER_NORM_EPSILON}")
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            heads=config["num_attention_heads"],
            intermediate=config["intermediate_size"],
            positions=config["max_position_embeddings"],
            vocabulary=config["vocab_size"],
        )


@dataclass(frozen=True)
class Linear:
    weight: Array  # (out, in)
    bias: Array  # (out,)

    def __call__(self, x: Array, out: Array) -> Array:
        np.matmul(x, self.weight.T, out=out)
        out += self.bias
        return out


@dataclass(frozen=True)
class Norm:
    weight: Array
    bias: Array

    def __call__(self, x: Array) -> None:
        """Layer normalisation over the last axis, in place."""
        x -= x.mean(axis=-1, keepdims=True)
        x /= np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + LAYER_NORM_EPSILON)
        x *= self.weight
        x += self.bias


@dataclass(frozen=True)
class Embedding:
    words: Array  # (vocabulary, hidden)
    positions: Array  # (positions, hidden)
    types: Array  # (2, hidden)
    norm: Norm


@dataclass(frozen=True)
class Layer:
    query: Linear
    key: Linear
    value: Linear
    attention_output: Linear
    attention_norm: Norm
    intermediate: Linear
    output: Linear
    output_norm: Norm


@dataclass(frozen=True)
class Model:
    config: Config
    embedding: Embedding
    layers: tuple[Layer, ...]

    @classmethod
    def from_tensors(cls, config: Config, tensors: dict[str, Array]) -> Model:
        def linear(name: str) -> Linear:
            return Linear(tensors[f"{name}.weight"], tensors[f"{name}.bias"])

        def norm(name: str) -> Norm:
            return Norm(tensors[f"{name}.weight"], tensors[f"{name}.bias"])

        def layer(name: str) -> Layer:
            return Layer(
                query=linear(f"{name}.attention.self.query"),
                key=linear(f"{name}.attention.self.key"),
                value=linear(f"{name}.attention.self.value"),
                attention_output=linear(f"{name}.attention.output.dense"),
                attention_norm=norm(f"{name}.attention.output.LayerNorm"),
                intermediate=linear(f"{name}.intermediate.dense"),
                output=linear(f"{name}.output.dense"),
                output_norm=norm(f"{name}.output.LayerNorm"),
            )

        embedding = Embedding(
            words=tensors["embeddings.word_embeddings.weight"],
            positions=tensors["embeddings.position_embeddings.weight"],
            types=tensors["embeddings.token_type_embeddings.weight"],
            norm=norm("embeddings.LayerNorm"),
        )
        return cls(config, embedding, tuple(layer(f"encoder.layer.{i}") for i in range(config.layers)))


@dataclass(frozen=True)
class Activations:
    """Working memory for batches of up to `tokens` tokens, padding included. A layer goes through a batch in blocks of
    BLOCK_TOKENS, so that besides `hidden` only a block's intermediates and the layer's weights are in use at a time."""

    hidden: Array  # (tokens, hidden)
    query: Array  # (BLOCK_TOKENS, hidden)
    key: Array  # (BLOCK_TOKENS, hidden)
    value: Array  # (BLOCK_TOKENS, hidden)
    context: Array  # (BLOCK_TOKENS, hidden)
    intermediate: Array  # (BLOCK_TOKENS, intermediate)
    scores: Array  # attention scores of a block
    ids: Array  # (tokens,) int32
    lengths: Array  # (tokens,) int32: tokens of each text of the batch

    @classmethod
    def allocate(cls, config: Config, tokens: int, empty: Allocate) -> Activations:
        """empty: as numpy.empty. Raises ValueError if not even the longest text would fit."""
        if tokens < config.positions:
            raise ValueError(f"tokens: {tokens} is less than the longest text, {config.positions}")
        query, key, value, context = empty((4, BLOCK_TOKENS, config.hidden), "float32")
        return cls(
            hidden=empty((tokens, config.hidden), "float32"),
            query=query,
            key=key,
            value=value,
            context=context,
            intermediate=empty((BLOCK_TOKENS, config.intermediate), "float32"),
            scores=empty((config.heads * config.positions * BLOCK_TOKENS,), "float32"),
            ids=empty((tokens,), "int32"),
            lengths=empty((tokens,), "int32"),
        )

    def load(self, token_ids: list[list[int]]) -> tuple[int, int]:
        """Writes a batch of texts, padded with id 0 to the longest, and returns its shape (texts, longest)."""
        texts, longest = len(token_ids), max(map(len, token_ids))
        ids = self.ids[: texts * longest].reshape(texts, longest)
        ids[:] = 0
        for row, text in zip(ids, token_ids, strict=True):
            row[: len(text)] = text
        self.lengths[:texts] = [len(text) for text in token_ids]
        return texts, longest


def embed(embedding: Embedding, act: Activations, shape: tuple[int, int]) -> None:
    """Kernel: token ids → hidden."""
    texts, longest = shape
    hidden = act.hidden[: texts * longest].reshape(texts, longest, -1)
    np.take(embedding.words, act.ids[: texts * longest].reshape(shape), axis=0, out=hidden, mode="clip")
    hidden += embedding.positions[:longest]
    hidden += embedding.types[0]
    embedding.norm(hidden)


def encode(layer: Layer, heads: int, act: Activations, shape: tuple[int, int]) -> None:
    """Kernel: one transformer layer, hidden → hidden."""
    texts, longest = shape
    step = BLOCK_TOKENS // longest
    for first in range(0, texts, step):
        count = min(step, texts - first)
        hidden = act.hidden[first * longest : (first + count) * longest]
        encode_block(layer, heads, act, hidden, act.lengths[first : first + count])


def encode_block(layer: Layer, heads: int, act: Activations, hidden: Array, lengths: Array) -> None:
    rows = len(hidden)
    layer.query(hidden, act.query[:rows])
    layer.key(hidden, act.key[:rows])
    layer.value(hidden, act.value[:rows])
    attend(heads, act, rows, lengths)
    hidden += layer.attention_output(act.context[:rows], act.query[:rows])
    layer.attention_norm(hidden)
    wide = layer.intermediate(hidden, act.intermediate[:rows])
    gelu(wide)
    hidden += layer.output(wide, act.query[:rows])
    layer.output_norm(hidden)


def attend(heads: int, act: Activations, rows: int, lengths: Array) -> None:
    """Scaled dot-product attention, (query, key, value) → context, masked to each text's length."""
    texts, longest = len(lengths), rows // len(lengths)
    query, key, value, context = (
        part[:rows].reshape(texts, longest, heads, -1).transpose(0, 2, 1, 3)
        for part in (act.query, act.key, act.value, act.context)
    )
    scores = act.scores[: rows * heads * longest].reshape(texts, heads, longest, longest)
    np.matmul(query, key.transpose(0, 1, 3, 2), out=scores)
    scores *= np.float32(1 / np.sqrt(query.shape[-1]))
    padding = np.arange(longest) >= lengths[:, None]
    scores += np.where(padding, MASKED, np.float32(0))[:, None, None, :]
    softmax(scores)
    context[:] = np.matmul(scores, value)


def pool(act: Activations, shape: tuple[int, int], out: Array) -> None:
    """Kernel: hidden → one unit vector for each text, the mean over its tokens. out: (texts, hidden)."""
    texts, longest = shape
    hidden = act.hidden[: texts * longest].reshape(texts, longest, -1)
    lengths = act.lengths[:texts, None]
    weight = np.where(np.arange(longest) < lengths, np.float32(1) / lengths, np.float32(0)).astype(np.float32)
    np.matmul(weight[:, None, :], hidden, out=out[:, None, :])
    out /= np.linalg.norm(out, axis=1, keepdims=True)


def forward(model: Model, act: Activations, shape: tuple[int, int], out: Array) -> None:
    """All kernels in a row, in the calling process."""
    embed(model.embedding, act, shape)
    for layer in model.layers:
        encode(layer, model.config.heads, act, shape)
    pool(act, shape, out)


def softmax(x: Array) -> None:
    """Over the last axis, in place."""
    x -= x.max(axis=-1, keepdims=True)
    np.exp(x, out=x)
    x /= x.sum(axis=-1, keepdims=True)


def gelu(x: Array) -> None:
    """x Φ(x), in place and exact: with erf, not the tanh approximation (Hendrycks and Gimpel, 2016)."""
    for block in blocks(x):
        cumulative = erf(block * np.float32(np.sqrt(0.5)))
        cumulative += np.float32(1)
        cumulative *= np.float32(0.5)
        block *= cumulative


def blocks(x: Array) -> Iterator[Array]:
    rows = max(1, GELU_ELEMENTS // x.shape[-1])
    for first in range(0, len(x), rows):
        yield x[first : first + rows]


# The rational approximation x P(x²) / Q(x²) of erf on [-4, 4] that Eigen (MathFunctionsImpl.h, generic_fast_erf) and
# XLA use for float32; beyond 4, erf is 1 in float32.
ERF_P = (
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
)
ERF_Q = (
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
)


def erf(x: Array) -> Array:
    x = np.clip(x, np.float32(-4), np.float32(4))
    square = x * x
    numerator, denominator = (horner(c, square) for c in (ERF_P, ERF_Q))
    numerator *= x
    numerator /= denominator
    return numerator


def horner(coefficients: tuple[float, ...], x: Array) -> Array:
    value = x * x.dtype.type(coefficients[0])
    for coefficient in coefficients[1:-1]:
        value += x.dtype.type(coefficient)
        value *= x
    value += x.dtype.type(coefficients[-1])
    return value
