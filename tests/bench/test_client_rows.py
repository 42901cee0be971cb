# SPDX-License-Identifier: Apache-2.0
"""Rows that a real client measures: the loops they are timed with, the huge pages they borrow, the program itself."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import client_rows as client  # noqa: E402
import hugepages  # noqa: E402
import loops  # noqa: E402

PAGE = 4096
PAGES = 64


@pytest.fixture(scope="module")
def probe(tmp_path_factory) -> Path:
    return client.build(tmp_path_factory.mktemp("probe"))


@pytest.fixture
def library(probe):
    return loops.load(str(probe))


@pytest.fixture
def memory():
    """Address of shared memory; the mapping stays alive with the buffer that is taken of it."""
    mapping = mmap.mmap(-1, PAGES * PAGE)
    return mapping, ctypes.addressof(ctypes.c_char.from_buffer(mapping))


def test_faults_touches_every_page_of_both_ranges_once_a_round(library, memory):
    ours, at = memory
    other = mmap.mmap(-1, PAGES * PAGE)
    bare = ctypes.addressof(ctypes.c_char.from_buffer(other))
    times = [(ctypes.c_uint64 * (3 * PAGES))() for _ in range(2)]
    library.probe_faults(at, bare, PAGE, PAGES, 3, 0, *(ctypes.addressof(t) for t in times))
    assert [ours[i * PAGE] for i in range(PAGES)] == [3] * PAGES
    assert [other[i * PAGE] for i in range(PAGES)] == [3] * PAGES
    assert all(t > 0 for t in (*times[0], *times[1]))


@pytest.mark.parametrize("write", [True, False])
def test_touches_writes_only_when_asked(library, memory, write):
    mapping, at = memory
    times = (ctypes.c_uint64 * PAGES)()
    total = library.probe_touches(at, PAGE, PAGES, write, 1, ctypes.addressof(times))
    assert [mapping[i * PAGE] for i in range(PAGES)] == [int(write)] * PAGES
    assert total == sum(times) > 0


@pytest.mark.parametrize("nap_us", [0, 1])
def test_copies_copies_all_of_it(library, memory, nap_us):
    source, src = memory
    source[:] = os.urandom(PAGES * PAGE)
    target = mmap.mmap(-1, PAGES * PAGE)
    times = (ctypes.c_uint64 * PAGES)()
    dst = ctypes.addressof(ctypes.c_char.from_buffer(target))
    assert library.probe_copies(dst, src, PAGE, PAGES, nap_us, ctypes.addressof(times)) == sum(times)
    assert target[:] == source[:]


def test_rows_have_targets_in_the_form_that_is_understood():
    for id, (unit, target, floor_is) in client.ROWS.items():
        assert id.startswith("client_") and floor_is
        assert unit in ("us", "GB/s")
        assert target is None or re.fullmatch(r"(ratio|value) [<>]= \d+(\.\d+)?", target)


def test_percentile_is_of_the_ordered_values():
    values = list(range(100, 0, -1))
    assert (client.percentile(values, 50), client.percentile(values, 99)) == (51, 100)
    assert client.percentile([7], 99) == 7


def test_the_middle_of_a_stream_is_its_mean():
    assert client.middle([0, 0, 9], "stream") == 3
    assert client.middle([0, 0, 9], "isolated") == 0


# ---- huge pages; a plain file stands for the setting, the machine's own is changed by the last test only ----


@pytest.fixture
def setting(tmp_path, monkeypatch) -> Path:
    file = tmp_path / "nr_overcommit_hugepages"
    file.write_text("3\n")
    monkeypatch.setattr(hugepages, "SETTING", file)
    return file


def test_overcommit_is_raised_and_restored(setting):
    with hugepages.overcommit(8) as can:
        assert can and setting.read_text() == "8"
    assert setting.read_text() == "3"


def test_overcommit_that_suffices_is_left_alone(setting):
    with hugepages.overcommit(2) as can:
        assert can and setting.read_text() == "3\n"
    assert setting.read_text() == "3\n"


def test_overcommit_is_restored_after_an_error_and_so_are_handlers(setting):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), hugepages.overcommit(8):
        _ = 1 / 0
    assert setting.read_text() == "3"
    assert signal.getsignal(signal.SIGTERM) is before


def test_overcommit_without_the_setting_says_so(setting):
    setting.unlink()
    with hugepages.overcommit(8) as can:
        assert can is False


def test_overcommit_that_may_not_be_written_says_so(setting, monkeypatch):
    def refuse(_path: Path, _text: str) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refuse)
    with hugepages.overcommit(8) as can:
        assert can is False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_overcommit_is_restored_when_the_process_is_asked_to_end(setting, number):
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); import hugepages; from pathlib import Path\n"
        "hugepages.SETTING = Path(sys.argv[2])\n"
        "with hugepages.overcommit(8):\n    print('raised', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, HERE, setting], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "raised\n"
        assert setting.read_text() == "8"
        process.send_signal(number)
        assert process.wait(20) == 128 + number
    assert setting.read_text() == "3"


# ---- the program ----


def test_nothing_is_run_for_rows_of_others(tmp_path):
    assert client.measure(tmp_path, ["fault_isolated"]) == ([], True)
    assert not list(tmp_path.iterdir())


def test_a_gmem_that_can_not_be_connected_is_not_measured(tmp_path, monkeypatch):
    (tmp_path / "gmem.py").write_text("raise ImportError('broken on purpose')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    measured, ended_well = client.measure(tmp_path, ["client_d2h_isolated_4k"])
    assert ended_well
    assert [row["id"] for row in measured] == ["client_d2h_isolated_4k"]
    assert measured[0]["value"] is measured[0]["met"] is None
    assert "broken on purpose" in measured[0]["note"]


def test_rows_of_a_real_client(tmp_path):
    pytest.importorskip("gmem", exc_type=ImportError)
    measured, ended_well = client.measure(tmp_path, ["client_fault_isolated_4k", "client_h2d_isolated_4k"])
    by_id = {row["id"]: row for row in measured}
    assert ended_well
    assert set(by_id) == {"client_fault_isolated_4k_p50", "client_fault_isolated_4k_p99", "client_h2d_isolated_4k"}
    fault = by_id["client_fault_isolated_4k_p50"]
    assert len(fault["repetitions"]) >= 5
    # Two processes take part in a fault; an access to mapped memory would take far less than a microsecond.
    assert 2 < fault["floor"] < 2000
    assert 2 < fault["value"] < 2000
    move = by_id["client_h2d_isolated_4k"]
    assert 0 < move["value"] < move["floor"]  # a page can't be moved faster than it is copied
