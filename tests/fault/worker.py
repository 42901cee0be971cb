# SPDX-License-Identifier: Apache-2.0
"""A client of a gmemd that is killed all the time: it does what clients do, and knows what every word must be. Ends
when its stdin does; then prints what it found, as JSON. usage: worker.py KIND SOCKET SEED"""

import json
import os
import select
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import gmem
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

WORDS = {"4K": 1 << 17, "64K": 1 << 18, "2M": 1 << 20}  # 1, 2 and 8 MiB
GPU_WORDS = 1 << 18  # a page of 2 MiB
GPU_ARRAYS = 10  # more than the device has
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


class Gpu:
    """Kernels of a CUDA device, on arrays of whole pages."""

    def __init__(self, book, rng, count=GPU_ARRAYS):
        sys.path.append(str(Path(__file__).resolve().parent.parent / "integration"))
        from cuda import Cuda

        self.book, self.rng, self.cuda = book, rng, Cuda()
        self.streams = [0, self.cuda.stream()]
        self.managed = [gmem.zeros(GPU_WORDS, np.int64, page_size="2M") for _ in range(count)]
        self.known = [np.zeros(GPU_WORDS, np.int64) for _ in range(count)]
        self.total = gmem.zeros(GPU_WORDS, np.int64, page_size="2M")

    def pick(self):
        return int(self.rng.integers(0, len(self.managed)))

    @contextmanager
    def acquired(self, *arrays, mode="rw", stream=0):
        began = time.time()
        with gmem.acquire("cuda0", *arrays, mode=mode, stream=stream) as views:
            if time.time() - began > SLOW_S:
                self.book.slow.append(("acquire", began, time.time()))
            self.book.steps += 1
            yield views

    def bump(self, n, add):
        stream = self.streams[n % 2]
        with self.acquired(self.managed[n], stream=stream) as view:
            if self.rng.integers(0, 4) == 0:  # so that it is held for a while
                self.cuda.spin(0.02, stream)
            self.cuda.bump(view, add, stream)
        self.known[n] += add

    def fill(self, n, value):
        stream = self.streams[n % 2]
        with self.acquired(self.managed[n], mode="w", stream=stream) as view:
            self.cuda.fill(view, value, stream)
        self.known[n] = value + np.arange(GPU_WORDS)

    def sum(self, n):
        self.total[0] = 0
        stream = self.streams[n % 2]
        with (
            self.acquired(self.managed[n], mode="r", stream=stream) as view,
            self.acquired(self.total, stream=stream) as out,
        ):
            self.cuda.launch("sum", view, GPU_WORDS, out.ptr, stream)
        got, expected = int(self.book.step("read a sum", lambda: self.total[0])), int(self.known[n].sum())
        if got != expected:
            self.book.wrong.append(f"kernel: the sum of {n} is {got}, not {expected}")

    def check(self, n):
        self.book.check(f"array {n}", self.book.step("read", np.copy, self.managed[n]), self.known[n])

    def check_all(self):
        for n in range(len(self.managed)):
            self.check(n)


def until_free(function, *args):
    """What a kernel has is moved when it is through."""
    while True:
        try:
            return function(*args)
        except gmem.Busy:
            time.sleep(0.001)


def compute_gpu(book, rng):
    """Kernels on more memory than the device has; what they leave is read by others."""
    gpu = Gpu(book, rng)
    while not over():
        n, choice = gpu.pick(), rng.integers(0, 10)
        if choice < 5:
            gpu.bump(n, int(rng.integers(1, 1000)))
        elif choice < 6:
            gpu.fill(n, int(rng.integers(1, 1000)))
        elif choice < 8:
            gpu.sum(n)
        else:
            gpu.check(n)
    gpu.check_all()


def touch_gpu(book, rng):
    """The CPU writes what kernels write, too, pages are sent to and fro, and some come afresh."""
    gpu = Gpu(book, rng, 4)
    while not over():
        n, choice = gpu.pick(), rng.integers(0, 10)
        if choice < 3:
            at = int(rng.integers(0, GPU_WORDS - 1000))
            add = int(rng.integers(1, 1000))
            book.step("write", increase, gpu.managed[n][at : at + 1000], add)
            gpu.known[n][at : at + 1000] += add
        elif choice < 6:
            gpu.bump(n, int(rng.integers(1, 1000)))
        elif choice < 8:
            book.step("prefetch", until_free, gmem.prefetch, gpu.managed[n], ("cuda0", "host")[choice % 2])
        elif choice < 9:
            gpu.check(n)
        else:
            book.step("discard", until_free, gmem.discard, gpu.managed[n])
            gpu.known[n][:] = 0
    gpu.check_all()


def churn_gpu(book, rng):
    """Arrays and sessions come and go, and with them frames: of processes that end with what they have, too."""
    gpu = Gpu(book, rng, 1)
    command = [sys.executable, str(Path(__file__).resolve()), "visit_gpu", sys.argv[2]]
    while not over():
        if len(gpu.managed) > 1 and rng.integers(0, 2):
            n = gpu.pick()
            gpu.check(n)
            book.step("munmap", gpu.managed.pop, n)
            gpu.known.pop(n)
        elif len(gpu.managed) < 5:
            gpu.managed.append(book.step("mmap", partial(gmem.zeros, GPU_WORDS, np.int64, page_size="2M")))
            gpu.known.append(np.zeros(GPU_WORDS, np.int64))
            gpu.bump(len(gpu.managed) - 1, 1)
        else:
            done = subprocess.run([*command, str(rng.integers(1 << 30))], capture_output=True, text=True)
            if done.stdout != "ready\nfine\n":
                book.wrong.append(f"a visitor: {done.returncode}, {done.stdout}{done.stderr}")
        gpu.bump(gpu.pick(), 3)
    gpu.check_all()


def visit_gpu(book, rng):
    """Memory that nobody else has had; half of the time it is left as it is."""
    gpu = Gpu(book, rng, 2)
    gpu.sum(0)
    gpu.fill(0, 7)
    gpu.bump(1, 5)
    gpu.sum(1)
    gpu.check_all()
    if not book.wrong:
        print("fine", flush=True)
    if rng.integers(0, 2):
        os._exit(0)


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
    kinds = {"touch": touch, "compute": compute, "churn": churn, "share": share, "touch_gpu": touch_gpu,
             "compute_gpu": compute_gpu, "churn_gpu": churn_gpu, "visit_gpu": visit_gpu}  # fmt: skip
    kinds[kind](book, np.random.default_rng(int(seed)))
    session.close()
    if kind == "visit_gpu":
        return
    print(json.dumps({"kind": kind, **vars(book)}), flush=True)


if __name__ == "__main__":
    main()
