# SPDX-License-Identifier: Apache-2.0
"""The fuzz targets over their corpus, and for a few seconds beyond it. `make fuzz` does more."""

import os
import subprocess
import sys
from pathlib import Path

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RING = ROOT / "build" / "fuzz" / "fuzz_ring"
sys.path.insert(0, str(HERE))
import targets  # noqa: E402

KEYS = ["v", "id", "op", "token", "va", "bytes", "ranges", "name", "config"]
keys = st.one_of(st.sampled_from(KEYS), st.text(max_size=5))
numbers = st.integers(-(1 << 63), (1 << 64) - 1)
atoms = st.one_of(st.none(), st.booleans(), numbers, st.binary(max_size=40), st.text(max_size=9))
trees = st.recursive(atoms, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4))
ops = st.sampled_from(sorted(targets.schema.OPS))
requests = st.fixed_dictionaries(
    {"v": st.just(1), "id": st.integers(0, 9), "op": ops, "token": st.just(bytes(32))},
    optional={
        "va": atoms, "bytes": atoms, "ranges": trees, "name": trees, "config": trees, "hnid": atoms, "context": atoms,
    },
)  # fmt: skip


@pytest.mark.parametrize("target", sorted(targets.TARGETS))
def test_corpus(target):
    files = sorted((HERE / "corpus" / target).iterdir())
    assert files
    for path in files:
        targets.TARGETS[target](path.read_bytes())


@settings(max_examples=200)
@given(st.one_of(st.binary(max_size=2048), trees.map(msgpack.packb), requests.map(msgpack.packb)))
def test_schema(data):
    targets.schema_target(data)


@settings(max_examples=200)
@given(st.binary(max_size=600), st.integers(1, 6), st.integers(0, 700))
def test_handshake(data, kind, length):
    targets.handshake_target(data)
    good = targets.wire.pack_hello(kind)
    targets.handshake_target((good[:12] + data)[:length])
    targets.handshake_target(good[: len(good) // 2] + data[: len(good) - len(good) // 2])


@pytest.mark.skipif(not RING.exists(), reason="not built: needs clang with libFuzzer (clang, libclang-rt-14-dev)")
@pytest.mark.skipif(not os.access("/dev/userfaultfd", os.R_OK | os.W_OK), reason="needs /dev/userfaultfd")
def test_ring(tmp_path):
    # what it finds worth keeping goes into the first folder
    command = [RING, "-max_total_time=4", "-seed=1", tmp_path, HERE / "corpus" / "ring"]
    done = subprocess.run(command, cwd=RING.parent, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-4000:]
