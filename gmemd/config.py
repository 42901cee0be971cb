# SPDX-License-Identifier: Apache-2.0
"""Configuration: a TOML file, then the command line. Keys are known, typed and bounded; errors name key and file."""

from __future__ import annotations

import errno
import os
import re
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from gmemd.sizes import parse_size

LOG_LEVELS = ("debug", "info", "warning", "error")
POLICIES = ("acme", "s3fifo", "sieve", "clock", "lfu", "lru")  # of csrc/policy.c, the default first
SYSTEM_RUNTIME_DIR = Path("/run/gmem")
WINDOW_ALIGN = 4 << 20  # two parts, each of whole 2 MiB pages
# sun_path holds 107 bytes and the longest name in the directory is control.sock; the endpoint travels with "ipc://"
# in front of it in a field of 108 bytes.
RUNTIME_DIR_BYTES_MAX = 107 - len("ipc:///control.sock")
DEVICE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,30}")


class ConfigError(ValueError):
    """What is wrong, where."""


@dataclass(frozen=True)
class Device:
    name: str
    driver: str
    config: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Limits:
    """What one user may hold or keep busy. Times in seconds."""

    connections_per_uid: int = 1024
    handshakes_per_uid: int = 64
    sessions_per_uid: int = 256
    pools_per_uid: int = 128
    contexts_per_session: int = 64
    requests_in_flight: int = 1024
    workers: int = 16
    handshake_timeout_s: float = 10.0
    stop_timeout_s: float = 10.0


@dataclass(frozen=True)
class Config:
    runtime_dir: Path | None = None  # None: chosen by who runs it, see resolve_runtime_dir
    window_base: int = 0
    window_bytes: int = 0
    fault_threads: int = 0
    hugepages: bool = True
    overcommit: bool = False
    event_fork: bool = True
    policy: str = POLICIES[0]
    fault_ahead: bool = True
    log_level: str = "info"
    hold_s: float = 0.0005
    stuck_report_s: float = 5.0
    stuck_limit_s: float = 120.0
    host_limit_bytes: int = 0
    limits: Limits = Limits()
    quotas: dict[str, dict[str, int]] = field(default_factory=dict)  # "session" and "user": bytes by hnode name
    devices: tuple[Device, ...] = ()


Check = Callable[[Any], Any]


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _between(least: int, most: int) -> Check:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError(f"must be a whole number, {least} to {most}")
        return value

    return check


def _seconds(least: float, most: float) -> Check:
    def check(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
            raise ValueError(f"must be a number of seconds, {least} to {most}")
        return float(value)

    return check


def _size(value: Any) -> int:
    if not isinstance(value, (int, str)):
        raise ValueError('must be a size, for example 4096, "48M" or "1.5G"')
    return parse_size(value)


def _quota(value: Any) -> int:
    size = _size(value)
    if size < 2 << 20:
        raise ValueError("must be 2 MiB or more")
    return size


def _window_part(value: Any) -> int:
    size = _size(value)
    if size % WINDOW_ALIGN:
        raise ValueError("must be a multiple of 4 MiB")
    if size >= 1 << 47:
        raise ValueError("must be below 2^47")
    return size


def _one_of(*words: str) -> Check:
    def check(value: Any) -> str:
        if value not in words:
            raise ValueError(f"must be one of {', '.join(words)}")
        return value

    return check


def _directory(value: Any) -> Path:
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value:
        raise ValueError("must be an absolute path")
    if len(os.fsencode(value)) > RUNTIME_DIR_BYTES_MAX:
        raise ValueError(f"is too long: socket addresses leave {RUNTIME_DIR_BYTES_MAX} bytes for it")
    return Path(value)


_TABLES: dict[str, dict[str, tuple[str, Check]]] = {
    "daemon": {
        "runtime_dir": ("runtime_dir", _directory),
        "window_base": ("window_base", _window_part),
        "window_bytes": ("window_bytes", _window_part),
        "fault_threads": ("fault_threads", _between(0, 64)),
        "hugepages": ("hugepages", _boolean),
        "overcommit": ("overcommit", _boolean),
        "event_fork": ("event_fork", _boolean),
        "policy": ("policy", _one_of(*POLICIES)),
        "log_level": ("log_level", _one_of(*LOG_LEVELS)),
        "fault_ahead": ("fault_ahead", _boolean),
        "hold_s": ("hold_s", _seconds(0, 0.1)),
        "stuck_report_s": ("stuck_report_s", _seconds(0.5, 3600)),
        "stuck_limit_s": ("stuck_limit_s", _seconds(0, 86400)),
    },
    "host": {"limit": ("host_limit_bytes", _size)},
}
_QUOTAS = ("session", "user")
_LIMITS: dict[str, Check] = {
    "connections_per_uid": _between(1, 65536),
    "handshakes_per_uid": _between(1, 65536),
    "sessions_per_uid": _between(1, 65536),
    "pools_per_uid": _between(1, 65536),
    "contexts_per_session": _between(1, 1024),
    "requests_in_flight": _between(1, 65536),
    "workers": _between(2, 256),
    "handshake_timeout_s": _seconds(0.1, 600),
    "stop_timeout_s": _seconds(0.1, 600),
}
_SECTIONS = (*_TABLES, "limits", "quotas", "devices")


def load(path: Path | str) -> Config:
    """The configuration in a file; ConfigError names the file and the key."""
    try:
        with open(path, "rb") as file:
            tables = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None
    return parse(tables, str(path))


def parse(tables: Mapping[str, Any], source: str) -> Config:
    _known(tables, _SECTIONS, source, "section")
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ConfigError(f"{source}: [{name}]: must be a table")
    values: dict[str, Any] = {}
    for section, keys in _TABLES.items():
        table = tables.get(section, {})
        _known(table, keys, source, section)
        for key, value in table.items():
            attribute, check = keys[key]
            values[attribute] = _checked(check, value, source, section, key)
    limits = tables.get("limits", {})
    _known(limits, _LIMITS, source, "limits")
    values["limits"] = Limits(**{k: _checked(_LIMITS[k], v, source, "limits", k) for k, v in limits.items()})
    values["quotas"] = _quotas(tables.get("quotas", {}), source)
    values["devices"] = tuple(_device(name, table, source) for name, table in tables.get("devices", {}).items())
    return Config(**values)


def _quotas(table: Mapping[str, Any], source: str) -> dict[str, dict[str, int]]:
    """Bytes by hnode name, for each session and for each user. The names are of the host, and of devices that may be
    attached later."""
    _known(table, _QUOTAS, source, "quotas")
    quotas: dict[str, dict[str, int]] = {}
    for whose, sizes in table.items():
        if not isinstance(sizes, dict):
            raise ConfigError(f"{source}: [quotas.{whose}]: must be a table of sizes by hnode name")
        quotas[whose] = {}
        for name, size in sizes.items():
            if not DEVICE_NAME.fullmatch(name):
                raise ConfigError(f"{source}: quotas.{whose}.{name}: is no name of a device, nor host")
            quotas[whose][name] = _checked(_quota, size, source, f"quotas.{whose}", name)
    return quotas


def _known(table: Mapping[str, Any], keys: Iterable[str], source: str, section: str) -> None:
    for key in table:
        if key not in keys:
            where = "unknown section" if section == "section" else f"unknown key in [{section}]"
            raise ConfigError(f"{source}: {key}: {where}; known are {', '.join(sorted(keys))}")


def _checked(check: Check, value: Any, source: str, section: str, key: str) -> Any:
    try:
        return check(value)
    except ValueError as error:
        raise ConfigError(f"{source}: {section}.{key}: {error}") from None


def _device(name: str, table: Any, source: str) -> Device:
    where = f"{source}: devices.{name}"
    if not DEVICE_NAME.fullmatch(name) or name == "host":
        raise ConfigError(f"{where}: a device name is a letter, then at most 30 of A-Z a-z 0-9 _ . - and not 'host'")
    if not isinstance(table, dict):
        raise ConfigError(f"{where}: must be a table with at least a driver")
    driver = table.get("driver")
    if not isinstance(driver, str) or not driver:
        raise ConfigError(f'{where}.driver: must name a driver, for example "simgpu"')
    return Device(name, driver, {k: _option(v, f"{where}.{k}") for k, v in table.items() if k != "driver"})


def _option(value: Any, where: str) -> str:
    """Drivers get their options as text; which ones there are, and what they mean, is theirs to say."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (int, float, str)) and "\0" not in str(value):
        return str(value)
    if isinstance(value, list) and value and all(isinstance(item, str) and item for item in value):
        return ";".join(_option(item, where) for item in value)
    raise ConfigError(f"{where}: must be a string, a number, a boolean or a list of strings")


def parse_device(text: str) -> Device:
    """`name=simgpu0,driver=simgpu,capacity=48M` of the command line. `simgpu0:capacity=48M` is short for it: without
    a driver, the name without its number is the driver."""
    head, colon, rest = text.partition(":")
    if colon and "=" not in head and "," not in head:
        text = f"name={head},{rest}" if rest else f"name={head}"
    elif "=" not in text:
        text = f"name={text}"
    options: dict[str, str] = {}
    for pair in text.split(","):
        key, equals, value = pair.partition("=")
        if not equals or not key or not value:
            raise ConfigError(f"--device {text}: {pair!r} is not key=value")
        if key in options:
            raise ConfigError(f"--device {text}: {key} is given twice")
        options[key] = value
    name = options.pop("name", "")
    table = {"driver": options.pop("driver", name.rstrip("0123456789")), **options}
    return _device(name, table, "--device")


def parse_setting(text: str) -> tuple[str, str, Any]:
    """`daemon.event_fork=false` of the command line: section, key, value."""
    target, equals, raw = text.partition("=")
    section, dot, key = target.partition(".")
    if not equals or not dot or section not in (*_TABLES, "limits"):
        raise ConfigError(f"--set {text}: write SECTION.KEY=VALUE with a section of {', '.join((*_TABLES, 'limits'))}")
    try:
        value = tomllib.loads(f"x = {raw}")["x"]
    except tomllib.TOMLDecodeError:
        value = raw
    return section, key, value


def override(config: Config, settings: Iterable[str], devices: Iterable[str]) -> Config:
    """The configuration with `--set` and `--device` of the command line applied; a device of that name is replaced."""
    tables: dict[str, Any] = {}
    for text in settings:
        section, key, value = parse_setting(text)
        tables.setdefault(section, {})[key] = value
    given = parse(tables, "--set")
    values = {item.name: getattr(config, item.name) for item in fields(Config)}
    for section, keys in tables.items():
        if section == "limits":
            changed = {key: getattr(given.limits, key) for key in keys}
            values["limits"] = Limits(**{**vars(config.limits), **changed})
            continue
        for key in keys:
            attribute = _TABLES[section][key][0]
            values[attribute] = getattr(given, attribute)
    by_name = {device.name: device for device in config.devices}
    by_name.update((device.name, device) for device in map(parse_device, devices))
    values["devices"] = tuple(by_name.values())
    return Config(**values)


def resolve_runtime_dir(config: Config, embedded: bool) -> Path:
    """Where the sockets go when nothing was said: /run/gmem for root, the user's runtime directory for others, and a
    fresh directory for a daemon that belongs to one process tree."""
    if config.runtime_dir is not None:
        return config.runtime_dir
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    if embedded:
        if os.path.isdir(base):
            return Path(tempfile.mkdtemp(prefix=f"gmem-{os.getpid()}-", dir=base))
        return Path(tempfile.mkdtemp(prefix=f"gmem-{os.geteuid()}-", dir="/tmp"))
    if os.geteuid() == 0:
        return SYSTEM_RUNTIME_DIR
    return Path(base) / "gmem" if os.path.isdir(base) else Path(f"/tmp/gmem-{os.geteuid()}")


def check_runtime_dir(path: Path) -> None:
    """A directory that somebody else can write to would let them replace the sockets in it."""
    status = path.stat()
    if status.st_uid not in (0, os.geteuid()):
        raise OSError(errno.EPERM, f"runtime_dir: {path} belongs to uid {status.st_uid}")
    if status.st_mode & 0o022:
        raise OSError(errno.EPERM, f"runtime_dir: {path} can be written by others")
