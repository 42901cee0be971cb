# SPDX-License-Identifier: Apache-2.0
"""Kernels in device contexts: results, errors, ends; structures with pointers; coherence with the CPU."""

import asyncio
import ctypes
import os
import subprocess
import sys
import threading
import time

import gmem
import kernels
import numpy as np
import pytest
from helpers import eventually

SECONDS = float(os.environ.get("GMEM_SOAK_SECONDS", "0")) or 0.0


@pytest.fixture
def context(session):
    with gmem.device("simgpu0").context() as context:
        yield context


def test_kernels_work_in_place_and_return(context):
    a = gmem.array(np.arange(1000.0))

    def double(x, *, by):
        x *= by
        return x[10:13]

    part = context.launch(double, a, by=2).wait(30)
    assert part.tolist() == [20, 22, 24] and a[999] == 1998
    a[10] = 5
    assert part[0] == 5, "a returned view is a view of the same memory"
    assert context.process_id != os.getpid()


def test_views_travel_by_address(context):
    a = gmem.zeros((100, 100), page_size="4K")
    a[...] = np.arange(10000).reshape(100, 100)

    def touch(view, readonly):
        view += 1
        return readonly.flags.writeable, float(readonly.sum())

    frozen = a[50:60, ::-3].view()
    frozen.flags.writeable = False
    assert context.launch(touch, a[1::2, 5:7].T, frozen).wait(30) == (False, float(frozen.sum()))
    assert a[1, 5] == 106 and a[0, 5] == 5


def test_launch_is_asynchronous_and_in_order(context):
    order = gmem.zeros(3, np.int64)

    def stamp(x, i, pause):
        time.sleep(pause)
        x[i] = x.max() + 1

    started = time.monotonic()
    fences = [context.launch(stamp, order, i, 0.3 if i == 0 else 0) for i in range(3)]
    assert time.monotonic() - started < 0.25 and not fences[0].done()
    with pytest.raises(TimeoutError):
        fences[2].wait(0.01)
    context.synchronize()
    assert all(fence.done() for fence in fences) and order.tolist() == [1, 2, 3]


def test_fences_are_awaitable(context):
    async def main():
        a = gmem.array([1.0, 2.0])
        return await asyncio.gather(*(context.launch(lambda x, n: float(x.sum() + n), a, n) for n in range(3)))

    assert asyncio.run(main()) == [3, 4, 5]


def test_errors_come_back_with_their_traceback(context):
    def outer():
        def inner():
            raise KeyError("lost")

        inner()

    with pytest.raises(KeyError, match="lost") as caught:
        context.launch(outer).wait(30)
    assert "in inner" in str(caught.value.__cause__)
    with pytest.raises(gmem.KernelError, match="Unpicklable: no way back") as caught:
        context.launch(kernels.fail_unpicklable).wait(30)
    assert "fail_unpicklable" in caught.value.remote_traceback
    with pytest.raises(gmem.KernelError, match="SystemExit"):
        context.launch(sys.exit, 3).wait(30)
    with pytest.raises(gmem.InvalidArgument, match="fn"):
        context.launch("no kernel")
    with pytest.raises(gmem.InvalidArgument, match="timeout"):
        context.launch(len, timeout=-1)
    assert context.launch(len, "abc").wait(30) == 3, "the context goes on"


def test_a_crash_ends_the_context_and_loses_nothing(session, context):
    a = gmem.full(1 << 20, 1, np.uint8, page_size="64K")
    context.launch(lambda x: x.fill(2), a).wait(30)
    pending = [context.launch(ctypes.string_at, 0), context.launch(len, "")]
    for fence in pending:
        with pytest.raises(gmem.ContextLost, match="SIGSEGV"):
            fence.wait(30)
    with pytest.raises(gmem.ContextLost):
        context.launch(len, "")
    assert (a == 2).all(), "the device's memory outlives the process"
    eventually(lambda: gmem.stats()["contexts"] == 0, "the daemon has forgotten it")


def test_a_touch_outside_of_any_region_is_a_segfault(session, context):
    a = gmem.zeros(1 << 20)
    with pytest.raises(gmem.ContextLost, match="SIGSEGV"):
        context.launch(ctypes.string_at, a.__array_interface__["data"][0] + (64 << 30), 1).wait(30)


def test_a_kernel_that_never_ends(session):
    def forever(x):
        while True:
            x += 1

    context = gmem.device("simgpu0").context()
    a = gmem.zeros(10)
    first, second = context.launch(forever, a, timeout=0.5), context.launch(len, "")
    with pytest.raises(gmem.KernelTimeout):
        first.wait(30)
    with pytest.raises(gmem.ContextLost):
        second.wait(30)
    assert a[0] > 0
    slow = gmem.device("simgpu0").context()
    fence = slow.launch(forever, a)
    slow.close()
    with pytest.raises(gmem.ContextLost):
        fence.wait(30)


def test_c_kernels(context, tmp_path):
    source = tmp_path / "k.c"
    source.write_text(
        "#include <stdint.h>\n"
        "int64_t scale(double *x, int64_t n, double by) { for (int64_t i = 0; i < n; i++) x[i] *= by; return n; }\n"
        "void crash(void) { *(volatile int *)8 = 1; }\n"
    )
    library = tmp_path / "libk.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O2", "-o", library, source], check=True)
    a = gmem.array(np.arange(1000.0))
    scale = gmem.cfunc(library, "scale", restype=ctypes.c_int64)
    assert context.launch(scale, a, a.size, 3.0).wait(30) == 1000 and a[999] == 2997
    with pytest.raises(AttributeError):
        context.launch(gmem.cfunc(library, "missing")).wait(30)
    with pytest.raises(gmem.ContextLost, match="SIGSEGV"):
        context.launch((str(library), "crash")).wait(30)


# ---- structures with pointers ----


def test_linked_list_and_tree(context):
    nodes, rng = 500, np.random.default_rng(3)
    memory = gmem.zeros(nodes * 4096, np.uint8, page_size="4K")
    base = memory.__array_interface__["data"][0]
    at = [base + int(i) * 4096 + 64 for i in rng.permutation(nodes)]  # a node a page
    for i, address in enumerate(at):
        here = kernels.node(address)
        here.value, here.right = i, at[i + 1] if i + 1 < nodes else 0
    assert context.launch(kernels.walk_list, at[0], 1000).wait(60) == (nodes, sum(range(nodes)))
    assert kernels.walk_list(at[0], 0) == (nodes, sum(range(nodes)) + 1000 * nodes)

    values = rng.permutation(nodes).tolist()
    root = kernels.node(at[0])
    root.value, root.left, root.right = values[0], 0, 0
    for address, value in zip(at[1:250], values[1:250], strict=True):
        kernels.insert(at[0], address, value)
    for address, value in zip(at[250:], values[250:], strict=True):
        context.launch(kernels.insert, at[0], address, value)
    assert context.launch(kernels.in_order, at[0]).wait(60) == sorted(values)
    context.launch(kernels.mirror, at[0]).wait(60)
    assert kernels.in_order(at[0]) == sorted(values, reverse=True)


def test_dict_of_arrays(context):
    arrays = {name: gmem.full(n, 1.0) for name, n in (("a", 10), ("b", 10_000), ("c", 1_000_000))}
    assert context.launch(kernels.scale, arrays, 3).wait(30) == {"a": 30, "b": 30_000, "c": 3_000_000}
    assert all((array == 3).all() for array in arrays.values())


# ---- coherence ----


@pytest.mark.parametrize("page_size", ["4K", "64K", "2M"])
def test_coherence_of_two_devices_and_two_threads(connect, page_size):
    """Everybody increments words of his own in every page, devices far too small: no increment is lost."""
    page = {"4K": 4096, "64K": 65536, "2M": 2 << 20}[page_size]
    connect(f"simgpu0:capacity={4 * page}", f"simgpu1:capacity={4 * page}")
    words = gmem.zeros((16, page // 8), np.int64, page_size=page_size)[:, :64]
    rounds = 40 if not SECONDS else int(400 * SECONDS)
    contexts = [gmem.device(f"simgpu{i}").context() for i in range(2)]
    fences = [context.launch(kernels.add_to_own_words, words, i, rounds) for i, context in enumerate(contexts)]
    threads = [threading.Thread(target=kernels.add_to_own_words, args=(words, 2 + i, rounds)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for fence in fences:
        fence.wait(120)
    assert (words == rounds).all()
    assert gmem.stats()["evictions"] > 0


# ---- devices that can't replay a fault ----


def test_not_replayable(connect):
    connect("strict:driver=simgpu,capacity=4M,replayable=off")
    a = gmem.full(1 << 20, 1, np.uint8, page_size="64K")
    hidden = gmem.full(1 << 20, 1, np.uint8, page_size="64K")
    context = gmem.device("strict").context()
    frozen = a.view()
    frozen.flags.writeable = False

    def work(x, y, pause):
        time.sleep(pause)
        x += 1
        return int(y.sum())

    fence = context.launch(work, a, frozen, 0.5)
    assert a[0] == 2, "the CPU waits until the kernel has let go"
    assert fence.done() or fence.wait(5) == 2 << 20
    other = gmem.full(3 << 20, 1, np.uint8, page_size="64K")
    fences = [context.launch(kernels.sum_of, x) for x in (a, other, hidden)]  # more than fits at once
    assert [int(fence.wait(30)) for fence in fences] == [2 << 20, 3 << 20, 1 << 20]
    with gmem.acquire(context, hidden):
        address = hidden.__array_interface__["data"][0]
        assert context.launch(ctypes.string_at, address, 1).wait(30) == b"\1"
        with pytest.raises(gmem.Busy):
            gmem.prefetch(hidden, "host")
    gmem.prefetch(hidden, "host")
    with pytest.raises(gmem.ContextLost, match="SIGBUS"):
        context.launch(ctypes.string_at, address, 1).wait(30)


def test_throttled_link(connect):
    connect("slow:driver=simgpu,capacity=8M,bandwidth=20M,latency=1000000")
    a = gmem.full(4 << 20, 1, np.uint8, page_size="64K")
    started = time.monotonic()
    gmem.prefetch(a, "slow")
    assert time.monotonic() - started >= 4 / 20 + 0.001  # of the latency, a run of pages pays one
    assert (gmem.where(a)["writer"] == 1).all() and (a == 1).all()
