# SPDX-License-Identifier: Apache-2.0
"""The file of a trace: what is written is read; whatever happens to it, it is refused, or read for what is sound."""

import io
import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmemd import trace
from gmemd.trace import RECORD, RECORD_BYTES, Recording, TraceError, Writer

HEADER = {
    "gmemd": "0", "started_ns": 1, "session": None, "device": None,
    "hnodes": [{"hnid": 0, "name": "host", "driver": "host", "capacity_bytes": 1 << 30, "policy": "acme"}],
}  # fmt: skip


def records(count, first=0):
    return b"".join(RECORD.pack(i, i, 4096 * i, 1, 0, 1, 12, i % 2) for i in range(first, first + count))


def made(blocks=(3, 1, 5), lost=0, complete=True):
    """The bytes of a file, and where its pieces begin: the blocks, the end, behind it."""
    file = io.BytesIO()
    writer = Writer(file, HEADER)
    starts, first = [], 0
    for count in blocks:
        starts.append(file.tell())
        writer.add(records(count, first), lost)
        first += count
    starts.append(file.tell())
    writer.close(complete)
    return file.getvalue(), [*starts, file.tell()]


def read(tmp_path, data, salvage=False):
    path = tmp_path / "t.gmt"
    path.write_bytes(data)
    return trace.read(str(path), salvage)


def pages(recording):
    return [record.page for record in recording]


def test_what_is_written_is_read(tmp_path):
    data, _ = made(lost=7)
    got = read(tmp_path, data)
    assert got.header == HEADER and got.hnodes()[0]["name"] == "host"
    assert (len(got), got.lost, got.complete, got.skipped) == (9, 7, True, [])
    assert pages(got) == list(range(9))
    third = list(got)[3]
    assert third._asdict() == {
        "time_ns": 3, "page": 3, "va": 12288, "session": 1, "hnid": 0, "kind": "fault", "page_bytes": 4096,
        "write": True, "resident": False, "empty": False, "owned": False,
    }  # fmt: skip
    trace.write(str(tmp_path / "again"), got)
    assert trace.read(str(tmp_path / "again")) == got


def test_a_trace_without_records_and_one_that_was_interrupted(tmp_path):
    assert len(read(tmp_path, made(())[0])) == 0
    got = read(tmp_path, made((2,), complete=False)[0])
    assert len(got) == 2 and not got.complete


def test_long_batches_become_several_blocks(tmp_path):
    count = 2 * trace.BLOCK_RECORDS_MAX + 5
    data, starts = made((count,))
    assert data.count(trace.BLOCK) == 3
    assert pages(read(tmp_path, data)) == list(range(count))


def reseal(data, at, change):
    """A block at `at` after a change of its records that its checksum agrees with."""
    block = bytearray(data[at:])
    change(block)
    count = struct.unpack_from("<I", block, 12)[0]
    end = 24 + count * RECORD_BYTES
    struct.pack_into("<I", block, 4, zlib.crc32(block[8:end]))
    return data[:at] + bytes(block)


@pytest.mark.parametrize(
    ("damage", "words", "sound"),
    [
        (lambda d, s: b"", "empty", None),
        (lambda d, s: b"RIFF" + d, "no trace", None),
        (lambda d, s: d[:9], "header is cut off", None),
        (lambda d, s: d[:30], "header is cut off", None),
        (lambda d, s: d[:8] + b"\x02\0" + d[10:], "byte 8: version 2", None),
        (lambda d, s: d[:10] + b"\x40\0" + d[12:], "sizes make no sense", None),
        (lambda d, s: d[:24] + b"!" + d[25:], "header's checksum", None),
        (lambda d, s: d[: s[1] + 30], "block 1: cut off: 26 bytes", [0, 1, 2]),
        (lambda d, s: d[: s[1] + 10], "block 1: cut off", [0, 1, 2]),
        (lambda d, s: d[: s[3]], "block 3: the file ends here", list(range(9))),
        (lambda d, s: d[: s[3] + 5], "block 3: the end is cut off", list(range(9))),
        (lambda d, s: d[: s[1] + 40] + b"\xff" + d[s[1] + 41 :], "block 1: the checksum", [0, 1, 2, 4, 5, 6, 7, 8]),
        (lambda d, s: d[: s[1]] + b"JUNK" + d[s[1] :], "block 1: neither", list(range(9))),
        (lambda d, s: d[: s[1]] + d[s[2] :], "block 1: missing: number 2", [0, 1, 2, 4, 5, 6, 7, 8]),
        (lambda d, s: d[: s[2]] + d[s[3] :], "block 2: missing: there were 3", [0, 1, 2, 3]),
        (lambda d, s: d[: s[2]] + d[s[1] :], "block 2: number 1 comes again", list(range(9))),
        (lambda d, s: d[: s[3] + 20] + b"\xff" + d[s[3] + 21 :], "the end's checksum", list(range(9))),
        (lambda d, s: d + b"more", "more behind the end", list(range(9))),
        (
            lambda d, s: reseal(d, s[1], lambda b: b.__setitem__(24 + 29, 9)),
            "block 1: record 0 is no access",
            [0, 1, 2, 4, 5, 6, 7, 8],
        ),
        (
            lambda d, s: d[: s[1] + 12] + b"\xff\xff\xff\x7f" + d[s[1] + 16 :],
            "2147483647 records",
            [0, 1, 2, 4, 5, 6, 7, 8],
        ),
    ],
)  # fmt: skip
def test_damage_is_refused_and_salvaged(tmp_path, damage, words, sound):
    whole, starts = made()
    data = damage(whole, starts)
    with pytest.raises(TraceError, match=words) as caught:
        read(tmp_path, data)
    assert str(caught.value).startswith(f"{tmp_path}/t.gmt: byte {caught.value.at}: ")
    if sound is None:
        with pytest.raises(TraceError, match=words):
            read(tmp_path, data, salvage=True)
        return
    got = read(tmp_path, data, salvage=True)
    assert pages(got) == sound
    assert got.skipped and all(0 <= gap.at <= len(data) and gap.at + gap.bytes <= len(data) for gap in got.skipped)


def header_of(text):
    head = struct.pack("<8sHHI", trace.MAGIC, 1, 32, len(text))
    return head + struct.pack("<I", zlib.crc32(text, zlib.crc32(head))) + text


@pytest.mark.parametrize("text", [b"{", b"[]", b'{"hnodes": 3}', b'{"hnodes": [{"hnid": "a"}]}', b"\xff"])
def test_headers_that_say_nothing(tmp_path, text):
    with pytest.raises(TraceError, match="header"):
        read(tmp_path, header_of(text))


@given(
    blocks=st.lists(st.integers(1, 6), max_size=5),
    edits=st.lists(st.tuples(st.sampled_from(("flip", "cut", "drop", "insert")), st.integers(0, 1 << 20),
                             st.integers(0, 255), st.integers(1, 80)), min_size=1, max_size=4),
)  # fmt: skip
@settings(max_examples=300)
def test_whatever_happens_to_a_file(tmp_path_factory, blocks, edits):
    whole, _ = made(tuple(blocks))
    data = bytearray(whole)
    for kind, where, value, length in edits:
        where %= len(data) + 1
        if kind == "flip" and where < len(data):
            data[where] ^= value
        elif kind == "cut":
            del data[where:]
        elif kind == "drop":
            del data[where : where + length]
        elif kind == "insert":
            data[where:where] = bytes([value]) * length
    directory = tmp_path_factory.mktemp("t")
    if bytes(data) == whole:
        assert pages(read(directory, data)) == list(range(sum(blocks)))
        return
    with pytest.raises(TraceError):
        read(directory, data)
    try:
        got = read(directory, data, salvage=True)
    except TraceError as error:
        assert "block" not in error.what  # the header
        return
    # What is salvaged are blocks of the original, whole and in order.
    assert got.skipped
    left, first = iter(blocks), 0
    numbers = pages(got)
    while numbers:
        count = next(left)
        if numbers[0] == first:
            assert numbers[:count] == list(range(first, first + count))
            numbers = numbers[count:]
        first += count


def test_a_recording_of_nothing_is_sound(tmp_path):
    trace.write(str(tmp_path / "t"), Recording(HEADER))
    assert not len(trace.read(str(tmp_path / "t")))
