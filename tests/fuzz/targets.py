# SPDX-License-Identifier: Apache-2.0
"""What gmemd reads from strangers, for a fuzzer: bytes in, and either an answer of the documented kind or a refusal.

usage: targets.py schema|handshake [libFuzzer's flags, CORPUS...], with atheris (libFuzzer for Python)."""

from __future__ import annotations

import errno
import sys
from types import FunctionType

from gmemd import schema, wire
from gmemd.errors import RequestError


def schema_target(data: bytes) -> None:
    """A request's bytes: decoded and checked, or refused with an errno and, of an argument, its name."""
    try:
        request = schema.decode(data)
    except schema.BadRequest as bad:
        refused(bad.error)
        schema.encode_error(bad.request_id, bad.error)
        return
    assert len(request.token) == wire.TOKEN_BYTES and 0 <= request.id < 1 << 64
    try:
        args = schema.check_args(request)
    except RequestError as error:
        refused(error)
        return
    for name in ("va", "dst", "src"):
        assert name not in args or 0 <= args[name] < 1 << 64
        if name in args and "bytes" in args:
            assert args[name] + args["bytes"] <= 1 << 64


def handshake_target(data: bytes) -> None:
    """Each message that a client sends: HELLO, and UFFD; and those that it reads."""
    for unpack in (wire.unpack_hello, wire.unpack_uffd, wire.unpack_welcome, wire.unpack_region, wire.unpack_ready):
        try:
            unpack(data)
        except RequestError as error:
            refused(error)


def refused(error: RequestError) -> None:
    assert error.errno in errno.errorcode and error.message


TARGETS = {"schema": schema_target, "handshake": handshake_target}


def main() -> None:
    import atheris

    target = TARGETS[sys.argv.pop(1)]
    for module in (schema, wire):
        for function in vars(module).values():
            if isinstance(function, FunctionType) and function.__module__ == module.__name__:
                atheris.instrument_func(function)
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
