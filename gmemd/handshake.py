# SPDX-License-Identifier: Apache-2.0
"""The handshake server: connections, deadlines and limits around what admission.py grants.

One coroutine per connection, in the order of client/include/gmem_wire.h. Nothing here waits for a peer without a
deadline, and nothing that may wait runs on the loop: it goes to a FairPool, keyed by connection and owned by uid. A
connection that has become a session or a context stays open; its end, or the readiness of its process's pidfd, ends
what it stands for.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import functools
import os
import socket
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import structlog

from gmemd import wire
from gmemd.admission import Admission, Admissions, Claimant, Close
from gmemd.config import Limits
from gmemd.door import short_of_descriptors
from gmemd.errors import RequestError, as_request_error
from gmemd.keep import Keep
from gmemd.pool import FairPool, PoolClosed, QueueFull
from gmemd.sessions import SessionTable

log = structlog.get_logger("gmemd.handshake")

_BACKLOG = 256
_FDS_MAX = 4
_ACCEPT_BATCH = 16
_ACCEPT_PAUSE_S = 0.1
_UCRED = struct.Struct("iII")
_SO_PEERPIDFD = 77  # Linux 6.5
_SO_PEERGROUPS = 59


@dataclass(eq=False)
class Peer:
    """A connection: its socket, who is at the other end, and whether it is to end."""

    sock: socket.socket
    pid: int
    uid: int
    pidfd: int
    gids: tuple[int, ...] = ()
    answer: Callable[[wire.Ask], tuple[bytes, int]] | None = None
    answers_at_once: bool = False
    over: asyncio.Event = field(default_factory=asyncio.Event)
    reason: str = ""
    welcomed: bool = False
    kept_as: str = ""

    def end(self, reason: str) -> None:
        self.reason = self.reason or reason
        self.over.set()


def peer_of(sock: socket.socket) -> Peer:
    """Credentials as the kernel has them. The pidfd comes from the socket where the kernel has that, else by number:
    that may name a later process only if the one that connected is gone, and then its end of the socket is closed."""
    pid, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, 4)
        pidfd = int.from_bytes(raw, "little")
    except OSError:
        if pid <= 0:
            raise RequestError(errno.ESRCH, "the process is not visible in gmemd's pid namespace") from None
        pidfd = os.pidfd_open(pid)
    return Peer(sock, pid, uid, pidfd, gids=_groups(sock, gid))


def _groups(sock: socket.socket, gid: int) -> tuple[int, ...]:
    """Of the process that connected, as they were then; its own group first."""
    room = 4 * 65536  # NGROUPS_MAX
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, room)
    except OSError:  # before Linux 4.13
        raw = b""
    groups = array.array("I")
    groups.frombytes(raw)
    return (gid, *(group for group in groups if group != gid))


def receive(sock: socket.socket) -> tuple[bytes, list[int], int]:
    """One message, its descriptors (close-on-exec) and what of it was cut off: MSG_TRUNC, MSG_CTRUNC."""
    space = socket.CMSG_SPACE(_FDS_MAX * 4)
    data, ancillary, flags, _ = sock.recvmsg(wire.RECEIVE_BYTES, space, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, raw in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(raw[: len(raw) - len(raw) % fds.itemsize])
    return data, list(fds), flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


class HandshakeServer:
    """All on one loop; only what end_of() returns may be called from other threads."""

    def __init__(self, admissions: Admissions, limits: Limits, keep: Keep | None = None) -> None:
        self._admissions = admissions
        self._keep = keep
        self._limits = limits
        self._connections: Counter[int] = Counter()
        self._halfway: Counter[int] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        # per_owner below the number of threads: one user's slow processes leave threads for the others.
        self._pool = FairPool(8, per_key=1, per_owner=5, backlog=4, name="gmemd-handshake")
        self._teardown = FairPool(6, per_key=1, per_owner=4, backlog=4, name="gmemd-teardown")
        self._listener: socket.socket | None = None
        self._loop: asyncio.AbstractEventLoop

    @property
    def connections(self) -> int:
        return len(self._tasks)

    def start(self, listener: socket.socket) -> None:
        """Takes a bound SEQPACKET socket and listens on it."""
        listener.setblocking(False)
        listener.listen(_BACKLOG)
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(listener, self._accept)

    def take_over(self, sessions: SessionTable) -> None:
        """A predecessor's connections go on where they were; sessions and contexts without one end."""
        owners: dict[tuple[int, int], tuple[Any, Close]] = {
            (session.core_id, 0): (session, functools.partial(sessions.end, session)) for session in sessions.live()
        }
        for session in sessions.live():
            for context in sessions.contexts_of(session):
                owners[session.core_id, context.id] = (context, functools.partial(sessions.end_context, context))
        for session_id, context_id, sock in self._keep.connections() if self._keep else ():
            name = f"conn.{session_id}.{context_id}"
            try:
                peer = peer_of(sock)
                owner, close = owners.pop((session_id, context_id))
            except (OSError, KeyError):  # its process is gone, or it had not come far
                sock.close()
                self._forget(name)
                continue
            sock.setblocking(False)
            if not sessions.was_told(session_id, context_id):
                with contextlib.suppress(OSError):
                    sock.send(wire.pack_ready(), socket.MSG_NOSIGNAL)
            owner.on_end = self._end_of(peer)
            peer.kept_as = name
            self._connections[peer.uid] += 1
            task = self._loop.create_task(self._restored(peer, close))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        for _, close in owners.values():
            self._loop.run_in_executor(None, close, "its connection was lost")

    async def _restored(self, peer: Peer, close: Close) -> None:
        try:
            await self._until_over(peer)
        except asyncio.CancelledError:
            peer.reason = peer.reason or "gmemd is stopping"
        finally:
            await self._let_go(peer, close)

    def _forget(self, name: str) -> None:
        if self._keep is not None and name:
            self._keep.forget(name)

    async def _let_go(self, peer: Peer, close: Close | None) -> None:
        if close is not None:
            await self._tear_down(peer, close)
        self._forget(peer.kept_as)
        _decrement(self._connections, peer.uid)
        peer.sock.close()
        os.close(peer.pidfd)

    def refuse_new(self) -> None:
        """No more connections; those there are stay."""
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None

    async def stop(self) -> None:
        """Ends every connection. Sessions have been ended before: this only closes what is left."""
        self.refuse_new()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self._limits.stop_timeout_s)
        for pool in (self._pool, self._teardown):
            await asyncio.to_thread(pool.close, self._limits.stop_timeout_s)

    def _accept(self) -> None:
        for _ in range(_ACCEPT_BATCH):
            if self._listener is None:
                return
            try:
                sock, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionError):
                return
            except OSError as error:
                # Out of descriptors, most likely: the connection stays in the queue, so look away for a moment.
                log.warning("can't accept a connection", error=str(error))
                self._loop.remove_reader(self._listener)
                self._loop.call_later(_ACCEPT_PAUSE_S, self._resume_accept)
                return
            sock.setblocking(False)
            self._let_in(sock)

    def _resume_accept(self) -> None:
        if self._listener is not None:
            self._loop.add_reader(self._listener, self._accept)

    def _let_in(self, sock: socket.socket) -> None:
        try:
            peer = peer_of(sock)
        except OSError as error:
            _refuse(sock, as_request_error(error, "the process can't be identified"))
            sock.close()
            return
        excess = self._excess(peer.uid)
        if excess is not None:
            _refuse(sock, excess)
            os.close(peer.pidfd)
            sock.close()
            return
        self._connections[peer.uid] += 1
        self._halfway[peer.uid] += 1
        task = self._loop.create_task(self._connection(peer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _excess(self, uid: int) -> RequestError | None:
        if self._connections[uid] >= self._limits.connections_per_uid:
            return RequestError(errno.EDQUOT, f"uid {uid} has {self._connections[uid]} connections, which is the limit")
        if self._halfway[uid] >= self._limits.handshakes_per_uid:
            return RequestError(errno.EAGAIN, f"uid {uid} has too many unfinished handshakes")
        if short_of_descriptors():
            return RequestError(errno.EMFILE, "gmemd has too few descriptors left for another session")
        return None

    async def _connection(self, peer: Peer) -> None:
        close: Close | None = None
        try:
            try:
                close = await self._handshake(peer)
            finally:
                _decrement(self._halfway, peer.uid)
            if peer.answer is not None:
                await self._answer_asks(peer, peer.answer)
            else:
                await self._until_over(peer)
        except TimeoutError:
            log.info("handshake timed out", uid=peer.uid, pid=peer.pid)
            _refuse(peer.sock, RequestError(errno.ETIMEDOUT, "the handshake took too long"), peer.welcomed)
        except ConnectionError:
            log.debug("peer left during the handshake", uid=peer.uid, pid=peer.pid)
        except OSError as error:
            refusal = as_request_error(error, "the handshake failed")
            log.info("handshake refused", uid=peer.uid, pid=peer.pid, error=refusal.message)
            _refuse(peer.sock, refusal, peer.welcomed)
        except asyncio.CancelledError:
            peer.reason = peer.reason or "gmemd is stopping"
        except Exception:
            log.exception("unexpected failure in a handshake", uid=peer.uid, pid=peer.pid)
        finally:
            await self._let_go(peer, close)

    async def _handshake(self, peer: Peer) -> Close:
        """Through READY, or to WELCOME for ADMIN; what is to be called when the connection is over."""
        hello = wire.unpack_hello(await self._receive_hello(peer))
        claimant = Claimant(peer.uid, peer.pid, peer.pidfd, self._end_of(peer), peer.gids)
        admission: Admission = await self._in_pool(peer, self._admissions.admit, claimant, hello)
        try:
            await self._send(peer, wire.pack_welcome(admission.welcome), admission.welcome_fds)
            peer.welcomed = True
            peer.answer, peer.answers_at_once = admission.answer, admission.answers_at_once
            for message, fd in admission.regions:
                await self._send(peer, message, [fd])
            if admission.finish is not None:
                uffd = await self._receive_uffd(peer)
                admission.close = await self._in_pool(peer, admission.finish, uffd)
            if admission.map_file is not None:
                file, fd = await self._receive_file(peer)
                region = await self._in_pool(peer, admission.map_file, file, fd)
                await self._send(peer, wire.pack_ready(), [])
                await self._send(peer, region, [])
            elif admission.ready:
                agent = await self._in_pool(peer, admission.agent) if hello.wants_agent else None
                flags, fds = (0, []) if agent is None else (wire.HAS_AGENT, [agent])
                if admission.keep is not None:
                    peer.kept_as = await self._in_pool(peer, self._put_away, peer, admission)
                await self._send(peer, wire.pack_ready(flags=flags), fds)
                if admission.keep is not None:
                    await self._in_pool(peer, admission.keep, True)
        except BaseException:
            await self._tear_down(peer, admission.close)
            raise
        finally:
            admission.close_fds()
        kind, session = wire.KIND_NAMES[hello.kind], admission.welcome.session
        log.info("connected", kind=kind, uid=peer.uid, pid=peer.pid, session=session)
        return admission.close

    def _put_away(self, peer: Peer, admission: Admission) -> str:
        """(blocks) Before the client learns that it is in."""
        assert admission.keep is not None
        session_id, context_id = admission.keep(False)
        name = f"conn.{session_id}.{context_id}"
        if self._keep is not None:
            self._keep.hold(name, peer.sock.fileno())
        return name

    async def _answer_asks(self, peer: Peer, answer: Callable[[wire.Ask], tuple[bytes, int]]) -> None:
        """A connection for files, until it is hung up or its session has ended."""
        while True:
            await self._wait(peer.sock, None)
            data, fds, cut = receive(peer.sock)
            if fds:
                await self._discard(peer, fds)
            if not data:
                return
            try:
                if fds or cut:
                    raise RequestError(errno.EPROTO, "ASK is too long, or carries descriptors")
                ask = wire.unpack_ask(data)
                if peer.answers_at_once:
                    message, fd = answer(ask)
                else:
                    message, fd = await self._in_pool(peer, answer, ask)
            except OSError as error:
                refusal = as_request_error(error, "the file can't be had")
                await self._send(peer, wire.pack_answer(-(refusal.errno or errno.EIO), refusal.message), [])
                if refusal.errno in (errno.EPROTO, errno.EPROTONOSUPPORT, errno.EPERM):
                    return
                continue
            try:
                await self._send(peer, message, [fd] if fd >= 0 else [])
            finally:
                if fd >= 0:
                    os.close(fd)

    async def _receive_hello(self, peer: Peer) -> bytes:
        data, fds = await self._receive(peer)
        if fds:
            await self._discard(peer, fds)
            raise RequestError(errno.EPROTO, "HELLO carries descriptors")
        return data

    async def _receive_uffd(self, peer: Peer) -> int:
        data, fds = await self._receive(peer)
        try:
            wire.unpack_uffd(data)
            if len(fds) != 1:
                raise RequestError(errno.EBADF, f"uffd: UFFD carries {len(fds)} descriptors instead of one", "uffd")
            if not wire.is_userfaultfd(fds[0]):
                raise RequestError(errno.EBADF, "uffd: the descriptor is not a userfaultfd", "uffd")
        except BaseException:
            await self._discard(peer, fds)
            raise
        return fds[0]

    async def _receive_file(self, peer: Peer) -> tuple[wire.File, int]:
        data, fds = await self._receive(peer)
        try:
            file = wire.unpack_file(data)
            if len(fds) != 1:
                raise RequestError(errno.EBADF, f"fd: FILE carries {len(fds)} descriptors instead of one", "fd")
        except BaseException:
            await self._discard(peer, fds)
            raise
        return file, fds[0]

    async def _receive(self, peer: Peer) -> tuple[bytes, list[int]]:
        await self._wait(peer.sock, self._limits.handshake_timeout_s)
        data, fds, cut = receive(peer.sock)
        if cut or not data:
            await self._discard(peer, fds)
            if cut & socket.MSG_CTRUNC and len(fds) < _FDS_MAX and not cut & socket.MSG_TRUNC:
                raise RequestError(errno.EMFILE, "gmemd has no room for the descriptor that came with the message")
            if cut:
                raise RequestError(errno.EPROTO, "the message is too long, or carries too many descriptors")
            raise ConnectionResetError
        return data, fds

    async def _discard(self, peer: Peer, fds: list[int]) -> None:
        """Closes what a peer sent. Not on the loop: closing a file of a file system of theirs may take as long as they
        like, and then it is a thread of their share that waits."""
        if fds:
            with contextlib.suppress(QueueFull, PoolClosed):
                self._pool.submit(peer, peer.uid, lambda: _close_all(fds))

    async def _send(self, peer: Peer, message: bytes, fds: list[int]) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        while True:
            try:
                peer.sock.sendmsg([message], ancillary, socket.MSG_NOSIGNAL)
                return
            except BlockingIOError:
                await self._wait(peer.sock, self._limits.handshake_timeout_s, write=True)

    async def _wait(self, sock: socket.socket, timeout: float | None, write: bool = False) -> None:
        ready = self._loop.create_future()
        loop = self._loop
        add, remove = (loop.add_writer, loop.remove_writer) if write else (loop.add_reader, loop.remove_reader)
        add(sock, _set, ready)
        try:
            async with asyncio.timeout(timeout):
                await ready
        finally:
            remove(sock)

    async def _until_over(self, peer: Peer) -> None:
        """Until the peer hangs up or speaks out of turn, its process ends, or what it stands for has ended."""
        self._loop.add_reader(peer.sock, lambda: peer.end(_why_readable(peer.sock)))
        self._loop.add_reader(peer.pidfd, peer.end, "process ended")
        try:
            await peer.over.wait()
        finally:
            self._loop.remove_reader(peer.sock)
            self._loop.remove_reader(peer.pidfd)

    def _end_of(self, peer: Peer) -> Close:
        """Closes the connection, from any thread."""

        def on_end(reason: str) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and its connections with it
                self._loop.call_soon_threadsafe(peer.end, reason)

        return on_end

    async def _in_pool(self, peer: Peer, function: Callable[..., Any], *args: Any) -> Any:
        """Not cancelled half-way: what it opens must be known to whoever has to close it."""
        try:
            future = asyncio.wrap_future(self._pool.call(peer, peer.uid, function, *args))
        except (QueueFull, PoolClosed):
            raise RequestError(errno.EAGAIN, "gmemd is busy or stopping") from None
        cancelled = await _settle(future)
        try:
            result = future.result()
        except OSError as error:  # so that the core's ETIMEDOUT is not taken for a slow peer
            raise as_request_error(error, "the handshake failed") from None
        if cancelled:
            if isinstance(result, Admission):
                result.close_fds()
                result = result.close
            if callable(result):
                await self._tear_down(peer, result)
            raise asyncio.CancelledError
        return result

    async def _tear_down(self, peer: Peer, close: Close) -> None:
        """To its end even if this task is cancelled meanwhile."""
        with contextlib.suppress(PoolClosed):
            reason = peer.reason or "connection closed"
            await _settle(asyncio.wrap_future(self._teardown.call(peer, peer.uid, close, reason)))


async def _settle(future: asyncio.Future[Any]) -> bool:
    """Waits for a future through one cancellation, and says whether there was one; a second gives up."""
    try:
        await asyncio.wait([future])
        return False
    except asyncio.CancelledError:
        await asyncio.wait([future])
        return True


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _why_readable(sock: socket.socket) -> str:
    try:
        spoke = sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except OSError:
        spoke = b""
    return "message out of turn on the handshake connection" if spoke else "connection closed"


def _decrement(counter: Counter[int], key: int) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]


def _refuse(sock: socket.socket, error: RequestError, welcomed: bool = False) -> None:
    """Says why, if the socket takes it now; whoever does not read is not waited for."""
    status = -(error.errno or errno.EIO)
    if welcomed:
        message = wire.pack_ready(status, error.message)
    else:
        message = wire.pack_welcome(wire.Welcome(status=status, message=error.message))
    with contextlib.suppress(OSError):
        sock.send(message, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
        # Closed with something unread, a socket tells its peer ECONNRESET and not what is in the peer's queue.
        sock.shutdown(socket.SHUT_RD)
        while sock.recv(wire.RECEIVE_BYTES, socket.MSG_DONTWAIT):
            pass
