# SPDX-License-Identifier: Apache-2.0
"""Fences are awaitable: kernels on two devices beside other coroutines."""

import asyncio

import gmem
import numpy as np


def norm(x):
    return float(np.sqrt((x * x).sum()))


async def main():
    gmem.connect(devices=["simgpu0:capacity=8M", "simgpu1:capacity=8M"])
    x = gmem.full(1_000_000, 2.0)
    contexts = [device.context() for device in gmem.devices()]
    results = await asyncio.gather(*(context.launch(norm, x) for context in contexts))
    print("norms:", results)


asyncio.run(main())
