# SPDX-License-Identifier: Apache-2.0
"""Names, owners and modes of pools, over a core that only keeps books."""

import errno
import itertools

import pytest

from gmemd.errors import RequestError
from gmemd.notes import Notes
from gmemd.pools import READ, WRITE, Pool, PoolTable
from gmemd.sessions import SessionTable

ALICE, BOB, CAROL = 1001, 1002, 1003


class Rig:
    def __init__(self, core, notes=None, limit=4):
        self.core = core
        self.sessions = SessionTable(core, sessions_per_uid=100, contexts_per_session=8, publish=lambda *_: None,
                                     notes=notes)  # fmt: skip
        self.pools = PoolTable(core, self.sessions, pools_per_uid=limit, notes=notes)

    def session(self, uid=ALICE, gids=None):
        core_id = self.core.session_create(uid, 1)
        session = self.sessions.open(core_id, uid, 1, uid == 0, lambda reason: None, gids or (uid,))
        self.sessions.note(session, True)
        return session

    def create(self, session, name="table", mode=0o600, persistent=False, size=8192):
        args = {"name": name, "bytes": size, "mode": mode, "page_bytes": 0, "small": False, "persistent": persistent}
        return self.pools.create(session, args)

    def names(self, session):
        return [row["name"] for row in self.pools.describe(session)]


@pytest.fixture
def rig(fake_core):
    return Rig(fake_core)


def refused(call, *args, **keywords):
    with pytest.raises(RequestError) as caught:
        call(*args, **keywords)
    return caught.value.errno, caught.value.argument


def test_made_opened_unlinked(rig):
    alice = rig.session()
    made = rig.create(alice)
    assert made["read_only"] is False and made["sealed"] is False and made["mapped"] is False
    found = rig.pools.open(rig.session(), "table", False, None)
    assert (found["va"], found["bytes"], found["pool"]) == (made["va"], made["bytes"], made["pool"])
    assert found["read_only"] is True
    rig.pools.unlink(alice, "table")
    assert refused(rig.pools.open, alice, "table", False, None) == (errno.ENOENT, "name")
    assert refused(rig.pools.unlink, alice, "table") == (errno.ENOENT, "name")
    assert rig.core.pools == {}
    rig.create(alice)  # the name is free again


def test_a_name_is_given_once(rig):
    alice, bob = rig.session(), rig.session(BOB)
    rig.create(alice)
    rig.core.mmap_commit(alice.core_id, 0)
    for region in rig.core.sessions[alice.core_id]["regions"]:
        region["committed"] = True
    assert refused(rig.create, bob) == (errno.EEXIST, "name")
    assert refused(rig.create, alice) == (errno.EEXIST, "name")
    assert len(rig.core.pools) == 1


def test_asked_again_before_it_is_mapped(rig):
    """As a client does whose gmemd was killed before it could answer."""
    alice = rig.session()
    assert rig.create(alice) == rig.create(alice)
    assert len(rig.core.pools) == 1


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o660, 0o604, 0o666, 0o400, 0o000, 0o060])
def test_the_mode_is_that_of_a_file(rig, mode):
    who = {
        "owner": (Rig.session(rig, ALICE), mode >> 6), "group": (rig.session(BOB, (BOB, ALICE)), mode >> 3),
        "other": (rig.session(CAROL), mode), "root": (rig.session(0, (0,)), 7),
    }  # fmt: skip
    rig.create(rig.session(), mode=mode)
    for name, (session, bits) in who.items():
        for write, want in ((False, READ), (True, READ | WRITE)):
            fresh = rig.session(session.uid, tuple([session.gid, *session.gids]))
            if bits & want == want:
                assert rig.pools.open(fresh, "table", write, None)["read_only"] is not write, (name, write)
            else:
                assert refused(rig.pools.open, fresh, "table", write, None) == (errno.EACCES, "name"), (name, write)


def test_whose_it_is_can_be_asked_for(rig):
    """A name may have been taken by somebody else, and first."""
    mallory, carol = rig.session(BOB), rig.session(CAROL)
    rig.create(mallory, mode=0o644)
    assert refused(rig.pools.open, carol, "table", False, ALICE) == (errno.EACCES, "uid")
    rig.pools.open(carol, "table", False, BOB)


def test_only_its_owner_ends_or_publishes_it(rig):
    rig.create(rig.session(), mode=0o666)
    bob = rig.session(BOB)
    for call in (rig.pools.unlink, rig.pools.publish):
        assert refused(call, bob, "table") == (errno.EACCES, "name")
    assert not next(iter(rig.core.pools.values()))["sealed"]
    rig.pools.publish(rig.session(ALICE), "table")
    assert refused(rig.pools.open, bob, "table", True, None) == (errno.EPERM, "write")
    assert rig.pools.open(bob, "table", False, None)["sealed"] is True
    rig.pools.unlink(rig.session(0, (0,)), "table")


def test_it_ends_with_the_session_that_made_it(rig):
    alice, other = rig.session(), rig.session()
    rig.create(alice)
    rig.create(alice, "second")
    rig.create(other, "others")
    rig.create(alice, "stays", persistent=True)
    rig.sessions.end(alice, "test")
    assert rig.names(rig.session()) == ["others", "stays"]
    assert len(rig.core.pools) == 2


def test_so_many_for_one_user(rig):
    alice = rig.session()
    for number in range(4):
        rig.create(alice, f"pool{number}")
    assert refused(rig.create, alice, "one-more")[0] == errno.EDQUOT
    rig.create(rig.session(BOB), "bobs")
    rig.pools.unlink(alice, "pool0")
    rig.create(alice, "one-more")


def test_what_fails_leaves_no_name(rig):
    alice = rig.session()
    rig.core.fail["pool_create"] = errno.ENOMEM
    with pytest.raises(OSError):
        rig.create(alice)
    rig.core.fail.clear()
    rig.core.fail["pool_open"] = errno.EEXIST
    with pytest.raises(OSError):
        rig.create(alice)
    rig.core.fail.clear()
    assert rig.core.pools == {}
    rig.create(alice)


def test_who_sees_what(rig):
    rig.create(rig.session(ALICE), "private")
    rig.create(rig.session(ALICE), "public", mode=0o644)
    assert rig.names(rig.session(ALICE)) == ["private", "public"]
    assert rig.names(rig.session(BOB)) == ["public"]
    assert rig.names(rig.session(0, (0,))) == ["private", "public"]


def test_the_next_daemon_knows_them(fake_core):
    notes = Notes(Notes.new_file())
    before = Rig(fake_core, notes)
    alice, gone = before.session(), before.session()
    before.create(alice, mode=0o640)
    before.create(gone, "orphan")
    fake_core.pool_create(alice.core_id, 4096, page_bytes=0, small=False, persistent=False)  # not noted yet
    fake_core.session_destroy(gone.core_id)
    after = Rig(fake_core, notes)
    after.sessions.restore()
    after.pools.restore()
    assert after.names(after.session()) == ["table"]
    assert len(fake_core.pools) == 1
    assert after.pools.describe(after.session())[0]["mode"] == 0o640
    after.sessions.end(after.sessions.by_core_id(alice.core_id), "test")
    assert after.names(after.session()) == []


def test_modes_by_hand():
    """Every mode and every user, against the rule of open(2)."""
    class Somebody:
        def __init__(self, uid, gids):
            self.uid, self.gids = uid, frozenset(gids)

    for mode, (uid, gids) in itertools.product(range(0o1000), [(1, {1}), (2, {1}), (2, {2}), (0, {0})]):
        pool = Pool("name", 1, 1, mode, 0)
        bits = 7 if uid == 0 else mode >> 6 if uid == 1 else mode >> 3 if 1 in gids else mode
        for want in (READ, WRITE, READ | WRITE):
            assert pool.allows(Somebody(uid, gids), want) is (bits & want == want)
