# SPDX-License-Identifier: Apache-2.0
import threading
import time

import pytest

from gmemd.pool import FairPool, PoolClosed, QueueFull


@pytest.fixture
def make_pool():
    pools = []

    def make(threads, **limits):
        defaults = {"per_key": threads, "per_owner": threads, "backlog": 1000, "name": "test"}
        pools.append(FairPool(threads, **{**defaults, **limits}))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close(5)


def test_results_and_exceptions_come_back(make_pool):
    pool = make_pool(2)
    assert pool.call("k", "o", lambda a, b: a + b, 1, 2).result(5) == 3
    with pytest.raises(ZeroDivisionError):
        pool.call("k", "o", lambda: 1 / 0).result(5)


def test_a_failure_in_submitted_work_leaves_the_thread(make_pool):
    pool = make_pool(1)
    pool.submit("k", "o", lambda: 1 / 0)
    assert pool.call("k", "o", lambda: 5).result(5) == 5


def test_a_key_and_an_owner_keep_only_their_share_busy(make_pool, eventually):
    pool = make_pool(6, per_key=2, per_owner=4)
    gate, running, peak = threading.Event(), {}, {}
    lock = threading.Lock()

    def work(*names):
        with lock:
            for name in names:
                running[name] = running.get(name, 0) + 1
                peak[name] = max(peak.get(name, 0), running[name])
        gate.wait(20)
        with lock:
            for name in names:
                running[name] -= 1

    for key in "abc":
        for _ in range(10):
            pool.submit(key, "owner", lambda key=key: work(key, "owner"))
    eventually(lambda: running.get("owner") == 4)
    # all of one owner's share is stuck, and another owner gets an answer at once
    assert pool.call("z", "other", lambda: "through").result(5) == "through"
    gate.set()
    eventually(lambda: not any(pool.load(key) for key in "abc"))
    assert peak["owner"] == 4 and all(1 <= peak[key] <= 2 for key in "abc")


def test_keys_take_turns(make_pool):
    pool = make_pool(1)
    order, gate = [], threading.Event()
    pool.submit("first", "o", lambda: gate.wait(20))
    for key in "aab":
        pool.submit(key, "o", lambda key=key: order.append(key))
    done = pool.call("c", "o", lambda: order.append("c"))
    gate.set()
    done.result(5)
    pool.call("a", "o", lambda: None).result(5)
    assert order == ["a", "b", "c", "a"]


def test_backlog(make_pool):
    pool = make_pool(1, backlog=3)
    gate = threading.Event()
    pool.submit("k", "o", lambda: gate.wait(20))
    time.sleep(0.05)
    pool.submit("k", "o", lambda: None)
    pool.submit("k", "o", lambda: None)
    assert pool.load("k") == 3
    with pytest.raises(QueueFull):
        pool.submit("k", "o", lambda: None)
    pool.submit("other", "o", lambda: None)
    gate.set()


def test_close_waits_for_what_runs_and_drops_the_rest(make_pool):
    pool = make_pool(1)
    gate, ran = threading.Event(), []
    pool.submit("k", "o", lambda: (gate.wait(20), ran.append(1)))
    time.sleep(0.05)
    pool.submit("k", "o", lambda: ran.append(2))
    assert pool.close(0.1) is False
    with pytest.raises(PoolClosed):
        pool.submit("k", "o", lambda: None)
    gate.set()
    assert pool.close(5) is True
    assert ran == [1]
