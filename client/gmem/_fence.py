# SPDX-License-Identifier: Apache-2.0
"""Completion handles of asynchronous work."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from concurrent.futures import Future
from typing import Any


class Fence:
    """wait() for it, poll it with done(), or await it in asyncio. The result is the kernel's return value; an error of
    the kernel is raised by each of them. Keeps the kernel's arguments alive until it is complete."""

    def __init__(self, keep: Any = None) -> None:
        self._future: Future[Any] = Future()
        self._keep = keep

    def wait(self, timeout: float | None = None) -> Any:
        """The result; TimeoutError if it takes longer than timeout seconds (the work goes on)."""
        return self._future.result(timeout)

    def done(self) -> bool:
        return self._future.done()

    def __await__(self) -> Generator[Any, None, Any]:
        return asyncio.wrap_future(self._future).__await__()

    def _complete(self, value: Any) -> None:
        self._keep = None
        if not self._future.done():
            self._future.set_result(value)

    def _fail(self, error: BaseException) -> None:
        self._keep = None
        if not self._future.done():
            self._future.set_exception(error)
