# SPDX-License-Identifier: Apache-2.0
"""Faults planted into the core, each the loss of one guard. The state machine of test_core_machine.py has to find every
one of them, or it proves less than it says.

usage: mutants.py [--seed N] [--examples N] [NAME...]; ends with one line for each. Needs `make build` and gcc."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
OBJECTS = ROOT / "build" / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
FOLDER = ROOT / "build" / "mutants"
FLAGS = ["-std=gnu11", "-O1", "-fPIC", "-w", "-pthread", "-Icsrc/include", "-Iclient/include", "-iquote", "csrc"]
PATIENCE_S = "3"
LIMIT_S = 300


class Mutant(NamedTuple):
    file: str
    guard: str
    instead: str


MUTANTS = {
    "copies_while_the_source_is_writable": Mutant(
        "csrc/migrate.c",
        "err = gmem_object_for_views(first->object, writer, first->offset, count * first->bytes, protect_view, NULL);",
        "err = 0; (void)protect_view;"),
    "leaves_old_copies": Mutant(
        "csrc/migrate.c",
        "err = gmem_file_punch(file, page->object->offset + page->offset, page->bytes);\n\t}\n\tgmem_crash",
        ";\n\t}\n\tgmem_crash"),
    "wakes_nobody_at_a_commit": Mutant(
        "csrc/migrate.c", "if (old & GMEM_WORD_WAITERS)\n\t\tgmem_page_wake(page);", ""),
    "forgets_accounts_at_an_eviction": Mutant(
        "csrc/migrate.c", "page->bytes);\n\tgmem_hnode_frame_free(hnode, page->object, page->index);\n\tif (err)",
        "page->bytes);\n\tif (err)"),
    "wakes_nobody_after_recovery": Mutant(
        "csrc/recover.c", "gmem_uffd_wake(view->uffd, view->as->regions[i]->va, view->as->regions[i]->bytes);", ";"),
    "keeps_what_a_dead_daemon_was_dropping": Mutant(
        "csrc/recover.c", "else if (dir == GMEM_DIR_UPGRADE || dir == GMEM_DIR_DISCARD)\n\t\tgone = ~valid;", ""),
    "keeps_what_a_dead_daemon_was_filling": Mutant(
        "csrc/recover.c", "gone = 1u << gmem_word_target(word) & ~valid;", ";"),
    "lost_pages_read_zero": Mutant(
        "csrc/recover.c",
        "index << object->shift, 0, 0, -EIO);\n"
        "\treturn gmem_word_set_state(gmem_word_set_why(0, GMEM_WHY_LOST), GMEM_POISONED);",
        "index << object->shift, 0, 0, -EIO);\n\treturn 0;"),
    "contexts_outlive_their_device": Mutant(
        "csrc/recover.c", "if (context && pidfd >= 0)\n\t\t\tsyscall(SYS_pidfd_send_signal, pidfd, SIGKILL, NULL, 0);",
        ""),
    "leaves_pages_of_cut_regions": Mutant(
        "csrc/recover.c", "release_unmapped(core->recovery);", ";"),
    "does_not_look_at_processes": Mutant(
        "csrc/recover.c", "for_sessions(core, gmem_reconcile);", ";"),
}  # fmt: skip


def build(name: str) -> Path:
    """The extension with that fault, linked from the objects of `make build`."""
    mutant = MUTANTS[name]
    text = (ROOT / mutant.file).read_text()
    if text.count(mutant.guard) != 1:
        raise RuntimeError(f"{name}: {mutant.file} has the guard {text.count(mutant.guard)} times, not once")
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / Path(mutant.file).name
    source.write_text(text.replace(mutant.guard, mutant.instead))
    changed = source.with_suffix(".o")
    defines = optional("flags")
    subprocess.run(["gcc", *FLAGS, *defines, "-c", str(source), "-o", str(changed)], cwd=ROOT, check=True)
    unchanged = OBJECTS / Path(mutant.file).with_suffix(".o")
    others = [path for path in sorted((OBJECTS / "csrc").rglob("*.o")) if path != unchanged]
    core = folder / f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"
    bridge = OBJECTS / "build" / "cython" / "gmemd" / "_core.o"
    objects = [str(path) for path in (bridge, changed, *others)]
    subprocess.run(["gcc", "-shared", "-pthread", *objects, *optional("libs"), "-o", str(core)], check=True)
    return core


def optional(what: str) -> list[str]:
    """Flags or libraries of what the core was built with where it can be had."""
    return subprocess.run([".ci/optional", "gcc", what], cwd=ROOT, capture_output=True, text=True).stdout.split()


def survives(name: str, seed: int | None, examples: int) -> bool:
    """Whether the state machine finds nothing."""
    environ = {**os.environ, "GMEM_MODEL_CORE": str(build(name)), "GMEM_MODEL_EXAMPLES": str(examples),
               "GMEM_MODEL_NO_SHRINK": "1", "GMEM_MODEL_PATIENCE_S": PATIENCE_S}  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--timeout", str(LIMIT_S),
               str(Path(__file__).with_name("test_core_machine.py"))]  # fmt: skip
    if seed is not None:
        environ["GMEM_MODEL_SEED"] = str(seed)
        command.append(f"--hypothesis-seed={seed}")
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=2 * LIMIT_S)
    if done.returncode not in (0, 1) or "skipped" in done.stdout:
        raise RuntimeError(f"{name}: the state machine did not run\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int)
    parser.add_argument("--examples", type=int, default=100)
    parser.add_argument("names", nargs="*", default=list(MUTANTS))
    args = parser.parse_args()
    alive = 0
    for name in args.names:
        began = time.monotonic()
        survived = survives(name, args.seed, args.examples)
        alive += survived
        print(f"{name}: {'NOT FOUND' if survived else 'found'}, {time.monotonic() - began:.0f} s", flush=True)
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
