# SPDX-License-Identifier: Apache-2.0
import errno
import os
import subprocess
import threading
from pathlib import Path

import pytest

from gmemd.errors import RequestError
from gmemd.sessions import Context, SessionTable, process_name


@pytest.fixture
def published():
    return []


@pytest.fixture
def table(fake_core, published):
    return SessionTable(
        fake_core,
        sessions_per_uid=3,
        contexts_per_session=2,
        publish=lambda topic, fields: published.append((topic, fields)),
    )


@pytest.fixture
def open_session(table, fake_core):
    def open_session(uid=1000, on_end=lambda reason: None):
        return table.open(fake_core.session_create(uid, os.getpid()), uid, os.getpid(), False, on_end)

    return open_session


def add_context(table, fake_core, session, hnid=1, on_end=lambda reason: None):
    context = Context(fake_core.context_attach(session.core_id, hnid, *os.pipe(), 1), session, hnid, 1, on_end)
    table.open_context(session, context)
    return context


def test_tokens_are_random_and_found(table, open_session):
    first, second = open_session(), open_session()
    assert len(first.token) == 32 and first.token != second.token
    assert table.by_token(first.token) is first and table.by_token(second.token) is second
    for token in (bytes(32), first.token[:-1] + bytes([first.token[-1] ^ 1])):
        with pytest.raises(RequestError) as caught:
            table.by_token(token)
        assert (caught.value.errno, caught.value.argument) == (errno.EPERM, "token")


def test_names_come_from_the_process_and_are_printable(tmp_path, eventually):
    assert process_name(os.getpid()) == Path("/proc/self/comm").read_text().strip()
    assert process_name(1 << 30) == ""
    ugly = tmp_path / "a\x1b[31m\n"
    ugly.symlink_to("/bin/sleep")
    with subprocess.Popen([str(ugly), "20"]) as process:
        try:
            eventually(lambda: process_name(process.pid) == "a?[31m?")  # exec names it a moment after Popen is done
        finally:
            process.kill()


def test_end_frees_everything_once_and_in_order(table, fake_core, open_session, published):
    told = []
    session = open_session(on_end=told.append)
    context = add_context(table, fake_core, session, on_end=told.append)
    table.end(session, "enough")
    table.end(session, "again")
    assert told == ["session ended", "enough"]
    calls = [call[0] for call in fake_core.calls if call[0].endswith(("detach", "destroy"))]
    assert calls == ["context_detach", "session_destroy"]
    assert fake_core.called("context_detach") == [(context.id,)]
    assert not fake_core.sessions and len(table) == 0 and table.live() == []
    with pytest.raises(RequestError, match="not that of a live session"):
        table.by_token(session.token)
    assert published == [
        ("session.ended", {"session": session.core_id, "uid": 1000, "pid": os.getpid(), "reason": "enough"})
    ]


def test_a_second_end_waits_for_the_first(table, fake_core, open_session):
    session = open_session()
    gate = fake_core.delay["session_destroy"] = threading.Event()
    threads = [threading.Thread(target=table.end, args=(session, "x")) for _ in range(3)]
    for thread in threads:
        thread.start()
    threads[0].join(0.1)
    assert all(thread.is_alive() for thread in threads)
    gate.set()
    for thread in threads:
        thread.join(5)
    assert len(fake_core.called("session_destroy")) == 1


def test_end_waits_for_a_hold_and_refuses_new_ones(table, fake_core, open_session, eventually):
    session = open_session()
    with table.hold(session):
        thread = threading.Thread(target=table.end, args=(session, "x"))
        thread.start()
        eventually(lambda: session.ended)
        assert not fake_core.called("session_destroy")
        with pytest.raises(RequestError, match="has ended"), table.hold(session):
            pass
    thread.join(5)
    assert fake_core.called("session_destroy")


def test_release_all_leaves_memory_to_the_core(table, fake_core, open_session, published):
    sessions = [open_session(), open_session()]
    add_context(table, fake_core, sessions[0])
    table.release_all("gmemd stopped")
    assert len(fake_core.called("context_detach")) == 1 and not fake_core.called("session_destroy")
    assert all(session.done.is_set() for session in sessions) and len(table) == 0
    assert [fields["reason"] for _, fields in published] == ["gmemd stopped"] * 2


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EIO])
def test_end_goes_on_when_the_core_refuses(table, fake_core, open_session, number):
    told = []
    session = open_session(on_end=told.append)
    fake_core.fail["session_destroy"] = number
    table.end(session, "x")
    assert told == ["x"] and session.done.is_set() and len(table) == 0


def test_limits(table, fake_core, open_session):
    session = [open_session() for _ in range(3)][0]
    with pytest.raises(RequestError) as caught:
        table.check_session_count(1000)
    assert caught.value.errno == errno.EDQUOT and "1000" in caught.value.message
    table.check_session_count(1001)
    for _ in range(2):
        table.check_context_count(session)
        add_context(table, fake_core, session)
    with pytest.raises(RequestError) as caught:
        table.check_context_count(session)
    assert caught.value.errno == errno.EDQUOT


def test_contexts_belong_to_their_session(table, fake_core, open_session):
    one, other = open_session(), open_session()
    context = add_context(table, fake_core, one, hnid=2)
    assert table.context(one, context.id) is context
    assert table.contexts_on(2) == [context] and table.contexts_on(1) == []
    with pytest.raises(RequestError) as caught:
        table.context(other, context.id)
    assert (caught.value.errno, caught.value.argument) == (errno.ENOENT, "context")
    table.end_context(context, "x")
    table.end_context(context, "x")
    assert len(fake_core.called("context_detach")) == 1
    assert table.contexts_of(one) == [] and table.context_by_id(context.id) is None


def test_a_context_of_an_ended_session_is_refused(table, fake_core, open_session):
    session = open_session()
    table.end(session, "x")
    with pytest.raises(RequestError, match="has ended"):
        table.open_context(session, Context(5, session, 1, 1, lambda reason: None))
