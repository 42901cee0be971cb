# SPDX-License-Identifier: Apache-2.0
import re
import shutil
import subprocess
from pathlib import Path

import pytest

UNIT = Path(__file__).resolve().parents[2] / "systemd" / "gmemd.service"


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_the_service_is_hardened():
    command = ["systemd-analyze", "security", "--offline=yes", "--no-pager", str(UNIT)]
    done = subprocess.run(command, capture_output=True, text=True)
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    if found is None:
        pytest.skip(f"this systemd-analyze can't look at a file: {done.stderr.strip()[:200]}")
    assert float(found[1]) <= 2.0, done.stdout


def test_the_service_keeps_what_it_needs():
    text = UNIT.read_text()
    settings = dict(line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith("#"))
    most = re.search(r"^FileDescriptorStoreMax=(\d+)", text, re.MULTILINE)
    assert most and f"FDSTORE={most[1]}" in text, "the daemon must know how many it may have held"
    assert settings["Restart"] == "always" and settings["Type"] == "notify"
    assert settings["RuntimeDirectoryPreserve"] == "yes", "else its socket is deleted under gmemd.socket"
    assert "PrivateDevices" not in settings, "it would hide /dev/userfaultfd"
    allowed = re.findall(r"^SystemCallFilter=([^~].*)", text, re.MULTILINE)
    for call in ("userfaultfd", "pidfd_getfd", "sched_setscheduler", "sched_setaffinity"):
        assert any(call in line.split() for line in allowed), f"{call} is not in @system-service, or is taken out again"
