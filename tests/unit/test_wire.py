# SPDX-License-Identifier: Apache-2.0
"""wire.py against gmem_wire.h itself, and against messages that nobody honest sends."""

import errno
import os
import re
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmemd import wire
from gmemd.errors import RequestError

HEADER = Path(__file__).resolve().parents[2] / "client" / "include" / "gmem_wire.h"


@pytest.fixture(scope="module")
def from_c(tmp_path_factory):
    """Sizes, offsets and constants as the C compiler has them."""
    directory = tmp_path_factory.mktemp("wire")
    names = re.findall(r"\b(GMEM_WIRE_[A-Z_]+)\b(?=\s+\d|\s+\(|\s+=|\s+0x)", HEADER.read_text())
    prints = [f'printf("{name} %llu\\n", (unsigned long long){name});' for name in dict.fromkeys(names)]
    prints += [f'printf("{name} %zu\\n", sizeof(struct gmem_wire_{name}));' for name in wire.SIZES]
    for field in ("token", "control", "events", "message", "hnid", "region_count", "small_base"):
        prints.append(f'printf("at_{field} %zu\\n", offsetof(struct gmem_wire_welcome, {field}));')
    source = directory / "t.c"
    source.write_text(
        f'#include <stddef.h>\n#include <stdio.h>\n#include "{HEADER}"\nint main(void){{{"".join(prints)}return 0;}}\n'
    )
    subprocess.run(["gcc", "-o", directory / "t", source], check=True)
    lines = subprocess.run([directory / "t"], check=True, capture_output=True, text=True).stdout.splitlines()
    return {name: int(value) for name, value in (line.split() for line in lines)}


def test_layout_is_that_of_the_header(from_c):
    assert {name: from_c[name] for name in wire.SIZES} == wire.SIZES
    welcome = wire.pack_welcome(
        wire.Welcome(
            region_count=0x01020304,
            hnid=5,
            small=(0xABCDEF, 0),
            token=b"T" * 32,
            control="CC",
            events="EE",
            message="MM",
        )
    )
    for field, raw in (
        ("token", b"T" * 32),
        ("control", b"CC\0"),
        ("events", b"EE\0"),
        ("message", b"MM\0"),
        ("hnid", b"\5\0\0\0"),
        ("region_count", b"\4\3\2\1"),
        ("small_base", b"\xef\xcd\xab\0"),
    ):
        at = from_c[f"at_{field}"]
        assert welcome[at : at + len(raw)] == raw, field


def test_constants_are_those_of_the_header(from_c):
    checked = 0
    for name, value in from_c.items():
        mine = getattr(wire, name.removeprefix("GMEM_WIRE_"), None)
        if name.startswith("GMEM_WIRE_") and mine is not None:
            assert mine == value, name
            checked += 1
    assert checked >= 18


def test_round_trips():
    hello = wire.unpack_hello(wire.pack_hello(wire.CONTEXT, b"t" * 32, "simgpu0"))
    assert hello == wire.Hello(wire.CONTEXT, b"t" * 32, "simgpu0")
    assert wire.unpack_hello(wire.pack_hello(wire.CLIENT, flags=wire.WANT_RING)).wants_ring
    assert wire.unpack_hello(wire.pack_hello(wire.CLIENT, flags=wire.WANT_AGENT)).wants_agent
    welcome = wire.Welcome(0, 3, 7, (1, 2), (3, 4), (5, 6), 2, 1, b"k" * 32, "ipc:///a", "ipc:///b", "fine")
    assert wire.unpack_welcome(wire.pack_welcome(welcome)) == welcome
    assert wire.unpack_region(wire.pack_region(1, 2, 3, 1, 4096)) == (1, 2, 3, 1, 4096)
    assert wire.unpack_uffd(wire.pack_uffd(True)) is True
    assert wire.unpack_ready(wire.pack_ready(-22, "no")) == (-22, "no")


def test_long_text_is_cut_at_a_character():
    packed = wire.pack_ready(-1, "é" * 200)
    assert wire.unpack_ready(packed)[1] == "é" * 79


@pytest.mark.parametrize(
    "data, number, word",
    [
        (b"", errno.EPROTO, "too short"),
        (b"\0" * 7, errno.EPROTO, "too short"),
        (b"\0" * 80, errno.EPROTO, "magic"),
        (wire.pack_hello(wire.CLIENT)[:-1], errno.EPROTO, "79 bytes"),
        (wire.pack_hello(wire.CLIENT) + b"x", errno.EPROTO, "81 bytes"),
        (wire.pack_uffd(), errno.EPROTO, "type 4"),
        (wire.pack_hello(0), errno.EINVAL, "kind"),
        (wire.pack_hello(99), errno.EINVAL, "kind"),
        (
            wire.pack_hello(wire.CLIENT)[:4] + b"\2\0" + wire.pack_hello(wire.CLIENT)[6:],
            errno.EPROTONOSUPPORT,
            "version",
        ),
        (wire.pack_hello(wire.CLIENT)[:12] + b"\4" + wire.pack_hello(wire.CLIENT)[13:], errno.EPROTO, "flags"),
        (wire.pack_hello(wire.CLIENT)[:-32] + b"x" * 32, errno.EINVAL, "NUL"),
        (wire.pack_hello(wire.CLIENT)[:-32] + b"\xff" + bytes(31), errno.EINVAL, "ASCII"),
    ],
)
def test_bad_hello_is_refused_with_a_reason(data, number, word):
    with pytest.raises(RequestError) as caught:
        wire.unpack_hello(data)
    assert caught.value.errno == number
    assert word in caught.value.message


@given(st.binary(max_size=600))
def test_random_bytes_are_refused_or_understood(data):
    for unpack in (wire.unpack_hello, wire.unpack_uffd, wire.unpack_welcome, wire.unpack_region, wire.unpack_ready):
        with pytest.raises(RequestError):
            unpack(data)


@given(st.integers(0, 79), st.integers(0, 255))
def test_one_changed_byte_never_gives_anything_but_a_hello_or_a_refusal(position, value):
    data = bytearray(wire.pack_hello(wire.CLIENT, b"t" * 32, "simgpu0"))
    data[position] = value
    try:
        hello = wire.unpack_hello(bytes(data))
    except RequestError:
        return
    assert hello.kind in wire.KIND_NAMES and len(hello.token) == 32 and "\0" not in hello.device


def test_only_a_userfaultfd_is_one():
    read, write = os.pipe()
    memfd = os.memfd_create("anon_inode:[userfaultfd]")
    try:
        assert not any(wire.is_userfaultfd(fd) for fd in (read, write, memfd))
    finally:
        for fd in (read, write, memfd):
            os.close(fd)
