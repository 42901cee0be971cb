# SPDX-License-Identifier: Apache-2.0
import errno
import importlib.metadata
import sys

import pytest

from gmemd.drivers import Driver, Info, registry
from gmemd.errors import RequestError

SOURCE = """
from gmemd.drivers import Driver, Info
class Tier(Driver):
    options = {"level": "how hard it tries"}
    def info(self):
        return Info(1 << 20)
class Outer:
    Tier = Tier
class Lacking:
    def probe(self, name, config): pass
class Failing:
    def __init__(self): raise RuntimeError("no hardware")
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A module on the path, and entry points that name it."""
    (tmp_path / "tier_package.py").write_text(SOURCE)
    (tmp_path / "broken_package.py").write_text("raise ValueError('at import')")
    monkeypatch.syspath_prepend(str(tmp_path))
    points = [
        importlib.metadata.EntryPoint("tier", "tier_package:Tier", registry.GROUP),
        importlib.metadata.EntryPoint("broken", "broken_package:X", registry.GROUP),
        importlib.metadata.EntryPoint("simgpu", "tier_package:Tier", registry.GROUP),
    ]
    monkeypatch.setattr(registry, "_entry_points", lambda: points)
    yield
    for name in ("tier_package", "broken_package"):
        sys.modules.pop(name, None)


@pytest.fixture
def drivers():
    return registry.Registry(lambda name: name == "simgpu")


def test_names_list_without_importing(drivers, package):
    found = {d.name: d for d in drivers.names()}
    assert found.keys() == {"simgpu", "tier", "broken"}
    assert found["simgpu"].builtin and found["simgpu"].origin == "gmemd"
    assert not found["tier"].builtin and "tier_package:Tier" in found["tier"].origin
    assert "tier_package" not in sys.modules and "broken_package" not in sys.modules


def test_a_builtin_comes_before_an_entry_point_of_its_name(drivers, package):
    assert drivers.find("simgpu").builtin
    assert drivers.find("simgpu").load() is None


@pytest.mark.parametrize("name", ["tier", "tier_package:Tier", "tier_package:Outer.Tier"])
def test_load(drivers, package, name):
    found = drivers.find(name)
    assert "tier_package" not in sys.modules
    instance = found.load()
    assert instance.info() == Info(1 << 20)
    instance.probe("t0", {"level": "3"})
    with pytest.raises(ValueError, match="unknown option 'depth'; known are level"):
        instance.probe("t0", {"depth": "3"})
    assert found.load() is not instance


@pytest.mark.parametrize(
    "name, number, words",
    [
        ("nope", errno.ENOENT, "there is no driver 'nope'"),
        ("broken", errno.ENOEXEC, "at import"),
        ("no.such:Class", errno.ENOEXEC, "No module named"),
        ("tier_package:Nope", errno.ENOEXEC, "no attribute"),
        ("tier_package:Lacking", errno.ENOEXEC, "no method info()"),
        ("tier_package:Failing", errno.ENOEXEC, "no hardware"),
    ],
)
def test_what_can_not_be_loaded_is_said(drivers, package, name, number, words):
    with pytest.raises(RequestError) as caught:
        drivers.find(name).load()
    assert (caught.value.errno, caught.value.argument) == (number, "driver")
    assert words in caught.value.message


def test_the_real_entry_points_can_be_read():
    assert list(registry._entry_points()) is not None


def test_base_driver_defines_no_optional_op():
    # an op that exists is an op that the core calls
    assert {name for name in vars(Driver) if not name.startswith("_")} == {"options", "probe", "info", "check_options"}
