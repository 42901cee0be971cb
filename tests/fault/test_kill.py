# SPDX-License-Identifier: Apache-2.0
"""kill.py for a while; `make test-kill N=1000` for longer."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from kill import Target, wait_for  # noqa: E402


@pytest.mark.timeout(180)
def test_nothing_is_lost_whatever_kills_the_daemon():
    seed = os.environ.get("GMEM_KILL_SEED", "1")
    command = [sys.executable, str(HERE / "kill.py"), "--seconds", "20", "--seed", seed]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    last = done.stdout.splitlines()[-1:]
    found = re.fullmatch(r"kills=(\d+) lost=(\d+) longest_stall_s=([\d.]+)", last[0] if last else "")
    assert found, done.stdout + done.stderr
    print(last[0])
    assert done.returncode == 0 and found[2] == "0", done.stdout
    assert int(found[1]) >= 10, "it was hardly killed at all"


@pytest.mark.parametrize("point", ["PUBLISH_COPY:3", "PUBLISH_MOVED:3", "PUBLISHED:1", "RECORD_PUBLISHED:3"])
def test_a_pool_is_published_whoever_is_killed_meanwhile(point):
    """The daemon dies between two steps of it; the next one, or the request that is made again, finishes it."""
    code = """
        import sys
        import gmem, numpy as np
        gmem.connect(sys.argv[1])
        pool = gmem.pool("table", size=64 * 4096, page_size="4K")
        numbers = pool.array(np.int64)
        numbers[:] = np.arange(numbers.size)
        gmem.prefetch(numbers[: numbers.size // 2], "simgpu0")
        print("filled", flush=True)
        sys.stdin.readline()
        pool.publish()
        assert (numbers == np.arange(numbers.size)).all()
        print("published", flush=True)
        sys.stdin.read()
        """
    directory = Path(tempfile.mkdtemp(prefix="gmem-kill-"))
    target = Target(directory)
    lives = target.lives()
    owner = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), target.socket], text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    try:
        assert owner.stdout.readline() == "filled\n"
        target.spec.write_text(point)
        os.kill(target.child(), signal.SIGKILL)  # the next life reads where it is to end
        assert wait_for(lambda: target.lives() > lives, 30)
        target.spec.write_text("")
        owner.stdin.write("\n")
        owner.stdin.flush()
        assert owner.stdout.readline() == "published\n"
        assert target.lives() > lives + 1, "it did not come by there"
        check = "import sys, gmem, numpy as np; gmem.connect(sys.argv[1]); pool = gmem.pool('table')\n"
        check += "numbers = pool.array(np.int64); assert (numbers == np.arange(numbers.size)).all() and pool.published"
        subprocess.run([sys.executable, "-c", check, target.socket], check=True, timeout=60)
        owner.stdin.close()
        assert owner.wait(30) == 0
        assert not target.left()
    finally:
        owner.kill()
        owner.wait()
        owner.stdout.close()
        assert target.stop() == 0
        shutil.rmtree(directory, ignore_errors=True)


@pytest.mark.parametrize("point", ["PUBLISH_COPY:40", "PUBLISH_MOVED:80"])
def test_a_pool_is_published_without_room_whoever_is_killed_meanwhile(point):
    """What has not been moved yet must not be dropped for lack of room, before the daemon dies or after."""
    code = """
        import sys
        import gmem, numpy as np
        gmem.connect(sys.argv[1])
        pool = gmem.pool("table", size=14 << 20, page_size="64K")
        numbers = pool.array(np.int64)
        numbers[:] = np.arange(1, numbers.size + 1)
        print("filled", flush=True)
        sys.stdin.readline()
        pool.publish()
        assert pool.published and (numbers == np.arange(1, numbers.size + 1)).all()
        """
    directory = Path(tempfile.mkdtemp(prefix="gmem-kill-"))
    target = Target(directory)
    owner = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), target.socket], text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    try:
        assert owner.stdout.readline() == "filled\n"
        target.spec.write_text(point)
        lives = target.lives()
        os.kill(target.child(), signal.SIGKILL)
        assert wait_for(lambda: target.lives() > lives, 30)
        target.spec.write_text("")
        owner.communicate("\n", timeout=60)
        assert owner.returncode == 0
        assert target.lives() > lives + 1, "it did not come by there"
        assert not target.left()
    finally:
        owner.kill()
        owner.wait()
        assert target.stop() == 0
        shutil.rmtree(directory, ignore_errors=True)
