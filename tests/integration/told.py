# SPDX-License-Identifier: Apache-2.0
"""Processes that do what a test tells them, one after the other."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import textwrap
from typing import Any

from helpers import ROOT, as_user

_LOOP = """
import json, sys
import gmem, numpy as np
gmem.connect()
names = {"gmem": gmem, "np": np}
for line in sys.stdin:
    try:
        names["answer"] = None
        exec(json.loads(line), names)
        told = {"answer": names["answer"]}
    except gmem.GmemError as error:
        told = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(told), flush=True)
"""


class Told:
    """A client of the gmemd at that socket, in a process of its own, which ends with the test."""

    def __init__(self, socket: str, uid: int | None = None, prefix: tuple[str, ...] = ()) -> None:
        command = ["setpriv", "--pdeathsig", "KILL", sys.executable, "-c", _LOOP]
        if uid is not None:
            command = as_user(uid, command[3:])
        self.process = subprocess.Popen(
            [*prefix, *command], env={**os.environ, "GMEM_SOCKET": socket}, cwd=ROOT, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def begin(self, code: str) -> None:
        self.process.stdin.write(json.dumps(textwrap.dedent(code)) + "\n")
        self.process.stdin.flush()

    def end(self, seconds: float = 60) -> Any:
        """What it has set `answer` to, or "Class: message" of a GmemError; the exit status if it has died."""
        assert select.select([self.process.stdout], [], [], seconds)[0], "it hangs"
        line = self.process.stdout.readline()
        if not line:
            return self.process.wait(10)
        told = json.loads(line)
        return told.get("error", told.get("answer"))

    def has_said(self) -> bool:
        """There is an answer, or an end."""
        return bool(select.select([self.process.stdout], [], [], 0)[0])

    def do(self, code: str, seconds: float = 60) -> Any:
        self.begin(code)
        return self.end(seconds)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
