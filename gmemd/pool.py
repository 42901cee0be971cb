# SPDX-License-Identifier: Apache-2.0
"""Threads for work that may wait, shared fairly between those who ask.

Work is queued per key (a session, a connection) and the keys take turns. A key may keep only some of the threads busy,
and so may an owner (a uid) over all its keys: whoever has requests that do not come back, because a device is slow or a
process is stopped, delays their own work and not everybody's.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any

import structlog

log = structlog.get_logger("gmemd.pool")

Work = Callable[[], Any]


class QueueFull(Exception):
    """The key has as much work waiting or running as it may have."""


class PoolClosed(Exception):
    """The pool takes no more work."""


class FairPool:
    """One lock guards everything; `_changed` is signalled when there may be something to run."""

    def __init__(self, threads: int, *, per_key: int, per_owner: int, backlog: int, name: str) -> None:
        self._per_key = per_key
        self._per_owner = per_owner
        self._backlog = backlog
        self._changed = threading.Condition()
        self._waiting: OrderedDict[Hashable, deque[tuple[Hashable, Work]]] = OrderedDict()
        self._running: Counter[Hashable] = Counter()
        self._running_of: Counter[Hashable] = Counter()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._serve, name=f"{name}-{index}", daemon=True) for index in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, key: Hashable, owner: Hashable, work: Work) -> None:
        """Runs work on one of the threads. QueueFull, PoolClosed."""
        with self._changed:
            if self._closed:
                raise PoolClosed
            queue = self._waiting.get(key)
            if (len(queue) if queue else 0) + self._running[key] >= self._backlog:
                raise QueueFull
            if queue is None:
                queue = self._waiting[key] = deque()
            queue.append((owner, work))
            self._changed.notify()

    def call(self, key: Hashable, owner: Hashable, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """As submit, with the result in a future."""
        future: Future[Any] = Future()

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = function(*args)
            except BaseException as error:  # noqa: B036 - it belongs to whoever waits on the future
                future.set_exception(error)
            else:
                future.set_result(result)

        self.submit(key, owner, work)
        return future

    def load(self, key: Hashable) -> int:
        """How much work of the key is waiting or running."""
        with self._changed:
            return len(self._waiting.get(key, ())) + self._running[key]

    def close(self, timeout: float) -> bool:
        """Drops what waits, lets what runs finish; False if some of it did not within the timeout."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()
            return self._changed.wait_for(lambda: not self._running, timeout)

    def _serve(self) -> None:
        while (item := self._take()) is not None:
            key, owner, work = item
            try:
                work()
            except Exception:  # a thread that dies would be missing for everybody
                log.exception("unexpected failure in a worker thread")
            finally:
                self._finished(key, owner)

    def _take(self) -> tuple[Hashable, Hashable, Work] | None:
        with self._changed:
            while not self._closed:
                item = self._next_locked()
                if item is not None:
                    return item
                self._changed.wait()
            return None

    def _next_locked(self) -> tuple[Hashable, Hashable, Work] | None:
        for key, queue in self._waiting.items():
            owner, work = queue[0]
            if self._running[key] >= self._per_key or self._running_of[owner] >= self._per_owner:
                continue
            queue.popleft()
            self._waiting.move_to_end(key)
            if not queue:
                del self._waiting[key]
            self._running[key] += 1
            self._running_of[owner] += 1
            return key, owner, work
        return None

    def _finished(self, key: Hashable, owner: Hashable) -> None:
        with self._changed:
            for counter, name in ((self._running, key), (self._running_of, owner)):
                counter[name] -= 1
                if not counter[name]:
                    del counter[name]
            # What this one held back may belong to another key, so any waiting thread may be the right one.
            self._changed.notify_all() if self._closed else self._changed.notify()
