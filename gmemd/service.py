# SPDX-License-Identifier: Apache-2.0
"""The daemon's life: core, devices, control plane, handshake; until a signal or, embedded, until its processes end.

Everything starts in that order and stops in the other. A stop brings every page home, so that clients which are still
there keep their memory, and leaves no file behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import structlog
import zmq

from gmemd import __version__
from gmemd.admission import Admissions
from gmemd.config import Config, check_runtime_dir, resolve_runtime_dir
from gmemd.devices import DeviceTable
from gmemd.drivers.registry import Registry
from gmemd.errors import RequestError
from gmemd.events import EventPump, Publisher
from gmemd.handshake import HandshakeServer
from gmemd.keep import Keep, state_version
from gmemd.ops import Operations
from gmemd.pools import PoolTable
from gmemd.server import Server
from gmemd.sessions import SessionTable
from gmemd.sharedpools import SharedPools
from gmemd.supervise import UPGRADE_STATUS
from gmemd.systemd import Notifier, passed_descriptors
from gmemd.watch import Watch

log = structlog.get_logger("gmemd.service")

HANDSHAKE, CONTROL, EVENTS = "gmemd.sock", "control.sock", "events.sock"
_IDLE_CHECK_S = 0.05
_REAP_S = 5.0
_DESCRIPTORS_LEAST = 64
_WAITERS = 4
_START_S = 10.0
_M_MMAP_THRESHOLD = -3  # of malloc.h
_LONG_BYTES = 64 << 10
_SUCCESSOR_S = 60.0
_UPGRADE_PAUSE_S = 0.1  # for the answer to whoever asked


class RuntimeDir:
    """The directory of the sockets, ours alone while we hold its lock. Whether it is private is said by its mode."""

    def __init__(self, path: Path, *, mode: int) -> None:
        self.path = path
        self._mode = mode
        self._ours = False
        self._fd = -1

    def open(self) -> None:
        with contextlib.suppress(FileExistsError):
            self.path.mkdir(0o700, parents=True)
            self._ours = True
            self.path.chmod(self._mode)
        check_runtime_dir(self.path)
        self._mode = self.path.stat().st_mode
        self._lock()
        for name in (CONTROL, EVENTS):  # what a killed predecessor left
            self.unlink(name)

    def _lock(self) -> None:
        self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._fd)
            self._fd = -1
            if error.errno != errno.EWOULDBLOCK:
                raise
            raise OSError(errno.EADDRINUSE, f"runtime_dir: another gmemd runs in {self.path}") from None

    def adopt(self) -> None:
        """A directory made for us by whoever started us is ours to remove as well."""
        self._ours = True

    def file(self, name: str) -> str:
        return str(self.path / name)

    def unlink(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            (self.path / name).unlink()

    def admit(self, name: str) -> None:
        """Who may connect: whoever may enter the directory, and then the handshake decides."""
        os.chmod(self.path / name, 0o666 if self._mode & stat.S_IXOTH else 0o600)

    def close(self) -> None:
        if self._fd < 0:
            return
        for name in (CONTROL, EVENTS):
            self.unlink(name)
        if self._ours:
            with contextlib.suppress(OSError):  # somebody else's files in it are theirs to remove
                self.path.rmdir()
        os.close(self._fd)
        self._fd = -1


def _listen(runtime: RuntimeDir, keep: Keep) -> tuple[socket.socket, bool]:
    """The handshake socket and whether it is ours to unlink: a predecessor's, the manager's, or a new one."""
    passed, activated = keep.listener()
    if passed is not None:
        return passed, not activated
    runtime.unlink(HANDSHAKE)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    sock.bind(runtime.file(HANDSHAKE))
    runtime.admit(HANDSHAKE)
    keep.hold("listen", sock.fileno())
    return sock, True


def _raise_file_limit() -> None:
    """Every session is some descriptors; the soft limit is meant for programs that use select(). OSError if there are
    not even those that gmemd itself needs: libzmq ends the process, or never ends, where it gets none."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard < _DESCRIPTORS_LEAST:
        why = f"{os.strerror(errno.EMFILE)}: RLIMIT_NOFILE allows {hard}, and gmemd needs {_DESCRIPTORS_LEAST}"
        raise OSError(errno.EMFILE, why)


def _give_memory_back() -> None:
    """Long replies are mappings of their own, and gone when they are sent: what a client made gmemd hold for a moment
    must not stay with it."""
    with contextlib.suppress(OSError, AttributeError):  # another C library has another way
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LONG_BYTES)


def make_core(config: Config, **kept: Any) -> Any:
    from gmemd._core import Core  # here, so that what needs no core can be used without it

    return Core(
        window_base=config.window_base, window_bytes=config.window_bytes, host_limit_bytes=config.host_limit_bytes,
        fault_threads=config.fault_threads, hugepages=config.hugepages, overcommit=config.overcommit,
        event_fork=config.event_fork, fault_ahead=config.fault_ahead, policy=config.policy,
        hold_s=config.hold_s, stuck_s=config.stuck_report_s, **kept,
    )  # fmt: skip


def _check_successor() -> None:
    """(blocks) That what is installed now can go on with what we leave. RequestError (EPROTO): it can't, or does not
    start."""
    command = [sys.executable, "-m", "gmemd", "state-version"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SUCCESSOR_S, stdin=subprocess.DEVNULL)
        found = done.stdout.strip() if not done.returncode else (done.stderr.strip().splitlines() or ["it failed"])[-1]
    except (OSError, subprocess.TimeoutExpired) as error:
        found = str(error)
    if found != state_version():
        why = f"its state version is {found[:120]!r}, this gmemd's {state_version()!r}; nothing was done"
        raise RequestError(errno.EPROTO, f"what is installed now can't take over: {why}")


class Service:
    """One daemon. run() is its life; ready_fd gets READY=1 when clients may come, or ERROR= and why not."""

    def __init__(
        self, config: Config, *, embedded: bool = False, ready_fd: int = -1, parent_fd: int = -1,
        core_factory: Callable[..., Any] = make_core,
    ) -> None:  # fmt: skip
        self._config = config
        self._embedded = embedded
        self._ready_fd = ready_fd
        self._parent_fd = parent_fd
        self._core_factory = core_factory
        self._stop = asyncio.Event()
        self._why = ""
        self._notifier = Notifier()
        self.keep = Keep(self._notifier, passed_descriptors())
        self.sessions: SessionTable
        self.devices: DeviceTable
        self.pools: PoolTable
        self.handshake: HandshakeServer
        self.runtime: RuntimeDir
        self.core: Any
        self._pump: EventPump | None = None
        self._in_charge = False

    def request_stop(self, why: str) -> None:
        self._why = self._why or why
        self._stop.set()

    async def run(self) -> None:
        """Until stopped. OSError and ConfigError say why it could not start."""
        _raise_file_limit()
        _give_memory_back()
        self._loop = asyncio.get_running_loop()
        self._loop.set_default_executor(_started(ThreadPoolExecutor(_WAITERS, "gmemd-wait"), _WAITERS))
        try:
            async with contextlib.AsyncExitStack() as stack:
                try:
                    await self._start(stack)
                except zmq.ZMQError as error:  # out of descriptors, most likely
                    raise OSError(error.errno, f"ZeroMQ: {error}") from None
                self._report_ready()
                await self._stop.wait()
                self._notifier.stopping(self._why)
                log.info("stopping", why=self._why)
        except OSError as error:
            self._tell(f"ERROR={error.strerror or error}\n")
            raise
        log.info("stopped")

    async def _start(self, stack: contextlib.AsyncExitStack) -> None:
        config = self._config
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            self._loop.add_signal_handler(number, self._on_signal, number)
        public = os.geteuid() == 0 and not self._embedded
        path = resolve_runtime_dir(config, self._embedded)
        self.runtime = runtime = RuntimeDir(path, mode=0o755 if public else 0o700)
        runtime.open()
        stack.callback(runtime.close)
        if self._embedded:
            runtime.adopt()
        self.core = self._core_factory(config, **self.keep.core_arguments())
        self._in_charge = not self.core.recovers()
        stack.callback(self._end_keep)
        stack.push_async_callback(self._close_core)
        zmq_context = zmq.Context(io_threads=1)
        stack.callback(zmq_context.term)
        control, events = f"ipc://{runtime.file(CONTROL)}", f"ipc://{runtime.file(EVENTS)}"
        publisher = Publisher(zmq_context, events, lambda: runtime.admit(EVENTS))
        stack.callback(publisher.close)
        publisher.start()
        drivers = Registry(self.core.driver_builtin)
        self.sessions = SessionTable(
            self.core, sessions_per_uid=config.limits.sessions_per_uid,
            contexts_per_session=config.limits.contexts_per_session, publish=publisher.publish, notes=self.keep.notes,
        )  # fmt: skip
        self.devices = DeviceTable(
            self.core, drivers, self.sessions, publisher.publish, config.quotas, notes=self.keep.notes
        )
        shared = SharedPools(self.core, self.devices, self.keep.notes)
        stack.push_async_callback(asyncio.to_thread, shared.stop)
        self.pools = PoolTable(
            self.core, self.sessions, pools_per_uid=config.limits.pools_per_uid, notes=self.keep.notes, shared=shared
        )
        self._watch = Watch(self.core, self.devices.name_of, config.stuck_limit_s)
        self._start_events(stack, publisher)
        self._warn_of_what_is_missing()
        if self.core.recovers():
            await asyncio.to_thread(self._take_over)
        else:
            for device in config.devices:
                await asyncio.to_thread(self.devices.attach, device.driver, device.name, device.config)
        operations = Operations(
            self.core, self.sessions, self.devices, drivers, self._watch, upgrade=self._upgrade,
            pools=self.pools,
        )
        await self._open_doors(stack, runtime, zmq_context, operations, publisher, control, events)
        tasks = [self._loop.create_task(self._housekeeping())]
        stack.callback(tasks[0].cancel)
        if self._embedded:
            tasks.append(self._loop.create_task(self._until_orphaned()))
            stack.callback(tasks[1].cancel)

    def _take_over(self) -> None:
        """(blocks) Goes on where a predecessor was killed: its devices, then every page, then its clients."""
        began = time.monotonic()
        self.devices.attach_again()
        self.core.resume()
        self._in_charge = True
        self.devices.set_again()
        self.sessions.restore()
        self.pools.restore()
        took = time.monotonic() - began
        log.info("took over", sessions=len(self.sessions), devices=self.devices.names(), seconds=round(took, 3))

    def _end_keep(self) -> None:
        """Nobody takes over from a daemon that has ended in order; but in place of one that could not, somebody may."""
        if self._in_charge:
            self.keep.end()

    def _upgrade(self) -> None:
        """Ends at once and as it is: whoever started us starts what is installed now, which takes over."""
        if not self.keep.max_fds:
            raise RequestError(errno.EOPNOTSUPP, "gmemd was not started with --supervised or by systemd's unit")
        _check_successor()

        def leave() -> None:
            os._exit(UPGRADE_STATUS)

        log.info("upgrade: leaving everything to the next gmemd")
        self._loop.call_soon_threadsafe(self._loop.call_later, _UPGRADE_PAUSE_S, leave)

    def _start_events(self, stack: contextlib.AsyncExitStack, publisher: Publisher) -> None:
        executor = _started(ThreadPoolExecutor(1, "gmemd-event"), 1)
        stack.callback(executor.shutdown, wait=False, cancel_futures=True)

        def defer(function: Callable[..., Any], *args: Any) -> None:
            executor.submit(function, *args).add_done_callback(_log_failure)

        self._pump = EventPump(self.core, self.sessions, self.devices, publisher.publish, defer, self._watch)
        self._pump.start()

    async def _close_core(self) -> None:
        """Any number of times. The pump first: the core's descriptor goes with the core."""
        if self._pump is not None:
            self._pump.stop()
        await asyncio.to_thread(self.core.close)

    async def _open_doors(
        self, stack: contextlib.AsyncExitStack, runtime: RuntimeDir, zmq_context: zmq.Context, operations: Operations,
        publisher: Publisher, control: str, events: str,
    ) -> None:  # fmt: skip
        """Control plane and handshake. On the way out: no new clients, the last replies, contexts and sessions go, the
        pages come home (the core's close), and only then do the connections close."""
        limits = self._config.limits
        server = Server(
            zmq_context, control, self.sessions, operations, workers=limits.workers,
            requests_in_flight=limits.requests_in_flight, admit=lambda: runtime.admit(CONTROL),
        )  # fmt: skip
        server.start()
        admissions = Admissions(
            self.core, self.sessions, self.devices, control=control, events=events, publish=publisher.publish
        )
        self.handshake = HandshakeServer(admissions, limits, self.keep)
        stack.push_async_callback(self.handshake.stop)
        stack.push_async_callback(self._close_core)
        stack.push_async_callback(asyncio.to_thread, self.sessions.release_all, "gmemd stopped")
        stack.push_async_callback(asyncio.to_thread, server.stop, limits.stop_timeout_s)
        listener, ours = _listen(runtime, self.keep)
        if ours:
            stack.callback(runtime.unlink, HANDSHAKE)
        self.handshake.start(listener)
        self.handshake.take_over(self.sessions)
        stack.callback(self.handshake.refuse_new)

    def _on_signal(self, number: int) -> None:
        # The terminal sends these to a whole group; an embedded daemon outlives the program's handling of them.
        if self._embedded and number in (signal.SIGINT, signal.SIGHUP):
            return
        self.request_stop(signal.Signals(number).name)

    def _report_ready(self) -> None:
        devices = ", ".join(self.devices.names()) or "none"
        log.info("ready", version=__version__, pid=os.getpid(), runtime_dir=str(self.runtime.path), devices=devices)
        self._notifier.ready(f"devices: {devices}")
        self._tell("READY=1\n")

    def _tell(self, text: str) -> None:
        """Once, to whoever started us."""
        if self._ready_fd < 0:
            return
        with contextlib.suppress(OSError):
            os.write(self._ready_fd, text.encode())
        os.close(self._ready_fd)
        self._ready_fd = -1

    def _warn_of_what_is_missing(self) -> None:
        features = self.core.features()
        if not features["uffd_device"]:
            lost = "clients make user-mode-only ones: system calls on memory that was never touched fail with EFAULT"
            log.warning(f"/dev/userfaultfd can't be opened; {lost}")
        if not features["poison"]:
            log.warning("this kernel (before 6.6) has no UFFDIO_POISON: lost pages block instead of giving SIGBUS")
        if not features["continue_wp"]:
            log.warning("this kernel (before 6.4) allows no read duplicates")
        log.info("features", **{name: value for name, value in features.items() if isinstance(value, bool)})

    async def _housekeeping(self) -> None:
        """The watchdog's pats and the core's reaping of children that nobody claimed."""
        interval = self._notifier.watchdog_interval_s
        next_reap = 0.0
        while True:
            if self._watch.healthy():
                self._notifier.watchdog()
            if self._loop.time() >= next_reap:
                next_reap = self._loop.time() + _REAP_S
                try:
                    await asyncio.to_thread(self.core.reap)
                except Exception:  # the signs of life must go on
                    log.exception("children that nobody claimed can't be looked for")
            await asyncio.sleep(min(interval, _REAP_S) if interval else _REAP_S)

    async def _until_orphaned(self) -> None:
        """An embedded daemon belongs to a process tree: it ends when whoever started it and the last session are gone.
        Forked children that were never claimed count, and so do handshakes that are under way."""
        with _parent_gone(self._loop, self._parent_fd) as gone:
            await gone.wait()
        quiet = 0
        while quiet < 2:
            await asyncio.sleep(_IDLE_CHECK_S)
            await asyncio.to_thread(self.core.reap)
            busy = len(self.sessions) or self.handshake.connections or self.core.stats()["sessions"]
            quiet = 0 if busy else quiet + 1
        self.request_stop("its process tree has ended")


@contextlib.contextmanager
def _parent_gone(loop: asyncio.AbstractEventLoop, parent_fd: int) -> Iterator[asyncio.Event]:
    """An event that is set when the starter is gone: end of file on its pipe, else its pidfd."""
    gone = asyncio.Event()
    fd = parent_fd
    if fd < 0:
        parent = os.getppid()
        try:
            fd = os.pidfd_open(parent)
        except OSError:
            gone.set()
        if parent == 1 or os.getppid() != parent:
            gone.set()
    if fd >= 0:
        loop.add_reader(fd, gone.set)
    try:
        yield gone
    finally:
        if fd >= 0:
            loop.remove_reader(fd)
            os.close(fd)


def _started(executor: ThreadPoolExecutor, threads: int) -> ThreadPoolExecutor:
    """With all its threads: later there may be none to be had."""
    together = threading.Barrier(threads)
    for future in [executor.submit(together.wait, _START_S) for _ in range(threads)]:
        future.result()
    return executor


def _log_failure(future: Any) -> None:
    if not future.cancelled() and future.exception() is not None:
        log.error("unexpected failure", exc_info=future.exception())
