# SPDX-License-Identifier: Apache-2.0
"""The cuda driver, from the Python client down to the calls of libcuda: on the double of tests/gpu/double.c, or with
GMEM_TEST_GPU=1 (`make test-gpu`) on this machine's GPU 0. Each test is a program of its own: a context that was broken
once stays so, and the window can be reserved only before anything is mapped in it."""

import os
import textwrap

import pytest
from cuda import build_double
from helpers import run_python

ON_GPU = os.environ.get("GMEM_TEST_GPU") == "1"
double_only = pytest.mark.skipif(ON_GPU, reason="needs the double's failures")

PRELUDE = """
import errno, gc, os, signal, subprocess, sys, tempfile, threading, time
sys.path.insert(0, "tests/integration")
import numpy as np, gmem
from cuda import Cuda

MIB = 1 << 20

def connect(options="capacity=16M,reserve=4M", settings=(), device="cuda0"):
    return gmem.connect(devices=[f"{device}:driver=cuda,{options}"], embedded=True, settings=settings)

def on(array):
    return [int(page["valid"]) for page in gmem.where(array)]

def hnode(session, hnid=1):
    return next(h for h in session.devices() if h["hnid"] == hnid)

def refused(kind, number, call):
    try:
        call()
    except kind as error:
        assert error.errno == number, (error.errno, error)
        return str(error)
    raise AssertionError("not refused")
"""


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    if ON_GPU:
        return {}
    return {"GMEM_LIBCUDA": build_double()}


@pytest.fixture
def program(environment, tmp_path):
    """Runs a program; it must end with a line "ok". words: for the double."""

    def run(code: str, words: str = "", timeout: float = 60) -> str:
        env = {**environment, "GMEM_CUDA_DOUBLE": f"used={tmp_path}/used {words}"}
        done = run_python(PRELUDE + textwrap.dedent(code), env=env, timeout=timeout)
        assert done.returncode == 0 and done.stdout.splitlines()[-1:] == ["ok"], f"{done.stdout}\n{done.stderr}"
        return done.stdout

    return run


def test_one_pointer_on_the_cpu_and_the_gpu(program):
    program("""
        session = connect()
        cuda = Cuda()
        a = gmem.zeros(MIB, np.int64)
        a[:] = np.arange(MIB)
        address = a.__array_interface__["data"][0]
        with gmem.acquire("cuda0", a) as view:
            assert view.ptr == address and on(a) == [2] * 4
            assert view.__cuda_array_interface__["data"] == (address, False)
            assert view.__cuda_array_interface__["shape"] == (MIB,) and view.__dlpack_device__() == (2, 0)
            cuda.bump(view, 5)
        assert (a == np.arange(MIB) + 5).all() and on(a) == [3] * 4, on(a)
        before = hnode(session)["in_bytes"]
        with gmem.acquire("cuda0", a, mode="r") as view:  # it is there still: nothing is copied
            total = gmem.zeros(MIB // 4, np.int64)
            with gmem.acquire("cuda0", total) as out:
                cuda.launch("sum", view, MIB, out.ptr)
            assert view.__cuda_array_interface__["data"] == (address, True)
        assert total[0] == a.sum() and hnode(session)["in_bytes"] == before
        a[:] = 1  # a write takes the copy of the GPU
        assert on(a) == [1] * 4
        with gmem.acquire("cuda0", a, mode="w") as view:
            cuda.fill(view, 100)
        assert (a == np.arange(MIB) + 100).all()
        print("ok")
    """)


def test_programs_on_twice_the_memory_compute_what_numpy_does(program):
    """Random writes, kernels, prefetches and discards over 32 MiB on a device of 16 MiB; an oracle has each word."""
    program("""
        session = connect("capacity=16M,reserve=4M")
        cuda = Cuda()
        rng = np.random.default_rng(7)
        streams = [0, cuda.stream(), cuda.stream()]
        arrays = [gmem.zeros(size * MIB // 8, np.int64) for size in (2, 2, 4, 4, 6, 6, 8)]
        oracle = [np.zeros(a.size, np.int64) for a in arrays]
        device = gmem.device("cuda0")
        for step in range(250):
            i = int(rng.integers(len(arrays)))
            a, o, what, value = arrays[i], oracle[i], int(rng.integers(9)), int(rng.integers(1 << 30))
            stream = streams[i % 3]
            if what <= 2:
                with gmem.acquire(device, a, stream=stream) as view:
                    cuda.bump(view, value, stream)
                o += value
            elif what == 3:
                with gmem.acquire(device, a, mode="w", stream=stream) as view:
                    cuda.fill(view, value, stream)
                o[:] = value + np.arange(o.size)
            elif what == 4:
                with gmem.acquire(device, a, mode="r", stream=stream) as view:
                    cuda.spin(0.001, stream)
            elif what == 5:
                at = int(rng.integers(a.size))
                a[at:at + 50000] = o[at:at + 50000] = value
            elif what == 6:
                while True:
                    try:
                        gmem.prefetch(a, device if value % 2 else "host")
                        break
                    except gmem.Busy:  # a kernel has it still
                        time.sleep(0.001)
            elif what == 7 and value % 4 == 0:
                while True:
                    try:
                        gmem.discard(a)
                        break
                    except gmem.Busy:  # a kernel's still
                        time.sleep(0.001)
                o[:] = 0
            else:
                at = int(rng.integers(a.size))
                assert (a[at:at + 1000] == o[at:at + 1000]).all(), (step, i, at)
        for i, (a, o) in enumerate(zip(arrays, oracle)):
            assert (a == o).all(), (i, np.flatnonzero(a != o)[:5])
        stats = hnode(session)
        assert stats["evictions"] > 20 and stats["used_bytes"] <= 16 * MIB and stats["errors"] == 0, stats
        print("ok")
    """)


def test_a_release_waits_for_its_own_stream_alone(program):
    program("""
        session = connect()
        cuda = Cuda()
        device = gmem.device("cuda0")
        fast, slow = cuda.stream(), cuda.stream()
        a, b = gmem.zeros(MIB // 4, np.int64), gmem.zeros(MIB // 4, np.int64)
        b[:] = 1
        with gmem.acquire(device, b, stream=slow) as view:
            cuda.spin(1.5, slow)
            cuda.bump(view, 1, slow)
        with gmem.acquire(device, a, stream=fast) as view:
            cuda.spin(0.1, fast)
            cuda.fill(view, 7, fast)
        assert a[0] == 7 and a[-1] == 7 + MIB // 4 - 1, "it waited for its kernel"
        import ctypes
        assert cuda.call("cuStreamQuery", ctypes.c_void_p(slow)) == 600, "and for no other one"
        assert (b == 2).all()
        class Torch:  # a stream of PyTorch's
            cuda_stream = fast
        with gmem.acquire(device, a, stream=Torch()) as view:
            cuda.fill(view, 9, fast)
        assert a[0] == 9
        print("ok")
    """)


def test_launches_on_a_context(program):
    program("""
        session = connect()
        cuda = Cuda()
        context = gmem.device("cuda0").context()
        a, b = gmem.zeros(MIB // 4, np.int64), gmem.zeros(MIB // 4, np.int64)
        plain = np.arange(3)

        def kernel(x, y, plain, *, value):
            assert isinstance(x, gmem.DeviceView) and isinstance(y, gmem.DeviceView) and isinstance(plain, np.ndarray)
            cuda.fill(x, value)
            cuda.fill(y, value + 1)
            return "returned"

        fences = [context.launch(kernel, a, b, plain, value=n) for n in range(5)]
        assert [fence.wait(10) for fence in fences] == ["returned"] * 5
        assert a[0] == 4 and b[0] == 5
        def fails(x):
            raise ZeroDivisionError
        refused_zero = False
        try:
            context.launch(fails, a)
        except ZeroDivisionError:
            refused_zero = True
        assert refused_zero
        a[0] = 1  # it was let go
        import asyncio
        async def job():
            return await context.launch(lambda x: cuda.bump(x, 1), a)
        asyncio.run(job())
        assert a[0] == 2
        context.launch(lambda x: cuda.fill(x, 8), a)
        context.synchronize()
        assert a[0] == 8
        b.flags.writeable = False
        with gmem.acquire(context, b, mode="r") as view:
            assert view.__cuda_array_interface__["data"][1], "read-only"
        context.close()
        refused(gmem.ContextLost, errno.ENODEV, lambda: context.launch(print, a))
        with gmem.device("cuda0").context() as again:
            again.launch(lambda x: cuda.bump(x, 2), a).wait(10)
        assert a[0] == 10
        print("ok")
    """)


def test_what_it_refuses(program):
    program("""
        session = connect()
        cuda = Cuda()
        device = gmem.device("cuda0")
        small = gmem.zeros(1000)
        text = refused(gmem.NotSupported, errno.EOPNOTSUPP, lambda: gmem.acquire(device, small).__enter__())
        assert "2 MiB" in text and "page_size='2M'" in text, text
        assert small[0] == 0
        with gmem.acquire(device, gmem.zeros(10, np.int64, page_size="2M")) as view:
            cuda.launch("fill", view, 10, 3)
        big = gmem.zeros(20 * MIB, np.uint8)
        refused(gmem.OutOfMemory, errno.ENOMEM, lambda: gmem.acquire(device, big).__enter__())
        a = gmem.zeros(2 * MIB, np.uint8)
        refused(gmem.InvalidArgument, errno.EINVAL, lambda: gmem.acquire(device, a, mode="x").__enter__())
        refused(gmem.InvalidArgument, errno.EINVAL, lambda: gmem.acquire(device, a, stream="x").__enter__())
        refused(gmem.InvalidArgument, errno.EINVAL, lambda: gmem.acquire(device, np.zeros(9)).__enter__())
        for options, word in (("capacity=1M", "capacity"), ("capacity=1M", "2 MiB"), ("device=7", "device"),
                              ("colour=red", "colour"), ("threads=0", "threads"), ("patience=0", "patience")):
            key, value = options.split("=")
            try:
                session.attach("cuda", "other", **{key: value})
            except gmem.GmemError as error:
                assert word in str(error), (options, error)
            else:
                raise AssertionError(options)
        print("ok")
    """)


def test_nobody_gets_what_another_had(program):
    """Frames that come from the driver or from another session read zero, and so does what was discarded."""
    program("""
        session = connect("capacity=16M,reserve=4M")
        code = '''
        import sys
        sys.path.insert(0, "tests/integration")
        import numpy as np, gmem
        from cuda import Cuda
        session = gmem.connect()
        cuda = Cuda()
        a, out = gmem.zeros(12 << 17, np.int64), gmem.zeros(1 << 18, np.int64)
        with gmem.acquire("cuda0", out, a) as (o, view):
            cuda.launch("sum", view, a.size, o.ptr)
            cuda.fill(view, 1 << 40)
        assert out[0] == 0, hex(out[0])
        cuda.synchronize()
        while True:
            try:
                gmem.discard(a)
                break
            except gmem.Busy:  # it is just being let go
                pass
        with gmem.acquire("cuda0", out, a) as (o, view):
            cuda.launch("sum", view, a.size, o.ptr)
            cuda.fill(view, 1 << 41)
        assert out[0] == 0, hex(out[0])
        print("fine")
        '''
        env = {**os.environ, "GMEM_SOCKET": session.path}
        for _ in range(2):
            done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
            assert done.stdout == "fine\\n", done.stderr
        deadline = time.monotonic() + 10
        while hnode(session)["used_bytes"] and time.monotonic() < deadline:
            time.sleep(0.02)
        assert hnode(session)["used_bytes"] == 0, "what an ended session had is free"
        print("ok")
    """)


def test_two_sessions_share_the_device(program):
    program("""
        session = connect("capacity=16M,reserve=4M")
        code = '''
        import sys
        sys.path.insert(0, "tests/integration")
        import numpy as np, gmem
        from cuda import Cuda
        session = gmem.connect()
        cuda = Cuda()
        arrays = [gmem.zeros(1 << 18, np.int64) for _ in range(6)]
        for turn in range(1, 16):
            for a in arrays:
                with gmem.acquire("cuda0", a) as view:
                    cuda.bump(view, turn)
        for a in arrays:
            assert (a == 120).all(), a
        print("fine")
        '''
        env = {**os.environ, "GMEM_SOCKET": session.path}
        command = [sys.executable, "-c", code]
        others = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(3)]
        for other in others:
            assert other.communicate(timeout=50)[0] == "fine\\n"
        assert hnode(session)["evictions"] > 0
        print("ok")
    """)


def test_threads_share_a_context(program):
    program("""
        session = connect("capacity=16M")
        cuda = Cuda()
        failed = []
        def work(seed):
            try:
                stream = cuda.stream()
                a = gmem.zeros(1 << 19, np.int64)
                for turn in range(12):
                    with gmem.acquire("cuda0", a, stream=stream) as view:
                        cuda.bump(view, seed, stream)
                    if turn % 3 == 0:
                        assert a[turn] == seed * (turn + 1), (a[turn], seed, turn)
                assert (a == 12 * seed).all()
            except BaseException as error:
                failed.append(error)
        threads = [threading.Thread(target=work, args=(n,)) for n in range(1, 6)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert not failed, failed
        print("ok")
    """)


def test_a_forked_child_has_the_memory_and_no_gpu(program):
    program("""
        session = connect()
        cuda = Cuda()
        a = gmem.zeros(MIB // 4, np.int64)
        context = gmem.device("cuda0").context()
        context.launch(lambda x: cuda.fill(x, 3), a).wait(10)
        pid = os.fork()
        if not pid:
            try:
                assert a[0] == 3 and (a[1:] == np.arange(4, MIB // 4 + 3)).all()
                a[0] = 77
                text = refused(gmem.ContextLost, errno.ECANCELED, lambda: context.launch(print, a))
                assert "fork" in text, text
                text = refused(gmem.GmemError, errno.ECANCELED, lambda: gmem.device("cuda0").context())
                assert "fork" in text, text
                b = gmem.full(MIB, 4, np.uint8)
                assert b.sum() == 4 * MIB
                os._exit(0)
            except BaseException as error:
                print(repr(error), file=sys.stderr)
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert a[0] == 77
        context.launch(lambda x: cuda.bump(x, 1), a).wait(10)
        assert a[0] == 78
        print("ok")
    """)


def test_a_fault_ends_one_context_only(program):
    """What was not acquired is not there for a kernel: its process's CUDA context is broken, as CUDA has it."""
    program("""
        session = connect()
        cuda = Cuda()
        code = '''
        import sys
        sys.path.insert(0, "tests/integration")
        import numpy as np, gmem
        from cuda import Cuda
        session = gmem.connect()
        cuda = Cuda()
        context = gmem.device("cuda0").context()
        a, b = gmem.zeros(1 << 18, np.int64), gmem.zeros(1 << 18, np.int64)
        a[:] = 5
        fence = context.launch(lambda x: cuda.launch("fill", b.ctypes.data, 100, 1), a)
        try:
            fence.wait(20)
        except gmem.ContextLost as error:
            assert "ILLEGAL_ADDRESS" in str(error), error
            try:
                context.launch(print, a)
            except gmem.ContextLost:
                assert (a == 5).all() and (b == 0).all(), "the CPU has it all"
                print("fine")
        '''
        done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "GMEM_SOCKET": session.path},
                              capture_output=True, text=True)
        assert done.stdout == "fine\\n", done.stderr
        a = gmem.zeros(MIB // 4, np.int64)
        with gmem.acquire("cuda0", a) as view:
            cuda.fill(view, 2)
        assert a[0] == 2 and hnode(session)["health"] == 0
        print("ok")
    """)


def test_detach_brings_everything_home(program):
    program("""
        session = connect()
        cuda = Cuda()
        a = gmem.zeros(MIB, np.int64)
        context = gmem.device("cuda0").context()
        context.launch(lambda x: cuda.fill(x, 3), a).wait(10)
        refused(gmem.Busy, errno.EBUSY, lambda: session.detach("cuda0"))
        session.detach("cuda0", force=True)
        assert on(a) == [1] * 4 and (a == np.arange(MIB) + 3).all()
        refused(gmem.ContextLost, errno.ENODEV, lambda: context.launch(print, a))
        context.close()
        session.attach("cuda", "again", capacity="8M", reserve="4M")
        with gmem.acquire("again", a) as view:
            cuda.bump(view, 1)
        assert (a == np.arange(MIB) + 4).all()
        print("ok")
    """)


SUPERVISED = """
import contextlib

@contextlib.contextmanager
def supervised(*options):
    directory = tempfile.mkdtemp()
    command = [sys.executable, "-m", "gmemd", "run", "--supervised", "--runtime-dir", directory, *options]
    parent = subprocess.Popen(command)
    try:
        until = time.monotonic() + 30
        while not os.path.exists(f"{directory}/gmemd.sock"):
            assert time.monotonic() < until and parent.poll() is None
            time.sleep(0.02)
        yield parent, f"{directory}/gmemd.sock"
    finally:
        parent.terminate()
        parent.wait()

def child(parent):
    with open(f"/proc/{parent.pid}/task/{parent.pid}/children") as children:
        return int((children.read().split() or ["0"])[0])

def kill(parent):
    "The daemon; there is another one when it returns."
    daemon = child(parent)
    os.kill(daemon, signal.SIGKILL)
    while child(parent) in (0, daemon):
        time.sleep(0.005)
"""


def test_a_killed_client_frees_its_frames(program):
    program(SUPERVISED + """
with supervised("--device", "cuda0:driver=cuda,capacity=16M,reserve=4M") as (parent, path):
    session = gmem.connect(path)
    cuda = Cuda()
    code = '''
import sys, time
sys.path.insert(0, "tests/integration")
import numpy as np, gmem
from cuda import Cuda
session = gmem.connect()
a = gmem.zeros(1 << 20, np.int64)
a[:] = 1
with gmem.acquire("cuda0", a) as view:
    print("there", flush=True)
    time.sleep(60)
'''
    for killed in (False, True):
        other = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "GMEM_SOCKET": path},
                                 stdout=subprocess.PIPE, text=True)
        assert other.stdout.readline() == "there\\n" and hnode(session)["used_bytes"] == 8 * MIB
        if killed:  # and the daemon hears of it when it takes over
            os.kill(child(parent), signal.SIGSTOP)
        other.kill()
        other.wait()
        if killed:
            kill(parent)
        until = time.monotonic() + 20
        while hnode(session)["used_bytes"]:
            assert time.monotonic() < until, "a killed client's frames are not free"
            time.sleep(0.02)
print("ok")
""")


def test_memory_of_the_gpu_outlives_gmemd(program):
    """What only the GPU has is there after each kill, also under a kernel that runs meanwhile; contexts go on."""
    program(SUPERVISED + """
with supervised("--device", "cuda0:driver=cuda,capacity=16M,reserve=4M") as (parent, path):
    session = gmem.connect(path)
    cuda = Cuda()
    stream = cuda.stream()
    mine, both, gpus, held, gone = (gmem.zeros(MIB // 4, np.int64) for _ in range(5))
    mine[:] = 1
    both[:] = 2
    context = gmem.device("cuda0").context()
    context.launch(lambda x: cuda.fill(x, 3), gpus).wait(10)
    with gmem.acquire(context, both, mode="r"):
        pass
    context.synchronize()
    del gone  # its addresses stay mapped, of which the next one knows nothing
    for turn in range(1, 4):
        with gmem.acquire(context, held, stream=stream) as view:
            cuda.spin(1.0, stream)
            cuda.bump(view, 1, stream)  # it is still to run when gmemd is killed
        kill(parent)
        fresh = gmem.zeros(MIB // 4, np.int64)
        assert (fresh == 0).all()
        assert (mine == turn).all() and (both == 2).all(), "the host's copies stay"
        assert on(gpus) == [2] and (held == turn).all()
        mine += 1
        with gmem.acquire(context, gpus) as view:
            cuda.bump(view, 1)
        del fresh
    assert (gpus == np.arange(MIB // 4) + 6).all()
    arrays = [gmem.zeros(MIB // 4, np.int64) for _ in range(12)]  # more than it has
    for turn in (1, 2):
        for n, a in enumerate(arrays):
            context.launch(lambda x: cuda.bump(x, n), a)
        if turn == 1:
            kill(parent)
    context.synchronize()
    for n, a in enumerate(arrays):
        assert (a == 2 * n).all(), n
    assert hnode(session)["health"] == 0 and hnode(session)["errors"] == 0
    context.close()
    until = time.monotonic() + 20
    while hnode(session)["contexts"]:
        assert time.monotonic() < until
        time.sleep(0.02)
print("ok")
""")


@double_only
def test_what_the_gpu_alone_had_is_sigbus_if_it_is_lost(program):
    """A frame that can't be had again: SIGBUS, never zeros, and nothing else is hurt."""
    program(SUPERVISED + """
words = os.environ["GMEM_CUDA_DOUBLE"]
# the daemon imports in later lives alone
os.environ["GMEM_CUDA_DOUBLE"] = words + " once=cuMemImportFromShareableHandle:1:1"
with supervised("--device", "cuda0:driver=cuda,capacity=16M,reserve=0") as (parent, path):
    os.environ["GMEM_CUDA_DOUBLE"] = words
    session = gmem.connect(path)
    cuda = Cuda()
    arrays = [gmem.zeros(MIB // 4, np.int64) for _ in range(4)]
    both = gmem.full(MIB // 4, 9, np.int64)
    context = gmem.device("cuda0").context()
    with gmem.acquire(context, *arrays) as views:
        for n, view in enumerate(views):
            cuda.fill(view, 100 * n)
    with gmem.acquire(context, both, mode="r"):
        pass
    context.synchronize()
    kill(parent)
    states = [gmem.STATES[gmem.where(a)[0]["state"]] for a in arrays]
    assert states.count("POISONED") == 1 and (both == 9).all(), states
    for n, a in enumerate(arrays):
        if states[n] == "POISONED":
            pid = os.fork()
            if not pid:
                signal.signal(signal.SIGBUS, signal.SIG_DFL)
                a[0]
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGBUS
            refused(gmem.Poisoned, errno.EIO, lambda: gmem.acquire(context, a).__enter__())
        else:
            with gmem.acquire(context, a) as view:
                cuda.bump(view, 1)
            assert (a == np.arange(MIB // 4) + 100 * n + 1).all()
print("ok")
""")


def test_contexts_of_one_process_share_its_address_space(program):
    """Two on one GPU: what both map is mapped once, written by whoever may, and there until the last one lets go."""
    program("""
        session = connect()
        cuda = Cuda()
        device = gmem.device("cuda0")
        one, two = device.context(), device.context()
        a, b = gmem.zeros(MIB // 4, np.int64), gmem.zeros(MIB // 4, np.int64)
        a[:] = 1
        with gmem.acquire(one, a) as x, gmem.acquire(two, a) as y:
            assert x.ptr == y.ptr
            cuda.bump(x, 1)
            cuda.bump(y, 1)
        assert (a == 3).all()
        with gmem.acquire(one, a, mode="r"), gmem.acquire(two, a) as y:  # the reader does not keep it from writing
            cuda.bump(y, 1)
        with gmem.acquire(two, a, mode="r"):
            with gmem.acquire(one, a) as x:
                cuda.bump(x, 1)
        assert (a == 5).all()
        with gmem.acquire(two, a, b) as (y, z):
            with gmem.acquire(one, a, b):
                pass
            one.close()
            cuda.bump(y, 1)
            cuda.fill(z, 7)
        two.synchronize()
        assert (a == 6).all() and (b == np.arange(MIB // 4) + 7).all()
        more = [gmem.zeros(MIB // 4, np.int64) for _ in range(10)]
        with device.context() as three:
            for turn in range(1, 4):
                for n, m in enumerate(more):
                    (two, three)[(n + turn) % 2].launch(lambda v: cuda.bump(v, turn), m)
            for m in more:
                assert (m == 6).all()
        two.close()
        assert hnode(session)["contexts"] == 0 or time.sleep(1) or hnode(session)["contexts"] == 0
        print("ok")
    """)


def test_what_a_gpu_does_not_take_is_refused_and_stays(program):
    """Small pages, pools, files and adopted memory: each is said, and is as it was; so is what lies beside."""
    program("""
        session = connect()
        cuda = Cuda()
        device = gmem.device("cuda0")
        file = tempfile.NamedTemporaryFile()
        file.write(np.arange(4 * MIB // 8).tobytes())
        file.flush()
        import mmap
        plain = np.frombuffer(mmap.mmap(-1, 4 * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.int64)
        plain[:] = np.arange(plain.size)
        arrays = {
            "4K": gmem.empty(4 * MIB // 8, np.int64, page_size="4K"),
            "64K": gmem.empty(4 * MIB // 8, np.int64, page_size="64K"),
            "pool": gmem.pool("table", size=4 * MIB).array(np.int64),
            "file": gmem.from_file(file.name, np.int64),
        }
        gmem.adopt(plain)
        arrays["adopted"] = plain
        for name, a in arrays.items():
            if name not in ("file", "adopted"):
                a[:] = np.arange(a.size)
            text = refused(gmem.NotSupported, errno.EOPNOTSUPP, lambda: gmem.acquire(device, a).__enter__())
            assert text.startswith("array: a CUDA device takes"), text
            text = refused(gmem.NotSupported, errno.EOPNOTSUPP, lambda: gmem.prefetch(a, device))
            assert "the device does not take such memory" in text, text
            assert name == "file" or all(page == 1 for page in on(a)), (name, on(a))  # nobody has read the file yet
            gmem.advise(a, "preferred", device)  # where it would be best; nothing goes there that can't
            assert (a == np.arange(a.size)).all(), name
        good = gmem.zeros(MIB // 4, np.int64)
        refused(gmem.NotSupported, errno.EOPNOTSUPP, lambda: gmem.acquire(device, good, arrays["4K"]).__enter__())
        good[:] = 3  # it is not held
        with gmem.acquire(device, good) as view:
            cuda.bump(view, 1)
        assert (good == 4).all() and hnode(session)["used_bytes"] <= 2 * MIB
        print("ok")
    """)


@double_only
def test_access_is_given_to_runs_of_pages(program):
    """Calls of cuMemSetAccess in the client for 256 MiB: not one for each page."""
    program("""
        import ctypes
        session = connect("capacity=264M,reserve=0")
        cuda = Cuda()
        calls = cuda.api.gmem_double_calls
        calls.restype = ctypes.c_ulong
        a = gmem.zeros(256 * MIB // 8, np.int64)
        for turn in range(2):
            a[::512] = turn
            before = calls(b"cuMemSetAccess"), calls(b"cuMemMap")
            with gmem.acquire("cuda0", a):
                pass
            gmem.device("cuda0")
            print(turn, calls(b"cuMemSetAccess") - before[0], calls(b"cuMemMap") - before[1])
            assert calls(b"cuMemMap") - before[1] == 128
            assert calls(b"cuMemSetAccess") - before[0] <= 16
        print("ok")
    """)


@double_only
def test_a_client_that_does_not_answer_loses_its_context_alone(program):
    program("""
        session = connect("capacity=8M,reserve=2M,patience=700")
        cuda = Cuda()
        code = '''
        import sys
        sys.path.insert(0, "tests/integration")
        import numpy as np, gmem
        from cuda import Cuda
        session = gmem.connect()
        cuda = Cuda()
        context = gmem.device("cuda0").context()
        arrays = [gmem.zeros(1 << 18, np.int64) for _ in range(3)]
        for a in arrays:
            context.launch(lambda x: cuda.fill(x, 5), a).wait(10)
        print("there", flush=True)
        sys.stdin.read()
        for a in arrays:
            assert a[0] == 5 and a[-1] == 5 + (1 << 18) - 1, "what it had is there"
        try:
            context.launch(print, arrays[0])
        except gmem.ContextLost:
            print("fine", flush=True)
        import os
        os._exit(0)
        '''
        other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                 env={**os.environ, "GMEM_SOCKET": session.path,
                                      "GMEM_CUDA_DOUBLE": os.environ["GMEM_CUDA_DOUBLE"] + " deaf"})
        assert other.stdout.readline() == "there\\n"
        a = gmem.zeros(6 << 17, np.int64)
        with gmem.acquire("cuda0", a) as view:  # its pages have to leave for it
            cuda.fill(view, 6)
        assert a[0] == 6
        assert other.communicate("", timeout=30)[0] == "fine\\n"
        print("ok")
    """)


@double_only
@pytest.mark.parametrize(
    "symbol",
    ["cuInit", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetName", "cuDeviceGetUuid_v2",
     "cuMemGetAllocationGranularity", "cuDevicePrimaryCtxRetain",
     "cuMemGetInfo_v2", "cuStreamCreate", "cuMemHostRegister_v2", "cuEventCreate",
     "cuMemAddressReserve"],
)  # fmt: skip
def test_an_attach_that_fails_says_which_call(environment, tmp_path, symbol):
    code = """
import gmem
session = gmem.connect(embedded=True, devices=["simgpu0:capacity=4M"])
try:
    session.attach("cuda", "cuda0", capacity="8M")
except gmem.GmemError as error:
    print(error)
a = gmem.zeros(1 << 20)
a[:] = 1
assert a.sum() == 1 << 20
"""
    done = run_python(code, env={**environment, "GMEM_CUDA_DOUBLE": f"fail={symbol}:1"})
    named = symbol.partition("_")[0]
    named = "cuDeviceGet" if named.startswith("cuDeviceGet") and named != "cuDeviceGetCount" else named
    assert done.returncode == 0 and named in done.stdout, f"{done.stdout}{done.stderr}"


@double_only
@pytest.mark.parametrize(
    "failure",
    ["once=cuMemCreate:4:2", "once=cuMemCreate:5:999", "once=cuMemExportToShareableHandle:3:999", "once=cuMemMap:4:1",
     "once=cuMemSetAccess:3:1", "once=cuMemsetD8Async:4:1", "once=cuMemcpyHtoDAsync_v2:3:1",
     "once=cuMemcpyDtoHAsync_v2:5:1", "once=cuEventSynchronize:6:1", "once=cuEventRecord:3:1"],
)  # fmt: skip
def test_a_call_that_fails_costs_one_request_at_most(environment, tmp_path, failure):
    """In the daemon, each of them: nothing that is read is wrong. What can't be read at all is SIGBUS, which ends the
    reading process."""
    code = PRELUDE + textwrap.dedent("""
        words = os.environ.pop("GMEM_CUDA_DOUBLE")
        os.environ["GMEM_CUDA_DOUBLE"] = words + " " + os.environ["FAILURE"]
        session = connect("capacity=16M,reserve=2M")
        os.environ["GMEM_CUDA_DOUBLE"] = words
        code = '''
        import sys
        sys.path.insert(0, "tests/integration")
        import numpy as np, gmem
        from cuda import Cuda
        session = gmem.connect()
        cuda = Cuda()
        arrays = [gmem.zeros(1 << 18, np.int64) for _ in range(12)]
        expected = [0] * 12
        for turn in range(1, 5):
            for i, a in enumerate(arrays):
                try:
                    with gmem.acquire("cuda0", a) as view:
                        cuda.bump(view, turn)
                    expected[i] += turn
                except gmem.GmemError as error:
                    print("refused", error, file=sys.stderr)
                if turn % 2:
                    assert (a == expected[i]).all(), (i, turn, a[0], expected[i])
        print("fine")
        '''
        done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "GMEM_SOCKET": session.path},
                              capture_output=True, text=True)
        fatal = os.environ["FAILURE"].endswith(":999")
        assert done.stdout == "fine\\n" or (fatal and done.returncode == -signal.SIGBUS), (done.returncode, done.stderr)
        assert bool(hnode(session)["health"]) == fatal, hnode(session)
        a = gmem.full(MIB, 3, np.uint8)
        assert a.sum() == 3 * MIB, "the host goes on"
        print("ok")
    """)
    words = f"used={tmp_path}/used"
    done = run_python(code, env={**environment, "GMEM_CUDA_DOUBLE": words, "FAILURE": failure})
    assert done.stdout == "ok\n", f"{done.stdout}{done.stderr}"


@double_only
def test_a_lost_gpu_takes_only_what_it_alone_had(program, environment):
    program("""
        words = os.environ["GMEM_CUDA_DOUBLE"]
        os.environ["GMEM_CUDA_DOUBLE"] = words + " fail=cuMemcpyDtoHAsync_v2:1:719"
        session = connect()
        os.environ["GMEM_CUDA_DOUBLE"] = words
        cuda = Cuda()
        host, both, gone = (gmem.zeros(MIB // 4, np.int64) for _ in range(3))
        host[:] = 1
        both[:] = 2
        with gmem.acquire("cuda0", both, mode="r"):
            pass
        with gmem.acquire("cuda0", gone) as view:
            cuda.fill(view, 3)
        pid = os.fork()
        if not pid:
            gone[0]
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGBUS
        assert (host == 1).all() and (both == 2).all()
        both[0] = 5
        assert hnode(session)["health"] != 0
        assert gmem.STATES[gmem.where(gone)[0]["state"]] == "POISONED"
        refused(gmem.Poisoned, errno.EIO, lambda: gmem.acquire("cuda0", host).__enter__())
        session.detach("cuda0", force=True)
        assert (host == 1).all()
        print("ok")
    """)


@double_only
def test_other_programs_have_the_memory(program):
    """The double counts what all processes have: there is room for 6 frames, whatever the device's capacity says."""
    program("""
        session = connect("capacity=16M,reserve=2M")
        cuda = Cuda()
        arrays = [gmem.zeros(1 << 18, np.int64) for _ in range(10)]
        for turn in range(3):
            for n, a in enumerate(arrays):
                with gmem.acquire("cuda0", a) as view:
                    cuda.bump(view, n)
        for n, a in enumerate(arrays):
            assert (a == 3 * n).all()
        print("ok")
    """, words="room=12582912")
