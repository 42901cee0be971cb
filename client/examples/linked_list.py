# SPDX-License-Identifier: Apache-2.0
"""Pointers are valid everywhere: a list built by the CPU, walked and changed by the device."""

import ctypes

import gmem
import numpy as np

NODE_BYTES = 16  # a value, and the address of the next node


def word(address):
    return ctypes.c_int64.from_address(address)


def walk(address):
    total = 0
    while address:
        total += word(address).value
        word(address).value *= -1
        address = word(address + 8).value
    return total


gmem.connect(devices=["simgpu0:capacity=1M"])
memory = gmem.zeros(1000 * NODE_BYTES, np.uint8)
base = memory.__array_interface__["data"][0]
addresses = [base + i * NODE_BYTES for i in range(1000)]
for value, address in enumerate(addresses):
    word(address).value = value
    word(address + 8).value = addresses[value + 1] if value < 999 else 0

with gmem.device("simgpu0").context() as gpu:
    print("sum by the device:", gpu.launch(walk, base).wait())
print("sum by the CPU after it:", walk(base))
