# SPDX-License-Identifier: Apache-2.0
"""`gmemctl trace record` and `gmemctl trace replay`. Nothing but cli.py imports this."""

from __future__ import annotations

import argparse
import json
import os
import stat
from collections.abc import Callable
from typing import Any, BinaryIO

from gmemd import misses, trace
from gmemd.config import ConfigError
from gmemd.control import Control, socket_path
from gmemd.schema import TRACE_BUFFER_BYTES, TRACE_BUFFER_MAX
from gmemd.sizes import format_size, parse_size
from gmemd.tracing import begin, record, signalled

EXIT_FAILURE = 1


class TraceFailure(Exception):
    """A sentence for people, and exit status 1."""


def add_parser(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True)

    def action(name: str, text: str) -> argparse.ArgumentParser:
        made = actions.add_parser(name, help=text, description=text)
        made.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")
        return made

    recording = action("record", "write down which pages are used, as gmemd sees it")
    recording.add_argument("-o", "--output", metavar="FILE", required=True)
    end = recording.add_mutually_exclusive_group(required=True)
    end.add_argument("--seconds", type=float, metavar="N", help="for so long; SIGINT and SIGTERM end it sooner")
    end.add_argument("--until-signal", action="store_true", help="until SIGINT (Ctrl-C) or SIGTERM")
    recording.add_argument("--session", type=int, metavar="ID", help="only what this session uses")
    recording.add_argument("--device", metavar="NAME", help="only what is used on it, or taken away from it; or host")
    recording.add_argument(
        "--buffer", metavar="SIZE", default=str(TRACE_BUFFER_BYTES), help="memory of gmemd's for what has not been "
        f"written yet; default: {format_size(TRACE_BUFFER_BYTES)}, at most {format_size(TRACE_BUFFER_MAX)}",
    )  # fmt: skip
    replaying = action("replay", "what policies would have made of it; needs no gmemd")
    replaying.add_argument("file", metavar="FILE")
    replaying.add_argument("--policy", metavar="NAME[,NAME...]", default="all", help="or all, the default")
    replaying.add_argument(
        "--capacity", metavar="SIZE|PERCENT[,...]", default=misses.DEFAULT_CAPACITIES,
        help="memory of the hnode, or a share of what would never evict; default: 25%%,50%%,75%%,100%%",
    )  # fmt: skip
    replaying.add_argument("--device", metavar="NAME", help="only this hnode's accesses; default: each one's")
    replaying.add_argument("--session", type=int, metavar="ID", default=0, help="only what this session used")
    replaying.add_argument(
        "--kinds", metavar="KIND[,KIND...]", default=",".join(misses.USES), help="what counts as a use; default: all"
    )
    replaying.add_argument("--png", metavar="FILE", help="draw miss-ratio curves (needs matplotlib)")
    replaying.add_argument("--salvage", action="store_true", help="read what is sound of a damaged trace")


def run(args: argparse.Namespace) -> int:
    """OSError: no gmemd, or the recording was refused."""
    from gmemd import show

    if args.action == "record":
        made, show_it = _record(args), show.recorded
    else:
        made, show_it = _replay(args), show.replayed
    if args.json:
        print(json.dumps(made, indent=2))
    else:
        show_it(made)
    return 0 if args.action == "replay" or made["complete"] else EXIT_FAILURE


def _parsed(option: str, parse: Callable[[str], Any], text: str) -> Any:
    try:
        return parse(text)
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from None


def _record(args: argparse.Namespace) -> dict[str, Any]:
    buffer_bytes = _parsed("--buffer", parse_size, args.buffer)
    if buffer_bytes > TRACE_BUFFER_MAX:
        raise ConfigError(f"--buffer: {args.buffer} is more than {format_size(TRACE_BUFFER_MAX)}")
    if args.seconds is not None and not args.seconds > 0:
        raise ConfigError(f"--seconds: {args.seconds} is not more than 0")
    with Control(socket_path(args.socket)) as control, signalled() as signal:

        def over(seconds: float) -> bool:
            return signal.is_set() or (args.seconds is not None and seconds >= args.seconds)

        with _output(args.output) as file:
            header = begin(control, session=args.session, device=args.device, buffer_bytes=buffer_bytes)
            try:
                if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    file.truncate(0)
                done = record(control, header, file, over)
            except OSError as error:
                raise TraceFailure(f"{args.output}: {error.strerror}; the trace is cut off there") from None
    return {
        "file": args.output, "records": done.records, "lost": done.lost, "seconds": done.seconds, "bytes": done.bytes,
        "complete": done.complete, "why": done.why,
    }  # fmt: skip


def _output(path: str) -> BinaryIO:
    """Open, and as it was: it is emptied when gmemd has begun."""
    try:
        return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666), "wb", buffering=0)
    except OSError as error:
        raise TraceFailure(f"{path}: {error.strerror}") from None


def _replay(args: argparse.Namespace) -> dict[str, Any]:
    policies = _parsed("--policy", misses.parse_policies, args.policy)
    capacities = _parsed("--capacity", misses.parse_capacities, args.capacity)
    kinds = _parsed("--kinds", misses.parse_kinds, args.kinds)
    try:
        recording = trace.read(args.file, args.salvage)
    except trace.TraceError as error:
        hint = "" if args.salvage or "block" not in error.what else "; --salvage replays what is sound of it"
        raise TraceFailure(f"{error}{hint}") from None
    except OSError as error:
        raise TraceFailure(f"{args.file}: {error.strerror}") from None
    try:
        made = misses.report(
            recording, policies=policies, capacities=capacities, device=args.device, kinds=kinds,
            session=args.session, with_curves=bool(args.png),
        )  # fmt: skip
    except ValueError as error:
        raise ConfigError(f"--device: {error}") from None
    made["file"] = args.file
    if args.png:
        _draw(made, args.png)
    return made


def _draw(made: dict[str, Any], path: str) -> None:
    try:
        misses.draw(made, path)
    except ImportError:
        raise TraceFailure("--png: matplotlib is missing; it comes with the extras demo and bench, as in "
                           "pip install 'gmem[demo]'") from None  # fmt: skip
    except OSError as error:
        raise TraceFailure(f"{path}: {error.strerror}") from None
