# SPDX-License-Identifier: Apache-2.0
"""libcuda for tests: the double of tests/gpu/double.c, or a GPU's own, and the kernels of kernels.ptx."""

import ctypes
import os
import subprocess

from helpers import ROOT

DOUBLE = ROOT / "build/gpu/libcuda-double.so"
PTX = ROOT / "tests/gpu/kernels.ptx"


def build_double() -> str:
    subprocess.run(["make", "-s", str(DOUBLE.relative_to(ROOT))], cwd=ROOT, check=True)
    return str(DOUBLE)


class Cuda:
    """The driver API as far as tests need it, in this process's primary context on GPU 0."""

    def __init__(self) -> None:
        self.api = ctypes.CDLL(os.environ.get("GMEM_LIBCUDA", "libcuda.so.1"))
        self.context, module = ctypes.c_void_p(), ctypes.c_void_p()
        self.must("cuInit", 0)
        self.must("cuDevicePrimaryCtxRetain", ctypes.byref(self.context), 0)
        self.must("cuCtxSetCurrent", self.context)
        self.must("cuModuleLoadData", ctypes.byref(module), PTX.read_bytes() + b"\0")
        self.kernels = {}
        for name in ("fill", "bump", "sum", "spin"):
            self.kernels[name] = ctypes.c_void_p()
            self.must("cuModuleGetFunction", ctypes.byref(self.kernels[name]), module, name.encode())

    def call(self, name: str, *args) -> int:
        return getattr(self.api, name)(*args)

    def must(self, name: str, *args) -> None:
        result = self.call(name, *args)
        assert result == 0, f"{name}: CUDA error {result}"

    def stream(self) -> int:
        made = ctypes.c_void_p()
        self.must("cuCtxSetCurrent", self.context)
        self.must("cuStreamCreate", ctypes.byref(made), 1)
        return made.value

    def launch(self, name: str, view, count: int, value: int, stream: int = 0) -> None:
        """Asynchronous, as kernels are. view: anything with a ptr, or an address."""
        self.must("cuCtxSetCurrent", self.context)  # this thread's
        args = [ctypes.c_uint64(part) for part in (getattr(view, "ptr", view), count, value)]
        params = (ctypes.c_void_p * 3)(*(ctypes.addressof(arg) for arg in args))
        blocks = 1 if name == "spin" else 256
        self.must("cuLaunchKernel", self.kernels[name], blocks, 1, 1, 1 if name == "spin" else 256, 1, 1, 0,
                  ctypes.c_void_p(stream), params, None)  # fmt: skip

    def fill(self, view, value: int, stream: int = 0) -> None:
        self.launch("fill", view, view.nbytes // 8, value, stream)

    def bump(self, view, value: int, stream: int = 0) -> None:
        self.launch("bump", view, view.nbytes // 8, value, stream)

    def spin(self, seconds: float, stream: int = 0) -> None:
        self.launch("spin", 0, 0, int(seconds * 1e9), stream)

    def synchronize(self) -> int:
        self.must("cuCtxSetCurrent", self.context)
        return self.call("cuCtxSynchronize")
