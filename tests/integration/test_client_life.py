# SPDX-License-Identifier: Apache-2.0
"""Clients that unmap behind our back, die, or belong to somebody else."""

import ctypes
import os
import signal
import stat
import textwrap
from pathlib import Path

import gmem
import numpy as np
import pytest
from helpers import ROOT, eventually, run_python, started_python

libc = ctypes.CDLL(None, use_errno=True)
libc.mremap.restype = ctypes.c_void_p
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
MREMAP_MAYMOVE, MREMAP_FIXED, MADV_DONTNEED, MADV_REMOVE = 1, 2, 4, 9

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")


def region(session, nbytes, page_bytes=4096):
    va, size = session.map(nbytes, page_bytes, "share")
    return va, np.frombuffer((ctypes.c_uint8 * size).from_address(va), np.uint8)


def test_munmap_by_the_application(session):
    va, a = region(session, 1 << 20)
    a[:] = 1
    gmem.prefetch((va, 1 << 20), "simgpu0")
    assert libc.munmap(va + (256 << 10), 512 << 10) == 0
    eventually(lambda: session.device_info("simgpu0")["used_bytes"] == 512 << 10, "the hole's pages are freed")
    assert (a[: 256 << 10] == 1).all() and (a[768 << 10 :] == 1).all()
    with pytest.raises(gmem.InvalidArgument):
        gmem.prefetch((va, 1 << 20), "simgpu0")
    assert libc.munmap(va, 1 << 20) == 0
    eventually(lambda: gmem.stats()["objects"] == 0, "all of it is freed")


def test_mremap_by_the_application(session):
    va, a = region(session, 1 << 20)
    a[:] = 2
    gmem.prefetch((va, 512 << 10), "simgpu0")
    to = session.map(4 << 20, 4096, "share")[0]
    session.unmap(to, 4 << 20)
    assert libc.mremap(va, 1 << 20, 1 << 20, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to
    moved = np.frombuffer((ctypes.c_uint8 * (1 << 20)).from_address(to), np.uint8)
    assert (moved == 2).all()
    moved[:] = 3
    gmem.prefetch((to, 1 << 20), "simgpu0")
    assert (moved == 3).all()
    fresh, b = region(session, 1 << 20)
    assert not b.any() and (moved == 3).all(), "new memory is not the moved one's"
    assert libc.munmap(to, 1 << 20) == 0


def test_dontneed_is_harmless_and_remove_reads_zero(session):
    va, a = region(session, 1 << 20)
    a[:] = 4
    assert libc.madvise(va, 1 << 20, MADV_DONTNEED) == 0
    assert (a == 4).all()
    gmem.prefetch((va, 1 << 20), "simgpu0")
    assert libc.madvise(va, 1 << 20, MADV_DONTNEED) == 0
    assert (a == 4).all()
    assert libc.madvise(va, 8192, MADV_REMOVE) == 0
    assert not a[:8192].any() and (a[8192:] == 4).all()


BUSY_CLIENT = """
    import gmem, numpy as np, sys
    a = gmem.zeros((256, 65536), np.uint8, page_size="64K")
    context = gmem.device("simgpu0").context()
    fence = context.launch(lambda x: [x.__iadd__(1) for _ in iter(int, 1)], a)
    print("ready", flush=True)
    while True:
        a += 1
        gmem.prefetch(a[:16], "simgpu0")
"""


def remains(session) -> dict[str, int]:
    """What the daemon holds. Its own threads and pools have been made by the time it is first asked for."""
    stats = gmem.stats()
    return {
        "sessions": stats["sessions"], "contexts": stats["contexts"], "objects": stats["objects"],
        "lpt": stats["lpt_bytes"], "device": session.device_info("simgpu0")["used_bytes"],
        "host": session.device_info(0)["used_bytes"], "fds": len(os.listdir(f"/proc/{session.embedded.pid}/fd")),
    }  # fmt: skip


FREED = ("contexts", "objects", "lpt", "device", "host")


def test_killed_clients_leave_nothing(session):
    before = None
    for _ in range(5):
        evictions = session.device_info("simgpu0")["evictions"]
        with started_python(BUSY_CLIENT, session) as client:
            assert client.stdout.readline() == "ready\n"
            eventually(lambda n=evictions: session.device_info("simgpu0")["evictions"] > n, "it is at work")
        eventually(lambda: remains(session)["sessions"] == 1, "its session has ended")
        eventually(lambda: not any(remains(session)[name] for name in FREED), "its memory is freed")
        before = before or remains(session)
    try:
        eventually(lambda: remains(session) == before, "")
    except AssertionError:
        assert remains(session) == before


def test_a_stopped_client_harms_nobody(session):
    with started_python(BUSY_CLIENT, session) as client:
        client.stdout.readline()
        client.send_signal(signal.SIGSTOP)
        a = gmem.full(16 << 20, 5, np.uint8, page_size="64K")
        with gmem.device("simgpu0").context() as context:
            assert context.launch(lambda x: int(x.sum()), a).wait(60) == 5 * (16 << 20)


CHECK = """
    import gmem, numpy as np
    a = gmem.full(3 << 20, 1, np.uint8, page_size="64K")
    with gmem.device("simgpu0").context() as context:
        context.launch(lambda x: x.__iadd__(1), a).wait(60)
    assert (a == 2).all()
    print("user mode only" if gmem.default().user_mode_only else "full", sorted(gmem.stats()) != [])
"""


@pytest.fixture
def shared_session(session, monkeypatch):
    """The private daemon, opened up as the system's is: the directory and sockets can be reached by everybody."""
    directory = Path(session.path).parent
    for path in (directory, *directory.iterdir()):
        path.chmod(0o777 if stat.S_ISDIR(path.stat().st_mode) else 0o666)
    return session


@as_root
def test_an_ordinary_user_of_the_service(shared_session):
    done = run_python(CHECK, session=shared_session, uid=NOBODY)
    assert done.stdout == "full True\n", done.stderr
    done = run_python(
        """
        import gmem
        try:
            gmem.default().attach("simgpu", "mine", capacity="1M")
        except gmem.PermissionDenied:
            print("refused")
        """,
        session=shared_session, uid=NOBODY,
    )  # fmt: skip
    assert done.stdout == "refused\n", done.stderr


@as_root
def test_an_ordinary_users_own_daemon():
    code = 'import gmem\ngmem.connect(devices=["simgpu0:capacity=1M"])\n'
    done = run_python(code + textwrap.dedent(CHECK), uid=NOBODY)
    assert done.stdout in ("user mode only True\n", "full True\n"), done.stderr


def test_examples():
    """Those that need a GPU run there: tests/gpu/run.sh."""
    for example in sorted((ROOT / "client" / "examples").glob("*.py")):
        if example.name.startswith("cuda_"):
            continue
        done = run_python(f"import runpy; runpy.run_path({str(example)!r}, run_name='__main__')")
        assert done.returncode == 0 and done.stdout, f"{example.name}: {done.stderr}"


def test_memory_beyond_a_grown_mapping_is_sigbus(session):
    code = """
        import ctypes, gmem
        libc = ctypes.CDLL(None)
        libc.mremap.restype = ctypes.c_void_p
        libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
        va, size = gmem.default().map(1 << 20, 4096, "share")
        ctypes.memset(va, 7, size)
        va = libc.mremap(va, size, 2 * size, 1)
        assert ctypes.string_at(va + size - 1, 1) == b"\\x07"
        print("inside", flush=True)
        ctypes.string_at(va + size, 1)
        print("outside", flush=True)
    """
    done = run_python(code, session=session)
    assert done.stdout == "inside\n" and done.returncode == -signal.SIGBUS, done.stderr
