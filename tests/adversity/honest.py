# SPDX-License-Identifier: Apache-2.0
"""The honest client: memory of each page size, larger than the device, that moves between host and device all the time.

On `check` it compares every word with what it wrote there, has the device do the same, and writes something new.
Answers with what was wrong, which should be nothing."""

import json
import sys

import gmem
import numpy as np

KIB = 1 << 10


def pattern(words: int, generation: int, which: int) -> np.ndarray:
    return (np.arange(words, dtype=np.uint64) + 1) * np.uint64(0x9E3779B97F4A7C15 + 2 * (generation * 16 + which))


def bump(array, by):
    """In the device's process: what it sees there, and a change that the host must see."""
    total = int(np.bitwise_xor.reduce(array))
    array += np.uint64(by)
    return total


class Honest:
    def __init__(self) -> None:
        self.session = gmem.connect()
        self.generation = 0
        self.arrays = [
            gmem.empty(count, np.uint64, page_size=page)
            for page, count in (("4K", 64 * KIB), ("64K", 512 * KIB), ("64K", 640 * KIB))
        ]
        self.context = gmem.device("simgpu0").context()
        self.fill()

    def fill(self) -> None:
        self.generation += 1
        for which, array in enumerate(self.arrays):
            array[:] = pattern(len(array), self.generation, which)
            self.session.request("prefetch", hnid=which % 2, va=array.ctypes.data, bytes=array.nbytes // 2)

    def check(self) -> str:
        wrong = []
        for which, array in enumerate(self.arrays):
            want = pattern(len(array), self.generation, which)
            bad = int((array != want).sum())
            if bad:
                wrong.append(f"{bad} wrong words of {len(array)} in array {which}")
        small = self.arrays[0]
        want = pattern(len(small), self.generation, 0)
        seen = self.context.launch(bump, small, 5).wait(20)
        if seen != int(np.bitwise_xor.reduce(want)) or (small != want + np.uint64(5)).any():
            wrong.append("wrong words on the device")
        self.session.request("query", va=small.ctypes.data, bytes=4096)
        self.fill()
        return "; ".join(wrong)


def main() -> None:
    honest = Honest()
    print(json.dumps(True), flush=True)
    for _ in sys.stdin:
        try:
            answer = honest.check()
        except Exception as error:  # the test says it, whatever it was
            answer = f"{type(error).__name__}: {error}"
        print(json.dumps(answer), flush=True)


main()
