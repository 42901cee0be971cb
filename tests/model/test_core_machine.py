# SPDX-License-Identifier: Apache-2.0
"""A state machine over the C core, with plain NumPy as the oracle.

Processes map, touch and unmap memory, on the CPU and in device contexts, alone and at the same time; pages are
prefetched, evicted, advised, copied, discarded; processes fork and end; devices come, go and are lost; and the daemon
is killed between any two steps, at any crash point, also of its recovery. Every byte is what it must be, wherever it is
read; nobody waits for ever; what is used is what is there; and at the end nothing is left.

`make model SEED=N` runs more of it, with that seed, and on the mutants."""

import contextlib
import errno
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import event as tell
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

sys.path.insert(0, str(Path(__file__).resolve().parent))
from world import CORE, PATIENCE_S, Daemon, Died, Party, crash_points, words  # noqa: E402

EXAMPLES = int(os.environ.get("GMEM_MODEL_EXAMPLES", "30"))
QUIET_S = min(5.0, PATIENCE_S)  # moves in the background are over by then
STEPS = int(os.environ.get("GMEM_MODEL_STEPS", "30"))
PAGES = 6
SIZES = (4096, 65536)
HOST_LIMIT, HOST_MOST = 2 << 20, 4 << 20
GPU_PAGES = 320 << 10  # fewer pages than one region of the larger size has
DEVICES = {
    1: ("simgpu", "simgpu0", {"capacity": str(GPU_PAGES)}),
    2: ("simgpu", "simgpu1", {"capacity": str(GPU_PAGES)}),
    3: ("zstd", "squeezed", {"capacity": "64M"}),
}
GPUS, TIER = (1, 2), 3
PLACES = (0, *GPUS)
ADVICE = ("read_mostly", "no_read_mostly", "preferred", "accessed_by", "not_accessed_by", "cold", "unpinned")
LANE_STRIDE = 512  # words that are written at the same time by several are in lanes: one for each hnode
REGIONS_MAX = 12
SESSIONS_MAX = 3
NOMAP, RESIDENT, BUSY, POISONED = range(4)
PAGE = np.dtype([("state", "u1"), ("writer", "i1"), ("valid", "<u2"), ("flags", "u1"), ("shift", "u1"), ("why", "<u2")])
POINTS = crash_points()
NOTHING = np.zeros(PAGES, bool)
UNMAPPING = ("REGION_CUT", "RECORD_PUBLISHED", "RELEASE", "OBJECT_FREE")
RECOVERY = [point for point in POINTS if point.startswith("RECOVER")]

numbers = st.integers(0, 1 << 20)
values = st.integers(1, 255)
parts = st.tuples(st.integers(0, PAGES * 16 - 1), st.integers(1, PAGES * 16))


@pytest.fixture(scope="module", autouse=True)
def _the_kernel_has_it():
    core = CORE.Core(hugepages=False)
    features = core.features()
    core.close()
    if not (features["uffd_device"] and features["event_fork"] and features["continue_wp"] and features["poison"]):
        pytest.skip("needs /dev/userfaultfd, EVENT_FORK and Linux 6.6")


class Region:
    """What one mapping must hold. Forked children map the same."""

    def __init__(self, va, size, page, inherit):
        self.va, self.size, self.page, self.inherit = va, size, page, inherit
        self.data = np.zeros(size, np.uint8)
        self.lost = np.zeros(PAGES, bool)

    def cut(self, part):
        """Begins and ends inside pages."""
        unit = self.page // 16
        first, count = part
        return slice(first * unit + 3, min(first + count, PAGES * 16) * unit - 2)

    def pages_of(self, where):
        return slice(where.start // self.page, (where.stop - 1) // self.page + 1)


class Session:
    def __init__(self, number, cpu, forked=False):
        self.number, self.cpu, self.forked = number, cpu, forked
        self.contexts = {}  # hnid: Party
        self.mapped = {}  # Region: which of its pages


class Launch:
    """Words of a lane that a party is writing."""

    def __init__(self, party, region, where, value):
        self.party, self.region, self.value = party, region, value
        self.start = -(-where.start // LANE_STRIDE) * LANE_STRIDE + 8 * party.hnid
        self.count = (where.stop - self.start - 8) // LANE_STRIDE + 1

    def apply(self, whole):
        words(whole[self.start :], self.count, LANE_STRIDE)[:] = self.value


class Copied:
    """What a copy that was given up may have brought, or not, byte by byte."""

    def __init__(self, start, data):
        self.start, self.data = start, data

    def apply(self, whole):
        whole[self.start : self.start + len(self.data)] = self.data


def event(what):
    with contextlib.suppress(InvalidArgument):  # it is driven by hand
        tell(what)


class CoreMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        handle, self.crash_file = tempfile.mkstemp(prefix="gmem-model-")
        os.close(handle)
        self.sessions, self.launches = [], []
        self.limit = HOST_LIMIT
        self.broken = False
        self.daemon = Daemon({"hugepages": False, "host_limit_bytes": HOST_MOST}, dict(DEVICES), self.crash_file)
        self.daemon.live()
        self.settings_again()

    def ensure(self, holds, what):
        if not holds:
            self.broken = True
            raise AssertionError(what)

    # ---- the daemon, whichever life it is in ----

    def call(self, op, *args, fds=(), again=()):
        """again: errors that say that it was done already, should it have been asked before."""
        asked = 0
        while True:
            try:
                return self.daemon.call(op, *args, fds=fds)
            except Died:
                asked += 1
                self.revive()
            except OSError as error:
                if asked and error.errno in again:
                    return None
                raise
            except AssertionError:
                self.broken = True
                raise

    def revive(self):
        """It has died. Its successor may die at what it is armed with, too; the one behind that does not."""
        for _ in range(3):
            self.daemon.bury()
            with contextlib.suppress(Died):
                self.daemon.live()
                break
            event("killed in its recovery")
            self.daemon.arm()
        with contextlib.suppress(Died):  # then whoever asks next finds out
            self.settings_again()
            known = {session.number for session in self.sessions}
            for number in self.daemon.call("session_ids"):
                if number not in known:
                    self.daemon.call("session_disown", number)

    def settings_again(self):
        if TIER in self.daemon.devices:
            self.daemon.call("tier_rank", TIER, 0)
        self.daemon.call("limit", 0, self.limit)

    def wait(self, party):
        """For the end of what it does, however often the daemon dies meanwhile."""
        deadline = time.monotonic() + PATIENCE_S
        while not party.poll(0.001):
            self.daemon.collect()
            if self.daemon.has_died():
                self.revive()
                deadline = time.monotonic() + PATIENCE_S
            self.ensure(time.monotonic() < deadline, f"blocked for ever: {party.doing} on hnode {party.hnid}")
        return party.finish()

    def act(self, party, name, *args, fds=()):
        self.join([launch for launch in self.launches if launch.party is party])
        party.begin(name, *args, fds=fds)
        return self.wait(party)

    def join(self, launches):
        for launch in launches:
            self.launches.remove(launch)
            self.wait(launch.party)
            launch.apply(launch.region.data)

    def settle(self, region):
        """Nobody is at it."""
        self.join([launch for launch in self.launches if launch.region is region])

    # ---- who and what there is ----

    def session(self, number):
        return self.sessions[number % len(self.sessions)]

    def place(self, number, part=None, among=None):
        """(session, region, where): some of a region, if there is one with that much mapped and not lost."""
        found = []
        for session in self.sessions if among is None else among:
            for region, mapped in session.mapped.items():
                where = region.cut(part) if part else slice(0, region.size)
                pages = region.pages_of(where)
                if mapped[pages].all() and not region.lost[pages].any():
                    found.append((session, region, where))
        return found[number % len(found)] if found else None

    def regions(self):
        return {region for session in self.sessions for region in session.mapped}

    def room(self):
        """What could be held in all."""
        return 16 << 20 if TIER in self.daemon.devices else HOST_LIMIT // 2

    # ---- processes ----

    @initialize()
    def first(self):
        self.join_session()
        for page in SIZES:
            self.map_one(self.sessions[0], page, "share")
        self.open_one(self.sessions[0], GPUS[0])

    def join_session(self):
        """A handshake. A daemon that dies over it knows nothing of whom it had not answered: who asked comes again."""
        while True:
            party = Party(0).start()
            try:
                number = self.daemon.call("session_create", 0, party.pid)
                party.take(self.daemon.window, self.daemon.call("session_files", number), self.daemon.fds)
                self.greet(party, "attach", number)
            except Died:
                party.end()
                self.revive()
                continue
            self.sessions.append(Session(number, party))
            return

    def greet(self, party, op, *args):
        party.begin("uffd")
        party.finish()
        try:
            return self.daemon.call(op, *args, party.pid, fds=party.fds)
        finally:
            os.close(party.fds[0])

    @precondition(lambda self: len(self.sessions) < SESSIONS_MAX)
    @rule()
    def another_session(self):
        self.join_session()

    @rule(number=numbers, hnid=st.sampled_from(GPUS))
    def open_context(self, number, hnid):
        session = self.session(number)
        if hnid not in session.contexts and hnid in self.daemon.devices and not session.forked:
            self.open_one(session, hnid)

    def open_one(self, session, hnid):
        while True:
            party = Party(hnid).start()
            try:
                files = self.daemon.call("context_files", session.number, hnid)
                party.take(self.daemon.window, files, self.daemon.fds)
                party.context = self.greet(party, "attach_context", session.number, hnid)
            except Died:
                party.end()
                self.revive()
                continue
            session.contexts[hnid] = party
            return

    @precondition(lambda self: len(self.sessions) < SESSIONS_MAX)
    @rule(number=numbers)
    def fork(self, number):
        parent = self.session(number)
        child = Party(0)
        child.sock, theirs = child.pair()
        child.result = parent.cpu.result
        child.pid = self.act(parent.cpu, "fork", fds=[theirs.fileno()])
        theirs.close()
        session = Session(0, child, forked=True)
        session.mapped = {r: pages.copy() for r, pages in parent.mapped.items() if r.inherit}
        try:
            session.number, stored = self.call("session_fork", parent.number, 0, child.pid)
            child.take(self.daemon.window, self.daemon.call("session_files", session.number), self.daemon.fds)
            if not stored:
                event("a forked child comes by itself")
                self.map_again(session)
        except Died:
            child.end()
            self.revive()
            return
        self.sessions.append(session)

    def map_again(self, session):
        """Its userfaultfd was lost between two lives of the daemon: what it has inherited is not watched."""
        child = session.cpu
        for region in session.mapped:
            child.begin("unmap", region.va, region.size)
            child.finish()
        for known in self.daemon.call("region_files", session.number):
            child.begin("map", known["va"], known["bytes"], known["offset"], True, fds=[self.daemon.fds.pop(0)])
            child.finish()
        self.greet(child, "attach", session.number)

    @precondition(lambda self: len(self.sessions) > 1)
    @rule(number=numbers, orderly=st.booleans())
    def end_session(self, number, orderly):
        session = self.session(number)
        parties = [session.cpu, *session.contexts.values()]
        if orderly:
            self.join([launch for launch in self.launches if launch.party in parties])
        self.sessions.remove(session)
        for party in parties:
            party.end()
        self.call("session_destroy", session.number, again=(errno.ENOENT,))
        self.look_who_is_left(parties)

    @rule(number=numbers, hnid=st.sampled_from(GPUS))
    def kill_context(self, number, hnid):
        """The process, in the middle of what it does. Its device is still there, and what it has written."""
        session = self.session(number)
        party = session.contexts.pop(hnid, None)
        if party is not None:
            party.end()
            self.call("context_detach", party.context, again=(errno.ENOENT,))
            self.look_who_is_left([party])

    def look_who_is_left(self, ended):
        """What ended parties were writing: each word is there, or it is not."""
        for launch in [launch for launch in self.launches if launch.party in ended]:
            self.launches.remove(launch)
            reader = next((s for s in self.sessions if s.mapped.get(launch.region, NOTHING).any()), None)
            if reader is None:
                continue
            for page in range(PAGES):
                where = slice(page * launch.region.page, (page + 1) * launch.region.page)
                if reader.mapped[launch.region][page] and not launch.region.lost[page]:
                    launch.region.data[where] = self.read(reader.cpu, launch.region, where, [launch])

    # ---- memory ----

    @rule(number=numbers, page=st.sampled_from(SIZES), fork=st.sampled_from(("share", "share", "none")))
    def map(self, number, page, fork):
        if sum(r.size for r in self.regions()) + PAGES * page <= self.room() and len(self.regions()) < REGIONS_MAX:
            self.map_one(self.session(number), page, fork)

    def map_one(self, session, page, fork):
        known = self.call("mmap", session.number, PAGES * page, page, fork)
        assert known["bytes"] == PAGES * page and known["page_bytes"] == page
        self.act(session.cpu, "map", known["va"], known["bytes"], known["offset"], fork == "share")
        while True:
            try:
                self.daemon.call("mmap_commit", session.number, known["va"])
                break
            except Died:
                self.revive()
            except OSError as error:  # it had not been written down, or is committed already
                self.ensure(error.errno in (errno.ENOENT, errno.EINVAL), f"mmap_commit: {error}")
                break
        region = Region(known["va"], known["bytes"], page, fork == "share")
        session.mapped[region] = np.ones(PAGES, bool)

    @rule(number=numbers, first=st.integers(0, PAGES - 1), count=st.integers(1, PAGES), told=st.booleans(),
          killed=st.sampled_from(("", "", *UNMAPPING)))  # fmt: skip
    def unmap(self, number, first, count, told, killed):
        """told: the request comes, too, as of a library; else only the kernel says so. killed: over it, where."""
        session = self.session(number)
        if not session.mapped:
            return
        region = list(session.mapped)[number // 7 % len(session.mapped)]
        self.settle(region)
        count = min(count, PAGES - first)
        va, size = region.va + first * region.page, count * region.page
        if killed:
            self.crash_and_arm(killed, 1)
        assert self.act(session.cpu, "unmap", va, size) == 0
        if told:
            with contextlib.suppress(OSError):  # the event was quicker
                self.call("munmap", session.number, va, size)
        session.mapped[region][first : first + count] = False
        if not session.mapped[region].any():
            del session.mapped[region]
        if not any(s.mapped.get(region, NOTHING)[first : first + count].any() for s in self.sessions):
            region.lost[first : first + count] = False

    # ---- touching ----

    def party(self, session, number):
        return [session.cpu, *session.contexts.values()][number % (1 + len(session.contexts))]

    @rule(number=numbers, part=parts, value=values, who=numbers)
    def write(self, number, part, value, who):
        at = self.place(number, part)
        if at:
            session, region, where = at
            self.settle(region)
            self.fill(self.party(session, who), region, where, value)

    def fill(self, party, region, where, value):
        count = (where.stop - where.start - 8) // 24 + 1
        self.act(party, "fill", region.va + where.start, count, 24, value)
        words(region.data[where], count, 24)[:] = value

    @rule(number=numbers, part=parts, value=values, who=numbers, other=numbers, times=st.integers(2, 4))
    def to_and_fro(self, number, part, value, who, other, times):
        """One writes what another has read, over and over: whoever still may write, or read, is found out."""
        at = self.place(number, part, [session for session in self.sessions if session.contexts])
        if not at:
            return
        session, region, where = at
        self.settle(region)
        writer, reader = self.party(session, who), self.party(session, who + 1 + other % len(session.contexts))
        for n in range(times):
            self.fill(writer, region, where, value + n)
            self.read(reader, region, where, [])

    @rule(number=numbers, part=parts, value=values, who=numbers)
    def launch(self, number, part, value, who):
        """It goes on while other things happen. Each writes words of its own, in pages that are everybody's."""
        at = self.place(number, part)
        party = at and self.party(at[0], who)
        if not party or any(launch.party is party for launch in self.launches):
            return
        session, region, where = at
        if any(other.region is region and other.party.hnid == party.hnid for other in self.launches):
            return
        launch = Launch(party, region, where, value)
        if launch.count > 0:
            party.begin("fill", region.va + launch.start, launch.count, LANE_STRIDE, value)
            self.launches.append(launch)

    @precondition(lambda self: self.launches)
    @rule()
    def wait_for_launches(self):
        self.join(list(self.launches))

    @rule(number=numbers, part=parts, who=numbers)
    def look(self, number, part, who):
        at = self.place(number, part)
        if at:
            session, region, where = at
            launches = [launch for launch in self.launches if launch.region is region]
            self.read(self.party(session, who), region, where, launches)

    def read(self, party, region, where, launches):
        """What is there, and is either what it was or what is being written."""
        self.join([launch for launch in self.launches if launch.party is party])
        self.act(party, "read", region.va + where.start, where.stop - where.start)
        got = np.frombuffer(party.result, np.uint8)[: where.stop - where.start].copy()
        good = got == region.data[where]
        for launch in launches:
            written = region.data.copy()
            launch.apply(written)
            good |= got == written[where]
        if not good.all():
            first = int(np.flatnonzero(~good)[0])
            told = f"first at {where.start + first}: {got[first]} instead of {region.data[where][first]}"
            place = f"hnode {party.hnid}, region {region.va:#x} of {region.page}"
            self.ensure(False, f"{place}: {(~good).sum()} bytes wrong, {told}")
        return got

    @precondition(lambda self: any(region.lost.any() for region in self.regions()))
    @rule(number=numbers)
    def touch_what_is_lost(self, number):
        session = self.session(number)
        for region, mapped in session.mapped.items():
            for page in np.flatnonzero(region.lost & mapped):
                result = self.act(session.cpu, "probe", region.va + int(page) * region.page)
                self.ensure(result == errno.EFAULT, f"a lost page was read: {result}")

    # ---- requests ----

    @rule(number=numbers, first=st.integers(0, PAGES - 1), count=st.integers(1, 2), hnid=st.sampled_from(PLACES))
    def prefetch(self, number, first, count, hnid):
        at = self.place(number, (first * 16, min(count, PAGES - first) * 16))
        if not at or (hnid and hnid not in self.daemon.devices):
            return
        session, region, where = at
        self.settle(region)
        pages = region.pages_of(where)
        try:
            self.call("prefetch", session.number, hnid, region.va + pages.start * region.page,
                      (pages.stop - pages.start) * region.page)  # fmt: skip
        except OSError as error:
            self.ensure(error.errno in (errno.ENOMEM, errno.EAGAIN) and self.launches, f"prefetch: {error}")
            return
        if not self.launches:
            last = self.query(session, region, slice(pages.stop - 1, pages.stop))
            self.ensure(last["valid"][0] >> hnid & 1, f"prefetched to {hnid}, and is not there: {last}")

    @rule(number=numbers, part=parts)
    def discard(self, number, part):
        session = self.session(number)
        if not session.mapped:
            return
        region = list(session.mapped)[number // 7 % len(session.mapped)]
        where = region.cut(part)
        first, last = -(-where.start // region.page), where.stop // region.page
        if not session.mapped[region][region.pages_of(where)].all():
            return
        self.settle(region)
        whole = range(first, last)
        gone = next((page for page in whole if region.lost[page]), None)
        try:
            self.call("discard", session.number, region.va + where.start, where.stop - where.start)
            self.ensure(gone is None, "what was lost can't be had back")
        except OSError as error:  # page by page, to the first that was lost
            self.ensure(error.errno == errno.EIO and gone is not None, f"discard: {error}")
        for page in range(first, last if gone is None else gone):
            region.data[page * region.page : (page + 1) * region.page] = 0

    @rule(number=numbers, part=parts, advice=st.sampled_from(ADVICE), hnid=st.sampled_from(PLACES))
    def advise(self, number, part, advice, hnid):
        at = self.place(number, part)
        if not at or (hnid and hnid not in self.daemon.devices):
            return
        session, region, where = at
        self.call("advise", session.number, hnid, region.va + where.start, where.stop - where.start, advice)

    @rule(number=numbers, page=st.integers(0, PAGES - 1), hnid=st.sampled_from(PLACES))
    def pin_and_unpin(self, number, page, hnid):
        at = self.place(number, (page * 16, 16))
        if not at or (hnid and hnid not in self.daemon.devices):
            return
        session, region, _ = at
        va = region.va + page * region.page
        try:
            self.call("advise", session.number, hnid, va, region.page, "pinned")
        except OSError as error:
            self.ensure(error.errno in (errno.ENOMEM, errno.EAGAIN, errno.EBUSY), f"pinned: {error}")
        self.call("advise", session.number, hnid, va, region.page, "unpinned")

    @rule(dst=numbers, src=numbers, to=st.integers(0, 200000), start=st.integers(0, 200000),
          size=st.integers(1, 150000), hnid=st.sampled_from(PLACES))  # fmt: skip
    def hmemcpy(self, dst, src, to, start, size, hnid):
        into = self.place(dst)
        out_of = into and self.place(src, None, [into[0]])
        if not into or out_of[1] is into[1] or (hnid and hnid not in self.daemon.devices):
            return
        session, target, source = into[0], into[1], out_of[1]
        to, start = to % target.size, start % source.size
        size = min(size, target.size - to, source.size - start)
        self.settle(target)
        self.settle(source)
        try:
            self.call("hmemcpy", session.number, hnid, target.va + to, source.va + start, size)
        except OSError as error:
            self.ensure(error.errno in (errno.ENOMEM, errno.EAGAIN), f"hmemcpy: {error}")
            event("hmemcpy has no room")
            copied = Copied(to, source.data[start : start + size])
            target.data[to : to + size] = self.read(session.cpu, target, slice(to, to + size), [copied])
            return
        target.data[to : to + size] = source.data[start : start + size]

    @rule(number=numbers, page=st.integers(0, PAGES - 2), value=values, who=numbers)
    def acquire(self, number, page, value, who):
        """As of a device that can't replay a fault: what is acquired is there, and writable, until the release."""
        at = self.place(number, (page * 16, 32), [session for session in self.sessions if session.contexts])
        if not at:
            return
        session, region, where = at
        hnid, party = list(session.contexts.items())[who % len(session.contexts)]
        self.settle(region)
        self.join([launch for launch in self.launches if launch.party is party])
        ranges = [(region.va + page * region.page, 2 * region.page)]
        try:
            self.call("acquire", party.context, ranges, True)
        except OSError as error:
            self.ensure(error.errno in (errno.ENOMEM, errno.EAGAIN, errno.EBUSY), f"acquire: {error}")
            return
        held = self.query(session, region, slice(page, page + 2))
        self.ensure((held["writer"] == hnid).all(), f"acquired by {hnid}: {held}")
        self.act(party, "fill", region.va + where.start, 10, 64, value)
        words(region.data[where], 10, 64)[:] = value
        self.call("release", party.context, ranges, again=(errno.ENOENT, errno.EINVAL))

    # ---- room ----

    @rule(size=st.sampled_from((HOST_LIMIT, 3 << 20, HOST_MOST)))
    def limit_host(self, size):
        if TIER in self.daemon.devices:
            self.call("limit", 0, size)
            self.limit = size

    @rule(hnid=st.sampled_from(GPUS))
    def detach(self, hnid):
        """In order: what it had comes home; the processes that computed on it are ended."""
        if hnid not in self.daemon.devices:
            return
        users = [s for s in self.sessions if hnid in s.contexts]
        parties = [s.contexts[hnid] for s in users]
        self.join([launch for launch in self.launches if launch.party in parties])
        self.call("device_detach", hnid, True, again=(errno.ENOENT, errno.ENODEV))
        del self.daemon.devices[hnid]
        self.see_them_ended(users, hnid)

    def see_them_ended(self, users, hnid):
        for session in users:
            party = session.contexts.pop(hnid)
            self.ensure(party.ends(), f"a context on hnode {hnid}, which is gone, goes on")
            party.end()

    @precondition(lambda self: len(self.daemon.devices) < len(DEVICES))
    @rule()
    def attach_again(self):
        hnid = next(h for h in DEVICES if h not in self.daemon.devices)
        self.call("attach_device", hnid, DEVICES[hnid])
        self.daemon.devices[hnid] = DEVICES[hnid]
        if hnid == TIER:
            self.call("tier_rank", TIER, 0)

    # ---- the end of a life, and of devices with it ----

    @rule(point=st.sampled_from(("", *POINTS)), passes=st.integers(1, 12))
    def crash(self, point, passes):
        """Now; and its successor when it comes by that point, in its recovery or later."""
        self.crash_and_arm(point, passes)

    def crash_and_arm(self, point, passes):
        self.daemon.arm(point, passes)
        self.daemon.kill()
        self.revive()
        self.daemon.arm()

    @rule(point=st.sampled_from(("", *RECOVERY)), lost=st.sampled_from((1, 2, TIER)))
    def crash_and_lose(self, point, lost):
        """A device does not come back: what only it had is lost, and said to be; all else is there."""
        if lost not in self.daemon.devices or (lost == TIER and sum(r.size for r in self.regions()) > HOST_LIMIT // 2):
            return
        self.join(list(self.launches))
        before = self.query_all(still=True)
        self.daemon.arm(point)
        users = [s for s in self.sessions if lost in s.contexts]
        self.daemon.kill()
        del self.daemon.devices[lost]
        self.revive()
        self.daemon.arm()
        self.see_them_ended(users, lost)
        after = self.query_all()
        for region, pages in before.items():
            gone = (pages["valid"] == 1 << lost) & (pages["state"] == RESIDENT)
            poisoned = after[region]["state"] == POISONED
            self.ensure((poisoned == (gone | region.lost)).all(), f"lost with {lost}: {pages}, {after[region]}")
            region.lost |= gone
            if gone.any():
                event("pages lost with a device")
            for page in np.flatnonzero(gone):
                region.data[page * region.page : (page + 1) * region.page] = 0  # whatever comes, it begins with zeros

    # ---- what always holds ----

    def query(self, session, region, pages):
        raw, total = self.call("query", session.number, region.va + pages.start * region.page,
                               (pages.stop - pages.start) * region.page, PAGES)  # fmt: skip
        assert total == pages.stop - pages.start
        return np.frombuffer(raw, PAGE)

    def query_all(self, still=False):
        """Every region's pages; those that nobody maps are nowhere. still: when nothing changes any more."""
        while True:
            found = {}
            for region in self.regions():
                pages = np.zeros(PAGES, PAGE)
                pages["writer"] = -1
                for session in self.sessions:
                    for page in np.flatnonzero(session.mapped.get(region, NOTHING)):
                        pages[page] = self.query(session, region, slice(int(page), int(page) + 1))[0]
                found[region] = pages
            if not still:
                return found
            time.sleep(0.003)
            again = self.query_all()
            if all((again[region] == found[region]).all() for region in found):
                return found

    @invariant()
    def books(self):
        if not self.sessions or self.broken:
            return
        deadline = time.monotonic() + QUIET_S
        while True:
            problem = self.audit()
            if not problem:
                return
            self.ensure(time.monotonic() < deadline, problem)
            time.sleep(0.002)  # moves in the background are under way

    def audit(self):
        used = dict.fromkeys((0, *DEVICES), 0)
        for region, pages in self.query_all().items():
            busy = {launch.region for launch in self.launches}
            for index, page in enumerate(pages):
                wrong = self.audit_page(region, index, page, region in busy)
                if wrong:
                    return f"region {region.va:#x}, page {index}, {page}: {wrong}"
                for hnid in used:
                    used[hnid] += region.page * (int(page["valid"]) >> hnid & 1)
        for hnode in self.call("hnodes"):
            if hnode["used_bytes"] > hnode["capacity_bytes"]:
                return f"more than there is: {hnode}"
            if not self.launches and hnode["used_bytes"] != used[hnode["hnid"]]:
                return f"{used[hnode['hnid']]} bytes of pages: {hnode}"
        return ""

    def audit_page(self, region, index, page, busy):
        state, writer, valid = int(page["state"]), int(page["writer"]), int(page["valid"])
        if state == BUSY:
            return "busy"
        if (state == POISONED) != bool(region.lost[index]):
            return "lost" if state == POISONED else "what was lost is back"
        if writer >= 0 and valid != 1 << writer:
            return "a writer, and other copies"
        if (state == RESIDENT) != bool(valid):
            return "copies, and not resident, or none"
        content = region.data[index * region.page : (index + 1) * region.page]
        if state == NOMAP and page["shift"] and not busy and content.any():
            return "its content has gone"
        return ""

    # ---- the end ----

    def teardown(self):
        try:
            if self.sessions and not self.broken:
                self.final()
        finally:
            for session in self.sessions:
                for party in (session.cpu, *session.contexts.values()):
                    party.end()
            self.daemon.end()
            os.unlink(self.crash_file)

    def final(self):
        """All that was written is read; then everything goes, in order, and nothing is left."""
        self.join(list(self.launches))
        for session in self.sessions:
            for region, mapped in session.mapped.items():
                for page in np.flatnonzero(mapped & ~region.lost):
                    self.read(session.cpu, region, slice(int(page) * region.page, (int(page) + 1) * region.page), [])
        while self.sessions:
            session = self.sessions.pop()
            for party in (session.cpu, *session.contexts.values()):
                party.end()
            self.call("session_destroy", session.number, again=(errno.ENOENT,))
        deadline = time.monotonic() + PATIENCE_S
        while left := self.leftovers():
            self.ensure(time.monotonic() < deadline, f"left over: {left}")
            time.sleep(0.002)
        self.call("close")
        os.waitpid(self.daemon.pid, 0)
        self.daemon.collect()
        self.daemon.pid = 0
        self.ensure(not self.daemon.kept, f"still held: {self.daemon.kept}")
        event(f"kills: {min(self.daemon.kills, 5)}")

    def leftovers(self):
        self.call("reap")
        stats = self.call("stats")
        left = {name: stats[name] for name in ("sessions", "contexts", "regions", "objects") if stats[name]}
        left.update({h["name"]: h["used_bytes"] for h in self.call("hnodes") if h["used_bytes"]})
        return left


PHASES = [Phase.generate] if os.environ.get("GMEM_MODEL_NO_SHRINK") else [Phase.generate, Phase.shrink]
CoreMachine.TestCase.settings = settings(
    max_examples=EXAMPLES, stateful_step_count=STEPS, deadline=None, derandomize="GMEM_MODEL_SEED" not in os.environ,
    database=None, phases=PHASES, suppress_health_check=list(HealthCheck), print_blob=True,
)  # fmt: skip
TestCore = CoreMachine.TestCase
