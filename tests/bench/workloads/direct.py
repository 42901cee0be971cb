# SPDX-License-Identifier: Apache-2.0
"""The job on memory that somebody else pages, in the process that has it: kernels one after the other."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

from workloads.workload import Arrays, Workload


def report(workload: Workload, arrays: Arrays, rounds: int, before_check: Callable[[], None] = lambda: None) -> None:
    """Prints seconds of each measured round, and what is wrong with the result, for read()."""
    workload.fill(arrays)
    seconds = []
    for number in range(workload.warm_up + rounds):
        steps = workload.steps(number)
        began = time.perf_counter()
        for step in steps:
            step.kernel(*step.views(arrays), *step.args)
        seconds.append(time.perf_counter() - began)
    before_check()
    wrong = workload.check(arrays, workload.warm_up + rounds - 1)
    print(json.dumps({"seconds": seconds[workload.warm_up :], "wrong": wrong}), flush=True)


def read(text: str) -> tuple[list[float], str | None, bool]:
    """Seconds of each round, a note, and whether the result was wrong."""
    answer = json.loads(text)
    return answer["seconds"], answer["wrong"], answer["wrong"] is not None
