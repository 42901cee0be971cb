# SPDX-License-Identifier: Apache-2.0
"""The device process: `python -m gmem._context FD`, started by Device.context(). It maps the session's addresses from
the device's memory, tells the daemon, and then runs kernels, one after the other, as they come over the pipe at FD."""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from typing import Any

from gmem._client import ffi, lib
from gmem._errors import from_errno
from gmem._launch import dumps, loads
from gmem._requests import Requests


def _end_with(parent: int) -> None:
    """A kernel may never end, but the client may: then so do we."""
    try:
        pidfd = os.pidfd_open(parent)
    except OSError:
        os._exit(1)

    def watch() -> None:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.poll()
        os._exit(1)

    threading.Thread(target=watch, name="gmem-parent", daemon=True).start()


def _attach(path: str, token: bytes, device: str) -> Any:
    link = ffi.new("struct gmem_link **")
    message = ffi.new("char[]", lib.GMEM_WIRE_MESSAGE_BYTES)
    err = lib.gmem_link_open_context(os.fsencode(path), token, device.encode(), link, message)
    if err:
        raise from_errno(-err, ffi.string(message).decode(errors="replace") or os.strerror(-err))
    return link[0]


def _portable(error: BaseException) -> bytes | None:
    """The exception as a pickle that the client can read back; None if it is not of that kind."""
    try:
        error.__traceback__ = None
        body, _ = dumps(error, [])
        loads(body)
    except Exception:
        return None
    return body


def _requests(link: Any) -> Requests:
    return Requests(
        lambda: ffi.string(lib.gmem_link_control(link)).decode(),
        lambda: bytes(ffi.buffer(lib.gmem_link_token(link), lib.GMEM_WIRE_TOKEN_BYTES)),
        lambda: lib.gmem_link_socket(link) < 0,
    )


def _map_pool(link: Any, address: int, nbytes: int) -> None:
    """A pool's file over our window, or with nbytes the window again. Without it, no kernel is to run."""
    err = lib.gmem_link_uncover(link, address, nbytes) if nbytes else lib.gmem_link_overlay(link, address)
    if err in (-errno.EINVAL, -errno.ENOENT):  # closed again meanwhile
        return
    if err:
        print(f"gmem: a pool can't be mapped at 0x{address:x}: {os.strerror(-err)}", file=sys.stderr)
        os._exit(1)


def _place(link: Any, what: tuple[str, int, int, int], ranges: list[tuple[int, int]]) -> tuple[Any, ...]:
    """Maps or unmaps what the client adopts, at its address."""
    word, va, nbytes, offset = what
    ranges[:] = [known for known in ranges if known[0] + known[1] <= va or va + nbytes <= known[0]]
    err = 0
    if word == "map":
        err = lib.gmem_link_map_beside(link, va, nbytes, offset)
        ranges += [] if err else [(va, nbytes)]
    else:
        lib.gmem_link_unmap(link, va, nbytes)
    return ("done", dumps(err, [])[0])


def _run(body: bytes, ranges: list[tuple[int, int]]) -> tuple[Any, ...]:
    try:
        fn, args, keywords = loads(body)
        value = fn(*args, **keywords)
        return ("done", dumps(value, ranges)[0])
    except BaseException as error:  # a kernel that calls sys.exit() must not end the context
        text = traceback.format_exc()
        return ("error", _portable(error), type(error).__name__, str(error), text)


def serve(channel: Connection) -> None:
    hello = channel.recv()
    _end_with(hello["parent"])
    sys.path[:] = hello["sys_path"]
    try:
        link = _attach(hello["path"], hello["token"], hello["device"])
    except Exception as error:
        channel.send(("refused", getattr(error, "errno", 0), str(error)))
        return
    window = (lib.gmem_link_window_base(link), lib.gmem_link_window_bytes(link))
    ranges = [window, *hello["adopted"]]
    channel.send(("ready", lib.gmem_link_hnid(link)))
    requests = _requests(link)
    while True:
        try:
            number, body, held, timeout = channel.recv()
        except (EOFError, OSError):
            return
        if not number:
            _map_pool(link, body, held)
            continue
        channel.send((number, "started"))
        # Ours besides the client's own: its threads may all be waiting for memory that this kernel holds.
        signal.setitimer(signal.ITIMER_REAL, timeout or 0)
        answer = _place(link, body, ranges) if isinstance(body, tuple) else _run(body, ranges)
        signal.setitimer(signal.ITIMER_REAL, 0)
        # Here and not in the client: its threads may be waiting for this memory, one of them with the interpreter lock.
        if held:
            requests.call("release", **held)
        channel.send((number, *answer))
        del body, answer


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is the client's to handle
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends a kernel whose time is over
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    serve(Connection(int(sys.argv[1])))
    os._exit(0)  # no finalisers: arrays of ours own nothing


if __name__ == "__main__":
    main()
