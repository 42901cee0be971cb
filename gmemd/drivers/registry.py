# SPDX-License-Identifier: Apache-2.0
"""Which drivers there are: those built into the core, entry points of installed packages, and `module:Class` paths.

Loading a driver runs its code in the daemon, with the daemon's rights. So a name gets here only from the configuration
or from an administrator's `attach`; nothing is imported before that, and listing imports nothing.
"""

from __future__ import annotations

import errno
import importlib
import importlib.metadata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gmemd.errors import RequestError

GROUP = "gmem.drivers"
# In the order in which they come to exist; those that the core at hand does not have are left out.
BUILTIN_NAMES = ("simgpu", "zstd", "file", "remote", "cuda", "numa")
_REQUIRED = ("probe", "info")
_COMPANIONS = {"remote": "remote"}  # modules of this package


@dataclass(frozen=True)
class Found:
    """A driver that exists by name; load() gives the Python object behind it, or None for one of the core's."""

    name: str
    builtin: bool
    origin: str
    _load: Callable[[], Any]

    def companion(self, name: str, state: Mapping[str, Any] | None = None) -> Any:
        """For a driver of the core's that needs something done in Python: who does it, for a device of that name. state
        is what the companion of a predecessor's device had left."""
        if not self.builtin or self.name not in _COMPANIONS:
            return None
        module = importlib.import_module(f"gmemd.drivers.{_COMPANIONS[self.name]}")
        return module.Companion(name, state)

    def load(self) -> Any:
        if self.builtin:
            return None
        try:
            made = self._load()
            instance = made() if callable(made) else made
        except Exception as error:  # whatever a package does when it is imported
            text = f"driver: {self.name} can't be loaded: {type(error).__name__}: {error}"
            raise RequestError(errno.ENOEXEC, text, "driver") from error
        for method in _REQUIRED:
            if not callable(getattr(instance, method, None)):
                raise RequestError(errno.ENOEXEC, f"driver: {self.name} has no method {method}()", "driver")
        return instance


def _entry_points() -> Iterable[importlib.metadata.EntryPoint]:
    return importlib.metadata.entry_points(group=GROUP)


class Registry:
    """is_builtin asks the core whether it has a driver of that name."""

    def __init__(self, is_builtin: Callable[[str], bool]) -> None:
        self._is_builtin = is_builtin

    def find(self, name: str) -> Found:
        """ENOENT if there is no driver of that name."""
        if ":" in name:
            return self._by_path(name)
        if self._is_builtin(name):
            return Found(name, True, "gmemd", lambda: None)
        for point in _entry_points():
            if point.name == name:
                return Found(name, False, _origin(point), point.load)
        raise RequestError(errno.ENOENT, f"driver: there is no driver {name!r}", "driver")

    def names(self) -> list[Found]:
        found = {name: Found(name, True, "gmemd", lambda: None) for name in BUILTIN_NAMES if self._is_builtin(name)}
        for point in _entry_points():
            found.setdefault(point.name, Found(point.name, False, _origin(point), point.load))
        return list(found.values())

    @staticmethod
    def _by_path(path: str) -> Found:
        module, _, attribute = path.partition(":")

        def load() -> Any:
            target: Any = importlib.import_module(module)
            for part in attribute.split("."):
                target = getattr(target, part)
            return target

        return Found(path, False, path, load)


def _origin(point: importlib.metadata.EntryPoint) -> str:
    package = point.dist.name if point.dist else "?"
    return f"{package} ({point.value})"
