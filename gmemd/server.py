# SPDX-License-Identifier: Apache-2.0
"""The control plane's server: one thread owns the ROUTER socket, a FairPool does what may wait.

The ROUTER thread decodes small messages, answers ops that can't wait, and hands on the rest. Replies come back
through a queue and an eventfd, because a ZeroMQ socket belongs to one thread. So replies may overtake each other, and
clients match them by id.
"""

from __future__ import annotations

import collections
import ctypes
import errno
import os
import queue
import threading
import time
from collections.abc import Callable

import structlog
import zmq

from gmemd import schema
from gmemd.door import LOOK_MS, Door
from gmemd.errors import RequestError
from gmemd.ops import Operations
from gmemd.pool import FairPool, PoolClosed, QueueFull
from gmemd.sessions import Session, SessionTable

log = structlog.get_logger("gmemd.server")

# Longer messages are decoded by the pool: their length is chosen by the client, and so would be everybody's wait.
_INLINE_BYTES_MAX = 4096
_BATCH = 64
_DECODE_BACKLOG = 32
# What is longer is a question, and can be asked twice.
_ANSWERED_MAX, _ANSWERED_S, _ANSWER_BYTES_MAX = 4096, 2.0, 4096
Asked = tuple[bytes, int, int]  # the connection, the request's id, its hash
_LINGER_MS = 200
# Per connection. A client that does not read its replies loses those beyond this; gmemd does not wait. libzmq counts
# messages, of which the longest are half a MiB; so it gets few, and the others are counted in bytes.
_SEND_HWM = 16
_UNSENT_BYTES_MAX = 4 << 20
_RESEND_MS = 1
_RECEIVE_HWM = 64


def make_identities_random(context: zmq.Context) -> None:
    """A ROUTER numbers its connections from rand() on, which is the same in each process. libzmq ends the process when
    a peer has named itself what the next one is to be called, so that must not be guessed."""
    context.socket(zmq.PAIR).close()  # with its first socket, a context seeds rand() itself
    ctypes.CDLL(None).srand(ctypes.c_uint(int.from_bytes(os.urandom(4), "little")))


class Server:
    def __init__(
        self, context: zmq.Context, endpoint: str, sessions: SessionTable, operations: Operations, *, workers: int,
        requests_in_flight: int, admit: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._sessions = sessions
        self._operations = operations
        self._in_flight_max = requests_in_flight
        self._in_flight: dict[Session, int] = {}
        # Clients ask again, word for word, what is not answered soon: what is under way, and the last answers.
        self._under_way: set[Asked] = set()
        self._answered: collections.OrderedDict[Asked, tuple[float, bytes]] = collections.OrderedDict()
        self._lock = threading.Lock()
        # Four threads of sixteen for one session, and never all of them for one user.
        self._pool = FairPool(
            workers, per_key=max(1, workers // 4), per_owner=max(1, workers * 3 // 4),
            backlog=max(requests_in_flight, _DECODE_BACKLOG), name="gmemd-op",
        )  # fmt: skip
        self._replies: queue.SimpleQueue[tuple[bytes, bytes]] = queue.SimpleQueue()
        # Replies for which libzmq has no room now, by connection, and how many bytes they are.
        self._unsent: dict[bytes, collections.deque[bytes]] = {}
        self._unsent_bytes: collections.Counter[bytes] = collections.Counter()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopping = False
        self._stopped = False
        make_identities_random(context)
        self._socket = context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, _LINGER_MS)
        self._socket.setsockopt(zmq.MAXMSGSIZE, schema.MESSAGE_BYTES_MAX)
        self._socket.setsockopt(zmq.SNDHWM, _SEND_HWM)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # says that there is no room, instead of dropping
        self._socket.setsockopt(zmq.RCVHWM, _RECEIVE_HWM)
        self._door = Door(self._socket, endpoint, admit)
        self._thread = threading.Thread(target=self._run, name="gmemd-router", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """(blocks) Refuses what comes from now on, lets what runs finish, sends its replies."""
        if self._stopped:
            return
        deadline = time.monotonic() + timeout
        self._stopping = True
        if not self._pool.close(timeout):
            log.warning("some requests did not finish before the stop")
        self._stopped = True
        self._wake_up()
        if self._thread.ident is not None:
            self._thread.join(max(0.1, deadline - time.monotonic()))

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake, zmq.POLLIN)
        poller.register(self._door.monitor, zmq.POLLIN)
        try:
            while not self._stopped:
                ready = dict(poller.poll(_RESEND_MS if self._unsent else None if self._door.is_open else LOOK_MS))
                if self._door.monitor in ready or not self._door.is_open:
                    self._door.look()
                if self._wake in ready:
                    os.eventfd_read(self._wake)
                self._send_replies()
                if self._socket in ready:
                    self._receive_some()
            self._send_replies()
        except Exception:
            log.exception("the control plane has failed")
        finally:
            self._door.close()
            self._socket.close()
            with self._lock:  # a late worker must not write to whatever gets this number next
                os.close(self._wake)
                self._wake = -1

    def _send_replies(self) -> None:
        for identity in list(self._unsent):
            self._resend(identity)
        while True:
            try:
                identity, body = self._replies.get_nowait()
            except queue.Empty:
                return
            self._send(identity, body)

    def _send(self, identity: bytes, body: bytes) -> None:
        waiting = self._unsent.get(identity)
        if waiting is None and self._try_send(identity, body):
            return
        if self._unsent_bytes[identity] + len(body) > _UNSENT_BYTES_MAX:
            log.debug("a client does not read its replies: one is dropped")
            return
        self._unsent.setdefault(identity, collections.deque()).append(body)
        self._unsent_bytes[identity] += len(body)

    def _try_send(self, identity: bytes, body: bytes) -> bool:
        """False: there is no room. What can't be delivered at all counts as sent."""
        try:
            self._socket.send_multipart((identity, body), zmq.NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:  # EHOSTUNREACH: the client is gone
            log.debug("reply not sent", error=str(error))
        return True

    def _resend(self, identity: bytes) -> None:
        waiting = self._unsent[identity]
        while waiting and self._try_send(identity, waiting[0]):
            self._unsent_bytes[identity] -= len(waiting.popleft())
        if not waiting:
            del self._unsent[identity], self._unsent_bytes[identity]

    def _receive_some(self) -> None:
        """A bounded batch, so that replies are not kept waiting by a flood."""
        for _ in range(_BATCH):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._message(frames)

    def _message(self, frames: list[bytes]) -> None:
        identity = frames[0]
        if len(frames) != 2:
            error = RequestError(errno.EPROTO, f"a request is one frame, not {len(frames) - 1}")
            self._send(identity, schema.encode_error(0, error))
            return
        body = frames[1]
        if len(body) <= _INLINE_BYTES_MAX:
            reply = self._begin(identity, body)
            if reply is not None:
                self._send(identity, reply)
            return
        # Nobody has said who they are yet, so the connection is the key and strangers share one owner.
        if self._pool.load(identity) >= _DECODE_BACKLOG:
            error = RequestError(errno.EAGAIN, "too many long messages are waiting")
            self._send(identity, schema.encode_error(0, error))
            return
        self._submit(identity, 0, identity, "decode", lambda: self._begin_long(identity, body))

    def _begin_long(self, identity: bytes, body: bytes) -> None:
        reply = self._begin(identity, body)
        if reply is not None:
            self._reply(identity, reply)

    def _begin(self, identity: bytes, body: bytes) -> bytes | None:
        """Decodes, asks who it is, and answers or hands on; None if the reply comes later."""
        try:
            request = schema.decode(body)
        except schema.BadRequest as bad:
            return schema.encode_error(bad.request_id, bad.error)
        try:
            if self._stopping:
                raise RequestError(errno.ESHUTDOWN, "gmemd is stopping")
            session = self._sessions.by_token(request.token)
            self._operations.allow(session, request)
            if request.inline:
                return schema.encode_reply(request.id, self._operations.execute(session, request))
            asked = (identity, request.id, hash(body))
            known, answer = self._known(asked)
            if known:
                return answer
            self._enter(session, asked)
        except RequestError as error:
            return schema.encode_error(request.id, error)
        except Exception as error:
            return self._unexpected(request, error)
        self._submit(
            identity, request.id, session, session.uid, lambda: self._work(identity, session, request, asked),
            lambda: self._leave(session, asked, b""),
        )
        return None

    def _work(self, identity: bytes, session: Session, request: schema.Request, asked: Asked) -> None:
        body = b""
        try:
            body = schema.encode_reply(request.id, self._operations.execute(session, request))
        except RequestError as error:
            body = schema.encode_error(request.id, error)
        except Exception as error:
            body = self._unexpected(request, error)
        finally:
            self._leave(session, asked, body)
        self._reply(identity, body)

    def _submit(self, identity: bytes, request_id: int, key: object, owner: object, work, undo=None) -> None:
        try:
            self._pool.submit(key, owner, work)
            return
        except QueueFull:
            error = RequestError(errno.EAGAIN, "too many requests are waiting")
        except PoolClosed:
            error = RequestError(errno.ESHUTDOWN, "gmemd is stopping")
        if undo is not None:
            undo()
        self._reply(identity, schema.encode_error(request_id, error))

    def _known(self, asked: Asked) -> tuple[bool, bytes | None]:
        """Whether it is asked again; then the answer, None if that is still to come."""
        with self._lock:
            when, answer = self._answered.get(asked, (0.0, None))
            if answer is not None and time.monotonic() - when < _ANSWERED_S:
                return True, answer
            return asked in self._under_way, None

    def _enter(self, session: Session, asked: Asked) -> None:
        with self._lock:
            count = self._in_flight.get(session, 0)
            if count >= self._in_flight_max:
                raise RequestError(errno.EAGAIN, f"{count} requests of the session are in flight, which is the limit")
            self._in_flight[session] = count + 1
            self._under_way.add(asked)

    def _leave(self, session: Session, asked: Asked, answer: bytes) -> None:
        with self._lock:
            self._under_way.discard(asked)
            if 0 < len(answer) <= _ANSWER_BYTES_MAX:
                self._answered[asked] = time.monotonic(), answer
                self._answered.move_to_end(asked)
            if len(self._answered) > _ANSWERED_MAX:
                self._answered.popitem(last=False)
            count = self._in_flight[session] - 1
            if count:
                self._in_flight[session] = count
            else:
                del self._in_flight[session]

    @staticmethod
    def _unexpected(request: schema.Request, error: Exception) -> bytes:
        log.error("unexpected failure", op=request.name, exc_info=error)
        return schema.encode_error(
            request.id, RequestError(errno.EIO, f"{request.name}: internal error, see gmemd's log")
        )

    def _reply(self, identity: bytes, body: bytes) -> None:
        self._replies.put((identity, body))
        self._wake_up()

    def _wake_up(self) -> None:
        with self._lock:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)
