# SPDX-License-Identifier: Apache-2.0
"""kill.py for a while; `make test-kill N=1000` for longer."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.mark.timeout(180)
def test_nothing_is_lost_whatever_kills_the_daemon():
    seed = os.environ.get("GMEM_KILL_SEED", "1")
    command = [sys.executable, str(HERE / "kill.py"), "--seconds", "20", "--seed", seed]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    last = done.stdout.splitlines()[-1:]
    found = re.fullmatch(r"kills=(\d+) lost=(\d+) longest_stall_s=([\d.]+)", last[0] if last else "")
    assert found, done.stdout + done.stderr
    print(last[0])
    assert done.returncode == 0 and found[2] == "0", done.stdout
    assert int(found[1]) >= 10, "it was hardly killed at all"
