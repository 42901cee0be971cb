# SPDX-License-Identifier: Apache-2.0
"""A kernel of one's own with Numba on unified memory.

usage: python client/examples/cuda_numba.py; needs Numba with CUDA and an NVIDIA GPU."""

import gmem
import numpy as np
from numba import cuda


@cuda.jit
def saxpy(factor, x, y):
    i = cuda.grid(1)
    if i < x.size:
        y[i] += factor * x[i]


def main() -> None:
    session = gmem.connect(devices=["cuda0:driver=cuda,capacity=256M"], embedded=True)
    context = gmem.device("cuda0").context()
    x, y = gmem.full(16 << 20, 2, np.float32), gmem.full(16 << 20, 1, np.float32)
    x.flags.writeable = False  # so it is only read there

    def kernel(x_view, y_view):
        saxpy[x.size // 256, 256](3.0, cuda.as_cuda_array(x_view), cuda.as_cuda_array(y_view))

    fences = [context.launch(kernel, x, y) for _ in range(4)]
    fences[-1].wait()
    assert (y == 1 + 4 * 6).all(), y
    print(f"saxpy over {y.nbytes >> 20} MiB, four times: {y[0]}")
    session.close()


main()
