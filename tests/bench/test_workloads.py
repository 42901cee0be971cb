# SPDX-License-Identifier: Apache-2.0
"""Workloads in tiny sizes: every variant gets it right, a wrong answer is noticed, and rows say what they should."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import rows  # noqa: E402
from workloads import arena, catalogue, paged, pages, pins, plan, results, runner, stores, swap  # noqa: E402
from workloads.runner import BYHAND, HINTS, ONDEMAND, PLAIN, ZRAM, Measured, Setting  # noqa: E402
from workloads.workload import READ, UPDATE, WRITE, Access, Spec, Step, Tile  # noqa: E402

from gmemd import policy  # noqa: E402

PERCENTS = (75, 100, 125, 150, 200, 300)
ON_GMEM = (HINTS, PLAIN, ONDEMAND, BYHAND)


@pytest.fixture(scope="module")
def daemons():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]))
        daemons = runner.Daemons(huge=False)
        yield daemons
        daemons.close()


# ---- the jobs ----


@pytest.mark.parametrize("name", catalogue.WORKLOADS)
def test_every_variant_is_right(daemons, name):
    workload = catalogue.make(name, quick=True)
    measured = runner.run(workload, Setting(200, rounds=1, variants=ON_GMEM), daemons)
    assert [each.variant for each in measured] == [v for v in ON_GMEM if v != HINTS or workload.hints]
    for each in measured:
        assert not each.wrong and each.note is None, (each.variant, each.note)
        assert len(each.seconds) == 1 and each.seconds[0] > 0
    (plain,) = [each for each in measured if each.variant == PLAIN]
    # from a tier comes only what had to leave, perhaps in the round before
    assert plain.counters["d2h_bytes" if workload.where == "host" else "evictions"] > 0, "nothing has overflowed"
    found = results.make_rows(measured, {})
    assert all(set(rows.FIELDS) <= set(row) for row in found)
    assert {row["variant"] for row in found} == {each.variant for each in measured}


@pytest.mark.parametrize("name", ["triad", "kvcache"])
def test_a_throttled_link(daemons, name):
    workload = catalogue.make(name, quick=True)
    measured = runner.run(workload, Setting(200, 2_000_000_000, rounds=1, variants=(PLAIN, BYHAND)), daemons)
    assert not any(each.wrong for each in measured)
    for each in measured:  # no copy may be quicker than the link
        assert sum(each.seconds) >= (each.counters["h2d_bytes"] + each.counters["d2h_bytes"]) / 2e9 * 0.9


@pytest.mark.parametrize("name", catalogue.WORKLOADS)
def test_a_wrong_answer_is_noticed(name):
    workload = catalogue.make(name, quick=True)
    arrays = arena.plain(workload.specs)
    workload.fill(arrays)
    assert workload.check(arrays, 0) is not None, "nothing has been computed yet"
    for step in workload.steps(0):
        step.kernel(*step.views(arrays), *step.args)
    assert workload.check(arrays, 0) is None
    result = arrays[workload.result].reshape(-1)
    kept = result[len(result) // 3].copy()
    for wrong in (kept + 1, np.nan) if result.dtype.kind == "f" else (kept + 1,):
        result[len(result) // 3] = wrong
        assert workload.check(arrays, 0) is not None
    result[len(result) // 3] = kept
    assert workload.check(arrays, 0) is None


def test_a_wrong_answer_is_no_speed():
    each = Measured("triad", "regular", 200, 0, PLAIN, [0.1, 0.2], note="3 elements of a", wrong=True)
    (row, _) = results.make_rows([each], {})
    assert row["value"] is None and row["met"] is None and "3 elements" in row["note"]


# ---- what the policy makes of the pages that they use ----


@pytest.mark.parametrize("name", catalogue.WORKLOADS)
def test_misses_are_no_more_than_those_of_lru(name):
    """Of the jobs in full size: a few dozen huge pages or thousands of small ones. Which of its experts does better is
    learned anew in each trace: those of few pages are long enough for it not to count."""
    workload = catalogue.make(name, quick=False)
    few = sum(spec.held_bytes // spec.page_bytes for spec in workload.specs.values()) < 100
    trace = policy.Trace(*pages.trace(workload, 24 if few else 4))
    for percent in PERCENTS:
        capacity = max(1, trace.working_set * 100 // percent)
        got, lru = (policy.replay(trace, which, capacity).misses for which in (policy.POLICIES[0], "lru"))
        assert got <= 1.05 * lru, (percent, got, lru)


# ---- by hand ----


def steps_over(tiles, rounds, mode=READ):
    return [Step(print, (Access(Tile("x", n, n + 1), mode),)) for _ in range(rounds) for n in range(tiles)]


SPECS = {"x": Spec((64, 4096), np.uint8, 4096)}


def test_a_cycle_copies_no_more_than_it_must():
    made = plan.Plan(steps_over(8, 10), SPECS, 5 * 4096)
    copies = [sum(move.inwards for move in moves.early + moves.late) for moves in made.moves]
    # Belady on a cycle of n pieces with room for m: all but m - 1 a round; one more place is where the next one goes
    assert 8 - 4 <= sum(copies[8:]) / 9 <= 8 - 3


def test_dirty_pieces_come_home_once():
    made = plan.Plan(steps_over(8, 1, UPDATE), SPECS, 3 * 4096)
    out = [move.tile for moves in made.moves for move in moves.early + moves.late if not move.inwards]
    out += [move.tile for move in made.flush()]
    assert sorted(out) == [Tile("x", n, n + 1) for n in range(8)]


def test_what_is_written_whole_is_not_copied_in():
    made = plan.Plan(steps_over(4, 1, WRITE), SPECS, 2 * 4096)
    assert not any(move.inwards for moves in made.moves for move in moves.early + moves.late)


def test_a_part_of_what_is_there_is_found_there():
    whole, part = Access(Tile("x", 0, 4), UPDATE), Access(Tile("x", 1, 2), READ)
    made = plan.Plan([Step(print, (whole,)), Step(print, (part,))], SPECS, 4 * 4096)
    assert made.moves[1].views[0].offset == made.moves[0].views[0].offset + 4096
    assert not made.moves[1].early and not made.moves[1].late


@pytest.mark.parametrize("tier", ["packed0:driver=zstd,algorithm=lz4", "disk0:driver=file,path={}"])
def test_what_is_stored_comes_back(tmp_path, tier):
    rng = np.random.default_rng(0)
    specs = {"x": Spec((1000, 3), np.int64), "noise": Spec((5000,), np.uint8)}
    arrays = {"x": rng.integers(0, 9, (1000, 3)), "noise": rng.integers(0, 256, 5000, np.uint8)}
    store = stores.beside(tier.format(tmp_path), arrays, specs, [Tile("x", 100, 700), Tile("x", 300, 1000)])
    for tile in (Tile("x", 0, 1000), Tile("x", 100, 300), Tile("noise", 0, 5000)):
        want = arrays[tile.array][tile.first : tile.last]
        got = np.empty_like(want)
        store.get(tile, got)
        assert np.array_equal(got, want)
    changed = rng.integers(0, 1 << 60, (600, 3))
    store.put(Tile("x", 100, 700), changed)
    got = np.empty((300, 3), np.int64)
    store.get(Tile("x", 700, 1000), got)
    assert np.array_equal(got, arrays["x"][700:])
    store.get(Tile("x", 300, 700), got := np.empty((400, 3), np.int64))
    assert np.array_equal(got, changed[200:])
    with pytest.raises(ValueError, match="pieces"):
        store.get(Tile("x", 1, 2), got)
    store.close()


def test_a_tier_that_nothing_is_like():
    with pytest.raises(LookupError):
        stores.beside("far0:driver=remote", {}, {}, [])


def test_only_what_is_there_is_copied_in():
    access = Access(Tile("x", 0, 4), UPDATE, Tile("x", 2, 3), Tile("x", 0, 2))
    made = plan.Plan([Step(print, (access,))], SPECS, 4 * 4096)
    assert [move.tile for move in made.moves[0].early] == [Tile("x", 0, 2)]
    assert [move.tile for move in made.flush()] == [Tile("x", 2, 3)]


def test_steps_in_pages():
    specs = {"x": Spec((3 << 19, 2), np.float32), "y": Spec((5000,), np.uint8, 4096)}  # 12 MiB; 5000 bytes
    tile = Tile("x", 1 << 18, 3 << 18)  # 2 to 6 MiB: two pages
    ragged = Tile("x", (1 << 18) - 1, 1 << 18)
    made = paged.step(Step(print, (Access(tile, WRITE), Access(ragged, WRITE), Access(Tile("y", 1, 9), READ))), specs)
    assert [access.mode for access in made.accesses] == [WRITE, WRITE, UPDATE, READ]
    pages_ = [access.tile for access in made.accesses[:2]]
    assert pages_ == [Tile("x", 2 << 20, 4 << 20), Tile("x", 4 << 20, 6 << 20)]
    assert made.accesses[2].tile == Tile("x", 0, 2 << 20) and made.accesses[3].tile == Tile("y", 1, 9)
    assert paged.joined(reversed(pages_)) == [Tile("x", 2 << 20, 6 << 20)]
    assert paged.inside(Tile("y", 1, 4999), specs["y"]) == Tile("y", 4096, 4096)
    assert paged.inside(Tile("y", 0, 5000), specs["y"]) == Tile("y", 0, 5000)


def test_a_step_that_can_not_fit_is_an_error():
    with pytest.raises(ValueError, match="step 0"):
        plan.Plan([Step(print, (Access(Tile("x", 0, 4), READ),))], SPECS, 3 * 4096)


def test_pins_leave_room_for_three_steps():
    kept = pins.choose(steps_over(8, 1), SPECS, 6 * 4096)
    assert len(kept) == 3
    assert all(not pins.others(step, kept).accesses for step in steps_over(3, 1))


# ---- rows ----


def line(slowdowns, variant=PLAIN, name="triad", kind="regular"):
    return [Measured(name, kind, p, 0, variant, [slowdown] * 3) for p, slowdown in slowdowns.items()]


def test_slowdown_is_beside_what_fits():
    found = {row["id"]: row for row in results.make_rows(line({75: 2.0, 100: 2.0, 200: 4.0, 300: 6.0}), {})}
    assert found["triad_linear_plain"]["points"] == {75: 1.0, 100: 1.0, 200: 2.0, 300: 3.0}
    assert found["triad_linear_plain"]["value"] == pytest.approx(0, abs=1e-9) and found["triad_linear_plain"]["met"]
    assert found["triad_step_plain"]["value"] == 2


def test_a_cliff_is_not_linear():
    found = {row["id"]: row for row in results.make_rows(line({75: 1, 100: 1, 125: 9, 150: 9, 200: 9, 300: 9}), {})}
    assert found["triad_linear_plain"]["met"] is False
    assert found["triad_step_plain"]["value"] == 9


def test_speeds_and_their_floors():
    measured = line({200: 0.5}, PLAIN, "kvcache", "skewed") + line({200: 0.25}, BYHAND, "kvcache", "skewed")
    measured += line({200: 1.0}, ONDEMAND, "kvcache", "skewed") + line({200: 0.2}, HINTS, "kvcache", "skewed")
    found = {row["id"]: row for row in results.make_rows(measured, {})}
    assert (found["kvcache_200_plain"]["ratio"], found["kvcache_200_plain"]["target"]) == (0.5, None)
    over = found["kvcache_200_plain_over_ondemand"]
    assert (over["ratio"], over["met"]) == (2, True)
    assert (found["kvcache_200_hints"]["value"], found["kvcache_200_hints"]["met"]) == (5, True)
    assert found["kvcache_200_byhand"]["met"] is None


def test_nobody_is_faster_than_with_memory_for_all_of_it():
    measured = line({75: 0.4, 200: 0.5}, PLAIN, "kvcache", "skewed") + line({200: 0.5}, ONDEMAND, "kvcache", "skewed")
    found = {row["id"]: row for row in results.make_rows(measured, {})}
    assert found["kvcache_200_plain_over_ondemand"]["bound"] == pytest.approx(1.25)
    assert "bound" not in found["kvcache_75_plain_over_ondemand"]


@pytest.mark.parametrize(
    ("link", "bound", "target"), [(0, 1.0, "ratio >= 0.9"), (10**9, 1.0, "ratio >= 0.9"), (10**7, 0.1, None)]
)
def test_what_the_link_allows(link, bound, target):
    measured = [Measured("transformer", "regular", p, link, PLAIN, [1.0]) for p in (100, 200)]
    (row,) = [row for row in results.make_rows(measured, {"transformer": 10**8}) if "bound" in row]
    assert (row["bound"], row["target"]) == (bound, target)


# ---- swap, and the whole program ----


def test_swap_is_taken_down():
    before = Path("/proc/swaps").read_text(), sorted(Path("/dev").glob("zram*"))
    workload = catalogue.make("numpy_random", quick=True)
    seconds, note, wrong = swap.measure(workload, 200, 1)
    assert not wrong
    assert len(seconds) == 1 if note is None else note.startswith("not available")
    assert (Path("/proc/swaps").read_text(), sorted(Path("/dev").glob("zram*"))) == before
    assert not list(Path("/sys/fs/cgroup").glob(f"**/gmem-workloads-{os.getpid()}"))


def test_swap_that_can_not_be_had_says_so(monkeypatch):
    monkeypatch.setattr(swap, "CONTROL", Path("/nowhere"))
    seconds, note, wrong = swap.measure(catalogue.make("numpy", quick=True), 200, 1)
    assert seconds == [] and note is not None and note.startswith("not available") and not wrong
    (row,) = results.make_rows([Measured("numpy", "regular", 200, 0, ZRAM, seconds, note=note)], {})
    assert row["value"] is None and row["note"] == note and rows.verdict(row) == "not measured"


def test_the_program(tmp_path):
    out = tmp_path / "deep" / "workloads.json"
    command = [sys.executable, str(HERE / "workloads"), "--quick", "--only", "transformer", "--link", "0"]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert set(report) == {"machine", "rows"}
    ids = {row["id"] for row in report["rows"]}
    assert {"transformer_75_hints", "transformer_200_plain", "transformer_200_ondemand"} <= ids
    assert all(row["value"] > 0 for row in report["rows"] if not row["note"])
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "by hand" in done.stdout
