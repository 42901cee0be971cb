# SPDX-License-Identifier: Apache-2.0
"""`make install` and `make uninstall`: what they put where, for whom, and what is left."""

import os
import shutil
import stat
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from helpers import ROOT

PREFIX, SYSCONFDIR = "/opt/gmem", "/opt/etc"
TREE = (".ci", "client", "csrc", "gmemd", "systemd", "build/client", "build/lib", "build/libexec", "build/cython",
        "LICENSE", "Makefile", "README.md", "pyproject.toml", "setup.py")  # fmt: skip
# below PREFIX, with its mode
FILES = {
    "include/gmem.h": 0o644,
    "include/libgmem.h": 0o644,
    "lib/gmem/bin/gmemctl": 0o755,
    "lib/gmem/bin/gmemd": 0o755,
    "lib/libgmem-any.so": 0o644,
    "lib/libgmem-heap.so.0": 0o644,
    "lib/libgmem-preload.so": 0o644,
    "lib/libgmem.so.0": 0o644,
    "lib/pkgconfig/gmem-heap.pc": 0o644,
    "lib/pkgconfig/gmem.pc": 0o644,
    "lib/sysctl.d/60-gmem.conf": 0o644,
    "lib/systemd/system/gmemd.service": 0o644,
    "lib/systemd/system/gmemd.socket": 0o644,
    "lib/sysusers.d/gmem.conf": 0o644,
    "lib/tmpfiles.d/gmem.conf": 0o644,
    "lib/udev/rules.d/60-gmem.rules": 0o644,
    "libexec/gmem-context": 0o755,
}
LINKS = {
    "bin/gmemctl": f"{PREFIX}/lib/gmem/bin/gmemctl",
    "bin/gmemd": f"{PREFIX}/lib/gmem/bin/gmemd",
    "lib/libgmem-heap.so": "libgmem-heap.so.0",
    "lib/libgmem.so": "libgmem.so.0",
}
THEIRS = ("bin/other", "lib/libother.so", "lib/systemd/system/other.service")  # of somebody else's below PREFIX


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of what is installed from, with what is built already; and a wheel, so that nothing has to be fetched."""
    tree = tmp_path_factory.mktemp("tree")
    for name in TREE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / name).exists():
            shutil.copy2(ROOT / name, tree / name)
    built = tree / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    for package, folder in (("gmem", "client/gmem"), ("gmemd", "gmemd")):
        (built / package).mkdir(parents=True)
        for extension in (tree / folder).glob("*.so"):
            shutil.copy(extension, built / package)  # newer than its sources: it need not be built
    run([sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", "dist", "."], tree)
    return tree


def run(command: list[str], cwd: Path, **env: str) -> str:
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def make(tree: Path, *words: str) -> None:
    """As root with a strict umask does it: what is installed is for everybody all the same."""
    (wheel,) = (tree / "dist").glob("*.whl")
    command = ["make", *words, f"PYTHON={sys.executable}", f"PACKAGE={wheel}", "INSTALL_FLAGS=--no-deps --no-index"]
    run(["sh", "-c", 'umask 077; exec "$@"', "-", *command], tree)


def everything(below: Path) -> list[Path]:
    return [Path(folder, name) for folder, folders, names in os.walk(below) for name in [*folders, *names]]


def test_install_into_a_tree_and_uninstall(tree: Path, tmp_path: Path) -> None:
    destination = tmp_path / "destination"
    below, config = destination / PREFIX[1:], destination / SYSCONFDIR[1:] / "gmem" / "gmemd.toml"
    for name in THEIRS:
        (below / name).parent.mkdir(parents=True, exist_ok=True)
        (below / name).write_text("theirs")
    before = {path for path in everything(destination) if not path.is_dir()}
    where = [f"DESTDIR={destination}", f"PREFIX={PREFIX}", f"SYSCONFDIR={SYSCONFDIR}"]
    make(tree, "install", *where)

    assert {name: stat.S_IMODE((below / name).lstat().st_mode) for name in FILES} == FILES
    assert {name: os.readlink(below / name) for name in LINKS} == LINKS
    assert stat.S_IMODE(config.stat().st_mode) == 0o644
    for path in everything(destination):
        mode = path.lstat().st_mode
        if not stat.S_ISLNK(mode) and before.isdisjoint({path}):
            wanted = 0o055 if stat.S_ISDIR(mode) else 0o044
            assert mode & wanted == wanted and not mode & 0o022, f"{path}: {stat.S_IMODE(mode):o}"
    listed = {below / name for name in (*FILES, *LINKS)} | {config} | before
    others = {path for path in everything(destination) if not path.is_dir() or path.is_symlink()} - listed
    assert {path for path in others if below / "lib/gmem" not in path.parents} == set(), "not in this list"

    unit = (below / "lib/systemd/system/gmemd.service").read_text()
    assert f"ExecStart={PREFIX}/bin/gmemd run --config {SYSCONFDIR}/gmem/gmemd.toml --runtime-dir /run/gmem\n" in unit
    assert "/usr/bin" not in unit and "/etc/gmem" not in unit.replace(f"{SYSCONFDIR}/gmem", "")
    for script in ("gmemd", "gmemctl"):
        first = (below / "lib/gmem/bin" / script).read_text().splitlines()[0]
        assert first in (f"#!{PREFIX}/lib/gmem/bin/python", f"#!{PREFIX}/lib/gmem/bin/python3"), first
    pc = (below / "lib/pkgconfig/gmem.pc").read_text()
    assert f"prefix={PREFIX}\n" in pc and str(tree) not in pc
    assert f"{PREFIX}/libexec".encode() in (below / "lib/libgmem.so.0").read_bytes(), "built for another place"
    for name in (*FILES, "lib/gmem/pyvenv.cfg"):
        assert str(destination).encode() not in (below / name).read_bytes(), f"{name} names where it was put meanwhile"
    for name in (".service", ".socket"):
        installed = f"lib/systemd/system/gmemd{name}"
        assert "/run/gmem" in (below / installed).read_text()

    config.write_text("# mine\n")
    make(tree, "install", *where)  # over it
    assert config.read_text() == "# mine\n"
    make(tree, "uninstall", *where)
    left = {path for path in everything(destination) if not path.is_dir() or path.is_symlink()}
    assert left == before | {config}
    assert not (below / "lib/gmem").exists()


def test_what_is_installed_runs(tree: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "prefix"
    where = [f"PREFIX={prefix}", f"SYSCONFDIR={tmp_path / 'etc'}"]
    make(tree, "install", *where)
    packages = sysconfig.get_path("purelib")  # what it depends on
    environment = {"PYTHONPATH": packages, "PYTHONNOUSERSITE": "1"}
    code = "import gmemd, gmemd._core, gmem; print(gmemd.__file__)"
    found = run([str(prefix / "lib/gmem/bin/python"), "-c", code], tmp_path, **environment)
    assert Path(found.strip()).is_relative_to(prefix), "the one that is installed"
    assert run([str(prefix / "bin/gmemd"), "--version"], tmp_path, **environment).startswith("gmemd ")
    config = tmp_path / "etc" / "gmem" / "gmemd.toml"
    assert "ok" in run([str(prefix / "bin/gmemd"), "check-config", str(config)], tmp_path, **environment)
    assert "attach" in run([str(prefix / "bin/gmemctl"), "--help"], tmp_path, **environment)
    flags = run(["pkg-config", "--cflags", "--libs", "gmem"], tmp_path, PKG_CONFIG_PATH=str(prefix / "lib/pkgconfig"))
    (tmp_path / "user.c").write_text('#include <gmem.h>\nint main(void) { return gmem_strerror(0) ? 0 : 1; }\n')
    run(["gcc", "user.c", "-o", "user", *flags.split()], tmp_path)
    run([str(tmp_path / "user")], tmp_path, LD_LIBRARY_PATH=str(prefix / "lib"))
    make(tree, "uninstall", *where)
    assert not [path for path in everything(prefix) if not path.is_dir()]
