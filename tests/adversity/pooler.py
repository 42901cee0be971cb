# SPDX-License-Identifier: Apache-2.0
"""A process that uses pools through the client library as any user can: well, badly, and without end. A line of JSON on
stdin is a command, a line on stdout its answer."""

import json
import os
import sys
import time
import traceback
from collections import Counter
from contextlib import suppress

import gmem
import numpy as np


def refused(call):
    """errno of what a call was refused with, 0 if it was not."""
    try:
        call()
    except (gmem.GmemError, OSError) as error:
        return error.errno
    return 0


def pattern(words, seed):
    return (np.arange(words, dtype=np.uint64) + 1) * np.uint64(0x9E3779B97F4A7C15 + 2 * seed)


class Pooler:
    def __init__(self):
        self.session = gmem.connect()
        self.held = {}  # name: pool, array, seed

    def do_make(self, name, size, seed, mode=0o600, publish=False):
        pool = gmem.pool(name, size=size, mode=mode, page_size="64K")
        array = pool.array(np.uint64)
        array[:] = pattern(len(array), seed)
        if publish:
            pool.publish()
        self.held[name] = pool, array, seed
        return pool.address

    def do_open(self, name, seed, owner=None):
        pool = gmem.pool(name, owner=owner).open()
        self.held[name] = pool, pool.array(np.uint64), seed
        return self.do_check()

    def do_check(self):
        """Names of pools that are not what was put there."""
        return [name for name, (_, array, seed) in self.held.items() if (array != pattern(len(array), seed)).any()]

    def do_names(self, count, size, prefix, fill=False):
        """Makes pools until it is refused."""
        for made in range(count):
            error = refused(lambda made=made: self.do_make(f"{prefix}{made}", size, made) if fill else self.empty(
                f"{prefix}{made}", size))  # fmt: skip
            if error:
                return {"made": made, "errno": error}
        return {"made": count, "errno": 0}

    def empty(self, name, size):
        pool = gmem.pool(name, size=size, page_size="64K")
        self.held[name] = pool, pool.array(np.uint64)[:0], 0

    def do_drop(self):
        """Unlinks and closes all of them."""
        for name in list(self.held):
            pool, array, _ = self.held.pop(name)
            pool.unlink()
            del array
            pool.close()
        return True

    def do_churn(self, seconds, size, prefix):
        """Makes, fills, publishes, opens and unlinks as fast as it can, in no good order."""
        outcomes, number, until = Counter(), 0, time.monotonic() + seconds
        while time.monotonic() < until:
            name = f"{prefix}{number % 5}"
            number += 1
            try:
                pool = gmem.pool(name, size=size, mode=0o666, page_size="64K")
                array = pool.array(np.uint64)
                array[:: 1 + number % 3] = number
                if number % 2:
                    pool.publish()
                if number % 4:
                    pool.unlink()
                del array
                if number % 7:
                    pool.close()
                outcomes["ok"] += 1
            except (gmem.GmemError, OSError) as error:
                outcomes[str(error.errno)] += 1
                with suppress(gmem.GmemError):
                    gmem.pool(name).unlink()
        return outcomes

    def do_trespass(self, name, owner):
        """What is not allowed, and what it says."""
        ask = self.session.request
        return {
            "read": refused(lambda: gmem.pool(name).open()),
            "write": refused(lambda: gmem.pool(name).open(write=True)),
            "of the owner": refused(lambda: gmem.pool(name, owner=owner).open(write=True)),
            "publish": refused(lambda: ask("pool_publish", name=name)),
            "unlink": refused(lambda: ask("pool_unlink", name=name)),
            "take the name": refused(lambda: gmem.pool(name, size=4096)),
            "persistent": refused(lambda: gmem.pool("for-ever", size=4096, persistent=True)),
        }

    def do_spoil(self, address):
        """Requests on the addresses of a pool that this process has not open, or may only read."""
        ask, page = self.session.request, {"va": address, "bytes": 65536}
        return {
            "discard": refused(lambda: ask("discard", **page)),
            "copy": refused(lambda: ask("hmemcpy", hnid=0, dst=address, src=address + 65536, bytes=4096)),
            "commit": refused(lambda: ask("mmap_commit", va=address)),
            "prefetch": refused(lambda: ask("prefetch", hnid=1, **page)),
        }

    def do_open_often(self, name, count):
        """Opens without closing, and closes what was not opened."""
        ask = self.session.request
        opened = [refused(lambda: ask("pool_open", name=name, write=False)) for _ in range(count)]
        return Counter(map(str, opened))

    def do_listed(self):
        return [row["name"] for row in self.session.request("pools")["pools"]]


def main():
    pooler = Pooler()
    print(json.dumps(os.getpid()), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(pooler, f"do_{command.pop('command')}")(**command)
        except Exception:  # the test says it, whatever it was
            answer = {"raised": traceback.format_exc()}
        print(json.dumps(answer), flush=True)


main()
