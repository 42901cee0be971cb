# SPDX-License-Identifier: Apache-2.0
"""`gmemctl run`: programs that know nothing of gmem do what they do without it, in half of the memory they need."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import ROOT, as_user, eventually
from programs import C_FLAGS, run_ok

SOURCES = Path(__file__).parent / "any"
GMEMCTL = Path(sysconfig.get_path("scripts")) / "gmemctl"
TIMEOUT_S = 110
MIB = 1 << 20
LIMIT_MIN = MIB

pytestmark = pytest.mark.skipif(
    not os.access("/dev/userfaultfd", os.R_OK | os.W_OK), reason="needs /dev/userfaultfd, as every program does"
)


@dataclass
class Done:
    status: int
    out: bytes
    err: str
    used: dict


def gmem_run(*options: str, command: Sequence[str | Path], tmp_path: Path, **more) -> Done:
    output = tmp_path / "used.json"
    output.unlink(missing_ok=True)
    command = [GMEMCTL, "run", "--output", output, *options, "--", *command]
    done = subprocess.run(command, capture_output=True, timeout=TIMEOUT_S, **more)
    used = json.loads(output.read_text()) if output.exists() else {}
    return Done(done.returncode, done.stdout, done.stderr.decode(errors="replace"), used)


def plain(command: Sequence[str | Path], **more) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, timeout=TIMEOUT_S, **more)


@functools.cache
def built(name: str, folder: Path, compiler: str = "gcc", *libraries: str) -> Path:
    flags = C_FLAGS if compiler == "gcc" else ["-std=gnu++17", *C_FLAGS[1:]]
    made = folder / Path(name).stem
    run_ok([compiler, *flags, SOURCES / name, *libraries, "-o", made])
    return made


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    run_ok(["make", "-s", "-C", ROOT / "client", "lib"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("programs")


# ---- the same output, byte for byte, in half of the memory ----

NUMPY = """
import hashlib, numpy as np
data = np.random.default_rng(7).integers(0, 1000, size=(250, 8000))
made = np.sort(data * 3, axis=1)
print(hashlib.sha256(made.tobytes()).hexdigest())
words = {str(i): [i] * 4 for i in range(30_000)}
print(sum(len(word) for word in words), sum(map(len, words.values())), np.linalg.norm(made[:50].astype(float)))
"""

SQL = """
create table t(a integer primary key, b text, c real);
with recursive n(i) as (select 1 union all select i + 1 from n where i < 120000)
  insert into t select i, printf('%08x-%d', (i * 2654435761) % 4294967296, i), i * 0.37 from n;
create index tb on t(b);
select count(*), sum(length(b)), round(sum(c), 2) from t;
select b, count(*) from (select substr(b, 1, 3) b from t) group by b order by 2 desc, 1 limit 20;
select a.b from t a join t b on a.a = b.a + 1 order by a.b desc limit 10;
"""

GIT = """
set -e
rm -rf repository; git init -q repository; cd repository
export GIT_CONFIG_GLOBAL=/dev/null GIT_AUTHOR_DATE=2020-01-01T00:00:00Z GIT_COMMITTER_DATE=2020-01-01T00:00:00Z
"$PYTHON" -c '
import random
r = random.Random(1)
lines = ["%032x" % r.getrandbits(128) for _ in range(12000)]
for c in range(12):
    for _ in range(200): lines[r.randrange(12000)] = "%032x" % r.getrandbits(128)
    data = "\\n".join(lines)
    print("commit refs/heads/master\\nmark :%d\\ncommitter a <a@b> %d +0000" % (c + 1, 1577836800 + c))
    print("data 3\\nc%02d" % c)
    print("M 100644 inline big.txt\\ndata %d\\n%s\\n" % (len(data), data))
' | git fast-import --quiet
git checkout -q master
git -c pack.threads=2 repack -adfq --window=12
git log --stat --format=%H
git log -p --format=%H | sha256sum
git blame big.txt | sha256sum
git fsck --full
"""


def c_source() -> str:
    """Large enough for the compiler to need some tens of MiB."""
    functions = (
        f"static int f{i}(int a, int b) {{ int s = 0; for (int i = 0; i < a; i++) switch ((i * {i} + b) % 5) "
        f"{{ case 0: s += i * {i}; break; case 1: s ^= b; break; default: s += f{i - 1}(a / 2, s); }} return s; }}"
        for i in range(1, 200)
    )
    first, last = "static int f0(int a, int b) { return a + b; }", "int main(void) { return f199(3, 4); }"
    return "\n".join([first, *functions, last])


def compiled(source: Path, made: Path) -> list[str | Path]:
    return ["gcc", "-O1", "-g", "-c", source, "-o", made]


def half(tmp_path: Path, command: Sequence[str | Path], **more) -> tuple[Done, Done]:
    """In all the memory it wants, to see how much that is, and in half of it."""
    whole = gmem_run(command=command, tmp_path=tmp_path, **more)
    peak = whole.used["host_peak_bytes"]
    assert peak > 2 * LIMIT_MIN, "not enough for the test to say anything"
    assert whole.used["to_tiers_bytes"] == 0
    limited = gmem_run("--limit", str(peak // 2), command=command, tmp_path=tmp_path, **more)
    assert limited.used["limit_bytes"] == peak // 2
    assert 0 < limited.used["host_peak_bytes"] <= peak // 2
    assert limited.used["to_tiers_bytes"] > 0 and limited.used["tiers"][0]["in_bytes"] > 0
    assert limited.used["lost_pages"] == 0
    return whole, limited


def check_same(expected: subprocess.CompletedProcess, *others: Done) -> None:
    assert expected.returncode == 0, expected.stderr
    for other in others:
        assert other.status == 0, other.err
        assert other.out == expected.stdout
        said = [line for line in other.err.splitlines() if not line.startswith("gmem: ")]
        assert said == expected.stderr.decode().splitlines()


def test_numpy(tmp_path: Path) -> None:
    command = [sys.executable, "-c", NUMPY]
    check_same(plain(command), *half(tmp_path, command))


def test_threads(tmp_path: Path, folder: Path) -> None:
    command = [built("any_threads.cpp", folder, "g++"), "4"]
    check_same(plain(command), *half(tmp_path, command))


@pytest.mark.skipif(not shutil.which("sqlite3"), reason="no sqlite3")
def test_sqlite(tmp_path: Path) -> None:
    more = {"input": SQL.encode()}
    check_same(plain(["sqlite3", ":memory:"], **more), *half(tmp_path, ["sqlite3", ":memory:"], **more))


def test_git(tmp_path: Path) -> None:
    more = {"cwd": tmp_path, "env": {**os.environ, "PYTHON": sys.executable}}
    check_same(plain(["bash", "-c", GIT], **more), *half(tmp_path, ["bash", "-c", GIT], **more))


def test_gcc(tmp_path: Path) -> None:
    source, made = tmp_path / "large.c", tmp_path / "large.o"
    source.write_text(c_source())
    expected = plain(compiled(source, made))
    before = made.read_bytes()
    made.unlink()
    check_same(expected, *half(tmp_path, compiled(source, made)))
    assert made.read_bytes() == before


# ---- what programs do with memory ----


@pytest.mark.parametrize("page_size", ["4K", "64K", "2M"])
@pytest.mark.parametrize("name", ["heap", "maps", "fork"])
def test_program(tmp_path: Path, folder: Path, name: str, page_size: str) -> None:
    limit = 32 if page_size == "2M" else 12
    options = ("--require", "--limit", f"{limit}M", "--page-size", page_size)
    done = gmem_run(*options, command=[built(f"any_{name}.c", folder)], tmp_path=tmp_path)
    assert (done.status, done.out) == (0, b"ok\n"), done.err
    assert done.used["host_peak_bytes"] <= limit * MIB


@pytest.mark.parametrize("page_size", ["4K", "64K"])
def test_an_allocator_of_its_own(tmp_path: Path, folder: Path, page_size: str) -> None:
    """jemalloc, linked in under other names: it maps, drops and forks by itself."""
    program = built("any_jemalloc.c", folder, "gcc", str(ROOT / "build/client/allocator.a"), "-lm", "-ldl")
    options = ("--require", "--limit", "12M", "--page-size", page_size)
    done = gmem_run(*options, command=[program], tmp_path=tmp_path)
    assert (done.status, done.out) == (0, b"ok\n"), done.err
    assert done.used["to_tiers_bytes"] > 0


def test_full_descriptor_table(tmp_path: Path, folder: Path) -> None:
    done = gmem_run("--require", command=[built("any_fork.c", folder), "exhausted"], tmp_path=tmp_path)
    assert (done.status, done.out) == (0, b"ok\n"), done.err


def test_direct_io_and_registered_buffers(tmp_path: Path, folder: Path) -> None:
    data = tmp_path / "data"
    data.write_bytes(b"x" * MIB)
    program = built("any_uring.c", folder, "gcc", "-luring")
    done = gmem_run("--require", "--limit", "8M", command=[program, data], tmp_path=tmp_path)
    assert done.status == 0 and done.used["host_peak_bytes"] <= 8 * MIB, done.err
    if done.out == b"no io_uring\n":
        pytest.skip("no io_uring here: only O_DIRECT was checked")
    assert done.out == b"ok\n"


PROCESSES = """
import multiprocessing, os, subprocess, sys
import numpy as np
data = np.arange(400_000)
def work(n):
    data[:] += n
    return int(data.sum())
if __name__ == "__main__":
    for kind in ("fork", "spawn"):
        with multiprocessing.get_context(kind).Pool(2) as pool:
            print(kind, sorted(pool.map(work, [1, 2], chunksize=1))[0], int(data.sum()))
    print(subprocess.run(["cat"], input=data.tobytes(), capture_output=True).stdout == data.tobytes())
    print(subprocess.run(["sh", "-c", "echo $0; exit 4", "x"], capture_output=True, preexec_fn=os.setsid))
    print(os.popen("echo popen").read(), os.system("exit 5"))
"""


def test_processes(tmp_path: Path) -> None:
    program = tmp_path / "processes.py"  # spawn imports it
    program.write_text(PROCESSES)
    expected = plain([sys.executable, program])
    check_same(expected, gmem_run("--limit", "14M", "--require", command=[sys.executable, program], tmp_path=tmp_path))


def test_file_tier(tmp_path: Path) -> None:
    command = [sys.executable, "-c", NUMPY]
    done = gmem_run("--limit", "20M", "--tier", f"file:{tmp_path}", command=command, tmp_path=tmp_path)
    assert (done.status, done.out) == (0, plain(command).stdout), done.err
    assert done.used["tiers"][0]["driver"] == "file" and done.used["tiers"][0]["in_bytes"] > 0
    assert done.used["host_peak_bytes"] <= 20 * MIB


def test_least_limit(tmp_path: Path) -> None:
    command = [sys.executable, "-ISc", "print(len([str(i) for i in range(1000)]))"]
    done = gmem_run("--limit", "1M", command=command, tmp_path=tmp_path)
    assert (done.status, done.out) == (0, b"1000\n"), done.err
    assert done.used["host_peak_bytes"] <= MIB


def test_memory_that_is_nowhere_to_be_had(tmp_path: Path) -> None:
    code = "import random; data = random.Random(1).randbytes(200 << 20); print(len(data))"
    options = ("--limit", "16M", "--tier", "zstd:capacity=16M")
    done = gmem_run(*options, command=[sys.executable, "-c", code], tmp_path=tmp_path)
    assert done.status == -signal.SIGBUS and not done.out
    assert "tiers were full" in done.err


# ---- what is passed through ----


def test_exit_status_and_descriptors(tmp_path: Path) -> None:
    code = 'read line; echo "out $line"; echo "err" >&2; echo three >&3; exit 42'
    reading, writing = os.pipe()
    command = [GMEMCTL, "run", "--quiet", "--", "bash", "-c", code]
    # bash gives the pipe the number that the program expects
    wrapped = ["bash", "-c", f'exec 3>&{writing}; exec "$@"', "-", *map(str, command)]
    done = subprocess.run(wrapped, input=b"in\n", capture_output=True, pass_fds=(writing,), timeout=TIMEOUT_S)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert pipe.read() == b"three\n"
    assert (done.returncode, done.stdout, done.stderr) == (42, b"out in\n", b"err\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_death_by_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    done = gmem_run(command=["bash", "-c", f"kill -{number.value} $$"], tmp_path=tmp_path)
    assert done.status == -number and done.used["status"] == -number


def test_signals_are_passed_on(tmp_path: Path) -> None:
    code = "trap 'echo got; exit 7' TERM; echo ready; while :; do sleep 0.05; done"
    with subprocess.Popen([GMEMCTL, "run", "--quiet", "--", "bash", "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == b"got\n"
        assert process.wait(timeout=TIMEOUT_S) == 7


def test_signal_during_the_start(tmp_path: Path) -> None:
    """Whenever it comes, the program has not run on behind our back, and nothing is left."""
    marker, runtime = tmp_path / "ran", tmp_path / "r"
    runtime.mkdir()
    env = {**os.environ, "XDG_RUNTIME_DIR": str(runtime)}
    command = [GMEMCTL, "run", "--quiet", "--", "bash", "-c", f"sleep 60; touch {marker}"]
    for delay_s in (0.2, 0.7):
        with subprocess.Popen(command, env=env, stderr=subprocess.PIPE) as process:
            try:
                process.wait(timeout=delay_s)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=TIMEOUT_S) == -signal.SIGTERM, process.stderr.read()
    eventually(lambda: not list(runtime.iterdir()), "something of gmemd's was left", 20)
    assert not marker.exists()


def test_background_child_goes_on(tmp_path: Path) -> None:
    marker = tmp_path / "done"
    code = f"""
import os, time
data = bytearray(os.urandom(20 << 20))
if os.fork(): os._exit(0)
os.setsid()
time.sleep(2)
assert data.count(0) > 0 and len(data) == 20 << 20
open({str(marker)!r}, "w").close()
"""
    done = gmem_run("--limit", "16M", command=[sys.executable, "-c", code], tmp_path=tmp_path, stdin=subprocess.DEVNULL)
    assert done.status == 0
    eventually(marker.exists, "the child did not get to its end", 60)


def test_script_without_a_first_line(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("echo $1\n")
    script.chmod(0o755)
    assert gmem_run("--quiet", command=[script, "word"], tmp_path=tmp_path).out == b"word\n"


# ---- bad input ----


def failed(*arguments: str, status: int, words: str, **more) -> None:
    done = plain([GMEMCTL, "run", *arguments], **more)
    assert done.returncode == status, done
    assert words in done.stderr.decode(), done.stderr


def test_bad_arguments() -> None:
    failed(status=2, words="which program")
    failed("--limit", "1023K", "--", "true", status=2, words="--limit: 1023K is too little to run in: at least 1.0 MiB")
    failed("--limit", "31M", "--page-size", "2M", "--", "true", status=2, words="at least 32.0 MiB")
    failed("--limit", "much", "--", "true", status=2, words="--limit:")
    failed("--tier", "floppy", "--", "true", status=2, words="--tier: 'floppy'")
    failed("--tier", "file", "--", "true", status=2, words="--tier: file needs a path")
    failed("--tier", "zstd:level", "--", "true", status=2, words="--tier: 'level'")
    failed("--mmap-threshold", "1", "--", "true", status=2, words="--mmap-threshold")
    failed("--page-size", "5K", "--", "true", status=2, words="--page-size")


def test_no_program(tmp_path: Path) -> None:
    failed("--", "no-such-program", status=127, words="no-such-program")
    failed("--", "/no/such/program", status=127, words="/no/such/program")
    failed("--", str(tmp_path), status=126, words="directory")
    failed("--", __file__, status=126, words="Permission denied")


@pytest.mark.parametrize("tier", ["zstd:level=99", "file:/no/such/place"])
def test_tier_that_can_not_be_had(tier: str) -> None:
    failed("--require", "--tier", tier, "--", "true", status=125 if tier.startswith("zstd") else 2, words="gmemctl: ")


def test_static_program(tmp_path: Path) -> None:
    source, made = tmp_path / "s.c", tmp_path / "s"
    source.write_text('#include <stdio.h>\nint main(void) { puts("static"); return 3; }\n')
    run_ok(["gcc", "-static", source, "-o", made])
    done = gmem_run(command=[made], tmp_path=tmp_path)
    assert (done.status, done.out) == (3, b"static\n")
    assert "is linked statically" in done.err and done.err.count("\n") == 1
    failed("--require", "--", str(made), status=125, words="is linked statically")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_setuid_program(tmp_path: Path) -> None:
    made = tmp_path / "true"
    shutil.copy(shutil.which("true"), made)
    os.chown(made, 65534, 65534)
    made.chmod(0o4755)
    failed("--require", "--", str(made), status=125, words="setuid")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_child_with_more_rights(tmp_path: Path) -> None:
    """The loader takes the library away; what else is in its environment means nothing without it."""
    made = tmp_path / "env"
    shutil.copy(shutil.which("env"), made)
    made.chmod(0o4755)
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents[:2]:
        parent.chmod(0o755)
    code = f"setpriv --reuid=65534 --clear-groups {made}"
    done = gmem_run("--quiet", command=["bash", "-c", code], tmp_path=tmp_path)
    assert done.status == 0 and b"PATH=" in done.out and b"LD_PRELOAD" not in done.out, done.err


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_rights_of_one_thread(tmp_path: Path) -> None:
    """setpriv gives up capabilities before it changes its user: with a second thread the C library would end it."""
    command = ["setpriv", "--reuid=65534", "--clear-groups", "bash", "-c", "id -u; ls /proc/$$/task | wc -l"]
    done = gmem_run("--quiet", command=command, tmp_path=tmp_path)
    assert (done.status, done.out, done.err) == (0, b"65534\n1\n", "")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_user_without_userfaultfd(tmp_path: Path) -> None:
    """Plain memory and one warning; --require fails."""
    command = as_user(65534, [sys.executable, str(GMEMCTL), "run", "--", "bash", "-c", "bash -c 'echo $PPID' | wc -l"])
    done = plain(command, cwd="/")
    assert (done.returncode, done.stdout) == (0, b"1\n"), done.stderr
    assert done.stderr.count(b"\n") == 1 and b"/dev/userfaultfd" in done.stderr
    command = as_user(65534, [sys.executable, str(GMEMCTL), "run", "--require", "--", "true"])
    assert plain(command, cwd="/").returncode == 125


def test_no_gmemd(tmp_path: Path) -> None:
    code = "import ctypes; print('ran')"
    nowhere = ("--socket", "/nowhere/gmemd.sock")
    done = plain([GMEMCTL, *nowhere, "run", "--", sys.executable, "-c", code])
    assert (done.returncode, done.stdout) == (0, b"ran\n")
    assert done.stderr.count(b"plain memory") == 1
    done = plain([GMEMCTL, *nowhere, "run", "--require", "--", sys.executable, "-c", code])
    assert (done.returncode, done.stdout) == (125, b"")


def test_no_library(tmp_path: Path) -> None:
    env = {**os.environ, "GMEM_RUN_LIBRARY": "/nowhere/lib.so"}
    failed("--require", "--", "true", status=125, words="/nowhere/lib.so", env=env)
    done = plain([GMEMCTL, "run", "--", "echo", "plain"], env=env)
    assert (done.returncode, done.stdout) == (0, b"plain\n") and b"plain memory" in done.stderr


def test_few_descriptors(tmp_path: Path) -> None:
    code = "ulimit -n 5; exec sh -c 'echo ran'"
    done = gmem_run(command=["bash", "-c", code], tmp_path=tmp_path)
    assert (done.status, done.out) == (0, b"ran\n")
    assert "plain memory is used" in done.err
    done = gmem_run("--require", command=["bash", "-c", code], tmp_path=tmp_path)
    assert done.status == 125 and not done.out
