# SPDX-License-Identifier: Apache-2.0
"""Requests through shared memory, and the fences of those that nobody waits for at once."""

import asyncio
import gc
import os
import threading
import time

import gmem
import pytest
from helpers import run_python


def requests(session) -> int:
    return session.stats()["ring_requests"]


def test_synchronous_calls_go_through_the_ring(session):
    before = requests(session)
    a = gmem.full(1 << 18, 3.0, page_size="64K")
    gmem.prefetch(a, "simgpu0")
    gmem.advise(a, "read_mostly")
    b = gmem.zeros(1 << 18, page_size="64K")
    gmem.memcpy(b, a)
    gmem.discard(a)
    assert (b == 3.0).all() and not a.any()
    del a, b
    gc.collect()
    assert requests(session) - before == 2 * 2 + 4 + 2, "mmap and commit twice, four requests, munmap twice"
    assert session.stats()["ring_errors"] == 0


def test_without_a_ring_everything_works_all_the_same():
    done = run_python(
        """
        import gmem, numpy as np
        session = gmem.connect(devices=["simgpu0:capacity=8M"])
        a = gmem.full(1 << 18, 3.0, page_size="64K")
        gmem.prefetch(a, "simgpu0")
        b = gmem.zeros(1 << 18)
        fence = gmem.memcpy_async(b, a)
        assert fence.done() and fence.wait() is None and (b == 3.0).all()
        try:
            gmem.prefetch_async(a, 9).wait()
        except gmem.InvalidArgument as error:
            assert error.argument == "hnid"
        assert session.stats()["ring_requests"] == 0
        print("ok")
        """,
        env={**os.environ, "GMEM_RING": "0"},
    )
    assert (done.stdout, done.returncode) == ("ok\n", 0), done.stderr


def test_a_fence_is_waited_for_polled_and_awaited(session):
    a = gmem.full(1 << 19, 1.0, page_size="64K")
    assert gmem.prefetch_async(a, "simgpu0").wait(20) is None
    assert (gmem.where(a)["valid"] == 2).all()
    fence = gmem.prefetch_async(a, "host", stream=3)
    while not fence.done():
        time.sleep(0.001)
    assert (gmem.where(a)["valid"] == 1).all()

    async def main():
        await asyncio.gather(*(gmem.prefetch_async(a, i % 2, stream=i) for i in range(20)))
        return await gmem.advise_async(a, "cold", "host")

    assert asyncio.run(main()) is None


def test_a_stream_is_in_order(session):
    page = 512
    a = gmem.zeros(65 * page, page_size="4K")
    a[0] = 7
    parts = [a[i * page : (i + 1) * page] for i in range(65)]
    fences = [gmem.memcpy_async(parts[i + 1], parts[i], i % 2, stream=9) for i in range(64)]
    fences[-1].wait(20)
    assert a[64 * page] == 7 and all(fence.done() for fence in fences[:-1])


def test_errors_name_the_argument_at_the_fence(session):
    a = gmem.zeros(1 << 12)
    fence = gmem.prefetch_async(a, 7)
    for _ in range(2):
        with pytest.raises(gmem.InvalidArgument) as caught:
            fence.wait(20)
        assert caught.value.argument == "hnid" and "hnid" in str(caught.value)
    with pytest.raises(gmem.InvalidArgument) as caught:
        session.start("advise", 0, None, hnid=-1, va=a.ctypes.data, bytes=8, advice="accessed_by").wait(20)
    assert caught.value.argument == "hnid"
    overlap = (a.ctypes.data, 4096), (a.ctypes.data + 8, 4096)
    with pytest.raises(gmem.InvalidArgument, match="overlap"):
        asyncio.run(_awaited(gmem.memcpy_async(*overlap)))
    for stream in (-1, 1 << 15, "1", True, None):
        with pytest.raises(gmem.InvalidArgument) as caught:
            gmem.prefetch_async(a, "host", stream=stream)
        assert caught.value.argument == "stream"


async def _awaited(fence):
    return await fence


def test_dropped_fences_are_no_leak_and_keep_their_arrays(session):
    before = session.stats()["regions"]
    for i in range(2000):
        gmem.prefetch_async(gmem.zeros(1 << 15, page_size="4K"), i % 2, stream=i % 5)
    gmem.prefetch_async(gmem.zeros(1 << 15, page_size="4K"), "host").wait(60)
    until = time.monotonic() + 60
    while session._ring._fences and time.monotonic() < until:
        time.sleep(0.01)
    assert not session._ring._fences
    gc.collect()
    assert session.stats()["regions"] <= before + 1
    assert session.stats()["poisoned_pages"] == 0


def test_threads_share_a_ring(session):
    failed = []

    def work(i):
        try:
            for n in range(100):
                a = gmem.full(5000 + i, i, page_size="4K")
                fence = gmem.prefetch_async(a, n % 2, stream=i)
                gmem.prefetch(a, "host")
                fence.wait(20)
                assert (a == i).all()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_waiting_leaves_the_interpreter_to_others(connect):
    """A device of 20 MB/s: a prefetch of 8 MB takes a while."""
    connect("simgpu0:capacity=16M,bandwidth=20M")
    a = gmem.full(1 << 20, 1.0, page_size="64K")
    ticks = []
    stop = threading.Event()

    def tick():
        while not stop.wait(0.005):
            ticks.append(1)

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.monotonic()
    gmem.prefetch(a, "simgpu0")
    took = time.monotonic() - start
    stop.set()
    thread.join()
    assert took > 0.2 and len(ticks) > took / 0.005 / 4


def test_a_short_request_passes_a_long_one(connect):
    connect("simgpu0:capacity=16M,bandwidth=5M")
    a, b = gmem.full(1 << 20, 1.0, page_size="64K"), gmem.full(1 << 10, 1.0, page_size="4K")
    slow = gmem.prefetch_async(a, "simgpu0", stream=1)
    gmem.advise(b, "read_mostly")
    gmem.prefetch_async(b, "host", stream=2).wait(20)
    assert not slow.done()
    slow.wait(60)


def test_a_forked_child_has_a_ring_of_its_own(session):
    a = gmem.full(1 << 17, 2.0, page_size="64K")
    fence = gmem.prefetch_async(a, "simgpu0")
    before = requests(session)
    pid = os.fork()
    if pid == 0:
        try:
            assert lib_has_ring(session)
            gmem.prefetch_async(a, "host").wait(20)
            gmem.memcpy(a, gmem.full(1 << 17, 5.0, page_size="64K"))
            assert (a == 5.0).all()
            assert fence.done() or raises_lost(fence)
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    fence.wait(20)
    assert (a == 5.0).all()
    assert requests(session) > before
    gmem.prefetch_async(a, "simgpu0").wait(20)


def lib_has_ring(session) -> bool:
    from gmem._client import lib

    return lib.gmem_link_has_ring(session._link)


def raises_lost(fence) -> bool:
    with pytest.raises(gmem.ContextLost):
        fence.wait(1)
    return True


def test_closing_fails_what_is_under_way(connect):
    session = connect("simgpu0:capacity=16M,bandwidth=20M")
    a = gmem.full(1 << 20, 1.0, page_size="64K")
    fences = [gmem.prefetch_async(a, i % 2, stream=i) for i in range(10)]
    start = time.monotonic()
    session.close()
    assert time.monotonic() - start < 10
    for fence in fences:
        assert fence.done()
    with pytest.raises(gmem.ConnectionLost):
        fences[-1].wait()


def test_a_killed_daemon_ends_the_waiting():
    done = run_python(
        """
        import os, threading, time, gmem, numpy as np
        session = gmem.connect(devices=["simgpu0:capacity=64M,bandwidth=1M"])
        a = gmem.full(1 << 20, 3.0, page_size="64K")
        slow = gmem.prefetch_async(a[: 1 << 19], "simgpu0", stream=1)
        lost = []

        def wait():
            try:
                gmem.prefetch(a[1 << 19 :], "simgpu0")
            except gmem.ConnectionLost:
                lost.append(1)

        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.3)
        os.kill(session.embedded.pid, 9)
        thread.join(20)
        assert lost == [1] and not thread.is_alive()
        try:
            slow.wait(20)
        except gmem.ConnectionLost:
            print("ok")
        """,
        timeout=60,
    )
    assert (done.stdout, done.returncode) == ("ok\n", 0), done.stderr
