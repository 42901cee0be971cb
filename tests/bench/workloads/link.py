# SPDX-License-Identifier: Apache-2.0
"""The link of csrc/drivers/simgpu.c, for copies made by hand: each takes latency + bytes / bandwidth, one after the
other."""

from __future__ import annotations

import time

import numpy as np

from workloads.workload import Array


class Link:
    def __init__(self, bandwidth: int = 0, latency_ns: int = 0) -> None:
        self.bandwidth, self.latency_ns = bandwidth, latency_ns
        self._free_ns = 0

    def copy(self, dst: Array, src: Array) -> None:
        busy_ns = self.latency_ns + (dst.nbytes * 1_000_000_000 // self.bandwidth if self.bandwidth else 0)
        done = max(self._free_ns, time.monotonic_ns()) + busy_ns
        self._free_ns = done
        np.copyto(dst, src)
        self.until(done)

    def copies(self, nbytes: int) -> None:
        """Waits as long as a copy takes that somebody else has made."""
        done = max(self._free_ns, time.monotonic_ns())
        done += self.latency_ns + (nbytes * 1_000_000_000 // self.bandwidth if self.bandwidth else 0)
        self._free_ns = done
        self.until(done)

    @staticmethod
    def until(done_ns: int) -> None:
        left = done_ns - time.monotonic_ns()
        if left > 0:
            time.sleep(left / 1e9)
