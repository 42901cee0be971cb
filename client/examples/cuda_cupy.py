# SPDX-License-Identifier: Apache-2.0
"""CuPy on unified memory: the CPU writes an array, the GPU squares and sums it, the CPU reads the result; no copies in the
program. usage: python client/examples/cuda_cupy.py; needs CuPy and an NVIDIA GPU."""

import cupy
import numpy as np

import gmem


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
    print(f"{sum(a.nbytes for a in arrays) >> 20} MiB on {stats['capacity_bytes'] >> 20} MiB: {stats['evictions']} evictions, all right")
    session.close()


main()
