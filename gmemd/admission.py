# SPDX-License-Identifier: Apache-2.0
"""What a HELLO comes to: a session, a forked child's session, a device context or an administrator's token.

These calls may wait for the core, so the handshake server runs them on its threads. Each returns an Admission: the
WELCOME, the descriptors to pass, how to go on once the client's userfaultfd has come, and how to undo it all.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import structlog

from gmemd import wire
from gmemd.devices import DeviceTable
from gmemd.errors import RequestError, as_request_error
from gmemd.sessions import Context, Session, SessionTable

log = structlog.get_logger("gmemd.admission")

Close = Callable[[str], None]


@dataclass(frozen=True)
class Claimant:
    """Who is asking, as the kernel has it; on_end is called when what they got has ended."""

    uid: int
    pid: int
    pidfd: int
    on_end: Close
    gids: tuple[int, ...] = ()


def _nothing(reason: str) -> None:
    """For what needs no undoing."""


@dataclass
class Admission:
    """lent holds our duplicates of the core's descriptors; welcome_fds and those of regions are among them.

    finish(uffd) takes the descriptor and gives the new close(); None if no UFFD is to come, and then ready says whether
    a READY is."""

    welcome: wire.Welcome
    welcome_fds: list[int] = field(default_factory=list)
    regions: list[tuple[bytes, int]] = field(default_factory=list)
    lent: dict[int, int] = field(default_factory=dict)
    finish: Callable[[int], Close] | None = None
    ready: bool = True
    close: Close = _nothing
    find_agent: Callable[[], int] | None = None
    answer: Callable[[wire.Ask], tuple[bytes, int]] | None = None  # of FILES; the descriptor is the caller's
    answers_at_once: bool = False  # else it blocks
    keep: Callable[[bool], tuple[int, int]] | None = None  # (blocks) SessionTable.note(), or note_context()
    map_file: Callable[[wire.File, int], bytes] | None = None  # (blocks) takes the descriptor; REGION

    def agent(self) -> int | None:
        """(blocks) The descriptor for the process's agent, once it is attached; None where there is no use for one."""
        if self.find_agent is None:
            return None
        try:
            return _duplicate(self, self.find_agent())
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                log.warning("no agent for a process: what it uses can't be told from what is idle", error=str(error))
            return None

    def close_fds(self) -> None:
        for fd in self.lent.values():
            os.close(fd)
        self.lent, self.welcome_fds, self.regions = {}, [], []


class Admissions:
    """The kinds of HELLO."""

    def __init__(
        self, core: Any, sessions: SessionTable, devices: DeviceTable, *, control: str, events: str,
        publish: Callable[[str, dict[str, Any]], None],
    ) -> None:  # fmt: skip
        self._core = core
        self._sessions = sessions
        self._devices = devices
        self._endpoints = (control, events)
        self._publish = publish
        self._admin_uids = frozenset((0, os.geteuid()))
        self._kinds = {
            wire.CLIENT: self._client,
            wire.FORK_CHILD: self._fork_child,
            wire.CONTEXT: self._context,
            wire.ADMIN: self._admin,
            wire.MAP_FILE: self._file,
            wire.FILES: self._files,
        }

    def admit(self, claimant: Claimant, hello: wire.Hello) -> Admission:
        """(blocks) OSError, with nothing left open, if it is refused."""
        return self._kinds[hello.kind](claimant, hello)

    def _admin(self, who: Claimant, hello: wire.Hello) -> Admission:
        self._sessions.check_session_count(who.uid)
        session = self._sessions.open(0, who.uid, who.pid, self._may_administer(who), who.on_end, who.gids)
        control, events = self._endpoints
        welcome = wire.Welcome(token=session.token, control=control, events=events)
        return Admission(welcome, ready=False, close=lambda reason: self._sessions.end(session, reason))

    def _may_administer(self, who: Claimant) -> bool:
        return who.uid in self._admin_uids

    def _client(self, who: Claimant, hello: wire.Hello) -> Admission:
        self._sessions.check_session_count(who.uid)
        core_id = self._core.session_create(who.uid, who.pid)
        return self._session(who, core_id, stored=False, ring=hello.wants_ring)

    def _fork_child(self, who: Claimant, hello: wire.Hello) -> Admission:
        parent = self._owned(who, hello)
        self._sessions.check_session_count(who.uid)
        core_id, stored = self._core.session_fork(parent.core_id, who.uid, who.pid)
        return self._session(who, core_id, stored, hello.wants_ring)

    def _files(self, who: Claimant, hello: wire.Hello) -> Admission:
        """For the session's own process and its contexts', which the kernel says they are."""
        session = self._owned(who, hello)
        context_id, hnid = 0, 0
        if hello.device:
            with self._devices.hold(hello.device) as hnid:
                mine = [c.id for c in self._sessions.contexts_of(session) if c.pid == who.pid and c.hnid == hnid]
            if not mine:
                raise RequestError(errno.ENOENT, f"device: this process is no context on {hello.device}", "device")
            context_id = mine[0]

        def answer(ask: wire.Ask) -> tuple[bytes, int]:
            self._sessions.by_token(hello.token)
            if ask.what == wire.ASK_FILE:
                region = self._core.region_file(session.core_id, ask.va, hnid)
                message = wire.pack_answer(
                    flags=_region_flags(region), va=region["va"], size=region["bytes"], offset=region["offset"],
                    page_bytes=region["page_bytes"],
                )  # fmt: skip
                return message, region["fd"]
            if not context_id:
                raise RequestError(errno.EPROTO, "ASK: this is no context's connection")
            if ask.what == wire.ASK_MAPPED:
                self._core.context_overlay(context_id, ask.va, ask.size)
            else:
                self._core.context_uncover(context_id, ask.va, ask.size)
            return wire.pack_answer(), -1

        welcome = self._welcome(session.core_id, 0, hello.token, 0, hnid)
        at_once = not context_id  # the host has each file already, and can be asked for nothing else
        return Admission(welcome, ready=False, answer=answer, answers_at_once=at_once)

    def _owned(self, who: Claimant, hello: wire.Hello) -> Session:
        """The session of the token, if it is of the same user: a token alone does not carry memory across users."""
        session = self._sessions.by_token(hello.token)
        if session.uid != who.uid or not session.core_id:
            raise RequestError(errno.EPERM, "token: not that of a session of this user", "token")
        return session

    def _session(self, who: Claimant, core_id: int, stored: bool, ring: bool) -> Admission:
        session = self._sessions.open(core_id, who.uid, who.pid, self._may_administer(who), who.on_end, who.gids)

        def close(reason: str) -> None:
            self._sessions.end(session, reason)

        def finish(uffd: int) -> Close:
            with _giving(uffd, who.pidfd) as pidfd:
                self._core.session_attach(core_id, uffd, pidfd)
            self._announce(session)
            return close

        admission = Admission(wire.Welcome(), close=close, finish=None if stored else finish)
        admission.find_agent = lambda: self._core.view_agent(core_id, 0)
        admission.keep = lambda told: self._sessions.note(session, told)
        try:
            with self._sessions.hold(session):
                flags = self._lend(admission, *self._core.session_files(core_id))
                if ring:
                    flags |= self._lend_ring(admission, core_id)
                if not stored:
                    self._lend_regions(admission, self._core.regions(core_id))
        except BaseException:
            admission.close_fds()
            close("handshake failed")
            raise
        if stored:
            flags |= wire.FORK_STORED
            self._announce(session)
        admission.welcome = self._welcome(core_id, flags, session.token, len(admission.regions))
        return admission

    def _announce(self, session: Session) -> None:
        self._publish(
            "session.started",
            {"session": session.core_id, "uid": session.uid, "pid": session.pid, "name": session.name},
        )

    def _context(self, who: Claimant, hello: wire.Hello) -> Admission:
        session = self._owned(who, hello)
        self._sessions.check_context_count(session)
        admission = Admission(wire.Welcome())
        with self._sessions.hold(session), self._devices.hold(hello.device) as hnid:
            if self._devices.makes_frames(hnid):
                return self._own_context(who, hello, session, hnid)
            try:
                flags = self._lend(admission, *self._core.context_files(session.core_id, hnid))
                overlays = self._core.context_overlays(session.core_id, hnid)
                self._lend_regions(admission, overlays)
            except BaseException as error:
                admission.close_fds()
                if isinstance(error, OSError) and error.errno == errno.EOPNOTSUPP:
                    text = f"device: {hello.device} only stores pages, no context can be opened on it"
                    raise RequestError(errno.EOPNOTSUPP, text, "device") from None
                raise

        def finish(uffd: int) -> Close:
            with _giving(uffd, who.pidfd) as pidfd:
                context_id = self._core.context_attach(session.core_id, hnid, uffd, pidfd, who.pid)
            self._cover(context_id, overlays)
            context = Context(context_id, session, hnid, who.pid, who.on_end)
            admission.find_agent = lambda: self._core.view_agent(session.core_id, context_id)
            admission.keep = lambda told: self._sessions.note_context(context, told)
            try:
                self._sessions.open_context(session, context)
            except RequestError:
                with contextlib.suppress(OSError):
                    self._core.context_detach(context_id)
                raise
            return lambda reason: self._sessions.end_context(context, reason)

        admission.finish = finish
        admission.welcome = self._welcome(session.core_id, flags, hello.token, len(admission.regions), hnid)
        return admission

    def _own_context(self, who: Claimant, hello: wire.Hello, session: Session, hnid: int) -> Admission:
        """A context in the client's own process: a channel, and neither memory to map nor a userfaultfd."""
        if who.pid != session.pid:
            text = f"device: a context on {hello.device} is the session's own process"
            raise RequestError(errno.EPERM, text, "device")
        context_id, channel = self._core.context_channel(session.core_id, hnid, who.pid)
        context = Context(context_id, session, hnid, who.pid, who.on_end)
        try:
            self._sessions.open_context(session, context)
        except BaseException:
            os.close(channel)
            with contextlib.suppress(OSError):
                self._core.context_detach(context_id)
            raise
        admission = Admission(wire.Welcome(), close=lambda reason: self._sessions.end_context(context, reason))
        admission.keep = lambda told: self._sessions.note_context(context, told)
        admission.welcome_fds, admission.lent = [channel], {channel: channel}
        admission.welcome = self._welcome(session.core_id, wire.HAS_CHANNEL, hello.token, 0, hnid)
        return admission

    def _file(self, who: Claimant, hello: wire.Hello) -> Admission:
        """A file is opened by the client, never here: what may be read or written was decided when it did."""
        session = self._owned(who, hello)

        def map_file(file: wire.File, fd: int) -> bytes:
            try:
                region = self._core.map_file(
                    session.core_id, fd, file.offset, file.size, page_bytes=file.page_bytes, write=file.write,
                    private=file.private, fork=file.fork,
                )  # fmt: skip
            except OSError as error:
                number = error.errno or errno.EIO
                if number in (errno.ENOMEM, errno.EDQUOT):
                    raise as_request_error(error, "bytes: can't be held", "bytes") from None
                raise RequestError(number, f"fd: {error.strerror}", "fd") from None
            return wire.pack_region(region["va"], region["bytes"], region["offset"], 0, region["page_bytes"])

        return Admission(self._welcome(session.core_id, 0, hello.token, 0), map_file=map_file)

    def _cover(self, context_id: int, overlays: list[dict[str, Any]]) -> None:
        """What was lent to it is what it has mapped."""
        for region in overlays:
            with contextlib.suppress(OSError):  # unmapped meanwhile
                self._core.context_overlay(context_id, region["va"], region["bytes"])

    def _lend(self, admission: Admission, huge: int | None, small: int | None) -> int:
        """The flags of the descriptors that go with WELCOME, in the order of gmem_wire.h."""
        features = self._core.features()
        flags = wire.EVENT_FORK if features["event_fork"] else 0
        flags |= wire.HAS_CUDA if self._devices.any_makes_frames() else 0
        device = features["uffd_device_fd"] if features["uffd_device_fd"] >= 0 else None
        for flag, fd in ((wire.HAS_UFFD_DEV, device), (wire.HAS_HUGE, huge), (wire.HAS_SMALL, small)):
            if fd is not None:
                admission.welcome_fds.append(_duplicate(admission, fd))
                flags |= flag
        return flags

    def _lend_ring(self, admission: Admission, core_id: int) -> int:
        """A session without one can ask for everything over the control plane."""
        try:
            ring = self._core.session_ring(core_id)
        except OSError as error:
            log.warning("no ring for a session", session=core_id, error=str(error))
            return 0
        admission.welcome_fds += [_duplicate(admission, fd) for fd in ring]
        return wire.HAS_RING

    @staticmethod
    def _lend_regions(admission: Admission, regions: list[dict[str, Any]]) -> None:
        for region in regions:
            flags = _region_flags(region)
            message = wire.pack_region(region["va"], region["bytes"], region["offset"], flags, region["page_bytes"])
            admission.regions.append((message, _duplicate(admission, region["fd"])))

    def _welcome(self, session: int, flags: int, token: bytes, regions: int, hnid: int = 0) -> wire.Welcome:
        window = self._core.window()
        control, events = self._endpoints
        return wire.Welcome(
            flags=flags, session=session, window=(window["base"], window["bytes"]),
            huge=(window["huge_base"], window["huge_bytes"]), small=(window["small_base"], window["small_bytes"]),
            region_count=regions, hnid=hnid, token=token, control=control, events=events,
        )  # fmt: skip


def _region_flags(region: dict[str, Any]) -> int:
    flags = wire.REGION_HUGE if region["huge"] else 0
    return flags | (wire.REGION_READ_ONLY if region["read_only"] else 0)


def _duplicate(admission: Admission, fd: int) -> int:
    """Ours of one of the core's; regions share few files, so each is duplicated once."""
    if fd not in admission.lent:
        admission.lent[fd] = os.dup(fd)
    return admission.lent[fd]


@contextlib.contextmanager
def _giving(uffd: int, pidfd: int) -> Iterator[int]:
    """A duplicate of the pidfd to give away with the uffd: the core takes both in any case. Its refusal names uffd."""
    try:
        duplicate = os.dup(pidfd)
    except OSError:
        os.close(uffd)
        raise
    try:
        yield duplicate
    except OSError as error:
        raise as_request_error(error, "uffd: can't be attached", "uffd") from None
