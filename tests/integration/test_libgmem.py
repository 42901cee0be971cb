# SPDX-License-Identifier: Apache-2.0
"""libgmem: its examples and its test programs, built as an application would, run against a gmemd of their own."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cuda import PTX, build_double
from helpers import eventually
from programs import EXAMPLES, SOURCES, TIMEOUT_S, Builder, Daemon, jemalloc, run_ok


def test_hello(builder: Builder, daemon: Daemon) -> None:
    printed = run_ok([builder.program(EXAMPLES / "hello.c")], env=daemon.environment)
    assert "device simgpu0 (hnid 1, simgpu, 8388608 bytes)" in printed
    assert "valid at 0x2, resident" in printed
    assert printed.endswith("ok\n")


def test_list_larger_than_the_device(builder: Builder, daemon: Daemon) -> None:
    kernels = builder.kernels(EXAMPLES / "kernel.c")
    command = [builder.program(EXAMPLES / "list.c"), "simgpu0", kernels, "4000"]
    assert run_ok(command, env=daemon.environment) == "ok: 4000 nodes, sum of squares 21341334000\n"


def test_list_on_a_device_that_can_not_fault(builder: Builder, daemon: Daemon) -> None:
    command = [builder.program(EXAMPLES / "list.c"), "simgpu1", builder.kernels(EXAMPLES / "kernel.c"), "1000"]
    run_ok(command, env={**daemon.environment, "LIST_ACQUIRE": "1"})
    done = subprocess.run(command, env=daemon.environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 1
    assert "SIGBUS" in done.stderr and "not acquired" in done.stderr


@pytest.mark.parametrize(("name", "device"), [
    ("memory", "simgpu0"), ("contexts", "simgpu0"), ("acquire", "simgpu1"), ("heap", "simgpu0"), ("adopt", "simgpu0"),
    ("adopted", "simgpu0"), ("pool", "simgpu0"),
])  # fmt: skip
def test_program(builder: Builder, daemon: Daemon, name: str, device: str) -> None:
    kernels = builder.kernels(SOURCES / "kernels.c")
    run_ok([builder.program(SOURCES / f"{name}.c"), device, kernels], env=daemon.environment)
    assert daemon.process.poll() is None, daemon.log()
    assert '"level": "error"' not in daemon.log()


@pytest.mark.skipif(not os.access("/dev/userfaultfd", os.R_OK | os.W_OK), reason="forks need it to wait for")
def test_each_call_fails_in_turn(builder: Builder, daemon: Daemon) -> None:
    """Of an adoption, and of a fork with adopted memory: threads go on, no byte is lost."""
    command = [builder.program(SOURCES / "adopt_fails.c"), "simgpu0", "-"]
    done = subprocess.run(command, env=daemon.environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode == 77:
        pytest.skip(done.stdout)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    assert daemon.process.poll() is None, daemon.log()


def test_acquire_without_a_ring(builder: Builder, daemon: Daemon) -> None:
    kernels, environment = builder.kernels(SOURCES / "kernels.c"), {**daemon.environment, "GMEM_RING": "0"}
    run_ok([builder.program(SOURCES / "acquire.c"), "simgpu1", kernels], env=environment)
    assert daemon.process.poll() is None, daemon.log()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    """A gmemd with a GPU, the double of libcuda, which its clients have, too."""
    monkeypatch.setenv("GMEM_LIBCUDA", build_double())
    started = Daemon(["name=cuda0,driver=cuda,capacity=16M,reserve=4M", "name=simgpu0,driver=simgpu,capacity=8M"])
    yield started
    started.close()


@pytest.mark.parametrize("source", [SOURCES / "cuda.c", EXAMPLES / "cuda.c"], ids=["test", "example"])
def test_a_gpu(builder: Builder, gpu: Daemon, source: Path) -> None:
    run_ok([builder.program(source), PTX], env=gpu.environment)
    assert gpu.process.poll() is None, gpu.log()
    assert '"level": "error"' not in gpu.log()


@pytest.mark.skipif(not jemalloc(), reason="no libjemalloc")
def test_an_allocator_that_counts_on_zeros(builder: Builder, daemon: Daemon) -> None:
    """jemalloc drops what is free by MADV_DONTNEED, at once here, and calloc() does not clear it again."""
    program = builder.program(SOURCES / "adopted.c")
    environment = {**daemon.environment, "LD_PRELOAD": jemalloc(), "MALLOC_CONF": "dirty_decay_ms:0,muzzy_decay_ms:0"}
    run_ok([program, "simgpu0", "-", "allocator"], env=environment)
    assert daemon.process.poll() is None, daemon.log()


@pytest.mark.parametrize("ring", ["1", "0"])
def test_files(builder: Builder, daemon: Daemon, ring: str) -> None:
    kernels = builder.kernels(SOURCES / "kernels.c")
    run_ok([builder.program(SOURCES / "files.c"), "simgpu0", kernels], env={**daemon.environment, "GMEM_RING": ring})
    assert daemon.process.poll() is None, daemon.log()


@pytest.mark.parametrize("ring", ["1", "0"])
def test_requests_that_nobody_waits_for(builder: Builder, daemon: Daemon, ring: str) -> None:
    program = builder.program(SOURCES / "async.c")
    if ring == "0":  # done at once then: what is left to check is the other path of each call
        environment = {**daemon.environment, "GMEM_RING": "0"}
        run_ok([builder.program(SOURCES / "memory.c"), "simgpu0", builder.kernels(SOURCES / "kernels.c")],
               env=environment)  # fmt: skip
    else:
        run_ok([program, "simgpu0"], env=daemon.environment)
    assert daemon.process.poll() is None, daemon.log()
    assert '"level": "error"' not in daemon.log()


def test_killed_daemon_hangs_nobody(builder: Builder, daemon: Daemon) -> None:
    kernels = builder.kernels(SOURCES / "kernels.c")
    program = builder.program(SOURCES / "gone.c")
    process = subprocess.Popen([program, "simgpu0", kernels], env=daemon.environment, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    try:
        assert process.stdout.readline() == "ready\n"
        daemon.process.kill()
        daemon.process.wait()
        _, errors = process.communicate("go\n", timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, errors


def test_killed_client_leaves_nothing(builder: Builder, daemon: Daemon) -> None:
    kernels = builder.kernels(SOURCES / "kernels.c")
    program = builder.program(SOURCES / "gone.c")
    process = subprocess.Popen([program, "simgpu0", kernels], env=daemon.environment, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE)  # fmt: skip
    assert process.stdout.readline() == b"ready\n"
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 1
    process.kill()
    process.communicate()
    # Its kernel never ends by itself.
    eventually(lambda: not Path(f"/proc/{children[0]}").exists(), "the context's process goes on without its client")


def test_private_gmemd(builder: Builder) -> None:
    program = builder.program(SOURCES / "private.c")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment.pop("GMEM_SOCKET", None)
    with tempfile.TemporaryDirectory(prefix="gmem-rt-", dir="/tmp") as runtime:
        run_ok([program], env={**environment, "XDG_RUNTIME_DIR": runtime})
        assert list(Path(runtime).iterdir()) == []


def test_exports_are_the_header(builder: Builder) -> None:
    """What the libraries export, their version scripts and the headers declare the same functions."""
    libraries = [builder.prefix / "lib" / name for name in ("libgmem.so.0", "libgmem-heap.so.0")]
    symbols = run_ok(["nm", "-D", "--defined-only", *libraries])
    exported = [line.split()[2].partition("@@")[::2] for line in symbols.splitlines() if " T " in line]
    public = {name for name, version in exported if version == "GMEM_0"}
    headers = [(builder.prefix / "include" / name).read_text() for name in ("gmem.h", "libgmem.h")]
    assert public == {name for name in public if any(f"{name}(" in header for header in headers)}
    # less the macro's own definitions
    assert len(public) == sum(header.count("GMEM_API ") - header.count("define GMEM_API ") for header in headers)
    assert {name for name, version in exported if not version} == {"madvise"}  # in the place of the C library's
    private = {name for name, version in exported if version == "GMEM_PRIVATE"}
    assert private == {"gmem_fail", "gmem_peer_calls", "gmem_session_heap"}  # what one library has for the others


def test_it_can_be_loaded_late(builder: Builder) -> None:
    """By dlopen(), whose room for thread-local storage is small, and without taking the program's malloc away."""
    code = (
        "import ctypes, sys\n"
        "address = lambda lib: ctypes.cast(lib.malloc, ctypes.c_void_p).value\n"
        "before = address(ctypes.CDLL(None))\n"
        "lib = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)\n"
        "assert lib.gmem_strerror and address(ctypes.CDLL(None)) == before\n"
    )
    run_ok([sys.executable, "-c", code, builder.prefix / "lib/libgmem.so.0"])


def test_header_is_cxx_too(builder: Builder, tmp_path: Path) -> None:
    source = tmp_path / "main.cpp"
    source.write_text("#include <gmem.h>\nint main() { return gmem_strerror(-22)[0] == 0; }\n")
    flags = [f"-I{builder.prefix}/include", f"-L{builder.prefix}/lib", f"-Wl,-rpath,{builder.prefix}/lib", "-lgmem"]
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    run_ok(["c++", "-Wall", "-Wextra", "-Werror", source, *flags, "-o", tmp_path / "main"])
    run_ok([tmp_path / "main"])
