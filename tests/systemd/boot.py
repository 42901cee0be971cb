# SPDX-License-Identifier: Apache-2.0
"""gmemd as a service of a systemd that has really booted: `make install` into a tree of Debian, in systemd-nspawn.

It is started, used by ordinary users, killed, upgraded, hung, restarted and stopped, with programs at work in managed
memory all the while, which check every word. Ends with one line for each check; exit status 1 if one has failed.

usage: boot.py [TREE]. As root. The tree (build/systemd-tree) is made by debootstrap the first time, and kept."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = "systemd,systemd-sysv,dbus,python3,python3-venv,libzmq5,libmsgpackc2,liburing2,libzstd1,liblz4-1"
PYTHON = os.environ.get("PYTHON", "/usr/bin/python3")
USERS = {"ann": 5001, "bob": 5002}
CONFIG = """[daemon]
log_level = "info"
[devices.simgpu0]
driver = "simgpu"
capacity = "512K"
"""
DROP_IN = "[Service]\nWatchdogSec=4\n"
WAIT_S = 60
EXPOSURE_MAX = 2.0


def wait_for(what, condition, seconds=WAIT_S):
    until = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > until:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(0.1)
    return found


def make_tree(tree: Path) -> None:
    if not (tree / "etc" / "debian_version").exists():
        shutil.rmtree(tree, ignore_errors=True)
        tree.mkdir(parents=True)
        print("debootstrap: some minutes", flush=True)
        command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(tree)]
        with open(ROOT / "build" / "debootstrap.log", "wb") as log:
            subprocess.run([*command, *mirror()], check=True, stdout=log, stderr=log)
    install = ["make", "-s", "install", f"DESTDIR={tree}", "PREFIX=/usr", f"PYTHON={PYTHON}"]
    subprocess.run(install, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    (tree / "etc" / "gmem" / "gmemd.toml").write_text(CONFIG)
    drop_in = tree / "etc" / "systemd" / "system" / "gmemd.service.d" / "test.conf"
    drop_in.parent.mkdir(parents=True, exist_ok=True)
    drop_in.write_text(DROP_IN)
    shutil.copy(Path(__file__).with_name("load.py"), tree / "opt" / "load.py")
    lines = (tree / "etc" / "passwd").read_text()
    for name, uid in USERS.items():
        if f"\n{name}:" not in lines:
            lines += f"{name}:x:{uid}:{uid}::/tmp:/bin/sh\n"
    (tree / "etc" / "passwd").write_text(lines)


def mirror() -> list[str]:
    """Where this machine has its own packages from."""
    for path in sorted(Path("/etc/apt").glob("sources.list.d/*.sources")):
        found = re.search(r"^URIs: *(\S+)", path.read_text(), re.MULTILINE)
        if found and found[1].rstrip("/").endswith("debian"):
            return [found[1]]
    return []


class Machine:
    """The container. Its own systemd is process 1 of it."""

    def __init__(self, tree: Path) -> None:
        command = ["systemd-nspawn", "-q", "-b", "-D", str(tree), "--register=no", "--keep-unit", "--console=pipe",
                   f"--machine=gmem-{os.getpid()}"]  # fmt: skip
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        self.leader = wait_for("the container", self._find_leader)
        wait_for("booted", lambda: self.run("systemctl", "is-system-running", check=False) in ("running", "degraded"))

    def _find_leader(self) -> int:
        assert self.process.poll() is None, "systemd-nspawn has ended"
        text = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(text[0]) if text else 0

    def enter(self, *command: str, user: str = "") -> list[str]:
        who = [f"--setuid={USERS[user]}", f"--setgid={USERS[user]}"] if user else []
        return ["nsenter", "-t", str(self.leader), "-m", "-u", "-i", "-n", "-p", "-r", "-w", *who, *command]

    def run(self, *command: str, user: str = "", check: bool = True) -> str:
        done = subprocess.run(
            self.enter(*command, user=user), capture_output=True, text=True, timeout=WAIT_S,
            env={"PATH": "/usr/bin:/bin"},
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}{self.log()}")
        return done.stdout.strip()

    def log(self) -> str:
        return self.run("journalctl", "-u", "gmemd.service", "-n", "40", "--no-pager", check=False)

    def main_pid(self) -> int:
        return int(self.run("systemctl", "show", "-p", "MainPID", "--value", "gmemd.service"))

    def make_device(self) -> None:
        """What the udev rule of the package does; in a container there is no udev."""
        number = os.stat("/dev/userfaultfd").st_rdev
        self.run("/bin/sh", "-c", f"mknod /dev/userfaultfd c {os.major(number)} {os.minor(number)}; "
                                  "chgrp gmem /dev/userfaultfd; chmod 660 /dev/userfaultfd")  # fmt: skip

    def off(self) -> None:
        with contextlib.suppress(Exception):
            self.run("systemctl", "poweroff", "--no-block", check=False)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


class Load:
    """A program of a user's that counts; see load.py."""

    def __init__(self, machine: Machine, tree: Path, user: str, *options: str) -> None:
        self.file = tree / "home" / f"{user}-{len(options)}"
        self.file.write_text("")
        os.chown(self.file, USERS[user], USERS[user])
        inside = f"/home/{self.file.name}"
        self.errors = open(self.file.with_suffix(".err"), "w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            machine.enter("/usr/lib/gmem/bin/python", "/opt/load.py", inside, *options, user=user),
            env={"PATH": "/usr/bin:/bin", "HOME": "/tmp"}, stderr=self.errors, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        self.goes_on("its start")

    def steps(self) -> int:
        text = self.file.read_text().strip()
        return int(text) if text.isdecimal() else 0

    def goes_on(self, after: str) -> None:
        before = self.steps()
        wait_for(f"steps after {after}", lambda: self.ended() or self.steps() > before + 3)
        assert not self.ended(), f"the program has ended after {after}: {self.file.with_suffix('.err').read_text()}"

    def ended(self) -> bool:
        return self.process.poll() is not None

    def finish(self) -> None:
        for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            os.kill(int(pid), signal.SIGTERM)
        self.process.wait(WAIT_S)
        said = self.file.read_text().strip()
        assert re.fullmatch(r"steps=\d+ wrong=0", said), f"{said}\n{self.file.with_suffix('.err').read_text()}"


class Checks:
    def __init__(self, machine: Machine, tree: Path) -> None:
        self.machine, self.tree = machine, tree
        self.bad = 0

    def check(self, what: str, function) -> None:
        began = time.monotonic()
        try:
            function()
            print(f"ok    {what} ({time.monotonic() - began:.1f} s)", flush=True)
        except Exception as error:
            self.bad += 1
            print(f"FAILED {what}: {error}\n{self.machine.log()}", flush=True)

    def run(self) -> int:
        self.check("it starts, by its units", self.starts)
        self.check("it is hardened: exposure at most 2.0", self.is_hardened)
        self.check("ordinary users use it, and do not see each other", self.is_used)
        self.load = self.bobs = None
        self.check("a program works on a device", self.begin)
        if self.load is not None:
            self.check("kill -9 under load: nothing is lost", self.is_killed)
            self.check("gmemctl upgrade under load: nothing is lost", self.is_upgraded)
            self.check("a gmemd that hangs is found by the watchdog: nothing is lost", self.hangs)
            self.check("at the end every word was right", self.load.finish)
        self.check("systemctl restart: memory keeps its content, new clients come", self.restarts)
        self.check("systemctl stop: memory keeps its content, and nothing is left", self.stops)
        return self.bad

    def starts(self) -> None:
        self.machine.make_device()
        self.machine.run("systemctl", "enable", "--now", "gmemd.socket", "gmemd.service")
        assert self.machine.run("systemctl", "is-active", "gmemd.socket", "gmemd.service") == "active\nactive"
        mode = self.machine.run("stat", "-c", "%U %a", "/run/gmem", "/run/gmem/gmemd.sock").splitlines()
        assert mode == ["gmem 755", "gmem 666"], mode

    def is_hardened(self) -> None:
        said = self.machine.run("systemd-analyze", "security", "--no-pager", "gmemd.service")
        found = re.search(r"Overall exposure level for \S+: ([\d.]+)", said)
        assert found and float(found[1]) <= EXPOSURE_MAX, said[-400:]

    def is_used(self) -> None:
        load = Load(self.machine, self.tree, "ann")
        seen = {user: self.sessions(user) for user in USERS}
        assert len(seen["ann"]) == 1 and not seen["bob"], seen
        load.finish()

    def sessions(self, user: str) -> list:
        reply = json.loads(self.machine.run("gmemctl", "sessions", "--json", user=user))
        return [session for session in (reply["sessions"] if isinstance(reply, dict) else reply) if session["uid"]]

    def begin(self) -> None:
        self.load = Load(self.machine, self.tree, "ann", "device")

    def successor(self, before: int) -> None:
        wait_for("a successor", lambda: self.machine.main_pid() not in (0, before))
        wait_for("active", lambda: self.machine.run("systemctl", "is-active", "gmemd", check=False) == "active")

    def is_killed(self) -> None:
        for _ in range(5):
            before = self.machine.main_pid()
            self.machine.run("systemctl", "kill", "-s", "KILL", "gmemd.service")
            self.successor(before)
            self.load.goes_on("kill -9")
        stored = self.machine.run("systemctl", "show", "-p", "NFileDescriptorStore", "--value", "gmemd.service")
        assert int(stored) >= 8, f"systemd holds {stored} descriptors"

    def is_upgraded(self) -> None:
        before = self.machine.main_pid()
        self.machine.run("gmemctl", "upgrade")
        self.successor(before)
        self.load.goes_on("the upgrade")

    def hangs(self) -> None:
        before = self.machine.main_pid()
        self.machine.run("/bin/sh", "-c", f"kill -STOP {before}")  # the shell's own: a minimal tree has no other
        self.successor(before)
        self.load.goes_on("the watchdog's bite")
        assert "atchdog" in self.machine.log()

    def restarts(self) -> None:
        load = Load(self.machine, self.tree, "ann")
        before = self.machine.main_pid()
        self.machine.run("systemctl", "restart", "gmemd.service")
        self.successor(before)
        load.goes_on("the restart")
        later = Load(self.machine, self.tree, "bob", "device")
        later.finish()
        load.finish()

    def stops(self) -> None:
        load = Load(self.machine, self.tree, "ann")
        self.machine.run("systemctl", "stop", "gmemd.service", "gmemd.socket")
        load.goes_on("the stop")
        load.finish()
        state = self.machine.run("systemctl", "show", "-p", "ActiveState,Result,NFileDescriptorStore", "gmemd.service")
        expected = {"ActiveState=inactive", "Result=success", "NFileDescriptorStore=0"}
        assert set(state.splitlines()) == expected, state
        left = self.machine.run("/bin/sh", "-c", "ls /run/gmem 2>/dev/null", check=False)
        assert not left, f"left in /run/gmem: {left}"


def main() -> int:
    if os.geteuid():
        print("test-systemd boots a container: it needs root", file=sys.stderr)
        return 2
    missing = [tool for tool in ("systemd-nspawn", "debootstrap", "nsenter") if not shutil.which(tool)]
    if missing:
        print(f"missing: {', '.join(missing)}; apt-get install systemd-container debootstrap", file=sys.stderr)
        return 2
    tree = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build" / "systemd-tree").resolve()
    make_tree(tree)
    machine = Machine(tree)
    try:
        bad = Checks(machine, tree).run()
    finally:
        machine.off()
    print(f"{bad} checks failed" if bad else "all checks passed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
