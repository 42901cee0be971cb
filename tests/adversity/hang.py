# SPDX-License-Identifier: Apache-2.0
"""A tier whose ops do not come back as long as the file `hang` of its configuration is there."""

import errno
import os
import time

from gmemd.drivers import Driver, Info


class Hang(Driver):
    options = {"hang": "the file that holds it up", "op": "which op hangs"}

    def probe(self, name, config):
        self.hang, self.op = config["hang"], config.get("op", "peer_unmap")
        self.pages = {}

    def info(self):
        return Info(64 << 20, caps=("peer",))

    def wait(self, op):
        while self.op == op and os.path.exists(self.hang):
            time.sleep(0.02)

    def peer_map(self, key, src):
        self.wait("peer_map")
        self.pages[key] = bytes(src)

    def peer_unmap(self, key, dst):
        self.wait("peer_unmap")
        dst[:] = self.pages[key]

    def peer_free(self, key, size):
        self.pages.pop(key, None)


class Lost(Hang):
    """Its content is gone as long as the file is there."""

    def peer_unmap(self, key, dst):
        if os.path.exists(self.hang):
            raise OSError(errno.EIO, "the medium is gone")
        dst[:] = self.pages[key]
