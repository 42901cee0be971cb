# SPDX-License-Identifier: Apache-2.0
"""Inference with a transformer whose weights are larger than the device's memory: layer after layer, the same for
each batch."""

from __future__ import annotations

import numpy as np

from workloads.workload import HUGE, READ, UPDATE, Access, Array, Arrays, Spec, Step, Tile, Workload, differs, whole

HEADS = 8
TOLERANCE = 1e-3  # float32 against float64, through all layers


def _norm(x: Array) -> Array:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + x.dtype.type(1e-5))


def cut(weights: Array, hidden: int) -> list[Array]:
    """Query, key, value, output, and the two of the feed-forward net."""
    flat, square = weights.reshape(-1), hidden * hidden
    four = [flat[n * square : (n + 1) * square].reshape(hidden, hidden) for n in range(4)]
    inner = (flat.size - 4 * square) // (2 * hidden)
    up = flat[4 * square : 4 * square + hidden * inner].reshape(hidden, inner)
    return [*four, up, flat[-hidden * inner :].reshape(inner, hidden)]


def embed(tokens: Array, x: Array) -> None:
    x[:] = tokens


def layer(weights: Array, x: Array) -> None:
    """Pre-norm, with ReLU."""
    tokens, hidden = x.shape
    query, key, value, output, up, down = cut(weights, hidden)
    y = _norm(x)
    q, k, v = (np.moveaxis((y @ w).reshape(tokens, HEADS, -1), 1, 0) for w in (query, key, value))
    scores = q @ np.moveaxis(k, 1, 2) * np.float32(1 / np.sqrt(hidden // HEADS))
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = (scores / scores.sum(-1, keepdims=True)) @ v
    x += np.moveaxis(mixed, 0, 1).reshape(tokens, hidden) @ output
    x += np.maximum(_norm(x) @ up, 0) @ down


class Transformer(Workload):
    name = "transformer"
    result = "x"

    def __init__(self, quick: bool = False) -> None:
        self.layers, self.tokens, self.hidden = (4, 32, 256) if quick else (12, 256, 512)
        self.weights = HUGE // 4 if quick else 4 * HUGE // 4  # float32s of a layer

    @property
    def specs(self) -> dict[str, Spec]:
        activations = (self.tokens, self.hidden)
        return {
            "weights": Spec((self.layers, self.weights), np.float32, constant=True),
            "tokens": Spec(activations, np.float32, 65536, constant=True),
            "x": Spec(activations, np.float32, 65536),
        }

    def fill(self, arrays: Arrays) -> None:
        rng = np.random.default_rng(0)
        for weights in arrays["weights"]:
            weights[:] = rng.standard_normal(self.weights, np.float32) * np.float32(self.hidden**-0.5)
        arrays["tokens"][:] = rng.standard_normal((self.tokens, self.hidden), np.float32)

    def steps(self, round: int) -> list[Step]:
        specs = self.specs
        x = Access(whole("x", specs["x"]), UPDATE)
        steps = [Step(embed, (Access(whole("tokens", specs["tokens"]), READ), x))]
        return steps + [
            Step(layer, (Access(Tile("weights", number, number + 1), READ), x)) for number in range(self.layers)
        ]

    def check(self, arrays: Arrays, round: int) -> str | None:
        """In float64, a head and a token at a time, with einsum."""
        rng = np.random.default_rng(0)
        weights = [
            rng.standard_normal(self.weights, np.float32) * np.float32(self.hidden**-0.5) for _ in range(self.layers)
        ]
        x = rng.standard_normal((self.tokens, self.hidden), np.float32).astype(np.float64)
        for each in weights:
            x = _reference(cut(each.astype(np.float64), self.hidden), x)
        return differs(arrays["x"], x, TOLERANCE, "activations")


def _reference(matrices: list[Array], x: Array) -> Array:
    query, key, value, output, up, down = matrices
    width, y, heads = x.shape[1] // HEADS, _norm(x), []
    for head in range(HEADS):
        part = slice(head * width, (head + 1) * width)
        q, k, v = (np.einsum("th,hd->td", y, w[:, part], optimize=True) for w in (query, key, value))
        weight = np.exp(np.einsum("td,sd->ts", q, k, optimize=True) / np.sqrt(width))
        heads.append(np.einsum("ts,sd->td", weight / weight.sum(1)[:, None], v, optimize=True))
    x = x + np.einsum("td,dh->th", np.concatenate(heads, 1), output, optimize=True)
    inner = np.einsum("th,hf->tf", _norm(x), up, optimize=True)
    return x + np.einsum("tf,fh->th", np.where(inner > 0, inner, 0), down, optimize=True)
