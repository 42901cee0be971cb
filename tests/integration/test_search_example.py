# SPDX-License-Identifier: Apache-2.0
"""client/examples/search, small: what it reports, and that it fails when its checks do."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SEARCH = ROOT / "client/examples/search"
SMALL = ["--texts", "150", "--batch-tokens", "1024", "--sample", "64", "--hits", "2"]
PAGE = 2 << 20

# Runs the program with one byte of the weights changed behind its back.
CORRUPTED = """
import runpy, sys
import gmem
real = gmem.from_file
def corrupted(path, **options):
    data = real(path, **options)
    data[OFFSET] ^= 0x40
    return data
gmem.from_file = corrupted
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def search(out: Path, *arguments: str, corrupt: int | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SEARCH)]
    if corrupt is not None:
        command = [sys.executable, "-c", CORRUPTED.replace("OFFSET", str(corrupt)), str(SEARCH)]
    command += [*arguments, "--out", str(out)]
    return subprocess.run(command, capture_output=True, text=True, timeout=110, stdin=subprocess.DEVNULL)


def test_model_three_times_the_device(tmp_path):
    done = search(tmp_path, *SMALL, "--hbm", "32M", "--query", "sort a list of numbers")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["ok"] is True and report["failures"] == []
    assert report["texts"] == 150 and report["verified_texts"] >= 64
    assert report["max_abs_diff"] <= 1e-5
    assert report["weights_intact"] is True and report["weight_pages"] == -(-report["weight_bytes"] // PAGE)
    assert report["weight_bytes"] > 2 * report["hbm_capacity_bytes"] == 64 << 20
    assert 0 < report["hbm_peak_bytes"] <= report["hbm_capacity_bytes"]
    # Each page is read once a batch, and most of them have left again by then.
    assert report["evictions"] > report["weight_pages"]
    # The weights come from their file straight to the device: only activations take the way over the host.
    assert report["h2d_bytes"] > 0 and report["d2h_bytes"] > 0
    assert report["device_faults"] > report["weight_pages"] and report["host_faults"] > 0
    assert report["texts_per_s"] > 0 and report["texts_per_s_plain"] > 0
    assert report["answers"]["parse command line options"][0]["name"] in ("getopt", "argparse", "optparse")
    assert len(report["answers"]) == 6
    assert "sort a list of numbers" in done.stdout and "150/150 texts" in done.stdout
    assert str(tmp_path / "report.json") in done.stdout.replace("\n", "")
    assert (tmp_path / "pagemap.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("offset", "differs"), [(60_000_000, False), (60_000_003, True)])
def test_a_changed_weight_is_found(tmp_path, offset, differs):
    """The low byte of a float, which changes the results by next to nothing, and its exponent."""
    done = search(tmp_path, *SMALL, corrupt=offset)
    assert done.returncode == 1, done.stdout + done.stderr
    failures = [line for line in done.stderr.splitlines() if line.startswith("search: FAILED: ")]
    assert f"the first is page {offset // PAGE} ({PAGE} bytes each), at byte {offset} of the file" in failures[-1]
    assert any("plain NumPy" in line for line in failures) is differs
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["ok"] is False and report["weights_intact"] is False
    assert len(report["failures"]) == len(failures)


def test_a_device_smaller_than_a_page_is_refused(tmp_path):
    done = search(tmp_path, *SMALL, "--hbm", "2000")
    assert done.returncode == 1
    assert "search: FAILED: " in done.stderr and "capacity" in done.stderr
    assert not (tmp_path / "report.json").exists()


@pytest.mark.parametrize("arguments", [["--texts", "0"], ["--texts", "x"], ["--batch", "-1"], ["--nonsense"]])
def test_bad_arguments(tmp_path, arguments):
    done = search(tmp_path, *arguments)
    assert done.returncode == 2 and arguments[0] in done.stderr
