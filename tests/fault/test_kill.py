# SPDX-License-Identifier: Apache-2.0
"""kill.py for a while; `make test-kill N=1000` for longer."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE))  # behind others: it has a module kernels, too
from kill import DOUBLE, ROOT, Target, wait_for  # noqa: E402


@pytest.fixture
def double():
    subprocess.run(["make", "-s", str(DOUBLE.relative_to(ROOT))], cwd=ROOT, check=True)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("flags", [[], ["--gpu"]], ids=["", "gpu"])
def test_nothing_is_lost_whatever_kills_the_daemon(flags, double):
    seed = os.environ.get("GMEM_KILL_SEED", "1")
    # more, and fewer kills, on a machine that is busy
    command = [sys.executable, str(HERE / "kill.py"), *flags, "--seconds", "60", "--kills", "20", "--seed", seed]
    done = subprocess.run(command, capture_output=True, text=True, timeout=220)
    last = done.stdout.splitlines()[-1:]
    found = re.fullmatch(r"kills=(\d+) lost=(\d+) longest_stall_s=([\d.]+)", last[0] if last else "")
    assert found, done.stdout + done.stderr
    print(last[0])
    assert done.returncode == 0 and found[2] == "0", done.stdout
    assert int(found[1]) >= 10, "it was hardly killed at all"


def dies_taking_over(target: Target, lives: int) -> bool:
    """Ends the daemon; whether the next one, which reads where it is to end, has not come to serve anybody."""
    seen = {target.child()}
    os.kill(target.child(), signal.SIGKILL)

    def settled() -> bool:
        seen.add(target.child())
        return target.lives() > lives or len(seen - {0}) > 2

    assert wait_for(settled, 60)
    return target.lives() == lives


def killed_at(point: str, code: str, check: str = "", gpu: bool = False, **environ: str) -> None:
    """Runs code as a client. When it waits for its standard input, the daemon is ended; the next life dies at point,
    on what the client does then, or while it takes over; the client ends by itself at the end of its input. check: a
    program that runs meanwhile."""
    target = Target(Path(tempfile.mkdtemp(prefix="gmem-kill-")), gpu)
    lives = target.lives()
    client = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), target.socket], text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              env={**os.environ, **target.environ, **environ})  # fmt: skip
    try:
        assert client.stdout.readline() == "ready\n"
        target.spec.write_text(point)
        early = dies_taking_over(target, lives)
        target.spec.write_text("")
        client.stdin.write("\n")
        client.stdin.flush()
        assert client.stdout.readline() == "done\n"
        assert wait_for(lambda: target.lives() > lives + (not early), 10), "it did not come by there"
        if check:
            subprocess.run([sys.executable, "-c", textwrap.dedent(check), target.socket], check=True, timeout=60)
        client.stdin.close()
        assert client.wait(30) == 0
        assert not target.left()
    finally:
        client.kill()
        client.wait()
        client.stdout.close()
        status = target.stop()
        target.kill()
    assert status == 0


def test_a_session_that_has_asked_for_nothing_yet_is_served_by_the_next_daemon():
    """Its ring's doorbell has never been rung: nothing tells the successor's threads of it but the successor."""
    target = Target(Path(tempfile.mkdtemp(prefix="gmem-kill-")))
    code = """
        import sys
        import gmem
        session = gmem.connect(sys.argv[1])
        print("ready", flush=True)
        sys.stdin.readline()
        array = gmem.zeros(100_000)
        array[:] = 1
        print("done", flush=True)
        """
    client = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), target.socket], text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    try:
        assert client.stdout.readline() == "ready\n"
        lives = target.lives()
        os.kill(target.child(), signal.SIGKILL)
        assert wait_for(lambda: target.lives() > lives, 30)
        out, _ = client.communicate("\n", timeout=60)
        assert out == "done\n"
    finally:
        client.kill()
        client.wait()
        target.stop()
        target.kill()


@pytest.mark.parametrize("point", ["PUBLISH_COPY:3", "PUBLISH_MOVED:3", "PUBLISHED:1", "RECORD_PUBLISHED:3"])
def test_a_pool_is_published_whoever_is_killed_meanwhile(point):
    """The daemon dies between two steps of it; the next one, or the request that is made again, finishes it."""
    client = """
        import sys
        import gmem, numpy as np
        gmem.connect(sys.argv[1])
        pool = gmem.pool("table", size=64 * 4096, page_size="4K")
        numbers = pool.array(np.int64)
        numbers[:] = np.arange(numbers.size)
        gmem.prefetch(numbers[: numbers.size // 2], "simgpu0")
        print("ready", flush=True)
        sys.stdin.readline()
        pool.publish()
        assert (numbers == np.arange(numbers.size)).all()
        print("done", flush=True)
        sys.stdin.read()
        """
    check = """
        import sys
        import gmem, numpy as np
        gmem.connect(sys.argv[1])
        pool = gmem.pool("table")
        numbers = pool.array(np.int64)
        assert (numbers == np.arange(numbers.size)).all() and pool.published
        """
    killed_at(point, client, check)


def test_memory_moves_and_the_daemon_is_killed_before_it_handles_that():
    """It has read the event, which is not told again: its successor sees in /proc where the pages are now."""
    killed_at("EVENT:1", """
        import ctypes, mmap, sys
        import gmem, numpy as np
        PAGE, PAGES = 4096, 64
        session = gmem.connect(sys.argv[1])
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mremap.restype = ctypes.c_void_p
        libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
        libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        va, size = session.map(PAGES * PAGE, PAGE, "none")
        words = lambda at, count: np.frombuffer((ctypes.c_int64 * (count * PAGE // 8)).from_address(at), np.int64)
        words(va, PAGES)[:] = np.arange(PAGES * PAGE // 8)
        gmem.prefetch(words(va, PAGES)[: 20 * PAGE // 8], "simgpu0")
        room = mmap.mmap(-1, 21 * PAGE)
        there = ctypes.addressof(ctypes.c_char.from_buffer(room))
        print("ready", flush=True)
        sys.stdin.readline()
        moved = libc.mremap(va + 10 * PAGE, 20 * PAGE, 20 * PAGE, 3, there)  # MREMAP_MAYMOVE | MREMAP_FIXED
        assert moved == there, ctypes.get_errno()
        expected = np.arange(PAGES * PAGE // 8)
        assert (words(moved, 20) == expected[10 * PAGE // 8 : 30 * PAGE // 8]).all()
        assert (words(va, 10) == expected[: 10 * PAGE // 8]).all()
        assert (words(va + 30 * PAGE, PAGES - 30) == expected[30 * PAGE // 8 :]).all()
        print("done", flush=True)
        sys.stdin.read()
        for at, pages in ((moved, 20), (va, 10), (va + 30 * PAGE, PAGES - 30)):
            libc.munmap(at, pages * PAGE)
        """)  # fmt: skip


@pytest.mark.parametrize("point", ["PUBLISH_COPY:40", "PUBLISH_MOVED:80"])
def test_a_pool_is_published_without_room_whoever_is_killed_meanwhile(point):
    """What has not been moved yet must not be dropped for lack of room, before the daemon dies or after."""
    killed_at(point, """
        import sys
        import gmem, numpy as np
        gmem.connect(sys.argv[1])
        pool = gmem.pool("table", size=14 << 20, page_size="64K")
        numbers = pool.array(np.int64)
        numbers[:] = np.arange(1, numbers.size + 1)
        print("ready", flush=True)
        sys.stdin.readline()
        pool.publish()
        assert pool.published and (numbers == np.arange(1, numbers.size + 1)).all()
        print("done", flush=True)
        sys.stdin.read()
        """)  # fmt: skip


HOLDER = """
    import ctypes, sys, threading
    import gmem, numpy as np
    session = gmem.connect(sys.argv[1])
    numbers = gmem.zeros(64 * 512, np.int64, page_size="4K")
    numbers[:] = np.arange(numbers.size)
    at, half = numbers.ctypes.data, numbers.nbytes // 2
    context = gmem.device("simgpu0").context()
    {before}
    print("ready", flush=True)
    sys.stdin.readline()
    {then}
    touch = threading.Thread(target=ctypes.memset, args=(at, 7, 1), daemon=True)  # without the interpreter lock
    {after}
    assert numbers[0] == 7 and numbers[-1] == numbers.size - 1
    print("done", flush=True)
    sys.stdin.read()
    """


@pytest.mark.parametrize("point, count", [("RECORD_PUBLISHED:1", 1), ("RING_COMPLETES:1", 1),
                                          ("RECORD_PUBLISHED:1", 2), ("RECORD_PUBLISHED:2", 2)])  # fmt: skip
def test_what_is_acquired_while_the_daemon_is_killed_is_held_once(point, count):
    """Held twice, it would never come back: the one release leaves the other hold."""
    ranges = "[(at, half), (at + half, half)]" if count == 2 else "[(at, half)]"
    after = f"context.release({ranges}); touch.start(); touch.join()"
    killed_at(point, HOLDER.format(before="", then=f"context.acquire({ranges}, True)", after=after))


@pytest.mark.parametrize("point, ring", [("RING_COMPLETES:1", "1"), ("HOLD_ENDED:1", "1"), ("HOLD_ENDED:1", "0")])
def test_a_release_is_done_once_though_the_daemon_is_killed_before_it_says_so(point, ring):
    """Of two holds on one range; else a kernel would lose what it is using. Without a ring, it is sent again."""
    acquire, release = "context.acquire([(at, half)], True)", "context.release([(at, half)])"
    killed_at(point, HOLDER.format(before=f"{acquire}; {acquire}", then=release, after=f"""touch.start()
    touch.join(0.5)
    assert touch.is_alive(), "nobody holds it any more"
    {release}
    touch.join()
    try:
        {release}
    except gmem.InvalidArgument:
        pass
    else:
        raise AssertionError("a third hold")"""), GMEM_RING=ring)


def test_what_a_kernel_held_is_released_once_though_the_daemon_is_killed_before_it_says_so():
    """The device's process asks for that, without a ring; what the client holds itself stays."""
    killed_at("HOLD_ENDED:1", """
        import ctypes, sys, threading
        import gmem, numpy as np
        from gmemd.control import Control
        session = gmem.connect(sys.argv[1])
        with Control(sys.argv[1]) as control:
            options = {"capacity": "4M", "replayable": "off"}
            control.request("attach", driver="simgpu", name="strict", config=options)
        numbers = gmem.zeros(64 * 512, np.int64, page_size="4K")
        context = gmem.device("strict").context()
        assert context.launch(lambda array: int(array.sum()), numbers).wait() == 0
        context.acquire([(numbers.ctypes.data, numbers.nbytes)], True)
        print("ready", flush=True)
        sys.stdin.readline()
        assert context.launch(lambda array: array.fill(3), numbers).wait() is None
        touch = threading.Thread(target=ctypes.memset, args=(numbers.ctypes.data, 7, 1), daemon=True)
        touch.start()
        touch.join(0.5)
        assert touch.is_alive(), "nobody holds it any more"
        context.release([(numbers.ctypes.data, numbers.nbytes)])
        touch.join()
        assert numbers[-1] == 3
        print("done", flush=True)
        sys.stdin.read()
        """)


GPU_CLIENT = f"""
    import os, subprocess, sys
    sys.path.append({str(ROOT / "tests/integration")!r})
    import gmem, numpy as np
    from cuda import Cuda
    session = gmem.connect(sys.argv[1])
    if len(sys.argv) > 2:  # a visitor
        arrays = [gmem.zeros(1 << 18, np.int64) for _ in range(3)]
        cuda = Cuda()
        with gmem.acquire("cuda0", *arrays) as views:
            for view in views:
                cuda.bump(view, 5)
        assert all((a == 5).all() for a in arrays)
        sys.exit()
    visitor = [sys.executable, "-c", open("/proc/self/cmdline").read().split("\\0")[2], sys.argv[1], "visitor"]
    cuda = Cuda()
    arrays = [gmem.zeros(1 << 18, np.int64) for _ in range(9)]  # the device has room for six

    def bump(array, value):
        with gmem.acquire("cuda0", array) as view:
            cuda.bump(view, value)

    for n, a in enumerate(arrays):
        bump(a, n)
    with gmem.acquire("cuda0", arrays[8], mode="r"):
        pass
    cuda.synchronize()
    print("ready", flush=True)
    sys.stdin.readline()
    for turn in range(2):
        for n, a in enumerate(arrays):
            bump(a, 1)
        subprocess.run(visitor, check=True)
        for n, a in enumerate(arrays):
            assert (a == n + turn + 1).all(), (turn, n, a[0])
    gmem.discard(arrays[0])
    assert (arrays[0] == 0).all()
    bump(arrays[0], 3)
    assert (arrays[0] == 3).all()
    print("done", flush=True)
    sys.stdin.read()
    """


@pytest.mark.parametrize(
    "point",
    ["BOX_PUT:1", "BOX_REQUEUED:2", "BOX_DROPPED:1", "FRAME_NOTED:1", "FRAME_PLACED:1", "FRAME_LEFT:1", "FRAME_ENDED:1",
     "RECOVER_BOXES:1", "RECOVER_FRAME:3", "RECOVER_CHANNEL:1", "RECOVER_LISTED:1", "RECOVER_PAGE:5"],
)  # fmt: skip
def test_memory_of_a_gpu_is_kept_wherever_the_daemon_is_killed(double, point):
    killed_at(point, GPU_CLIENT, gpu=True)
