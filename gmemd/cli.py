# SPDX-License-Identifier: Apache-2.0
"""The commands gmemd and gmemctl: arguments in, exit status out. Nothing imports this."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import errno
import fcntl
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from gmemd import __version__, cli_pools, cli_run, cli_trace
from gmemd.config import LOG_LEVELS, Config, ConfigError, load, override
from gmemd.control import Control, socket_path
from gmemd.errors import RequestError
from gmemd.sizes import parse_size

EXIT_FAILURE, EXIT_USAGE = 1, 2
# Bringing home what a large device holds takes as long as the link takes.
_DETACH_TIMEOUT_S = 3600.0
# A state of another version is waiting for code that knows it. Too many starts in a row, and systemd would give it up.
_OTHER_VERSION_PAUSE_S = 3.0
_UPGRADE_TIMEOUT_S = 60.0


def _parser(prog: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--version", action="version", version=f"{prog} {__version__}")
    return parser


# ---- gmemd ----


def gmemd_parser() -> argparse.ArgumentParser:
    parser = _parser("gmemd", "Keeps host and device memory as one pool behind one address space.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run the daemon in the foreground")
    run.add_argument("--config", metavar="FILE", help="TOML configuration")
    run.add_argument("--runtime-dir", metavar="DIR", help="where the sockets go")
    run.add_argument(
        "--device",
        metavar="name=N,driver=D,KEY=VALUE...",
        action="append",
        default=[],
        help="attach a device at start; simgpu0:capacity=48M is short for name=simgpu0,driver=simgpu,...",
    )
    run.add_argument(
        "--set",
        metavar="SECTION.KEY=VALUE",
        action="append",
        default=[],
        dest="settings",
        help="override the configuration, for example daemon.event_fork=false",
    )
    run.add_argument("--log-level", choices=LOG_LEVELS, help="default: info, embedded: warning")
    run.add_argument("--embedded", action="store_true", help="belong to one process tree and end with it")
    run.add_argument(
        "--supervised", action="store_true", help="with a small parent, so that nothing is lost when it is killed"
    )
    run.add_argument(
        "--watchdog", metavar="SECONDS", type=float, default=30.0, help="of --supervised: a daemon that says nothing "
        "for so long is ended and started again; default: 30, 0: never",
    )  # fmt: skip
    run.add_argument("--ready-fd", metavar="N", type=int, default=-1, help="write READY=1 here when clients may come")
    run.add_argument(
        "--parent-fd",
        metavar="N",
        type=int,
        default=-1,
        help="a pipe that the starter holds the other end of; its end of file means that they are gone",
    )
    commands.add_parser("state-version", help="print the version of what one gmemd leaves to the next")
    check = commands.add_parser("check-config", help="check a configuration file and print what it means")
    check.add_argument("file", metavar="FILE")
    check.add_argument("--json", action="store_true", help="print JSON")
    return parser


def config_of(args: argparse.Namespace) -> Config:
    """The configuration that `gmemd run` was given, file first."""
    settings = list(args.settings)
    if args.log_level:
        settings.append(f'daemon.log_level="{args.log_level}"')
    elif args.embedded and not args.config:
        settings.insert(0, 'daemon.log_level="warning"')
    config = override(load(args.config) if args.config else Config(), settings, args.device)
    if args.runtime_dir:
        runtime_dir = json.dumps(os.path.abspath(args.runtime_dir))
        config = override(config, [f"daemon.runtime_dir={runtime_dir}"], [])
    return config


def _supervise(args: argparse.Namespace) -> int:
    """The same command line without --supervised, its descriptors out of the way of those that are passed later."""
    from gmemd import supervise

    config_of(args)  # mistakes are told before anything is started
    command = [sys.executable, "-m", "gmemd", "run"]
    for flag, values in (("--config", [args.config]), ("--runtime-dir", [args.runtime_dir]),
                         ("--device", args.device), ("--set", args.settings),
                         ("--log-level", [args.log_level])):  # fmt: skip
        command += [part for value in values if value for part in (flag, value)]
    command += ["--embedded"] if args.embedded else []
    if args.parent_fd >= 0:
        command += ["--parent-fd", str(_out_of_the_way(args.parent_fd))]
    ready_fd = _out_of_the_way(args.ready_fd) if args.ready_fd >= 0 else -1
    return supervise.run(command, watchdog_s=args.watchdog, ready_fd=ready_fd)


def _out_of_the_way(fd: int) -> int:
    from gmemd.supervise import HELD_MAX

    moved = fcntl.fcntl(fd, fcntl.F_DUPFD, HELD_MAX + 64)
    os.close(fd)
    return moved


def _run(args: argparse.Namespace) -> int:
    if args.supervised:
        return _supervise(args)
    from gmemd import log
    from gmemd.service import Service

    config = config_of(args)
    log.configure(config.log_level)
    service = Service(config, embedded=args.embedded, ready_fd=args.ready_fd, parent_fd=args.parent_fd)
    asyncio.run(service.run())
    return 0


def _state_version(args: argparse.Namespace) -> int:
    from gmemd.keep import state_version

    print(state_version())
    return 0


def _check_config(args: argparse.Namespace) -> int:
    config = load(args.file)
    if args.json:
        print(json.dumps(dataclasses.asdict(config), default=str, indent=2))
        return 0
    print(f"{args.file}: ok")
    for item in dataclasses.fields(Config):
        if item.name not in ("devices", "limits"):
            print(f"  {item.name} = {getattr(config, item.name)}")
    for name, value in dataclasses.asdict(config.limits).items():
        print(f"  limits.{name} = {value}")
    for device in config.devices:
        options = " ".join(f"{key}={value}" for key, value in device.config.items())
        print(f"  device {device.name}: driver={device.driver} {options}".rstrip())
    return 0


def main_gmemd(argv: Sequence[str] | None = None) -> int:
    args = gmemd_parser().parse_args(argv)
    try:
        return {"run": _run, "check-config": _check_config, "state-version": _state_version}[args.command](args)
    except ConfigError as error:
        print(f"gmemd: {error}", file=sys.stderr)
        return EXIT_USAGE
    except OSError as error:
        print(f"gmemd: {error.strerror or error}", file=sys.stderr, flush=True)
        if error.errno == errno.EPROTO:
            time.sleep(_OTHER_VERSION_PAUSE_S)
        return EXIT_FAILURE


# ---- gmemctl ----


def gmemctl_parser() -> argparse.ArgumentParser:
    parser = _parser("gmemctl", "Looks at a running gmemd and changes its devices.")
    parser.add_argument("--socket", metavar="PATH", help="its gmemd.sock; default: $GMEM_SOCKET, /run/gmem/gmemd.sock")
    _json_option(parser, False)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text)
        _json_option(made, argparse.SUPPRESS)
        return made

    command("status", "one look at everything")
    command("devices", "hnodes, their memory and their counters")
    attach = command("attach", "attach a device")
    attach.add_argument("driver", help="a driver of `gmemctl drivers`, or module:Class")
    attach.add_argument("name", help="what to call the device, for example simgpu0")
    attach.add_argument(
        "options", metavar="KEY=VALUE", nargs="*", help="options of the driver, for example capacity=48M"
    )
    detach = command("detach", "bring every page of a device home and detach it")
    detach.add_argument("name")
    detach.add_argument("--force", action="store_true", help="end the contexts that are open on it")
    limit = command("limit", "how much of an hnode's capacity may be used, from now on")
    limit.add_argument("name", help="host, or a device")
    limit.add_argument("size", help="for example 2G")
    quota = command("quota", "how much of an hnode a session or a user may hold")
    quota.add_argument("name", help="host, or a device")
    quota.add_argument("size", help="for example 512M; 0: no quota")
    whose = quota.add_mutually_exclusive_group(required=True)
    whose.add_argument("--session", type=int, metavar="ID")
    whose.add_argument("--uid", type=int, metavar="UID")
    command("upgrade", "start gmemd again on what is installed now; clients go on and lose nothing")
    command("drivers", "drivers that can be attached")
    command("sessions", "client processes")
    pools = command("pools", "named memory that several processes share")
    pools.add_argument("--unlink", metavar="NAME", help="end a pool: nobody can open it any more")
    pools.add_argument("--remote", metavar="DEVICE", help="those that are published on the servers of a remote tier")
    cli_pools.add_parser(pools)
    command("stats", "counters")
    regions = command("map", "mapped regions")
    regions.add_argument("--session", type=int, metavar="ID", help="only of this session")
    regions.add_argument("--limit", type=int, default=4096, help="at most so many regions (default 4096)")
    cli_run.add_parser(command("run", "run an unmodified program on managed memory"))
    cli_trace.add_parser(command("trace", "record which pages are used, and replay that with other policies"))
    top = command("top", "devices and sessions, refreshed")
    top.add_argument("--interval", type=float, default=1.0, metavar="SECONDS")
    top.add_argument("--count", type=int, default=0, metavar="N", help="stop after N looks (default: on Ctrl-C)")
    return parser


def _json_option(parser: argparse.ArgumentParser, default: Any) -> None:
    parser.add_argument("--json", action="store_true", default=default, help="print JSON")


def _attach(control: Control, args: argparse.Namespace) -> dict[str, Any]:
    options = {}
    for pair in args.options:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"{pair!r} is not KEY=VALUE")
        options[key] = value
    return control.request("attach", 60.0, driver=args.driver, name=args.name, config=options)


def _detach(control: Control, args: argparse.Namespace) -> dict[str, Any]:
    return control.request("detach", _DETACH_TIMEOUT_S, name=args.name, force=args.force)


def _bytes(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise ConfigError(f"size: {error}") from None


def _limit(control: Control, args: argparse.Namespace) -> dict[str, Any]:
    return control.request("limit", _DETACH_TIMEOUT_S, name=args.name, bytes=_bytes(args.size))


def _quota(control: Control, args: argparse.Namespace) -> dict[str, Any]:
    whose = {"session": args.session} if args.uid is None else {"uid": args.uid}
    return control.request("quota", _DETACH_TIMEOUT_S, name=args.name, bytes=_bytes(args.size), **whose)


def _upgrade(control: Control, args: argparse.Namespace) -> dict[str, Any]:
    """Until the new one answers."""
    before = control.request("ping")["pid"]
    control.request("upgrade")
    until = time.monotonic() + _UPGRADE_TIMEOUT_S
    while True:
        try:
            with Control(socket_path(args.socket)) as again:
                now = again.request("ping")
            if now["pid"] != before:
                return now
            last: OSError = RequestError(errno.ETIMEDOUT, "the old gmemd still answers")
        except OSError as error:
            last = error
        if time.monotonic() > until:
            raise last
        time.sleep(0.05)


def _status(control: Control, args: argparse.Namespace) -> dict[str, Any]:
    return {
        **control.request("ping"),
        **control.request("stats"),
        **control.request("sessions"),
    }


def _sessions(control: Control, args: argparse.Namespace) -> dict[str, Any]:
    return {**control.request("sessions"), "hnodes": control.request("devices")["devices"]}


def _pools(control: Control, args: argparse.Namespace) -> dict[str, Any]:
    remote = {} if args.remote is None else {"remote": args.remote}
    if args.unlink is not None:
        return control.request("pool_unlink", name=args.unlink, **remote)
    return {**control.request("pools", **remote), "hnodes": control.request("devices")["devices"]}


def _map(control: Control, args: argparse.Namespace) -> dict[str, Any]:
    wanted = {} if args.session is None else {"session": args.session}
    return control.request("map", limit=args.limit, **wanted)


_COMMANDS: dict[str, Callable[[Control, argparse.Namespace], dict[str, Any]]] = {
    "status": _status,
    "devices": lambda control, args: control.request("devices"),
    "attach": _attach,
    "detach": _detach,
    "limit": _limit,
    "quota": _quota,
    "upgrade": _upgrade,
    "drivers": lambda control, args: control.request("drivers"),
    "sessions": _sessions,
    "pools": _pools,
    "stats": lambda control, args: control.request("stats"),
    "map": _map,
}


def _top(control: Control, args: argparse.Namespace) -> int:
    from gmemd import show

    looks = 0
    with show.screen(args.json) as draw:
        while True:
            draw(_status(control, args))
            looks += 1
            if args.count and looks >= args.count:
                return 0
            time.sleep(max(0.05, args.interval))


def _gmemctl(args: argparse.Namespace) -> int:
    if args.command == "trace":
        return cli_trace.run(args)
    if args.command == "run":
        return cli_run.run(args)
    if args.command == "pools" and args.action == "simulate":
        return cli_pools.run(args)
    path = socket_path(args.socket)
    with Control(path) as control:
        if args.command == "top":
            return _top(control, args)
        reply = _COMMANDS[args.command](control, args)
    if args.json:
        print(json.dumps(reply, indent=2))
        return 0
    from gmemd import show

    show.SHOW[args.command](reply, args)
    return 0


def main_gmemctl(argv: Sequence[str] | None = None) -> int:
    args = gmemctl_parser().parse_args(argv)
    try:
        return _gmemctl(args)
    except ConfigError as error:
        print(f"gmemctl: {error}", file=sys.stderr)
        return EXIT_USAGE
    except cli_trace.TraceFailure as error:
        print(f"gmemctl: {error}", file=sys.stderr)
    except RequestError as error:
        print(f"gmemctl: {error.message} ({error.code})", file=sys.stderr)
    except (FileNotFoundError, ConnectionRefusedError, PermissionError) as error:
        print(f"gmemctl: no gmemd at {socket_path(args.socket)}: {error.strerror}", file=sys.stderr)
    except OSError as error:
        print(f"gmemctl: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return EXIT_FAILURE
