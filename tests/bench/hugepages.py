# SPDX-License-Identifier: Apache-2.0
"""Surplus huge pages for the time of a benchmark."""

from __future__ import annotations

import contextlib
import fcntl
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

SETTING = Path("/proc/sys/vm/nr_overcommit_hugepages")
ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


def _stop(number: int, _frame: object) -> None:
    sys.exit(128 + number)  # so that what restores the setting runs


@contextlib.contextmanager
def overcommit(pages: int) -> Iterator[bool]:
    """Raises vm.nr_overcommit_hugepages to at least that many, and restores it, also when the process is asked to end.
    False: that is not possible here. One user at a time: the next one would take what this one set for the original."""
    with contextlib.ExitStack() as stack:
        try:
            lock = stack.enter_context(SETTING.open())
            fcntl.flock(lock, fcntl.LOCK_EX)
            before = int(SETTING.read_text())
        except (OSError, ValueError):
            yield False
            return
        for number in ENDING:
            stack.callback(signal.signal, number, signal.signal(number, _stop))
        if before < pages:
            signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # none between the change and the promise to undo it
            try:
                SETTING.write_text(str(pages))
                stack.callback(SETTING.write_text, str(before))
                done = True
            except OSError:
                done = False
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
        yield before >= pages or done
