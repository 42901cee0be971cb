# SPDX-License-Identifier: Apache-2.0
"""Fences and launches when callers give up, fork, send much, or hold what the CPU waits for."""

import asyncio
import ctypes
import gc
import os
import subprocess
import threading
import time

import gmem
import numpy as np
import pytest
from helpers import run_python


@pytest.fixture
def context(session):
    with gmem.device("simgpu0").context() as context:
        yield context


def test_giving_up_an_await_leaves_the_fence_to_others(context):
    async def main():
        fence = context.launch(lambda: (time.sleep(0.5), 5)[1])
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(fence, 0.05)
        assert not fence.done()
        task = asyncio.ensure_future(asyncio.wait_for(fence, 30))
        await asyncio.sleep(0)
        task.cancel()
        return fence.wait(30), await fence

    assert asyncio.run(main()) == (5, 5)


def test_large_arguments_and_results_do_not_block_each_other(context):
    """The process can be writing a result while we write the next launch: neither may wait for the other."""
    fences = []

    def launch():
        fences.extend(context.launch(lambda x: x + 1, np.full(1 << 19, i)) for i in range(8))

    thread = threading.Thread(target=launch, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "a launch is stuck in its send"
    assert [int(fence.wait(60)[-1]) for fence in fences] == list(range(1, 9))


def test_launches_of_many_threads(context):
    totals = []

    def work(i):
        fences = [context.launch(lambda n, x: n + len(x), i, b"x" * 100_000) for _ in range(20)]
        totals.append(sum(fence.wait(60) for fence in fences))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(totals) == [20 * (i + 100_000) for i in range(4)]


def test_a_returned_view_keeps_the_memory_of_any_session(connect):
    connect("simgpu0:capacity=4M")
    first = gmem.device("simgpu0").context()
    a = gmem.full(1 << 20, 3, np.uint8, page_size="64K")
    connect("simgpu0:capacity=4M")
    with gmem.device("simgpu0").context() as second:
        b = gmem.full(1 << 20, 4, np.uint8, page_size="64K")
        views = [first.launch(lambda x: x[5:10], a).wait(30), second.launch(lambda x: x[5:10], b).wait(30)]
        del a, b
        gc.collect()
        assert [view.tolist() for view in views] == [[3] * 5, [4] * 5]


def test_a_returned_view_is_not_mistaken_for_memory_of_a_closed_session(connect):
    closed = []
    for _ in range(4):  # in which order sessions are looked through is anybody's guess
        session = connect("simgpu0:capacity=4M")
        closed.append(gmem.full(1 << 20, 3, np.uint8, page_size="64K"))
        session.close()
    connect("simgpu0:capacity=4M")
    b = gmem.full(1 << 20, 4, np.uint8, page_size="64K")
    assert {b.ctypes.data} == {a.ctypes.data for a in closed}, "the same address, or this test shows nothing"
    with gmem.device("simgpu0").context() as context:
        view = context.launch(lambda x: x[5:10], b).wait(30)
        del b
        gc.collect()
        assert view.tolist() == [4] * 5


def test_a_forked_child_is_told_and_does_not_wait(context):
    fence, complete = context.launch(time.sleep, 1.0), context.launch(lambda: 7)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            for call in (fence.wait, context.synchronize, lambda: context.launch(len, ""), complete.wait):
                with pytest.raises(gmem.ContextLost, match="parent"):
                    call()
            context.close()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert complete.wait(30) == 7


def test_a_fence_that_was_complete_at_the_fork_stays_so(context):
    fence = context.launch(lambda: 7)
    fence.wait(30)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if fence.wait() == 7 else 1)
    assert os.waitpid(pid, 0)[1] == 0


def test_a_timeout_ends_a_kernel_that_holds_what_the_cpu_waits_for():
    """The touch blocks with the interpreter lock held: no thread of this process can end the kernel. A program of its
    own, because otherwise a failure could not be told from a hang of the tests."""
    done = run_python(
        """
        import gmem, numpy as np
        gmem.connect(devices=["strict:driver=simgpu,capacity=4M,replayable=off"])
        context = gmem.device("strict").context()
        a = gmem.full(1 << 20, 1, np.uint8, page_size="64K")
        def forever(x):
            while True:
                x += 1
        fence = context.launch(forever, a, timeout=1)
        while int(a[0]) < 0:
            pass
        try:
            fence.wait(30)
        except gmem.KernelTimeout:
            print("ended")
        """,
        timeout=40,
    )
    assert done.stdout == "ended\n", done.stderr


def test_a_timeout_is_the_kernels_own(context):
    slow = context.launch(time.sleep, 0.6)
    assert context.launch(len, "abc", timeout=0.3).wait(30) == 3, "it counts from the start of the kernel"
    assert slow.done()
    for timeout in (5, 1e300, float("inf")):
        assert context.launch(len, "abc", timeout=timeout).wait(30) == 3
    time.sleep(0.4)
    assert context.launch(len, "abcd").wait(30) == 4, "the time of a kernel that ended is not running on"
    for timeout in (0, -1, float("nan"), "1", True):
        with pytest.raises(gmem.InvalidArgument) as caught:
            context.launch(len, "", timeout=timeout)
        assert caught.value.argument == "timeout"


def test_a_context_that_leaves_children_behind_is_still_seen_to_end(context):
    def fork_and_crash():
        if os.fork() == 0:
            time.sleep(5)
            os._exit(0)
        ctypes.string_at(0)

    with pytest.raises(gmem.ContextLost, match="SIGSEGV"):
        context.launch(fork_and_crash).wait(4)


def test_a_kernel_can_run_programs(context):
    assert context.launch(lambda: subprocess.run(["echo", "hi"], capture_output=True).stdout).wait(30) == b"hi\n"
