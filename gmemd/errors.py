# SPDX-License-Identifier: Apache-2.0
"""The one error that crosses to clients: an errno, a sentence for people and, where there is one, the argument."""

from __future__ import annotations

import errno
import os

# Numbers with two names: which one Python lists is an accident of its build.
_PREFERRED = {errno.EAGAIN: "EAGAIN", errno.EOPNOTSUPP: "EOPNOTSUPP", errno.EDEADLK: "EDEADLK"}


class RequestError(OSError):
    """Refusal of a request or of a handshake; `argument` names what was wrong with it."""

    def __init__(self, number: int, message: str, argument: str | None = None) -> None:
        super().__init__(number, message)
        self.message = message
        self.argument = argument

    @property
    def code(self) -> str:
        return errno_name(self.errno or errno.EIO)


def errno_name(number: int) -> str:
    """`EINVAL` for 22; `EIO` for a number the system does not know."""
    return _PREFERRED.get(number) or errno.errorcode.get(number, "EIO")


def refuse(option: str, why: str, number: int = errno.EINVAL) -> RequestError:
    """Of an option of a device's; to be raised."""
    return RequestError(number, f"{option}: {why}", "config")


def as_request_error(error: OSError, what: str, argument: str | None = None) -> RequestError:
    """An OSError of the core as a refusal; its own message is kept when it says more than the errno does."""
    if isinstance(error, RequestError):
        return error
    number = error.errno or errno.EIO
    text = error.strerror or ""
    if not text or text == os.strerror(number):
        text = f"{what}: {os.strerror(number).lower()}"
    return RequestError(number, text, argument)
