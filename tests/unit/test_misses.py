# SPDX-License-Identifier: Apache-2.0
"""Replays of recorded traces against a model written anew, and gmemctl's two commands over files and a played gmemd."""

import errno
import json
import struct
import sys
from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmemd import cli, cli_trace, misses, trace
from gmemd.errors import RequestError
from gmemd.policy import POLICIES, Trace, replay
from gmemd.trace import EMPTY, OWNED, RECORD, RESIDENT, WRITE, Recording

KINDS = {name: number for number, name in trace.KINDS.items()}
ALL = sum(1 << KINDS[kind] for kind in misses.USES)
HEADER = {
    "gmemd": "0", "started_ns": 1, "session": None, "device": None,
    "hnodes": [
        {"hnid": 0, "name": "host", "driver": "host", "capacity_bytes": 1 << 30, "policy": "acme"},
        {"hnid": 1, "name": "gpu", "driver": "simgpu", "capacity_bytes": 3 * 4096, "policy": "lru"},
    ],
}  # fmt: skip


def use(page, flags=0, hnid=1, kind="fault", shift=12, session=1, time_ns=0):
    return RECORD.pack(time_ns, page, page << 12, session, hnid, KINDS[kind], shift, flags)


def gone(page, pages=1):
    return RECORD.pack(0, page, pages, 1, 0xFF, KINDS["gone"], 12, 0)


def lru(records, hnid, capacity):
    """(misses, copied in, copied out, dropped) in bytes, of an hnode that keeps what was used last."""
    held, dirty, ever = OrderedDict(), set(), set()  # held: page to size, the oldest first
    missed = copied_in = copied_out = dropped = 0
    size_of = {}

    def leave(page, how):
        nonlocal copied_out, dropped
        size = held.pop(page, 0) or size_of.get(page, 0)
        if page in dirty and how != "gone":
            copied_out += size
        elif how == "evicted":
            dropped += size
        dirty.discard(page)

    def end(page, how):
        if page in held or page in dirty:
            leave(page, how)
        ever.discard(page)

    for _, page, va, _, at, kind, shift, flags in RECORD.iter_unpack(records):
        size = 1 << shift
        if kind == KINDS["gone"]:
            for other in [p for p in set(held) | ever if page <= p < page + va]:
                end(other, "gone")
            continue
        if at != hnid:
            if flags & WRITE or (kind == KINDS["prefetch"] and flags & OWNED):
                end(page, "taken")
            continue
        if page in ever and (flags & EMPTY or size_of[page] != size):
            end(page, "gone")
        if page in held:
            held.move_to_end(page)
        else:
            missed += 1
            if page in ever or not flags & EMPTY:
                copied_in += size
            size_of[page] = size
            while size <= capacity and sum(held.values()) + size > capacity:
                leave(next(iter(held)), "evicted")
            if size <= capacity:
                held[page] = size
        ever.add(page)
        if flags & (WRITE | OWNED):
            dirty.add(page)
        if page not in held:
            leave(page, "evicted")
    return missed, copied_in, copied_out, dropped


USES = st.tuples(
    st.integers(0, 9), st.integers(0, 15), st.sampled_from((1, 1, 1, 0)), st.sampled_from(misses.USES),
    st.sampled_from((12, 12, 16)),
).map(lambda t: use(t[0], t[1], t[2], t[3], t[4]))  # fmt: skip
ENDS = st.tuples(st.integers(0, 9), st.sampled_from((1, 1, 3, 1 << 30))).map(lambda t: gone(*t))


@given(st.lists(st.one_of(USES, USES, USES, ENDS), max_size=120), st.integers(1, 40))
def test_lru_agrees_with_a_model_of_it(records, capacity):
    data = b"".join(records)
    made = Trace.of_records(data, 1, ALL)
    pages = max(1, capacity * 4096 // made.page_bytes)
    got = replay(made, "lru", pages)
    expected = lru(data, 1, pages * made.page_bytes)
    assert (got.misses, got.in_bytes, got.out_bytes, got.dropped_bytes) == expected


@given(st.lists(st.one_of(USES, USES, ENDS), max_size=80))
def test_what_holds_for_all(records):
    data = b"".join(records)
    made = Trace.of_records(data, 1, ALL)
    enough = max(1, made.peak_bytes // made.page_bytes)
    one_size = len({record[30] for record in records if record[28] == 1}) < 2
    for capacity in (1, 3, enough):
        least = replay(made, "opt", capacity).misses
        for name in POLICIES:
            got = replay(made, name, capacity)
            assert made.stays <= got.misses <= len(made)
            assert got.misses >= least or not one_size
            if capacity == enough:
                assert got.misses == made.stays and got.evicted_clean + got.evicted_dirty == 0


def test_records_that_are_none():
    with pytest.raises(ValueError, match="record 1"):
        Trace.of_records(use(1) + use(1, shift=50), 1, ALL)


# ---- reports ----


def recording(*records, **fields):
    return Recording(HEADER, bytearray(b"".join(records)), complete=True, **fields)


def cycle():
    """Four pages on the gpu in turn, which holds three; the host writes one of them once."""
    turns = [use(page, 0 if turn else EMPTY | OWNED, time_ns=10**9 * turn) for turn in range(5) for page in range(4)]
    return recording(*turns[:8], use(2, WRITE, hnid=0), *turns[8:])


def test_a_report():
    made = misses.report(cycle(), policies=("lru", "sieve"), capacities=(3 * 4096, 0.5, 0.75, 1.0))
    assert [hnode["name"] for hnode in made["hnodes"]] == ["host", "gpu"] and made["seconds"] == 4.0
    gpu = made["hnodes"][1]
    assert (gpu["accesses"], gpu["pages"], gpu["stays"], gpu["peak_bytes"]) == (20, 4, 5, 4 * 4096)
    assert gpu["recorded"] == {"misses": 20, "policy": "lru", "capacity_bytes": 3 * 4096}
    rows = {(row["capacity_bytes"] // 4096, row["policy"]): row for row in gpu["results"]}
    assert list(rows) == [(c, name) for c in (3, 2, 4) for name in ("opt", "lru", "sieve")]
    assert rows[3, "lru"]["misses"] == 19, "the host's write made room for one"
    assert rows[2, "lru"]["misses"] == 20 and rows[2, "lru"]["miss_ratio"] == 1.0
    assert rows[4, "lru"]["misses"] == 5 and rows[4, "lru"]["of_opt"] == 1.0
    assert rows[3, "opt"]["misses"] < 19 and rows[3, "opt"]["of_lru"] == rows[3, "opt"]["misses"] / 19
    assert rows[4, "lru"]["in_bytes"] == 4096, "the first four had no content"
    assert rows[4, "lru"]["out_bytes"] == 4096, "to the host, which writes it"
    assert "curves" not in gpu
    assert json.loads(json.dumps(made)) == made


def test_which_hnodes():
    assert misses.choose(cycle(), "gpu") == {1: "gpu"}
    assert misses.choose(Recording({**HEADER, "device": "gpu"}, cycle().records), None) == {1: "gpu"}
    assert misses.choose(recording(use(1, hnid=5)), None) == {5: "hnode 5"}
    with pytest.raises(ValueError, match="'tpu'.*host, gpu"):
        misses.choose(cycle(), "tpu")
    with pytest.raises(ValueError, match="no accesses"):
        misses.choose(recording(gone(1)), "gpu")
    empty = misses.report(recording(), policies=("lru",), capacities=(0.5,))
    assert empty["hnodes"] == [] and empty["records"] == 0


def test_kinds_and_sessions():
    mixed = recording(use(1), use(2, kind="ahead"), use(3, session=2), use(1, RESIDENT))
    count = lambda **which: misses.report(mixed, policies=("lru",), capacities=(1.0,), **which)["hnodes"][0]  # noqa: E731
    assert count()["accesses"] == 4
    assert count(kinds=("fault", "acquire"))["accesses"] == 3
    assert count(session=2)["accesses"] == 1
    assert count(session=1)["recorded"]["misses"] == 2


def test_curves():
    made = Trace.of_records(cycle().records, 1, ALL)
    curves = misses.curves(made, ("lru",))
    assert curves["lru"] == [(4096, 1.0), (8192, 1.0), (12288, 0.95), (16384, 0.25)]
    assert curves["opt"][0][1] <= 1.0 and curves["opt"][-1] == (16384, 0.25)


@pytest.mark.parametrize(
    ("parse", "text", "words"),
    [
        (misses.parse_policies, "lru,mru", "'mru' is unknown: all, or some of acme"),
        (misses.parse_policies, "", "unknown"),
        (misses.parse_capacities, "1G,x", "'x' is not a size"),
        (misses.parse_capacities, "0", "no capacity"),
        (misses.parse_capacities, "0%", "out of range"),
        (misses.parse_capacities, "nan%", "out of range"),
        (misses.parse_capacities, "a%", "no share"),
        (misses.parse_kinds, "fault,gone", "'gone' is unknown: some of fault"),
    ],
)
def test_bad_words(parse, text, words):
    with pytest.raises(ValueError, match=words):
        parse(text)
    assert misses.parse_capacities("1K, 50%,2.5%") == (1024, 0.5, 0.025)
    assert misses.parse_policies("lru,opt,lru") == ("lru", "opt") and misses.parse_policies("all") == POLICIES


# ---- gmemctl trace replay ----


@pytest.fixture
def file(tmp_path):
    path = str(tmp_path / "t.gmt")
    trace.write(path, cycle())
    return path


def ctl(capsys, *argv):
    status = cli.main_gmemctl(["trace", *argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_replay_prints(file, capsys):
    status, out, err = ctl(capsys, "replay", file, "--policy", "lru,static", "--capacity", "75%", "--device", "gpu")
    assert status == 0 and not err
    for word in ("21 records", "gpu: 20 accesses to 4 pages, 16.0 KiB", "20 misses (lru, 12.0 KiB)", "OPT", "static"):
        assert word in out
    assert "host:" not in out and "none" not in out
    status, out, _ = ctl(capsys, "replay", file, "--json")
    made = json.loads(out)
    assert made["file"] == file and len(made["hnodes"][1]["results"]) == 4 * (1 + len(POLICIES))
    assert cli.main_gmemctl(["--json", "trace", "replay", file]) == 0
    assert json.loads(capsys.readouterr().out) == made


def test_replay_draws(file, capsys, tmp_path, monkeypatch):
    picture = tmp_path / "m.png"
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib.figure", None)
        status, _, err = ctl(capsys, "replay", file, "--png", str(picture))
        assert status == 1 and "matplotlib is missing" in err and "gmem[demo]" in err
    pytest.importorskip("matplotlib")
    assert ctl(capsys, "replay", file, "--png", str(picture))[0] == 0
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", picture.read_bytes()[16:24])
    assert width >= 800 and height >= 800
    assert "No such file" in ctl(capsys, "replay", file, "--png", str(tmp_path / "no" / "m.png"))[2]


def test_replay_of_damage(file, capsys):
    with open(file, "r+b") as data:
        data.truncate(data.seek(0, 2) - 60)
    status, out, err = ctl(capsys, "replay", file)
    assert status == 1 and not out
    assert err.startswith(f"gmemctl: {file}: byte ") and "block 0: cut off" in err and "--salvage" in err
    status, out, err = ctl(capsys, "replay", file, "--salvage")
    assert status == 0 and "skipped" in out and "no accesses" in out
    with open(file, "r+b") as data:
        data.write(b"x")
    for flags in ([], ["--salvage"]):
        status, _, err = ctl(capsys, "replay", file, *flags)
        assert status == 1 and "byte 0: this is no trace" in err and "--salvage" not in err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--policy", "mru"], "--policy: 'mru'"), (["--capacity", "1X"], "--capacity: '1X'"),
        (["--kinds", "sneeze"], "--kinds: 'sneeze'"), (["--device", "tpu"], "--device: nothing was used on 'tpu'"),
    ],
)  # fmt: skip
def test_replay_of_bad_arguments(file, capsys, argv, words):
    status, out, err = ctl(capsys, "replay", file, *argv)
    assert status == 2 and words in err and not out
    assert ctl(capsys, "replay", file + "x")[::2] == (1, f"gmemctl: {file}x: No such file or directory\n")


# ---- gmemctl trace record ----


class Played:
    """A gmemd that has these answers; an exception is raised."""

    asked: list = []
    answers: list = []

    def __init__(self, path):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass

    def request(self, op, timeout_s=None, **args):
        self.asked.append((op, args))
        if op == "trace_stop":
            return {}
        refused = isinstance(self.answers[0], RequestError)
        answer = HEADER if op == "trace_start" and not refused else self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def answer(*records, lost=0, running=True):
    return {"records": b"".join(records), "lost": lost, "running": running}


@pytest.fixture
def played(monkeypatch):
    monkeypatch.setattr(cli_trace, "Control", Played)
    Played.asked = []

    def play(*answers):
        Played.answers = list(answers)

    return play


def test_record(played, capsys, tmp_path):
    path = str(tmp_path / "r.gmt")
    played(answer(use(1), use(2)), answer(), answer(use(3), lost=4), answer(lost=4, running=False))
    status, out, _ = ctl(capsys, "record", "-o", path, "--seconds", "0.001", "--session", "3", "--device", "gpu",
                         "--buffer", "1M")  # fmt: skip
    assert status == 0 and "3 records" in out and "4 lost" in out
    assert Played.asked[0] == ("trace_start", {"session": 3, "device": "gpu", "buffer_bytes": 1 << 20})
    assert [args["position"] for op, args in Played.asked if op == "trace_read"] == [0, 2, 2, 3]
    assert [op for op, _ in Played.asked].count("trace_stop") == 1
    got = trace.read(path)
    assert [record.page for record in got] == [1, 2, 3] and (got.lost, got.complete) == (4, True)


def test_a_gmemd_that_goes_away_leaves_a_sound_trace(played, capsys, tmp_path):
    path = str(tmp_path / "r.gmt")
    played(answer(use(1)), TimeoutError("gmemd did not answer trace_read in time"))
    status, out, _ = ctl(capsys, "record", "-o", path, "--seconds", "100")
    assert status == 1 and "not complete: gmemd did not answer" in out
    got = trace.read(path)
    assert len(got) == 1 and not got.complete


def test_a_refusal_leaves_the_file_as_it_was(played, capsys, tmp_path):
    path = tmp_path / "r.gmt"
    path.write_bytes(b"before")
    played(RequestError(errno.EBUSY, "process 5 (x) is recording already"))
    status, _, err = ctl(capsys, "record", "-o", str(path), "--until-signal")
    assert status == 1 and "process 5" in err and "EBUSY" in err
    assert path.read_bytes() == b"before"


def test_a_file_that_can_not_be_written(played, capsys, tmp_path):
    played()
    status, _, err = ctl(capsys, "record", "-o", str(tmp_path / "no" / "r"), "--seconds", "1")
    assert status == 1 and "No such file" in err and not Played.asked
    played(answer(use(1)))
    status, _, err = ctl(capsys, "record", "-o", "/dev/full", "--seconds", "1")
    assert status == 1 and err == "gmemctl: /dev/full: No space left on device; the trace is cut off there\n"


@pytest.mark.parametrize("argv", [["--seconds", "0"], ["--seconds", "nan"], ["--seconds", "1", "--buffer", "4G"],
                                  ["--seconds", "1", "--buffer", "x"]])  # fmt: skip
def test_bad_arguments_of_record(played, capsys, tmp_path, argv):
    played()
    status, _, err = ctl(capsys, "record", "-o", str(tmp_path / "r"), *argv)
    assert status == 2 and argv[-2] in err and not Played.asked


@pytest.mark.parametrize("argv", [[], ["record"], ["record", "-o", "x"], ["replay"], ["record", "--seconds", "1"],
                                  ["record", "-o", "x", "--seconds", "1", "--until-signal"]])  # fmt: skip
def test_usage(argv):
    with pytest.raises(SystemExit) as caught:
        cli.main_gmemctl(["trace", *argv])
    assert caught.value.code == 2
