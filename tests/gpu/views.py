# SPDX-License-Identifier: Apache-2.0
"""Fact 9 of facts.c: NumPy, PyTorch, CuPy and Numba on one pointer, whose CPU side is a memfd. Needs no gmem."""

import ctypes
import ctypes.util
import mmap
import os
import sys

import numpy as np

WINDOW, MIB = 0x660000000000, 1 << 20
SIZE = 8 * MIB


class Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class Prop(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int), ("handle_types", ctypes.c_int), ("location", Location), ("win32", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    ]  # fmt: skip


class Access(ctypes.Structure):
    _fields_ = [("location", Location), ("flags", ctypes.c_int)]


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int), ("device_id", ctypes.c_int), ("ndim", ctypes.c_int),
        ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.c_void_p), ("byte_offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p),
    ]  # fmt: skip


def fact(key: str, value: object) -> None:
    print("9", key, value, flush=True)


def attempt(key: str, function) -> None:
    try:
        fact(key, function())
    except Exception as err:  # noqa: BLE001 - a fact as well
        fact(key, f"FAILED {type(err).__name__}: {err}")


cuda = ctypes.CDLL("libcuda.so.1")


def must(result: int) -> None:
    if result:
        raise OSError(f"CUDA error {result}")


def overlay() -> int:
    context, va, handle = ctypes.c_void_p(), ctypes.c_uint64(), ctypes.c_uint64()
    must(cuda.cuInit(0))
    must(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0))
    must(cuda.cuCtxSetCurrent(context))
    must(cuda.cuMemAddressReserve(ctypes.byref(va), ctypes.c_size_t(SIZE), ctypes.c_size_t(2 * MIB),
                                  ctypes.c_uint64(WINDOW), ctypes.c_uint64(0)))  # fmt: skip
    fact("reserved", f"{va.value:#x}")
    fd = os.memfd_create("views")
    os.ftruncate(fd, SIZE)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    at = libc.mmap(ctypes.c_void_p(va.value), ctypes.c_size_t(SIZE), mmap.PROT_READ | mmap.PROT_WRITE,
                   mmap.MAP_SHARED | 0x10, fd, ctypes.c_long(0))  # fmt: skip
    assert at == va.value, at
    prop = Prop(type=1, handle_types=1, location=Location(1, 0))
    must(cuda.cuMemCreate(ctypes.byref(handle), ctypes.c_size_t(SIZE), ctypes.byref(prop), ctypes.c_uint64(0)))
    must(cuda.cuMemMap(va, ctypes.c_size_t(SIZE), ctypes.c_size_t(0), handle, ctypes.c_uint64(0)))
    access = Access(Location(1, 0), 3)
    must(cuda.cuMemSetAccess(va, ctypes.c_size_t(SIZE), ctypes.byref(access), ctypes.c_size_t(1)))
    return va.value


POINTER = overlay()
COUNT = SIZE // 4
HOST = np.frombuffer((ctypes.c_float * COUNT).from_address(POINTER), np.float32)
HOST[:] = 7


class Interface:
    __cuda_array_interface__ = {
        "shape": (COUNT,), "typestr": "<f4", "data": (POINTER, False), "version": 3, "strides": None, "stream": None,
    }  # fmt: skip


class DLPack:
    def __dlpack__(self, stream=None, **_kw):
        self.shape = (ctypes.c_int64 * 1)(COUNT)
        self.tensor = DLTensor(POINTER, 2, 0, 1, 2, 32, 1, self.shape, None, 0, None, None)
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(self.tensor), b"dltensor", None)

    def __dlpack_device__(self):
        return (2, 0)


KEEP = DLPack()


def by_torch() -> str:
    import torch

    t = torch.as_tensor(Interface(), device="cuda")
    same = t.data_ptr() == POINTER
    t.fill_(3)
    d = torch.from_dlpack(KEEP)
    d += 1
    torch.cuda.synchronize()
    return f"{torch.__version__}: same pointer {same}, DLPack {d.data_ptr() == POINTER}, sum {t.sum().item() / COUNT}"


def by_cupy() -> str:
    import cupy

    a = cupy.asarray(Interface())
    a *= 2
    d = cupy.from_dlpack(KEEP)
    same = a.data.ptr == POINTER and d.data.ptr == POINTER
    cupy.cuda.runtime.deviceSynchronize()
    return f"{cupy.__version__}: same pointer {same}, mean {float(d.mean())} (twice PyTorch's)"


def by_numba() -> str:
    from numba import cuda as numba_cuda

    a = numba_cuda.as_cuda_array(Interface())
    return f"same pointer {a.device_ctypes_pointer.value == POINTER}, first {a.copy_to_host()[0]}"


attempt("torch", by_torch)
attempt("cupy", by_cupy)
attempt("numba", by_numba)
fact("cpu_side", f"{HOST[0]} {HOST[-1]} (7 expected: the memfd)")
fact("python", sys.version.split()[0])
