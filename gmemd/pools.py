# SPDX-License-Identifier: Apache-2.0
"""Pools by name: who owns them, who may open them, and how long they live. The core knows them by number.

A name belongs to this gmemd as a whole, first come, first served; who wants to be sure whose pool it is asks for its
owner's uid with it. The mode is that of a file, of reading and writing. A pool lives until it is unlinked or the
session that made it ends; a persistent one until it is unlinked or gmemd ends.
"""

from __future__ import annotations

import errno
import os
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import structlog

from gmemd.door import short_of_descriptors
from gmemd.errors import RequestError
from gmemd.notes import Notes
from gmemd.sessions import Session, SessionTable
from gmemd.sharedpools import READ, WRITE, SharedPools, allows

log = structlog.get_logger("gmemd.pools")

_TABLE = "pools"


@dataclass(eq=False)
class Pool:
    """id 0: it is being made. owner: the session that it ends with; 0: none."""

    name: str
    uid: int
    gid: int
    mode: int
    owner: int
    id: int = 0

    def allows(self, session: Session, want: int) -> bool:
        return allows(session, self, want)


class PoolTable:
    """One lock guards the names; it is never held over a call of the core."""

    def __init__(
        self, core: Any, sessions: SessionTable, *, pools_per_uid: int, notes: Notes | None = None,
        shared: SharedPools | None = None,
    ) -> None:  # fmt: skip
        self._core = core
        self._shared = shared
        self._sessions = sessions
        self._pools_per_uid = pools_per_uid
        self._notes = notes or Notes()
        self._lock = threading.Lock()
        self._by_name: dict[str, Pool] = {}

    def restore(self) -> None:
        """(blocks) A predecessor's. Those that it had not noted had not come to a client."""
        known = set(self._core.pool_ids())
        if self._shared is not None:
            known -= self._shared.restore()
        for pool_id, note in self._notes.table(_TABLE).items():
            pool = Pool(**note)
            if pool_id not in known or (pool.owner and self._sessions.by_core_id(pool.owner) is None):
                self._notes.drop(_TABLE, pool_id)
                continue
            known.discard(pool_id)
            self._by_name[pool.name] = pool
            if pool.owner:
                self._end_with(pool)
        for pool_id in known:
            self._unlink(pool_id)

    # ---- names ----

    def _claim(self, pool: Pool) -> None:
        with self._lock:
            if pool.name in self._by_name:
                raise RequestError(errno.EEXIST, f"name: there is a pool {pool.name} already", "name")
            held = sum(1 for other in self._by_name.values() if other.uid == pool.uid)
            if held >= self._pools_per_uid:
                raise RequestError(errno.EDQUOT, f"uid {pool.uid} has {held} pools, which is the limit for one user")
            self._by_name[pool.name] = pool

    def _find(self, name: str) -> Pool:
        with self._lock:
            pool = self._by_name.get(name)
        if pool is None or not pool.id:
            raise RequestError(errno.ENOENT, f"name: there is no pool {name}", "name")
        return pool

    def _let_go(self, pool: Pool) -> bool:
        """False: somebody else has."""
        with self._lock:
            if self._by_name.get(pool.name) is not pool:
                return False
            del self._by_name[pool.name]
        self._notes.drop(_TABLE, pool.id)
        return True

    def _owned(self, session: Session, name: str, what: str) -> Pool:
        pool = self._find(name)
        if session.uid not in (0, pool.uid):
            if not pool.allows(session, READ):
                raise RequestError(errno.EACCES, f"name: {name} is another user's", "name")
            raise RequestError(errno.EACCES, f"name: only its owner may {what} {name}", "name")
        return pool

    # ---- life ----

    def create(self, session: Session, args: dict[str, Any]) -> dict[str, Any]:
        """(blocks) Its region in the session, which is to be mapped and committed."""
        again = self._made_before(session, args["name"])
        if again is not None:
            return again
        if short_of_descriptors():
            raise RequestError(errno.EMFILE, "gmemd has too few descriptors left for another pool")
        owner = 0 if args["persistent"] else session.core_id
        pool = Pool(args["name"], session.uid, session.gid, args["mode"], owner)
        self._claim(pool)
        try:
            pool_id = self._core.pool_create(
                session.core_id, args["bytes"], page_bytes=args["page_bytes"], small=args["small"],
                persistent=args["persistent"],
            )  # fmt: skip
        except BaseException:
            with self._lock:
                del self._by_name[pool.name]
            raise
        try:
            region = self._core.pool_open(session.core_id, pool_id, True)
            pool.id = pool_id
            self._notes.put(_TABLE, pool_id, asdict(pool))
            if owner:
                self._end_with(pool)
        except BaseException:
            self._let_go(pool)
            self._unlink(pool_id)
            raise
        log.info("pool created", pool=pool.name, uid=pool.uid, session=session.core_id, bytes=region["bytes"])
        return self._reply(pool.id, region, sealed=False)

    def _made_before(self, session: Session, name: str) -> dict[str, Any] | None:
        """The answer was lost with the daemon that had made it."""
        with self._lock:
            pool = self._by_name.get(name)
        if pool is None or not pool.id or pool.owner != session.core_id or pool.uid != session.uid:
            return None
        with suppress(OSError):
            region = self._core.pool_open(session.core_id, pool.id, True)
            if not region["committed"]:
                return self._reply(pool.id, region, sealed=False)
        return None

    def _end_with(self, pool: Pool) -> None:
        owner = self._sessions.by_core_id(pool.owner)
        if owner is None:
            raise RequestError(errno.ESTALE, "the session has ended")
        self._sessions.at_end(owner, self._session_ended)

    def _session_ended(self, session: Session) -> None:
        with self._lock:
            ended = [pool for pool in self._by_name.values() if pool.owner == session.core_id and pool.id]
        for pool in ended:
            if self._let_go(pool):
                self._unlink(pool.id)

    def _unlink(self, pool_id: int) -> None:
        try:
            self._core.pool_unlink(pool_id)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESHUTDOWN):
                log.error("a pool can't be unlinked", pool=pool_id, error=str(error))

    def let_go(self, device: str) -> list[str]:
        """(blocks) Before a device is detached: pools that are open from there."""
        return self._shared.let_go(device) if self._shared is not None else []

    def shared(self) -> SharedPools:
        if self._shared is None:
            raise RequestError(errno.EOPNOTSUPP, "remote: this gmemd shares no pools with others", "remote")
        return self._shared

    def open_shared(self, session: Session, name: str, remote: str, uid: int | None) -> dict[str, Any]:
        """(blocks) The newest version that is published on a device's servers."""
        one, region = self.shared().open(session, name, remote, uid)
        return {**self._reply(one.id, region, sealed=True), "version": one.version}

    def open(self, session: Session, name: str, write: bool, uid: int | None) -> dict[str, Any]:
        """Its region in the session, which is to be mapped and committed."""
        pool = self._find(name)
        if uid is not None and pool.uid != uid:
            raise RequestError(errno.EACCES, f"uid: {name} is not a pool of uid {uid}", "uid")
        if not pool.allows(session, READ | WRITE if write else READ):
            how = "writing" if write else "reading"
            raise RequestError(errno.EACCES, f"name: the mode of {name} does not allow {how} to this user", "name")
        try:
            region = self._core.pool_open(session.core_id, pool.id, write)
        except OSError as error:
            words = {
                errno.EPERM: f"write: {name} is published, and nobody writes to it any more",
                errno.EBUSY: f"write: this session has {name} open to read only; close that first",
                errno.EEXIST: f"name: this session has something else where {name} lies",
                errno.ENOENT: f"name: there is no pool {name}",
            }
            number = error.errno or errno.EIO
            if number not in words:
                raise
            raise RequestError(number, words[number], words[number].split(":")[0]) from None
        return self._reply(pool.id, region, region["sealed"])

    @staticmethod
    def _reply(pool_id: int, region: dict[str, Any], sealed: bool) -> dict[str, Any]:
        keys = ("va", "bytes", "offset", "page_bytes", "huge", "read_only")
        return {"pool": pool_id, "sealed": sealed, "mapped": region["committed"], **{key: region[key] for key in keys}}

    def unlink(self, session: Session, name: str) -> None:
        pool = self._owned(session, name, "unlink")
        if self._let_go(pool):
            self._unlink(pool.id)
            log.info("pool unlinked", pool=name, uid=pool.uid)

    def publish(self, session: Session, name: str, remote: str | None = None) -> dict[str, Any]:
        """(blocks) With a device, on its servers, too: as a new version, whose number is the reply."""
        pool = self._owned(session, name, "publish")
        try:
            self._core.pool_publish(pool.id)
        except OSError as error:
            words = {
                errno.EBUSY: "it is being published, or a device holds a page of it for writing",
                errno.EOPNOTSUPP: "this kernel (before 6.4) can't take write access from who has it open",
            }
            number = error.errno or errno.EIO
            if number not in words:
                raise
            raise RequestError(number, f"name: {name}: {words[number]}", "name") from None
        log.info("pool published", pool=name, uid=pool.uid)
        return {"version": self.shared().publish(pool, remote)} if remote is not None else {}

    def describe(self, session: Session) -> list[dict[str, Any]]:
        """(blocks) Those that the session may open; all for an administrator."""
        with self._lock:
            pools = sorted((pool for pool in self._by_name.values() if pool.id), key=lambda pool: pool.name)
        rows = []
        for pool in pools:
            if not (session.admin or session.uid == pool.uid or pool.allows(session, READ)):
                continue
            try:
                info = self._core.pool_info(pool.id)
            except OSError:
                continue  # unlinked between the list and the look
            rows.append({
                **info, "name": pool.name, "uid": pool.uid, "gid": pool.gid, "mode": pool.mode, "session": pool.owner,
                "persistent": not pool.owner, "remote": "", "version": 0,
            })  # fmt: skip
        if self._shared is not None:
            rows += [{**row, "session": 0, "persistent": False} for row in self._shared.describe(session)]
        for row in rows:
            row["resident_bytes"] = {str(hnid): size for hnid, size in row["resident_bytes"].items()}
        return rows


def may_persist(session: Session) -> bool:
    """What outlives its processes is for whoever looks after the machine."""
    return session.admin or session.uid in (0, os.geteuid())
