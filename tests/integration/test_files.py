# SPDX-License-Identifier: Apache-2.0
"""Files as unified memory: read when they are touched, dropped when there is no room, written back when asked;
numpy.memmap is the oracle."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
from contextlib import suppress
from pathlib import Path

import gmem
import numpy as np
import pytest
from helpers import ROOT, eventually, run_python
from test_adopt import supervised  # noqa: F401

MIB = 1 << 20


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """8 MiB of numbers."""
    path = tmp_path / "words"
    np.arange(MIB, dtype=np.int64).tofile(path)
    return path


def total(array: np.ndarray) -> int:
    return int(array.sum())


def add(array: np.ndarray, value: int) -> None:
    array += value


def on_disk(path: Path) -> np.ndarray:
    return np.fromfile(path, np.int64)


def sigbus(code: str, session: gmem.Session) -> str:
    done = run_python(code, session=session)
    assert done.returncode == -signal.SIGBUS, (done.returncode, done.stderr)
    return done.stdout


def test_it_is_as_numpy_has_it(session: gmem.Session, words: Path) -> None:
    cases = [
        (np.int64, 0, None, "C"), (np.uint8, 5, None, "C"), (np.float32, 4096 * 3 + 12, (100, 7), "C"),
        (np.int16, 2, (33, 5, 2), "F"), (np.int64, 8 * MIB - 8, None, "C"), (np.uint8, 100, 1, "C"),
    ]  # fmt: skip
    for mode in ("r", "c", "r+", "readonly", "copyonwrite", "readwrite"):
        for dtype, offset, shape, order in cases:
            ours = gmem.memmap(words, dtype, mode, offset, shape, order)
            theirs = np.memmap(words, dtype, mode, offset, shape, order)
            assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
            assert ours.flags.writeable == theirs.flags.writeable
            assert ours.flags.c_contiguous == theirs.flags.c_contiguous
            assert ours.tobytes() == theirs.tobytes()
            assert (ours.filename, ours.offset) == (str(words), offset)
            assert ours[:1].filename == str(words) and (ours + 1).filename is None


def test_only_what_is_touched_is_read(session: gmem.Session, words: Path) -> None:
    array = gmem.memmap(words, np.int64, "r", page_size="4K")
    assert not gmem.where(array)["state"].any()
    assert array[512 * 40] == 512 * 40
    assert 0 < (gmem.where(array)["valid"] == 1).sum() < 100
    context = gmem.device("simgpu0").context()
    assert context.launch(total, array[512 * 1000 : 512 * 1010]).wait() == sum(range(512 * 1000, 512 * 1010))
    assert (gmem.where(array[512 * 1000 : 512 * 1010])["valid"] == 2).all(), "read by the device that touched it"
    gmem.prefetch(array[: 512 * 16], "simgpu0")
    assert (gmem.where(array[: 512 * 16])["valid"] == 2).all()
    assert not gmem.where(array[512 * 500 : 512 * 900])["state"].any()


def test_more_than_there_is_room_for(connect, tmp_path: Path) -> None:
    """No tier, and room for a quarter: what is not changed is dropped, what is changed is written back."""
    session = connect("simgpu0:capacity=8M", settings=["host.limit=8M"])
    path = tmp_path / "large"
    np.arange(4 * MIB, dtype=np.int64).tofile(path)  # 32 MiB
    array = gmem.memmap(path, np.int64, "r")
    for _ in range(2):
        assert total(array) == sum(range(4 * MIB))
    context = gmem.device("simgpu0").context()
    assert context.launch(total, array).wait() == sum(range(4 * MIB))
    host = session.stats()["hnodes"][0]
    assert host["evicted_clean"] > 100 and host["out_bytes"] < 40 * MIB
    changed = gmem.memmap(path, np.int64, "r+")
    changed += 3
    assert (changed[:: 4096] == np.arange(0, 4 * MIB, 4096) + 3).all()
    changed.flush()
    assert (on_disk(path) == np.arange(4 * MIB) + 3).all()
    with pytest.raises(gmem.OutOfMemory):  # changed and kept: that needs room
        gmem.memmap(path, np.int64, "c")


def test_flush_writes_what_was_changed(session: gmem.Session, words: Path) -> None:
    array = gmem.memmap(words, np.int64, "r+", page_size="4K")
    context = gmem.device("simgpu0").context()
    array[3] = -1
    context.launch(add, array[512 * 7 : 512 * 8], 5).wait()
    expected = np.arange(MIB)
    assert (on_disk(words) == expected).all()
    array.flush()
    expected[3] = -1
    expected[512 * 7 : 512 * 8] += 5
    assert (on_disk(words) == expected).all()
    os.utime(words, ns=(1, 1))
    array.flush()
    assert words.stat().st_mtime_ns == 1, "what was not changed since is not written again"
    array[4] = -2  # seen, though the page was changed before and flushed
    gmem.flush(array[:10])
    expected[4] = -2
    assert (on_disk(words) == expected).all()
    del array  # the end of the last array writes back, too


def test_the_end_writes_back(session: gmem.Session, words: Path) -> None:
    array = gmem.memmap(words, np.int64, "r+")
    array[0] = 70
    view = array[:2]
    del array
    assert on_disk(words)[0] == 0
    del view
    assert on_disk(words)[0] == 70
    array = gmem.memmap(words, np.int64, "r+")
    array[1] = 71
    session.close()
    assert on_disk(words)[1] == 71


def test_the_end_of_the_program_writes_back(session: gmem.Session, words: Path) -> None:
    done = run_python(f"import gmem\na = gmem.memmap({str(words)!r}, 'i8', 'r+')\na[5] = 99", session=session)
    assert done.returncode == 0, done.stderr
    assert on_disk(words)[5] == 99


def test_new_and_longer_files(session: gmem.Session, tmp_path: Path, words: Path) -> None:
    array = gmem.memmap(tmp_path / "new", np.int64, "w+", offset=16, shape=(1000,))
    array[...] = 7
    array.flush()
    assert (tmp_path / "new").stat().st_size == 16 + 8000
    assert (np.fromfile(tmp_path / "new", np.int64)[2:] == 7).all()
    longer = gmem.memmap(words, np.int64, "r+", shape=(MIB + 5,))
    assert longer[-1] == 0 and words.stat().st_size == 8 * MIB + 40
    with open(words, "r+b") as file:
        assert gmem.memmap(file, np.int64, "r")[9] == 9


def test_copies_stay_private(connect, words: Path) -> None:
    session = connect("simgpu0:capacity=8M", settings=["host.limit=8M"])
    session.attach("zstd", "tier0", capacity="100M", tier=0)
    array, other = gmem.from_file(words, np.int64), gmem.memmap(words, np.int64, "c")
    assert type(array) is np.ndarray
    array += 1
    other[0] = 5
    other.flush()
    assert (array == np.arange(MIB) + 1).all() and other[0] == 5 and other[1] == 1
    assert (on_disk(words) == np.arange(MIB)).all()


def test_bad_arguments(session: gmem.Session, words: Path) -> None:
    for arguments, what in [
        ({"mode": "x"}, "mode"), ({"order": "A"}, "order"), ({"mode": "w+"}, "shape"), ({"offset": -1}, "offset"),
        ({"offset": 8 * MIB + 8, "mode": "r"}, "offset"), ({"dtype": "O"}, "dtype"),
        ({"shape": MIB + 1, "mode": "r"}, "shape"), ({"page_size": 5}, "page_size"), ({"fork": "x"}, "fork"),
    ]:  # fmt: skip
        with pytest.raises(gmem.InvalidArgument) as caught:
            gmem.memmap(words, **{"dtype": np.int64, **arguments})
        assert caught.value.argument == what
    with pytest.raises(FileNotFoundError):
        gmem.memmap(words.with_name("none"), mode="r")


def test_descriptors_that_will_not_do(session: gmem.Session, tmp_path: Path, words: Path) -> None:
    pipe = os.pipe()
    wrong = {
        "pipe": (pipe[0], errno.EOPNOTSUPP), "directory": (os.open(tmp_path, os.O_RDONLY), errno.EINVAL),
        "path": (os.open(words, os.O_PATH), errno.EBADF), "write": (os.open(words, os.O_WRONLY), errno.EBADF),
        "append": (os.open(words, os.O_RDWR | os.O_APPEND), errno.EINVAL),
        "socket": (os.dup(session_socket()), errno.EOPNOTSUPP), "null": (os.open("/dev/null", os.O_RDWR), errno.EINVAL),
        "proc": (os.open("/proc/self/maps", os.O_RDONLY), errno.EOPNOTSUPP),
        "reading": (os.open(words, os.O_RDONLY), errno.EBADF),
    }  # fmt: skip
    for name, (fd, number) in wrong.items():
        with pytest.raises(gmem.GmemError) as caught:
            session.map_file(fd, 0, 4096, 0, "r+" if name in ("append", "reading") else "r", "share")
        assert number == caught.value.errno, (name, str(caught.value))
        assert caught.value.argument == "fd", name
        os.close(fd)
    os.close(pipe[1])
    with open(words, "rb") as file:
        for offset, nbytes in ((8 * MIB, 4096), (0, 8 * MIB + 1), (4096, 8 * MIB)):
            with pytest.raises(gmem.InvalidArgument, match="ends before"):
                session.map_file(file.fileno(), offset, nbytes, 0, "r", "share")
        with pytest.raises(gmem.InvalidArgument, match="offset"):
            session.map_file(file.fileno(), 5, 4096, 0, "r", "share")
    assert session.stats()["regions"] == 0


def session_socket() -> int:
    import socket

    return socket.socket(socket.AF_UNIX).detach()


def test_a_file_that_is_cut_short(session: gmem.Session, words: Path) -> None:
    """What was read stays, what can't be read is SIGBUS, never zeros; and only its own program is hit."""
    mine = gmem.memmap(words, np.int64, "r+", page_size="4K")
    assert mine[0] == 0 and mine[511] == 511
    code = f"""
        import os, gmem
        a = gmem.memmap({str(words)!r}, "i8", "r", page_size="4K")
        assert a[512 * 600] == 512 * 600
        os.truncate({str(words)!r}, 4096)
        assert a[0] == 0 and a[512 * 600] == 512 * 600
        print("so far", flush=True)
        print(a[512 * 1000])
    """
    assert sigbus(code, session) == "so far\n"
    assert mine[511] == 511
    mine[510] = 4
    mine.flush()
    context = gmem.device("simgpu0").context()
    with pytest.raises(gmem.ContextLost, match="SIGBUS"):
        context.launch(total, mine[512 * 300 : 512 * 301]).wait()
    with words.open("r+b") as file:
        file.truncate(8 * MIB)  # longer again: zeros, which it has now
    assert gmem.memmap(words, np.int64, "r")[512 * 1000] == 0


def test_a_file_that_changes_under_load(session: gmem.Session, words: Path) -> None:
    """Nobody but who reads it notices."""
    code = f"""
        import gmem, sys
        a = gmem.memmap({str(words)!r}, "u1", "r", page_size="4K")
        while True:
            for i in range(0, len(a), 4096):
                a[i]
            a = gmem.memmap({str(words)!r}, "u1", "r", page_size="4K")
    """
    stop = threading.Event()

    def resize() -> None:
        while not stop.is_set():
            for size in (8 * MIB, 4096, 100, 3 * MIB):
                os.truncate(words, size)

    resizer = threading.Thread(target=resize)
    resizer.start()
    environment = {**os.environ, "GMEM_SOCKET": session.path}
    try:
        for _ in range(3):
            done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, env=environment, timeout=60,
                                  capture_output=True, text=True)  # fmt: skip
            assert done.returncode == -signal.SIGBUS or "InvalidArgument" in done.stderr, done
    finally:
        stop.set()
        resizer.join()
    assert (gmem.full(1000, 3.0) == 3.0).all()


def test_the_daemon_is_killed(supervised: str, words: Path) -> None:  # noqa: F811
    session = gmem.connect(supervised)
    array = gmem.memmap(words, np.int64, "r+", page_size="4K")
    array[:: 1024] += 1
    counts = 0
    for _ in range(2):
        pid = session.request("ping")["pid"]
        os.kill(pid, signal.SIGKILL)
        array[::1024] += 1
        counts += 1

        def is_back(pid: int = pid) -> bool:
            with suppress(gmem.GmemError):
                return session.request("ping")["pid"] != pid
            return False

        eventually(is_back, "gmemd does not come back", 30)
    expected = np.arange(MIB)
    expected[::1024] += 1 + counts
    assert (array == expected).all()
    array.flush()
    assert (on_disk(words) == expected).all()
    session.close()
