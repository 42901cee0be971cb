# SPDX-License-Identifier: Apache-2.0
"""`gmemctl pools simulate`. Nothing but cli.py imports this."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from gmemd.config import ConfigError
from gmemd.policy import POLICIES
from gmemd.sizes import parse_size

_MEMORIES = "64G,256G,1T"
_EXPONENTS = "0.8,1.0,1.2"


def add_parser(parser: argparse.ArgumentParser) -> None:
    """Of `pools`, which does without an action as well."""
    actions = parser.add_subparsers(dest="action")
    text = "what pools do on many machines: misses by the policy's own code, traffic, fail-over; needs no gmemd"
    made = actions.add_parser("simulate", help=text, description=text)
    made.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")

    def option(name: str, default: Any, text: str, metavar: str = "N") -> None:
        made.add_argument(name, metavar=metavar, default=str(default), help=f"{text}; default: {default}")

    option("--machines", 1000, "that read the pool")
    option("--pool", "100T", "all of it", "SIZE")
    option("--memory", _MEMORIES, "of a machine, for pages of it: the hot set", "SIZE[,...]")
    option("--zipf", _EXPONENTS, "exponents of how pages are used: 0 is evenly", "S[,...]")
    option("--page", "64K", "size of a page", "SIZE")
    option("--shards", 500, "primaries of the cluster")
    option("--replicas", 1, "of each")
    option("--touches", 20_000, "a second, by a machine, of pages")
    option("--threads", 64, "of a machine, that touch them")
    option("--link", 25.0, "of each machine and server, Gbit/s", "GBIT")
    option("--failover", 10.0, "until a replica has taken over", "SECONDS")
    made.add_argument("--policy", choices=POLICIES, default=POLICIES[0], help=f"default: {POLICIES[0]}")
    option("--visible", 1.0, "share of hits that the policy hears of, 0 to 1")
    option("--runs", 4, "with other references, 2 to 8, for the error")
    option("--seed", 1, "of what is drawn")


def _parsed(args: argparse.Namespace, name: str, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(getattr(args, name))
    except ValueError as error:
        raise ConfigError(f"--{name}: {error}") from None


def _between(parse: Callable[[str], Any], least: float, most: float) -> Callable[[str], Any]:
    def check(text: str) -> Any:
        value = parse(text)
        if not least <= value <= most:
            raise ValueError(f"{text} is out of range: {least:g} to {most:g}")
        return value

    return check


def _list(parse: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [parse(part.strip()) for part in text.split(",")]


def run(args: argparse.Namespace) -> int:
    from gmemd import poolsim, show

    page = _parsed(args, "page", _between(parse_size, 4096, 2 << 20))
    scenario = poolsim.Scenario(
        machines=_parsed(args, "machines", _between(int, 1, 1_000_000)),
        pool_bytes=_parsed(args, "pool", _between(parse_size, 2 * page, 1 << 60)), page_bytes=page,
        shards=_parsed(args, "shards", _between(int, 1, poolsim.SLOTS)),
        replicas=_parsed(args, "replicas", _between(int, 0, 8)),
        touches_per_s=_parsed(args, "touches", _between(float, 1e-3, 1e9)),
        threads=_parsed(args, "threads", _between(int, 1, 65536)),
        link_bytes_per_s=_parsed(args, "link", _between(float, 1e-3, 1e5)) * 1e9 / 8,
        failover_s=_parsed(args, "failover", _between(float, 0, 3600)), policy=args.policy,
        visible=_parsed(args, "visible", _between(float, 0, 1)), seed=_parsed(args, "seed", _between(int, 0, 1 << 31)),
    )  # fmt: skip
    memories = _parsed(args, "memory", _list(_between(parse_size, page, 1 << 60)))
    exponents = _parsed(args, "zipf", _list(_between(float, 0, 5)))
    made = poolsim.simulate(scenario, memories, exponents, _parsed(args, "runs", _between(int, 2, 8)))
    if args.json:
        print(json.dumps(made, indent=2))
    else:
        show.simulated(made)
    return 0
