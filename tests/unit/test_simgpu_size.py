# SPDX-License-Identifier: Apache-2.0
"""The yardstick of the driver ABI: a simulated GPU in under 70 lines, MMU functions aside (pmap.c has those)."""

import re
from pathlib import Path

DRIVER = Path(__file__).resolve().parents[2] / "csrc" / "drivers" / "simgpu.c"


def code_lines(source: str) -> list[str]:
    source = re.sub(r"/\*.*?\*/", "", source, flags=re.DOTALL)
    return [line for line in source.splitlines() if line.strip()]


def test_simgpu_is_under_70_lines():
    lines = [line for line in code_lines(DRIVER.read_text()) if "pmap" not in line]
    assert len(lines) < 70
    assert any("simgpu_copy" in line for line in lines) and max(map(len, lines)) <= 120
