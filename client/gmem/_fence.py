# SPDX-License-Identifier: Apache-2.0
"""Completion handles of asynchronous work."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Generator
from concurrent.futures import Future
from errno import ECANCELED
from typing import Any

from gmem._errors import ContextLost


class Fence:
    """wait() for it, poll it with done(), or await it in asyncio. The result is the kernel's return value; an error of
    the kernel is raised by each of them. Keeps the kernel's arguments alive until it is complete."""

    def __init__(self, keep: Any = None) -> None:
        self._future: Future[Any] = Future()
        self._future.set_running_or_notify_cancel()  # who gives up waiting does not take it from the others
        self._keep = keep
        self._pid = os.getpid()

    def wait(self, timeout: float | None = None) -> Any:
        """The result; TimeoutError if it takes longer than timeout seconds (the work goes on)."""
        return self._reachable().result(timeout)

    def done(self) -> bool:
        return self._future.done()

    def __await__(self) -> Generator[Any, None, Any]:
        return asyncio.wrap_future(self._reachable()).__await__()

    def _reachable(self) -> Future[Any]:
        if self._pid != os.getpid() and not self._future.done():
            raise ContextLost("the fence belongs to the parent process, and is never complete here", errno=ECANCELED)
        return self._future

    def _complete(self, value: Any) -> None:
        self._keep = None
        if not self._future.done():
            self._future.set_result(value)

    def _fail(self, error: BaseException) -> None:
        self._keep = None
        if not self._future.done():
            self._future.set_exception(error)
