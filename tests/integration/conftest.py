# SPDX-License-Identifier: Apache-2.0
"""A private gmemd for each test that asks for one."""

from collections.abc import Callable, Iterator

import gmem
import pytest
from helpers import ROOT
from programs import Builder, Daemon, run_ok


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


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    """The C library, installed."""
    prefix = tmp_path_factory.mktemp("prefix")
    run_ok(["make", "-s", "-C", ROOT / "client", "install", f"PREFIX={prefix}"])
    return Builder(prefix, tmp_path_factory.mktemp("programs"))


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    """A gmemd for C programs, with two devices of 8 MiB."""
    started = Daemon()
    yield started
    started.close()
