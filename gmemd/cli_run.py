# SPDX-License-Identifier: Apache-2.0
"""`gmemctl run`: its arguments."""

from __future__ import annotations

import os
from typing import Any

from gmemd import program
from gmemd.config import ConfigError
from gmemd.private import Tier
from gmemd.program import Settings
from gmemd.sizes import format_size, parse_size

LIMIT_MIN, LIMIT_PAGES_MIN = 1 << 20, 16  # below, an instruction waits for what the one before has just sent away
PAGE_SIZES = {"4K": 4096, "64K": 65536, "2M": 2 << 20}


def run(args: Any) -> int:
    return program.run(settings_of(args))


def parse_tier(text: str) -> Tier:
    """zstd, zstd:level=3,capacity=1G, file:PATH, file:PATH,capacity=8G. ConfigError says what is wrong."""
    driver, _, rest = text.partition(":")
    if driver not in ("zstd", "file"):
        raise ConfigError(f"--tier: {text!r} is neither zstd nor file:PATH")
    words = rest.split(",") if rest else []
    options: dict[str, str] = {}
    if driver == "file":
        if not words or not words[0]:
            raise ConfigError("--tier: file needs a path, for example file:/var/tmp")
        options["path"] = os.path.abspath(words.pop(0))
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"--tier: {word!r} is not KEY=VALUE")
        options[key] = value
    return Tier(driver, options)


def settings_of(args: Any) -> Settings:
    """From gmemctl's arguments; ConfigError names the one that is wrong."""
    argv = args.argv[1:] if args.argv[:1] == ["--"] else args.argv
    if not argv:
        raise ConfigError("run: which program? For example: gmemctl run --limit 2G -- python3 program.py")
    limit, mmap_bytes = _size("--limit", args.limit), _size("--mmap-threshold", args.mmap_threshold)
    page_bytes = PAGE_SIZES[args.page_size]
    least = max(LIMIT_MIN, LIMIT_PAGES_MIN * page_bytes)
    if args.limit is not None and limit < least:
        raise ConfigError(f"--limit: {args.limit} is too little to run in: at least {format_size(least)}")
    if mmap_bytes < 4096:
        raise ConfigError("--mmap-threshold: must be 4096 or more")
    if args.socket and (args.limit or args.tier):
        raise ConfigError("--limit, --tier: are a private gmemd's; at --socket `gmemctl quota` bounds a program")
    tiers = tuple(parse_tier(text) for text in args.tier)
    return Settings(
        argv=argv, limit_bytes=limit, tiers=tiers or ((Tier("zstd", {}),) if limit else ()),
        page_bytes=page_bytes, mmap_bytes=mmap_bytes, required=args.require, quiet=args.quiet,
        json=args.json, output=args.output, socket=args.socket,
    )  # fmt: skip


def _size(name: str, text: str | None) -> int:
    try:
        return parse_size(text) if text is not None else 0
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from None


def add_parser(parser: Any) -> None:
    parser.add_argument(
        "--limit", metavar="SIZE", help="host memory for the program's pages, for example 2G; default: the machine's"
    )
    parser.add_argument(
        "--tier", metavar="zstd|file:PATH", action="append", default=[],
        help="where to what does not fit, with the driver's options: zstd:level=3, file:/var/tmp,capacity=8G; "
        "several: in this order. Default with --limit: zstd",
    )  # fmt: skip
    parser.add_argument(
        "--page-size", choices=PAGE_SIZES, default="64K", help="of the heap: what moves at once; default: 64K"
    )
    parser.add_argument(
        "--mmap-threshold", metavar="SIZE", default="1M", help="smaller mappings stay plain; default: 1M"
    )
    parser.add_argument("--require", action="store_true", help="fail where else plain memory would be used")
    parser.add_argument("--quiet", action="store_true", help="say nothing but errors")
    parser.add_argument("--output", metavar="FILE", help="write the statistics there, as JSON")
    parser.add_argument("argv", metavar="-- CMD ARGS", nargs="...")
