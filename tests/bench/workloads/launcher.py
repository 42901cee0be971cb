# SPDX-License-Identifier: Apache-2.0
"""Where kernels run when no device is involved: a thread of this process, with the interface of a context."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol


class Fence(Protocol):
    def wait(self, timeout: float | None = None) -> Any: ...


class Launcher(Protocol):
    def launch(self, fn: Callable[..., Any], *args: Any) -> Fence: ...


class _Done:
    def __init__(self, future: Future[Any]) -> None:
        self._future = future

    def wait(self, timeout: float | None = None) -> Any:
        return self._future.result(timeout)


class Thread:
    """Kernels run in it one after the other."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="kernels")

    def launch(self, fn: Callable[..., Any], *args: Any) -> Fence:
        return _Done(self._pool.submit(fn, *args))

    def close(self) -> None:
        self._pool.shutdown()
