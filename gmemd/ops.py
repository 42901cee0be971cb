# SPDX-License-Identifier: Apache-2.0
"""What each op does, once schema.py has found its arguments sound: calls of the core, and its errors in words."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from typing import Any

from gmemd import __version__, schema
from gmemd.devices import DeviceTable
from gmemd.drivers.registry import Registry
from gmemd.errors import RequestError, as_request_error
from gmemd.pools import PoolTable, may_persist
from gmemd.recorder import Recorder
from gmemd.sessions import Session, SessionTable
from gmemd.watch import Watch

Args = dict[str, Any]
Reply = dict[str, Any]

_PAGE_SHIFT_OFFSET = 5  # of struct gmem_page_info

# Which argument a core's errno speaks of, by op, where it is always the same one.
_RANGE = {errno.EINVAL: "va", errno.ENODEV: "hnid", errno.ENOMEM: "bytes", errno.ENOSPC: "bytes"}
_RANGES = {errno.EINVAL: "ranges", errno.ENOMEM: "ranges", errno.ENOSPC: "ranges", errno.ENOENT: "context"}
_BLAME: dict[str, dict[int, str]] = {
    "mmap": {errno.ENOMEM: "bytes", errno.EINVAL: "bytes", errno.EDQUOT: "bytes"},
    "pool_create": {errno.ENOMEM: "bytes", errno.EINVAL: "bytes", errno.EDQUOT: "bytes"},
    "pool_publish": {errno.ENOMEM: "name", errno.EDQUOT: "name", errno.EIO: "name"},
    "limit": {errno.EINVAL: "bytes", errno.EBUSY: "bytes", errno.ENOMEM: "bytes", errno.EAGAIN: "bytes"},
    "quota": {
        errno.EINVAL: "bytes", errno.ENOMEM: "bytes", errno.EAGAIN: "bytes", errno.EDQUOT: "bytes",
        errno.ENOENT: "session",
    },
    "adopt": {errno.ENOMEM: "bytes", errno.EINVAL: "va", errno.EDQUOT: "bytes", errno.EEXIST: "va"},
    "mmap_commit": {errno.EINVAL: "va", errno.ENOMEM: "va"},
    "trace_start": {errno.ENOMEM: "buffer_bytes", errno.ENODEV: "device"},
    "munmap": {errno.EINVAL: "va"},
    "advise": _RANGE,
    "prefetch": _RANGE,
    "discard": {errno.EINVAL: "va"},
    "flush": {errno.EINVAL: "va"},
    "hmemcpy": {errno.EINVAL: "dst", errno.ENODEV: "hnid", errno.EOPNOTSUPP: "hnid", errno.ENOMEM: "bytes"},
    "query": {errno.EINVAL: "va"},
    "acquire": _RANGES,
    "release": _RANGES,
    "context_overlay": {errno.EINVAL: "va", errno.ENOENT: "context"},
}

# What the core's errno means, where the system's own words would leave people guessing.
_MEANING: dict[tuple[str, int], str] = {
    ("mmap", errno.ENOMEM): "more than the host and all devices together could hold, or than the window has room for",
    ("mmap", errno.EDQUOT): "more than the quotas of this session or this user allow on all hnodes together",
    ("pool_create", errno.ENOMEM): "more than the host and all devices could hold, or than the window has room for",
    ("pool_create", errno.EDQUOT): "more than the quotas of this session or this user allow on all hnodes together",
    ("pool_publish", errno.ENOMEM): "there is no room to move it; nobody writes to it any more, publish it again",
    ("pool_publish", errno.EDQUOT): "the owner's quota leaves no room to move it; publish it again",
    ("adopt", errno.ENOMEM): "more than the host and all devices together could hold, or than the window has room for",
    ("adopt", errno.EDQUOT): "more than the quotas of this session or this user allow on all hnodes together",
    ("adopt", errno.EINVAL): "not whole pages of 4096 bytes outside the window",
    ("adopt", errno.EEXIST): "some of it is managed already",
    ("limit", errno.EINVAL): "below 2 MiB, or above the capacity",
    ("limit", errno.EBUSY): "more than that is pinned",
    ("limit", errno.ENOMEM): "there is nowhere for the rest to go; nothing has changed",
    ("limit", errno.EAGAIN): "the rest is in use just now; nothing has changed",
    ("quota", errno.EINVAL): "below 2 MiB; 0 is no quota",
    ("quota", errno.ENOMEM): "there is nowhere for the rest to go; nothing has changed",
    ("quota", errno.EDQUOT): "there is nowhere for the rest to go within its other quotas; nothing has changed",
    ("quota", errno.EAGAIN): "the rest is in use just now; nothing has changed",
    ("quota", errno.ENOENT): "there is no such session, or no session of that user",
    ("flush", errno.EIO): "the file can't be written, or has become shorter",
    ("flush", errno.ENOSPC): "there is no room in the file system",
    ("flush", errno.EBUSY): "a page is held on a device",
    ("mmap_commit", errno.EINVAL): "not the start of a region, or not mapped there",
    ("mmap_commit", errno.ENOTCONN): "the session's userfaultfd has not been attached",
    ("trace_start", errno.ENOMEM): "there is not so much memory",
    ("trace_start", errno.ENODEV): "it has been detached",
    ("context_overlay", errno.EINVAL): "not whole pages of regions of this session, or not mapped there by the context",
    ("query", errno.EINVAL): "the range is not within one region of this session",
    ("hmemcpy", errno.EINVAL): "source or destination is not mapped by this session, or they overlap",
    ("hmemcpy", errno.EOPNOTSUPP): "this device can't be copied to directly",
}
_MEANING_OF_ANY: dict[int, str] = {
    errno.EINVAL: "the range is not mapped by this session",
    errno.ENODEV: "there is no such hnode",
    errno.ENOMEM: "there is no room: what is there is pinned or acquired, or too much was asked for",
    errno.ENOSPC: "there is no room: what is there is pinned or acquired, or too much was asked for",
    errno.EAGAIN: "it stayed busy; another context may have acquired it",
    errno.EIO: "a page of the range was lost",
    errno.ENOENT: "the session or the context has ended",
}


def _refusal(op: str, error: OSError) -> RequestError:
    """The core's error as a refusal that names the argument."""
    number = error.errno or errno.EIO
    argument = _BLAME.get(op, {}).get(number)
    meaning = _MEANING.get((op, number)) or _MEANING_OF_ANY.get(number)
    if meaning and op in _BLAME:
        return RequestError(number, f"{argument or op}: {meaning}", argument)
    return as_request_error(error, op, argument)


class Operations:
    """One method for each op of schema.OPS, by its name. They run on several threads at once."""

    def __init__(
        self, core: Any, sessions: SessionTable, devices: DeviceTable, drivers: Registry, watch: Watch,
        upgrade: Callable[[], None] | None = None, pools: PoolTable | None = None,
    ) -> None:  # fmt: skip
        self._pools = pools or PoolTable(core, sessions, pools_per_uid=128)
        self._upgrade = upgrade
        self._core = core
        self._sessions = sessions
        self._devices = devices
        self._drivers = drivers
        self._watch = watch
        self._recorder = Recorder(core, sessions, devices)
        self._window = core.window()
        self._quota_lock = threading.Lock()
        self._methods: dict[str, Callable[[Session, Args], Reply]] = {
            name: getattr(self, f"_op_{name}") for name in schema.OPS
        }

    def allow(self, session: Session, request: schema.Request) -> None:
        """EPERM unless this session may ask this."""
        if request.op.who == schema.ADMIN and not session.admin:
            raise RequestError(errno.EPERM, f"token: {request.name} is for administrators of this gmemd", "token")
        if request.op.who == schema.SESSION and not session.core_id:
            raise RequestError(errno.EPERM, f"token: {request.name} needs a session with memory", "token")

    def execute(self, session: Session, request: schema.Request) -> Reply:
        """(blocks, unless the request is inline)"""
        args = {**schema.check_args(request), "request_id": request.id}
        try:
            return self._methods[request.name](session, args)
        except RequestError:
            raise
        except OSError as error:
            raise _refusal(request.name, error) from None

    def _check_window(self, session: Session, name: str, va: int, size: int) -> None:
        """In the window, or in a region that has moved out of it."""
        base, end = self._window["base"], self._window["base"] + self._window["bytes"]
        if (not base <= va < end or va + size > end) and not self._core.session_covers(session.core_id, va, size):
            raise RequestError(
                errno.EINVAL, f"{name}: 0x{va:x} + {size} is outside the window [0x{base:x}, 0x{end:x})", name
            )

    def _check_fits(self, args: Args) -> None:
        if args["bytes"] > self._window["bytes"]:
            text = f"bytes: {args['bytes']} is more than the window's {self._window['bytes']}"
            raise RequestError(errno.ENOMEM, text, "bytes")

    def _op_ping(self, session: Session, args: Args) -> Reply:
        return {"version": __version__, "pid": os.getpid()}

    def _op_mmap(self, session: Session, args: Args) -> Reply:
        self._check_fits(args)
        region = self._core.mmap(
            session.core_id, args["bytes"], page_bytes=args["page_bytes"], fork=args["fork"], small=args["small"],
            above=args["above"],
        )  # fmt: skip
        return {key: region[key] for key in ("va", "bytes", "offset", "page_bytes", "huge")}

    def _op_adopt(self, session: Session, args: Args) -> Reply:
        region = self._core.adopt(
            session.core_id, args["va"], args["bytes"], page_bytes=args["page_bytes"], fork=args["fork"]
        )
        return {key: region[key] for key in ("va", "bytes", "offset", "page_bytes", "huge")}

    def _op_mmap_commit(self, session: Session, args: Args) -> Reply:
        self._core.mmap_commit(session.core_id, args["va"])
        return {}

    def _op_munmap(self, session: Session, args: Args) -> Reply:
        self._check_window(session, "va", args["va"], args["bytes"])
        self._core.munmap(session.core_id, args["va"], args["bytes"])
        return {}

    def _op_advise(self, session: Session, args: Args) -> Reply:
        # -1 is "no hnode": advice that holds wherever the pages are needs none.
        least = 0 if args["advice"] in ("prefetch", "pinned", "cold", "accessed_by", "not_accessed_by") else -1
        self._devices.check_hnid(args["hnid"], least)
        self._check_window(session, "va", args["va"], args["bytes"])
        self._core.advise(session.core_id, args["hnid"], args["va"], args["bytes"], args["advice"])
        return {}

    def _op_prefetch(self, session: Session, args: Args) -> Reply:
        self._devices.check_hnid(args["hnid"], 0)
        self._check_window(session, "va", args["va"], args["bytes"])
        self._core.prefetch(session.core_id, args["hnid"], args["va"], args["bytes"])
        return {}

    def _op_discard(self, session: Session, args: Args) -> Reply:
        self._check_window(session, "va", args["va"], args["bytes"])
        self._core.discard(session.core_id, args["va"], args["bytes"])
        return {}

    def _op_flush(self, session: Session, args: Args) -> Reply:
        self._check_window(session, "va", args["va"], args["bytes"])
        self._core.flush(session.core_id, args["va"], args["bytes"])
        return {}

    def _op_hmemcpy(self, session: Session, args: Args) -> Reply:
        self._devices.check_hnid(args["hnid"], -1)  # -1: the host, as openEuler's hmemcpy has it
        for name in ("dst", "src"):
            self._check_window(session, name, args[name], args["bytes"])
        self._core.hmemcpy(session.core_id, max(args["hnid"], 0), args["dst"], args["src"], args["bytes"])
        return {}

    def _op_query(self, session: Session, args: Args) -> Reply:
        self._check_window(session, "va", args["va"], args["bytes"])
        capacity = min(schema.QUERY_PAGES_MAX, args["bytes"] // 4096 + 2)
        pages, total = self._core.query(session.core_id, args["va"], args["bytes"], capacity)
        if total > schema.QUERY_PAGES_MAX:
            text = f"bytes: {total} pages; one query answers for at most {schema.QUERY_PAGES_MAX}"
            raise RequestError(errno.EINVAL, text, "bytes")
        return {"page_bytes": 1 << pages[_PAGE_SHIFT_OFFSET], "pages": pages}

    def _op_acquire(self, session: Session, args: Args) -> Reply:
        context = self._sessions.context(session, args["context"])
        self._core.acquire(context.id, args["ranges"], args["write"], args["request_id"])
        return {"hold": args["request_id"]}

    def _op_release(self, session: Session, args: Args) -> Reply:
        context = self._sessions.context(session, args["context"])
        if not args["holds"] and not args["ranges"]:
            raise RequestError(errno.EINVAL, "ranges: nothing is named that is to be released", "ranges")
        if args["holds"]:
            self._core.release_named(context.id, args["holds"])
        if args["ranges"]:
            self._core.release(context.id, args["ranges"])
        return {}

    def _op_pool_create(self, session: Session, args: Args) -> Reply:
        if args["persistent"] and not may_persist(session):
            raise RequestError(errno.EPERM, "persistent: is for administrators of this gmemd", "persistent")
        self._check_fits(args)
        return self._pools.create(session, args)

    def _op_pool_open(self, session: Session, args: Args) -> Reply:
        if args["remote"] is None:
            return self._pools.open(session, args["name"], args["write"], args["uid"])
        if args["write"]:
            raise RequestError(errno.EPERM, "write: what is published on servers is not written to any more", "write")
        return self._pools.open_shared(session, args["name"], args["remote"], args["uid"])

    def _op_pool_unlink(self, session: Session, args: Args) -> Reply:
        if args["remote"] is None:
            self._pools.unlink(session, args["name"])
        else:
            self._pools.shared().unlink(session, args["name"], args["remote"])
        return {}

    def _op_pool_publish(self, session: Session, args: Args) -> Reply:
        return self._pools.publish(session, args["name"], args["remote"])

    def _op_pools(self, session: Session, args: Args) -> Reply:
        if args["remote"] is None:
            return {"pools": self._pools.describe(session)}
        return {"pools": self._pools.shared().published_on(session, args["remote"])}

    def _op_devices(self, session: Session, args: Args) -> Reply:
        return {"devices": self._devices.describe_all(session.admin)}

    def _op_drivers(self, session: Session, args: Args) -> Reply:
        found = self._drivers.names()
        return {"drivers": [{"name": d.name, "builtin": d.builtin, "origin": d.origin} for d in found]}

    def _op_attach(self, session: Session, args: Args) -> Reply:
        return {"hnid": self._devices.attach(args["driver"], args["name"], args["config"])}

    def _op_detach(self, session: Session, args: Args) -> Reply:
        open_pools = self._pools.let_go(args["name"])
        if open_pools and not args["force"]:
            text = f"name: pools of {args['name']} are open here: {', '.join(open_pools)}"
            raise RequestError(errno.EBUSY, text, "name")
        self._devices.detach(args["name"], args["force"])
        return {}

    def _op_limit(self, session: Session, args: Args) -> Reply:
        self._core.limit(self._devices.hnid_of(args["name"]), args["bytes"])
        self._devices.note_setting("limit", [args["name"]], args)
        return {}

    def _op_upgrade(self, session: Session, args: Args) -> Reply:
        if self._upgrade is None:
            raise RequestError(errno.EOPNOTSUPP, "this gmemd can't be started again")
        self._upgrade()
        return {}

    def _op_quota(self, session: Session, args: Args) -> Reply:
        """A session may lower its own; everything else is an administrator's."""
        wanted, uid = args["session"], args["uid"]
        if wanted is None and uid is None:
            wanted = session.core_id
        if (wanted is None) == (uid is None) or not (wanted or uid is not None):
            raise RequestError(errno.EINVAL, "session: name a session or a uid, one of them", "session")
        hnid = self._devices.hnid_of(args["name"])
        with self._quota_lock:  # between the look at a quota and its change
            if not session.admin:
                self._check_lowers_own(session, wanted, hnid, args["bytes"])
            if uid is not None:
                self._core.quota_uid(uid, hnid, args["bytes"])
            else:
                self._core.quota_session(wanted, hnid, args["bytes"])
        whose = {"session": wanted, "uid": uid}
        self._devices.note_setting("quota", [args["name"], wanted or 0, uid or 0], {**args, **whose})
        return {}

    def _check_lowers_own(self, session: Session, wanted: int | None, hnid: int, size: int) -> None:
        if wanted != session.core_id or not session.core_id:
            raise RequestError(errno.EPERM, "session: quotas of others are for administrators of this gmemd", "session")
        quota = self._core.session_stats(session.core_id)["quota_bytes"].get(hnid, 0)
        if quota and not 0 < size <= quota:
            raise RequestError(errno.EPERM, f"bytes: this session's quota is {quota}; it can only be lowered", "bytes")

    def _op_contexts(self, session: Session, args: Args) -> Reply:
        contexts = self._sessions.contexts_of(session)
        return {"contexts": [{"context": c.id, "hnid": c.hnid, "pid": c.pid} for c in contexts]}

    def _op_context_overlay(self, session: Session, args: Args) -> Reply:
        context = self._sessions.context(session, args["context"])
        self._core.context_overlay(context.id, args["va"], args["bytes"])
        return {}

    def _op_context_close(self, session: Session, args: Args) -> Reply:
        self._sessions.end_context(self._sessions.context(session, args["context"]), "closed by its session")
        return {}

    def _visible(self, session: Session) -> list[Session]:
        """Sessions that this one may hear of: those of its own user, all for an administrator."""
        return [other for other in self._sessions.live() if session.admin or other.uid == session.uid]

    def _op_sessions(self, session: Session, args: Args) -> Reply:
        rows = []
        for other in self._visible(session):
            try:
                stats = self._core.session_stats(other.core_id)
            except OSError:
                continue  # ended between the list and the look
            # Keys of a map are strings on the wire, as msgpack's decoders want them by default.
            for key in ("resident_bytes", "quota_bytes"):
                stats[key] = {str(hnid): size for hnid, size in stats.get(key, {}).items()}
            rows.append({**stats, "session": other.core_id, "uid": other.uid, "pid": other.pid, "name": other.name})
        return {"sessions": rows}

    def _op_stats(self, session: Session, args: Args) -> Reply:
        stuck = self._watch.stuck()
        stats = {**self._core.stats(), "threads_stuck": len(stuck)}
        if not session.admin:  # whom they serve is for whoever looks after this gmemd
            stuck = []
        return {"stats": stats, "hnodes": self._devices.describe_all(session.admin), "stuck": stuck}

    def _op_map(self, session: Session, args: Args) -> Reply:
        wanted = args["session"]
        visible = {other.core_id: other for other in self._visible(session)}
        if wanted is None and session.core_id:
            wanted = session.core_id
        if wanted is not None and wanted not in visible:
            raise RequestError(errno.ENOENT, f"session: there is no session {wanted} of yours", "session")
        regions: list[Reply] = []
        total = 0
        for core_id in [wanted] if wanted is not None else visible:
            try:
                found = self._core.regions(core_id)
            except OSError:
                continue
            total += len(found)
            regions.extend(_region(core_id, region) for region in found[: args["limit"] - len(regions)])
        return {"regions": regions, "total": total}

    def _op_trace_start(self, session: Session, args: Args) -> Reply:
        return self._recorder.start(session, args["session"], args["device"], args["buffer_bytes"])

    def _op_trace_read(self, session: Session, args: Args) -> Reply:
        return self._recorder.read(session, args["position"])

    def _op_trace_stop(self, session: Session, args: Args) -> Reply:
        self._recorder.stop(session)
        return {}

    def _op_close(self, session: Session, args: Args) -> Reply:
        self._sessions.end(session, "closed by the client")
        return {}


def _region(session_id: int, region: dict[str, Any]) -> Reply:
    keys = ("va", "bytes", "page_bytes", "huge", "fork")
    return {"session": session_id, **{key: region[key] for key in keys}}
