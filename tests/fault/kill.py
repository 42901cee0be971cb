# SPDX-License-Identifier: Apache-2.0
"""Kills a supervised gmemd under load, at random instants and at every crash point, and checks every word.

usage: kill.py [--gpu] [--seconds S | --kills N] [--seed SEED]. --gpu: with a GPU's memory in the traffic, which is the
double's of tests/gpu/double.c. Ends with one line, `kills=N lost=0 longest_stall_s=X`; exit status 1 if a word was
lost, a client failed or something was blocked for too long; also, if each crash point has had several turns, if one was
never come by. As root it sees to it that there are huge pages, as long as it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from datetime import datetime
from pathlib import Path

from gmemd.control import Control

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.append(str(ROOT / "tests" / "bench"))
from hugepages import overcommit  # noqa: E402

HUGE_PAGES = 32
TURNS = 4  # of each crash point, from which on a point that nobody came by is a point that is not tested
POINTS_H = ROOT / "csrc" / "include" / "gmem" / "crash.h"
KINDS = ("touch", "compute", "churn", "share")
PATIENCE_S = 0.8  # a point that nobody comes by in this time is given up for a kill at a random instant
STALL_MAX_S = 2.0  # from the start of a daemon to the end of what was blocked, or to that daemon's own end
STALL_IMPORTS = 6  # on a machine that is busy with something else: so many times what importing gmemd takes there
GPU_KINDS = ("touch_gpu", "compute_gpu", "churn_gpu", "churn")
GPU_DEVICE = "cuda0:driver=cuda,capacity=12M,reserve=4M,threads=2"
DOUBLE = ROOT / "build" / "gpu" / "libcuda-double.so"
DEVICES = (
    "simgpu0:capacity=6M",
    "name=squeezed,driver=zstd,capacity=12M,ratio=1,tier=1",
    "name=disk,driver=file,path={directory},capacity=256M,depth=4,tier=2",
)


def crash_points(gpu: bool = False) -> list[str]:
    text = POINTS_H.read_text()
    names = ["GMEM_CRASH_GPU_POINTS"] if gpu else []
    found = []
    for name in [*names, "GMEM_CRASH_POINTS"]:
        body = re.search(rf"#define {name}\(X\)(.*?[^\\])\n", text, re.S)
        assert body is not None
        found += re.findall(r"X\((\w+)\)", body[1])
    return found


class Target:
    """The daemon and its supervisor."""

    def __init__(self, directory: Path, gpu: bool = False) -> None:
        self.directory = directory
        self.spec = directory / "crash"
        self.spec.write_text("")
        self.log = directory / "log"
        ready, ready_end = os.pipe()
        command = [sys.executable, "-m", "gmemd", "run", "--supervised", "--runtime-dir", str(directory / "run"),
                   "--ready-fd", str(ready_end), "--set", "host.limit=10M", "--log-level", "info"]  # fmt: skip
        for device in (*DEVICES, *([GPU_DEVICE] if gpu else [])):
            command += ["--device", device.format(directory=directory)]
        self.environ = {"GMEM_LIBCUDA": str(DOUBLE)} if gpu else {}
        environ = {**os.environ, **self.environ, "GMEM_CRASH_FILE": str(self.spec)}
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environ, stderr=log, stdout=log, pass_fds=[ready_end]
            )
        os.close(ready_end)
        said = os.read(ready, 4096).decode()
        os.close(ready)
        if said != "READY=1\n":
            raise RuntimeError(f"gmemd did not start: {said}{self.log.read_text()}")

    @property
    def socket(self) -> str:
        return str(self.directory / "run" / "gmemd.sock")

    def child(self) -> int:
        """The daemon's process; 0 between two lives."""
        try:
            text = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        except OSError:
            return 0
        return int(text.split()[0]) if text.split() else 0

    def lives(self) -> int:
        return self.log.read_bytes().count(b"took over")

    def starts(self) -> list[float]:
        """When each life began, of which some were very short."""
        found = re.findall(r'"event": "features".*"timestamp": "([^"]+)"', self.log.read_text())
        return sorted(datetime.fromisoformat(text).timestamp() for text in found)

    def left(self) -> list[str]:
        """What is still held once every client has gone."""

        def look() -> list[str]:
            with Control(self.socket) as control:
                reply = control.request("stats")
            counters = {name: reply["stats"][name] for name in ("sessions", "contexts", "regions", "objects")}
            counters.update({h["name"]: h["used_bytes"] for h in reply["hnodes"]})
            return [f"{name}: {value}" for name, value in counters.items() if value]

        wait_for(lambda: not look(), 30)
        return look()

    def stop(self) -> int:
        self.spec.write_text("")
        self.process.terminate()
        return self.process.wait(60)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()  # its daemon gets a signal with that
            self.process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)


class Worker:
    def __init__(self, kind: str, target: Target, seed: int) -> None:
        self.kind = kind
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py"), kind, target.socket, str(seed)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, env={**os.environ, **target.environ, "PYTHONPATH": str(HERE)},
        )  # fmt: skip
        assert self.process.stdout is not None
        self.ready = self.process.stdout.readline() == "ready\n"

    def finish(self) -> dict:
        try:
            out, _ = self.process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self.kill()
            return {"kind": self.kind, "wrong": ["it was blocked for a minute"], "slow": [], "steps": 0}
        if self.process.returncode:
            return {"kind": self.kind, "wrong": [f"ended with {self.process.returncode}"], "slow": [], "steps": 0}
        return json.loads(out)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def wait_for(condition, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.005)
    return True


def next_spec(rng: random.Random, points: list[str], kills: int) -> str:
    """Each point in turn, and in between an instant of nobody's choice."""
    if kills % 4 == 3:
        return ""
    point = points[(kills - kills // 4) % len(points)]
    return f"{point}:{1 if point.startswith('RECOVER') else rng.choice((1, 2, 5, 20, 60))}"


def kill_once(
    target: Target, rng: random.Random, points: list[str], kills: int, where: Counter[str], start_s: float
) -> None:
    """Sees the life that runs now to its end; the next one gets its own point. start_s: what a start may take."""
    if not wait_for(target.child, 30):
        raise RuntimeError("gmemd was not started again")
    pid = target.child() or -1  # 0 would be ourselves
    spec = target.spec.read_text()
    target.spec.write_text(next_spec(rng, points, kills))
    patience = start_s + PATIENCE_S if spec.startswith("RECOVER") else PATIENCE_S if spec else rng.uniform(0, 0.4)
    if wait_for(lambda: target.child() != pid, patience):
        where[spec.partition(":")[0]] += 1
    elif pid > 0:
        os.kill(pid, signal.SIGKILL)
        where["anywhere"] += 1
        wait_for(lambda: target.child() != pid, 5)


def run(seconds: float, most: int, seed: int, gpu: bool) -> int:
    rng = random.Random(seed)
    pace = Pace()
    with contextlib.ExitStack() as stack:  # whatever happens, nobody is left behind
        if not stack.enter_context(overcommit(HUGE_PAGES)):
            print("without huge pages: as root there are some")
        target = Target(Path(tempfile.mkdtemp(prefix="gmem-kill-")), gpu)
        stack.callback(target.kill)
        workers = []
        for n, kind in enumerate(GPU_KINDS if gpu else KINDS):
            workers.append(Worker(kind, target, seed * 100 + n))
            stack.callback(workers[-1].kill)
        return kill_often(target, workers, rng, seconds, most, seed, pace, crash_points(gpu))


def kill_often(
    target: Target, workers: list[Worker], rng: random.Random, seconds: float, most: int, seed: int, pace: Pace,
    points: list[str],
) -> int:
    where, kills = Counter(), 0
    until = time.monotonic() + seconds
    failed = [worker.kind for worker in workers if not worker.ready]
    while not failed and kills < most and time.monotonic() < until:
        lives = target.lives()
        start_s = max(0.5, STALL_IMPORTS * pace.last())
        kill_once(target, rng, points, kills, where, start_s)
        kills += 1
        if not target.spec.read_text().startswith("RECOVER"):
            # or it comes by the point as it starts
            wait_for(lambda lives=lives: target.lives() > lives, start_s)
        failed = [worker.kind for worker in workers if worker.process.poll() is not None]
    target.spec.write_text("")
    results = [worker.finish() for worker in workers]
    results.append({"kind": "gmemd", "steps": kills, "slow": [], "wrong": target.left()})
    status = target.stop()
    few = target.environ or kills < TURNS * len(points) * 4 // 3  # or there is a GPU: not all of them are for that
    missed = [] if few else [point for point in points if not where[point]]
    return report(results, where, missed, status, target, seed, max(STALL_MAX_S, STALL_IMPORTS * pace.worst()))


class Pace:
    """How long it takes to start a program like gmemd, while all that goes on."""

    def __init__(self) -> None:
        self._seconds: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            began = time.monotonic()
            subprocess.run([sys.executable, "-c", "import gmemd.service"], cwd=ROOT, check=True)
            self._seconds.append(time.monotonic() - began)
            self._stop.wait(3)

    def last(self) -> float:
        return self._seconds[-1] if self._seconds else 0.0

    def worst(self) -> float:
        self._stop.set()
        self._thread.join()
        return max(self._seconds)


def longest_stall(results: list[dict], starts: list[float]) -> tuple[float, str]:
    """Of what was blocked: the longest part that lies in one life of the daemon."""
    longest, what = 0.0, ""
    for result in results:
        for step, began, ended in result["slow"]:
            cuts = [began, *(start for start in starts if began < start < ended), ended]
            part = max(after - before for before, after in itertools.pairwise(cuts))
            if part > longest:
                longest, what = part, f"{result['kind']}: {step}"
    return longest, what


def report(
    results: list[dict], where: Counter[str], missed: list[str], status: int, target: Target, seed: int,
    stall_max: float,
) -> int:  # fmt: skip
    kills = next(result["steps"] for result in results if result["kind"] == "gmemd")
    lost = sum(len(result["wrong"]) for result in results)
    stall, what = longest_stall(results, target.starts())
    for result in results:
        print(f"{result['kind']}: {result['steps']} steps", *result["wrong"][:5], sep="\n  ")
    print("killed at " + ", ".join(f"{name or 'start'} {count}" for name, count in sorted(where.items())))
    if missed:
        print("never came by " + ", ".join(missed))
    bad = lost or stall > stall_max or status or missed
    if bad:
        print(f"seed {seed}; gmemd ended with {status}; longest: {what}, where {stall_max:.1f} s may be; its log:")
        print(target.log.read_text()[-3000:])
    print(f"kills={kills} lost={lost} longest_stall_s={stall:.2f}")
    return 1 if bad else 0


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--kills", type=int, default=1 << 30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--gpu", action="store_true")
    args = parser.parse_args()
    return run(args.seconds, args.kills, args.seed, args.gpu)


if __name__ == "__main__":
    sys.exit(main())
