# SPDX-License-Identifier: Apache-2.0
"""openEuler's interface: programs that know only <libgmem.h> and <sys/mman.h>, run under libgmem-preload.so."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from programs import C_FLAGS, SOURCES, TIMEOUT_S, Builder, Daemon, run_ok

PAGE = 2 << 20
DEVICE_BYTES = 4 * PAGE
PROCESSES = 20
NO_GMEMD = {"GMEM_SOCKET": "/nowhere/gmemd.sock"}


@pytest.fixture(scope="module")
def gmemd() -> Iterator[Daemon]:
    started = Daemon([f"name=simgpu0,driver=simgpu,capacity={DEVICE_BYTES}"])
    yield started
    started.close()


class Programs:
    """Built as for openEuler: one header, one library."""

    def __init__(self, builder: Builder) -> None:
        self.libraries = builder.prefix / "lib"
        self.include = builder.prefix / "include"
        self.directory = builder.directory
        self.preload = self.libraries / "libgmem-preload.so"

    def build(self, name: str, source: Path | None = None, *, link: bool = True, compiler: str = "cc") -> Path:
        made = self.directory / name
        libraries = [f"-L{self.libraries}", "-lgmem", f"-Wl,-rpath,{self.libraries}"] if link else []
        flags = C_FLAGS if compiler == "cc" else C_FLAGS[1:]
        source = source or SOURCES / f"compat_{name}.c"
        run_ok([compiler, *flags, f"-I{self.include}", source, *libraries, "-o", made])
        return made

    def environment(self, gmemd: Daemon | None) -> dict[str, str]:
        found = {**os.environ, **(gmemd.environment if gmemd else NO_GMEMD)}
        return {**found, "LD_PRELOAD": str(self.preload), "LD_LIBRARY_PATH": str(self.libraries)}


@pytest.fixture(scope="module")
def programs(builder: Builder) -> Programs:
    return Programs(builder)


def check(gmemd: Daemon) -> None:
    assert gmemd.process.poll() is None, gmemd.log()
    assert '"level": "error"' not in gmemd.log()


@pytest.mark.parametrize("name", ["usage", "adapter", "bounds", "calls", "streams", "fork"])
def test_program(programs: Programs, gmemd: Daemon, name: str) -> None:
    run_ok([programs.build(name, link=name != "adapter")], env=programs.environment(gmemd))
    check(gmemd)


@pytest.mark.parametrize("name", ["streams", "bounds"])
def test_program_without_a_ring(programs: Programs, gmemd: Daemon, name: str) -> None:
    run_ok([programs.build(name)], env={**programs.environment(gmemd), "GMEM_RING": "0"})
    check(gmemd)


def test_four_times_the_device(programs: Programs, gmemd: Daemon) -> None:
    run_ok([programs.build("usage"), str(4 * DEVICE_BYTES)], env=programs.environment(gmemd))
    check(gmemd)


def test_many_at_once(programs: Programs, gmemd: Daemon) -> None:
    program, environment = programs.build("usage"), programs.environment(gmemd)
    running = [
        subprocess.Popen([program, str(bytes)], env=environment, stderr=subprocess.PIPE, text=True)
        for bytes in ((1 + i % 3) * PAGE + i * 4096 for i in range(PROCESSES))
    ]
    try:
        ended = [(process.communicate(timeout=TIMEOUT_S)[1], process.returncode) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert ended == [("", 0)] * PROCESSES
    check(gmemd)


REFUSED = """
#include "compat.h"
int main(void)
{
	const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_PEER_SHARED;
	uint8_t *plain;

	for (int i = 0; i < 3; i++)
		REFUSED(mmap(NULL, PAGE, PROT_READ | PROT_WRITE, flags, -1, 0), ENOMEM);
	CHECK(gmemGetNumaId() < 0);
	GIVES(gmemPrefetch(PAGE, PAGE, 1, NULL), EINVAL);
	CHECK(!gmemFreeEager(PAGE, PAGE, NULL));
	CHECK(!gmemStreamSynchronize(&plain));
	plain = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(plain != MAP_FAILED);
	plain[PAGE - 1] = 1;
	CHECK(!munmap(plain, PAGE));
	printf("%d\\n", gmemGetNumaId());
	return 0;
}
"""


@pytest.fixture(scope="module")
def refused(programs: Programs) -> Path:
    source = programs.directory / "refused.c"
    source.write_text(REFUSED)
    shutil.copy(SOURCES / "compat.h", programs.directory)
    return programs.build("refused", source)


def test_without_gmemd_it_is_said_once(programs: Programs, refused: Path) -> None:
    done = subprocess.run([refused], env=programs.environment(None), capture_output=True, text=True, timeout=TIMEOUT_S)
    assert (done.returncode, done.stdout) == (0, "-107\n"), done.stderr  # -ENOTCONN
    assert done.stderr.count("\n") == 1 and "/nowhere/gmemd.sock" in done.stderr


def test_without_a_device(programs: Programs, refused: Path) -> None:
    daemon = Daemon([])
    try:
        environment = programs.environment(daemon)
        done = subprocess.run([refused], env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
        assert (done.returncode, done.stdout) == (0, "-19\n"), done.stderr  # -ENODEV
        assert done.stderr.count("\n") == 1 and "no device" in done.stderr
    finally:
        daemon.close()


def test_without_libgmem_beside_it(programs: Programs, tmp_path: Path) -> None:
    """The preload library alone: everything plain works, and what is asked of gmem is refused with a reason."""
    alone = tmp_path / "libgmem-preload.so"
    shutil.copy(programs.preload, alone)
    code = (
        "import ctypes, sys, os\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "libc.mmap.restype = ctypes.c_void_p\n"
        "sizes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]\n"
        "libc.mmap.argtypes = sizes\n"
        "at = libc.mmap(None, 1 << 21, 3, 0x8000022, -1, 0)\n"
        "print(at == ctypes.c_void_p(-1).value, ctypes.get_errno(), os.path.exists('/dev/gmem'))\n"
        "try:\n"
        "    open('/proc/gmemstat')\n"
        "except FileNotFoundError:\n"
        "    print('none')\n"
    )
    environment = {**os.environ, **NO_GMEMD, "LD_PRELOAD": str(alone)}
    done = subprocess.run(["python3", "-c", code], env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.stdout == "True 12 False\nnone\n", done.stderr
    assert done.stderr.count("can't be used") == 1


def test_statistics_are_a_file_to_others(programs: Programs, gmemd: Daemon) -> None:
    """Whatever opens it by libc: coreutils, a shell's redirection, Python."""
    environment = programs.environment(gmemd)
    commands: list[list[str]] = [
        ["cat", "/proc/gmemstat"],
        ["sh", "-c", "while read -r line; do echo \"$line\"; done </proc/gmemstat"],
        ["python3", "-c", "print(open('/proc/gmemstat').read(), end='')"],
    ]
    for command in commands:
        lines = run_ok(command, env=environment).splitlines()
        assert [line[:20] for line in lines] == ["migrating H2D     : ", "migrating D2H     : "]
        assert all(line[20:].isdigit() for line in lines)


def test_other_programs_notice_nothing(programs: Programs, gmemd: Daemon, tmp_path: Path) -> None:
    environment = programs.environment(gmemd)
    plain = {key: value for key, value in environment.items() if key != "LD_PRELOAD"}
    commands: list[list[str]] = [
        ["python3", "-c", "import mmap, zlib; m = mmap.mmap(-1, 1 << 22); m[5] = 7; print(zlib.crc32(m))"],
        ["sh", "-c", "seq 200000 | sort -R --random-source=/dev/zero | sort -n | md5sum"],
        ["sh", "-c", f"seq 1000 | gzip -n >{tmp_path}/x.gz && zcat {tmp_path}/x.gz | md5sum"],
    ]
    for command in commands:
        assert run_ok(command, env=environment) == run_ok(command, env=plain)


def test_header_is_cxx_too(programs: Programs) -> None:
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    source = programs.directory / "cxx.cpp"
    source.write_text(
        "#include <libgmem.h>\n#include <cstdio>\n"
        "int main() { gmem_hnuma_id_arg arg = {};\n"
        'std::printf("%d %d\\n", gmemGetNumaId(), arg.hnuma_id == nullptr); }\n'
    )
    made = programs.build("cxx", source, compiler="c++")
    assert run_ok([made], env=programs.environment(None)) == "-107 1\n"
