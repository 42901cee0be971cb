# SPDX-License-Identifier: Apache-2.0
"""The userfaultfd that a client hands over is its own as well: what it gives instead, and what it does with it
later."""

import errno

import pytest


@pytest.mark.parametrize("what", ["pipe", "socket", "file", "named", "eventfd", "epoll", "device", "directory",
                                  "blocking", "initialised"])  # fmt: skip
def test_what_is_no_fresh_userfaultfd(arena, what):
    answer = arena.attacker().ask("wrong_uffd", what=what)
    assert answer["errno"] in (errno.EBADF, errno.EINVAL) and "uffd" in answer["message"]


def test_the_userfaultfd_of_another_process(arena):
    """Memory is that process's then, and its end is nobody else's."""
    answer = arena.attacker().ask("foreign_uffd")
    assert answer["ready"] == 0 and answer["mmap"] and not answer["commit"] and not answer["late"]


def test_messages_that_are_stolen(arena):
    thieves = [arena.attacker() for _ in range(2)]
    for thief in thieves:
        thief.send("steal", seconds=1.0)
    arena.check_honest()
    assert sum(thief.answer() for thief in thieves) > 0, "there was something to steal"


def test_a_userfaultfd_that_begins_to_block(arena):
    """O_NONBLOCK is a flag of the description, which both ends share: gmemd's read must not wait for ever."""
    attackers = [arena.attacker() for _ in range(2)]
    for attacker in attackers:
        assert attacker.ask("block_reader", rounds=10) == 0
    for _ in range(3):
        arena.check_honest()


def test_memory_that_is_not_ours(arena):
    attacker = arena.attacker()
    outcome = attacker.ask("foreign_ranges")
    assert 0 in outcome.values(), "the kernel lets a process register its own memory"
    attacker.ask("touch_foreign")
    arena.check_honest()


def test_every_ioctl_on_its_own(arena):
    attackers = [arena.attacker() for _ in range(2)]
    for attacker in attackers:
        attacker.send("ioctls", count=400)
    arena.check_honest()
    for attacker in attackers:
        attacker.answer()


def test_closing_it(arena):
    assert arena.attacker().ask("close_uffd") == 0, "gmemd has its own, and goes on serving"


@pytest.mark.parametrize("steal", [False, True])
def test_mappings_in_all_orders(arena, steal):
    attackers = [arena.attacker() for _ in range(2)]
    for attacker in attackers:
        attacker.send("mappings", count=300, steal=steal)
    arena.check_honest()
    for attacker in attackers:
        attacker.answer()


def test_children_that_never_say_hello(arena):
    """Each is a session that gmemd made by itself, from an event: they count, and they go."""
    assert arena.attacker().ask("fork_bomb", count=400, seconds=60) == 400
    arena.check_honest()
