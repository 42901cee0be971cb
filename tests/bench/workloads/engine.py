# SPDX-License-Identifier: Apache-2.0
"""What the ways to run a workload have in common: rounds, and two kernels under way at a time."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

from workloads.launcher import Fence
from workloads.plan import Moves
from workloads.workload import Arrays, Step, Workload

TIMEOUT_S = 120.0


class Engine(abc.ABC):
    """The workload with its data in place, on memory of that capacity."""

    arrays: Arrays

    def __init__(self, workload: Workload, capacity: int, rounds: int) -> None:
        self.workload, self.capacity = workload, capacity
        self.steps = [workload.steps(number) for number in range(rounds)]
        self.planned: list[Moves] | None = None  # of all rounds

    def all_steps(self) -> list[Step]:
        return [step for steps in self.steps for step in steps]

    def round(self, number: int) -> None:
        """The whole job once; complete when it returns."""
        first = sum(map(len, self.steps[:number]))
        fences: list[Fence] = []
        for at, step in enumerate(self.steps[number]):
            moves = self.planned[first + at] if self.planned is not None else None
            if moves is not None:
                _wait(fences[-2:-1])  # so that what the step before the last one used can be replaced
                self.move(moves.early, moves)
                if moves.late:
                    _wait(fences[-1:])
                    self.move(moves.late, moves)
            fences.append(self.launch(step, moves))
        _wait(fences)

    @abc.abstractmethod
    def move(self, queue: Sequence[Any], moves: Moves) -> None:
        """Makes these moves, all of them early or all of them late."""

    @abc.abstractmethod
    def launch(self, step: Step, moves: Moves | None) -> Fence:
        """Starts one step."""

    @abc.abstractmethod
    def finish(self) -> None:
        """After the last round: the results are in `arrays` then."""

    def counters(self) -> dict[str, float]:
        """What was counted so far."""
        return {}

    @abc.abstractmethod
    def close(self) -> None:
        """Gives the memory back."""


def _wait(fences: Sequence[Fence]) -> None:
    for fence in fences:
        fence.wait(TIMEOUT_S)
