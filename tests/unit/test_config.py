# SPDX-License-Identifier: Apache-2.0
import dataclasses
import os
import re
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmemd import config
from gmemd.config import Config, ConfigError, Device, load, override, parse_device, parse_setting

FULL = """
[daemon]
runtime_dir = "/run/other"
window_base = "0x650000000000"
window_bytes = "1T"
fault_threads = 3
hugepages = false
overcommit = true
event_fork = false
policy = "sieve"
fault_ahead = false
log_level = "debug"
[host]
limit = "2G"
[limits]
sessions_per_uid = 5
handshake_timeout_s = 1
[quotas.session]
host = "1G"
cold = "8M"
[quotas.user]
host = "4G"
[devices.simgpu0]
driver = "simgpu"
capacity = "48M"
replayable = false
latency = 1000
[devices.cold]
driver = "mypackage.tier:Tier"
"""


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "gmemd.toml"
        path.write_text(text)
        return path

    return write


def test_every_key(write):
    got = load(write(FULL))
    assert str(got.runtime_dir) == "/run/other"
    assert got.window_base == 0x650000000000 and got.window_bytes == 1 << 40
    assert (got.fault_threads, got.hugepages, got.overcommit, got.event_fork) == (3, False, True, False)
    assert got.policy == "sieve" and Config().policy == config.POLICIES[0]
    assert got.fault_ahead is False and Config().fault_ahead is True
    assert got.log_level == "debug" and got.host_limit_bytes == 2 << 30
    assert got.limits.sessions_per_uid == 5 and got.limits.handshake_timeout_s == 1.0
    assert got.limits.workers == config.Limits().workers
    assert got.quotas == {"session": {"host": 1 << 30, "cold": 8 << 20}, "user": {"host": 4 << 30}}
    assert got.devices == (
        Device("simgpu0", "simgpu", {"capacity": "48M", "replayable": "off", "latency": "1000"}),
        Device("cold", "mypackage.tier:Tier", {}),
    )


def test_nothing_is_everything_by_default(write):
    assert load(write("")) == Config()


@pytest.mark.parametrize(
    "text, words",
    [
        ("[daemon]\nruntimedir='/x'", ["runtimedir", "[daemon]", "unknown", "runtime_dir"]),
        ("[deamon]\n", ["deamon", "unknown section"]),
        ("[limits]\nfoo=1", ["foo", "[limits]"]),
        ("[daemon]\nruntime_dir='run'", ["daemon.runtime_dir", "absolute"]),
        ("[daemon]\nruntime_dir='/" + "x" * 100 + "'", ["daemon.runtime_dir", "too long"]),
        ("[daemon]\nwindow_base=4096", ["daemon.window_base", "4 MiB"]),
        ("[daemon]\nwindow_bytes=-4194304", ["daemon.window_bytes", "range"]),
        ("[daemon]\nwindow_bytes='256T'", ["daemon.window_bytes", "2^47"]),
        ("[daemon]\nfault_threads=true", ["daemon.fault_threads"]),
        ("[daemon]\nfault_threads=65", ["daemon.fault_threads", "64"]),
        ("[daemon]\nhugepages='yes'", ["daemon.hugepages", "true or false"]),
        ("[daemon]\nlog_level='loud'", ["daemon.log_level", "debug"]),
        ("[host]\nlimit='lots'", ["host.limit", "lots"]),
        ("[host]\nlimit=1.5", ["host.limit"]),
        ("[limits]\nworkers=1", ["limits.workers"]),
        ("[limits]\nhandshake_timeout_s=0", ["limits.handshake_timeout_s", "seconds"]),
        ("daemon = 1", ["daemon", "table"]),
        ("[quotas.everyone]\nhost='1G'", ["everyone", "[quotas]", "session", "user"]),
        ("[quotas]\nuser='1G'", ["quotas.user", "table"]),
        ("[quotas.user]\nhost='1M'", ["quotas.user.host", "2 MiB"]),
        ("[quotas.user]\n\"a b\"='1G'", ["quotas.user.a b", "no name of a device"]),
        ("[devices]\nsimgpu0 = 1", ["devices.simgpu0", "table"]),
        ("[devices.simgpu0]\ncapacity='1M'", ["devices.simgpu0.driver"]),
        ("[devices.host]\ndriver='simgpu'", ["devices.host"]),
        ("[devices.0x]\ndriver='simgpu'", ["devices.0x"]),
        ("[devices.a]\ndriver='simgpu'\nlist=[1]", ["devices.a.list"]),
        ("x = [", ["not TOML"]),
    ],
)
def test_errors_name_file_and_key(write, text, words):
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(path) in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_missing_or_binary_file(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\0")
    with pytest.raises(ConfigError, match="not TOML"):
        load(tmp_path / "binary")


@given(
    st.dictionaries(
        st.sampled_from(["daemon", "host", "limits", "devices", "x"]),
        st.dictionaries(
            st.sampled_from(["limit", "workers", "log_level", "driver", "a"]),
            st.none() | st.integers() | st.text(max_size=5) | st.booleans() | st.floats(),
        ),
    )
)
def test_any_table_gives_a_config_or_a_config_error(tables):
    try:
        assert isinstance(config.parse(tables, "f"), Config)
    except ConfigError as error:
        assert str(error).startswith("f")


@pytest.mark.parametrize(
    "text, device",
    [
        ("simgpu0", Device("simgpu0", "simgpu", {})),
        ("simgpu0:capacity=48M", Device("simgpu0", "simgpu", {"capacity": "48M"})),
        ("simgpu0:", Device("simgpu0", "simgpu", {})),
        ("name=a,driver=simgpu,capacity=1M", Device("a", "simgpu", {"capacity": "1M"})),
        ("name=a,driver=my.mod:Class,x=1", Device("a", "my.mod:Class", {"x": "1"})),
        ("cold:driver=zstd,level=3", Device("cold", "zstd", {"level": "3"})),
    ],
)
def test_device_of_the_command_line(text, device):
    assert parse_device(text) == device


@pytest.mark.parametrize("text", ["", ",", "name=", "0a", "a,b", "simgpu0:capacity", "name=a,name=b,driver=c", "host"])
def test_bad_device_of_the_command_line(text):
    with pytest.raises(ConfigError, match="--device"):
        parse_device(text)


def test_override():
    base = Config(devices=(Device("a", "simgpu", {}), Device("b", "simgpu", {})), log_level="error")
    got = override(base, ["daemon.event_fork=false", "host.limit=2G", "limits.workers=4"], ["a:driver=zstd"])
    assert (got.event_fork, got.host_limit_bytes, got.limits.workers, got.log_level) == (False, 2 << 30, 4, "error")
    assert got.limits.sessions_per_uid == config.Limits().sessions_per_uid
    assert got.devices == (Device("a", "zstd", {}), Device("b", "simgpu", {}))
    assert override(base, [], []) == base


@pytest.mark.parametrize(
    "text", ["x", "daemon=1", "nope.x=1", "devices.a=1", "daemon.nope=1", "daemon.fault_threads=no"]
)
def test_bad_override(text):
    with pytest.raises(ConfigError, match="--set"):
        override(Config(), [text], [])


def test_settings_are_toml_or_text():
    assert parse_setting("daemon.hugepages=false") == ("daemon", "hugepages", False)
    assert parse_setting("host.limit=48M") == ("host", "limit", "48M")
    assert parse_setting('daemon.log_level="info"') == ("daemon", "log_level", "info")


def test_runtime_dir(tmp_path, monkeypatch):
    assert config.resolve_runtime_dir(Config(runtime_dir=tmp_path), embedded=True) == tmp_path
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    made = config.resolve_runtime_dir(Config(), embedded=True)
    assert made.parent == tmp_path and made.name.startswith(f"gmem-{os.getpid()}-")
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert str(config.resolve_runtime_dir(Config(), embedded=False)) == "/run/gmem"
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    assert config.resolve_runtime_dir(Config(), embedded=False) == tmp_path / "gmem"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert str(config.resolve_runtime_dir(Config(), embedded=False)) == "/tmp/gmem-1234"


def test_a_directory_that_others_can_write_to_is_refused(tmp_path, monkeypatch):
    config.check_runtime_dir(tmp_path)
    tmp_path.chmod(0o770)
    with pytest.raises(PermissionError, match="written by others"):
        config.check_runtime_dir(tmp_path)
    tmp_path.chmod(0o700)
    os.chown(tmp_path, 4321, -1) if os.geteuid() == 0 else monkeypatch.setattr(os, "geteuid", lambda: 4321)
    with pytest.raises(PermissionError, match="belongs to uid"):
        config.check_runtime_dir(tmp_path)


def test_the_operators_page_has_every_key_with_its_default():
    page = (Path(__file__).resolve().parents[2] / "docs" / "operator.md").read_text()
    rows = dict(re.findall(r"^\| `((?:daemon|host|limits)\.\w+)` \| ([^|]*) \|", page, re.MULTILINE))
    keys = {f"{section}.{key}" for section, table in config._TABLES.items() for key in table}
    assert rows.keys() == keys | {f"limits.{key}" for key in config._LIMITS}
    for name, value in dataclasses.asdict(config.Limits()).items():
        assert float(rows[f"limits.{name}"]) == value
