# SPDX-License-Identifier: Apache-2.0
"""A state machine over the client API, with plain NumPy as the oracle: whatever is written where, moved, advised,
copied or discarded in whatever order, every byte is what it should be, wherever it is read."""

import os

import gmem
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

PAGES = 6
DEVICES = ("simgpu0", "simgpu1")
PLACES = ("host", *DEVICES)
SIZES = {"4K": 4096, "64K": 65536}


@pytest.fixture(scope="module", autouse=True)
def daemon():
    # each device holds fewer pages than one array has, of the larger size
    with gmem.connect(devices=[f"{name}:capacity=320K" for name in DEVICES], embedded=True) as session:
        Machine.contexts = {name: gmem.device(name).context() for name in DEVICES}
        yield session


def fill(array, value, step):
    array[::step] = value


def checksum(array):
    return int(np.add.reduce(array, dtype=np.uint64)), int(np.bitwise_xor.reduce(array))


PARTS = PAGES * 16
parts = st.tuples(st.integers(0, PARTS - 1), st.integers(1, PARTS)).map(lambda p: (p[0], min(sum(p), PARTS)))


class Machine(RuleBasedStateMachine):
    """Arrays are cut into 16 parts a page, so that requests begin and end inside pages."""

    contexts: dict[str, gmem.Context] = {}
    arrays = Bundle("arrays")

    def __init__(self):
        super().__init__()
        self.live = []

    @initialize(target=arrays)
    def first(self):
        return self.make("4K")

    @rule(target=arrays, page_size=st.sampled_from(sorted(SIZES)))
    def another(self, page_size):
        return self.make(page_size)

    def make(self, page_size):
        nbytes = PAGES * SIZES[page_size]
        pair = (gmem.zeros(nbytes, np.uint8, page_size=page_size), np.zeros(nbytes, np.uint8), SIZES[page_size])
        self.live.append(pair)
        return pair

    @staticmethod
    def cut(pair, part):
        unit = pair[2] // 16
        return slice(part[0] * unit + 3, part[1] * unit - 2)

    @rule(pair=arrays, part=parts, value=st.integers(0, 255), step=st.integers(1, 5000), place=st.sampled_from(PLACES))
    def write(self, pair, part, value, step, place):
        where = self.cut(pair, part)
        fill(pair[1][where], value, step)
        if place == "host":
            fill(pair[0][where], value, step)
        else:
            self.contexts[place].launch(fill, pair[0][where], value, step).wait(60)

    @rule(pair=arrays, part=parts, place=st.sampled_from(DEVICES))
    def read_on_device(self, pair, part, place):
        where = self.cut(pair, part)
        assert self.contexts[place].launch(checksum, pair[0][where]).wait(60) == checksum(pair[1][where])

    @rule(pair=arrays, part=parts)
    def read_on_host(self, pair, part):
        where = self.cut(pair, part)
        assert (pair[0][where] == pair[1][where]).all()

    @rule(pair=arrays, page=st.integers(0, PAGES - 2), pages=st.integers(1, 2), place=st.sampled_from(PLACES))
    def prefetch(self, pair, page, pages, place):
        array, _, size = pair
        gmem.prefetch(array[page * size : (page + pages) * size], place)
        hnid = PLACES.index(place)
        assert (gmem.where(array[(page + pages - 1) * size : (page + pages) * size])["valid"] >> hnid & 1).all()

    @rule(pair=arrays, part=parts)
    def discard(self, pair, part):
        array, oracle, size = pair
        where = self.cut(pair, part)
        gmem.discard(array[where])
        first, last = -(-where.start // size), where.stop // size
        oracle[first * size : max(first, last) * size] = 0

    @rule(pair=arrays, part=parts, advice=st.sampled_from(["read_mostly", "no_read_mostly", "unpinned", "cold"]))
    def advise(self, pair, part, advice):
        gmem.advise(pair[0][self.cut(pair, part)], advice, "simgpu0" if advice == "cold" else None)

    @rule(pair=arrays, page=st.integers(0, PAGES - 1))
    def pin_and_unpin(self, pair, page):
        view = pair[0][page * pair[2] : (page + 1) * pair[2]]
        gmem.advise(view, "pinned", "simgpu1")
        assert gmem.where(view)["flags"][0] & gmem.PINNED
        gmem.advise(view, "unpinned")

    @rule(dst=arrays, src=arrays, start=st.integers(0, 20000), place=st.sampled_from(PLACES))
    def memcpy(self, dst, src, start, place):
        count = min(len(dst[1]), len(src[1]) - start, 9000)
        if count <= 0 or (dst[0] is src[0] and start < count):
            return
        gmem.memcpy(dst[0][:count], src[0][start : start + count], place)
        dst[1][:count] = src[1][start : start + count]

    @rule(pair=arrays, part=parts, value=st.integers(0, 255))
    def write_in_a_forked_child(self, pair, part, value):
        where = self.cut(pair, part)
        pid = os.fork()
        if pid == 0:
            same = (pair[0][where] == pair[1][where]).all()
            pair[0][where] = value
            os._exit(0 if same else 1)
        assert os.waitpid(pid, 0)[1] == 0
        pair[1][where] = value

    @rule(pair=consumes(arrays))
    def forget(self, pair):
        assert (pair[0] == pair[1]).all()
        self.live = [other for other in self.live if other is not pair]

    @invariant()
    def memory_is_accounted_for(self):
        for node in gmem.stats()["hnodes"]:
            assert node["used_bytes"] <= node["peak_bytes"] <= node["capacity_bytes"]

    def teardown(self):
        for array, oracle, _ in self.live:
            assert (array == oracle).all()
        self.live.clear()


Machine.TestCase.settings = settings(
    max_examples=int(os.environ.get("GMEM_MODEL_EXAMPLES", "25")), stateful_step_count=30, deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
TestMemory = Machine.TestCase
