# SPDX-License-Identifier: Apache-2.0
"""Pools without end, pools of others, and owners that die: who asks for too much is refused, and who has a pool open in
good faith keeps what is in it."""

import errno
import time

import pytest
from arena import HONEST, MALLORY, OSCAR, ROOTLY

MIB = 1 << 20
QUOTA = 24 * MIB
CROWDED = (errno.EEXIST, errno.ENOENT, errno.EDQUOT, errno.ENOMEM, errno.EACCES, errno.EBUSY)
root_only = pytest.mark.skipif(not ROOTLY, reason="needs root to be two other users")


@pytest.fixture(scope="module")
def guarded(make_module_arena, tmp_path_factory):
    """A daemon in which a user may have 8 pools, and 24 MiB on host and device together. Oscar has a published pool
    there and one that is being written, and somebody honest reads the first."""
    config = tmp_path_factory.mktemp("config") / "gmemd.toml"
    config.write_text(f"[quotas.user]\nhost = {QUOTA - 8 * MIB}\nsimgpu0 = {8 * MIB}\n")
    arena = make_module_arena("--config", str(config), "--device", "simgpu0:capacity=8M", limits=("pools_per_uid=8",))
    oscar, reader = arena.pooler(OSCAR, bystander=True), arena.pooler(HONEST, bystander=True)
    oscar.ask("make", name="table", size=2 * MIB, seed=1, mode=0o644, publish=True)
    oscar.ask("make", name="draft", size=MIB, seed=2, mode=0o600)
    assert reader.ask("open", name="table", seed=1, owner=OSCAR if ROOTLY else None) == []
    return arena, oscar, reader


@pytest.fixture
def pools(guarded):
    """All of it has to be afterwards as it was."""
    arena, oscar, reader = guarded
    arena.check_honest()
    before = arena.census()
    yield guarded
    assert oscar.ask("check") == reader.ask("check") == []
    arena.check_honest()
    arena.settle(before)


def test_names_without_end(pools):
    arena, oscar, reader = pools
    mallory = arena.pooler(MALLORY)
    outcome = mallory.ask("names", count=64, size=4096, prefix="m")
    assert outcome["errno"] == errno.EDQUOT and outcome["made"] == (8 if ROOTLY else 6)
    other = arena.pooler(MALLORY)
    assert other.ask("names", count=4, size=4096, prefix="n") == {"made": 0, "errno": errno.EDQUOT}, "of the user"
    if ROOTLY:
        assert arena.pooler(OSCAR).ask("names", count=2, size=4096, prefix="o")["errno"] == 0, "another one's are his"
    assert mallory.ask("drop") and other.ask("names", count=4, size=4096, prefix="n")["errno"] == 0
    assert oscar.ask("check") == []


def test_bytes_without_end(pools):
    arena, oscar, reader = pools
    mallory = arena.pooler(MALLORY)
    outcome = mallory.ask("names", count=8, size=6 * MIB, prefix="m", fill=True)
    assert outcome["errno"] in (errno.EDQUOT, errno.ENOMEM) and 6 * MIB <= outcome["made"] * 6 * MIB <= QUOTA
    assert mallory.ask("check") == [], "what he has is his"
    assert oscar.ask("check") == reader.ask("check") == []
    arena.check_honest()


def test_churn(pools):
    """Two processes under the same names; one of them is killed in the middle of it, each time elsewhere."""
    arena, oscar, reader = pools
    for round_number in range(2):
        storm = [arena.pooler(MALLORY) for _ in range(2)]
        for one in storm:
            one.send("churn", seconds=0.6, size=MIB, prefix="c")
        time.sleep(0.1 + 0.3 * round_number)
        storm[0].kill()
        for one in storm[1:]:
            outcomes = one.answer()
            assert outcomes.keys() <= {"ok", *map(str, CROWDED)}, outcomes
        assert oscar.ask("check") == reader.ask("check") == []


@root_only
def test_pools_of_others(pools):
    arena, oscar, reader = pools
    mallory = arena.pooler(MALLORY)
    told = mallory.ask("trespass", name="draft", owner=OSCAR)
    assert told.pop("take the name") == errno.EEXIST and told.pop("persistent") == errno.EPERM
    assert set(told.values()) == {errno.EACCES}, told
    assert reader.ask("trespass", name="draft", owner=OSCAR)["read"] == errno.EACCES
    told = mallory.ask("trespass", name="table", owner=OSCAR)
    assert told["read"] == 0 and {told[what] for what in ("publish", "unlink")} == {errno.EACCES}, told
    assert told["write"] != 0 and told["of the owner"] != 0, told
    names = mallory.ask("listed")
    assert "draft" not in names, "one does not hear of what one may not open"
    friend = arena.pooler(OSCAR)
    told = mallory.ask("spoil", address=friend.ask("make", name="mine", size=MIB, seed=3))
    assert told["copy"] and told["commit"] and told["prefetch"], told
    assert friend.ask("check") == []


@root_only
def test_a_name_that_somebody_else_was_first_with(pools):
    arena, oscar, reader = pools
    mallory = arena.pooler(MALLORY)
    mallory.ask("make", name="weights", size=MIB, seed=66, mode=0o644, publish=True)
    wary = arena.pooler(HONEST)
    with pytest.raises(AssertionError, match="weights"):
        wary.ask("open", name="weights", seed=1, owner=OSCAR)
    assert wary.ask("check") == []


def test_opening_without_end(pools):
    arena, oscar, reader = pools
    mallory = arena.pooler(MALLORY)
    outcomes = mallory.ask("open_often", name="table", count=2000)
    assert outcomes["0"] >= 1 and outcomes.keys() <= {"0", str(errno.EDQUOT), str(errno.EBUSY), str(errno.EEXIST)}
    assert oscar.ask("check") == []


def test_owners_that_die(pools):
    """Whoever has it open keeps what is in it; its name is free, and its memory too when the last one has gone."""
    arena, oscar, reader = pools
    for when in (0.0, 0.1):
        owner, friend = arena.pooler(OSCAR), arena.pooler(HONEST)
        owner.ask("make", name="short", size=2 * MIB, seed=4, mode=0o644, publish=True)
        assert friend.ask("open", name="short", seed=4) == []
        owner.send("churn", seconds=5, size=MIB, prefix="d")
        time.sleep(when)
        owner.kill()
        assert friend.ask("check") == []
        heir = arena.pooler(OSCAR)
        until = time.monotonic() + 10
        while "short" in heir.ask("listed"):
            assert time.monotonic() < until, "its name is free"
        heir.ask("make", name="short", size=MIB, seed=5)
        assert friend.ask("check") == heir.ask("check") == []
        heir.kill()
        friend.kill()


@root_only
def test_pools_until_there_are_no_descriptors(make_arena):
    arena = make_arena("--device", "simgpu0:capacity=8M", limits=("pools_per_uid=4096",),
                       prefix=("prlimit", "--nofile=512:512"))  # fmt: skip
    arena.check_honest()
    before = arena.census()
    reader = arena.pooler(HONEST)
    reader.ask("make", name="kept", size=MIB, seed=9)
    outcome = arena.pooler(MALLORY).ask("names", count=1000, size=4096, prefix="m")
    assert outcome["errno"] == errno.EMFILE and outcome["made"] > 20
    assert reader.ask("check") == []
    arena.check_honest()
    arena.settle(before)
    again = arena.pooler(MALLORY)
    assert again.ask("names", count=3, size=4096, prefix="m") == {"made": 3, "errno": 0}
