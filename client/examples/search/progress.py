# SPDX-License-Identifier: Apache-2.0
"""Progress of the embedding: a bar on a terminal, a line for every tenth elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class EmbeddingProgress:
    def __init__(self, console: Console, texts: int) -> None:
        self.console = console
        self.texts = texts
        self.done = 0
        self.tenths = 0
        self.started = time.perf_counter()
        self.bar = Progress(
            TextColumn("embedding"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("", total=texts, note="")

    def __enter__(self) -> EmbeddingProgress:
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()

    def advance(self, texts: int, hbm_mib: float, evictions: int) -> None:
        self.done += texts
        rate = self.done / (time.perf_counter() - self.started)
        note = f"{rate:,.0f} texts/s, {hbm_mib:.0f} MiB in HBM, {evictions:,} evictions"
        self.bar.update(self.task, completed=self.done, note=note)
        tenths = 10 * self.done // self.texts
        if not self.console.is_terminal and tenths > self.tenths:
            self.console.print(f"embedding {self.done:,}/{self.texts:,} texts, {note}", soft_wrap=True)
        self.tenths = tenths
