# SPDX-License-Identifier: Apache-2.0
"""A driver in Python that keeps pages in a dictionary, and one for each way of misbehaving. Options: capacity, fail."""

import errno

from gmemd.drivers import Driver, Info, Usage

KEPT = []


class PageStore(Driver):
    options = {"capacity": "bytes", "fail": "the op that fails"}

    def probe(self, name, config):
        self.check_options(config)
        self.name = name
        self.capacity = int(config.get("capacity", 64 << 20))
        if self.capacity < 0:
            raise ValueError("capacity: negative")
        self.fail = config.get("fail", "")
        self.pages = {}
        self.removed = False
        self.most = 0

    def info(self):
        if self.fail == "info":
            raise RuntimeError("no info")
        return Info(self.capacity, page_bytes=(4096, 65536, 2 << 20), caps=("peer",), latency_ns=7)

    def remove(self):
        self.removed = True

    def peer_map(self, key, src):
        assert src.readonly and src.nbytes in (4096, 65536, 2 << 20)
        if self.fail == "peer_map":
            raise OSError(errno.ENOSPC, "the store is full")
        if self.fail == "keep":
            KEPT.append(memoryview(src))
        self.pages[key] = bytes(src)
        self.most = max(self.most, len(self.pages))

    def peer_unmap(self, key, dst):
        if self.fail == "peer_unmap":
            raise RuntimeError("the store is broken")
        dst[:] = self.pages[key]

    def peer_free(self, key, size):
        assert len(self.pages[key]) == size
        del self.pages[key]


class Lying(PageStore):
    def info(self):
        return Info(1 << 20, page_bytes=(5000,))


class Unknown(PageStore):
    def info(self):
        return Info(1 << 20, caps=("fast",))


class Batches(PageStore):
    """Only batches, a tier that compresses to half, and for fail=some there is no room for every second key."""

    peer_map = peer_unmap = None

    def info(self):
        return Info(self.capacity, caps=("peer",), assured_bytes=self.capacity // 2)

    def peer_map_batch(self, pages):
        self.batches = [*getattr(self, "batches", []), len(pages)]
        if self.fail == "peer_map_batch":
            raise OSError(errno.ENOSPC, "the store is full")
        if self.fail == "short":
            return [None] * (len(pages) + 1)
        outcomes = []
        for key, src in pages:
            assert src.readonly
            if self.fail == "some" and key % 2:
                outcomes.append(OSError(errno.ENOSPC, "the store is full"))
                continue
            self.pages[key] = bytes(src)
            outcomes.append(None)
        return outcomes

    def peer_unmap_batch(self, pages):
        for key, dst in pages:
            dst[:] = self.pages[key]

    def peer_usage(self):
        size = sum(map(len, self.pages.values()))
        return Usage(len(self.pages), size, size // 2, 1)
