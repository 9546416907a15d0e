"""Docstrings parsed from Python source files: real English text that every machine already has.

Files are parsed with ``ast``; no module is ever imported.
"""

from __future__ import annotations

import ast
import inspect
import logging
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

MIN_WORDS = 5

# Tests are full of fixtures, and site-packages lies in the standard library's folder without being part of it.
_SKIPPED_FOLDERS = frozenset(
    ("__pycache__", "dist-packages", "idle_test", "lib-dynload", "site-packages", "test", "tests")
)
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Docstring:
    """One docstring and where it stands.

    Attributes:
        source: one of ``docstring_cache.SOURCES``.
        package: top-level package, e.g. ``"email"``.
        module: dotted module name, e.g. ``"email.header"``.
        qualname: dotted name inside the module; ``""`` for the module's own docstring.
        kind: ``"module"``, ``"class"`` or ``"function"`` (methods and coroutines too).
        signature: arguments and return annotation, ``"(charset, *, strict=True) -> str"``, without
            ``self`` and ``cls``; ``""`` unless ``kind`` is ``"function"``.
        text: the docstring after ``inspect.cleandoc``.
        path: source file relative to the source's root, with ``/``.
    """

    source: str
    package: str
    module: str
    qualname: str
    kind: str
    signature: str
    text: str
    path: str


def text_key(text: str) -> str:
    """The words of ``text`` in lower case: equal keys mean the same text for our purposes."""
    return " ".join(re.findall(r"[^\W\d_]+", text.lower()))


def parse_folder(root: Path, source: str, package: str | None = None) -> Iterator[Docstring]:
    """Yield the docstrings of five words or more of all ``.py`` files under ``root``, by path.

    ``package`` is the name that ``root`` itself is imported by, or ``None`` where ``root`` is a
    folder on ``sys.path``. Files that this Python cannot parse are left out.
    """
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in _SKIPPED_FOLDERS)
        for file in sorted(files):
            path = Path(folder, file)
            relative = path.relative_to(root)
            names = [*([package] if package else []), *relative.with_suffix("").parts]
            if names[-1] == "__init__":
                names.pop()
            # Folders such as config-3.11-x86_64-linux-gnu are no packages.
            if path.suffix == ".py" and names and all(name.isidentifier() for name in names):
                yield from _parse_file(path, relative.as_posix(), source, names)


def _parse_file(path: Path, relative: str, source: str, names: list[str]) -> Iterator[Docstring]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        logger.debug("left out %s: not readable as Python source", path)
        return
    for qualname, node in _definitions(tree, ""):
        text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
        if len(text.split()) < MIN_WORDS:
            continue
        kind, signature = "class" if isinstance(node, ast.ClassDef) else "module", ""
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            kind, signature = "function", _signature(node)
        module = ".".join(names)
        yield Docstring(source, names[0], module, qualname, kind, signature, text, relative)


def _definitions(node: ast.AST, prefix: str) -> Iterator[tuple[str, _Documented]]:
    if isinstance(node, ast.Module):
        yield prefix, node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            qualname = f"{prefix}.{child.name}" if prefix else child.name
            yield qualname, child
            yield from _definitions(child, qualname)
        elif isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from _definitions(child, prefix)


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    positional = [*node.args.posonlyargs, *node.args.args]
    text = ast.unparse(node.args)
    if positional and positional[0].arg in ("self", "cls"):
        first = ast.unparse(positional[0])
        text = text.removeprefix(first).removeprefix(", /").removeprefix(", ")
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"({text}){returns}"
