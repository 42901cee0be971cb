# SPDX-License-Identifier: Apache-2.0
"""fork: shared memory is shared, with and without fork events, and everything else is out of reach."""

import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import threading

import gmem
import numpy as np
import pytest
from helpers import eventually

EVENTS = ["daemon.event_fork=true", "daemon.event_fork=false"]


def in_child(function) -> int:
    """Runs it in a forked child; the wait status."""
    pid = os.fork()
    if pid == 0:
        status = 13
        faulthandler.disable()  # some are meant to crash, and the parent reports it
        try:
            function()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]


@pytest.fixture(params=EVENTS, ids=["events", "no events"])
def session(request, connect):
    session = connect("simgpu0:capacity=2M", settings=[request.param])
    if request.param.endswith("true") and not session.fork_events:
        pytest.skip("fork events need CAP_SYS_PTRACE")
    assert session.fork_events == request.param.endswith("true")
    return session


@pytest.mark.parametrize("page_size", ["4K", "2M"])
def test_share(session, page_size):
    a = gmem.zeros(4 << 20, np.uint8, page_size=page_size)
    a[::4096] = 1
    gmem.prefetch(a[: 1 << 20], "simgpu0")

    def child():
        assert (a[::4096] == 1).all()
        a[::4096] += 1
        untouched[5] = 9

    untouched = gmem.zeros(1 << 20, np.uint8)
    assert in_child(child) == 0
    assert (a[::4096] == 2).all() and untouched[5] == 9
    eventually(lambda: gmem.stats()["sessions"] == 1, "the child's session has ended")


def test_both_write_while_the_device_evicts(session):
    a = gmem.zeros((64, 65536 // 8), np.int64, page_size="64K")
    b = gmem.full(4 << 20, 1, np.uint8, page_size="64K")

    def add(column):
        for _ in range(50):
            a[:, column] += 1

    def child():
        add(1)

    pid = os.fork()
    if pid == 0:
        child()
        os._exit(0)
    for _ in range(5):
        gmem.prefetch(a[:16], "simgpu0")
        gmem.prefetch(b[: 1 << 20], "simgpu0")
    add(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert (a[:, :2] == 50).all()


def test_none_is_not_mapped_in_the_child(session):
    a = gmem.full(1 << 20, 3, np.uint8, fork="none")
    status = in_child(lambda: a[0])
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGSEGV
    assert (a == 3).all()


def test_the_child_is_a_session_of_its_own(session):
    a = gmem.zeros(1 << 20, np.uint8)
    small = gmem.zeros(10)

    def child():
        mine = gmem.full(1 << 20, 7, np.uint8)
        assert not np.shares_memory(a, mine) and mine.sum() == 7 << 20
        assert gmem.stats()["sessions"] == 2
        gmem.prefetch(a, "simgpu0")
        tiny = gmem.full(10, 5.0)
        tiny[:] = 6
        with gmem.device("simgpu0").context() as context:
            context.launch(lambda x, y: x.fill(int(y[0])), a, mine).wait(30)

    assert in_child(child) == 0
    assert (a == 7).all() and (small == 0).all()


def test_the_childs_memory_outlives_the_parents_unmap(session):
    a = gmem.full(1 << 20, 1, np.uint8)
    ready, go = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(ready[1], b"x")
        os.read(go[0], 1)
        os._exit(0 if (a == 1).all() else 1)
    os.read(ready[0], 1)
    del a
    os.write(go[1], b"x")
    assert os.waitpid(pid, 0)[1] == 0
    eventually(lambda: gmem.stats()["objects"] == 0, "nothing is left of it")


def test_grandchildren_and_many_children(session):
    a = gmem.zeros(100, np.int64)

    def child(i):
        def grandchild():
            a[2 * i + 1] = i

        a[2 * i] = i
        assert in_child(grandchild) == 0

    pids = []
    for i in range(10):
        pid = os.fork()
        if pid == 0:
            child(i)
            os._exit(0)
        pids.append(pid)
    assert all(os.waitpid(pid, 0)[1] == 0 for pid in pids)
    assert a[:20].tolist() == [i // 2 for i in range(20)]


def test_fork_while_threads_touch_memory(session):
    a = gmem.zeros((16, 65536), np.uint8, page_size="64K")
    stop = threading.Event()

    def churn():
        while not stop.is_set():
            a[:8] += 1
            gmem.prefetch(a[:8], "simgpu0")

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for i in range(20):
            assert in_child(lambda i=i: a[8:].fill(i)) == 0
            assert (a[8:] == i).all()
    finally:
        stop.set()
        thread.join()


def square(array, index):
    array[index] = index * index


@pytest.mark.parametrize("method", ["fork"])
def test_multiprocessing(session, method):
    a = gmem.zeros(8, np.int64)
    context = multiprocessing.get_context(method)
    workers = [context.Process(target=square, args=(a, i)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert a.tolist() == [i * i for i in range(8)]


def test_subprocesses_inherit_nothing(session):
    a = gmem.full(1 << 20, 2, np.uint8)
    address = a.__array_interface__["data"][0]
    code = f"import ctypes; ctypes.string_at({address}, 1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == -signal.SIGSEGV
    assert subprocess.run(["true"], preexec_fn=lambda: None).returncode == 0
    assert (a == 2).all()
