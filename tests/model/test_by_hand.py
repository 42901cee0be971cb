# SPDX-License-Identifier: Apache-2.0
"""Courses of the state machine that were found once, step by step."""

import sys
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from test_core_machine import CoreMachine, _the_kernel_has_it  # noqa: E402, F401

WHOLE = (0, 96)
FIRST, SECOND, THIRD = 0, 1, 2


@contextmanager
def machine():
    """With a session that has a region of each size, and a context; at the end all that was written is read."""
    one = CoreMachine()
    try:
        one.first()
        yield one
        one.books()
    except BaseException:
        one.broken = True
        raise
    finally:
        one.teardown()


def test_children_of_a_child_that_came_by_itself_inherit_from_the_next_daemon_too():
    """What it had registered itself was known as its own to the daemon that had it, and to none that came after."""
    with machine() as one:
        one.write(FIRST, WHOLE, 1, 0)
        one.crash_and_arm("FD_HELD", 1)
        lives = one.daemon.lives
        one.fork(FIRST)  # the daemon dies with the child's userfaultfd, and the child comes with another
        assert one.daemon.lives == lives + 1
        one.crash("", 1)
        one.fork(SECOND)
        assert len(one.sessions) == THIRD + 1 and one.sessions[THIRD].mapped
        for region in one.sessions[THIRD].mapped:
            one.read(one.sessions[THIRD].cpu, region, slice(0, region.size), [])
