# SPDX-License-Identifier: Apache-2.0
"""The core's threads, as people are told of them: which one has been at the same thing for too long, and what it waits
for. The core finds them (csrc/watch.c); here they get words, and a limit beyond which gmemd counts as hung."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import structlog

log = structlog.get_logger("gmemd.watch")

_DOING = {
    "read": "reading a userfaultfd", "fault": "a page fault", "event": "a fork, unmap or remap",
    "ahead": "fetching ahead", "requests": "requests of a ring", "reclaim": "making room",
}  # fmt: skip


def describe(thread: dict[str, Any], device: str) -> dict[str, Any]:
    """A thread of Core.threads() for the log, for events and for `stats`."""
    return {
        "thread": f"{thread['role']} {thread['tid']}",
        "doing": _DOING.get(thread["doing"], thread["doing"]),
        "waits_for": f"{thread['op']} of {device}" if thread["op"] else "",
        "session": thread["session"],
        "va": thread["va"],
        "seconds": round(thread["held_ns"] / 1e9, 1),
    }


class Watch:
    """name_of: a device's name by its hnid. limit_s: how long a thread may be stuck before the manager is to know; 0:
    for ever."""

    def __init__(self, core: Any, name_of: Callable[[int], str], limit_s: float) -> None:
        self._core = core
        self._name_of = name_of
        self._limit_s = limit_s
        self._healthy = True

    def stuck(self) -> list[dict[str, Any]]:
        return [self._describe(thread) for thread in self._core.threads() if thread["stuck"]]

    def find(self, index: int) -> dict[str, Any] | None:
        """What an event speaks of, if it still is so."""
        for thread in self._core.threads():
            if thread["index"] == index and thread["stuck"]:
                return self._describe(thread)
        return None

    def healthy(self) -> bool:
        """False while a thread has been stuck beyond the limit: then the manager's watchdog is left to bite, and the
        next gmemd takes over."""
        beyond = [thread for thread in self.stuck() if self._limit_s and thread["seconds"] > self._limit_s]
        if beyond and self._healthy:
            log.error("a thread is stuck beyond the limit: no more signs of life", **beyond[0], limit_s=self._limit_s)
        self._healthy = not beyond
        return self._healthy

    def _describe(self, thread: dict[str, Any]) -> dict[str, Any]:
        return describe(thread, self._name_of(thread["hnid"]) if thread["hnid"] >= 0 else "")
