# SPDX-License-Identifier: Apache-2.0
"""Allocation, movement and questions, and what bad arguments get."""

import ctypes
import gc
import os
import signal
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import gmem
import numpy as np
import pytest
from helpers import eventually

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
MAP_PRIVATE, MAP_ANONYMOUS, MAP_FIXED_NOREPLACE = 0x2, 0x20, 0x100000

OCCUPIED = (16 << 30) + (64 << 10)
PAGE_SIZES = ["4K", "64K", "2M", 65536]


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_arrays_are_plain_and_zero(session, page_size):
    a = gmem.empty((3, 1000), np.float32, page_size=page_size)
    assert type(a) is np.ndarray and a.shape == (3, 1000) and a.flags.c_contiguous and a.flags.writeable
    assert not a.any()
    a[1] = np.arange(1000)
    assert a.sum() == 999 * 500
    resident = gmem.STATES.index("RESIDENT")
    eventually(lambda: (gmem.where(a)["state"] == resident).any(), "whoever brought the page has finished")


def test_constructors(session):
    assert (gmem.zeros(5, int) == 0).all()
    assert (gmem.full((2, 2), 7) == 7).all() and gmem.full(2, 7).dtype == np.full(2, 7).dtype
    copy = gmem.array([[1, 2], [3, 4]], dtype="i2")
    assert copy.tolist() == [[1, 2], [3, 4]] and copy.dtype == np.int16
    assert gmem.empty((4, 0)).shape == (4, 0)
    assert session.owns(copy.__array_interface__["data"][0])


def test_memory_lives_as_long_as_a_view_of_it(session):
    before = gmem.stats()["objects"]
    a = gmem.zeros(1 << 20, np.uint8)
    part = a[100:200].reshape(10, 10)[:, 3]
    a[103] = 9
    del a
    gc.collect()
    assert gmem.stats()["objects"] == before + 1 and part[0] == 9
    del part
    gc.collect()
    eventually(lambda: gmem.stats()["objects"] == before, "the region is freed")


def test_small_arrays_share_regions_but_no_page(session):
    gmem.zeros(1)
    before = gmem.stats()["regions"]
    arrays = [gmem.full(10, i) for i in range(200)]
    assert gmem.stats()["regions"] <= before + 1
    pages = {a.__array_interface__["data"][0] // 4096 for a in arrays}
    assert len(pages) == 200
    assert all((a == i).all() for i, a in enumerate(arrays))
    del arrays
    gc.collect()
    assert not gmem.empty(20000, np.uint8).any(), "what was used before reads zero again"


def test_prefetch_moves_and_the_device_does_not_fault_there(session):
    a = gmem.zeros(1 << 20, page_size="64K")
    a[:] = 3
    gmem.prefetch(a, "simgpu0")
    assert (gmem.where(a)["writer"] == 1).all()
    with gmem.device("simgpu0").context() as context:
        context.launch(lambda: None).wait()
        context.launch(lambda x: x.sum(), a).wait()
        gmem.prefetch(a, "simgpu0")
        faults = session.device_info("simgpu0")["faults"]
        assert context.launch(lambda x: float(x.sum()), a).wait() == 3 << 20
        assert session.device_info("simgpu0")["faults"] == faults
    gmem.prefetch(a, "host")
    assert (gmem.where(a)["valid"] == 1).all()
    faults = gmem.stats()["host_faults"]
    assert a.sum() == 3 << 20 and gmem.stats()["host_faults"] == faults


def test_discard_reads_zero_inward(session):
    a = gmem.full(4 * 4096, 1, np.uint8, page_size="4K")
    gmem.discard(a[100 : 3 * 4096 + 100])
    assert a.reshape(4, 4096).sum(axis=1).tolist() == [4096, 0, 0, 4096]


def test_memcpy_between_host_and_device(session):
    src = gmem.array(np.random.default_rng(1).integers(0, 255, 300_000, dtype=np.uint8))
    dst = gmem.zeros(300_000, np.uint8, page_size="64K")
    gmem.prefetch(src, "simgpu0")
    gmem.memcpy(dst[5:200_005], src[77:200_077])
    assert (dst[5:200_005] == src[77:200_077]).all() and dst[4] == 0 and dst[200_005] == 0
    gmem.memcpy(dst, src, device="simgpu0")
    assert (gmem.where(dst)["writer"] == 1).all() and (dst == src).all()


def test_where_over_many_pages(session):
    a = gmem.empty(400 << 20, np.uint8, page_size="4K")
    a[::64 << 20] = 1
    pages = gmem.where(a)
    assert len(pages) == (400 << 20) // 4096 and (pages["state"] == 1).sum() == 7
    assert len(gmem.where(a[5000:10000])) == 2


def test_pinned_memory_is_not_evicted_and_too_much_is_refused(connect):
    connect("simgpu0:capacity=1M")
    a, b = (gmem.full(512 << 10, i, np.uint8, page_size="64K") for i in (1, 2))
    gmem.advise(a, "pinned", "simgpu0")
    with gmem.device("simgpu0").context() as context:
        for _ in range(3):
            big = gmem.full(2 << 20, 3, np.uint8, page_size="64K")
            assert context.launch(lambda x: int(x.sum()), big).wait() == 6 << 20
        assert (gmem.where(a)["valid"] & 2).all()
        gmem.advise(b, "pinned", "simgpu0")
        c = gmem.full(64 << 10, 3, np.uint8, page_size="64K")
        with pytest.raises(gmem.OutOfMemory):
            gmem.advise(c, "pinned", "simgpu0")
        with pytest.raises(gmem.ContextLost, match="SIGBUS"):
            context.launch(lambda x: int(x.sum()), c).wait(30)
    assert (c == 3).all() and (a == 1).all()
    gmem.advise(a, "unpinned")
    gmem.prefetch(c, "simgpu0")


def test_from_file(session, tmp_path):
    content = np.random.default_rng(2).integers(0, 255, 9 << 20, dtype=np.uint8)
    path = tmp_path / "data"
    content.tofile(path)
    assert (gmem.from_file(path) == content).all()
    part = gmem.from_file(path, np.int32, (16, 4), offset=1000)
    assert (part == content[1000:1256].view(np.int32).reshape(16, 4)).all()
    for argument, options in {"shape": {"shape": 10 << 20}, "offset": {"offset": -1}}.items():
        with pytest.raises(gmem.InvalidArgument) as caught:
            gmem.from_file(path, **options)
        assert caught.value.argument == argument
    with pytest.raises(FileNotFoundError):
        gmem.from_file(tmp_path / "nothing")


def test_buffer(session):
    buffer = gmem.alloc(100_000)
    view = memoryview(buffer)
    assert len(view) == 100_000 and not view.readonly and bytes(view[:3]) == b"\0\0\0"
    array = np.from_dlpack(buffer)
    array[:] = 5
    assert np.asarray(buffer)[7] == 5 and view[99_999] == 5
    buffer.prefetch("simgpu0")
    assert (gmem.where(buffer)["writer"] == 1).all()
    with pytest.raises(BufferError):
        buffer.close()
    del array
    view.release()
    buffer.close()
    buffer.close()
    with pytest.raises(ValueError, match="closed"):
        memoryview(buffer)
    with pytest.raises(gmem.InvalidArgument):
        gmem.prefetch(buffer, "host")
    resource = gmem.MemoryResource(page_size="64K")
    with resource.allocate(1 << 20) as taken:
        assert len(gmem.where(taken)) == 16
    resource.deallocate(resource.allocate(10))


def test_system_calls_on_untouched_memory(session):
    if session.user_mode_only:
        pytest.skip("needs /dev/userfaultfd")
    a = gmem.zeros(1 << 20, np.uint8)
    with tempfile.TemporaryFile() as file:
        file.write(b"x" * a.nbytes)
        file.seek(0)
        assert file.readinto(a) == a.nbytes and (a == ord("x")).all()
        gmem.prefetch(a, "simgpu0")
        assert os.pwrite(file.fileno(), memoryview(a), 0) == a.nbytes
        assert os.pread(file.fileno(), 1, 5) == b"x"


def closed_buffer():
    buffer = gmem.alloc(10)
    buffer.close()
    return buffer


BAD = {
    "empty -1": (lambda: gmem.empty(-1), "shape"),
    "empty 2**63": (lambda: gmem.empty(1 << 63, np.uint8), "shape"),
    "empty 2**62 doubles": (lambda: gmem.empty(1 << 62), "shape"),
    "empty object": (lambda: gmem.empty(3, object), "dtype"),
    "empty nonsense": (lambda: gmem.empty(3, "nonsense"), "dtype"),
    "empty None": (lambda: gmem.empty(None), "shape"),
    "empty 3.5": (lambda: gmem.empty(3.5), "shape"),
    "closed buffer": (lambda: closed_buffer().discard(), "buffer"),
    "devices as one string": (lambda: gmem.connect(devices="simgpu0:capacity=8M"), "devices"),
    "offset": (lambda: gmem.from_file("/etc/passwd", offset=1.5), "offset"),
    "page size": (lambda: gmem.empty(3, page_size="3K"), "page_size"),
    "fork": (lambda: gmem.empty(3, fork="copy"), "fork"),
    "alloc 0": (lambda: gmem.alloc(0), "nbytes"),
    "alloc -5": (lambda: gmem.alloc(-5), "nbytes"),
    "alloc 2**63": (lambda: gmem.alloc(1 << 63), "nbytes"),
    "alloc float": (lambda: gmem.alloc(1.5), "nbytes"),
    "prefetch foreign": (lambda: gmem.prefetch(np.zeros(10), "simgpu0"), "array"),
    "prefetch nothing": (lambda: gmem.prefetch(None, "simgpu0"), "array"),
    "prefetch unmapped": (lambda: gmem.prefetch((0x660800000000, 4096), "simgpu0"), "va"),
    "prefetch wrapping": (lambda: gmem.prefetch((0x660800000000, (1 << 63) - 1), "simgpu0"), "array"),
    "advice": (lambda: gmem.advise(gmem.zeros(10), "nonsense"), "advice"),
    "advice without device": (lambda: gmem.advise(gmem.zeros(10), "pinned"), "device"),
    "memcpy sizes": (lambda: gmem.memcpy(gmem.zeros(10), gmem.zeros(11)), "src"),
    "hnid": (lambda: gmem.prefetch(gmem.zeros(10), 9), "hnid"),
    "hnid 99": (lambda: gmem.prefetch(gmem.zeros(10), 99), "hnid"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(session, name):
    call, argument = BAD[name]
    gmem.zeros(10)
    before = gmem.stats()["regions"]
    with pytest.raises(gmem.GmemError) as caught:
        call()
    assert caught.value.argument == argument and caught.value.errno > 0 and argument in str(caught.value)
    gc.collect()
    assert gmem.stats()["regions"] == before


def test_numpy_integers_are_integers(session, tmp_path):
    (tmp_path / "data").write_bytes(bytes(range(100)))
    with gmem.alloc(np.int64(100)) as buffer:
        assert len(memoryview(buffer)) == 100
    part = gmem.from_file(tmp_path / "data", shape=np.int32(4), offset=np.uint8(7))
    assert part.tolist() == [7, 8, 9, 10]
    gmem.prefetch(part, np.int64(session.hnid("simgpu0")))
    gmem.prefetch((np.uint64(part.ctypes.data), np.int64(4)), "host")


def test_ranges_in_use_are_skipped_and_given_back(session):
    va, size = session.map(4 << 20, 65536, "share")
    before = gmem.stats()["regions"]
    va += size  # where the next one would come to lie
    taken = libc.mmap(va, 16 << 20, 0, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0)
    assert taken == va
    try:
        a = gmem.zeros(4 << 20, np.uint8, page_size="64K")
        assert not va <= a.ctypes.data < va + (16 << 20)
        a[:] = 1
        assert gmem.stats()["regions"] == before + 1
    finally:
        libc.munmap(va, 16 << 20)
        session.unmap(va - size, size)


@pytest.fixture
def occupied(session):
    """16 GiB of the window, and 64 KiB more, are something else in this process: tries of 64 KiB could not pass it."""
    va, size = session.map(64 << 10, 65536, "share")
    taken = libc.mmap(va + size, OCCUPIED, 0, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0)
    assert taken == va + size
    yield range(taken, taken + OCCUPIED)
    libc.munmap(taken, OCCUPIED)
    session.unmap(va, size)


def test_much_that_is_in_use_is_skipped(session, occupied):
    before = gmem.stats()["regions"]
    a = gmem.zeros(64 << 10, np.uint8, page_size="64K")
    a[:] = 1
    assert a.ctypes.data not in occupied and gmem.stats()["regions"] == before + 1


def test_much_that_is_in_use_is_skipped_in_c(session, occupied, builder):
    libgmem = ctypes.CDLL(str(builder.prefix / "lib/libgmem.so"))
    handle, va = ctypes.c_void_p(), ctypes.c_void_p()
    assert libgmem.gmem_open(session.embedded.socket.encode(), None, ctypes.byref(handle)) == 0
    assert libgmem.gmem_mmap(handle, ctypes.c_size_t(64 << 10), None, ctypes.byref(va)) == 0
    assert va.value not in occupied
    assert gmem.stats()["regions"] == 2, "what was refused has been given back"
    ctypes.memset(va, 1, 64 << 10)
    assert libgmem.gmem_close(handle) == 0


def test_addresses_stay_mapped_for_the_next_region_of_their_size(session):
    where = session.map(4 << 20, 65536, "share")
    mapping = np.frombuffer((ctypes.c_uint8 * where[1]).from_address(where[0]), np.uint8)
    for value in range(1, 6):
        assert not mapping.any(), "what was there before has come back"
        mapping[:] = value
        assert (mapping == value).all()
        session.unmap(*where)
        other = session.map(4 << 20, 4096, "none")  # of another kind
        assert other != where
        session.unmap(*other)
        wait_until(lambda: session.map(4 << 20, 65536, "share"), where, session)


def wait_until(get, wanted, session):
    """A mover may hold the old memory for a moment; what is got instead is given back."""
    others = []
    for _ in range(1000):
        got = get()
        if got == wanted:
            break
        others.append(got)
        time.sleep(0.005)
    for other in others:
        session.unmap(*other)
    assert got == wanted


def test_more_than_could_be_held_is_out_of_memory(session):
    for nbytes in (1 << 43, 1 << 50):
        with pytest.raises(gmem.OutOfMemory):
            gmem.alloc(nbytes)
    assert gmem.stats()["objects"] == 0


def test_unknown_device_driver_and_op(session):
    with pytest.raises(gmem.NotFound):
        gmem.device("simgpu7")
    with pytest.raises(gmem.NotFound):
        session.attach("no_such_driver", "x")
    with pytest.raises(gmem.NotSupported):
        session.request("frobnicate")
    with pytest.raises(gmem.InvalidArgument) as caught:
        session.request("prefetch", hnid=1, va=1, bytes=1, colour=3)
    assert caught.value.argument == "colour"


def test_devices_come_and_go_and_pages_come_home(session):
    a = gmem.full(2 << 20, 4, np.uint8, page_size="64K")
    session.attach("simgpu", "simgpu1", capacity="4M")
    with pytest.raises(gmem.GmemError, match="EEXIST"):
        session.attach("simgpu", "simgpu1", capacity="4M")
    with pytest.raises(gmem.InvalidArgument, match="capacity"):
        session.attach("simgpu", "simgpu2", capacity="100")
    gmem.prefetch(a, "simgpu1")
    with gmem.device("simgpu1").context(), pytest.raises(gmem.Busy):
        session.detach("simgpu1")
    eventually(lambda: session.device_info("simgpu1")["contexts"] == 0, "the context is closed")
    session.detach("simgpu1")
    assert (gmem.where(a)["valid"] == 1).all() and (a == 4).all()
    assert [d.name for d in gmem.devices()] == ["simgpu0"]
    with pytest.raises(gmem.NotFound):
        session.detach("simgpu1")


def test_memory_stays_readable_after_the_daemon_stopped_in_good_order(connect):
    session = connect("simgpu0:capacity=4M")
    a = gmem.full(2 << 20, 6, np.uint8, page_size="64K")
    untouched = gmem.zeros(1 << 20)
    gmem.prefetch(a, "simgpu0")
    os.kill(session.embedded.pid, 15)
    eventually(lambda: session._daemon_gone(), "the daemon has stopped")
    assert (a == 6).all() and not untouched.any()
    with pytest.raises(gmem.ConnectionLost):
        gmem.stats()


def test_threads_that_map_and_unmap(session):
    """An address that one thread has just unmapped may be another's the next moment."""

    def churn(value):
        for _ in range(60):
            a = gmem.empty(128 << 10, np.uint8, page_size="4K")
            a[::4096] = value
            assert (a[::4096] == value).all()
            del a

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(churn, value) for value in (1, 2, 3, 4)]:
            done.result(60)
    assert gmem.stats()["objects"] == 0


def test_nothing_hangs_when_the_daemon_was_killed(connect):
    session = connect("simgpu0:capacity=4M")
    a = gmem.full(1 << 20, 6, np.uint8)
    os.kill(session.embedded.pid, signal.SIGKILL)
    eventually(session._daemon_gone, "the daemon is gone")
    with pytest.raises(gmem.ConnectionLost):
        gmem.stats()
    del a
    session.close()
