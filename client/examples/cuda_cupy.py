# SPDX-License-Identifier: Apache-2.0
"""CuPy on unified memory: the CPU writes arrays, the GPU squares and sums them, the CPU reads the result.

usage: python client/examples/cuda_cupy.py; needs CuPy and an NVIDIA GPU."""

import cupy
import gmem
import numpy as np


def main() -> None:
    session = gmem.connect(devices=["cuda0:driver=cuda,capacity=256M"], embedded=True)
    arrays = [gmem.zeros(16 << 20, np.float32) for _ in range(8)]  # 64 MiB each: twice what the GPU may hold
    stream = cupy.cuda.Stream(non_blocking=True)
    for number, array in enumerate(arrays):
        array[:] = number
    sums = []
    for array in arrays:
        with gmem.acquire("cuda0", array, stream=stream) as view, stream:
            a = cupy.asarray(view)
            assert a.data.ptr == array.ctypes.data, "the same pointer"
            cupy.multiply(a, a, out=a)
            sums.append(cupy.sum(a, dtype=np.float64))
    stream.synchronize()
    for number, (array, total) in enumerate(zip(arrays, sums, strict=True)):
        assert (array == number * number).all() and float(total) == number * number * array.size
    with gmem.acquire("cuda0", arrays[1]) as view:
        assert float(cupy.from_dlpack(view)[-1]) == 1.0
    stats = next(h for h in session.devices() if h["name"] == "cuda0")
    size, room = sum(a.nbytes for a in arrays) >> 20, stats["capacity_bytes"] >> 20
    print(f"{size} MiB on {room} MiB: {stats['evictions']} evictions, all right")
    session.close()


main()
