# SPDX-License-Identifier: Apache-2.0
"""The state machine finds faults that are planted into the core; here one, by `make model` every one."""

import os
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
import mutants  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not shutil.which("gcc") or not mutants.OBJECTS.exists(), reason="needs gcc and `make build`"),
    pytest.mark.skipif(not os.access("/dev/userfaultfd", os.R_OK | os.W_OK), reason="needs /dev/userfaultfd"),
]


@pytest.mark.parametrize("name", ["forgets_accounts_at_an_eviction"])
def test_a_mutant_is_found(name):
    assert not mutants.survives(name, None, 40)


@pytest.mark.parametrize("name", sorted(mutants.MUTANTS))
def test_the_guard_is_still_there(name):
    mutant = mutants.MUTANTS[name]
    assert (mutants.ROOT / mutant.file).read_text().count(mutant.guard) == 1
