# SPDX-License-Identifier: Apache-2.0
"""The simulator of pools: its sampling against runs with every page, LRU against Che's approximation, storms and shards
against what can be worked out by hand, and the command."""

import json
import math

import numpy as np
import pytest

from gmemd import cli, poolsim
from gmemd.policy import POLICIES
from gmemd.poolsim import Scenario, Zipf, misses, simulate


@pytest.mark.parametrize("exponent", [0.0, 0.7, 1.0, 1.3])
def test_masses(exponent):
    zipf = Zipf(300_000, exponent)
    exact = np.cumsum(np.arange(1, 300_001, dtype=float) ** -exponent)
    ranks = np.array([0, 1, 17, 65_536, 65_537, 100_000, 300_000])
    assert np.allclose(zipf.mass(ranks)[1:], exact[ranks[1:] - 1] / exact[-1], rtol=1e-9)
    assert zipf.mass(ranks)[0] == 0 and math.isclose(zipf.masses.sum(), 1) and zipf.counts.sum() == 300_000


@pytest.mark.parametrize("policy", ["lru", "sieve", POLICIES[0]])
def test_a_sample_is_as_good_as_all_pages(policy, monkeypatch):
    """Of a third of the pages that the command takes, and of all."""
    zipf, memory = Zipf(1 << 17, 1.0), 8192
    monkeypatch.setattr(poolsim, "_SAMPLED_PAGES", 1 << 14)
    monkeypatch.setattr(poolsim, "_SAMPLED_MEMORY", 2048)
    sampled = misses(zipf, memory, policy)
    other = misses(zipf, memory + memory // 8, policy)
    monkeypatch.setattr(poolsim, "_LEARN", 400 if policy == POLICIES[0] else 50)  # it has more to learn with all
    exact = misses(zipf, memory, policy, runs=2, exact=True)
    assert sampled.one_in >= 3 and exact.one_in == 1 and exact.head_pages == 0 and sampled.settled and exact.settled
    assert sampled.ratio == pytest.approx(exact.ratio, rel=0.02)
    assert sampled.error < 0.01 * sampled.ratio
    assert other.ratio != pytest.approx(exact.ratio, rel=0.02), "a memory that is an eighth larger can be told from it"


@pytest.mark.parametrize("exponent", [0.6, 0.9, 1.2])
def test_lru_is_what_che_says(exponent):
    zipf = Zipf(1 << 24, exponent)
    for memory in (1 << 17, 1 << 20):
        found, expected = misses(zipf, memory, "lru", runs=3), zipf.lru_misses(memory)
        assert found.one_in > 16
        assert found.ratio == pytest.approx(expected, rel=0.01)
        assert zipf.lru_misses(2 * memory) != pytest.approx(found.ratio, rel=0.01)


def test_ends():
    zipf = Zipf(1000, 1.0)
    assert misses(zipf, 1000, "lru").ratio == 0 and zipf.lru_misses(1000) == 0
    even = misses(Zipf(100_000, 0.0), 25_000, "lru", runs=2)
    assert even.ratio == pytest.approx(0.75, rel=0.01), "of pages that are used evenly a share is there"
    assert misses(zipf, 100, "lru", seed=3) == misses(zipf, 100, "lru", seed=3)


def test_where_misses_fall():
    scenario = Scenario(shards=100)
    zipf = Zipf(scenario.pool_bytes // scenario.page_bytes, 1.0)
    shares = poolsim._shares(scenario, zipf, 0.3)
    assert len(shares) == 100 and math.isclose(shares.sum(), 1)
    assert 164 / 16384 * 0.99 <= shares.max() < 0.02, "a shard with 164 slots of 16,384, and what chance adds"
    time = zipf.time_of(0.3)
    assert float((zipf.masses * np.exp(-zipf.means * time)).sum()) == pytest.approx(0.3, rel=1e-6)


def test_storms():
    scenario = Scenario(machines=100, threads=10, touches_per_s=1000, failover_s=5, link_bytes_per_s=65536 * 10_000)
    storm = poolsim._storm(scenario, ratio=0.01, share=0.05)
    blocked = 1 - math.exp(-1000 / 10 * 0.01 * 0.05 * 5)
    assert storm["blocked_threads_ratio"] == pytest.approx(blocked, rel=0.02)
    assert storm["queued_requests"] == pytest.approx(1000 * blocked, rel=0.02)
    assert 1000 * blocked / 10_000 <= storm["drain_s"] < 1.5 * 1000 * blocked / 10_000
    faster = poolsim._storm(Scenario(**{**vars(scenario), "failover_s": 1}), ratio=0.01, share=0.05)
    assert faster["queued_requests"] < storm["queued_requests"]
    slow = Scenario(**{**vars(scenario), "link_bytes_per_s": 65536 * 10})
    assert poolsim._storm(slow, ratio=0.5, share=0.5)["drain_s"] is None, "more than the shard can serve"


def test_traffic_adds_up():
    scenario = Scenario(machines=10, pool_bytes=8 << 30, shards=4, touches_per_s=1000, policy="lru")
    made = simulate(scenario, [1 << 30, 8 << 30], [1.0], runs=2)
    part, whole = made["results"]
    assert part["machine_bytes_per_s"] == pytest.approx(1000 * part["miss_ratio"] * 65536)
    assert 4 * part["shard_bytes_per_s"] == pytest.approx(10 * part["machine_bytes_per_s"])
    assert part["busiest_shard_bytes_per_s"] >= part["shard_bytes_per_s"]
    assert whole["miss_ratio"] == whole["machine_bytes_per_s"] == 0 and whole["storm"]["queued_requests"] == 0
    assert made["publish"]["servers"] == 8 and made == simulate(scenario, [1 << 30, 8 << 30], [1.0], runs=2)
    for bad in ({"machines": 0}, {"shards": 20_000}, {"touches_per_s": 0}, {"pool_bytes": 4096}, {"failover_s": -1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            simulate(Scenario(**bad), [1 << 30], [1.0])


SMALL = ["pools", "simulate", "--machines", "10", "--pool", "4G", "--shards", "3", "--memory", "256M,1G", "--zipf", "1",
         "--runs", "2", "--policy", "lru"]  # fmt: skip


def test_the_command(capsys):
    assert cli.main_gmemctl([*SMALL, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert [r["memory_bytes"] for r in made["results"]] == [256 << 20, 1 << 30]
    assert made["results"][0]["miss_ratio"] > made["results"][1]["miss_ratio"] > 0
    assert cli.main_gmemctl(SMALL) == 0
    out = capsys.readouterr().out
    assert "10 machines read a pool of 4.0 GiB" in out and f"{made['results'][0]['miss_ratio']:.4f}" in out
    for option, value in (("--pool", "nothing"), ("--memory", "1G,,"), ("--zipf", "-1"), ("--shards", "0"),
                          ("--link", "x"), ("--page", "16M"), ("--runs", "1")):  # fmt: skip
        assert cli.main_gmemctl([*SMALL, option, value]) == 2
        assert f"{option}: " in capsys.readouterr().err
