# SPDX-License-Identifier: Apache-2.0
"""Extensions and package layout; everything else is in pyproject.toml."""

import os
import subprocess
from glob import glob
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
C_FLAGS = ["-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-fvisibility=hidden", "-pthread"]

POLICY_FILES = ("policy", "ghost", "shadow", "sparse", "accesses", "replay")


def c_files(*patterns: str) -> list[str]:
    return sorted(name for pattern in patterns for name in glob(pattern, root_dir=ROOT))


def optional(what: str) -> list[str]:
    """Flags or libraries of what is built in where it can be had."""
    command = ["sh", str(ROOT / ".ci" / "optional"), os.environ.get("CC", "gcc"), what]
    return subprocess.run(command, text=True, capture_output=True, check=True).stdout.split()


core = Extension(
    "gmemd._core",
    sources=["gmemd/_core.pyx", *c_files("csrc/*.c", "csrc/drivers/*.c", "csrc/policies/*.c")],
    depends=c_files("gmemd/*.pxd", "csrc/include/gmem/*.h", "csrc/*.h", "csrc/drivers/*.h", "client/include/*.h"),
    include_dirs=["csrc/include", "client/include"],
    # Cython's own output trips these two; csrc is compiled with -Werror by the Makefile's C rules.
    extra_compile_args=[*C_FLAGS, *optional("flags"), "-Wno-unused-parameter", "-Wno-missing-field-initializers"],
    libraries=[name.removeprefix("-l") for name in optional("libs")],
    extra_link_args=["-pthread"],
)

# Only the ops table of drivers written in Python: it needs the core's headers and none of its code.
pydriver = Extension(
    "gmemd._pydriver",
    sources=["gmemd/_pydriver.pyx"],
    depends=core.depends,
    include_dirs=core.include_dirs,
    extra_compile_args=core.extra_compile_args,
)

# Replays of traces: the policies by themselves, without the core.
policy = Extension(
    "gmemd._policy",
    sources=["gmemd/_policy.pyx", *c_files("csrc/policies/*.c"), *(f"csrc/{name}.c" for name in POLICY_FILES)],
    depends=core.depends,
    include_dirs=core.include_dirs,
    extra_compile_args=core.extra_compile_args,
)

# The client's buffer object.
mapping = Extension("gmem._mapping", sources=["client/gmem/_mapping.pyx"])

# `make` installs the packages where they stand, without building, and builds in parallel what has changed.
with_extensions = os.environ.get("GMEM_EXTENSIONS", "1") != "0"
setup(
    packages=["gmemd", "gmemd.drivers", "gmem"],
    package_dir={"gmem": "client/gmem"},
    package_data={"gmem": ["py.typed"], "gmemd": ["py.typed"]},
    ext_modules=cythonize([core, pydriver, policy, mapping], language_level=3, build_dir="build/cython")
    if with_extensions
    else [],
    cffi_modules=["client/build_ffi.py:ffibuilder"] if with_extensions else [],
)
