# SPDX-License-Identifier: Apache-2.0
"""PyTorch on unified memory: matrices that do not fit the GPU's share together, multiplied block by block.

usage: python client/examples/cuda_torch.py [CAPACITY]; needs PyTorch and an NVIDIA GPU. CAPACITY (512M) is what
gmem may use of the GPU's memory; more than that is multiplied.
"""

import sys

import gmem
import numpy as np
import torch

N = 8192


def main() -> None:
    capacity = sys.argv[1] if len(sys.argv) > 1 else "512M"
    session = gmem.connect(devices=[f"cuda0:driver=cuda,capacity={capacity}"], embedded=True)
    rng = np.random.default_rng(0)
    blocks = [gmem.array(rng.standard_normal((2048, N), np.float32)) for _ in range(8)]  # 64 MiB each
    vectors = gmem.array(rng.standard_normal((N, 256), np.float32), page_size="2M")
    results = [gmem.zeros((2048, 256), np.float32, page_size="2M") for _ in blocks]
    stream = torch.cuda.Stream()
    for _ in range(3):
        for block, result in zip(blocks, results, strict=True):
            with (
                gmem.acquire("cuda0", block, vectors, result, stream=stream) as views,
                torch.cuda.stream(stream),
            ):
                a, x, y = (torch.as_tensor(view, device="cuda") for view in views)
                assert a.data_ptr() == block.ctypes.data, "the same pointer"
                torch.matmul(a, x, out=y)
    # The CPU reads what the GPU has written, at the same addresses: the touch waits for the release.
    worst = max(float(np.abs(r - b @ vectors).max()) for r, b in zip(results, blocks, strict=True))
    with gmem.acquire("cuda0", results[0]) as view:
        total = torch.from_dlpack(view).sum().item()
    stats = next(h for h in session.devices() if h["name"] == "cuda0")
    size, room = sum(b.nbytes for b in blocks) >> 20, stats["capacity_bytes"] >> 20
    print(f"{size} MiB on {room} MiB of the GPU: {stats['evictions']} evictions, sum {total:.0f}")
    print(f"largest difference to NumPy: {worst:.2g}")
    assert worst < 0.1
    session.close()


main()
