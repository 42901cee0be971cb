# SPDX-License-Identifier: Apache-2.0
"""Devices: attached and detached at run time, named by people, numbered (hnid) by the core."""

from __future__ import annotations

import errno
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import structlog

from gmemd.caps import CAPS, cap_names, page_sizes
from gmemd.drivers.registry import Found, Registry
from gmemd.errors import RequestError, as_request_error
from gmemd.notes import Notes
from gmemd.sessions import SessionTable

log = structlog.get_logger("gmemd.devices")

HOST = 0
_COUNTERS = (
    "used_bytes", "peak_bytes", "pinned_bytes", "contexts", "faults", "in_bytes", "out_bytes", "evictions",
    "evicted_clean", "errors", "assured_bytes", "stored_pages", "stored_page_bytes", "stored_bytes", "raw_pages",
)  # fmt: skip
_HOLD_WAIT_S = 5.0
_TIER = "tier"  # an option of every device that only stores pages: its place in the chain below the host
_TIER_MAX = 999
_RANK_FIRST = _TIER_MAX + 1  # of those that do not say: behind all that do, in the order in which they come


class DeviceTable:
    """One lock; it is not held over the core's attach and detach, which may take as long as moving memory takes. A name
    that is being attached or detached is busy meanwhile."""

    def __init__(
        self, core: Any, drivers: Registry, sessions: SessionTable, publish: Callable[[str, dict[str, Any]], None],
        quotas: Mapping[str, Mapping[str, int]] | None = None, notes: Notes | None = None,
    ) -> None:  # fmt: skip
        self._core = core
        self._drivers = drivers
        self._sessions = sessions
        self._publish = publish
        self._changed = threading.Condition()
        self._hnids: dict[str, int] = {}
        self._busy: set[str] = set()
        self._companions: dict[str, Any] = {}
        self._holds: dict[int, int] = {}
        self._quotas = quotas or {}
        self._notes = notes or Notes()
        self._ranks = itertools.count(_RANK_FIRST)
        if self._quotas:
            self._set_quotas("host", HOST)

    def attach(
        self, driver: str, name: str, config: Mapping[str, str], at: int = 0, state: Mapping[str, Any] | None = None
    ) -> int:
        """(blocks) hnid of the new device; at, if that is not 0. state: what a predecessor's device has left."""
        found = self._drivers.find(driver)
        with self._changed:
            if name == "host" or name in self._hnids:
                raise RequestError(errno.EEXIST, f"name: {name} is attached already", "name")
            self._begin_locked(name)
        try:
            options = dict(config)
            tier = _place(options.pop(_TIER)) if _TIER in options else None
            hnid, left = self._attach(found, name, options, at, state)
            self._take_place(name, hnid, tier)
            self._set_quotas(name, hnid)
            self._notes.put("devices", name, {"driver": driver, "config": dict(config), "hnid": hnid, "state": left})
            with self._changed:
                self._hnids[name] = hnid
        except RequestError:
            raise
        except OSError as error:
            argument = {errno.EEXIST: "name", errno.ENOENT: "driver", errno.ENOSPC: None}.get(
                error.errno or 0, "config"
            )
            raise as_request_error(error, f"{name} can't be attached", argument) from None
        finally:
            self._finish(name)
        log.info("device attached", name=name, driver=driver, hnid=hnid)
        stats = self.describe(hnid) or {"capacity_bytes": 0}
        self._publish(
            "device.attached",
            {"hnid": hnid, "name": name, "driver": driver, "capacity_bytes": stats["capacity_bytes"]},
        )
        return hnid

    def _attach(
        self, found: Found, name: str, options: dict[str, str], at: int, state: Mapping[str, Any] | None
    ) -> tuple[int, dict[str, Any]]:
        companion = found.companion(name, state)
        if companion is None:
            return self._core.device_attach(found.name, name, options, found.load(), at), {}
        try:
            hnid = self._core.device_attach(found.name, name, companion.prepare(options), None, at)
            left = companion.attached()
        except BaseException:
            companion.close()
            raise
        self._companions[name] = companion
        return hnid, left

    def attach_again(self) -> None:
        """(blocks) A predecessor's devices, at their numbers. One that can't be attached is lost, and told of. OSError:
        somebody else can attach it."""
        for name, note in sorted(self._notes.table("devices").items(), key=lambda item: item[1]["hnid"]):
            try:
                self.attach(note["driver"], name, note["config"], note["hnid"], note.get("state"))
            except RequestError as error:
                if error.errno == errno.EPROTONOSUPPORT:
                    what = f"what the device {name} has left is of another version; it was not touched"
                    raise OSError(errno.EPROTO, what) from None
                log.error("device lost: it can't be attached again", name=name, error=error.message)
                self._notes.drop("devices", name)

    def note_setting(self, op: str, key: list[Any], args: Mapping[str, Any]) -> None:
        """A limit or a quota that was set while it ran, for a successor."""
        self._notes.put("settings", "/".join(map(str, [op, *key])), {"op": op, **args})

    def set_again(self) -> None:
        """(blocks) Limits and quotas that a predecessor was told of."""
        for key, note in self._notes.table("settings").items():
            try:
                hnid = self.hnid_of(note["name"])
                if note["op"] == "limit":
                    self._core.limit(hnid, note["bytes"])
                elif note.get("uid") is not None:
                    self._core.quota_uid(note["uid"], hnid, note["bytes"])
                else:
                    self._core.quota_session(note["session"], hnid, note["bytes"])
            except OSError as error:
                log.warning("a setting could not be made again", setting=key, error=str(error))
                self._notes.drop("settings", key)

    def _take_place(self, name: str, hnid: int, tier: int | None) -> None:
        """In the chain of tiers; numbers of hnodes are used again, so the order is said for each."""
        try:
            self._core.tier_rank(hnid, tier if tier is not None else next(self._ranks))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            if tier is not None:
                self._core.device_detach(hnid, True)
                self._let_companion_go(name)
                raise RequestError(errno.EINVAL, f"config: tier: {name} is no tier", "config") from None

    def _set_quotas(self, name: str, hnid: int) -> None:
        session, user = (self._quotas.get(whose, {}).get(name, 0) for whose in ("session", "user"))
        self._core.quota_default(hnid, session, user)

    def detach(self, name: str, force: bool) -> None:
        """(blocks) Brings every page home first. EBUSY while contexts are open, unless force, which ends them."""
        with self._changed:
            hnid = self._hnids.get(name)
            if hnid is None:
                raise RequestError(errno.ENOENT, f"name: no device {name} is attached", "name")
            self._begin_locked(name)
            self._changed.wait_for(lambda: not self._holds.get(hnid), _HOLD_WAIT_S)
        try:
            contexts = self._sessions.contexts_on(hnid)
            if contexts and not force:
                raise RequestError(errno.EBUSY, f"name: {name} has open contexts ({len(contexts)})", "name")
            self._core.device_detach(hnid, force)
            self._let_companion_go(name)
            self._notes.drop("devices", name)
            with self._changed:
                del self._hnids[name]
            # The core has killed their processes: whatever they touched next would have blocked them for ever.
            for context in contexts:
                self._sessions.end_context(context, f"device {name} was detached")
        except RequestError:
            raise
        except OSError as error:
            raise as_request_error(error, f"name: {name} can't be detached", "name") from None
        finally:
            self._finish(name)
        log.info("device detached", name=name, hnid=hnid)
        self._publish("device.detached", {"hnid": hnid, "name": name})

    def _let_companion_go(self, name: str) -> None:
        companion = self._companions.pop(name, None)
        if companion is not None:
            companion.close()

    def _begin_locked(self, name: str) -> None:
        if name in self._busy:
            raise RequestError(errno.EBUSY, f"name: {name} is being attached or detached", "name")
        self._busy.add(name)

    def _finish(self, name: str) -> None:
        with self._changed:
            self._busy.discard(name)

    @contextmanager
    def hold(self, name: str) -> Iterator[int]:
        """hnid of a device that is not detached meanwhile: its descriptors stay open. For short stretches."""
        with self._changed:
            hnid = self._hnids.get(name)
            if hnid is None:
                raise RequestError(errno.ENOENT, f"device: no device {name!r} is attached", "device")
            if name in self._busy:
                raise RequestError(errno.EBUSY, f"device: {name} is being detached", "device")
            self._holds[hnid] = self._holds.get(hnid, 0) + 1
        try:
            yield hnid
        finally:
            with self._changed:
                self._holds[hnid] -= 1
                self._changed.notify_all()

    def check_hnid(self, hnid: int, least: int) -> None:
        """EINVAL for a number that is no hnode's; least says whether -1 and the host count here."""
        with self._changed:
            known = hnid in self._hnids.values()
        if not known and not least <= hnid <= HOST:
            raise RequestError(errno.EINVAL, f"hnid: there is no hnode {hnid}", "hnid")

    def hnid_of(self, name: str) -> int:
        """ENOENT for a name that is none."""
        with self._changed:
            hnid = HOST if name == "host" else self._hnids.get(name)
        if hnid is None:
            raise RequestError(errno.ENOENT, f"name: no device {name} is attached", "name")
        return hnid

    def name_of(self, hnid: int) -> str:
        with self._changed:
            return next((name for name, number in self._hnids.items() if number == hnid), "host" if not hnid else "")

    def makes_frames(self, hnid: int) -> bool:
        """Its contexts are the clients' own processes, with a channel each."""
        return bool(self._core.device_caps(hnid) & CAPS["own_frames"])

    def any_makes_frames(self) -> bool:
        with self._changed:
            hnids = list(self._hnids.values())
        return any(self.makes_frames(hnid) for hnid in hnids)

    def companion(self, name: str) -> tuple[int, Any]:
        """hnid of a device, and who does in Python what it needs done there; None: nobody."""
        with self._changed:
            hnid = self._hnids.get(name)
            if hnid is None:
                raise RequestError(errno.ENOENT, f"name: no device {name} is attached", "name")
            return hnid, self._companions.get(name)

    def names(self) -> list[str]:
        with self._changed:
            return list(self._hnids)

    def describe_all(self, admin: bool = False) -> list[dict[str, Any]]:
        """All hnodes with their counters, the host first, in the shape of the op `devices`. What drivers say may name
        servers, and is for administrators."""
        return [_describe(hnode) | ({} if admin else {"last_error": ""}) for hnode in self._core.hnodes()]

    def describe(self, hnid: int) -> dict[str, Any] | None:
        return next((hnode for hnode in self.describe_all() if hnode["hnid"] == hnid), None)


def _place(text: str) -> int:
    if not text.isdecimal() or int(text) > _TIER_MAX:
        raise RequestError(errno.EINVAL, f"config: tier: {text!r} is not a whole number, 0 to {_TIER_MAX}", "config")
    return int(text)


def _describe(hnode: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "hnid": hnode["hnid"],
        "name": hnode["name"],
        "driver": hnode["driver"],
        "caps": cap_names(hnode["caps"]),
        "page_bytes": page_sizes(hnode["page_bytes_mask"]),
        "capacity_bytes": hnode["capacity_bytes"],
        "bandwidth_bytes_per_s": hnode["bandwidth_bytes_per_s"],
        "latency_ns": hnode["latency_ns"],
        **{name: hnode[name] for name in _COUNTERS},
        "policy": hnode["policy"],
        "health": hnode["health"],
        "last_error": hnode["last_error"],
    }
