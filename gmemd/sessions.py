# SPDX-License-Identifier: Apache-2.0
"""Who is connected: sessions, their tokens and their device contexts.

A Session is known here from its handshake until the core has destroyed it. end() is where every end meets: the
connection closed, the process gone, the core's word that a view is gone, the op `close`, the daemon's stop. The first
caller does the work and the others wait for it, so that it happens once and in one order: the token stops working, the
contexts go, the core's session goes, the connection closes.

Descriptors that the core lends belong to a session and are closed with it. Whoever duplicates them does it under
hold(), for which end() waits: else a number could be reused for another session's memory in between.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import structlog

from gmemd.errors import RequestError
from gmemd.notes import Notes
from gmemd.wire import TOKEN_BYTES

log = structlog.get_logger("gmemd.sessions")

Publish = Callable[[str, dict[str, Any]], None]
_HOLD_WAIT_S = 5.0


def process_name(pid: int) -> str:
    """What `ps` calls it; the process chose it, so it is only ever shown."""
    try:
        with open(f"/proc/{pid}/comm", "rb") as file:
            raw = file.read(64)
    except OSError:
        return ""
    return "".join(c if c.isprintable() else "?" for c in raw.removesuffix(b"\n").decode("utf-8", "replace"))


def _nobody(reason: str) -> None:
    """Whom to tell while a predecessor's connection has not been found again."""


@dataclass(eq=False)
class Context:
    """A device context: a process of the session's on one device."""

    id: int
    session: Session
    hnid: int
    pid: int
    on_end: Callable[[str], None]


@dataclass(eq=False)
class Session:
    """core_id 0: requests only, no memory."""

    core_id: int
    uid: int
    pid: int
    name: str
    admin: bool
    token: bytes
    on_end: Callable[[str], None]
    gids: frozenset[int] = frozenset()
    gid: int = -1  # the process's own, which its pools get
    started: float = field(default_factory=time.time)
    contexts: dict[int, Context] = field(default_factory=dict)
    ended: bool = False
    holds: int = 0
    at_end: list[Callable[[Session], None]] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)


class SessionTable:
    """All sessions. One lock guards the maps and every Session's fields; it is never held over a call of the core."""

    def __init__(self, core: Any, *, sessions_per_uid: int, contexts_per_session: int, publish: Publish,
                 notes: Notes | None = None) -> None:  # fmt: skip
        self._core = core
        self._sessions_per_uid = sessions_per_uid
        self._contexts_per_session = contexts_per_session
        self._publish = publish
        self._notes = notes or Notes()
        self._changed = threading.Condition()
        self._all: set[Session] = set()
        self._by_core: dict[int, Session] = {}
        self._by_digest: dict[bytes, Session] = {}
        self._contexts: dict[int, Context] = {}
        # Looking a token up by a keyed digest leaves nothing to learn from how long the look-up took.
        self._key = secrets.token_bytes(32)

    def _digest(self, token: bytes) -> bytes:
        return hashlib.blake2b(token, key=self._key, digest_size=32).digest()

    def check_session_count(self, uid: int) -> None:
        """EDQUOT for a user who has as many sessions as one may have."""
        with self._changed:
            held = sum(1 for session in self._all if session.uid == uid)
        if held >= self._sessions_per_uid:
            raise RequestError(errno.EDQUOT, f"uid {uid} has {held} sessions, which is the limit for one user")

    def open(
        self, core_id: int, uid: int, pid: int, admin: bool, on_end: Callable[[str], None], gids: Sequence[int] = (),
    ) -> Session:  # fmt: skip
        """gids: the process's groups, its own first."""
        token = secrets.token_bytes(TOKEN_BYTES)
        session = Session(core_id, uid, pid, process_name(pid), admin, token, on_end)
        session.gids, session.gid = frozenset(gids), gids[0] if gids else -1
        with self._changed:
            self._all.add(session)
            if core_id:
                self._by_core[core_id] = session
            self._by_digest[self._digest(token)] = session
        return session

    def note(self, session: Session, told: bool) -> tuple[int, int]:
        """From now on it outlives this daemon. told: its client knows that it is in. The numbers that it goes by."""
        self._notes.put(
            "sessions",
            session.core_id,
            {"token": session.token, "uid": session.uid, "pid": session.pid, "name": session.name,
             "admin": session.admin, "started": session.started, "told": told, "gid": session.gid,
             "gids": sorted(session.gids)},
        )  # fmt: skip
        return session.core_id, 0

    def note_context(self, context: Context, told: bool) -> tuple[int, int]:
        note = {"session": context.session.core_id, "hnid": context.hnid, "pid": context.pid, "told": told}
        self._notes.put("contexts", context.id, note)
        return context.session.core_id, context.id

    def was_told(self, core_id: int, context_id: int) -> bool:
        table, key = ("contexts", context_id) if context_id else ("sessions", core_id)
        note = self._notes.table(table).get(key)
        return bool(note and note["told"])

    def restore(self) -> None:
        """(blocks) A predecessor's sessions and contexts; their connections come later. Those that it had not noted had
        not come to a client."""
        known = set(self._core.session_ids())
        for core_id, note in self._notes.table("sessions").items():
            if core_id not in known:
                self._notes.drop("sessions", core_id)
                continue
            known.discard(core_id)
            session = Session(core_id, note["uid"], note["pid"], note["name"], note["admin"], note["token"], _nobody)
            session.started = note["started"]
            session.gid, session.gids = note["gid"], frozenset(note["gids"])
            with self._changed:
                self._all.add(session)
                self._by_core[core_id] = session
                self._by_digest[self._digest(session.token)] = session
        for core_id in known:
            self._quietly("session_disown", core_id)
        for context_id, note in self._notes.table("contexts").items():
            owner = self.by_core_id(note["session"])
            if owner is None:
                self._notes.drop("contexts", context_id)
            else:
                self.open_context(owner, Context(context_id, owner, note["hnid"], note["pid"], _nobody))

    def by_token(self, token: bytes) -> Session:
        """The live session that a token belongs to; EPERM otherwise."""
        with self._changed:
            session = self._by_digest.get(self._digest(token))
        if session is None or not hmac.compare_digest(session.token, token):
            raise RequestError(errno.EPERM, "token: not that of a live session", "token")
        return session

    def by_core_id(self, core_id: int) -> Session | None:
        with self._changed:
            return self._by_core.get(core_id)

    def live(self) -> list[Session]:
        with self._changed:
            return sorted((s for s in self._all if s.core_id), key=lambda session: session.core_id)

    def __len__(self) -> int:
        with self._changed:
            return len(self._all)

    @contextmanager
    def hold(self, session: Session) -> Iterator[None]:
        """Keeps the session's descriptors open meanwhile. For short stretches: end() waits for it."""
        with self._changed:
            if session.ended:
                raise RequestError(errno.ESTALE, "the session has ended")
            session.holds += 1
        try:
            yield
        finally:
            with self._changed:
                session.holds -= 1
                self._changed.notify_all()

    def at_end(self, session: Session, function: Callable[[Session], None]) -> None:
        """Calls it once when the session ends. ESTALE if it has."""
        with self._changed:
            if session.ended:
                raise RequestError(errno.ESTALE, "the session has ended")
            if function not in session.at_end:
                session.at_end.append(function)

    def check_context_count(self, session: Session) -> None:
        with self._changed:
            count = len(session.contexts)
        if count >= self._contexts_per_session:
            raise RequestError(errno.EDQUOT, f"the session has {count} contexts, which is the limit")

    def open_context(self, session: Session, context: Context) -> None:
        """ESTALE if the session has ended meanwhile; the caller then detaches what it attached."""
        with self._changed:
            if session.ended:
                raise RequestError(errno.ESTALE, "the session has ended")
            session.contexts[context.id] = context
            self._contexts[context.id] = context

    def context(self, session: Session, context_id: int) -> Context:
        with self._changed:
            context = session.contexts.get(context_id)
        if context is None:
            raise RequestError(errno.ENOENT, f"context: the session has no context {context_id}", "context")
        return context

    def contexts_of(self, session: Session) -> list[Context]:
        with self._changed:
            return list(session.contexts.values())

    def contexts_on(self, hnid: int) -> list[Context]:
        with self._changed:
            return [context for context in self._contexts.values() if context.hnid == hnid]

    def context_by_id(self, context_id: int) -> Context | None:
        with self._changed:
            return self._contexts.get(context_id)

    def end_context(self, context: Context, reason: str) -> None:
        """(blocks) Once; a second call returns at once."""
        with self._changed:
            if self._contexts.pop(context.id, None) is None:
                return
            context.session.contexts.pop(context.id, None)
        self._notes.drop("contexts", context.id)
        self._quietly("context_detach", context.id)
        context.on_end(reason)

    def end(self, session: Session, reason: str) -> None:
        """(blocks) Frees everything that the session held. Any thread, any number of times."""
        self._end(session, reason, destroy=True)

    def release_all(self, reason: str) -> None:
        """(blocks) For the daemon's stop: ends all contexts and lets all sessions go, but leaves their memory to the
        core's own end, which brings the pages home and leaves it to the clients."""
        with self._changed:
            sessions = list(self._all)
        for session in sessions:
            self._end(session, reason, destroy=False)

    def _end(self, session: Session, reason: str, destroy: bool) -> None:
        with self._changed:
            first = not session.ended
            if first:
                session.ended = True
                self._by_digest.pop(self._digest(session.token), None)
                self._changed.wait_for(lambda: session.holds == 0, _HOLD_WAIT_S)
        if not first:
            session.done.wait()
            return
        try:
            for context in self.contexts_of(session):
                self.end_context(context, "session ended")
            for function in session.at_end:
                function(session)
            if session.core_id and destroy:
                self._quietly("session_destroy", session.core_id)
        finally:
            if session.core_id:
                self._notes.drop("sessions", session.core_id)
            with self._changed:
                self._all.discard(session)
                self._by_core.pop(session.core_id, None)
            session.on_end(reason)
            session.done.set()
        if session.core_id:
            log.info("session ended", session=session.core_id, pid=session.pid, reason=reason)
            self._publish(
                "session.ended",
                {"session": session.core_id, "uid": session.uid, "pid": session.pid, "reason": reason},
            )

    def _quietly(self, method: str, core_id: int) -> None:
        """Teardown goes on whatever the core says; what is gone already is no news."""
        try:
            getattr(self._core, method)(core_id)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESRCH, errno.ESHUTDOWN):
                log.error("teardown failed", call=method, id=core_id, error=str(error))
