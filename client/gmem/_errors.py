# SPDX-License-Identifier: Apache-2.0
"""Errors of the client. Each has an errno; those about an argument name it."""

from __future__ import annotations

import errno as _errno
import os
from typing import Any


class GmemError(Exception):
    """errno: what went wrong, as in errno(3). argument: the name of the argument that is to blame, or None."""

    default_errno = _errno.EIO
    errno: Any  # an int; some subclasses are OSErrors as well, whose errno is wider

    def __init__(self, message: str, *, errno: int | None = None, argument: str | None = None) -> None:
        super().__init__(message)
        self.errno = self.default_errno if errno is None else errno
        self.argument = argument

    def __str__(self) -> str:
        return f"{super().__str__()} [{_errno.errorcode.get(self.errno, self.errno)}]"


class InvalidArgument(GmemError, ValueError):
    default_errno = _errno.EINVAL


class NotFound(GmemError, LookupError):
    default_errno = _errno.ENOENT


class OutOfMemory(GmemError, MemoryError):
    """Neither the host nor a device could hold it."""

    default_errno = _errno.ENOMEM


class QuotaExceeded(GmemError, MemoryError):
    """More than this session, or this user, may hold."""

    default_errno = _errno.EDQUOT


class Busy(GmemError):
    """In use just now: a device with open contexts, a page held by an acquire."""

    default_errno = _errno.EBUSY


class Exists(GmemError, FileExistsError):
    """The name is taken, or the range of addresses."""

    default_errno = _errno.EEXIST


class PermissionDenied(GmemError, PermissionError):
    default_errno = _errno.EPERM


class NotSupported(GmemError):
    default_errno = _errno.EOPNOTSUPP


class ConnectionLost(GmemError, ConnectionError):
    """gmemd is gone, or never was there."""

    default_errno = _errno.ENOTCONN


class Poisoned(GmemError):
    """The only copy of a page was lost with a device."""

    default_errno = _errno.EIO


class LeaseLost(GmemError):
    """Another machine may have published meanwhile; what this one was publishing is not to be seen."""

    default_errno = _errno.ECANCELED


class NotReplicated(GmemError):
    """Fewer replicas of a server than were asked for have confirmed what was written."""

    default_errno = _errno.ENODATA


class Unreachable(GmemError, TimeoutError):
    """No server has answered within the device's timeout."""

    default_errno = _errno.ETIMEDOUT


class KernelError(GmemError):
    """A kernel raised something that could not be sent back. remote_traceback: the traceback of the device process."""

    default_errno = _errno.EIO
    remote_traceback = ""


class ContextLost(GmemError):
    """The device process died: a crash in a kernel, a touch outside of managed memory, or a close with work left."""

    default_errno = _errno.ENODEV


class KernelTimeout(GmemError, TimeoutError):
    """A kernel ran longer than its timeout; its context has been ended."""

    default_errno = _errno.ETIME


class RemoteTraceback(Exception):
    """Cause of an exception that a kernel raised: where it was raised, in the device process."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


_BY_ERRNO: dict[int, type[GmemError]] = {
    _errno.EINVAL: InvalidArgument, _errno.EPROTO: InvalidArgument, _errno.ENOSYS: NotSupported,
    _errno.EOPNOTSUPP: NotSupported, _errno.ENOENT: NotFound, _errno.ENODEV: NotFound, _errno.ENOMEM: OutOfMemory,
    _errno.ENOSPC: OutOfMemory, _errno.EBUSY: Busy, _errno.EPERM: PermissionDenied, _errno.EACCES: PermissionDenied,
    _errno.ENOTCONN: ConnectionLost, _errno.ECONNREFUSED: ConnectionLost, _errno.ECONNRESET: ConnectionLost,
    _errno.ECANCELED: LeaseLost, _errno.ENODATA: NotReplicated, _errno.ETIMEDOUT: Unreachable,
    _errno.EIO: Poisoned, _errno.EDQUOT: QuotaExceeded, _errno.EEXIST: Exists,
}  # fmt: skip


def from_errno(number: int, message: str = "", argument: str | None = None) -> GmemError:
    return _BY_ERRNO.get(number, GmemError)(message or os.strerror(number), errno=number, argument=argument)
