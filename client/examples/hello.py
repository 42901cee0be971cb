# SPDX-License-Identifier: Apache-2.0
"""The same array on the CPU and on a device whose memory is smaller than the array."""

import gmem
import numpy as np

gmem.connect(devices=["simgpu0:capacity=16M"])

x = gmem.empty(8_000_000, np.float32)  # 32 MB, on a device of 16 MiB
x[:] = np.arange(x.size)


def kernel(a):
    a *= 2
    return float(a.max())


with gmem.device("simgpu0").context() as gpu:
    print("largest:", gpu.launch(kernel, x).wait())

print("x[3] is", x[3], "here too; the device evicted", gmem.stats()["evictions"], "pages on the way")
