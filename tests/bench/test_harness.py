# SPDX-License-Identifier: Apache-2.0
"""The harness itself: what rows say, what results.json looks like, and that the program measures what it claims to."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import control  # noqa: E402
import machine  # noqa: E402
import rows  # noqa: E402


def load_main():
    spec = importlib.util.spec_from_file_location("gmem_bench_main", HERE / "__main__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def program() -> Path:
    return load_main().build()


def lines_of(program: Path, *prefixes: str) -> list[dict]:
    done = subprocess.run([program, *prefixes], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_ratio_is_the_median_of_ratios_not_the_ratio_of_medians():
    row = rows.make_row("r", "us", "ratio <= 1.9", [(10, 5), (30, 20), (12, 2)])
    assert (row["value"], row["floor"], row["ratio"]) == (12, 5, 2)
    assert row["met"] is False  # 12 / 5 would be missed as well, 30 / 20 would not


@pytest.mark.parametrize(
    ("target", "value", "ratio", "met"),
    [
        ("ratio <= 1.15", 99, 1.15, True),
        ("ratio <= 1.15", 1, 1.16, False),
        ("ratio >= 0.75", 1, 0.75, True),
        ("ratio >= 0.75", 99, 0.74, False),
        ("value <= 16", 16, 99, True),
        ("value <= 16", 16.1, None, False),
        ("ratio <= 1.15", 1, None, None),
        (None, 1, 1, None),
    ],
)
def test_met(target, value, ratio, met):
    assert rows.is_met(target, value, ratio) is met


@pytest.mark.parametrize("target", ["speed <= 2", "ratio < 2"])
def test_a_target_that_is_not_understood_is_an_error(target):
    with pytest.raises(ValueError, match="target"):
        rows.is_met(target, 1, 1)


def test_not_measured_is_never_met():
    row = rows.make_row("r", "us", "ratio <= 99", [], note="no huge pages")
    assert [row[name] for name in ("value", "floor", "ratio", "met")] == [None] * 4
    assert rows.verdict(row) == "not measured"


def test_a_floor_missing_in_one_repetition_gives_no_ratio():
    row = rows.make_row("r", "us", "ratio <= 99", [(1, 1), (1, 0)])
    assert (row["value"], row["ratio"], row["met"]) == (1, None, None)


def test_the_program_and_the_harness_agree(program):
    lines = lines_of(program, "lpt_", "concurrent_")
    assert len(lines) == 7
    for line in lines:
        row = load_main().row_of(json.dumps(line))
        for name in rows.FIELDS:
            if isinstance(row[name], float):
                assert line[name] == pytest.approx(row[name], rel=1e-6), (line["id"], name)
            else:
                assert line[name] == row[name], (line["id"], name)


def test_the_bare_floor_is_a_fault_and_not_a_memory_access(program):
    by_id = {line["id"]: line for line in lines_of(program, "fault_isolated_4k", "fault_storm_4k")}
    isolated, storm = by_id["fault_isolated_4k_p50"], by_id["fault_storm_4k"]
    # An access to mapped memory takes far less than a microsecond; a fault that two processes take part in does not.
    assert 3 < isolated["floor"] < 1000
    assert 3 < isolated["value"] < 1000
    assert 3 < storm["floor"] < isolated["floor"]
    assert len(isolated["repetitions"]) >= 5


def test_only_prints_what_was_asked_for(program):
    assert [line["id"] for line in lines_of(program, "lpt_bytes_per_page_1g")] == ["lpt_bytes_per_page_1g"]
    assert lines_of(program, "no_such_row") == []


def test_results_file(tmp_path):
    out = tmp_path / "deep" / "results.json"
    command = [sys.executable, str(HERE), "--only", "lpt_bytes", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    assert set(results) == {"machine", "rows"}
    assert {"kernel", "cpus", "memory_bytes", "huge_pages", "uffd_features"} <= set(results["machine"])
    assert [row["id"] for row in results["rows"]] == ["lpt_bytes_per_page_1g", "lpt_bytes_per_page_4t"]
    assert all(set(rows.FIELDS) <= set(row) for row in results["rows"])
    assert "lpt_bytes_per_page_4t" in done.stdout


def test_an_unknown_row_is_an_error(tmp_path):
    command = [sys.executable, str(HERE), "--only", "nonsense", "--out", str(tmp_path / "results.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert "nonsense" in done.stderr
    assert not list(tmp_path.iterdir())


def test_machine_facts():
    facts = machine.facts()
    assert facts["cpus"] >= 1
    assert facts["memory_bytes"] > facts["memory_available_bytes"] > 0
    if Path("/dev/userfaultfd").exists():
        assert "minor_shmem" in facts["uffd_features"]


def test_the_echo_answers_as_gmemd_would():
    bare = control.Echo()
    try:
        first, second = bare.call(), bare.call()
        assert first["ok"] is True
        assert second["id"] == first["id"] + 1
    finally:
        bare.close()
