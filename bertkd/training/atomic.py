"""Directories and files that appear whole or not at all, also when the power goes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Give a temporary directory to fill; it takes ``path``'s name once everything is on disk.

    What was at ``path`` is replaced. After an exception nothing is left of the temporary directory;
    after a kill ``clear_leftovers`` removes it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for item in sorted(temporary.rglob("*")):
            _sync(item)
        _sync(temporary)
        old = path.parent / f".{path.name}.{os.getpid()}.old"
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        _sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def whole_file(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, replacing what was there in one go."""
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    temporary.write_text(text, encoding="utf-8")
    _sync(temporary)
    os.replace(temporary, path)
    _sync(path.parent)


def clear_leftovers(parent: Path, stem: str) -> None:
    """Remove what killed processes left of temporary directories for names starting with ``stem``."""
    for leftover in parent.glob(f".{stem}*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
