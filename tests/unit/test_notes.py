# SPDX-License-Identifier: Apache-2.0
import errno
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmemd import notes
from gmemd.notes import Notes


@pytest.fixture
def fd():
    fd = Notes.new_file()
    yield fd
    os.close(fd)


def test_the_next_one_finds_what_was_put(fd):
    first = Notes(fd)
    first.put("sessions", 5, {"token": b"\0" * 32, "uid": 1})
    first.put("sessions", 6, {"token": b"\1" * 32, "uid": 2})
    first.put("devices", "a", {"hnid": 1})
    first.drop("sessions", 5)
    first.drop("sessions", 99)
    second = Notes(fd)
    assert second.table("sessions") == {6: {"token": b"\1" * 32, "uid": 2}}
    assert second.table("devices") == {"a": {"hnid": 1}} and second.table("other") == {}
    second.put("devices", "b", {"hnid": 2})
    assert Notes(fd).table("devices").keys() == {"a", "b"}


def test_without_a_descriptor_it_is_only_a_table():
    table = Notes()
    table.put("x", 1, {"a": 1})
    assert table.table("x") == {1: {"a": 1}}


@given(cut=st.integers(0, 200), count=st.integers(1, 5))
def test_a_write_that_was_cut_short_leaves_the_state_before(cut, count):
    """As a kill between any two bytes would."""
    fd = Notes.new_file()
    try:
        table = Notes(fd)
        for n in range(count):
            table.put("t", n, {"value": n})
        before = table.table("t")
        written = []
        real = os.pwrite
        left = cut

        def pwrite(fd, data, offset):
            nonlocal left
            part = bytes(data)[:left]
            left -= len(part)
            written.append(real(fd, part, offset) if part else 0)
            return len(data)

        notes.os.pwrite = pwrite
        try:
            table.put("t", count, {"value": count})
        finally:
            notes.os.pwrite = real
        after = table.table("t")
        assert Notes(fd).table("t") in (before, after)
    finally:
        os.close(fd)


def test_notes_of_another_version_are_refused_and_left(fd):
    Notes(fd).put("t", 1, {"value": 1})
    half = next(half for half in (0, 1) if os.pread(fd, 8, half * notes._HALF) == b"gmnotes1")
    os.pwrite(fd, b"gmnotes2", half * notes._HALF)
    before = os.pread(fd, 4096, half * notes._HALF)
    with pytest.raises(OSError, match="another version") as refusal:
        Notes(fd)
    assert refusal.value.errno == errno.EPROTO
    assert os.pread(fd, 4096, half * notes._HALF) == before
    os.pwrite(fd, b"gmnotes1", half * notes._HALF)
    assert Notes(fd).table("t") == {1: {"value": 1}}


def test_rubbish_is_not_read(fd):
    os.pwrite(fd, os.urandom(4096), 0)
    os.pwrite(fd, os.urandom(4096), notes._HALF)
    assert Notes(fd).table("sessions") == {}
