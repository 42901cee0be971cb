# SPDX-License-Identifier: Apache-2.0
"""Pools that several machines share: publishing them to the servers of a remote tier, and versions that were published
there as pools of this gmemd.

A version is imported once, however many processes open it, and stays while somebody has it open, or while it is the
newest and was used within ten minutes. What the servers know of names, writers and readers is in drivers/published.py;
a thread for each device tells them what is read here, and drops what nobody reads.
"""

from __future__ import annotations

import errno
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

import structlog

from gmemd._core import crash
from gmemd.devices import DeviceTable
from gmemd.drivers.published import Head, Lease, Published, Version
from gmemd.errors import RequestError
from gmemd.notes import Notes
from gmemd.sessions import Session

log = structlog.get_logger("gmemd.sharedpools")

READ, WRITE = 4, 2
_TABLE, _MACHINE = "imports", "machine"
_EXPORT_BYTES = 64 << 20  # between two looks at the lease
_ERASE_PAGES = 16384
_IDLE_S = 600.0
_OPEN_TRIES = 8
_TICK_S = 1.0  # or a part of the lease, if that is short
_TICKS = 8  # of a lease
_STOP_S = 3.0


def allows(session: Session, owner: Any, want: int) -> bool:
    """owner has uid, gid and mode, as a file has."""
    if session.uid == 0:
        return True
    if session.uid == owner.uid:
        bits = owner.mode >> 6
    elif owner.gid in session.gids:
        bits = owner.mode >> 3
    else:
        bits = owner.mode
    return bool(bits & want == want)


@dataclass(eq=False)
class Import:
    """A version that is a pool here."""

    id: int  # the core's
    device: str
    hnid: int
    name: str
    stamp: int
    uid: int
    gid: int
    mode: int

    used: float = 0.0  # monotonic; when it was last seen to be open
    marked: float = 0.0
    is_open: bool = False  # when it was last looked at

    @property
    def version(self) -> int:
        return self.stamp >> 32


_KEPT = ("id", "device", "hnid", "name", "stamp", "uid", "gid", "mode")


class _Place:
    """A device's servers, and the thread that tells them what is read here."""

    def __init__(self, hnid: int, companion: Any, published: Published) -> None:
        self.hnid = hnid
        self.companion = companion
        self.published = published
        self.tick_s = min(_TICK_S, published.lease_s / _TICKS)
        self.sweep: set[str] = set()  # names that may have garbage
        self.wake = threading.Event()
        self.stop = False
        self.thread: threading.Thread | None = None

    def end(self, timeout: float) -> None:
        self.stop = True
        self.wake.set()
        if self.thread is not None and self.thread is not threading.current_thread():
            self.thread.join(timeout)


class SharedPools:
    """One lock guards the tables; each name has one that is held while it is looked up, another while it is written."""

    def __init__(self, core: Any, devices: DeviceTable, notes: Notes | None = None) -> None:
        self._core = core
        self._devices = devices
        self._notes = notes or Notes()
        self._lock = threading.Lock()
        self._imports: dict[int, Import] = {}
        self._places: dict[str, _Place] = {}
        self._names: dict[tuple[str, ...], threading.Lock] = {}
        known = self._notes.table(_MACHINE).get(_MACHINE)
        self._machine = known["id"] if known else secrets.token_hex(8)
        if not known:
            self._notes.put(_MACHINE, _MACHINE, {"id": self._machine})

    def stop(self) -> None:
        """(blocks) The servers are told that nothing is read here any more, as far as they answer."""
        with self._lock:
            imports, places = list(self._imports.values()), dict(self._places)
        for place in places.values():
            place.end(_STOP_S)
        end = time.monotonic() + _STOP_S
        for one in imports:
            if one.device in places and time.monotonic() < end:
                with suppress(RequestError):
                    places[one.device].published.unmark(one.name, one.stamp, 0)
        for place in places.values():
            place.published.close()

    def restore(self) -> set[int]:
        """(blocks) A predecessor's imports; the core has them. Returns their numbers."""
        known = set(self._core.pool_ids())
        for pool_id, note in self._notes.table(_TABLE).items():
            if pool_id in known:
                self._imports[pool_id] = Import(**note, used=time.monotonic())
            else:
                self._notes.drop(_TABLE, pool_id)
        for device in {one.device for one in self._imports.values()}:
            with suppress(RequestError):  # it could not be attached again: what is read there fails
                self._of(device)
        return set(self._imports)

    # ---- who to ask ----

    def _of(self, device: str) -> _Place:
        try:
            hnid, companion = self._devices.companion(device)
        except RequestError as error:
            raise RequestError(errno.ENOENT, f"remote: no device {device} is attached", "remote") from error
        if companion is None:
            raise RequestError(errno.EOPNOTSUPP, f"remote: {device} is no remote tier", "remote")
        with self._lock:
            known = self._places.get(device)
            if known is not None and known.companion is companion:
                return known
            if known is not None:  # detached and attached again meanwhile
                known.end(0)
            place = self._places[device] = _Place(hnid, companion, companion.published(self._machine))
            place.thread = threading.Thread(
                target=self._look_around, args=(device, place), name=f"pools-{device[:8]}", daemon=True
            )
            place.thread.start()
        return place

    def let_go(self, device: str) -> list[str]:
        """(blocks) Before it is detached: names of what is open from there; what is not is dropped."""
        names = []
        with self._lock:
            imports = [one for one in self._imports.values() if one.device == device]
        for one in imports:
            if self._core.pool_info(one.id)["readers"]:
                names.append(one.name)
            else:
                self._drop(self._of(device), one)
        return sorted(set(names))

    @contextmanager
    def _alone(self, *key: str) -> Iterator[None]:
        with self._lock:
            lock = self._names.setdefault(key, threading.Lock())
        with lock:
            yield

    # ---- publish, unlink ----

    def publish(self, pool: Any, device: str) -> int:
        """(blocks) The version that the servers have of a published pool now. pool: as pools.Pool."""
        place = self._of(device)
        published = place.published
        info = self._core.pool_info(pool.id)
        pages = info["bytes"] // info["page_bytes"]
        with self._alone("write", device, pool.name), published.writing(pool.name, pool.uid) as lease:
            crash("FAR_LEASED")
            version = Version(pool.name, lease.stamp, pages, info["page_bytes"], self._core.pool_present(pool.id),
                              bytearray(4 * pages))  # fmt: skip
            published.intend(lease, pages, info["page_bytes"])
            crash("FAR_INTENDED")
            try:
                head = self._write(place, lease, pool, version)
            except BaseException:
                with suppress(RequestError):
                    published.admit(pool.name, lease.stamp, pages, info["page_bytes"])
                raise
            finally:
                self._look_for_garbage(place, pool.name)
        log.info("pool published to servers", pool=pool.name, device=device, version=head.version, pages=pages)
        return head.version

    def _write(self, place: _Place, lease: Lease, pool: Any, version: Version) -> Head:
        """Pages, manifest, head, in that order, each confirmed before the next."""
        step = max(_EXPORT_BYTES // version.page_bytes, 16)
        for first in range(0, version.pages, step):
            lease.check()
            self._export(pool, place.hnid, version, first, min(step, version.pages - first))
        crash("FAR_WRITTEN")
        crc = place.published.put_manifest(lease, version)
        crash("FAR_LISTED")
        head = Head(lease.stamp, version.pages, version.page_bytes, pool.uid, pool.gid, pool.mode, crc)
        place.published.move_head(lease, head)
        crash("FAR_MOVED")
        return head

    def _export(self, pool: Any, hnid: int, version: Version, first: int, count: int) -> None:
        try:
            self._core.pool_export(pool.id, hnid, version, first, count)
        except OSError as error:
            words = {
                errno.ENOSPC: "remote: the servers are full; what was published before is still there",
                errno.ENODATA: "remote: too few replicas have confirmed what was written",
                errno.ETIMEDOUT: "remote: no server has answered in time",
                errno.EACCES: "remote: the servers refuse it",
                errno.EOPNOTSUPP: "remote: the device was detached",
            }
            number = error.errno or errno.EIO
            if number not in words:
                raise
            raise RequestError(number, words[number], "remote") from None

    def unlink(self, session: Session, name: str, device: str) -> None:
        """(blocks) Nobody can open it any more; who has it open keeps it."""
        place = self._of(device)
        published = place.published
        self._known(published, name)
        with self._alone("write", device, name), published.writing(name, session.uid) as lease:
            published.remove(lease)
        self._look_for_garbage(place, name)
        log.info("pool unlinked from servers", pool=name, device=device)

    @staticmethod
    def _known(published: Published, name: str) -> Head:
        head = published.head(name)
        if head is None:
            raise RequestError(errno.ENOENT, f"name: no pool {name} is published there", "name")
        return head

    # ---- open ----

    def open(self, session: Session, name: str, device: str, uid: int | None) -> tuple[Import, dict[str, Any]]:
        """(blocks) The newest version, and its region in the session."""
        place = self._of(device)
        with self._alone("read", device, name):
            for _ in range(_OPEN_TRIES):
                head = self._known(place.published, name)
                if uid is not None and head.uid != uid:
                    raise RequestError(errno.EACCES, f"uid: {name} is not a pool of uid {uid}", "uid")
                if not allows(session, head, READ):
                    text = f"name: the mode of {name} does not allow reading to this user"
                    raise RequestError(errno.EACCES, text, "name")
                one = self._find(device, name, head.stamp) or self._import(session, place, device, name, head)
                if one is not None:
                    one.used = time.monotonic()
                    return one, self._core.pool_open(session.core_id, one.id, False)
        raise RequestError(errno.EAGAIN, f"name: {name} is published again faster than it can be opened", "name")

    def _find(self, device: str, name: str, stamp: int) -> Import | None:
        with self._lock:
            return next((one for one in self._imports.values() if (one.device, one.name, one.stamp) ==
                         (device, name, stamp)), None)  # fmt: skip

    def _import(
        self, session: Session, place: _Place, device: str, name: str, head: Head
    ) -> Import | None:  # fmt: skip
        """None: there is a newer one meanwhile. One that is still the head when this machine has been marked as its
        reader stays until the mark goes."""
        published = place.published
        published.mark(name, head.stamp)
        crash("FAR_MARKED")
        try:
            if published.head(name) != head:
                published.unmark(name, head.stamp)
                return None
            pool_id = self._core.pool_import(session.core_id, place.hnid, published.manifest(name, head))
        except BaseException:
            with suppress(RequestError):
                published.unmark(name, head.stamp)
            raise
        now = time.monotonic()
        one = Import(pool_id, device, place.hnid, name, head.stamp, head.uid, head.gid, head.mode, now, now)
        self._notes.put(_TABLE, pool_id, {key: value for key, value in asdict(one).items() if key in _KEPT})
        crash("FAR_NOTED")
        with self._lock:
            self._imports[pool_id] = one
        self._look_for_garbage(place, name)  # of an older one, which this session has closed perhaps
        log.info("pool imported", pool=name, device=device, version=one.version, bytes=head.pages * head.page_bytes)
        return one

    # ---- what there is ----

    def describe(self, session: Session) -> list[dict[str, Any]]:
        """(blocks) Imports that the session may open; all for an administrator."""
        with self._lock:
            imports = sorted(self._imports.values(), key=lambda one: (one.name, one.device, one.stamp))
        rows = []
        for one in imports:
            if not session.admin and session.uid != one.uid and not allows(session, one, READ):
                continue
            with suppress(OSError):  # dropped between the list and the look
                rows.append({**self._core.pool_info(one.id), "name": one.name, "uid": one.uid, "gid": one.gid,
                             "mode": one.mode, "remote": one.device, "version": one.version})  # fmt: skip
        return rows

    def published_on(self, session: Session, device: str) -> list[dict[str, Any]]:
        """(blocks) What is on the servers of a device."""
        published = self._of(device).published
        return [
            {"name": name, "remote": device, "version": head.version, "bytes": head.pages * head.page_bytes,
             "page_bytes": head.page_bytes, "uid": head.uid, "gid": head.gid, "mode": head.mode}
            for name, head in published.heads()
            if session.admin or session.uid == head.uid or allows(session, head, READ)
        ]  # fmt: skip

    # ---- the threads ----

    @staticmethod
    def _look_for_garbage(place: _Place, name: str) -> None:
        place.sweep.add(name)
        place.wake.set()

    def _look_around(self, device: str, place: _Place) -> None:
        while not place.stop:
            place.wake.wait(place.tick_s)
            place.wake.clear()
            with self._lock:
                imports = [one for one in self._imports.values() if one.device == device]
            sweep, place.sweep = place.sweep, set()
            for one in imports:
                self._guarded("an imported pool can't be looked after", place, one.name, self._look_after, place, one)
            for name in sweep:
                if not self._guarded("old versions can't be dropped", place, name, self._collect, place, device, name):
                    place.sweep.add(name)

    @staticmethod
    def _guarded(what: str, place: _Place, name: str, function: Any, *args: Any) -> bool:
        if place.stop:
            return False
        try:
            function(*args)
            return True
        except OSError as error:
            if error.errno != errno.ESHUTDOWN:
                log.warning(what, pool=name, error=str(error))
        except Exception:  # the thread must go on
            log.exception(what, pool=name)
        place.wake.wait(place.tick_s)
        return False

    def _look_after(self, place: _Place, one: Import) -> None:
        """Keeps the mark of a version that is read, and lets one go that is not."""
        now = time.monotonic()
        was_open, one.is_open = one.is_open, bool(self._core.pool_info(one.id)["readers"])
        if one.is_open:
            one.used = now
        due = now - one.marked >= place.published.reader_s / 3
        if not one.is_open and (was_open or due or now - one.used >= _IDLE_S) and now - one.used >= place.tick_s:
            head = place.published.head(one.name)
            if now - one.used >= _IDLE_S or head is None or head.stamp != one.stamp:
                self._drop(place, one)
                return
        elif not one.is_open and was_open:
            one.is_open = True  # just closed: asked for again the next time
        if due:
            place.published.mark(one.name, one.stamp)
            one.marked = now

    def _drop(self, place: _Place, one: Import) -> None:
        with self._alone("read", one.device, one.name):
            if self._core.pool_info(one.id)["readers"]:
                return
            with self._lock:
                if self._imports.pop(one.id, None) is None:
                    return
            self._notes.drop(_TABLE, one.id)
            crash("FAR_FORGOTTEN")
            self._core.pool_unlink(one.id)
        self._look_for_garbage(place, one.name)
        place.published.unmark(one.name, one.stamp)
        log.info("imported pool dropped", pool=one.name, device=one.device, version=one.version)

    def _collect(self, place: _Place, device: str, name: str) -> None:
        published = place.published
        self._drop_superseded(place, device, name)
        for stamp, (pages, page_bytes) in published.garbage(name).items():
            for first in range(0, pages, _ERASE_PAGES):
                count = min(_ERASE_PAGES, pages - first)
                self._core.pool_erase(place.hnid, name, stamp, pages, page_bytes, first, count)
            published.forget(name, stamp, pages)
            log.info("old version dropped", pool=name, device=device, version=stamp >> 32)

    def _drop_superseded(self, place: _Place, device: str, name: str) -> None:
        """Versions that nobody here has open any more, now that there is another."""
        with self._lock:
            mine = [one for one in self._imports.values() if (one.device, one.name) == (device, name)]
        if not mine:
            return
        head = place.published.head(name)
        for one in mine:
            if (head is None or head.stamp != one.stamp) and not self._core.pool_info(one.id)["readers"]:
                self._drop(place, one)
