# SPDX-License-Identifier: Apache-2.0
"""Pools in Python: several processes, users and device contexts on the same memory."""

import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import gmem
import numpy as np
import pytest
from helpers import ROOT, eventually, run_python

NOBODY, OTHER = 65534, 54323
WORDS = 1 << 16  # 512 KiB of int64

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be two other users")


def total(array):
    return int(array.sum())


def put(array, at, value):
    array[at] = value


def python(code, session, uid=None, ok=True):
    done = run_python(code, session=session, uid=uid)
    assert (done.returncode == 0) is ok, (done.stdout, done.stderr)
    return done.stdout.strip()


@pytest.fixture
def public(session):
    """The private daemon, opened up as the system's is."""
    directory = Path(session.path).parent
    for path in (directory, *directory.iterdir()):
        path.chmod(0o777 if stat.S_ISDIR(path.stat().st_mode) else 0o666)
    return session


@pytest.mark.parametrize("page_size", ["4K", "64K", "2M"])
def test_one_copy_for_two_processes(session, page_size):
    pool = gmem.pool("table", size=WORDS * 8, page_size=page_size)
    numbers = pool.array(np.int64)
    numbers[:WORDS] = np.arange(WORDS)
    expected = int(numbers.sum())
    said = python(f"""
        import gmem, numpy as np
        pool = gmem.pool("table")
        numbers = pool.array(np.int64)
        assert not numbers.flags.writeable and not pool.writable
        assert pool.address == {pool.address}
        before = gmem.stats()["first_touches"]
        print(numbers.sum(), gmem.stats()["first_touches"] - before)
        writer = None
        """, session)  # fmt: skip
    assert said == f"{expected} 0", "what one process has brought in is there for all"


def test_writers_see_each_other(session):
    pool = gmem.pool("shared", size=4096)
    numbers = pool.array(np.int64)
    python("""
        import gmem, numpy as np
        numbers = gmem.pool("shared", write=True).array(np.int64)
        numbers[7] = 42
        """, session)  # fmt: skip
    assert numbers[7] == 42


def test_contexts_of_two_sessions_hold_duplicates(session):
    """One opened before the pool was, one after; and one of another process."""
    early = gmem.device("simgpu0").context()
    pool = gmem.pool("table", size=1 << 20)
    numbers = pool.array(np.int64)
    numbers[:] = 3
    late = gmem.device("simgpu0").context()
    assert early.launch(total, numbers).wait() == late.launch(total, numbers).wait() == 3 * numbers.size
    said = python("""
        import gmem, numpy as np
        numbers = gmem.pool("table").array(np.int64)
        context = gmem.device("simgpu0").context()
        print(context.launch(lambda array: int(array.sum()), numbers).wait())
        assert all(page["valid"] == 0b11 for page in gmem.where(numbers)), gmem.where(numbers)
        """, session)  # fmt: skip
    assert int(said) == 3 * numbers.size
    early.launch(put, numbers, 0, 4).wait()
    assert numbers[0] == 4 and late.launch(total, numbers).wait() == 3 * numbers.size + 1


def test_a_closed_pools_addresses_are_the_windows_again(session):
    """A context that has mapped a pool must not go on with it when the range has become something else."""
    context = gmem.device("simgpu0").context()
    for round_number in range(3):
        size = (round_number + 1) << 21  # its own: what is given back stays mapped for the next region of that size
        pool = gmem.pool("short", size=size)
        numbers = pool.array(np.int64)
        numbers[:] = round_number
        assert context.launch(total, numbers).wait() == round_number * numbers.size
        address = pool.address
        del numbers
        pool.close()
        pool.unlink()
        plain = gmem.full(size // 8, 5 + round_number, np.int64)
        assert plain.ctypes.data == address, "else this shows nothing"
        assert context.launch(total, plain).wait() == (5 + round_number) * plain.size
        context.launch(put, plain, 1, 100).wait()
        assert plain[1] == 100 and plain[0] == 5 + round_number
        del plain


def test_the_range_is_busy_in_a_process(session):
    pool = gmem.pool("table", size=8192)
    said = python(f"""
        import ctypes, gmem
        libc = ctypes.CDLL(None)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
        session = gmem.connect({session.path!r})
        context = gmem.device("simgpu0").context()
        assert libc.mmap({pool.address}, 4096, 3, 0x100022, -1, 0) == {pool.address}
        try:
            gmem.pool("table", write=False)
        except gmem.Exists as error:
            print(error.argument)
        made = gmem.pool("mine", size=1 << 20)      # another range is found for what is new
        made.array()[:] = 1
        assert context.launch(lambda array: int(array.sum()), made.array()).wait() == 1 << 20
        assert len(session.request("map")["regions"]) == 1
        """, session)  # fmt: skip
    assert said == "name"


def test_published_for_ever(session):
    pool = gmem.pool("table", size=WORDS * 8, page_size="64K")
    numbers = pool.array(np.int64)
    numbers[:] = np.arange(WORDS)
    context = gmem.device("simgpu0").context()
    context.launch(put, numbers, 0, 9).wait()
    pool.publish()
    expected = int(numbers.sum())
    assert numbers[0] == 9 and context.launch(total, numbers).wait() == expected
    for call in (lambda: gmem.discard(numbers), lambda: gmem.memcpy(numbers, gmem.zeros(WORDS, np.int64)),
                 lambda: gmem.pool("table", write=True)):  # fmt: skip
        with pytest.raises((gmem.PermissionDenied, gmem.Busy)):
            call()
    child = os.fork()
    if not child:
        numbers[1] = 5
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGSEGV, "as a write to any memory that is read-only"
    with pytest.raises(gmem.ContextLost):
        context.launch(put, numbers, 1, 5).wait()
    pool.publish()  # once more is no error
    assert int(numbers.sum()) == expected and not pool.array().flags.writeable
    assert python("""
        import gmem, numpy as np
        pool = gmem.pool("table")
        print(pool.array(np.int64).sum(), pool.published)
        try:
            gmem.pool("table", write=True)
        except gmem.GmemError as error:
            assert error.argument == "write"
        """, session) == f"{expected} True"  # fmt: skip


def test_publish_an_array(session):
    table = np.random.default_rng(1).random((1000, 17))
    pool = gmem.pool("embedding").publish(table)
    assert pool.published and not pool.writable
    again = gmem.pool("embedding").open()
    np.testing.assert_array_equal(again.array(float, (1000, 17)), table)
    with pytest.raises(gmem.PermissionDenied):
        pool.publish(table)


@pytest.mark.parametrize("page_size", ["4K", "64K"])
def test_published_where_both_have_no_room(connect, page_size):
    """What leaves for lack of room before it was moved is no copy of anything yet."""
    session = connect("name=tier,driver=zstd,capacity=32M,ratio=1,tier=1", settings=["host.limit=8M"])
    with gmem.pool("table", size=12 << 20, page_size=page_size, session=session) as pool:
        numbers = pool.array(np.int64)
        numbers[:] = np.arange(1, numbers.size + 1)
        pool.publish()
        assert np.array_equal(numbers, np.arange(1, numbers.size + 1))
        evicted = next(h["evictions"] for h in session.stats()["hnodes"] if h["name"] == "host")
        assert evicted > 0
        del numbers


def test_who_kept_the_old_files_can_not_change_what_is_published(session):
    """A writer's descriptors and mappings of before are of files that nobody reads any more."""
    pool = gmem.pool("table", size=1 << 20, page_size="4K")
    numbers = pool.array(np.int64)
    numbers[:] = 1
    spoiler = f"""
        import ctypes, gmem, mmap, os, sys
        from gmem._client import ffi, lib
        pool = gmem.pool("table", write=True)
        pool.array()[0]
        files = [f for f in os.listdir("/proc/self/map_files") if int(f.split("-")[0], 16) == pool.address]
        fd = os.open("/proc/self/map_files/" + files[0], os.O_RDWR)
        offset = pool.address - {session.window[0]}
        other = mmap.mmap(fd, 1 << 20, offset=offset)
        print("ready", flush=True)
        sys.stdin.readline()
        other[:8] = b"spoiled!"
        os.pwrite(fd, b"spoiled!", offset + 8192)
        print("done", flush=True)
        """  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(spoiler)], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True, env={**os.environ, "GMEM_SOCKET": session.path})
    try:
        assert process.stdout.readline() == "ready\n"
        pool.publish()
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "done\n"
        said = python("""
            import gmem, numpy as np
            print(gmem.pool("table").array(np.int64).sum())
            """, session)  # fmt: skip
        assert int(said) == numbers.size
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def test_it_lives_until_unlinked_or_its_owner_ends(connect, session):
    python("""
        import gmem
        gmem.pool("short", size=4096)
        gmem.pool("long", size=4096, persistent=True).array()[:] = 7
        """, session)  # fmt: skip
    eventually(lambda: [p["name"] for p in session.request("pools")["pools"]] == ["long"], "its owner has ended")
    pool = gmem.pool("long")
    assert (pool.array() == 7).all(), "nobody had it open meanwhile"
    pool.unlink()
    with pytest.raises(gmem.NotFound):
        gmem.pool("long", write=False)
    assert (pool.array() == 7).all(), "who has it open keeps it"
    pool.close()
    eventually(lambda: session.stats()["objects"] == 0, "all of it is gone")


def test_fork_shares_it(session):
    pool = gmem.pool("table", size=4096)
    reader = gmem.pool("other", size=4096, persistent=True)
    reader.array()[:] = 3
    reader.close()
    seen = gmem.pool("other").array()
    numbers = pool.array(np.int64)
    child = os.fork()
    if not child:
        numbers[0] = 5
        mine = gmem.pool("table", write=True).array(np.int64)
        os._exit(0 if mine[0] == 5 and (seen == 3).all() else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert numbers[0] == 5
    gmem.pool("other").unlink()


def test_an_opener_that_is_killed(session):
    pool = gmem.pool("table", size=8 << 20, page_size="4K")
    numbers = pool.array(np.int64)
    numbers[:] = 1
    for wait in (0.0, 0.01, 0.05):
        process = subprocess.Popen(
            [sys.executable, "-c", "import gmem\nwhile True:\n  p = gmem.pool('table')\n  p.array().sum()\n"
             "  p.close()\n"], env={**os.environ, "GMEM_SOCKET": session.path})  # fmt: skip
        eventually(lambda: any(p["readers"] for p in session.request("pools")["pools"]), "it has opened the pool")
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(wait)
        process.kill()
        process.wait()
        eventually(lambda: not any(p["readers"] for p in session.request("pools")["pools"]), "it is gone")
        assert numbers.sum() == numbers.size


def test_it_counts_against_its_owners_quota(session):
    session.request("quota", name="host", bytes=4 << 20)
    session.request("quota", name="simgpu0", bytes=2 << 20)
    with pytest.raises(gmem.QuotaExceeded):
        gmem.pool("large", size=8 << 20)
    pool = gmem.pool("fits", size=3 << 20, page_size="4K")
    pool.array()[:] = 1
    assert session.request("sessions")["sessions"][0]["resident_bytes"] == {"0": 3 << 20}
    with pytest.raises(gmem.QuotaExceeded):
        gmem.zeros(4 << 20, np.uint8)
    python("import gmem; gmem.pool('fits').array().sum()", session)
    sizes = {row["session"]: row["resident_bytes"] for row in session.request("sessions")["sessions"]}
    assert sizes[session.id] == {"0": 3 << 20} and sum(map(bool, sizes.values())) == 1, "readers pay nothing"


def test_arguments_are_named(session):
    for call, argument in (
        (lambda: gmem.pool("../x", size=1), "name"), (lambda: gmem.pool("", size=1), "name"),
        (lambda: gmem.pool("a" * 65, size=1), "name"), (lambda: gmem.pool("a/b", size=1), "name"),
        (lambda: gmem.pool("a\0b", size=1), "name"), (lambda: gmem.pool(".hidden", size=1), "name"),
        (lambda: gmem.pool("a", size=0), "size"), (lambda: gmem.pool("a", size=1, mode=0o1000), "mode"),
        (lambda: gmem.pool("a", size=1 << 62), "bytes"), (lambda: gmem.pool("none", write=True), "name"),
        (lambda: gmem.pool("a", size=1, page_size="3K"), "page_size"),
        (lambda: gmem.pool("p", size=4096).array(np.int64, 1000), "shape"),
        (lambda: gmem.pool("p").array(offset=5000), "offset"),
    ):  # fmt: skip
        with pytest.raises(gmem.GmemError) as caught:
            call()
        assert caught.value.argument == argument


def test_gmemctl_pools(session):
    pool = gmem.pool("table", size=1 << 20, mode=0o640)
    pool.array()[:] = 1
    command = [str(ROOT / ".venv/bin/gmemctl"), "--socket", session.path, "pools"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "table" in shown and "640" in shown and "1.0 MiB" in shown
    rows = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)["pools"]
    assert rows[0]["name"] == "table" and rows[0]["resident_bytes"] == {"0": 1 << 20} and rows[0]["writers"] == 1
    subprocess.run([*command, "--unlink", "table"], check=True)
    assert session.request("pools")["pools"] == []


@root_only
def test_other_users(public):
    gmem.pool("private", size=4096).array()[:] = 1
    pool = gmem.pool("public", size=4096, mode=0o644)
    pool.array()[:] = 2
    said = python("""
        import errno, fcntl, gmem, mmap, os
        for name, write in (("private", False), ("public", True)):
            try:
                gmem.pool(name, write=write)
                raise SystemExit(f"{name} could be opened")
            except gmem.PermissionDenied as error:
                assert error.argument == "name"
        pool = gmem.pool("public")
        assert (pool.array() == 2).all()
        for call in (pool.unlink, pool.publish):
            try:
                call()
                raise SystemExit("not the owner's")
            except gmem.PermissionDenied:
                pass
        assert [row["name"] for row in gmem.default().request("pools")["pools"]] == ["public"]
        print("ok")
        """, public, uid=NOBODY)  # fmt: skip
    assert said == "ok"


@root_only
def test_who_may_only_read_can_not_write(public):
    """The descriptor, other ways to it, the mapping, and what can be asked of gmemd."""
    pool = gmem.pool("public", size=1 << 20, mode=0o644, page_size="4K")
    pool.array()[:] = 2
    said = python("""
        import array, ctypes, errno, fcntl, gmem, mmap, os, socket, struct
        session = gmem.default()
        pool = gmem.pool("public")
        assert (pool.array() == 2).all()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect(session.path)
        hello = struct.pack("=IHHII32s32s", 0x4D454D47, 1, 1, 5, 0, session.token, b"")
        sock.send(hello)
        sock.recv(1024)
        sock.send(struct.pack("=IHHIIQQ", 0x4D454D47, 1, 6, 1, 0, pool.address, 0))
        answer, fds, _, _ = socket.recv_fds(sock, 1024, 2)
        fd, = fds
        offset = struct.unpack("=IHHiIQQQ", answer[:40])[7]

        def errno_of(call):
            try:
                call()
            except OSError as error:
                return error.errno
            return 0

        libc = ctypes.CDLL(None, use_errno=True)
        def c(name, *args):
            libc.syscall  # noqa
            if getattr(libc, name)(*args) < 0:
                raise OSError(ctypes.get_errno(), name)
        address = ctypes.c_void_p(pool.address)
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        assert errno_of(lambda: os.pwrite(fd, b"x", offset)) == errno.EBADF
        assert errno_of(lambda: os.open(f"/proc/self/fd/{fd}", os.O_RDWR)) == errno.EACCES
        assert errno_of(lambda: os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_TRUNC)) == errno.EACCES
        assert errno_of(lambda: os.fchmod(fd, 0o666)) == errno.EPERM
        assert errno_of(lambda: os.ftruncate(fd, 0)) == errno.EINVAL
        assert errno_of(lambda: fcntl.fcntl(fd, 1033, 0x8)) == errno.EPERM       # F_ADD_SEALS, F_SEAL_WRITE
        assert errno_of(lambda: c("fallocate", fd, 3, ctypes.c_long(offset), ctypes.c_long(4096))) == errno.EBADF
        both = mmap.PROT_WRITE | mmap.PROT_READ
        assert errno_of(lambda: mmap.mmap(fd, 4096, mmap.MAP_SHARED, both, offset=offset)) == errno.EACCES
        shared = mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ, offset=offset)
        assert errno_of(lambda: c("madvise", address, 4096, 9)) in (errno.EACCES, errno.EINVAL)  # MADV_REMOVE
        for call in (lambda: gmem.discard(pool.array()), lambda: gmem.advise(pool.array(), "pinned", "host"),
                     lambda: gmem.memcpy(pool.array(), gmem.zeros(1 << 20, "u1"))):
            try:
                call()
                raise SystemExit("could be written")
            except gmem.PermissionDenied:
                pass
        c("mprotect", address, 4096, 3)              # of one's own mapping: it is private
        ctypes.memset(pool.address, 9, 4096)
        print("ok")
        """, public, uid=OTHER)  # fmt: skip
    assert said == "ok"
    assert (pool.array() == 2).all()


def test_attaching_commits_over_the_ring(public):
    """One request through the control plane finds the pool by name; that it is mapped goes the short way."""
    gmem.pool("short_way", size=WORDS * 8, mode=0o666)
    code = """
        import gmem

        session = gmem.connect()
        before = session.stats()["ring_requests"]
        gmem.pool("short_way", write=False)
        print(session.stats()["ring_requests"] - before)
    """
    assert int(python(textwrap.dedent(code), public)) >= 1
