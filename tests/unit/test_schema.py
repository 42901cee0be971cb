# SPDX-License-Identifier: Apache-2.0
"""Every op's fields against wrong types, limits, missing and unknown fields; and messages that are no messages."""

import errno
import re
import time
from pathlib import Path

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmemd import schema
from gmemd.errors import RequestError
from gmemd.schema import BadRequest, check_args, decode

TOKEN = b"t" * 32
VA = 0x660000000000

GOOD = {
    "ping": {},
    "mmap": {"bytes": 4096, "page_bytes": 65536, "fork": "none", "small": True},
    "adopt": {"va": VA, "bytes": 4096},
    "flush": {"va": VA, "bytes": 4096},
    "mmap_commit": {"va": VA},
    "munmap": {"va": VA, "bytes": 4096},
    "advise": {"hnid": 1, "va": VA, "bytes": 5, "advice": "cold"},
    "prefetch": {"hnid": 0, "va": VA + 1, "bytes": 1},
    "discard": {"va": VA, "bytes": 4096},
    "hmemcpy": {"hnid": -1, "dst": VA, "src": VA + 9, "bytes": 3},
    "query": {"va": VA, "bytes": 4096},
    "acquire": {"context": 3, "ranges": [[VA, 4096]], "write": True},
    "release": {"context": 3, "ranges": [[VA, 4096], [VA + 8192, 1]], "holds": [[7, 0], [(1 << 64) - 1, 3]]},
    "pool_create": {"name": "table", "bytes": 1 << 30, "mode": 0o640, "page_bytes": 65536, "persistent": True},
    "pool_open": {"name": "table", "write": True, "uid": 1000},
    "pool_unlink": {"name": "table"},
    "pool_publish": {"name": "table"},
    "pools": {},
    "devices": {},
    "drivers": {},
    "attach": {"driver": "simgpu", "name": "simgpu0", "config": {"capacity": "48M"}},
    "detach": {"name": "simgpu0", "force": True},
    "limit": {"name": "host", "bytes": 1 << 30},
    "quota": {"name": "host", "bytes": 1 << 30, "session": 4, "uid": 1000},
    "upgrade": {},
    "contexts": {},
    "context_overlay": {"context": 1, "va": VA, "bytes": 4096},
    "context_close": {"context": 1},
    "sessions": {},
    "stats": {},
    "map": {"session": 2, "limit": 10},
    "trace_start": {"session": 3, "device": "simgpu0", "buffer_bytes": 1 << 20},
    "trace_read": {"position": 7},
    "trace_stop": {},
    "close": {},
}


def message(op="ping", **args):
    return {"v": 1, "id": 7, "op": op, "token": TOKEN, **args}


def check(op, **args):
    return check_args(decode(msgpack.packb(message(op, **args))))


def refusal(op, **args):
    with pytest.raises(RequestError) as caught:
        check(op, **args)
    return caught.value


def bad(raw):
    with pytest.raises(BadRequest) as caught:
        decode(raw)
    return caught.value.error, caught.value.request_id


def test_the_table_of_good_requests_is_complete():
    assert GOOD.keys() == schema.OPS.keys()


@pytest.mark.parametrize("op", GOOD)
def test_good_requests_pass_with_their_values(op):
    checked = check(op, **GOOD[op])
    assert checked.keys() == schema.OPS[op].fields.keys()
    for name, value in GOOD[op].items():
        got = checked[name]
        assert ([list(pair) for pair in got] if name in ("ranges", "holds") else got) == value


def test_defaults():
    assert check("mmap", bytes=1) == {"bytes": 1, "page_bytes": 0, "fork": "share", "small": False, "above": 0}
    assert check("map") == {"session": None, "limit": 4096}
    assert check("attach", driver="d", name="n")["config"] == {}


@pytest.mark.parametrize("op, name", [(op, name) for op, args in GOOD.items() for name in args])
@pytest.mark.parametrize(
    "value", [None, 1.5, "", b"bytes", [], {}, [[[]]], -(1 << 63), (1 << 64) - 1, "x" * 4000, True]
)
def test_a_wrong_value_is_refused_by_name_or_is_right(op, name, value):
    try:
        checked = check(op, **{**GOOD[op], name: value})
    except RequestError as error:
        assert error.errno == errno.EINVAL
        assert error.argument == name or (name in ("va", "dst", "src") and error.argument == "bytes")
        assert error.argument in error.message
    else:
        assert checked[name] == value


@pytest.mark.parametrize("op, name", [(op, n) for op in GOOD for n, f in schema.OPS[op].fields.items() if f.required])
def test_a_missing_field_is_named(op, name):
    args = {key: value for key, value in GOOD[op].items() if key != name}
    error = refusal(op, **args)
    assert (error.errno, error.argument) == (errno.EINVAL, name)
    assert "missing" in error.message


@pytest.mark.parametrize("op", GOOD)
def test_an_unknown_field_is_named(op):
    error = refusal(op, **GOOD[op], bogus=1)
    assert (error.errno, error.argument) == (errno.EINVAL, "bogus")


@pytest.mark.parametrize(
    "op, args, argument",
    [
        ("mmap", {"bytes": 0}, "bytes"),
        ("mmap", {"bytes": -1}, "bytes"),
        ("mmap", {"bytes": 1 << 63}, "bytes"),
        ("mmap", {"bytes": True}, "bytes"),
        ("mmap", {"bytes": 4096, "page_bytes": 8192}, "page_bytes"),
        ("mmap", {"bytes": 4096, "fork": "move"}, "fork"),
        ("adopt", {"va": VA + 1, "bytes": 4096}, "va"),
        ("mmap_commit", {"va": VA + 1}, "va"),
        ("munmap", {"va": VA + 4095, "bytes": 1}, "va"),
        ("munmap", {"va": (1 << 64) - 4096, "bytes": 4096}, "bytes"),
        ("prefetch", {"hnid": 16, "va": VA, "bytes": 1}, "hnid"),
        ("prefetch", {"hnid": -2, "va": VA, "bytes": 1}, "hnid"),
        ("advise", {"hnid": 0, "va": VA, "bytes": 1, "advice": "explode"}, "advice"),
        ("hmemcpy", {"hnid": 0, "dst": VA, "src": (1 << 64) - 2, "bytes": 4}, "bytes"),
        ("acquire", {"context": 1, "ranges": [[VA]], "write": False}, "ranges"),
        ("acquire", {"context": 1, "ranges": [[VA, 0]], "write": False}, "ranges"),
        ("acquire", {"context": 1, "ranges": [[VA, 1 << 63]], "write": False}, "ranges"),
        ("acquire", {"context": 1, "ranges": [[(1 << 64) - 1, 2]], "write": False}, "ranges"),
        ("acquire", {"context": 1, "ranges": [], "write": False}, "ranges"),
        ("attach", {"driver": "../../etc/x", "name": "a"}, "driver"),
        ("attach", {"driver": "a:b:c", "name": "a"}, "driver"),
        ("attach", {"driver": "d", "name": "1a"}, "name"),
        ("attach", {"driver": "d", "name": "a" * 32}, "name"),
        ("attach", {"driver": "d", "name": "a\0b"}, "name"),
        ("attach", {"driver": "d", "name": "a", "config": {"k": 1}}, "config"),
        ("attach", {"driver": "d", "name": "a", "config": {"k": "a\0b"}}, "config"),
        ("map", {"limit": 65537}, "limit"),
    ],
)
def test_limits(op, args, argument):
    error = refusal(op, **args)
    assert (error.errno, error.argument) == (errno.EINVAL, argument)


@pytest.mark.parametrize(
    "changed, number, argument, request_id",
    [
        ({"v": 2}, errno.EPROTO, "v", 7),
        ({"v": True}, errno.EPROTO, "v", 7),
        ({"v": None}, errno.EPROTO, "v", 7),
        ({"id": -1}, errno.EPROTO, "id", 0),
        ({"id": "7"}, errno.EPROTO, "id", 0),
        ({"id": None}, errno.EPROTO, "id", 0),
        ({"op": 5}, errno.EPROTO, "op", 7),
        ({"op": "explode"}, errno.ENOSYS, "op", 7),
        ({"token": None}, errno.EPERM, "token", 7),
        ({"token": b"short"}, errno.EPERM, "token", 7),
        ({"token": "t" * 32}, errno.EPERM, "token", 7),
    ],
)
def test_envelope(changed, number, argument, request_id):
    error, answered = bad(msgpack.packb({**message(), **changed}))
    assert (error.errno, error.argument, answered) == (number, argument, request_id)


def nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xc1",
        b"\x81",
        msgpack.packb(message())[:-1],
        msgpack.packb(message()) + b"\0",
        msgpack.packb([1, 2, 3]),
        msgpack.packb(None),
        msgpack.packb(message(x="y" * 4097)),
        msgpack.packb(message(x=b"y" * 4097)),
        msgpack.packb(message(x=[0] * 65537)),
        msgpack.packb(message(x=msgpack.ExtType(5, b"1234"))),
        msgpack.packb(message(x=msgpack.Timestamp(1))),
        msgpack.packb({**message(), "x": {str(i): 1 for i in range(257)}}),
        msgpack.packb({**message(), 5: 1}),
        b"\x81\xa1v\xa2\xff\xfe",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\x91" * 100_000,
        b"\x81\xa1a" * 100_000,
        b"x" * (schema.MESSAGE_BYTES_MAX + 1),
    ],
    ids=lambda raw: f"{len(raw)}:{raw[:8].hex()}",
)
def test_what_is_no_request_is_refused(raw):
    error, request_id = bad(raw)
    assert error.errno in (errno.EPROTO, errno.EMSGSIZE)
    assert request_id == 0
    assert error.message


def test_nesting_has_a_limit():
    error, request_id = bad(msgpack.packb(message(x=nested(8))))
    assert error.errno == errno.EPROTO and "nested" in error.message and request_id == 7
    assert decode(msgpack.packb(message(x=nested(7)))).name == "ping"


def test_the_largest_bad_message_is_refused_quickly():
    body = msgpack.packb(message(x=[[]] * 65536))
    start = time.monotonic()
    decode(body)
    for _ in range(3):
        bad(b"\x94" + b"\xdc\xff\xff" + b"\x90" * 1_000_000)
    assert time.monotonic() - start < 2


@given(st.binary(max_size=300))
@settings(max_examples=500)
def test_random_bytes(raw):
    try:
        decode(raw)
    except BadRequest as error:
        assert error.error.message


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)


@given(st.sampled_from(sorted(GOOD)), st.data())
@settings(max_examples=500)
def test_any_value_in_any_field_gives_an_answer(op, data):
    args = dict(GOOD[op])
    names = [*args, "bogus", "id", "v", "op", "token"]
    whole = {**message(op, **args), data.draw(st.sampled_from(names)): data.draw(values)}
    try:
        check_args(decode(msgpack.packb(whole)))
    except BadRequest as error:
        schema.encode_error(error.request_id, error.error)
    except RequestError as error:
        assert error.argument
        schema.encode_error(7, error)


@given(st.sampled_from(sorted(GOOD)), st.integers(0, 10_000), st.integers(0, 255))
@settings(max_examples=500)
def test_a_changed_byte_gives_an_answer(op, position, value):
    raw = bytearray(msgpack.packb(message(op, **GOOD[op])))
    raw[position % len(raw)] = value
    try:
        check_args(decode(bytes(raw)))
    except (BadRequest, RequestError):
        pass


def test_replies():
    assert msgpack.unpackb(schema.encode_reply(5, {"va": 1 << 63})) == {"id": 5, "ok": True, "va": 1 << 63}
    error = RequestError(errno.EINVAL, "va: no", "va")
    assert msgpack.unpackb(schema.encode_error(6, error)) == {
        "id": 6,
        "ok": False,
        "error": {"code": "EINVAL", "errno": 22, "message": "va: no", "argument": "va"},
    }
    assert "argument" not in msgpack.unpackb(schema.encode_error(6, RequestError(errno.EAGAIN, "later")))["error"]
    assert RequestError(errno.EAGAIN, "").code == "EAGAIN" and RequestError(99999, "").code == "EIO"


PAGE = Path(__file__).resolve().parents[2] / "docs" / "protocol.md"


@pytest.mark.parametrize("op", schema.OPS)
def test_the_protocol_page_has_every_op_with_its_fields_and_who_may_ask(op):
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith(f"| `{op}` |")]
    assert len(rows) == 1
    _, _, fields, _, who, _ = (cell.strip() for cell in rows[0].split("|"))
    assert re.findall(r"`(\w+)`", fields) == list(schema.OPS[op].fields)
    assert who == schema.OPS[op].who


def test_who_waits_is_not_answered_by_the_thread_that_reads():
    def inline(op, **args):
        return decode(msgpack.packb(message(op, **args))).inline

    assert inline("ping") and inline("pool_open", name="table", write=True)
    assert not inline("pool_open", name="table", remote="far"), "servers are asked"
    assert not inline("pool_publish", name="table") and not inline("munmap", va=VA, bytes=4096)
