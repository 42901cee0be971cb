# SPDX-License-Identifier: Apache-2.0
"""Docstrings of Python's standard library, read from its sources: nothing is imported or run."""

from __future__ import annotations

import ast
import inspect
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Tests, bundled foreign code, applications that happen to live beside the library, and distutils, which left with 3.12.
SKIPPED = {"__pycache__", "dist-packages", "ensurepip", "idlelib", "lib2to3", "site-packages", "turtledemo"}
SKIPPED |= {"distutils", "test", "tests"}
KINDS = ("module", "function", "class", "method")
WORDS_MIN = 3
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, order=True)
class Text:
    kind: int  # index into KINDS: what to keep first when there is a limit
    name: str  # shutil.make_archive
    summary: str  # first paragraph of the docstring, on one line

    @property
    def text(self) -> str:
        """What is embedded: the name says much of what a docstring takes for granted."""
        return f"{self.name}: {self.summary}"


def read(limit: int | None = None, root: Path | None = None) -> list[Text]:
    """Public docstrings below `root` (the running Python's standard library), each summary once, modules and functions
    before classes and methods. The order, and so what a limit keeps, depends on the sources only."""
    root = root or Path(sysconfig.get_path("stdlib"))
    found = sorted(text for path in sources(root) for text in parse(path, root))
    unique = {text.summary: text for text in reversed(found)}
    return sorted(unique.values())[:limit]


def sources(root: Path) -> Iterator[Path]:
    for entry in sorted(root.iterdir()):
        if entry.name.startswith(("_", ".", "config-")) or entry.name in SKIPPED or entry.name.endswith("_test"):
            continue
        if entry.is_dir():
            if (entry / "__init__.py").exists():
                yield entry / "__init__.py"
                yield from sources(entry)
        elif entry.suffix == ".py":
            yield entry


def parse(path: Path, root: Path) -> Iterator[Text]:
    module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in somebody else's source
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return  # such files are there on purpose, as samples
    yield from texts(tree, module, 0)


def texts(node: ast.Module | Definition, name: str, kind: int) -> Iterator[Text]:
    summary = summarise(ast.get_docstring(node, clean=False))
    if len(summary.split()) >= WORDS_MIN:
        yield Text(kind, name, summary)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return
    for child in definitions(node.body):
        if child.name.startswith("_"):
            continue
        is_class = isinstance(child, ast.ClassDef)
        inside = isinstance(node, ast.ClassDef)
        child_kind = KINDS.index("class" if is_class else "method" if inside else "function")
        yield from texts(child, f"{name}.{child.name}", child_kind)


def definitions(body: list[ast.stmt]) -> Iterator[Definition]:
    """Also those under `if` and `try`, as for platforms and optional accelerators."""
    for statement in body:
        if isinstance(statement, Definition):
            yield statement
        elif isinstance(statement, ast.If | ast.Try):
            yield from definitions(statement.body)
            for handler in getattr(statement, "handlers", []):
                yield from definitions(handler.body)
            yield from definitions(statement.orelse)


def summarise(docstring: str | None) -> str:
    paragraph = inspect.cleandoc(docstring or "").split("\n\n")[0]
    return " ".join(paragraph.split())
