# SPDX-License-Identifier: Apache-2.0
"""The page protocol, checked exhaustively by spin for one kill, one eviction and one access of each accessor; and
without any one of its guards, which must not pass. `make spin` does more of it."""

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
import page  # noqa: E402

BOUNDS = ("CRASHES=1", "EVICTIONS=1", "ACCESSES=1")
pytestmark = pytest.mark.skipif(not shutil.which("spin") or not shutil.which("gcc"), reason="needs spin and gcc")


def test_the_protocol_holds():
    errors, states = page.check(*BOUNDS)
    assert errors == 0
    assert states > 1_000_000, "the model does not do much any more"


@pytest.mark.parametrize("mutation", page.mutations())
def test_every_guard_is_needed(mutation):
    errors, _ = page.check(*BOUNDS, mutation)
    assert errors > 0
