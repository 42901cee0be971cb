# SPDX-License-Identifier: Apache-2.0
"""Progress of the embedding: a bar on a terminal, a line for every tenth elsewhere."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class EmbeddingProgress:
    def __init__(self, console: Console, texts: int) -> None:
        self.console = console
        self.texts = texts
        self.done = 0
        self.tenths = 0
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

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def advance(self, texts: int, seconds: float, hbm_bytes: int, evictions: int) -> None:
        """seconds: what all texts so far have taken on the device."""
        self.done += texts
        note = f"{self.done / seconds:,.0f} texts/s, {hbm_bytes >> 20} MiB in HBM, {evictions:,} evictions"
        self.bar.update(self.task, completed=self.done, note=note)
        tenths = 10 * self.done // self.texts
        if not self.console.is_terminal and tenths > self.tenths:
            self.console.print(f"embedding {self.done:,}/{self.texts:,} texts, {note}", soft_wrap=True)
        self.tenths = tenths
