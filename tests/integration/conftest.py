# SPDX-License-Identifier: Apache-2.0
"""A private gmemd for each test that asks for one."""

from collections.abc import Callable, Iterator

import gmem
import pytest


@pytest.fixture
def connect() -> Iterator[Callable[..., gmem.Session]]:
    """gmem.connect() to a fresh daemon; closed afterwards."""
    sessions = []

    def make(*devices: str, **options) -> gmem.Session:
        sessions.append(gmem.connect(devices=devices, embedded=True, **options))
        return sessions[-1]

    yield make
    for session in reversed(sessions):
        session.close()


@pytest.fixture
def session(connect) -> gmem.Session:
    """A daemon with one device of 8 MiB."""
    return connect("simgpu0:capacity=8M")
