# SPDX-License-Identifier: Apache-2.0
"""A client of a gmemd that is killed all the time: it does what clients do, and knows what every word must be. Ends
when its stdin does; then prints what it found, as JSON. usage: worker.py KIND SOCKET SEED"""

import json
import os
import select
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import gmem
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

WORDS = {"4K": 1 << 17, "64K": 1 << 18, "2M": 1 << 20}  # 1, 2 and 8 MiB
CHURN_WORDS = 1 << 16
SLOW_S = 0.2


class Book:
    """What happened: the steps that took long, and every word that was not what it must be."""

    def __init__(self):
        self.steps = 0
        self.slow = []
        self.wrong = []

    def step(self, what, function, *args):
        began = time.time()
        result = function(*args)
        ended = time.time()
        if ended - began > SLOW_S:
            self.slow.append((what, began, ended))
        self.steps += 1
        return result

    def check(self, what, got, expected):
        if not np.array_equal(got, expected):
            at = int(np.flatnonzero(got != expected)[0])
            bad = int((got != expected).sum())
            self.wrong.append(f"{what}: {bad} words, first at {at}: {got[at]:#x} instead of {expected[at]:#x}")


def over():
    return bool(select.select([0], [], [], 0)[0])


class Arrays:
    """Managed arrays and what they must hold, in memory that nobody manages."""

    def __init__(self, book, rng):
        self.book, self.rng = book, rng
        self.managed, self.known = {}, {}
        for size, words in WORDS.items():
            self.known[size] = rng.integers(0, 1 << 62, words, np.int64)
            self.managed[size] = gmem.empty(words, np.int64, page_size=size)
            self.managed[size][:] = self.known[size]

    def part(self):
        size = str(self.rng.choice(list(WORDS)))
        words = WORDS[size]
        length = int(self.rng.integers(1, words // 8))
        start = int(self.rng.integers(0, words - length))
        return size, slice(start, start + length)

    def check_all(self):
        for size in WORDS:
            self.book.check(f"at the end, {size}", self.managed[size], self.known[size])


def touch(book, rng):
    """The CPU writes and reads, pages are sent to and fro."""
    arrays = Arrays(book, rng)
    while not over():
        size, part = arrays.part()
        choice = rng.integers(0, 10)
        if choice < 5:
            add = int(rng.integers(1, 1000))

            book.step(f"write {size}", increase, arrays.managed[size][part], add)
            arrays.known[size][part] += add
        elif choice < 7:
            got = book.step(f"read {size}", np.copy, arrays.managed[size][part])
            book.check(f"read {size}", got, arrays.known[size][part])
        elif choice < 9:
            where = "simgpu0" if choice == 7 else "host"
            book.step(f"prefetch {size} {where}", gmem.prefetch, arrays.managed[size][part], where)
        else:
            half = (part.stop - part.start) // 2
            low, high = slice(part.start, part.start + half), slice(part.start + half, part.start + 2 * half)
            if half:
                managed, known = arrays.managed[size], arrays.known[size]
                book.step(f"memcpy {size}", gmem.memcpy, managed[low], managed[high])
                known[low] = known[high]
    arrays.check_all()


def compute(book, rng):
    """A device context does it."""
    import kernels

    arrays = Arrays(book, rng)
    with gmem.device("simgpu0").context() as context:
        while not over():
            size, part = arrays.part()
            add = int(rng.integers(1, 1000))
            managed, known = arrays.managed[size], arrays.known[size]
            total = book.step(f"launch {size}", launch, context, kernels.add, managed[part], add)
            known[part] += add
            if rng.integers(0, 3) == 0:
                held_launch(book, context, kernels.add, managed[part], add, size)
                known[part] += add
                total += add * (part.stop - part.start)
            expected = int(known[part].sum(dtype=np.int64))
            if total != expected:
                book.wrong.append(f"launch {size}: the sum is {total}, not {expected}")
            if rng.integers(0, 3) == 0:
                got = book.step(f"read {size}", np.copy, managed[part])
                book.check(f"read {size}", got, known[part])
    arrays.check_all()


def churn(book, rng):
    """Memory comes and goes, is cut, and is shared with children."""
    kept = []
    while not over():
        size = str(rng.choice(["4K", "64K", "2M"]))
        known = rng.integers(0, 1 << 62, CHURN_WORDS, np.int64)
        managed = book.step(f"mmap {size}", make, size)
        book.step(f"fill {size}", np.copyto, managed, known)
        kept.append([size, managed, known])
        if rng.integers(0, 4) == 0:
            book.step("fork", fork_and_look, book, managed, known)
        while len(kept) > 4:
            one = kept.pop(int(rng.integers(0, len(kept))))
            book.check(f"before munmap, {one[0]}", *one[1:])
            del managed
            book.step(f"munmap {one[0]}", one.clear)
            managed = kept[-1][1]
    for size, managed, known in kept:
        book.check(f"at the end, {size}", managed, known)


class Reader:
    """Another process that opens pools by name, to read only, and compares."""

    def __init__(self, socket):
        command = [sys.executable, str(Path(__file__).resolve()), "read", socket, "0"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline() == "ready\n"

    def ask(self, name, expected):
        self.process.stdin.write(json.dumps([name, expected]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def read(socket):
    """The reader's side: sums of parts of a pool, and of the whole by a device context now and then."""
    gmem.connect(socket)
    print("ready", flush=True)
    for line in sys.stdin:
        name, expected = json.loads(line)
        with gmem.pool(name) as pool:
            numbers = pool.array(np.int64)
            said = int(numbers.sum(dtype=np.int64))
            del numbers
        print(json.dumps(said == expected), flush=True)


def share(book, rng):
    """Pools come, are written by one process and read by another, are published, and go."""
    reader = Reader(sys.argv[2])
    number = 0
    while not over():
        number += 1
        name, size = f"share-{os.getpid()}-{number}", str(rng.choice(["4K", "64K"]))
        known = rng.integers(0, 1 << 62, CHURN_WORDS, np.int64)
        pool = book.step(f"create {size}", partial(gmem.pool, name, known.nbytes, page_size=size))
        managed = pool.array(np.int64)
        book.step(f"fill pool {size}", np.copyto, managed, known)
        for published in (False, True):
            if published:
                book.step("publish", pool.publish)
            elif rng.integers(0, 2):
                gmem.prefetch(managed, "simgpu0")
            if not book.step("read by another", reader.ask, name, int(known.sum(dtype=np.int64))):
                book.wrong.append(f"another process saw something else, published: {published}")
            book.check(f"pool, published: {published}", managed, known)
        del managed
        with suppress(gmem.NotFound):  # done by a daemon that was killed before it could say so
            pool.unlink()
        book.step("close pool", pool.close)
    reader.close()


def increase(array, value):
    array += value


def launch(context, kernel, *args):
    return context.launch(kernel, *args).wait()


def held_launch(book, context, kernel, array, add, size):
    """As of a device that can't replay a fault; where there is no room for all of it at once, without."""
    ranges = [(array.ctypes.data, array.nbytes)]
    try:
        book.step(f"acquire {size}", context.acquire, ranges, True)
    except (gmem.OutOfMemory, gmem.Busy):
        ranges = []
    book.step(f"launch held {size}", launch, context, kernel, array, add)
    book.step(f"release {size}", context.release, ranges)


def make(page_size):
    return gmem.empty(CHURN_WORDS, np.int64, page_size=page_size)


def fork_and_look(book, managed, known):
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = 0 if np.array_equal(managed, known) else 2
            managed[0] = known[0]
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        book.wrong.append(f"a child saw something else, or failed: {status}")


def main():
    kind, socket, seed = sys.argv[1:]
    if kind == "read":
        read(socket)
        return
    book = Book()
    session = gmem.connect(socket)
    print("ready", flush=True)
    {"touch": touch, "compute": compute, "churn": churn, "share": share}[kind](book, np.random.default_rng(int(seed)))
    session.close()
    print(json.dumps({"kind": kind, **vars(book)}), flush=True)


if __name__ == "__main__":
    main()
