# SPDX-License-Identifier: Apache-2.0
"""Requests of a real session with fields that are almost right: made from the schema, sent to a real core."""

import os

import msgpack
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gmemd import schema

# The same examples each time in `make test`; others with GMEM_FUZZ_EXAMPLES=.
EXAMPLES = int(os.environ.get("GMEM_FUZZ_EXAMPLES", "0"))
PAGES = 64

odd_numbers = st.sampled_from([0, 1, -1, 4095, 4096, 4097, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
odd_things = st.one_of(
    odd_numbers, st.none(), st.booleans(), st.floats(), st.text(max_size=40), st.binary(max_size=40),
    st.lists(st.integers(-(1 << 63), (1 << 64) - 1), max_size=4),
    st.dictionaries(st.text(max_size=5), st.none(), max_size=3),
)  # fmt: skip


def near(region):
    """Addresses in and around a region, and some that are nowhere."""
    va, size = region
    return st.one_of(
        st.integers(va - 8192, va + size + 8192), st.sampled_from([va, va + size - 1, va + size, va - 1]), odd_numbers
    )


def values(name, region):
    """What a field of that name may be, by its meaning."""
    lengths = st.one_of(st.integers(1, 2 * region[1]), st.sampled_from([4096, 65536, region[1]]), odd_numbers)
    table = {
        "va": near(region), "dst": near(region), "src": near(region), "bytes": lengths,
        "hnid": st.integers(-2, 17), "context": st.integers(0, 60),
        "page_bytes": st.sampled_from([0, 4096, 65536, 2 << 20, 7]),
        "fork": st.sampled_from(["share", "none", "copy"]), "small": st.booleans(), "write": st.booleans(),
        "advice": st.sampled_from([*schema.ADVICE, "nothing"]), "limit": st.integers(0, 70000),
        "session": st.integers(0, 60),
        "ranges": st.lists(st.tuples(near(region), lengths).map(list), max_size=4),
    }  # fmt: skip
    return table.get(name, odd_things)


@st.composite
def requests(draw, region):
    """A request that is right but for at most two fields."""
    op = draw(st.sampled_from(sorted(set(schema.OPS) - {"close"})))
    fields = list(schema.OPS[op].fields)
    args = {name: draw(values(name, region)) for name in fields}
    for _ in range(draw(st.integers(0, 2))):
        what = draw(st.sampled_from(["replace", "drop", "add"]))
        if what == "add":
            args[draw(st.text(max_size=12))] = draw(odd_things)
        elif fields:
            name = draw(st.sampled_from(fields))
            if what == "drop":
                args.pop(name, None)
            else:
                args[name] = draw(odd_things)
    return op, args


@pytest.fixture
def asking(arena):
    """ask(op, args) with the token of a session that has memory; the region that is known."""
    attacker = arena.attacker()
    token = bytes.fromhex(attacker.ask("session")["token"])
    region = attacker.ask("mmap_filled", size=PAGES * 4096), PAGES * 4096
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.RCVTIMEO, 20_000)
    dealer.connect(f"ipc://{arena.directory}/run/control.sock")
    number = 0

    def ask(op, args):
        nonlocal number
        number += 1
        dealer.send(msgpack.packb({**args, "v": 1, "id": number, "op": op, "token": token}))
        reply = msgpack.unpackb(dealer.recv(), strict_map_key=False)
        assert reply["id"] == number
        return reply

    yield ask, region
    dealer.close(0)
    context.term()


def test_requests_that_are_almost_right(asking):
    ask, region = asking

    @settings(
        max_examples=EXAMPLES or 400, derandomize=not EXAMPLES, database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def attack(data):
        op, args = data.draw(requests(region))
        try:
            packed = {key: value for key, value in args.items() if key not in ("v", "id", "op", "token")}
            msgpack.packb(packed)
        except (OverflowError, UnicodeEncodeError, ValueError):
            return
        reply = ask(op, packed)
        if not reply["ok"]:
            error = reply["error"]
            assert error["errno"] > 0 and error["message"], error
            assert "internal error" not in error["message"], (op, packed, error)

    attack()
