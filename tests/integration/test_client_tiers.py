# SPDX-License-Identifier: Apache-2.0
"""More memory than the host has: a chain of tiers below it, its budget, and quotas."""

import os
import subprocess
import sys

import gmem
import numpy as np
import pytest
from helpers import ROOT, eventually, run_python

UNIT = str(ROOT / "tests" / "unit")
MIB = 1 << 20


@pytest.fixture(autouse=True)
def stores(monkeypatch):
    """Tiers of the tests' page store."""
    monkeypatch.setenv("PYTHONPATH", UNIT + os.pathsep + os.environ.get("PYTHONPATH", ""))


def store(name, mib, **options):
    return {"name": name, "driver": "pagestore:PageStore", "capacity": mib * MIB, **options}


def row(session, name):
    return next(d for d in session.request("devices")["devices"] if d["name"] == name)


def ctl(session, *args):
    code = "import sys; from gmemd.cli import main_gmemctl; sys.exit(main_gmemctl())"
    command = [sys.executable, "-c", code, "--socket", session.path, *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def pattern(count, seed):
    return np.random.default_rng(seed).integers(0, 1 << 62, count, np.int64)


@pytest.mark.parametrize("page_size", ["4K", "64K", "2M"])
def test_an_array_four_times_the_hosts_budget(connect, page_size):
    session = connect(store("near", 24), store("far", 64), settings=[f"host.limit={16 * MIB}"])
    data = pattern(8 * MIB, 1)  # 64 MiB
    a = gmem.empty(data.shape, np.int64, page_size=page_size)
    a[:] = data
    assert row(session, "host")["used_bytes"] <= 16 * MIB
    assert row(session, "near")["used_bytes"] > 0 and row(session, "far")["used_bytes"] > 0, "the chain goes on"
    assert np.array_equal(a, data)
    a[::7] += 1
    data[::7] += 1
    order = np.random.default_rng(2).permutation(8 * MIB // 4096)[:512]
    assert all(np.array_equal(a[n * 4096 : n * 4096 + 64], data[n * 4096 : n * 4096 + 64]) for n in order)
    assert np.array_equal(a, data)
    assert row(session, "host")["peak_bytes"] <= 16 * MIB


def test_tiers_stand_in_the_order_of_the_configuration(connect):
    session = connect(store("last", 64, tier=9), store("first", 64, tier=1), settings=[f"host.limit={8 * MIB}"])
    a = gmem.full(3 * MIB, 7, np.int64)  # 24 MiB
    eventually(lambda: row(session, "first")["used_bytes"] > 0, "pages leave the host")
    assert row(session, "last")["used_bytes"] == 0
    assert (a == 7).all()


def test_a_limit_while_it_runs(connect):
    session = connect(store("below", 64))
    data = pattern(4 * MIB, 3)  # 32 MiB
    a = gmem.empty(data.shape, np.int64, page_size="64K")
    a[:] = data
    assert row(session, "host")["used_bytes"] >= 32 * MIB
    assert ctl(session, "limit", "host", "8M").returncode == 0
    assert row(session, "host")["used_bytes"] <= 8 * MIB
    assert np.array_equal(a, data)
    refused = ctl(session, "limit", "host", "1M")
    assert refused.returncode == 1 and "bytes" in refused.stderr and "2 MiB" in refused.stderr
    assert "no device nope" in ctl(session, "limit", "nope", "8M").stderr
    assert ctl(session, "limit", "host", "64M").returncode == 0
    assert np.array_equal(a, data)


def test_a_limit_that_has_nowhere_to_put_the_rest_changes_nothing(connect):
    session = connect(store("below", 4))
    data = pattern(3 * MIB, 4)  # 24 MiB
    a = gmem.empty(data.shape, np.int64)
    a[:] = data
    before = row(session, "host")["capacity_bytes"]
    refused = ctl(session, "limit", "host", "8M")
    assert refused.returncode == 1 and "nowhere" in refused.stderr
    assert row(session, "host")["capacity_bytes"] == before
    assert np.array_equal(a, data)


def test_a_tier_that_leaves_passes_its_pages_on(connect):
    session = connect(store("near", 64), store("far", 64), settings=[f"host.limit={8 * MIB}"])
    data = pattern(4 * MIB, 5)
    a = gmem.empty(data.shape, np.int64, page_size="64K")
    a[:] = data
    assert row(session, "near")["used_bytes"] > 0
    done = ctl(session, "detach", "near")
    assert done.returncode == 0, done.stderr
    assert row(session, "far")["used_bytes"] >= 16 * MIB
    assert row(session, "host")["used_bytes"] <= 8 * MIB
    assert np.array_equal(a, data)
    refused = ctl(session, "detach", "far")
    assert refused.returncode == 1, "its pages fit nowhere else"
    assert np.array_equal(a, data)


@pytest.mark.parametrize(
    "config, words", [({"tier": "x"}, "tier"), ({"tier": -1}, "tier"), ({"capacity": 100}, "page")]
)
def test_bad_tiers_are_refused(connect, config, words):
    session = connect()
    options = [f"{key}={value}" for key, value in config.items()]
    refused = ctl(session, "attach", "pagestore:PageStore", "bad", *options)
    assert refused.returncode == 1 and words in refused.stderr
    assert [d["name"] for d in session.request("devices")["devices"]] == ["host"]
    refused = ctl(session, "attach", "simgpu", "bad", "tier=1")
    assert refused.returncode == 1 and "no tier" in refused.stderr


def test_more_than_everything_is_refused_at_the_allocation(connect):
    connect(store("below", 16), settings=[f"host.limit={8 * MIB}"])
    a = gmem.full(2 * MIB, 3, np.int64)  # 16 MiB of 24
    with pytest.raises(gmem.OutOfMemory):
        gmem.empty(2 * MIB, np.int64)
    assert (a == 3).all()


def test_a_quota_holds_for_its_session_and_memory_goes_below(connect):
    session = connect(store("below", 64))
    session.request("quota", name="host", bytes=8 * MIB)
    data = pattern(4 * MIB, 6)  # 32 MiB
    a = gmem.empty(data.shape, np.int64, page_size="64K")
    a[:] = data
    me = next(s for s in session.request("sessions")["sessions"] if s["pid"] == os.getpid())
    assert me["resident_bytes"]["0"] <= 8 * MIB and me["quota_bytes"]["0"] == 8 * MIB
    assert np.array_equal(a, data)
    shown = ctl(session, "sessions").stdout
    assert "/8.0 MiB" in shown
    other = run_python("""
        import gmem, numpy as np
        a = gmem.full(2 << 20, 5, np.int64)
        print(int(a.sum()))
        me = [s for s in gmem.default().request("sessions")["sessions"] if s["resident_bytes"].get("0", 0) >= 16 << 20]
        print(len(me))
        """, session=session)  # fmt: skip
    assert other.stdout.split() == [str(5 * (2 << 20)), "1"], other.stderr


def test_a_quota_on_everything_refuses_the_allocation(connect):
    session = connect(settings=[f"host.limit={64 * MIB}"])
    session.request("quota", name="host", bytes=8 * MIB)
    with pytest.raises(gmem.QuotaExceeded) as caught:
        gmem.empty(2 * MIB, np.int64)
    assert isinstance(caught.value, MemoryError) and "quota" in str(caught.value)
    assert (gmem.full(MIB // 2, 1, np.int64) == 1).all()


def test_quotas_of_the_configuration(connect, tmp_path):
    config = tmp_path / "gmemd.toml"
    config.write_text("[host]\nlimit='64M'\n[quotas.session]\nhost='8M'\n[quotas.user]\nhost='12M'\n")
    session = connect(config=config)
    with pytest.raises(gmem.QuotaExceeded):
        gmem.empty(2 * MIB, np.int64)
    gmem.zeros(MIB - 1024, np.int64)
    keep = gmem.zeros(MIB // 2, np.int64)  # 4 MiB of the 12 of this user
    again = run_python("""
        import gmem, numpy as np
        try:
            keep = [gmem.full(1 << 20, 1, np.int64)[:1], gmem.full(1 << 20, 1, np.int64)]
        except gmem.QuotaExceeded:
            print("refused")
        """, session=session)  # fmt: skip
    assert again.stdout.split() == ["refused"], again.stderr
    assert not keep.any()


def test_a_page_that_its_tier_has_lost_is_an_error(connect):
    code = """
        import gmem, numpy as np, signal, sys
        session = gmem.connect(devices=[{"name": "t", "driver": "pagestore:PageStore", "capacity": 64 << 20,
                                         "fail": "peer_unmap"}], settings=["host.limit=8M"])
        a = gmem.full(3 << 20, 7, np.int64, page_size="64K")
        print("written", flush=True)
        print(int(a.sum()))
        """
    done = run_python(code, env={"PYTHONPATH": os.environ["PYTHONPATH"]})
    assert done.stdout.split() == ["written"] and done.returncode == -7, (done.stdout, done.stderr)


@pytest.fixture
def loop(tmp_path):
    """A block device of 40 MiB over a file."""
    backing = tmp_path / "disk"
    backing.write_bytes(b"")
    os.truncate(backing, 40 * MIB)
    made = subprocess.run(["losetup", "--find", "--show", backing], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    yield made.stdout.strip()
    subprocess.run(["losetup", "--detach", made.stdout.strip()], check=True)


def test_a_block_device_below_the_host(connect, loop):
    session = connect(settings=[f"host.limit={8 * MIB}"])
    refused = ctl(session, "attach", "file", "disk", f"path={loop}", "capacity=32M")
    assert refused.returncode == 1 and "erase=on" in refused.stderr
    refused = ctl(session, "attach", "file", "disk", f"path={loop}", "capacity=64M", "erase=on")
    assert refused.returncode == 1 and "capacity" in refused.stderr, "it is not that large"
    done = ctl(session, "attach", "file", "disk", f"path={loop}", "capacity=32M", "erase=on")
    assert done.returncode == 0, done.stderr
    data = pattern(3 * MIB, 8)  # 24 MiB
    a = gmem.empty(data.shape, np.int64, page_size="64K")
    a[:] = data
    assert row(session, "disk")["used_bytes"] >= 12 * MIB
    assert np.array_equal(a, data)
    del a
    assert ctl(session, "detach", "disk").returncode == 0


def test_a_filesystem_that_is_full_is_back_pressure(connect, tmp_path):
    """The tier below takes what it has no room for, though it had promised more; nothing is lost."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=10M", "tmpfs", small]).returncode:
        pytest.skip("no right to mount")
    try:
        disk = f"disk:driver=file,path={small},capacity=32M,preallocate=off,tier=1"
        session = connect(disk, store("below", 64, tier=2), settings=[f"host.limit={8 * MIB}"])
        data = pattern(4 * MIB, 9)  # 32 MiB: 8 here, 10 there, and the rest
        a = gmem.empty(data.shape, np.int64, page_size="64K")
        a[:] = data
        assert row(session, "disk")["used_bytes"] <= 10 * MIB and row(session, "below")["used_bytes"] >= 10 * MIB
        assert np.array_equal(a, data)
        session.close()
    finally:
        subprocess.run(["umount", "-l", small], check=True)
