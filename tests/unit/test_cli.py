# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from gmemd import cli, show
from gmemd.config import ConfigError
from gmemd.errors import RequestError


def parsed(*argv):
    return cli.gmemd_parser().parse_args(["run", *argv])


def test_run_arguments_make_a_configuration(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("[daemon]\nlog_level = 'error'\nruntime_dir = '/run/x'\n[devices.simgpu0]\ndriver='simgpu'\n")
    config = cli.config_of(parsed("--config", str(path), "--device", "name=simgpu1,driver=simgpu,capacity=1M"))
    assert config.log_level == "error" and str(config.runtime_dir) == "/run/x"
    assert [d.name for d in config.devices] == ["simgpu0", "simgpu1"]
    config = cli.config_of(
        parsed(
            "--config",
            str(path),
            "--runtime-dir",
            str(tmp_path / 'a"b'),
            "--log-level",
            "debug",
            "--set",
            "host.limit=1G",
        )
    )
    assert (config.runtime_dir, config.log_level) == (tmp_path / 'a"b', "debug")
    assert config.host_limit_bytes == 1 << 30


def test_an_embedded_daemon_is_quiet_unless_told():
    assert cli.config_of(parsed("--embedded")).log_level == "warning"
    assert cli.config_of(parsed("--embedded", "--log-level", "info")).log_level == "info"
    assert cli.config_of(parsed("--embedded", "--set", "daemon.log_level=debug")).log_level == "debug"
    assert cli.config_of(parsed()).log_level == "info"


@pytest.mark.parametrize(
    "argv", [["--device", "x,"], ["--set", "a"], ["--runtime-dir", "x" * 200], ["--config", "/none"]]
)
def test_bad_run_arguments(argv, capsys):
    with pytest.raises(ConfigError):
        cli.config_of(parsed(*argv))
    assert cli.main_gmemd(["run", *argv]) == 2
    assert capsys.readouterr().err.startswith("gmemd: ")


def test_check_config(tmp_path, capsys):
    path = tmp_path / "c.toml"
    path.write_text("[devices.simgpu0]\ndriver='simgpu'\ncapacity='48M'\n")
    assert cli.main_gmemd(["check-config", str(path)]) == 0
    out = capsys.readouterr().out
    assert f"{path}: ok" in out and "device simgpu0: driver=simgpu capacity=48M" in out and "limits.workers = 16" in out
    assert cli.main_gmemd(["check-config", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["devices"][0]["config"] == {"capacity": "48M"}
    path.write_text("[daemon]\nnope=1\n")
    assert cli.main_gmemd(["check-config", str(path)]) == 2
    assert "nope" in capsys.readouterr().err


class FakeControl:
    """Answers from a table; remembers what was asked."""

    asked = []
    upgraded = False
    hnode = {
        "hnid": 1, "name": "[red]gpu", "driver": "simgpu", "used_bytes": 1 << 20, "peak_bytes": 1 << 21,
        "capacity_bytes": 48 << 20, "pinned_bytes": 0, "contexts": 1, "faults": 12345, "in_bytes": 0, "out_bytes": 0,
        "evictions": 7, "errors": 0, "health": -5, "policy": "acme", "stored_bytes": 3 << 20,
        "last_error": "it [i]fell off the bus",
    }  # fmt: skip
    session = {
        "session": 3, "uid": 1000, "pid": 77, "name": "py[b]thon", "mapped_bytes": 4096, "regions": 2, "contexts": 1,
        "host_faults": 5, "device_faults": 6, "resident_bytes": {"0": 4096, "1": 8192},
        "quota_bytes": {"1": 1 << 20},
    }  # fmt: skip
    stuck = {"thread": "fill 71", "doing": "a page fault", "waits_for": "peer_map of slow0", "session": 3, "va": 4096,
             "seconds": 7.5}  # fmt: skip
    region = {"session": 3, "va": 0x660000000000, "bytes": 8192, "page_bytes": 4096, "huge": False, "fork": "share"}
    counters = {"sessions": 1, "regions": 2, "contexts": 1, "h2d_bytes": 1 << 20, "d2h_bytes": 0, "evictions": 7,
                "migration_ns": 1_500_000_000}  # fmt: skip
    replies = {
        "ping": {"version": "9", "pid": 5}, "devices": {"devices": [hnode]}, "sessions": {"sessions": [session]},
        "stats": {"stats": counters, "hnodes": [hnode], "stuck": [stuck]}, "map": {"regions": [region], "total": 9},
        "drivers": {"drivers": [{"name": "simgpu", "builtin": True, "origin": "gmemd"}]},
        "attach": {"hnid": 4}, "detach": {}, "limit": {}, "quota": {}, "upgrade": {},
    }  # fmt: skip

    def __init__(self, path):
        self.path = path

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass

    def request(self, op, timeout_s=None, **args):
        self.asked.append((self.path, op, args))
        if op == "upgrade":
            FakeControl.upgraded = True
        if op == "ping":
            return {"version": "9", "pid": 6 if FakeControl.upgraded else 5}
        if args.get("name") == "bad":
            raise RequestError(2, "name: no device bad is attached", "name")
        return dict(self.replies[op])


@pytest.fixture
def ctl(monkeypatch, capsys):
    monkeypatch.setattr(cli, "Control", FakeControl)
    FakeControl.asked = []

    def ctl(*argv):
        FakeControl.upgraded = False
        status = cli.main_gmemctl(argv)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return ctl


@pytest.mark.parametrize(
    "argv, words",
    [
        (
            ["status"],
            ["gmemd 9, pid 5", "1 session, 2 regions, 1 context;", "[red]gpu", "py[b]thon", "[red]gpu:8.0 KiB/1.0 MiB"],
        ),
        (["devices"], ["[red]gpu", "48.0 MiB", "3.0 MiB", "12,345", "errno 5"]),
        (["sessions"], ["py[b]thon", "1000", "77", "[red]gpu:8.0 KiB"]),
        (["drivers"], ["simgpu", "yes"]),
        (["stats"], ["migration", "1.500 s", "h2d", "1.0 MiB", "stuck for 7.5 s", "peer_map of slow0"]),
        (["map"], ["0x660000000000", "shmem", "8 more"]),
        (["top", "--count", "2", "--interval", "0.05"], ["gmemd 9"]),
        (["attach", "simgpu", "g", "capacity=1M", "x=a=b"], ["g is attached as hnode 4"]),
        (["detach", "g", "--force"], ["g is detached"]),
        (["limit", "host", "2G"], ["host: at most 2G"]),
        (["quota", "host", "512M", "--uid", "1000"], ["host: at most 512M"]),
        (["quota", "g", "0", "--session", "3"], ["g: no quota"]),
        (["upgrade"], ["gmemd 9, pid 6, has taken over"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_commands_print_for_people_and_for_programs(ctl, argv, words):
    status, out, err = ctl(*argv)
    assert status == 0 and not err
    for word in words:
        assert word in out
    for with_json in (["--json", *argv], [argv[0], "--json", *argv[1:]]):
        status, out, _ = ctl(*with_json)
        lines = out.splitlines() if argv[0] == "top" else [out]
        assert status == 0 and len(lines) == (2 if argv[0] == "top" else 1)
        assert all(isinstance(json.loads(line), dict) for line in lines)


def test_every_command_has_a_table():
    assert show.SHOW.keys() == cli._COMMANDS.keys()


def test_what_is_asked(ctl):
    ctl("--socket", "/s", "attach", "simgpu", "g", "capacity=1M", "x=a=b")
    ctl("--socket", "/s", "detach", "g", "--force")
    ctl("--socket", "/s", "limit", "host", "2G")
    ctl("--socket", "/s", "quota", "g", "512M", "--session", "3")
    ctl("--socket", "/s", "quota", "g", "0", "--uid", "1000")
    ctl("--socket", "/s", "map", "--session", "3", "--limit", "5")
    assert FakeControl.asked == [
        ("/s", "attach", {"driver": "simgpu", "name": "g", "config": {"capacity": "1M", "x": "a=b"}}),
        ("/s", "detach", {"name": "g", "force": True}),
        ("/s", "limit", {"name": "host", "bytes": 2 << 30}),
        ("/s", "quota", {"name": "g", "bytes": 512 << 20, "session": 3}),
        ("/s", "quota", {"name": "g", "bytes": 0, "uid": 1000}),
        ("/s", "map", {"limit": 5, "session": 3}),
    ]


def test_where_the_socket_comes_from(ctl, monkeypatch):
    monkeypatch.setenv("GMEM_SOCKET", "/env")
    ctl("devices")
    monkeypatch.delenv("GMEM_SOCKET")
    ctl("devices")
    assert [path for path, _, _ in FakeControl.asked] == ["/env", "/run/gmem/gmemd.sock"]


def test_failures(ctl, monkeypatch, tmp_path):
    assert ctl("attach", "simgpu", "g", "capacity")[::2] == (2, "gmemctl: 'capacity' is not KEY=VALUE\n")
    assert ctl("detach", "bad")[::2] == (1, "gmemctl: name: no device bad is attached (ENOENT)\n")
    status, _, err = ctl("limit", "host", "lots")
    assert status == 2 and "size" in err and "lots" in err
    monkeypatch.undo()
    status, _, err = ctl("--socket", str(tmp_path / "none"), "devices")
    assert status == 1 and f"no gmemd at {tmp_path}/none" in err


@pytest.mark.parametrize("argv", [[], ["explode"], ["attach"], ["map", "--session", "x"], ["quota", "g", "1G"],
                                  ["quota", "g", "1G", "--session", "1", "--uid", "1"]])  # fmt: skip
def test_usage(argv):
    with pytest.raises(SystemExit) as caught:
        cli.main_gmemctl(argv)
    assert caught.value.code == 2
