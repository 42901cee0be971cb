# SPDX-License-Identifier: Apache-2.0
"""Checks page.pml with spin: the protocol holds, and without any one of its guards it does not.

usage: page.py [--crashes N] [--evictions N] [--accesses N]. Needs spin and gcc; ends with one line for each variant."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

MODEL = Path(__file__).resolve().with_name("page.pml")
MEMORY_MIB = 4096


def mutations() -> list[str]:
    return sorted(set(re.findall(r"#if(?:n?def) (WITHOUT_\w+)", MODEL.read_text())))


def check(*defines: str) -> tuple[int, int]:
    """(errors, states) of the exhaustive search."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [f"-D{define}" for define in defines]
        subprocess.run(["spin", *flags, "-a", str(MODEL)], cwd=folder, check=True, capture_output=True)
        compile_flags = ["-O2", "-w", "-DSAFETY", "-DCOLLAPSE", f"-DMEMLIM={MEMORY_MIB}"]
        subprocess.run(["gcc", *compile_flags, "pan.c", "-o", "pan"], cwd=folder, check=True)
        done = subprocess.run(["./pan", "-m200000", "-n"], cwd=folder, capture_output=True, text=True)
    found = re.search(r"errors: (\d+)", done.stdout)
    states = re.search(r"([\d.e+]+) states, stored", done.stdout)
    if found is None or states is None or "out of memory" in done.stdout or "max search depth too small" in done.stdout:
        raise RuntimeError(f"the search did not end: {done.stdout[-2000:]}{done.stderr}")
    return int(found[1]), int(float(states[1]))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--crashes", type=int, default=1)
    parser.add_argument("--evictions", type=int, default=1)
    parser.add_argument("--accesses", type=int, default=2, help="of each accessor")
    args = parser.parse_args()
    bounds = [f"CRASHES={args.crashes}", f"EVICTIONS={args.evictions}", f"ACCESSES={args.accesses}"]
    if not shutil.which("spin"):
        print("spin is not installed: apt-get install spin", file=sys.stderr)
        return 2
    bad = 0
    for mutation in [None, *mutations()]:
        errors, states = check(*bounds, *([mutation] if mutation else []))
        as_it_must_be = bool(errors) == bool(mutation)
        bad += not as_it_must_be
        name = mutation or "the protocol"
        print(f"{name}: {'holds' if not errors else 'fails'}, {states} states{'' if as_it_must_be else '  <-- WRONG'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
