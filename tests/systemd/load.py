# SPDX-License-Identifier: Apache-2.0
"""An ordinary user's program under the service: counts in managed memory, on the CPU and with `device` on simgpu0 as
well, and checks every word at each step. usage: load.py FILE [device]; FILE has the steps so far, and at the end, which
SIGTERM brings, `steps=N wrong=M`."""

import signal
import sys
from pathlib import Path

import gmem
import numpy as np

over = False


def add(array, value):
    array += value
    return int(array.sum(dtype=np.int64))


def stop(number, frame):
    global over
    over = True


def main():
    file, device = Path(sys.argv[1]), "device" in sys.argv
    signal.signal(signal.SIGTERM, stop)
    gmem.connect()
    array = gmem.zeros(1 << 17, np.int64, page_size="4K")
    context = gmem.device("simgpu0").context() if device else None
    steps = value = wrong = 0
    while not over:
        array += 1
        value += 1
        if context is not None:
            value += 1
            wrong += context.launch(add, array, 1).wait(60) != value * len(array)
        wrong += int((array != value).sum())
        steps += 1
        file.write_text(f"{steps}\n")
    file.write_text(f"steps={steps} wrong={wrong}\n")


main()
