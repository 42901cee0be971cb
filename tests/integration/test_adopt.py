# SPDX-License-Identifier: Apache-2.0
"""gmem.adopt(): arrays that NumPy has allocated come under management while threads count in them."""

import errno
import gc
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import gmem
import numpy as np
import pytest
from helpers import ROOT, eventually
from programs import jemalloc

MIB = 1 << 20
PAGE = 4096


def add(array: np.ndarray, value: int) -> int:
    array += value
    return int(array[0])


def same(array: np.ndarray) -> np.ndarray:
    return array[1:3]


def test_an_array_of_numpy(session: gmem.Session) -> None:
    array = np.arange(MIB, dtype=np.int64)
    va, nbytes = gmem.adopt(array)
    start = array.ctypes.data
    assert va % PAGE == 0 and nbytes % PAGE == 0
    assert start <= va < start + PAGE and start + array.nbytes - PAGE < va + nbytes <= start + array.nbytes
    assert (array == np.arange(MIB)).all()
    gmem.prefetch((va, PAGE), "simgpu0")
    assert gmem.where((va, PAGE))["valid"] == 2
    assert (array == np.arange(MIB)).all()
    with pytest.raises(gmem.GmemError, match="managed") as caught:
        gmem.adopt(array)
    assert caught.value.errno == errno.EEXIST


def test_kernels_reach_it(session: gmem.Session) -> None:
    early = gmem.device("simgpu0").context()
    array = np.arange(MIB // 2, dtype=np.int64)
    part = np.arange(MIB // 2, dtype=np.int64)
    gmem.adopt(array, edges=True)
    gmem.adopt(part)
    late = gmem.device("simgpu0").context()
    assert early.launch(add, array, 5).wait() == 5
    assert late.launch(add, array, 5).wait() == 10
    assert (array == np.arange(MIB // 2) + 10).all()
    back = late.launch(same, array).wait()
    assert back.ctypes.data == array.ctypes.data + 8
    with pytest.raises(gmem.InvalidArgument, match="edges=True"):
        late.launch(add, part, 1)
    inner = part[1024:-1024]
    assert early.launch(add, inner, 1).wait() == 1025
    assert (inner == np.arange(1025, MIB // 2 - 1023)).all() and part[1023] == 1023


def test_freed_with_the_array(session: gmem.Session) -> None:
    before = session.stats()["regions"]
    for _ in range(3):
        array = np.ones(5 * MIB)  # beyond what malloc() takes from its heap, and keeps there
        gmem.adopt(array)
        assert session.stats()["regions"] == before + 1 and session.adopted
        del array
        gc.collect()
        assert not session.adopted
        until = time.monotonic() + 10
        while session.stats()["regions"] > before:
            assert time.monotonic() < until, "the region outlives the array"


def mapped_from_gmem(va: int, nbytes: int) -> list[str]:
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start < va + nbytes and end > va and "memfd:gmem" in line:
            found.append(line)
    return found


@pytest.mark.parametrize("edges", [False, True])
def test_freed_memory_is_ordinary_again(session: gmem.Session, edges: bool) -> None:
    """Also in malloc's heap, which keeps it. What shares pages with it stays as it was."""
    before = session.stats()["regions"]
    arrays = [np.full(MIB - 4096 + 100 * i, i, np.uint8) for i in range(6)]
    ranges = [gmem.adopt(array, edges=edges) if i % 2 else None for i, array in enumerate(arrays)]
    gmem.prefetch((ranges[3][0], 512 * 1024), "simgpu0")
    assert mapped_from_gmem(*ranges[3])
    arrays[3] = None
    gc.collect()
    assert not mapped_from_gmem(*ranges[3]) and ranges[3][0] not in session.adopted
    assert all(array is None or (array == i).all() for i, array in enumerate(arrays))
    arrays.clear()
    gc.collect()
    assert not session.adopted
    eventually(lambda: session.stats()["regions"] == before, "regions outlive the arrays", 10)


@pytest.mark.skipif(not jemalloc(), reason="no libjemalloc")
def test_another_allocator_frees_it(session: gmem.Session) -> None:
    code = """
import gmem, numpy as np
gmem.connect()
for round in range(5):
    arrays = [np.zeros((1 + i % 5) * (1 << 16)) for i in range(12)]
    for i, array in enumerate(arrays):
        assert not array.any(), "calloc() gave what was there before"
        array[:] = i + 1
        gmem.adopt(array, edges=bool(i % 2))
    assert all((array == i + 1).all() for i, array in enumerate(arrays))
    del arrays, array
print("ok")
"""
    environment = {"LD_PRELOAD": jemalloc(), "MALLOC_CONF": "dirty_decay_ms:0,muzzy_decay_ms:0"}
    environment = {**os.environ, **environment, "GMEM_SOCKET": str(session.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


@pytest.mark.parametrize(
    ("make", "error", "what"),
    [
        (lambda: np.ones(MIB)[::2], gmem.InvalidArgument, "one piece"),
        (lambda: np.broadcast_to(np.ones(1), MIB), gmem.InvalidArgument, "writeable"),
        (lambda: np.array([None] * 4096), gmem.InvalidArgument, "array of numbers"),
        (lambda: [1, 2], gmem.InvalidArgument, "list is no array"),
        (lambda: np.empty(0), gmem.InvalidArgument, "empty"),
        (lambda: np.frombuffer(mmap.mmap(-1, MIB), np.uint8), gmem.NotSupported, "shared memory"),
        (lambda: np.memmap("/proc/self/exe", np.uint8, "c", shape=2 * PAGE), gmem.NotSupported, "file"),
        (lambda: gmem.zeros(MIB), gmem.GmemError, "managed by gmem already"),
    ],
)
def test_refusals(session: gmem.Session, make: Callable, error: type[Exception], what: str) -> None:
    with pytest.raises(error, match=what):
        gmem.adopt(make())
    assert not session.adopted


def test_less_than_a_page(session: gmem.Session) -> None:
    assert gmem.adopt(np.ones(100))[1] == 0
    assert not session.adopted


def test_without_a_ring(connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GMEM_RING", "0")
    connect()
    with pytest.raises(gmem.NotSupported, match="ring"):
        gmem.adopt(np.ones(MIB))


def test_the_session_ends_before_the_array(connect) -> None:
    session = connect("simgpu0:capacity=8M")
    array, large = np.arange(MIB // 2), np.arange(5 * MIB)
    for each in (array, large):
        va, nbytes = gmem.adopt(each)
        gmem.prefetch((va, 2 * MIB), "simgpu0")
    session.close()
    assert (array == np.arange(MIB // 2)).all() and (large == np.arange(5 * MIB)).all()
    array += 1
    large += 1
    assert array[-1] == MIB // 2 and large[-1] == 5 * MIB


def test_a_forked_child_has_a_copy(session: gmem.Session) -> None:
    array = np.arange(MIB, dtype=np.int64)
    va, nbytes = gmem.adopt(array)
    gmem.prefetch((va, 4 * MIB), "simgpu0")
    ready, done = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            assert (array == np.arange(MIB)).all()
            array += 7
            assert len(gmem.where((va, nbytes)))
            assert (array == np.arange(MIB) + 7).all()
            os.write(done, b"ok")
        finally:
            os._exit(0)
    os.close(done)
    assert os.read(ready, 2) == b"ok"
    os.waitpid(pid, 0)
    os.close(ready)
    assert (array == np.arange(MIB)).all()


def test_threads_count_while_it_moves(connect) -> None:
    """The host holds half of it, the rest is in compressed memory: everything moves all the time."""
    session = connect("simgpu0:capacity=8M", settings=["host.limit=24M"])
    session.attach("zstd", "tier0", capacity="200M", tier=0)
    context = gmem.device("simgpu0").context()
    array = np.zeros((4, 12 * MIB // 8), np.int64)  # 48 MiB
    stop, counts, failed = threading.Event(), [0] * 4, []

    def count(row: int) -> None:
        mine = array[row]
        while not stop.is_set():
            if not (mine == counts[row]).all():
                failed.append(row)
                return
            mine += 1
            counts[row] += 1

    threads = [threading.Thread(target=count, args=(row,)) for row in range(3)]
    for thread in threads:
        thread.start()
    try:
        gmem.adopt(array, edges=True)
        for expected in range(1, 4):
            assert context.launch(add, array[3], 1).wait() == expected
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failed
    assert (array == np.array([*counts[:3], 3])[:, None]).all()
    assert all(counts[:3])
    tier = next(h for h in session.stats()["hnodes"] if h["name"] == "tier0")
    assert tier["in_bytes"] > 0, "nothing was evicted"


@pytest.fixture
def supervised() -> Iterator[str]:
    """The socket of a gmemd that is started again whenever it is killed."""
    with tempfile.TemporaryDirectory(prefix="gmem-test-", dir="/tmp") as directory:
        command = [sys.executable, "-m", "gmemd", "run", "--supervised", "--runtime-dir", directory]
        command += ["--device", "name=simgpu0,driver=simgpu,capacity=8M"]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=ROOT) as process:
            path = Path(directory, "gmemd.sock")
            eventually(path.exists, "gmemd does not start", 30)
            yield str(path)
            process.terminate()


def test_the_daemon_is_killed_meanwhile(supervised: str) -> None:
    session = gmem.connect(supervised)
    array = np.zeros((2, 3 * MIB), np.int64)  # 48 MiB
    stop, counts, failed, kills = threading.Event(), [0, 0], [], 0

    def count(row: int) -> None:
        while not stop.is_set():
            if not (array[row] == counts[row]).all():
                failed.append(row)
                return
            array[row] += 1
            counts[row] += 1

    def kill() -> None:
        nonlocal kills
        while not stop.is_set():
            with suppress(gmem.GmemError, ProcessLookupError):
                os.kill(session.request("ping")["pid"], signal.SIGKILL)
                kills += 1
            stop.wait(0.15)

    threads = [threading.Thread(target=count, args=(row,)) for row in range(2)] + [threading.Thread(target=kill)]
    for thread in threads:
        thread.start()
    try:
        for row in range(2):  # a half at a time
            part = array[row]
            va, nbytes = gmem.adopt(part)
            assert nbytes > part.nbytes - 2 * PAGE
            eventually(lambda seen=kills: kills > seen, "nothing is killed", 30)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failed
    assert (array == np.array(counts)[:, None]).all() and min(counts) > 0 and kills > 1
    session.close()
    assert (array == np.array(counts)[:, None]).all()
