# SPDX-License-Identifier: Apache-2.0
"""A tier that keeps pages in a dictionary, for the workloads on the CPU where no other tier is named."""

from __future__ import annotations

from collections.abc import Mapping

from gmemd.drivers import Driver, Info


class Shelf(Driver):
    options = {"capacity": "bytes it may hold"}

    def probe(self, name: str, config: Mapping[str, str]) -> None:
        self.check_options(config)
        self.capacity = int(config.get("capacity", 1 << 30))
        self.pages: dict[int, bytes] = {}

    def info(self) -> Info:
        return Info(self.capacity)

    def peer_map(self, key: int, src: memoryview) -> None:
        self.pages[key] = bytes(src)

    def peer_unmap(self, key: int, dst: memoryview) -> None:
        dst[:] = self.pages[key]

    def peer_free(self, key: int, size: int) -> None:
        del self.pages[key]
